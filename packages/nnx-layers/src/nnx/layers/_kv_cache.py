"""The cache of keys and values: rows that grow by themselves, each at a position of its own."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import checkify
from jax.typing import DTypeLike

from nnx.core import Cache, Module, ShapeError
from nnx.core.transforms._abstract import is_checked
from nnx.layers._explicit import reordered

__all__ = ["CacheFullError", "append", "init_cache", "new_cache", "reorder_cache", "reset_cache"]


class CacheFullError(ShapeError):
    """More tokens were given to a cache of keys and values than it has room for."""


def new_cache(batch: int, max_length: int, heads: int, head_dim: int, dtype: DTypeLike) -> tuple[Any, Any, Any]:
    """Empty keys and values, [batch, max_length, heads, head_dim], and the rows' lengths, [batch]."""
    for name, size in (("batch", batch), ("max_length", max_length)):
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"init_cache: {name} is a positive integer, got {size!r}")
    shape = (batch, max_length, heads, head_dim)
    names = ("batch", "cache_length", "kv_heads", "head_dim")
    keys, values = (Cache(jnp.zeros(shape, dtype), sharding=names) for _ in range(2))
    return keys, values, Cache(jnp.zeros((batch,), jnp.int32), sharding=names[:1])


def append(
    kind: str, layer: Any, key: jax.Array, value: jax.Array, lengths: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Write keys and values after those of each row, and advance the rows.

    Args:
        kind: what errors call the layer.
        layer: holds `cached_key`, `cached_value` and `cache_index`.
        key: [batch, length, heads, head_dim].
        value: the same.
        lengths: how many of them count in each row, [batch]; None if all do.

    Returns:
        The positions of the new keys, [batch, length], and whether each row had room, [batch].

    Raises:
        CacheFullError: outside of a trace, a row has no room. Inside, `checkify` reports it.
        ShapeError: the batch is not that of the cache.
    """
    index, room = layer.cache_index, layer.cached_key.shape[1]
    batch, length = key.shape[:2]
    if index.shape != (batch,):
        raise ShapeError(
            f"{kind}: the cache was made for a batch of {index.shape[0]}, and the inputs have one of {batch}; call "
            f"init_cache(batch={batch}, ...) anew, or reorder_cache"
        )
    if lengths is None:
        added = jnp.full((batch,), length, jnp.int32)
    else:
        added = jnp.asarray(lengths, jnp.int32)
        if added.shape != (batch,):
            raise ShapeError(f"{kind}: expected `lengths` of shape ({batch},), got {tuple(added.shape)}")
        if not isinstance(added, jax.core.Tracer) and bool((added > length).any()):
            raise ShapeError(
                f"{kind}: `lengths` go up to {int(added.max())}, and there are {length} tokens in each row"
            )
    end = index + added
    full = end > room
    message = f"{kind}: the cache has room for {room} tokens in each row, and a row would get"
    if not isinstance(end, jax.core.Tracer):
        if bool(full.any()):
            row = int(jnp.argmax(end))
            raise CacheFullError(
                f"{message} {int(end[row])} (row {row}). Make it larger, init_cache(max_length=...), or reset_cache"
            )
    elif is_checked():
        checkify.check(jnp.logical_not(full.any()), message + " {end}", end=end.max())
    positions = index[:, None] + jnp.arange(length, dtype=jnp.int32)[None]
    # What has no room, and what does not count, is written nowhere.
    counted = jnp.arange(length, dtype=jnp.int32)[None] < added[:, None]
    target = jnp.where(counted, positions, room)
    layer.cached_key = _write(layer.cached_key, target, key)
    layer.cached_value = _write(layer.cached_value, target, value)
    layer.cache_index = end
    return positions, jnp.logical_not(full)


@jax.vmap
def _write(row: jax.Array, target: jax.Array, new: jax.Array) -> jax.Array:
    # Row by row and not by the numbers of the rows: which device has what is then plain from the types alone.
    return row.at[target].set(new.astype(row.dtype), mode="drop")


def _caching(model: Module) -> list[Any]:
    found: list[Any] = []
    model.for_each(Module, lambda module: found.append(module) if hasattr(module, "init_cache") else None)
    return found


def init_cache(model: Module, batch: int, max_length: int, dtype: DTypeLike | None = None) -> None:
    """Give each attention layer of a model an empty cache of keys and values.

    Layers in an `nnx.Stack` have a leading axis, so theirs are made by
    `nnx.vmap(lambda layer: nnx.init_cache(layer, batch, max_length))(stack.layers)`.

    Args:
        model: the model, or a layer of it.
        batch: the number of rows.
        max_length: the tokens that a row has room for.
        dtype: dtype of keys and values; `None` is that of each layer.

    Raises:
        ValueError: no layer of the model has a cache, or a size is not positive.

    Reference: Shazeer, 2019, Fast Transformer Decoding: One Write-Head is All You Need, arXiv:1911.02150.

    Example:
        >>> import nnx, jax.numpy as jnp
        >>> layer = nnx.MultiHeadAttention(num_heads=2, in_features=8, ctx=nnx.context(0))
        >>> nnx.init_cache(layer, batch=3, max_length=16)
        >>> layer(jnp.ones((3, 5, 8)), decode=True).shape, layer.cache_index.tolist()
        ((3, 5, 8), [5, 5, 5])
    """
    layers = _caching(model)
    if not layers:
        raise ValueError(f"init_cache: no layer of the {type(model).__name__} has a cache of keys and values")
    for layer in layers:
        layer.init_cache(batch, max_length, dtype)


def reset_cache(model: Module, rows: jax.Array | None = None) -> None:
    """Empty the caches of a model, so that its next tokens are the first.

    Args:
        model: the model.
        rows: which rows to empty, [batch] of bool; `None` for all.

    Reference: Shazeer, 2019, Fast Transformer Decoding: One Write-Head is All You Need, arXiv:1911.02150.

    Example:
        >>> import nnx, jax.numpy as jnp
        >>> layer = nnx.MultiHeadAttention(num_heads=2, in_features=8, ctx=nnx.context(0))
        >>> nnx.init_cache(layer, batch=2, max_length=16)
        >>> _ = layer(jnp.ones((2, 5, 8)), decode=True)
        >>> nnx.reset_cache(layer, jnp.array([True, False]))
        >>> layer.cache_index.tolist()
        [0, 5]
    """
    for layer in _caching(model):
        if hasattr(layer, "cache_index"):
            index = layer.cache_index
            layer.cache_index = jnp.zeros_like(index) if rows is None else jnp.where(rows, 0, index)


def reorder_cache(model: Module, rows: jax.Array) -> None:
    """Take the caches' rows in another order, as a beam search does; a row may be taken more than once.

    Args:
        model: the model.
        rows: the number of the row to take for each new row, [new_batch].

    Reference: Shazeer, 2019, Fast Transformer Decoding: One Write-Head is All You Need, arXiv:1911.02150.

    Example:
        >>> import nnx, jax.numpy as jnp
        >>> layer = nnx.MultiHeadAttention(num_heads=2, in_features=8, ctx=nnx.context(0))
        >>> nnx.init_cache(layer, batch=2, max_length=16)
        >>> _ = layer(jnp.ones((2, 3, 8)), decode=True, lengths=jnp.array([1, 3]))
        >>> nnx.reorder_cache(layer, jnp.array([1, 1, 0]))
        >>> layer.cache_index.tolist()
        [3, 3, 1]
    """
    for layer in _caching(model):
        if hasattr(layer, "cache_index"):
            for name in ("cached_key", "cached_value", "cache_index"):
                setattr(layer, name, reordered(getattr(layer, name), rows))
