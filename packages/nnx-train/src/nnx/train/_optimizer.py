"""Optimizer: the stateful twin of TrainState, an nnx Module for the lifted style."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nnx.core import Module, Param, State, StructureError, Variable
from nnx.core._sharding import names_by_path, names_of_leaf
from nnx.train._branches import attribute_name, changed_parameters, nested
from nnx.train._updates import (
    check_gradients,
    from_arrays,
    init_optimizer,
    known_names,
    path_list,
    to_arrays,
    to_tx,
    update,
)

__all__ = ["OptState", "Optimizer"]


class OptState(Variable):
    """A leaf of an optimizer's state: a moment, a count, the step."""

    collection = "opt_state"


class Optimizer(Module):
    """An optax transformation with its state, which updates a Module in place.

    It holds no reference to the model: it is handed the model at each update, so the two may be passed to a transform,
    saved and restored side by side. Each leaf of the optimizer's state is a Variable of its own, at a path such as
    `opt_state/0/mu/encoder/kernel`; a transform returns those that the update changed.

    optax receives the parameters as a dict of plain arrays by path (`{"encoder/kernel": Array, ...}`), and so do the
    functions and labels of `optax.masked`, `optax.partition` and their kin.

    An optax transformation is a pair of functions, which compare by identity: two Optimizers with `tx` from two calls
    of `optax.adam(1e-3)` compile a step twice. Make `tx` once and hand it around.

    Args:
        model: the Module to be trained.
        tx: an optax gradient transformation.
        wrt: the filter of what is trained. The rest is frozen: it takes no optimizer memory. Use the same filter in
            `nnx.grad(loss, wrt=...)`.

    Attributes:
        step: the number of updates made so far, an int32 array.
        tx: the gradient transformation.
        wrt: the filter.

    Raises:
        TypeError: `model` is no Module, or `tx` no gradient transformation.
        StructureError: `wrt` selects nothing of the model.

    Example:
        >>> import jax.numpy as jnp, nnx, optax
        >>> class Scale(nnx.Module):
        ...     def __init__(self):
        ...         self.factor = nnx.Param(jnp.array(1.0))
        ...     def __call__(self, x):
        ...         return self.factor * x
        >>> model = Scale()
        >>> optimizer = nnx.Optimizer(model, optax.sgd(0.5))
        >>> @nnx.jit
        ... def train_step(model, optimizer, x, y):
        ...     grads = nnx.grad(lambda model: (model(x) - y) ** 2)(model)
        ...     optimizer.update(model, grads)
        >>> train_step(model, optimizer, 1.0, 3.0)
        >>> print(optimizer.step, model.factor)
        1 3.0
    """

    # What reading the attribute gives: the Variable's value.
    step: jax.Array
    _treedef: Any

    def __init__(self, model: Module, tx: Any, wrt: Any = Param) -> None:
        if not isinstance(model, Module):
            raise TypeError(f"Optimizer takes a Module first, got {type(model).__name__}: `Optimizer(model, tx)`")
        self.tx: Any = to_tx(tx)
        self.wrt = wrt
        params = model.filter(wrt)
        if not params:
            paths = map("/".join, model.partition()[0].paths)
            raise StructureError(
                f"Optimizer: wrt={wrt!r} selects nothing of this {type(model).__name__}: {known_names('', paths)}"
            )
        step: Any = OptState(jnp.zeros((), jnp.int32))
        self.step = step
        leaves, self._treedef = jax.tree_util.tree_flatten_with_path(init_optimizer(self.tx, params))
        self._params = params.paths
        self._leaves = _leaf_paths([path for path, _ in leaves])
        if self._leaves:
            # A moment is split over a mesh as its parameter is.
            known = names_by_path(params)
            self.opt_state: Module = nested(
                [
                    (path[1:], OptState(leaf, sharding=names_of_leaf(keys, jnp.shape(leaf), known)))
                    for path, (keys, leaf) in zip(self._leaves, leaves, strict=True)
                ]
            )

    def update(self, model: Module, grads: State, **tx_args: Any) -> None:
        """Change the model's parameters and this optimizer's state in place, by one step.

        Args:
            model: the Module that this Optimizer was made for, or one of the same structure.
            grads: the gradients of `model.filter(wrt)`, from `nnx.grad(loss, wrt=wrt)(model)`.
            **tx_args: what else `tx.update` takes, such as `value`, `grad` and `value_fn` for a line search; States
                among them are handed on as dicts of arrays, and `value_fn` is called with a State.

        Raises:
            TypeError: `model` is no Module, or `grads` no State.
            StructureError: the model's parameters are not those that the Optimizer was made for, or the gradients'
                paths or shapes are not those of the parameters.
        """
        if not isinstance(model, Module):
            raise TypeError(
                f"Optimizer.update takes the Module first, got {type(model).__name__}: `optimizer.update(model, grads)`"
            )
        params = model.filter(self.wrt)
        if params.paths != self._params:
            raise StructureError(changed_parameters("Optimizer", self._params, params.paths))
        check_gradients(grads, params, "Optimizer.update")
        old = self.filter(OptState)
        new_params, new_opt_state = update(self.tx, params, grads, self._optax_state(old), tx_args)
        leaves, treedef = jax.tree.flatten(new_opt_state)
        if treedef != self._treedef:
            raise StructureError(
                f"Optimizer.update: tx changed the structure of its state, from {self._treedef} to {treedef}; "
                "a gradient transformation must return a state like the one that it was given"
            )
        values = {("step",): self.step + 1, **dict(zip(self._leaves, leaves, strict=True))}
        model.update_state(new_params)
        self.update_state(old.replace_values([values[path] for path in old.paths]))

    def params_by(self, function: Callable[[Any, dict[str, Any]], Any], model: Module) -> State:
        """The parameters that a function of optax makes of the optimizer's state and the parameters.

        Schedule-free optimizers have such a function: what they evaluate is not what they train.

        Args:
            function: takes the state of `tx` and the parameters as a dict of arrays by path, and returns such a dict.
            model: the Module that this Optimizer was made for; it stays as it is.

        Returns:
            A State with the paths of the parameters: `model.update_state(params)` writes it.

        Example:
            >>> import optax
            >>> model = nnx.Linear(2, 1, ctx=nnx.context(0))
            >>> optimizer = nnx.Optimizer(model, optax.contrib.schedule_free_sgd(0.1))
            >>> params = optimizer.params_by(optax.contrib.schedule_free_eval_params, model)
            >>> params.paths
            (('bias',), ('kernel',))
        """
        params = model.filter(self.wrt)
        return from_arrays(params, function(self._optax_state(self.filter(OptState)), to_arrays(params)))

    def _optax_state(self, leaves: State) -> Any:
        """The state as `tx` knows it, from this Optimizer's Variables."""
        return jax.tree.unflatten(self._treedef, [leaves[path].value for path in self._leaves])


def _leaf_paths(key_paths: list[tuple[Any, ...]]) -> tuple[tuple[str, ...], ...]:
    """Where each leaf of an optax state is kept: the parts of its JAX path, with paths of parameters split up again."""
    paths = []
    for key_path in key_paths:
        parts = [part for key in key_path for part in _key_text(key).split("/")] or ["value"]
        paths.append(("opt_state", *map(attribute_name, parts)))
    taken = set(paths)
    clashes = [path for path in taken if paths.count(path) > 1 or any(path[:n] in taken for n in range(1, len(path)))]
    if clashes:
        raise StructureError(
            f"Optimizer: tx has two state leaves at one path: {path_list(sorted(map('/'.join, clashes)))}"
        )
    return tuple(paths)


def _key_text(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
