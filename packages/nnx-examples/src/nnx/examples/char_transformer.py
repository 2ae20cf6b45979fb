"""A decoder that writes Python: `python -m nnx.examples.char_transformer`.

Trained on text that every machine has, the sources of Python's own standard library, and then set to write with a cache
of keys and values, a token a call. Grouped-query attention, rotary positions, and layers that are compiled once
(`nnx.Stack`).
"""

from __future__ import annotations

import functools
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import nnx
from nnx.examples._common import new_figure, options_of, save_figure

__all__ = ["Block", "Decoder", "TextWindows", "generate", "load_sources", "main"]

CONTEXT = 128  # tokens that the model sees in training; rotary positions reach no further


class Block(nnx.Module):
    """Causal attention and a gated MLP, each after a norm and beside its input: [batch, length, dim]."""

    def __init__(self, dim: int, heads: int, kv_heads: int, *, ctx: nnx.Context) -> None:
        self.norm1 = nnx.RMSNorm(dim, ctx=ctx)
        self.attention = nnx.MultiHeadAttention(
            heads, dim, num_kv_heads=kv_heads, rotary=True, is_causal=True, use_bias=False, ctx=ctx
        )
        self.norm2 = nnx.RMSNorm(dim, ctx=ctx)
        self.gate = nnx.Linear(dim, 3 * dim, use_bias=False, ctx=ctx)
        self.up = nnx.Linear(dim, 3 * dim, use_bias=False, ctx=ctx)
        self.down = nnx.Linear(3 * dim, dim, use_bias=False, ctx=ctx)

    def __call__(self, x: jax.Array, *, decode: bool = False) -> jax.Array:
        """Apply the block; with `decode` its attention appends to its cache."""
        x = x + self.attention(self.norm1(x), decode=decode)
        h = self.norm2(x)
        return x + self.down(nnx.silu(self.gate(h)) * self.up(h))


class Decoder(nnx.Module):
    """[batch, length] tokens to [batch, length, vocabulary] logits; the embedding is tied to the output."""

    def __init__(self, vocabulary: int, dim: int, layers: int, heads: int, kv_heads: int, *, ctx: nnx.Context) -> None:
        self.embed = nnx.Embed(vocabulary, dim, ctx=ctx)
        self.blocks = nnx.Stack(Block, layers)(dim, heads, kv_heads, ctx=ctx)
        self.norm = nnx.RMSNorm(dim, ctx=ctx)

    def __call__(self, tokens: jax.Array, *, decode: bool = False) -> jax.Array:
        """Apply the model."""
        return self.embed.attend(self.norm(self.blocks(self.embed(tokens), decode=decode)))

    def init_cache(self, batch: int, length: int) -> None:
        """Make room for `length` tokens in each of `batch` rows."""
        nnx.vmap(lambda block: nnx.init_cache(block, batch, length))(self.blocks.layers)


def load_sources(size: int) -> tuple[np.ndarray, list[str]]:
    """Text of the standard library as numbers, and the characters that they stand for.

    Args:
        size: how many characters.

    Returns:
        [size] uint8, and the vocabulary: printable ASCII, a line feed, and one for everything else.
    """
    text = ""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text += path.read_text(encoding="utf-8", errors="replace")
        if len(text) >= size:
            break
    vocabulary = ["\N{REPLACEMENT CHARACTER}", "\n", *map(chr, range(32, 127))]
    codes = {character: code for code, character in enumerate(vocabulary)}
    return np.array([codes.get(character, 0) for character in text[:size]], np.uint8), vocabulary


class TextWindows:
    """Windows at random places of a text, [batch, length + 1], for ever; its position can be saved."""

    def __init__(self, text: np.ndarray, batch: int, length: int, seed: int) -> None:
        self.text, self.batch, self.length, self.seed, self.step = text, batch, length, seed, 0

    def __iter__(self) -> TextWindows:
        return self

    def __next__(self) -> np.ndarray:
        starts = np.random.default_rng((self.seed, self.step)).integers(
            len(self.text) - self.length - 1, size=self.batch
        )
        self.step += 1
        return self.text[starts[:, None] + np.arange(self.length + 1)].astype(np.int32)

    def get_state(self) -> dict[str, Any]:
        """Where it is."""
        return {"step": self.step}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.step = int(state["step"])


