"""Partitions, States, filters and layers as a type checker sees them: checked against the built wheels, never run."""

# mypy: warn-unused-ignores

from typing import Any, assert_type

import jax
import jax.numpy as jnp

import nnx


class Count(nnx.Variable[jax.Array]):
    """A collection of one's own."""


class Model(nnx.Module):
    def __init__(self, *, ctx: nnx.Context) -> None:
        # An attribute reads as its value, whatever holds it.
        self.scale = nnx.Param(jnp.ones(4), sharding=("features",))
        self.count = Count(jnp.int32(0))
        self.seen = nnx.var("statistics", jnp.zeros(4))
        self.pair = nnx.Node([jnp.zeros(2), jnp.ones(2)])
        self.attention = nnx.MultiHeadAttention(2, 4, ctx=ctx)
        self.norm = nnx.BatchNorm(4, ctx=ctx)
        self.blocks = nnx.Sequence([nnx.Linear(4, 4, ctx=ctx)])
        self.named = nnx.Dict({"head": nnx.Linear(4, 2, ctx=ctx)})

    def __call__(self, x: jax.Array, *, ctx: nnx.Context | None = None) -> jax.Array:
        self.count += 1
        x = self.norm(self.attention(x), ctx=ctx)
        for block in self.blocks:
            assert_type(block, nnx.layers.Linear)
            x = block(x) * self.scale
        return self.named["head"](nnx.relu(x))


x = jnp.ones((2, 3, 4))
ctx = nnx.context(0, dropout=1, flags={"deterministic": True})
model = Model(ctx=ctx)
assert_type(model.blocks[0], nnx.layers.Linear)
assert_type(model.blocks[:1], nnx.Sequence[nnx.layers.Linear])
assert_type(model.scale, jax.Array)
assert_type(model.scale.shape, tuple[int, ...])
assert_type(x @ model.scale, jax.Array)
assert_type(model.seen, jax.Array)
assert_type(model.pair, list[jax.Array])
model.count = model.count + 1
model.count = "1"  # type: ignore[assignment]
assert_type(ctx.make_rng("params"), jax.Array)

# partition: one State without a filter or with one, a tuple of States with several.
state, moduledef = model.partition()
assert_type(state, nnx.State)
assert_type(moduledef, nnx.ModuleDef[Model])
params, _ = model.partition(nnx.Param)
assert_type(params, nnx.State)
(params, stats, rest), _ = model.partition(nnx.Param, "batch_stats", ...)
assert_type(stats, nnx.State)
assert_type(moduledef.merge(params, stats, rest), Model)
assert_type(model.partition().merge(), Model)
moduledef.merge(model)  # type: ignore[arg-type]
assert_type(state.partition(nnx.Param, ...), tuple[nnx.State, ...])
assert_type(state.partition(nnx.Param), nnx.State)
assert_type(state.filter(nnx.Param), nnx.State)
assert_type(state.filter(nnx.Param, Count), tuple[nnx.State, ...])
assert_type(model.filter(nnx.Any(nnx.Param, nnx.BatchStat)), nnx.State)
assert_type(model.filter(nnx.All(nnx.Param, nnx.PathGlob("blocks/**")), nnx.buffers), tuple[nnx.State, ...])
model.filter()  # type: ignore[call-overload]

# States.
assert_type(state["blocks", "0", "kernel"], Any)
assert_type(state["scale"], Any)
assert_type(state | params, nnx.State)
assert_type(state - params, nnx.State)
assert_type(nnx.State.merge(params, stats), nnx.State)
assert_type(params.map(lambda path, value: value * len(path)), nnx.State)
assert_type(state.paths, tuple[tuple[str, ...], ...])
for path, leaf in state.items():
    assert_type(path, tuple[str, ...])
    assert_type(leaf, Any)
state | 1  # type: ignore[operator]
state["scale"] = 1  # type: ignore[index]
updated: nnx.State = jax.tree.map(lambda w: w, params)

# Modules.
assert_type(model.clone(), Model)
model.update_state(params)
model.for_each(nnx.Linear, lambda layer: layer.kernel.shape)
model.for_each(nnx.Linear, lambda layer: layer.no_such_attribute)  # type: ignore[attr-defined]

# Layers.
assert_type(nnx.Linear(4, 2, ctx=ctx).kernel, jax.Array)
assert_type(nnx.Dropout(0.5)(x, ctx=ctx), jax.Array)
assert_type(nnx.Embed(10, 4, ctx=ctx).attend(x), jax.Array)
assert_type(nnx.Conv(4, 8, 3, ctx=ctx)(x), jax.Array)
nnx.Linear(4, ctx=ctx)  # type: ignore[call-arg]
nnx.Linear(4, "2", ctx=ctx)  # type: ignore[arg-type]
nnx.Linear(4, 2)  # type: ignore[call-arg]

# Looking.
summary = nnx.tabulate(model, x, ctx=ctx)
assert_type(summary.rows[0].flops, int | None)
assert_type(nnx.count_parameters(model, nnx.Param), int)
assert_type(nnx.diff(state, params)[0].largest, float | None)
assert_type(nnx.draw(model, format="dot"), str)
nnx.draw(model, format="svg")  # type: ignore[arg-type]
