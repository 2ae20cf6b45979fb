"""Arrays inside of a layer, where no model can name their axes: split as its rules say of activations."""

from __future__ import annotations

import math

import jax
from jax.sharding import PartitionSpec

from nnx.core import with_logical_constraint
from nnx.core._sharding import current_rules
from nnx.layers._explicit import is_explicit

__all__ = ["settled"]


def settled(x: jax.Array, axis: int, name: str) -> jax.Array:
    """`x` with one axis split, or whole, as the rules in force say of `name`; the others are left to the compiler.

    Left to itself XLA may split another axis, that of the sequence say, and moves weights and activations for it. On
    explicit axes the layer's products have settled that already. It is a hint: what the mesh cannot follow is left out.

    Args:
        x: the array.
        axis: the number of the axis.
        name: what the axis is called in the rules.
    """
    rules = dict(current_rules() or ())
    if name not in rules or is_explicit(x):
        return x
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    axes = rules[name]
    over = (axes,) if isinstance(axes, str) else axes or ()
    if any(one not in mesh.shape for one in over) or x.shape[axis] % math.prod(mesh.shape[one] for one in over):
        return x
    names: list[object] = [PartitionSpec.UNCONSTRAINED] * x.ndim
    names[axis] = name
    return with_logical_constraint(x, names)
