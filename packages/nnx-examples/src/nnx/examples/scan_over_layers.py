"""Many layers compiled as one: `python -m nnx.examples.scan_over_layers`.

Three ways to run the same stack of layers, each with parameters and dropout of its own, that share one BatchNorm: a
plain loop; `jax.vmap` and `jax.lax.scan` by hand, through the functional API; and `nnx.Stack`. All three give the same
numbers. The loop compiles every layer, the other two compile one.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import nnx
from nnx.examples._common import new_figure, options_of, save_figure

__all__ = ["Block", "LoopMLP", "ManualMLP", "StackMLP", "main"]

DIM = 16
TRAINING = {"deterministic": False, "use_running_average": False}


class Block(nnx.Module):
    """Linear, the shared BatchNorm, dropout and GELU, beside the input: [batch, dim] to [batch, dim]."""

    def __init__(self, dim: int, *, ctx: nnx.Context) -> None:
        self.linear = nnx.Linear(dim, dim, ctx=ctx)
        self.dropout = nnx.Dropout(0.2)

    def __call__(self, x: jax.Array, norm: nnx.BatchNorm, *, ctx: nnx.Context) -> jax.Array:
        """Apply the block."""
        return x + nnx.gelu(self.dropout(norm(self.linear(x), ctx=ctx), ctx=ctx))


class LoopMLP(nnx.Module):
    """Blocks in a list."""

    def __init__(self, blocks: Sequence[Block], norm: nnx.BatchNorm) -> None:
        self.blocks = list(blocks)
        self.norm = norm

    def __call__(self, x: jax.Array, *, ctx: nnx.Context) -> jax.Array:
        """Apply the blocks, one after another."""
        for block in self.blocks:
            x = block(x, self.norm, ctx=ctx)
        return x


class ManualMLP(nnx.Module):
    """One Block whose Variables have an axis of layers, made by `jax.vmap` and run by `jax.lax.scan`."""

    def __init__(self, dim: int, layers: int, *, ctx: nnx.Context) -> None:
        keys = jax.random.split(ctx.make_rng("params"), layers)
        self.layers = jax.vmap(lambda key: Block(dim, ctx=nnx.context(key)).partition())(keys).merge()
        self.norm = nnx.BatchNorm(dim, ctx=ctx)
        self.length = layers

    def __call__(self, x: jax.Array, *, ctx: nnx.Context) -> jax.Array:
        """Apply the layers."""
        params, moduledef = self.layers.partition(nnx.Param)
        (scale, statistics), normdef = self.norm.partition(nnx.Param, nnx.BatchStat)
        keys = jax.random.split(ctx.make_rng("dropout"), self.length)

        def layer(carry: tuple[jax.Array, nnx.State], inputs: tuple[nnx.State, jax.Array]) -> Any:
            x, statistics = carry
            params, key = inputs
            norm = normdef.merge(
                scale, statistics
            )  # shared: the same parameters, and statistics that go from layer to layer
            x = moduledef.merge(params)(x, norm, ctx=nnx.context(dropout=key, flags=ctx.flags))
            return (x, norm.filter(nnx.BatchStat)), None

        (x, statistics), _ = jax.lax.scan(layer, (x, statistics), (params, keys))
        self.norm.update_state(statistics)
        return x


class StackMLP(nnx.Module):
    """The same in a line each."""

    def __init__(self, dim: int, layers: int, *, ctx: nnx.Context) -> None:
        self.layers = nnx.Stack(Block, layers)(dim, ctx=ctx)
        self.norm = nnx.BatchNorm(dim, ctx=ctx)

    def __call__(self, x: jax.Array, *, ctx: nnx.Context) -> jax.Array:
        """Apply the layers; the norm is shared by all of them, and the Context gives each its own keys."""
        return self.layers(x, self.norm, ctx=ctx)


def compare(layers: int, seed: int) -> float:
    """The largest difference between the three, without dropout, with the same parameters."""
    stack = StackMLP(DIM, layers, ctx=nnx.context(seed))
    manual = ManualMLP(DIM, layers, ctx=nnx.context(seed))
    # Values alone: the Stack's Variables also have the name of their axis in their metadata.
    for name in ("kernel", "bias"):
        setattr(manual.layers.linear, name, getattr(stack.layers.layers.linear, name))
    loop = LoopMLP([stack.layers[i].clone() for i in range(layers)], nnx.BatchNorm(DIM, ctx=nnx.context(seed)))
    x = jax.random.normal(jax.random.key(seed), (32, DIM))
    ctx = nnx.context(dropout=seed, flags={"deterministic": True, "use_running_average": False})
    outs = [model(x, ctx=ctx) for model in (stack, manual, loop)]
    means = [model.norm.mean for model in (stack, manual, loop)]
    return max(float(jnp.abs(a - b).max()) for values in (outs, means) for a in values for b in values)


def compile_seconds(model: nnx.Module) -> float:
    """How long it takes to trace and compile a gradient of the model."""
    x = jnp.ones((32, DIM))
    ctx = nnx.context(dropout=0, flags=TRAINING)

    @nnx.jit
    def gradient(model: Any, x: jax.Array, ctx: nnx.Context) -> nnx.State:
        return nnx.grad(lambda model, ctx: jnp.mean(model(x, ctx=ctx) ** 2))(model, ctx)

    start = time.perf_counter()
    gradient.lower(model, x, ctx).compile()
    return time.perf_counter() - start


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code."""
    options = options_of(
        "scan_over_layers",
        "Compare a loop over layers with a scan, by hand and by nnx.Stack. --steps is the largest number of layers.",
        arguments,
        steps=48,
    )
    print(f"largest difference of outputs and statistics, 4 layers: {compare(min(4, options.steps), options.seed):.1e}")
    depths = sorted({min(depth, options.steps) for depth in (3, 6, 12, 24, 48, options.steps)})
    seconds: dict[str, list[float]] = {"loop": [], "jax.lax.scan by hand": [], "nnx.Stack": []}
    for layers in depths:
        ctx = nnx.context(options.seed)
        loop = LoopMLP([Block(DIM, ctx=ctx) for _ in range(layers)], nnx.BatchNorm(DIM, ctx=ctx))
        models = loop, ManualMLP(DIM, layers, ctx=ctx), StackMLP(DIM, layers, ctx=ctx)
        for (name, values), model in zip(seconds.items(), models, strict=True):
            values.append(compile_seconds(model))
            print(f"{layers:4} layers  {name:22} compiled in {values[-1]:.2f} s")
    figure = new_figure(6, 4)
    axes = figure.subplots()
    for name, values in seconds.items():
        axes.plot(depths, values, marker="o", label=name)
    axes.set(xlabel="layers", ylabel="seconds to compile a gradient", ylim=(0, None), xticks=depths)
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    save_figure(figure, options.out / "report.png")
    return 0 if np.isfinite(seconds["nnx.Stack"]).all() else 1


if __name__ == "__main__":
    sys.exit(main())
