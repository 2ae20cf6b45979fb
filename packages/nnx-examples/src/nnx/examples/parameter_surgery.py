"""A trained backbone, frozen, and a small part that learns: `python -m nnx.examples.parameter_surgery`.

A network learns the digits 0 to 4. Its backbone, read back from a file, gets a new head and LoRA, and these alone learn
5 to 9: no gradient and no optimizer memory for the rest. At last the LoRA is merged into the layers, which changes
nothing.
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

__all__ = ["Backbone", "Classifier", "main"]

Images = tuple[np.ndarray, np.ndarray]


class Backbone(nnx.Module):
    """[batch, 64] pixels to [batch, 128] features."""

    def __init__(self, *, ctx: nnx.Context) -> None:
        self.linear1 = nnx.Linear(64, 128, ctx=ctx)
        self.linear2 = nnx.Linear(128, 128, ctx=ctx)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the backbone."""
        return nnx.relu(self.linear2(nnx.relu(self.linear1(x))))


class Classifier(nnx.Module):
    """A backbone and a head: [batch, 64] pixels to [batch, 5] logits."""

    def __init__(self, backbone: Backbone, *, ctx: nnx.Context) -> None:
        self.backbone = backbone
        self.head = nnx.Linear(128, 5, ctx=ctx)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the network."""
        return self.head(self.backbone(x))


def train(model: Classifier, data: Images, steps: int, seed: int, wrt: object = nnx.Param) -> nnx.Optimizer:
    """Train the part of a model that `wrt` selects."""
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=wrt)

    @nnx.jit(donate_argnums=0)
    def train_step(state: tuple[Classifier, nnx.Optimizer], batch: Images) -> dict[str, jax.Array]:
        model, optimizer = state
        images, labels = batch

        def loss_fn(model: Classifier) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(model(jnp.asarray(images)), labels).mean()

        loss, grads = nnx.value_and_grad(loss_fn, wrt=wrt)(model)
        optimizer.update(model, grads)
        return {"loss": loss}

    nnx.fit(
        train_step,
        (model, optimizer),
        nnx.ArrayLoader(data, 64, seed=seed),
        steps=steps,
        log_every=max(1, steps // 3),
    )
    return optimizer


def accuracy(model: Classifier, data: Images) -> float:
    """The share of images that are read right."""
    return float((model(jnp.asarray(data[0])).argmax(-1) == data[1]).mean())


def sizes(model: Classifier, optimizer: nnx.Optimizer, trained: object) -> str:
    """How many numbers are trained, and how many the optimizer holds."""
    count = sum(leaf.size for leaf in jax.tree.leaves(model.filter(trained)))
    every = sum(leaf.size for leaf in jax.tree.leaves(model.filter(nnx.Param)))
    held = sum(leaf.size for leaf in jax.tree.leaves(optimizer.get_state()))
    return f"{count:,} of {every:,} parameters trained, {held:,} numbers in the optimizer"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code."""
    options = options_of(
        "parameter_surgery",
        "Train a network on the digits 0 to 4, freeze it, and teach it 5 to 9 with LoRA.",
        arguments,
        steps=400,
        rank={"type": int, "default": 4, "help": "of the LoRA (default: %(default)s)"},
    )
    digits = load_digits()
    parts = []
    for first in (0, 5):
        halves = []
        for images, labels in (digits[:2], digits[2:]):
            chosen = (labels >= first) & (labels < first + 5)
            halves.append((images[chosen].reshape(-1, 64), labels[chosen] - first))
        parts.append(halves)
    (low, low_test), (high, high_test) = parts

    ctx = nnx.context(options.seed)
    model = Classifier(Backbone(ctx=ctx), ctx=ctx)
    optimizer = train(model, low, options.steps, options.seed)
    print(f"0 to 4: accuracy {accuracy(model, low_test):.4f}; {sizes(model, optimizer, nnx.Param)}")

    # What a backbone that others have trained comes as: a file.
    nnx.save_safetensors(options.out / "backbone.safetensors", model.backbone)
    model = Classifier(Backbone(ctx=ctx), ctx=ctx)
    nnx.load_safetensors(options.out / "backbone.safetensors", like=model.backbone)
    frozen = jax.tree.map(np.array, model.backbone.get_state())  # a copy: training donates the arrays themselves
    before = accuracy(model, high_test)
    replaced = nnx.apply_lora(model, nnx.PathGlob("backbone/*"), options.rank, ctx=ctx)
    learns = nnx.Any(nnx.LoRAParam, nnx.PathGlob("head/*"))
    optimizer = train(model, high, options.steps, options.seed, wrt=learns)
    after = accuracy(model, high_test)
    print(f"LoRA in {', '.join('/'.join(path) for path in replaced)}")
    print(f"5 to 9: accuracy {before:.4f} -> {after:.4f}; {sizes(model, optimizer, learns)}")
    same = all(np.array_equal(model.get_state()["backbone", *path].value, frozen[path].value) for path in frozen.paths)
    print(f"the frozen parameters are {'as they were' if same else 'changed'}")

    logits = model(jnp.asarray(high_test[0]))
    nnx.lora_merge(model)
    difference = float(jnp.abs(model(jnp.asarray(high_test[0])) - logits).max())
    print(f"merged: logits differ by at most {difference:.1e}")
    _draw(options.out, model, high_test)
    return 0 if same else 1


def _draw(out: Path, model: Classifier, data: Images) -> None:
    images, labels = data
    features = np.asarray(model.backbone(jnp.asarray(images)))
    centred = features - features.mean(0)
    plane = centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T
    figure = new_figure(6, 4.5)
    axes = figure.subplots()
    for digit in range(5):
        axes.scatter(*plane[labels == digit].T, s=12, label=str(digit + 5))
    axes.set(title="features of digits that the backbone was not trained on", xticks=[], yticks=[])
    axes.legend(frameon=False)
    save_figure(figure, out / "report.png")


if __name__ == "__main__":
    sys.exit(main())