def loss_fn(model: Decoder, tokens: jax.Array) -> jax.Array:
    """Cross-entropy of the next character, in nats."""
    logits = model(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


@nnx.jit(donate_argnums=0)
def train_step(state: tuple[Decoder, nnx.Optimizer], tokens: jax.Array) -> dict[str, jax.Array]:
    """One step."""
    model, optimizer = state
    loss, grads = nnx.value_and_grad(loss_fn)(model, tokens)
    optimizer.update(model, grads)
    return {"loss": loss}


@nnx.jit
def prefill(model: Decoder, tokens: jax.Array) -> jax.Array:
    """Put a prompt into the cache, and give the logits of what follows, [batch, vocabulary]."""
    return model(tokens, decode=True)[:, -1]


@nnx.jit
def decode(model: Decoder, logits: jax.Array, ctx: nnx.Context, temperature: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Draw the next token of each row, and give it and the logits after it."""
    token = jax.random.categorical(ctx.make_rng("sample"), logits / temperature)
    return token, model(token[:, None], decode=True)[:, -1]


def generate(
    model: Decoder, prompt: np.ndarray, count: int, *, ctx: nnx.Context, temperature: float = 0.7
) -> tuple[np.ndarray, float]:
    """Go on with a prompt.

    Args:
        model: the model, with an empty cache.
        prompt: [batch, length].
        count: how many tokens to add.
        ctx: gives the keys, from its stream "sample".
        temperature: below 1 for the likelier, above for the rarer.

    Returns:
        The new tokens, [batch, count], and how many were made in a second.
    """
    logits = prefill(model, jnp.asarray(prompt))
    scale = jnp.float32(temperature)
    token, logits = decode(model, logits, ctx, scale)  # compiles
    tokens = [token]
    jax.block_until_ready(logits)
    start = time.perf_counter()
    for _ in range(count - 1):
        token, logits = decode(model, logits, ctx, scale)
        tokens.append(token)
    out = np.stack(jax.device_get(tokens), axis=1)
    return out, prompt.shape[0] * (count - 1) / (time.perf_counter() - start)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code."""
    options = options_of(
        "char_transformer",
        "Train a small transformer on the sources of Python's standard library, and let it write.",
        arguments,
        steps=500,
        dim={"type": int, "default": 96, "help": "width of the model (default: %(default)s)"},
        layers={"type": int, "default": 3, "help": "(default: %(default)s)"},
        characters={"type": int, "default": 400, "help": "how much to write (default: %(default)s)"},
    )
    text, vocabulary = load_sources(2_000_000)
    held_back = text[-50_000:]
    model = Decoder(len(vocabulary), options.dim, options.layers, heads=4, kv_heads=2, ctx=nnx.context(options.seed))
    schedule = optax.warmup_cosine_decay_schedule(0, 3e-3, min(50, options.steps // 4), options.steps, 3e-4)
    optimizer = nnx.Optimizer(model, optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule)))
    windows = np.stack(np.split(held_back[: 16 * (CONTEXT + 1)].astype(np.int32), 16))
    test = functools.partial(nnx.jit(loss_fn), model, jnp.asarray(windows))
    with nnx.Checkpointer(options.out / "checkpoints", save_every=250, keep_last=1) as checkpointer:
        nnx.fit(
            train_step,
            (model, optimizer),
            TextWindows(text[:-50_000], 16, CONTEXT, options.seed),
            steps=options.steps,
            checkpointer=checkpointer,
            evaluate=lambda _: {"test loss": test()},
            evaluate_every=max(1, options.steps // 10),
            log_every=max(1, options.steps // 10),
            loggers=[nnx.TerminalLogger(), nnx.JSONLinesLogger(options.out / "log.jsonl")],
        )
    print(f"test loss: {float(test()):.3f} nats a character (guessing: {np.log(len(vocabulary)):.3f})")
    prompt = "def "
    model.init_cache(1, len(prompt) + options.characters)
    codes = np.array([[vocabulary.index(character) for character in prompt]], np.int32)
    out, rate = generate(model, codes, options.characters, ctx=nnx.context(sample=options.seed))
    print(f"{prompt}{''.join(vocabulary[code] for code in out[0])}\n")
    print(f"{rate:.0f} tokens a second, one at a time")
    _draw(options.out)
    return 0


def _draw(out: Path) -> None:
    import json

    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    figure = new_figure(6, 4)
    axes = figure.subplots()
    for name in ("loss", "test loss"):
        points = [(row["step"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set(xlabel="step", ylabel="nats a character")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    save_figure(figure, out / "report.png")


if __name__ == "__main__":
    sys.exit(main())
