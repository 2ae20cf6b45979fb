"""What a call costs: a compiled function that reads a model or writes every array of it, with next to no arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

import nnx
from benchmarks._measure import Options, Side, alternate
from benchmarks._models import Blocks, raw_blocks
from benchmarks._results import OURS, RAW, Result, results_of

SIZES = (12, 48, 192, 768)
RIVALS_UP_TO = 192
"""Blocks. Beyond, a single call of the slowest takes most of a second."""
LEAVES = 1000
"""The arrays of the large batch."""


def measure(options: Options) -> Iterator[Result]:
    """Read, read beside a large batch, and update, by number of blocks."""
    x = jnp.ones((2, 8))
    batch = [jnp.full((2,), float(i)) for i in range(LEAVES)]
    for blocks in SIZES:
        if blocks > options.largest:
            continue
        rivals = options.rivals and blocks <= RIVALS_UP_TO
        leaves = 4 * blocks
        sides = _read_sides(blocks, x, lambda x: x + 1, rivals)
        timings = alternate(sides, rounds=options.rounds, round_seconds=options.round_seconds)
        yield from results_of("dispatch", f"read, {blocks} blocks", timings, leaves)
        sides = _read_sides(blocks, batch, lambda batch: batch[0] + 1, rivals)
        timings = alternate(sides, rounds=options.rounds, round_seconds=options.round_seconds)
        yield from results_of("dispatch", f"read, {blocks} blocks beside a batch of {LEAVES} arrays", timings)
        timings = alternate(
            _update_sides(blocks, x, rivals), rounds=options.rounds, round_seconds=options.round_seconds
        )
        yield from results_of("dispatch", f"update, {blocks} blocks", timings, leaves)


def _read_sides(blocks: int, x: Any, use: Callable[[Any], jax.Array], rivals: bool) -> dict[str, Side]:
    sides = own_read_sides(Blocks(blocks, ctx=nnx.context(0)), x, use)
    if rivals:
        from benchmarks._rivals import read_sides

        sides |= read_sides(blocks, x, use)
    return sides


def own_read_sides(model: Blocks, x: Any, use: Callable[[Any], jax.Array]) -> dict[str, Side]:
    """A function that leaves everything as it is: raw JAX on the arrays, and ours on the model."""

    def read(model: Any, x: Any) -> jax.Array:
        return use(x)

    leaves = jax.tree.leaves(model.partition()[0])  # the very arrays: others may lie worse in the processor's caches
    raw, ours = jax.jit(read), nnx.jit(read)
    return {RAW: lambda: raw(leaves, x), OURS: lambda: ours(model, x)}


def _update_sides(blocks: int, x: jax.Array, rivals: bool) -> dict[str, Side]:
    sides = own_update_sides(raw_blocks(blocks), Blocks(blocks, ctx=nnx.context(0)), x)
    if rivals:
        from benchmarks._rivals import update_sides

        sides |= update_sides(blocks, x)
    return sides


def own_update_sides(leaves: list[jax.Array], model: Blocks, x: jax.Array) -> dict[str, Side]:
    """A function that adds 1 to everything: raw JAX on the arrays, and ours on the model."""

    @jax.jit
    def raw(leaves: list[jax.Array], x: jax.Array) -> Any:
        return [leaf + 1 for leaf in leaves], x + 1

    @nnx.jit
    def ours(model: Blocks, x: jax.Array) -> jax.Array:
        for block in model.blocks:
            block.linear.kernel = block.linear.kernel + 1
            block.linear.bias = block.linear.bias + 1
            block.norm.scale = block.norm.scale + 1
            block.norm.bias = block.norm.bias + 1
        return x + 1

    def raw_side() -> jax.Array:
        nonlocal leaves
        leaves, out = raw(leaves, x)
        return out

    return {RAW: raw_side, OURS: lambda: ours(model, x)}
