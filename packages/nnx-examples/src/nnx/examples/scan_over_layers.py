"""Many layers compiled as one: `python -m nnx.examples.scan_over_layers`.

Three ways to run the same stack of layers, each with parameters and dropout of its own, that share one BatchNorm: a
plain loop; `jax.vmap` and `jax.lax.scan` by hand, through the functional API; and `nnx.Stack`. All three give the same
numbers. The loop compiles every layer, the other two compile one. Then the deepest Stack learns to read digits, and
comes back from its checkpoint.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import nnx
from nnx.examples._common import new_figure, options_of, save_figure
from nnx.examples.data import load_digits

__all__ = ["Block", "Classifier", "LoopMLP", "ManualMLP", "StackMLP", "main", "train"]

DIM = 32
DEPTHS = (3, 6, 12, 24)  # of the loop too, which takes as long for 48 as for all of these
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


class NormedBlock(nnx.Module):
    """A Block with a BatchNorm of its own: the running statistics of a shared one are of all layers, and fit none."""

    def __init__(self, dim: int, *, ctx: nnx.Context) -> None:
        self.block = Block(dim, ctx=ctx)
        # A scale of zero: each block begins as the identity, so that many on one another learn at once.
        self.norm = nnx.BatchNorm(dim, scale_init=jax.nn.initializers.zeros, ctx=ctx)

    def __call__(self, x: jax.Array, *, ctx: nnx.Context) -> jax.Array:
        """Apply the block."""
        return self.block(x, self.norm, ctx=ctx)


class Classifier(nnx.Module):
    """[batch, 64] pixels to [batch, 10] logits, through many layers."""

    def __init__(self, layers: int, *, ctx: nnx.Context) -> None:
        self.first = nnx.Linear(64, DIM, ctx=ctx)
        self.layers = nnx.Stack(NormedBlock, layers)(DIM, ctx=ctx)
        self.last = nnx.Linear(DIM, 10, ctx=ctx)

    def __call__(self, x: jax.Array, *, ctx: nnx.Context) -> jax.Array:
        """Apply the network."""
        return self.last(self.layers(self.first(x), ctx=ctx))


@nnx.jit(donate_argnums=0)
def train_step(state: dict[str, Any], batch: dict[str, jax.Array], ctx: nnx.Context) -> dict[str, jax.Array]:
    """One step of Adam."""

    def loss_fn(model: Classifier, ctx: nnx.Context) -> tuple[jax.Array, jax.Array]:
        logits = model(batch["image"], ctx=ctx)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
        return loss, jnp.mean(logits.argmax(-1) == batch["label"])

    (loss, accuracy), grads = nnx.value_and_grad(loss_fn, has_aux=True)(state["model"], ctx)
    state["optimizer"].update(state["model"], grads)
    return {"loss": loss, "accuracy": accuracy}


@nnx.jit
def logits_of(model: Classifier, x: jax.Array) -> jax.Array:
    """What the model makes of images, without dropout."""
    return model(x, ctx=nnx.context(flags={"deterministic": True, "use_running_average": True}))


def train(out: Path, layers: int, steps: int, seed: int) -> tuple[float, float]:
    """Train a Stack on digits, save it, and read it back into a new one.

    Args:
        out: the directory of the checkpoints; a run that is there goes on.
        layers: how deep it is.
        steps: how many steps the whole run has.
        seed: of all randomness.

    Returns:
        The accuracy on the test images, and the largest difference between the logits of the model and of the one that
        was restored.
    """
    digits = load_digits()
    data = {"image": digits.train_images.reshape(-1, 64), "label": digits.train_labels}
    model = Classifier(layers, ctx=nnx.context(seed))
    state = {"model": model, "optimizer": nnx.Optimizer(model, optax.adam(3e-3))}
    with nnx.Checkpointer(out / "checkpoints", save_every=200, keep_last=1) as checkpointer:
        nnx.fit(
            train_step,
            state,
            nnx.ArrayLoader(data, 64, seed=seed),
            steps=steps,
            context=nnx.context(dropout=seed, flags=TRAINING),
            checkpointer=checkpointer,
            log_every=max(1, steps // 20),
            loggers=[nnx.TerminalLogger(), nnx.JSONLinesLogger(out / "log.jsonl")],
        )
        restored = Classifier(layers, ctx=nnx.context(seed + 1))  # other numbers, until they are read
        checkpointer.restore(like={"model": restored}, partial=True)  # without the optimizer
    x = jnp.asarray(digits.test_images.reshape(-1, 64))
    logits = logits_of(model, x)
    accuracy = float(jnp.mean(logits.argmax(-1) == digits.test_labels))
    return accuracy, float(jnp.abs(logits_of(restored, x) - logits).max())


def time_compilation(depths: Sequence[int], layers: int, seed: int) -> dict[str, dict[int, float]]:
    """The seconds to compile each way, by the number of layers; the two scans are also compiled with all layers."""
    seconds: dict[str, dict[int, float]] = {"loop": {}, "jax.lax.scan by hand": {}, "nnx.Stack": {}}
    for depth in sorted({*depths, layers}):
        ctx = nnx.context(seed)
        models: list[nnx.Module | None] = [None, ManualMLP(DIM, depth, ctx=ctx), StackMLP(DIM, depth, ctx=ctx)]
        if depth in depths:
            models[0] = LoopMLP([Block(DIM, ctx=ctx) for _ in range(depth)], nnx.BatchNorm(DIM, ctx=ctx))
        for (name, values), model in zip(seconds.items(), models, strict=True):
            if model is not None:
                values[depth] = compile_seconds(model)
                print(f"{depth:4} layers  {name:22} compiled in {values[depth]:.2f} s")
    return seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code: 1 if the restored model is another."""
    options = options_of(
        "scan_over_layers",
        "Compare a loop over layers with a scan, by hand and by nnx.Stack; then train a deep nnx.Stack on digits.",
        arguments,
        steps=400,
        layers={"type": int, "default": 48, "help": "of the Stack that is trained (default: %(default)s)"},
    )
    layers = options.layers
    few = min(4, layers)
    print(f"largest difference of outputs and statistics, {few} layers: {compare(few, options.seed):.1e}")
    seconds = time_compilation([depth for depth in DEPTHS if depth <= layers], layers, options.seed)
    print(f"training {layers} layers")
    accuracy, difference = train(options.out, layers, options.steps, options.seed)
    print(f"test accuracy {accuracy:.3f}; restored from {options.out / 'checkpoints'}: logits {difference:.0e} apart")
    _draw(options.out, seconds, layers)
    return 0 if difference == 0 else 1


def _draw(out: Path, seconds: dict[str, dict[int, float]], layers: int) -> None:
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    figure = new_figure(10, 4)
    compiling, training = figure.subplots(1, 2)
    for name, values in seconds.items():
        compiling.plot(list(values), list(values.values()), marker="o", label=name)
    depths = list(seconds["nnx.Stack"])
    compiling.set(xlabel="layers", ylabel="seconds to compile a gradient", ylim=(0, None), xticks=depths)
    compiling.legend(frameon=False)
    training.plot([row["step"] for row in rows], [row["loss"] for row in rows], marker="o", color="C2")
    training.set(xlabel="step", ylabel="training loss (nats a digit)", ylim=(0, None), title=f"{layers} layers")
    for axes in (compiling, training):
        axes.grid(alpha=0.25)
    save_figure(figure, out / "report.png")


if __name__ == "__main__":
    sys.exit(main())
