"""LossScale: keeps float16 gradients in range by a factor on the loss, and leaves out the steps where it failed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from nnx.core import Module, State, Variable
from nnx.train._optimizer import Optimizer, OptState
from nnx.train._train_state import TrainState

__all__ = ["LossScale", "LossScaleState", "all_finite"]


class LossScaleState(Variable):
    """The scale, and what decides when it changes."""

    collection = "loss_scale"


def all_finite(tree: Any) -> jax.Array:
    """Whether every floating-point value in a pytree of arrays is finite: neither infinite nor NaN.

    Args:
        tree: gradients, or any pytree; integers in it are finite.

    Returns:
        A boolean array without axes. Nothing waits for it until it is looked at.

    Example:
        >>> print(nnx.all_finite({"a": jnp.ones(3), "b": jnp.arange(2)}), nnx.all_finite([jnp.array([1.0, jnp.inf])]))
        True False
    """
    checks = [
        jnp.all(jnp.isfinite(leaf))
        for leaf in jax.tree.leaves(tree)
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
    ]
    return jnp.all(jnp.stack(checks)) if checks else jnp.array(True)


def _select(finite: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: a if a is b else jnp.where(finite, a, b), new, old)


class LossScale(Module):
    """A factor on the loss, so that small gradients do not vanish in float16, and its adjustment.

    The loss is multiplied by the scale, the gradients are divided by it. A dynamic scale is halved when gradients
    overflow, and that step is left out; after `growth_interval` good steps it is doubled (Micikevicius et al., 2018,
    arXiv:1710.03740). All of it happens inside of the compiled step: nothing waits for a verdict.

    In a data-parallel step under `shard_map`, average the gradients before: every device must come to the same verdict.

    Args:
        init_scale: the scale at first.
        dynamic: whether it changes. A fixed one still leaves out the steps whose gradients are not finite.
        growth_factor: what it is multiplied by after good steps.
        backoff_factor: what it is multiplied by after a bad one.
        growth_interval: the number of good steps in a row before it grows.
        min_scale: it does not become less.
        max_scale: it does not become more.

    Attributes:
        value: the scale, a float32 array.
        good_steps: the number of good steps since it last changed, an int32 array.
        skipped: the number of steps left out so far, an int32 array.

    Raises:
        ValueError: a factor or bound makes no sense.

    Example:
        >>> import optax
        >>> model = nnx.Linear(2, 1, ctx=nnx.context(0))
        >>> optimizer = nnx.Optimizer(model, optax.sgd(0.1))
        >>> loss_scale, precision = nnx.LossScale(1024.0), nnx.Precision(compute=jnp.float16)
        >>> @nnx.jit
        ... def train_step(model, optimizer, loss_scale, x):
        ...     def loss_fn(model):
        ...         return loss_scale.scale((precision.call(model, x) ** 2).mean())
        ...     return loss_scale.update(optimizer, model, nnx.grad(loss_fn)(model))
        >>> print(train_step(model, optimizer, loss_scale, jnp.ones((4, 2))), optimizer.step, loss_scale.skipped)
        True 1 0
        >>> print(train_step(model, optimizer, loss_scale, jnp.full((4, 2), 1e5)), optimizer.step, loss_scale.skipped)
        False 1 1
        >>> print(loss_scale.value)
        512.0
    """

    value: jax.Array
    good_steps: jax.Array
    skipped: jax.Array

    def __init__(
        self,
        init_scale: float = 2.0**15,
        *,
        dynamic: bool = True,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        min_scale: float = 1.0,
        max_scale: float = 2.0**24,
    ) -> None:
        if not 0 < min_scale <= init_scale <= max_scale:
            raise ValueError(
                f"LossScale: expected 0 < min_scale <= init_scale <= max_scale, got {min_scale}, {init_scale} and "
                f"{max_scale}"
            )
        if not (growth_factor > 1 > backoff_factor > 0):
            raise ValueError(
                "LossScale: growth_factor is above 1 and backoff_factor between 0 and 1, got "
                f"{growth_factor} and {backoff_factor}"
            )
        if growth_interval < 1:
            raise ValueError(f"LossScale: growth_interval counts steps from 1 up, got {growth_interval}")
        self.dynamic = dynamic
        self.growth_factor: float = float(growth_factor)
        self.backoff_factor: float = float(backoff_factor)
        self.growth_interval = growth_interval
        self.min_scale: float = float(min_scale)
        self.max_scale: float = float(max_scale)
        value: Any = LossScaleState(jnp.asarray(init_scale, jnp.float32))
        good_steps: Any = LossScaleState(jnp.zeros((), jnp.int32))
        skipped: Any = LossScaleState(jnp.zeros((), jnp.int32))
        self.value, self.good_steps, self.skipped = value, good_steps, skipped

    def scale(self, loss: Any) -> Any:
        """Multiply a loss, or a pytree of losses, by the scale.

        Returns:
            float32: the scaled loss itself is often beyond float16.
        """
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32) * self.value, loss)

    def unscale(self, grads: Any) -> Any:
        """Divide gradients by the scale, in float32; they keep their types.

        Args:
            grads: a State, or any pytree of arrays.
        """
        inverse = 1.0 / self.value

        def unscaled(grad: Any) -> Any:
            if not jnp.issubdtype(jnp.result_type(grad), jnp.inexact):
                return grad
            return (grad * inverse).astype(jnp.result_type(grad))

        return jax.tree.map(unscaled, grads)

    def adjust(self, finite: jax.Array | bool) -> None:
        """Take note of a step: count it, and if the scale is dynamic, change it.

        Args:
            finite: whether the step's gradients were finite, `nnx.all_finite(grads)`.
        """
        self.skipped = self.skipped + jnp.where(finite, 0, 1)
        if not self.dynamic:
            return
        good = jnp.where(finite, self.good_steps + 1, 0)
        grows = good >= self.growth_interval
        grown = jnp.where(grows, jnp.minimum(self.value * self.growth_factor, self.max_scale), self.value)
        self.value = jnp.where(finite, grown, jnp.maximum(self.value * self.backoff_factor, self.min_scale))
        self.good_steps = jnp.where(grows, 0, good)

    def update(
        self, optimizer: Optimizer, model: Module, grads: State, *, restore: State | None = None, **tx_args: Any
    ) -> jax.Array:
        """Make a step of an Optimizer with scaled gradients, unless they are not finite, and adjust the scale.

        A step left out changes neither the parameters nor anything of the optimizer, its count included.

        Args:
            optimizer: the Optimizer.
            model: its Module.
            grads: the gradients of the scaled loss.
            restore: what else of the model to take back when the step is left out: `model.filter(nnx.BatchStat)` from
                before the step, as a forward pass that overflows spoils running averages for good.
            **tx_args: what else `tx.update` takes.

        Returns:
            Whether the step was made, a boolean array.

        Raises:
            StructureError: as for `Optimizer.update`.
        """
        finite = all_finite(grads)
        old, old_state = model.filter(optimizer.wrt), optimizer.filter(OptState)
        optimizer.update(model, self.unscale(grads), **tx_args)
        model.update_state(_select(finite, model.filter(optimizer.wrt), old))
        optimizer.update_state(_select(finite, optimizer.filter(OptState), old_state))
        if restore is not None:
            state = model.get_state()
            now = dict(zip(state.paths, state.raw_values, strict=True))
            model.update_state(_select(finite, restore.map(lambda path, _: now[path]), restore))
        self.adjust(finite)
        return finite

    def apply_gradients(
        self, state: TrainState, grads: State, *, tx_args: Mapping[str, Any] | None = None, **states: Any
    ) -> tuple[TrainState, jax.Array]:
        """Make a step of a TrainState with scaled gradients, unless they are not finite, and adjust the scale.

        A TrainState holds a LossScale as `loss_scale.partition()`: take it out with `state.loss_scale.merge()`, and put
        it back with `state.replace(loss_scale=loss_scale.partition())`.

        Args:
            state: the TrainState.
            grads: the gradients of the scaled loss.
            tx_args: what else `tx.update` takes.
            **states: new values of further States, which are not taken over either if the step is left out.

        Returns:
            The new TrainState, or the old one's values; and whether the step was made, a boolean array.

        Raises:
            StructureError: as for `TrainState.apply_gradients`.
        """
        finite = all_finite(grads)
        new = state.apply_gradients(self.unscale(grads), tx_args=tx_args, **states)
        self.adjust(finite)
        return _select(finite, new, state), finite
