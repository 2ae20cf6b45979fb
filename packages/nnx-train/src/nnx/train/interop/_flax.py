"""States of flax.nnx: into a model whose layers are ours, and back, by path. flax itself is not needed here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnx.core import BatchStat, Module, Param, State, StructureError, Variable
from nnx.train._match import pattern_of, renamed_paths
from nnx.train.interop._torch import _fitted

__all__ = ["load_flax_state", "to_flax_state"]


def load_flax_state(
    model: Module,
    state: Any,
    *,
    rename: Mapping[str, str] | None = None,
    ignore: Sequence[str] = (),
    only: Any = (Param, BatchStat),
    cast: bool = False,
) -> None:
    """Write a State of flax.nnx into a model, in place: all that is asked for, or nothing.

    Layers of the same name have parameters of the same names and layouts in both, so paths are all that it takes; an
    item of a list is `layers/0`. Random streams in the State are left out: ours are in a Context.

    Args:
        model: the model.
        state: what `flax.nnx.split` or `flax.nnx.state` gives, or nested dicts of arrays.
        rename: patterns of flax's paths and what they are to be, `{"encoder/*/attn/**": "blocks/*/attention/**"}`; `*`
            stands for any text in one part of a path, `**` for any text.
        ignore: patterns of paths to leave out, after `rename`.
        only: a filter: what of the model is written.
        cast: whether floats and integers may have another precision in the model.

    Raises:
        StructureError: something is missing, unexpected or does not fit; all of it is listed, and nothing is written.

    Example:
        >>> import jax.numpy as jnp, nnx
        >>> model = nnx.Sequence([nnx.Linear(2, 3, use_bias=False, ctx=nnx.context(0))])
        >>> nnx.load_flax_state(model, {"layers": {0: {"kernel": jnp.ones((2, 3))}}}, rename={"layers/**": "**"})
        >>> print(model[0].kernel)
        [[1. 1. 1.]
         [1. 1. 1.]]
    """
    given = _placed(_leaves(state), rename or {}, ignore)
    held = model.filter(only)
    problems, values = [], {}
    for path, node in held.items():
        own = "/".join(path)
        if own not in given:
            problems.append(f"missing: `{own}`")
            continue
        try:
            like = node.value if isinstance(node, Variable) else node
            values[path] = _fitted(own, like, np.asarray(given[own]), cast=cast)
        except ValueError as error:
            problems.append(f"mismatched: `{own}`: {error}")
    known = {"/".join(path) for path in held.paths}
    problems += [f"unexpected: `{path}`" for path in given if path not in known]
    if problems:
        listed = "\n  ".join(problems)
        raise StructureError(f"the State of flax does not fit the {type(model).__name__}:\n  {listed}")
    model.update_state(held.map(lambda path, _: values[path]))


def to_flax_state(model: Module | State, target: Any, *, rename: Mapping[str, str] | None = None) -> Any:
    """Make a State of flax.nnx with the values of a model, for `flax.nnx.merge` or `flax.nnx.update`.

    Args:
        model: a Module, or a State of one.
        target: a State of the flax model, abstract or not, or nested dicts: where each value goes. Its random streams
            stay as they are.
        rename: patterns of the target's paths and what they are in the model, as for `load_flax_state`.

    Returns:
        What `target` is, with the model's values in the place of its own.

    Raises:
        StructureError: the model has no value for a path of the target, or one of another shape or dtype.

    Example:
        >>> import jax.numpy as jnp, nnx
        >>> model = nnx.Linear(1, 2, ctx=nnx.context(0))
        >>> nnx.to_flax_state(model, {"bias": jnp.ones(2), "kernel": jnp.ones((1, 2))})["bias"]
        Array([0., 0.], dtype=float32)
    """
    state = model.get_state() if isinstance(model, Module) else model
    ours = {"/".join(path): value for path, value in zip(state.paths, state.raw_values, strict=True)}
    wanted = _leaves(target)
    theirs = _names(wanted, rename or {})
    problems, values = [], []
    for path, leaf in _every_leaf(target):
        if path not in wanted:
            values.append(leaf)
            continue
        value = ours.get(theirs[path])
        values.append(value)
        if value is None:
            problems.append(f"the model has no `{theirs[path]}`")
        elif (jnp.shape(value), jnp.result_type(value)) != (leaf.shape, leaf.dtype):
            problems.append(
                f"`{path}` is {leaf.dtype}{list(leaf.shape)} in flax, "
                f"and {jnp.result_type(value)}{list(jnp.shape(value))} in the model"
            )
    if problems:
        listed = "\n  ".join(problems)
        raise StructureError(f"the model does not fit the State of flax:\n  {listed}")
    return jax.tree.unflatten(jax.tree.structure(target), values)


def _every_leaf(state: Any) -> list[tuple[str, Any]]:
    """The leaves of a State or of nested dicts with their paths as text."""
    if isinstance(state, (Module, State)):
        raise StructureError(f"expected a State of flax.nnx or nested dicts, got a {type(state).__name__} of ours")
    return [("/".join(_parts(keys)), leaf) for keys, leaf in jax.tree_util.tree_leaves_with_path(state)]


def _leaves(state: Any) -> dict[str, Any]:
    """The same as a dict, without the random streams."""
    found = _every_leaf(state)
    streams = {
        path.rpartition("/")[0] for path, leaf in found if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)
    }
    return {path: leaf for path, leaf in found if path.rpartition("/")[0] not in streams}


def _parts(keys: Sequence[Any]) -> list[str]:
    parts = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in keys]
    # A Variable of flax is a node with its value as the one child.
    return parts[:-1] if isinstance(keys[-1], jax.tree_util.GetAttrKey) and parts[-1] == "value" else parts


def _names(leaves: Mapping[str, Any], rename: Mapping[str, str]) -> dict[str, str]:
    """For each path of flax its path in the model."""
    names = {path: path for path in leaves} | renamed_paths(leaves, rename)
    taken: dict[str, str] = {}
    for path, name in names.items():
        if name in taken:
            raise StructureError(f"rename: `{taken[name]}` and `{path}` become one path, `{name}`")
        taken[name] = path
    return names


def _placed(leaves: Mapping[str, Any], rename: Mapping[str, str], ignore: Sequence[str]) -> dict[str, Any]:
    left_out = [pattern_of(text) for text in ignore]
    names = _names(leaves, rename)
    return {
        name: leaves[path] for path, name in names.items() if not any(pattern.fullmatch(name) for pattern in left_out)
    }
