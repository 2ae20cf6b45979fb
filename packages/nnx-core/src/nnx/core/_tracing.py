"""Which JAX trace are we in: the one place that touches JAX's trace state and its private names."""

from __future__ import annotations

import sys
import types
import weakref
from typing import Any

import jax
from jax._src import config as _jax_config
from jax._src import core as _jax_core
from jax._src.interpreters import batching as _batching

__all__ = [
    "TraceRef",
    "calling_line",
    "current_trace",
    "describe_trace",
    "eager_trace",
    "is_batched",
    "is_eager",
    "is_tracer",
    "jit_is_disabled",
    "varying_axes",
]

TraceRef = weakref.ref[Any]

_trace_context = _jax_core.trace_ctx


def current_trace() -> TraceRef:
    """Return a token of the current trace: the same object (`is`) within one trace, another one in any other.

    The token holds the trace weakly, so a Module that outlives its trace keeps no tracer alive; and since the token
    itself is compared, a new trace at a freed address is never mistaken for the old one.

    `jax.extend.core.get_opaque_trace_state` is the public form of the same fact; it builds an object at each call and
    compares in Python, which an attribute write would feel (0.4 us against 0.15).
    """
    return _trace_context.trace._weakref  # type: ignore[no-any-return]


def describe_trace(token: TraceRef) -> str:
    """Say what kind of trace a token stands for, and which function is traced where JAX knows it."""
    trace = token()
    if trace is None:
        return "a JAX trace that has ended"
    name = type(trace).__name__
    text = _TRACE_NAMES.get(name, f"a JAX trace ({name})")
    info = getattr(getattr(trace, "frame", None), "debug_info", None)
    if info is not None:
        text += f": {info.traced_for} of {info.func_src_info}"
    return text


_TRACE_NAMES = {
    "EvalTrace": "eager code, outside of any JAX transform",
    "DynamicJaxprTrace": "the body of a staged transform",
    "JVPTrace": "the body of a derivative (jax.grad, jax.jvp, ...)",
    "LinearizeTrace": "the body of a derivative (jax.grad, jax.vjp, ...)",
    "BatchTrace": "the body of jax.vmap",
    "ShardMapTrace": "the body of jax.shard_map",
}

_LIBRARIES = ("nnx.core.", "nnx.layers.", "nnx.train.", "jax.", "jaxlib.")


def calling_line() -> str:
    """The line of the user's code that is running: the innermost frame outside of nnx and JAX, as `file:line`."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if not frame.f_globals.get("__name__", "").startswith(_LIBRARIES):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return "an unknown line"


def is_tracer(value: object) -> bool:
    """Whether `value` is an abstract value of some trace rather than data."""
    return isinstance(value, jax.core.Tracer)


def is_eager() -> bool:
    """Whether this is plain Python, in no trace at all."""
    return _trace_context.trace is _jax_core.eval_trace


def eager_trace() -> TraceRef:
    """The token of eager code: what `current_trace` gives outside of any transform."""
    return _jax_core.eval_trace._weakref  # type: ignore[no-any-return]


def jit_is_disabled() -> bool:
    """Whether `jax.disable_jit` is in force, so that what would be compiled runs as plain Python."""
    return bool(_jax_config.disable_jit.value)


def is_batched(value: object) -> bool:
    """Whether `value` differs along the axis of the `jax.vmap` whose body is running."""
    return (
        isinstance(value, _batching.BatchTracer)
        and value._trace is _trace_context.trace
        and value.batch_dim is not None
    )


def varying_axes(value: object) -> frozenset[str]:
    """The mesh axes along which `value` differs inside of `jax.shard_map`, as far as JAX has followed it."""
    aval: Any = jax.typeof(value)
    marks = getattr(aval, "mat", None)
    return frozenset(marks.varying if marks is not None else getattr(aval, "vma", ()))
