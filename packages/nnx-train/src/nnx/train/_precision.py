"""Precision: the floating-point types that parameters are kept in, that a step computes in, and that come out of it."""

from __future__ import annotations

import contextlib
import dataclasses
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from nnx.core import Context, Module, Param, State, buffers, to_filter

__all__ = ["Precision"]

T = TypeVar("T")
M = TypeVar("M", bound=Module)

Rules = tuple[tuple[Any, Any], ...]


@dataclasses.dataclass(frozen=True)
class Precision:
    """A policy of floating-point types: computing in half precision, with parameters and results in full.

    Half the bytes, and on accelerators the fast units. A gradient step is too small for half precision to show in a
    parameter, so the parameters stay float32 and are cast on their way into the computation; their gradients come back
    as float32 through the cast. float16 needs a `LossScale` as well, bfloat16 has the range of float32.

    Only floating-point arrays are ever cast: integers, booleans, complex numbers, random keys and Python numbers stay.
    Of a Module or a State only what `wrt` selects is: by default parameters and plain arrays, and not the statistics
    of normalisation or a cache, which are to be written in the type that they have.

    Each type is a dtype, None to leave everything as it is, or a mapping from filters to those, of which the first that
    matches counts: `compute={nnx.PathGlob("head/**"): jnp.float32, ...: jnp.bfloat16}`.

    Args:
        compute: what is computed in.
        params: what parameters are kept in.
        output: what comes out.
        wrt: a filter, which values of Modules and States are cast.

    Raises:
        TypeError: a type is no floating-point dtype.

    Example:
        >>> precision = nnx.Precision(compute=jnp.bfloat16)
        >>> model = nnx.Linear(2, 3, ctx=nnx.context(0))
        >>> precision.call(model, jnp.ones((4, 2))).dtype.name, model.kernel.dtype.name
        ('float32', 'float32')
        >>> precision.cast_to_compute({"x": jnp.ones(2), "n": jnp.arange(2)})["x"].dtype.name
        'bfloat16'
    """

    compute: Any = jnp.bfloat16
    params: Any = jnp.float32
    output: Any = jnp.float32
    wrt: Any = (Param, buffers)

    def __post_init__(self) -> None:
        for name in ("compute", "params", "output"):
            object.__setattr__(self, name, _rules(name, getattr(self, name)))
        object.__setattr__(self, "wrt", to_filter(self.wrt))

    def cast_to_compute(self, value: T) -> T:
        """Cast to what is computed in: a batch, or parameters.

        Args:
            value: a State, a Module, or any pytree of arrays (and of those). Of a Module a copy is made: what a call
                writes to the copy, a running average say, does not reach the original. Use `call` for that.

        Returns:
            The same, with other dtypes.
        """
        return self._cast(value, self.compute)

    def cast_to_params(self, value: T) -> T:
        """Cast to what parameters are kept in; see `cast_to_compute`."""
        return self._cast(value, self.params)

    def cast_to_output(self, value: T) -> T:
        """Cast to what comes out; see `cast_to_compute`."""
        return self._cast(value, self.output)

    def call(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call a Module in the computing type: `precision.call(model, x, ctx=ctx)`.

        Parameters and arguments are cast, and the result to the output's type. It is the Module itself that is called:
        what it writes, running averages and random streams, stays written.

        Args:
            function: a Module, or a bound method of one.
            *args: its arguments. Modules and Contexts among them are handed on as they are.
            **kwargs: its arguments by name.

        Raises:
            TypeError: `function` is neither.
            TraceContextError: the Module belongs to another trace.
        """
        module = function.__self__ if isinstance(function, types.MethodType) else function
        if not isinstance(module, Module):
            raise TypeError(f"Precision.call takes a Module or a bound method of one, got {type(function).__name__}")
        args, kwargs = self._cast((args, kwargs), self.compute, modules=False)
        with self.computing(module):
            return self._cast(function(*args, **kwargs), self.output, modules=False)

    @contextlib.contextmanager
    def computing(self, module: M) -> Iterator[M]:
        """Hold a Module's parameters in the computing type during a `with` block.

        Afterwards they are what they were. What the block itself writes in their place stays, in the old type.

        Args:
            module: the Module, changed in place.

        Raises:
            TraceContextError: the Module belongs to another trace.
        """
        leaves = module.mutable_state_dict()
        state = module.filter(self.wrt)
        held = []
        for path, old, new in zip(
            state.paths, state.raw_values, self._cast(state, self.compute).raw_values, strict=True
        ):
            if new is not old:
                held.append((leaves[path], leaves[path].value, new))
                leaves[path].value = new
        try:
            yield module
        finally:
            for leaf, old, new in held:
                leaf.value = old if leaf.value is new else jax.tree.map(_like, leaf.value, old)

    def _cast(self, value: Any, rules: Rules, *, modules: bool = True) -> Any:
        if not rules:
            return value

        def cast(key_path: Any, item: Any) -> Any:
            if isinstance(item, State):
                return self._cast_state(item, rules)
            if isinstance(item, Module) and modules:
                state, moduledef = item.partition()
                return moduledef.merge(self._cast_state(state, rules))
            if isinstance(item, (Module, Context)):
                return item
            path = tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in key_path)
            return _cast_array(item, next((dtype for key, dtype in rules if key(path, item)), None))

        return jax.tree_util.tree_map_with_path(
            cast, value, is_leaf=lambda item: isinstance(item, (Module, Context, State))
        )

    def _cast_state(self, state: State, rules: Rules) -> State:
        groups: Any = state.filter(self.wrt).filter(*(key for key, _ in rules))
        dtypes = {
            path: dtype
            for group, (_, dtype) in zip(groups if len(rules) > 1 else (groups,), rules, strict=True)
            for path in group.paths
        }

        def cast(path: tuple[str, ...], value: Any) -> Any:
            return jax.tree.map(lambda x: _cast_array(x, dtypes[path]), value) if path in dtypes else value

        return state.map(cast)


def _rules(name: str, given: Any) -> Rules:
    """A type, or types by filter, as pairs that can be compared and hashed."""
    if given is None or isinstance(given, tuple):
        return given or ()
    pairs = given.items() if isinstance(given, Mapping) else [(..., given)]
    return tuple((to_filter(key), None if dtype is None else _floating(name, dtype)) for key, dtype in pairs)


def _floating(name: str, given: Any) -> Any:
    try:
        dtype = jnp.dtype(given)
    except TypeError as error:
        raise TypeError(
            f"Precision: `{name}` is a dtype, None, or a mapping from filters to those; got {given!r}"
        ) from error
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"Precision: `{name}` is a floating-point dtype, got {dtype.name}")
    return dtype


def _cast_array(x: Any, dtype: Any) -> Any:
    """`x` in another type; itself if it has that already, or is no floating-point array."""
    own = getattr(x, "dtype", None)
    if dtype is None or own is None or own == dtype or not jnp.issubdtype(own, jnp.floating):
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)
    return x.astype(dtype)


def _like(new: Any, old: Any) -> Any:
    return _cast_array(new, getattr(old, "dtype", None)) if isinstance(old, (jax.Array, np.ndarray)) else new
