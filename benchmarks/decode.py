"""Decoding with a cache of keys and values: what a token costs, from the call to the next token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

import nnx
from benchmarks._measure import Options, Side, alternate
from benchmarks._results import OURS, RAW, Result, results_of

LAYERS, WIDTH, HEADS, VOCABULARY, ROOM = 6, 64, 4, 256, 128
BATCHES = (1, 16)


class Block(nnx.Module):
    """Attention and an MLP, each after a norm."""

    def __init__(self, *, ctx: nnx.Context) -> None:
        self.norm1 = nnx.LayerNorm(WIDTH, ctx=ctx)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=True, ctx=ctx)
        self.norm2 = nnx.LayerNorm(WIDTH, ctx=ctx)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, ctx=ctx)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, ctx=ctx)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the block to the next token of each row."""
        x = x + self.attention(self.norm1(x))
        return x + self.down(jax.nn.gelu(self.up(self.norm2(x))))


class Decoder(nnx.Module):
    """A decoder that gives the next token."""

    def __init__(self, *, ctx: nnx.Context) -> None:
        self.embed = nnx.Embed(VOCABULARY, WIDTH, ctx=ctx)
        self.blocks = [Block(ctx=ctx) for _ in range(LAYERS)]

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """The likeliest token after each row, [batch, 1]."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return jnp.argmax(self.embed.attend(x), axis=-1)


def measure(options: Options) -> Iterator[Result]:
    """Rows of a hundred tokens over and over, one token a call, by the number of rows."""
    for batch in BATCHES:
        sides: dict[str, Side] = {RAW: _raw(batch), OURS: _ours(batch)}
        if options.rivals:
            from benchmarks._rivals import decode_sides

            sides |= decode_sides(batch)
        timings = alternate(sides, rounds=options.rounds, round_seconds=options.round_seconds)
        yield from results_of("decode", f"a token, batch {batch}", timings)


def _ours(batch: int) -> Side:
    model = Decoder(ctx=nnx.context(0))
    nnx.init_cache(model, batch, ROOM)
    tokens = jnp.zeros((batch, 1), jnp.int32)
    step = nnx.jit(lambda model, tokens: model(tokens))
    count = 0

    def side() -> jax.Array:
        nonlocal tokens, count
        if count % ROOM == 0:
            nnx.reset_cache(model)
        count += 1
        tokens = step(model, tokens)
        return tokens

    return side


def _raw(batch: int) -> Side:
    """The same function on plain arrays, under `jax.jit`."""
    model = Decoder(ctx=nnx.context(0))
    nnx.init_cache(model, batch, ROOM)
    (cache, rest), moduledef = model.partition(nnx.Cache, ...)
    caches = list(cache.raw_values)
    params = list(rest.raw_values)
    index = [i for i, path in enumerate(cache.paths) if path[-1] == "cache_index"]

    def step(params: list[Any], tokens: jax.Array, caches: list[Any]) -> Any:
        module = moduledef.merge(cache.replace_values(caches), rest.replace_values(params))
        out = module(tokens)
        return out, list(module.filter(nnx.Cache).raw_values)

    compiled = jax.jit(step)
    tokens = jnp.zeros((batch, 1), jnp.int32)
    count = 0

    def side() -> jax.Array:
        nonlocal tokens, caches, count
        if count % ROOM == 0:
            for i in index:
                caches[i] = jnp.zeros_like(caches[i])
        count += 1
        tokens, caches = compiled(params, tokens, caches)
        return tokens

    return side
