"""Running sums that keep their digits: a float32 array with a second one for what rounding left out of the first."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["add", "add_count", "join", "ratio", "sum_over", "to_float", "zeros"]

# A plain float32 sum of ones stops growing at 2^24, and an int32 wraps around at 2^31: fewer than the tokens of one
# evaluation. A pair of float32 counts exactly up to 2^48, on every accelerator and without 64-bit types.
#
# A sum is one array, [2, ...]: the sum as float32, and the rest. Most functions are compiled, as an eager update
# would else dispatch a dozen operations; inside of a trace they are inlined.


def zeros(shape: tuple[int, ...] = ()) -> jax.Array:
    """A sum of nothing, [2, *shape]."""
    return jnp.zeros((2, *shape), jnp.float32)


@jax.jit
def add(total: jax.Array, x: Any) -> jax.Array:
    """Add float32 `x`, of the shape of the sum without its first axis.

    The error of a float32 addition is itself a float32 number, which six operations find (Knuth, The Art of Computer
    Programming 2, section 4.2.2).
    """
    # Behind a barrier, as XLA would else compute a product anew wherever it is used, here rounded and there fused with
    # an addition, and the error found would be that of another number.
    x = jax.lax.optimization_barrier(jnp.asarray(x, jnp.float32))
    high, low = total[0], total[1]
    rough = high + x
    added = rough - high
    error = (high - (rough - added)) + (x - added)
    # Of an infinite sum the error would be NaN.
    low = low + jnp.where(jnp.isfinite(rough), error, 0.0)
    new_high = rough + low
    rest = jnp.where(jnp.isfinite(new_high), low - (new_high - rough), 0.0)
    return jnp.stack([new_high, rest])


def add_count(total: jax.Array, count: Any) -> jax.Array:
    """Add an integer array or an `int`; one too large for a float32 goes in by halves that are not."""
    low = count % (1 << 24)
    high = count - low
    return add(add(total, float(high) if isinstance(high, int) else high), low)


@jax.jit
def join(a: jax.Array, b: jax.Array) -> jax.Array:
    """The sum of two sums."""
    return add(add(a, b[0]), b[1])


def sum_over(total: jax.Array, axis_name: Any) -> jax.Array:
    """The sum over a mapped axis: exact while each part is below 2^24, else to float32's precision."""
    parts = jax.lax.psum(total, axis_name)
    return add(jnp.stack([parts[0], jnp.zeros_like(parts[1])]), parts[1])


@jax.jit
def to_float(total: jax.Array) -> jax.Array:
    """The sum as float32."""
    return total[0] + total[1]


@jax.jit
def ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """One sum by another; NaN where the denominator is 0."""
    below = to_float(denominator)
    return jnp.where(below != 0, to_float(numerator) / jnp.where(below != 0, below, 1.0), jnp.nan)
