"""Train a transformer on any mesh: `python -m nnx.examples.transformer_sharded --mesh data=2,fsdp=2,tensor=2`.

It reads scikit-learn's digits as sequences of 64 pixels and learns to predict the next one. The model says nothing of
meshes: layers name the axes of their parameters, the model those of its activations, and a recipe maps both to the axes
of a mesh. Every recipe and every mesh gives the losses of one device. A run goes on from its newest checkpoint, on
another mesh too.

As several processes: `python -m nnx.train.launch -n 2 -d 4 -- -m nnx.examples.transformer_sharded --mesh fsdp=8`.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding

import nnx
from nnx.examples._common import new_figure, save_figure
from nnx.examples.data import batch_indices, load_digits
from nnx.train.launch import initialize

__all__ = ["Block", "Transformer", "main", "make_mesh", "parse_mesh", "run", "train_step"]

VOCABULARY = 24  # the 17 shades of a pixel, a mark of the beginning, and room to divide by 2, 4 and 8
BEGIN = 17
Array = jax.Array | np.ndarray

RESIDUAL = ("batch", "length", "activation_embed")
INNER = ("batch", "activation_length", "activation_embed")


class Block(nnx.Module):
    """Attention and a multilayer perceptron, each after a LayerNorm and beside an identity."""

    def __init__(self, embed: int, heads: int, mlp: int, dropout: float, *, ctx: nnx.Context) -> None:
        self.norm1 = nnx.LayerNorm(embed, ctx=ctx)
        self.attention = nnx.MultiHeadAttention(heads, embed, rotary=True, is_causal=True, ctx=ctx)
        self.norm2 = nnx.LayerNorm(embed, ctx=ctx)
        self.mlp = nnx.MLP(embed, mlp, embed, activation="gelu", ctx=ctx)
        self.dropout = nnx.Dropout(dropout)

    def __call__(self, x: jax.Array, ctx: nnx.Context) -> jax.Array:
        """[batch, length, embed] to the same."""
        h = nnx.with_logical_constraint(self.norm1(x), INNER)
        x = nnx.with_logical_constraint(x + self._settled(self.attention(h), ctx), RESIDUAL)
        h = nnx.with_logical_constraint(self.norm2(x), INNER)
        return nnx.with_logical_constraint(x + self._settled(self.mlp(h), ctx), RESIDUAL)

    def _settled(self, x: jax.Array, ctx: nnx.Context) -> jax.Array:
        return self.dropout(nnx.with_logical_constraint(x, RESIDUAL), ctx=ctx)


class Transformer(nnx.Module):
    """A decoder of the next token: [batch, length] integers to [batch, length, vocabulary] logits."""

    def __init__(
        self,
        embed: int,
        heads: int,
        mlp: int,
        layers: int,
        *,
        dropout: float = 0.0,
        remat: bool = False,
        vocabulary: int = VOCABULARY,
        ctx: nnx.Context,
    ) -> None:
        self.embed = nnx.Embed(vocabulary, embed, ctx=ctx)
        self.blocks = nnx.Stack(Block, layers, remat=remat)(embed, heads, mlp, dropout, ctx=ctx)
        self.norm = nnx.LayerNorm(embed, ctx=ctx)

    def __call__(self, tokens: jax.Array, *, ctx: nnx.Context) -> jax.Array:
        """Apply the model."""
        x = nnx.with_logical_constraint(self.embed(tokens), RESIDUAL)
        x = self.norm(self.blocks(x, ctx))
        x = nnx.with_logical_constraint(x, INNER)
        logits = self.embed.attend(x)
        return nnx.with_logical_constraint(logits, ("batch", "activation_length", "activation_vocab"))


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean loss in nats, by comparison and not by a look-up: so the vocabulary may be split."""
    shades = jax.lax.broadcasted_iota(labels.dtype, logits.shape, logits.ndim - 1)
    picked = jnp.where(shades == labels[..., None], logits, 0).sum(-1)
    return (jax.nn.logsumexp(logits, axis=-1) - picked).mean()


