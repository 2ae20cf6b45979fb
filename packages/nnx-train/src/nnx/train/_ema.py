"""EMA: a moving average of a model's parameters, to be evaluated in their place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from nnx.core import Module, Param, State, StructureError, Variable
from nnx.train._branches import attribute_name, changed_parameters, nested
from nnx.train._updates import known_names

__all__ = ["EMA", "EMAState"]

M = TypeVar("M", bound=Module)


class EMAState(Variable):
    """A moving average."""

    collection = "ema"


class EMA(Module):
    """The exponential moving average of a model's parameters over the steps of its training.

    `average = decay * average + (1 - decay) * parameter` at each update, in float32 at least: the steps of an average
    of half precision would be too small to change it. With `debias` the weights of the parameters seen are made to sum
    to 1, as in Adam (Kingma and Ba, 2014, arXiv:1412.6980), so that what the parameters were before the first update
    has no part; without it the average starts as that.

    It holds no reference to the model, as an Optimizer does not. A tied parameter is averaged once. A TrainState holds
    an EMA as `ema.partition()`, and its `params` are handed to `update` in the model's place.

    Args:
        model: the Module, or a State of it.
        decay: how much of the average stays at each update, or a function from the number of updates made before to
            that: `lambda step: jnp.minimum(0.999, (1 + step) / (10 + step))`.
        wrt: the filter of what is averaged. What is no floating-point array is copied.
        debias: whether the average is one of the values seen alone.

    Attributes:
        step: the number of updates made so far, an int32 array.
        weight: the sum of the weights of the values seen so far, a float32 array; 1 without debias.

    Raises:
        TypeError: `model` is neither a Module nor a State.
        ValueError: decay is not between 0 and 1.
        StructureError: `wrt` selects nothing of the model.

    Example:
        >>> model = nnx.Linear(1, 1, use_bias=False, ctx=nnx.context(0))
        >>> ema = nnx.EMA(model, decay=0.5)
        >>> @nnx.jit
        ... def step(model, ema, value):
        ...     model.kernel = jnp.full((1, 1), value)
        ...     ema.update(model)
        >>> for value in (1.0, 4.0):
        ...     step(model, ema, value)
        >>> with ema.swapped_into(model):
        ...     print(model(jnp.ones((1, 1))))
        [[3.]]
        >>> print(model.kernel)
        [[4.]]
    """

    step: jax.Array
    weight: jax.Array

    def __init__(
        self,
        model: Module | State,
        decay: float | Callable[[jax.Array], Any] = 0.999,
        wrt: Any = Param,
        *,
        debias: bool = True,
    ) -> None:
        if not callable(decay) and not 0 <= decay < 1:
            raise ValueError(f"EMA: decay is what stays of the average, at least 0 and below 1; got {decay}")
        self.decay: Callable[[jax.Array], Any] | float = decay if callable(decay) else float(decay)
        self.wrt = wrt
        self.debias = debias
        params = _select(model, wrt, "EMA")
        if not params:
            kind, known = type(model).__name__, _select(model, ..., "EMA").paths
            raise StructureError(
                f"EMA: wrt={wrt!r} selects nothing of this {kind}: {known_names('', map('/'.join, known))}"
            )
        self._paths = params.paths
        self._slots = tuple(("average", *map(attribute_name, path)) for path in params.paths)
        step: Any = EMAState(jnp.zeros((), jnp.int32))
        weight: Any = EMAState(jnp.asarray(0.0 if debias else 1.0, jnp.float32))
        self.step, self.weight = step, weight
        self.average: Module = nested(
            [
                # An average is split over a mesh as its parameter is.
                (slot[1:], EMAState(jax.tree.map(_first, value), sharding=metadata.get("sharding")))
                for slot, value, (_, _, metadata) in zip(
                    self._slots, params.raw_values, params.schema.entries, strict=True
                )
            ]
        )

    def update(self, model: Module | State) -> None:
        """Take the parameters as they are now into the average.

        Args:
            model: the Module that this EMA was made for, or one of the same structure, or a State of it.

        Raises:
            TypeError: `model` is neither a Module nor a State.
            StructureError: its parameters are not those that the EMA was made for.
        """
        params = self._params(model)
        # Of a number as a Python float: 1 - 0.9999 in float32 is off in the fourth digit.
        fresh = jnp.asarray(1.0 - (self.decay(self.step) if callable(self.decay) else self.decay), jnp.float32)
        # The debiased average itself is what is kept: the same numbers as dividing by the weight whenever it is read,
        # and no division by 0 before the first update.
        weight = self.weight + (1.0 - self.weight) * fresh if self.debias else self.weight
        share = fresh / jnp.where(weight > 0, weight, 1.0)
        state = self.filter(EMAState)
        old = dict(zip(state.paths, state.raw_values, strict=True))
        new: dict[tuple[str, ...], Any] = {("step",): self.step + 1, ("weight",): weight}
        for slot, value in zip(self._slots, params.raw_values, strict=True):
            new[slot] = jax.tree.map(lambda average, x: _moved(average, x, share), old[slot], value)
        self.update_state(state.replace_values([new[path] for path in state.paths]))

    def state(self, like: Module | State) -> State:
        """The averages as a State with the paths, collections and dtypes of the model's own.

        The arrays are those of the EMA, where the dtypes agree: a step that donates the EMA consumes them.

        Args:
            like: the model, or a State of it.

        Raises:
            TypeError: `like` is neither a Module nor a State.
            StructureError: its parameters are not those that the EMA was made for.
        """
        params = self._params(like)
        state = self.filter(EMAState)
        held = dict(zip(state.paths, state.raw_values, strict=True))
        return params.replace_values(
            [
                jax.tree.map(_with_dtype_of, held[slot], value)
                for slot, value in zip(self._slots, params.raw_values, strict=True)
            ]
        )

    def averaged(self, model: M) -> M:
        """A copy of the model, all arrays its own, with the averages in the place of its parameters.

        Raises:
            TypeError: `model` is no Module.
            StructureError: its parameters are not those that the EMA was made for.
        """
        _check_module(model, "averaged")
        copy = model.clone()
        copy.update_state(_copied(model.get_state() | self.state(model)))
        return copy

    def copy_to(self, model: Module) -> None:
        """Write the averages over the model's parameters.

        Raises:
            TypeError: `model` is no Module.
            StructureError: its parameters are not those that the EMA was made for.
        """
        _check_module(model, "copy_to")
        model.update_state(_copied(self.state(model)))

    @contextlib.contextmanager
    def swapped_into(self, model: M) -> Iterator[M]:
        """Hold the averages in the place of the model's parameters during a `with` block.

        No array is copied, so the block must not donate the model. Afterwards the parameters are what they were,
        whatever the block did to them; what else it changed stays.

        Raises:
            TypeError: `model` is no Module.
            StructureError: its parameters are not those that the EMA was made for.
        """
        _check_module(model, "swapped_into")
        params = self._params(model)
        model.update_state(self.state(params))
        try:
            yield model
        finally:
            model.update_state(params)

    def _params(self, model: Module | State) -> State:
        params = _select(model, self.wrt, "EMA.update")
        if params.paths != self._paths:
            raise StructureError(changed_parameters("EMA", self._paths, params.paths))
        return params


def _select(model: Module | State, wrt: Any, owner: str) -> State:
    if not isinstance(model, (Module, State)):
        raise TypeError(f"{owner} takes a Module or a State, got {type(model).__name__}")
    return model.filter(wrt)


def _check_module(model: Any, method: str) -> None:
    if not isinstance(model, Module):
        raise TypeError(f"EMA.{method} takes a Module, got {type(model).__name__}; for a State there is `EMA.state`")


def _copied(state: State) -> State:
    """The same in arrays of its own: a step may donate the model that they came from, or the EMA."""
    return jax.tree.map(lambda x: x.copy() if isinstance(x, jax.Array) else x, state)


def _is_averaged(x: Any) -> bool:
    dtype = getattr(x, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)


def _first(x: Any) -> Any:
    """An average before the first update: the value, in an array of its own, as the model's may be donated."""
    if isinstance(x, jax.ShapeDtypeStruct):
        dtype = jnp.promote_types(x.dtype, jnp.float32) if _is_averaged(x) else x.dtype
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)
    if not _is_averaged(x):
        return jnp.array(x)
    return jnp.array(x, jnp.promote_types(x.dtype, jnp.float32))


def _moved(average: Any, x: Any, share: jax.Array) -> Any:
    if not _is_averaged(x):
        return jnp.asarray(x)
    return average + (x - average) * share.astype(average.real.dtype)


def _with_dtype_of(average: Any, x: Any) -> Any:
    if isinstance(average, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(average.shape, x.dtype, sharding=average.sharding)
    return average.astype(jnp.result_type(x)) if _is_averaged(x) else average
