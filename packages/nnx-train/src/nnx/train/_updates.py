"""One optimizer step on States: optax sees a flat dict of plain arrays by path, and nothing of ours."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from nnx.core import State, StructureError

__all__ = [
    "check_gradients",
    "from_arrays",
    "init_optimizer",
    "known_names",
    "path_list",
    "step_array",
    "to_arrays",
    "to_tx",
    "update",
]


def to_arrays(state: State) -> dict[str, Any]:
    """The values of a State by path, parts joined by `/`: what optax is handed.

    A dict and not the State itself: masks and labels can then be written as plain dicts, and optax may put nodes of its
    own (`MaskedNode`, labels) in the place of values.
    """
    return {"/".join(path): value for path, value in zip(state.paths, state.raw_values, strict=True)}


def from_arrays(like: State, arrays: Mapping[str, Any]) -> State:
    """The inverse of `to_arrays`: a State with the paths, types and metadata of `like`."""
    return like.replace_values([arrays["/".join(path)] for path in like.paths])


def to_tx(tx: Any) -> optax.GradientTransformation:
    """Return `tx` as an optax GradientTransformation.

    Raises:
        TypeError: `tx` has no `init` and `update`.
    """
    if isinstance(tx, optax.GradientTransformation):
        return tx
    init, update = getattr(tx, "init", None), getattr(tx, "update", None)
    if isinstance(tx, type) or not callable(init) or not callable(update):
        hint = " (call it first: `optax.adam(1e-3)`)" if callable(tx) else ""
        raise TypeError(f"tx must be an optax gradient transformation, got {tx!r}{hint}")

    # optax.MultiSteps is an object with the two methods. Held as functions, it compares by identity as every other `tx`
    # does, instead of being walked and copied as a static value of a Module would be.
    def init_function(params: Any) -> Any:
        return init(params)

    def update_function(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        return update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(init_function, update_function)


def _strong(leaf: Any) -> Any:
    """An array of fixed type: a weakly typed one may turn strong in an update, and the step would compile twice."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    array = jnp.asarray(leaf)
    return jax.lax.convert_element_type(array, array.dtype) if array.aval.weak_type else array


def step_array(step: Any) -> Any:
    """A step counter that keeps its type: Python and NumPy integers become int32 arrays, the rest is left alone."""
    if isinstance(step, bool) or not hasattr(step, "__index__") or isinstance(step, jax.Array):
        return step
    return jnp.asarray(step.__index__(), jnp.int32)


def init_optimizer(tx: optax.GradientTransformation, params: State) -> Any:
    """The first optimizer state for `params`."""
    return jax.tree.map(_strong, tx.init(to_arrays(params)))


def path_list(paths: Iterable[str], limit: int = 5) -> str:
    """Some paths for an error message, and the number of those left out."""
    texts = [f"`{path}`" for path in paths]
    return ", ".join(texts[:limit]) + (f" and {len(texts) - limit} more" if len(texts) > limit else "")


def known_names(name: str, known: Iterable[str]) -> str:
    """What was probably meant by `name`, and what there is."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    meant = f"did you mean {path_list(close)}? " if close else ""
    return f"{meant}there are: {path_list(names, limit=20)}" if names else "there are none"


def check_gradients(grads: Any, params: State, owner: str) -> None:
    """Check that there is one gradient for each parameter, of its shape.

    Raises:
        TypeError: `grads` is no State.
        StructureError: the paths or the shapes differ; the message lists them.
    """
    if not isinstance(grads, State):
        raise TypeError(
            f"{owner} takes the gradients as a State, got {type(grads).__name__}: pass what `jax.grad` gives for "
            "`state.params`, or what `nnx.grad(loss, wrt=...)` gives for the Module"
        )
    if grads.schema is not params.schema and grads.paths != params.paths:
        given, wanted = set(to_arrays(grads)), set(to_arrays(params))
        problems = []
        if missing := sorted(wanted - given):
            problems.append(f"no gradient for {path_list(missing)}")
        if unexpected := sorted(given - wanted):
            problems.append(
                f"gradients for {path_list(unexpected)}, which {'is' if len(unexpected) == 1 else 'are'} not updated"
            )
        raise StructureError(
            f"{owner}: the gradients do not belong to these parameters: {'; '.join(problems)}. "
            "Take the gradient with the same `wrt` that the optimizer was made with"
        )
    wrong = [
        f"`{'/'.join(path)}` {jnp.shape(grad)} for a parameter of {jnp.shape(value)}"
        for path, grad, value in zip(params.paths, grads.raw_values, params.raw_values, strict=True)
        if hasattr(grad, "shape") and hasattr(value, "shape") and grad.shape != value.shape
    ]
    if wrong:
        raise StructureError(f"{owner}: gradients of another shape than their parameters: {'; '.join(wrong[:5])}")


def update(
    tx: optax.GradientTransformation, params: State, grads: State, opt_state: Any, tx_args: Mapping[str, Any]
) -> tuple[State, Any]:
    """One step of `tx`.

    Args:
        tx: the gradient transformation.
        params: the parameters.
        grads: their gradients, with the same paths.
        opt_state: the state of `tx`.
        tx_args: what else `tx.update` takes. States among them are handed on as dicts of arrays, and a `value_fn` (of
            the line searches) is called with a State, as the loss function is.

    Returns:
        The new parameters and the new state of `tx`.
    """
    extra: dict[str, Any] = {}
    for name, value in tx_args.items():
        if isinstance(value, State):
            extra[name] = to_arrays(value)
        elif name == "value_fn" and callable(value):
            extra[name] = _on_arrays(value, params)
        else:
            extra[name] = value
    arrays = to_arrays(params)
    updates, new_opt_state = optax.with_extra_args_support(tx).update(to_arrays(grads), opt_state, arrays, **extra)
    return from_arrays(params, optax.apply_updates(arrays, updates)), new_opt_state


def _on_arrays(value_fn: Any, like: State) -> Any:
    def on_arrays(arrays: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        return value_fn(from_arrays(like, arrays), *args, **kwargs)

    return on_arrays