@functools.cache  # compared by identity: another one would compile the step anew
def make_optimizer() -> optax.GradientTransformation:
    """Adam behind clipping by the global norm, which is a sum over all shards."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-3))


@functools.partial(nnx.jit, donate_argnums=(0, 1))
def train_step(model: Transformer, optimizer: nnx.Optimizer, tokens: jax.Array, seed: jax.Array) -> jax.Array:
    """One step of training on [batch, 64] tokens; returns the loss. The masks depend on seed and step alone."""
    ctx = nnx.context(dropout=jax.random.fold_in(seed, optimizer.step), flags={"deterministic": False})

    def loss_fn(model: Transformer, ctx: nnx.Context) -> jax.Array:
        begin = jnp.full_like(tokens[:, :1], BEGIN)
        return cross_entropy(model(jnp.concatenate([begin, tokens[:, :-1]], axis=1), ctx=ctx), tokens)

    loss, grads = nnx.value_and_grad(loss_fn)(model, ctx)
    optimizer.update(model, grads)
    return loss


def parse_mesh(text: str) -> dict[str, int]:
    """The axes and sizes of `data=2,fsdp=4`.

    Raises:
        ValueError: it is not of that form.

    Example:
        >>> parse_mesh("data=2,fsdp=4")
        {'data': 2, 'fsdp': 4}
    """
    sizes = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in ("data", "fsdp", "tensor") or not size.isdecimal() or not int(size):
            raise ValueError(f"a mesh is given as data=2,fsdp=2,tensor=2 (any of the three axes), got {text!r}")
        sizes[name] = int(size)
    return sizes


def make_mesh(sizes: dict[str, int], axes: str = "auto") -> Mesh:
    """A mesh over the first devices of all processes.

    Args:
        sizes: the size of each axis.
        axes: "auto" or "explicit".

    Raises:
        ValueError: there are too few devices, or several processes have more.
    """
    need, have = math.prod(sizes.values()), len(jax.devices())
    processes = jax.process_count()
    if processes > 1 and need != have:
        raise ValueError(
            f"the mesh {sizes} takes {need} devices, and has to take all {have} that {processes} processes have; "
            "-n and -d of nnx.train.launch say how many those are"
        )
    if need > have:
        raise ValueError(
            f"the mesh {sizes} takes {need} devices, and there are {have}; on a CPU, "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={need} makes so many"
        )
    kind = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}[axes]
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes), devices=jax.devices()[:need]
    )


def run(
    mesh: Mesh,
    recipe: str = "combined",
    *,
    steps: int = 20,
    batch_size: int = 16,
    embed: int = 32,
    heads: int = 4,
    mlp: int = 64,
    layers: int = 2,
    dropout: float = 0.0,
    seed: int = 0,
    checkpoints: Path | None = None,
    save_every: int = 10,
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train on a mesh, from the newest checkpoint if there is one.

    Args:
        mesh: the mesh.
        recipe: a recipe of `nnx.sharding_rules`.
        steps: steps of the whole run.
        batch_size: sequences in a batch, of all devices together.
        embed: size of the embedding.
        heads: heads of attention.
        mlp: hidden units of each block.
        layers: number of blocks.
        dropout: the rate of dropout.
        seed: of all randomness.
        checkpoints: where to save and to go on from.
        save_every: steps from one checkpoint to the next; the last step is saved too.
        on_step: called with the number of steps taken and the loss.

    Returns:
        The losses of the steps that this run took.

    Raises:
        ShardingError: the batch, or a size of the model, does not divide over the mesh.
    """
    rules = nnx.sharding_rules(recipe, mesh)
    over = rules["batch"] or ()
    parts = math.prod(mesh.shape[axis] for axis in ((over,) if isinstance(over, str) else over))
    if batch_size % parts:
        raise nnx.ShardingError(f"a batch of {batch_size} sequences does not divide over {parts} devices ({over})")

    def create() -> tuple[Transformer, nnx.Optimizer]:
        model = Transformer(embed, heads, mlp, layers, dropout=dropout, ctx=nnx.context(seed))
        return model, nnx.Optimizer(model, make_optimizer())

    checkpointer = None if checkpoints is None else nnx.Checkpointer(checkpoints, save_every=save_every)
    saved = None if checkpointer is None else checkpointer.latest_step
    if checkpointer is not None and saved is not None and saved >= steps:
        checkpointer.close()
        return []
    model, optimizer = nnx.sharded_init(create, mesh, rules)
    if checkpointer is not None and saved is not None:
        checkpointer.restore(like={"model": model, "optimizer": optimizer})
    images = load_digits().train_images
    tokens = np.round(images.reshape(len(images), 64) * 16).astype(np.int32)
    placed = NamedSharding(mesh, nnx.logical_to_mesh(jax.sharding.PartitionSpec("batch", None), rules))
    key = jax.random.key(seed)
    losses = []
    with jax.set_mesh(mesh), nnx.logical_axis_rules(rules):
        for step in range(int(optimizer.step), steps):
            batch = tokens[batch_indices(step, size=len(tokens), batch_size=batch_size, seed=seed)]
            # Each process makes the part of the batch that its devices hold.
            share = jax.make_array_from_callback(batch.shape, placed, batch.__getitem__)
            loss = float(train_step(model, optimizer, share, key))
            losses.append(loss)
            if checkpointer is not None:
                last = step + 1 == steps
                checkpointer.save(step + 1, {"model": model, "optimizer": optimizer}, force=last)
            if on_step is not None:
                on_step(step + 1, loss)
    if checkpointer is not None:
        checkpointer.close()
    return losses


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m nnx.examples.transformer_sharded",
        description="Train a transformer on scikit-learn's digits as sequences of pixels, on a mesh of devices.",
    )
    parser.add_argument("--mesh", help="such as data=2,fsdp=2,tensor=2 (default: data=<all devices>)")
    parser.add_argument("--recipe", choices=list(nnx.RECIPES), default="combined", help="(default: %(default)s)")
    parser.add_argument("--axes", choices=["auto", "explicit"], default="auto", help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="of the whole run (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all randomness (default: %(default)s)")
    parser.add_argument("--dropout", type=float, default=0.0, help="(default: %(default)s)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/transformer_sharded"),
        help="where checkpoints, losses and picture are kept, and a run goes on (default: %(default)s)",
    )
    parser.add_argument("--save-every", type=int, default=10, help="steps (default: %(default)s)")
    options = parser.parse_args(arguments)
    initialize()
    first = jax.process_index() == 0  # of several processes one prints, logs and draws
    log = nnx.JSONLinesLogger(options.out / "log.jsonl")
    began = None

    def on_step(step: int, loss: float) -> None:
        nonlocal began
        if not first:
            return
        if began is None:
            began = step
            log.resume(step - 1)
        print(f"step {step:4d}  loss {loss:.6f}", flush=True)
        log.log(step, {"loss": loss})

    try:
        sizes = parse_mesh(options.mesh) if options.mesh else {"data": len(jax.devices())}
        mesh = make_mesh(sizes, options.axes)
    except ValueError as error:
        parser.error(str(error))
    try:
        run(
            mesh,
            options.recipe,
            steps=options.steps,
            dropout=options.dropout,
            seed=options.seed,
            checkpoints=options.out / "checkpoints",
            save_every=options.save_every,
            on_step=on_step,
        )
    except nnx.ShardingError as error:
        parser.error(str(error))
    finally:
        log.close()
    if first:
        if began is None:
            print(f"{options.out} holds a run of {options.steps} steps already; more --steps go on with it")
        _draw(options.out, f"{options.recipe}, " + " x ".join(f"{name} {size}" for name, size in sizes.items()), began)
    return 0


def _draw(out: Path, title: str, began: int | None) -> None:
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    figure = new_figure(6, 4)
    axes = figure.subplots()
    axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], marker="." if len(rows) < 30 else None)
    axes.axhline(math.log(BEGIN), color="black", linestyle=":", linewidth=1, label="guessing")
    if began is not None and began > 1:
        axes.axvline(began - 0.5, color="grey", linestyle="--", linewidth=1, label="went on from a checkpoint")
    axes.set(xlabel="step", ylabel="loss (nats a pixel)", ylim=(0, None), title=title)
    axes.legend(frameon=False, loc="lower right")
    axes.grid(alpha=0.25)
    save_figure(figure, out / "report.png")


if __name__ == "__main__":
    sys.exit(main())
