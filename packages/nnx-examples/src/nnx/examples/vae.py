"""A variational autoencoder of handwritten digits: `python -m nnx.examples.vae`.

The encoder keeps its part of the loss, the KL divergence, in a Variable of a type of its own, where the loss function
finds it: no layer in between has to hand it on.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import nnx
from nnx.examples._common import new_figure, options_of, save_figure
from nnx.examples.data import load_digits

__all__ = ["VAE", "Decoder", "Encoder", "Loss", "main"]

PIXELS, HIDDEN, LATENT = 64, 256, 8


class Loss(nnx.Variable):
    """A part of the loss, kept by the Module that knows it."""

    temporary = True


class Encoder(nnx.Module):
    """[batch, 64] pixels to [batch, 8] samples of the latent variables."""

    def __init__(self, *, ctx: nnx.Context) -> None:
        self.hidden = nnx.Linear(PIXELS, HIDDEN, ctx=ctx)
        self.mean = nnx.Linear(HIDDEN, LATENT, ctx=ctx)
        self.log_std = nnx.Linear(HIDDEN, LATENT, ctx=ctx)

    def __call__(self, x: jax.Array, *, ctx: nnx.Context) -> jax.Array:
        """Sample, and keep the KL divergence from the standard normal as `kl_loss`."""
        x = nnx.gelu(self.hidden(x))
        mean, log_std = self.mean(x), self.log_std(x)
        variance = jnp.exp(2 * log_std)
        self.kl_loss = Loss(0.5 * (mean**2 + variance - 1 - 2 * log_std).sum(-1).mean())
        return mean + jnp.sqrt(variance) * jax.random.normal(ctx.make_rng("noise"), mean.shape)


class Decoder(nnx.Module):
    """[batch, 8] latent variables to [batch, 64] logits of the pixels."""

    def __init__(self, *, ctx: nnx.Context) -> None:
        self.hidden = nnx.Linear(LATENT, HIDDEN, ctx=ctx)
        self.out = nnx.Linear(HIDDEN, PIXELS, ctx=ctx)

    def __call__(self, z: jax.Array) -> jax.Array:
        """Apply the decoder."""
        return self.out(nnx.gelu(self.hidden(z)))


class VAE(nnx.Module):
    """Encoder and decoder."""

    def __init__(self, *, ctx: nnx.Context) -> None:
        self.encoder = Encoder(ctx=ctx)
        self.decoder = Decoder(ctx=ctx)

    def __call__(self, x: jax.Array, *, ctx: nnx.Context) -> jax.Array:
        """The logits of reconstructed pixels."""
        return self.decoder(self.encoder(x, ctx=ctx))

    def generate(self, count: int, *, ctx: nnx.Context) -> jax.Array:
        """Pixels of digits that nobody wrote, [count, 64]."""
        return jax.nn.sigmoid(self.decoder(jax.random.normal(ctx.make_rng("noise"), (count, LATENT))))


def loss_fn(model: VAE, x: jax.Array, ctx: nnx.Context) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The negative evidence lower bound of a batch, in nats for an image."""
    logits = model(x, ctx=ctx)
    reconstruction = optax.sigmoid_binary_cross_entropy(logits, x).sum(-1).mean()
    kept = model.pop_state(Loss)  # a Variable that is there no longer is not carried from step to step
    kl = sum(jax.tree.leaves(kept))
    return reconstruction + kl, {"reconstruction": reconstruction, "kl": kl}


@nnx.jit(donate_argnums=0)
def train_step(state: tuple[VAE, nnx.Optimizer], x: jax.Array, ctx: nnx.Context) -> dict[str, jax.Array]:
    """One step of Adam."""
    model, optimizer = state
    (loss, parts), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model, x, ctx)
    optimizer.update(model, grads)
    return {"loss": loss, **parts}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code."""
    options = options_of("vae", "Train a variational autoencoder on handwritten digits.", arguments, steps=3000)
    digits = load_digits()
    x = digits.train_images.reshape(-1, PIXELS)
    model = VAE(ctx=nnx.context(options.seed))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3))
    log = nnx.JSONLinesLogger(options.out / "log.jsonl")
    with nnx.Checkpointer(options.out / "checkpoints", save_every=1000, keep_last=1) as checkpointer:
        result = nnx.fit(
            train_step,
            (model, optimizer),
            nnx.ArrayLoader(x, 128, seed=options.seed),
            steps=options.steps,
            context=nnx.context(noise=options.seed),
            checkpointer=checkpointer,
            log_every=max(1, options.steps // 20),
            loggers=[nnx.TerminalLogger(), log],
        )
    if not result.metrics:
        print(f"{options.out} holds a run of {result.step} steps already; choose another --out to begin anew")
    ctx = nnx.context(noise=options.seed + 1)
    test = jnp.asarray(digits.test_images[:16].reshape(-1, PIXELS))
    again = jax.nn.sigmoid(model(test, ctx=ctx))
    _draw(options.out, np.asarray(test), np.asarray(again), np.asarray(model.generate(48, ctx=ctx)))
    return 0


def _draw(out: Path, test: np.ndarray, again: np.ndarray, new: np.ndarray) -> None:
    figure = new_figure(10, 4.6)
    rows = [test, again, *np.split(new, 3)]
    titles = ["scanned", "through the autoencoder", "made up", "", ""]
    for axes, row, title in zip(figure.subplots(len(rows), 1), rows, titles, strict=True):
        axes.imshow(np.concatenate(np.pad(row.reshape(-1, 8, 8), ((0, 0), (1, 1), (1, 1))), axis=1), cmap="gray_r")
        axes.set_title(title, fontsize=10, loc="left")
        axes.axis("off")
    save_figure(figure, out / "report.png")


if __name__ == "__main__":
    sys.exit(main())
