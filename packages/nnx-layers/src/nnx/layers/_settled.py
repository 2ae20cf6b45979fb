"""Activations inside of a layer, where no model can name their axes: split as its rules say of them."""

from __future__ import annotations

import math

import jax
from jax.sharding import PartitionSpec

from nnx.core import with_logical_constraint
from nnx.core._sharding import current_rules
from nnx.layers._explicit import is_explicit

__all__ = ["settled"]


def settled(x: jax.Array, axis: int, name: str) -> jax.Array:
    """`x` with one axis split as the rules in force say of `name`; the other axes are left to the compiler.

    Left to itself XLA may split another axis, that of the sequence say, and moves weights and activations for it. On
    explicit axes the layer's products have settled that already. It is a hint: what the mesh cannot follow is left out.

    Args:
        x: the activations.
        axis: the number of the axis.
        name: what the axis is called in the rules.
    """
    rules = current_rules()
    if rules is None or is_explicit(x):
        return x
    axes = dict(rules).get(name)
    sizes = jax.sharding.get_abstract_mesh().shape
    over = (axes,) if isinstance(axes, str) else axes or ()
    if not over or any(one not in sizes for one in over) or x.shape[axis] % math.prod(sizes[one] for one in over):
        return x
    names: list[object] = [PartitionSpec.UNCONSTRAINED] * x.ndim
    names[axis] = name
    return with_logical_constraint(x, names)
