"""Helpers for tests: how often a function is traced, and how much memory its compiled form takes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

from nnx.core.transforms._jit import JitWrapped

__all__ = ["assert_memory", "assert_traces", "counted"]

P = ParamSpec("P")
R = TypeVar("R")

_COUNT = "__nnx_runs__"


def counted(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function count how often its Python body runs, for `assert_traces`.

    Args:
        function: the function. Give what comes back to the transform.

    Example:
        >>> import jax.numpy as jnp, nnx
        >>> body = nnx.testing.counted(lambda x: x * 2)
        >>> double = nnx.jit(body)
        >>> with nnx.testing.assert_traces(body, 1):
        ...     _ = double(jnp.ones(3)), double(jnp.ones(3))
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        wrapper.__dict__[_COUNT] += 1
        return function(*args, **kwargs)

    wrapper.__dict__[_COUNT] = 0
    return wrapper


def _runs(function: Any) -> int:
    if isinstance(function, JitWrapped):
        return function._log.traces
    runs = getattr(function, "__dict__", {}).get(_COUNT)
    if runs is None:
        raise TypeError(
            f"assert_traces takes a function of nnx.jit, or one that nnx.testing.counted made, got {function!r:.80}"
        )
    return int(runs)


@contextlib.contextmanager
def assert_traces(function: Callable[..., Any], n: int) -> Iterator[None]:
    """Check that a function is traced exactly `n` times in the block.

    Args:
        function: a function that `nnx.jit` compiled, or one that `counted` made and any transform runs. Of a counted
            one each run of its Python body counts, so it must not be called but by transforms.
        n: the number of times.

    Raises:
        AssertionError: it was traced another number of times. What differed, `nnx.explain_retraces()` says.
    """
    before = _runs(function)
    yield
    got = _runs(function) - before
    if got != n:
        name = getattr(function, "__qualname__", repr(function))
        raise AssertionError(
            f"{name} was traced {got} times, and {n} were expected; "
            "`with nnx.explain_retraces():` around the calls says what differed"
        )


def assert_memory(
    compiled: Any,
    *,
    like: Any = None,
    temporaries: int | None = None,
    outputs: int | None = None,
    tolerance: float = 0.0,
) -> None:
    """Check how much memory a compiled function takes.

    Args:
        compiled: what `nnx.jit(f).lower(...).compile()` or `jax.jit(f).lower(...).compile()` gives.
        like: another one that may take as much.
        temporaries: the most bytes of temporary buffers; that of `like` if it is None.
        outputs: the most bytes of outputs that alias no input; that of `like` if it is None.
        tolerance: the part by which they may be exceeded, 0.01 for one percent.

    Raises:
        AssertionError: it takes more.
        ValueError: there is nothing to compare with, or the backend does not say.

    Example:
        >>> import jax, jax.numpy as jnp, nnx
        >>> ours = nnx.jit(lambda x: jnp.sin(x)).lower(jnp.ones(8)).compile()
        >>> raw = jax.jit(lambda x: jnp.sin(x)).lower(jnp.ones(8)).compile()
        >>> nnx.testing.assert_memory(ours, like=raw)
    """
    own = _sizes(compiled)
    if like is not None:
        allowed = _sizes(like)
        temporaries = allowed[0] if temporaries is None else temporaries
        outputs = allowed[1] if outputs is None else outputs
    if temporaries is None and outputs is None:
        raise ValueError("assert_memory takes `like`, `temporaries` or `outputs` to compare with")
    for what, got, most in (("temporaries", own[0], temporaries), ("outputs", own[1], outputs)):
        if most is not None and got > most * (1 + tolerance):
            raise AssertionError(f"{got:,} bytes of {what}, and at most {most:,} were expected")


def _sizes(compiled: Any) -> tuple[int, int]:
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise ValueError("this backend does not say how much memory a compiled function takes")
    return analysis.temp_size_in_bytes, analysis.output_size_in_bytes - analysis.alias_size_in_bytes
