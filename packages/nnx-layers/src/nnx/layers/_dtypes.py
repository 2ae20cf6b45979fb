"""One rule for dtypes: a layer computes in its `dtype`, or without one in the common inexact type of its operands."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

__all__ = ["canonicalize_dtype", "promote_dtype", "statistics_dtype", "widest"]


def canonicalize_dtype(*args: Any, dtype: DTypeLike | None = None, inexact: bool = True) -> jnp.dtype:
    """The dtype in which `args` are combined.

    Args:
        *args: arrays or scalars; `None` entries are skipped.
        dtype: the dtype to compute in; `None` takes the common type of `args` under JAX's promotion rules.
        inexact: whether integers and booleans become float32.

    Returns:
        The dtype.

    Raises:
        ValueError: `dtype` is an integer or boolean type although `inexact` is set.

    Reference: Type promotion semantics, in JAX's documentation.

    Example:
        >>> import nnx, jax.numpy as jnp
        >>> from nnx.layers import canonicalize_dtype
        >>> canonicalize_dtype(jnp.ones(2, jnp.bfloat16), None, jnp.ones(2, jnp.float32)).name
        'float32'
        >>> canonicalize_dtype(jnp.arange(2)).name
        'float32'
    """
    if dtype is None:
        found = jnp.dtype(jnp.result_type(*(x for x in args if x is not None)))
        if inexact and not jnp.issubdtype(found, jnp.inexact):
            found = jnp.dtype(jnp.float32)
        return found
    chosen = jnp.dtype(dtype)
    if inexact and not jnp.issubdtype(chosen, jnp.inexact):
        raise ValueError(f"dtype must be a floating point or complex type, got {chosen.name}")
    return chosen


def promote_dtype(args: Iterable[Any], /, *, dtype: DTypeLike | None = None, inexact: bool = True) -> tuple[Any, ...]:
    """Casts `args` to one dtype.

    This is the only place where our layers change the type of what they compute with, so the output type of a layer is
    always `dtype`, or the common type of its input and its parameters.

    Args:
        args: arrays or scalars; `None` entries stay `None`, which suits an absent bias.
        dtype: the dtype to cast to; `None` takes the common type of `args` under JAX's promotion rules.
        inexact: whether integers and booleans become float32.

    Returns:
        The arrays, in order, all of one dtype.

    Raises:
        ValueError: `dtype` is an integer or boolean type although `inexact` is set.

    Reference: Type promotion semantics, in JAX's documentation.

    Example:
        >>> import nnx, jax.numpy as jnp
        >>> x, kernel, bias = nnx.promote_dtype((jnp.arange(3), jnp.ones((3, 2)), None), dtype=jnp.bfloat16)
        >>> x.dtype.name, kernel.dtype.name, bias
        ('bfloat16', 'bfloat16', None)
    """
    operands = tuple(args)
    common = canonicalize_dtype(*operands, dtype=dtype, inexact=inexact)
    return tuple(None if x is None else jnp.asarray(x, common) for x in operands)


def statistics_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype for sums over values of `dtype`: at least float32, since half precision loses most of their digits."""
    found = jnp.dtype(dtype)
    wide = jnp.issubdtype(found, jnp.inexact) and jnp.finfo(found).bits >= 32
    return found if wide else jnp.dtype(jnp.float32)


def widest(*arrays: Any) -> jnp.dtype:
    """The common type of arrays whose types differ on purpose, wanted even where promotion must be explicit."""
    with jax.numpy_dtype_promotion("standard"):
        return canonicalize_dtype(*arrays)
