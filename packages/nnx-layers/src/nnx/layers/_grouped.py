"""Convolution in groups on a mesh of several axes, where XLA gets the gradient of the kernel wrong.

Its partitioner adds that gradient up over all devices, even where the inputs are split over one axis of the mesh and
the others hold copies: it comes out too large by the number of copies (seen with jaxlib 0.10.0 and 0.12.0). Written as
a sum of products, one for each element of the kernel, it is right on every mesh. The convolution itself stays.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from nnx.layers._explicit import contraction, convolve, is_explicit, like

__all__ = ["Options", "convolve_in_groups", "has_copies"]


class Options(NamedTuple):
    """What a convolution is besides its operands, as for `lax.conv_general_dilated`."""

    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    dimensions: lax.ConvDimensionNumbers
    groups: int
    precision: Any
    preferred_element_type: Any
    out_sharding: Any


def has_copies() -> bool:
    """Whether the mesh around has several axes: what is split over one of them has copies along the others."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and sum(size > 1 for size in mesh.shape.values()) > 1


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def convolve_in_groups(x: jax.Array, kernel: jax.Array, options: Options) -> jax.Array:
    """The convolution of inputs [batch, *space, features] with a kernel [*space, inputs, outputs].

    Args:
        x: the inputs.
        kernel: the weights.
        options: the rest.
    """
    return convolve(
        x,
        kernel,
        options.dimensions,
        options.groups,
        out_sharding=options.out_sharding,
        window_strides=options.strides,
        padding=options.padding,
        lhs_dilation=options.lhs_dilation,
        rhs_dilation=options.rhs_dilation,
        precision=options.precision,
        preferred_element_type=options.preferred_element_type,
    )


@convolve_in_groups.defjvp
def _jvp(options: Options, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x, kernel), (dx, dkernel) = primals, tangents
    by_inputs = convolve_in_groups(dx, kernel, options)
    # Else each element's part of the inputs would be kept until the gradient is taken.
    by_kernel = jax.checkpoint(functools.partial(_products, options))(x, dkernel)
    return convolve_in_groups(x, kernel, options), by_inputs + like(by_kernel, by_inputs)


def _products(options: Options, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The same convolution, as a sum of products over the elements of the kernel."""
    *sizes, inputs, outputs = kernel.shape
    gaps = ((low, high, gap - 1) for (low, high), gap in zip(options.padding, options.lhs_dilation, strict=True))
    x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *gaps, (0, 0, 0)))
    grouped = kernel.reshape(*sizes, inputs, options.groups, outputs // options.groups)
    reach = [(size - 1) * gap for size, gap in zip(sizes, options.rhs_dilation, strict=True)]
    places = [
        (size - far - 1) // stride for size, far, stride in zip(x.shape[1:-1], reach, options.strides, strict=True)
    ]
    total: Any = None
    for element in itertools.product(*map(range, sizes)):
        start = [place * gap for place, gap in zip(element, options.rhs_dilation, strict=True)]
        stop = [at + last * stride + 1 for at, last, stride in zip(start, places, options.strides, strict=True)]
        part = lax.slice(x, (0, *start, 0), (x.shape[0], *stop, x.shape[-1]), (1, *options.strides, 1))
        part = part.reshape(*part.shape[:-1], options.groups, inputs)
        weights, out_sharding = grouped[element], None
        if is_explicit(part) or is_explicit(weights):
            space = [str(axis) for axis in range(part.ndim - 2)]
            weights, out_sharding = contraction(part, weights, ([*space, "g", "i"], "igo", [*space, "g", "o"]))
        product = jnp.einsum(
            "...gi,igo->...go",
            part,
            weights,
            precision=options.precision,
            preferred_element_type=options.preferred_element_type,
            out_sharding=out_sharding,
        )
        total = product if total is None else total + product
    return total.reshape(*total.shape[:-2], outputs)  # type: ignore[no-any-return]
