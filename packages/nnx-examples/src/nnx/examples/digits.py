"""Train a convolutional network on real handwritten digits: `python -m nnx.examples.digits`.

The same job stands here in two styles. `Functional` keeps the run in a `TrainState` and uses JAX's own transforms;
`Lifted` keeps it in a Module and an `Optimizer` and uses nnx's. Both give the same numbers.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

import nnx
from nnx.examples._report import Curves, draw_report
from nnx.examples.data import Digits, batch_indices, load_digits
from nnx.train import Interrupt

__all__ = ["STEPS", "ConvNet", "Functional", "Lifted", "Result", "RunError", "main", "run"]

BATCH_SIZE = 64
STEPS = 880  # 40 epochs of 22 steps
CHECKPOINT_EVERY = 110

Array = jax.Array | np.ndarray

MEASURED = ("loss", "accuracy", "test_step", "test_loss", "test_accuracy")

TRAINING = {"deterministic": False, "use_running_average": False}
TESTING = {"deterministic": True, "use_running_average": True}


class RunError(ValueError):
    """What was asked for does not go together with what is in the output directory."""


class ConvNet(nnx.Module):
    """Two convolutions and two dense layers: [batch, 8, 8, 1] images to [batch, 10] logits."""

    def __init__(self, *, ctx: nnx.Context) -> None:
        self.conv1 = nnx.Conv(1, 48, (3, 3), use_bias=False, ctx=ctx)
        self.norm1 = nnx.BatchNorm(48, momentum=0.9, ctx=ctx)
        self.conv2 = nnx.Conv(48, 96, (3, 3), use_bias=False, ctx=ctx)
        self.norm2 = nnx.BatchNorm(96, momentum=0.9, ctx=ctx)
        self.hidden = nnx.Linear(2 * 2 * 96, 128, ctx=ctx)
        self.dropout = nnx.Dropout(0.4)
        self.logits = nnx.Linear(128, 10, ctx=ctx)

    def __call__(self, x: jax.Array, *, ctx: nnx.Context) -> jax.Array:
        """Apply the network; the flags of `ctx` say whether it is training."""
        x = nnx.max_pool(nnx.relu(self.norm1(self.conv1(x), ctx=ctx)), (2, 2), (2, 2))
        x = nnx.max_pool(nnx.relu(self.norm2(self.conv2(x), ctx=ctx)), (2, 2), (2, 2))
        x = nnx.relu(self.hidden(x.reshape(x.shape[0], -1)))
        return self.logits(self.dropout(x, ctx=ctx))


@functools.cache  # compared by identity: another one would compile the steps anew
def make_optimizer() -> optax.GradientTransformation:
    """Adam, warmed up and then cooled down along a cosine.

    The schedule does not depend on how many steps are run, so a run that is cut short and resumed ends where one that
    was not ends; steps past `STEPS` go on at the last rate.
    """
    return optax.adam(optax.warmup_cosine_decay_schedule(0.0, 3e-3, STEPS // 20, STEPS, 3e-5))


def shift(images: Array, key: jax.Array) -> jax.Array:
    """Move half of the images by up to one pixel either way, so that the network learns shapes and not places.

    Not all of them: the test images are centred, and there were twice as many mistakes when none of the others was.
    """
    which, where = jax.random.split(key)
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    moved = jax.random.bernoulli(which, 0.5, (images.shape[0], 1))
    offsets = jnp.where(moved, jax.random.randint(where, (images.shape[0], 2), 0, 3), 1)
    return jax.vmap(lambda image, offset: jax.lax.dynamic_slice(image, (*offset, 0), images.shape[1:]))(padded, offsets)


def training_context(seed_key: jax.Array, step: jax.Array) -> nnx.Context:
    """The randomness of one step, which depends on the seed and the step alone."""
    key = jax.random.fold_in(seed_key, step)
    return nnx.context(dropout=key, shift=key, flags=TRAINING)


def cross_entropy(logits: jax.Array, labels: Array) -> jax.Array:
    """The mean loss of a batch, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def batch_metrics(loss: jax.Array, logits: jax.Array, labels: Array) -> dict[str, jax.Array]:
    """What is recorded of a step."""
    return {"loss": loss, "accuracy": (logits.argmax(-1) == labels).mean()}


class Trainer(Protocol):
    """What the loop needs of either style."""

    checkpointed: Any

    def train_step(self, images: np.ndarray, labels: np.ndarray) -> dict[str, jax.Array]:
        """Take one step and return its metrics."""

    def predict(self, images: np.ndarray) -> jax.Array:
        """The logits of images, [n, 10]."""

    def parameters(self) -> nnx.State:
        """All the arrays of the model."""


class Functional:
    """The run as a value: a TrainState goes into `jax.jit` and comes out."""

    def __init__(self, seed: int) -> None:
        self.seed_key = jax.random.key(seed)
        model = ConvNet(ctx=nnx.context(seed))
        (params, batch_stats), moduledef = model.partition(nnx.Param, nnx.BatchStat)
        self.checkpointed = nnx.TrainState(moduledef, params=params, tx=make_optimizer(), batch_stats=batch_stats)

    def train_step(self, images: np.ndarray, labels: np.ndarray) -> dict[str, jax.Array]:
        """Take one step and return its metrics."""
        self.checkpointed, metrics = self._train_step(self.checkpointed, self.seed_key, images, labels)
        return metrics

    @staticmethod
    @functools.partial(jax.jit, donate_argnums=0)
    def _train_step(
        state: nnx.TrainState, seed_key: jax.Array, images: Array, labels: Array
    ) -> tuple[nnx.TrainState, dict[str, jax.Array]]:
        def loss_fn(params: nnx.State) -> tuple[jax.Array, tuple[jax.Array, nnx.State]]:
            ctx = training_context(seed_key, state.step)
            shifted = shift(images, ctx.make_rng("shift"))
            logits, (updates, _) = state.apply(params, "batch_stats")(shifted, ctx=ctx)
            return cross_entropy(logits, labels), (logits, updates.filter(nnx.BatchStat))

        (loss, (logits, batch_stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        state = state.apply_gradients(grads, batch_stats=batch_stats)
        return state, batch_metrics(loss, logits, labels)

    def predict(self, images: np.ndarray) -> jax.Array:
        """The logits of images, [n, 10]."""
        return self._predict(self.checkpointed, images)

    @staticmethod
    @jax.jit
    def _predict(state: nnx.TrainState, images: Array) -> jax.Array:
        logits, _ = state.apply("params", "batch_stats")(images, ctx=nnx.context(flags=TESTING))
        return logits

    def parameters(self) -> nnx.State:
        """All the arrays of the model."""
        return self.checkpointed.params | self.checkpointed.batch_stats


class Lifted:
    """The run as objects: `nnx.jit` carries what changes inside out to the Module and its Optimizer."""

    def __init__(self, seed: int) -> None:
        self.seed_key = jax.random.key(seed)
        self.model = ConvNet(ctx=nnx.context(seed))
        self.optimizer = nnx.Optimizer(self.model, make_optimizer())
        self.checkpointed = {"model": self.model, "optimizer": self.optimizer}

    def train_step(self, images: np.ndarray, labels: np.ndarray) -> dict[str, jax.Array]:
        """Take one step and return its metrics."""
        return self._train_step(self.model, self.optimizer, self.seed_key, images, labels)

    @staticmethod
    @nnx.jit
    def _train_step(
        model: ConvNet, optimizer: nnx.Optimizer, seed_key: jax.Array, images: Array, labels: Array
    ) -> dict[str, jax.Array]:
        def loss_fn(model: ConvNet) -> tuple[jax.Array, jax.Array]:
            ctx = training_context(seed_key, optimizer.step)
            logits = model(shift(images, ctx.make_rng("shift")), ctx=ctx)
            return cross_entropy(logits, labels), logits

        (loss, logits), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
        optimizer.update(model, grads)
        return batch_metrics(loss, logits, labels)

    def predict(self, images: np.ndarray) -> jax.Array:
        """The logits of images, [n, 10]."""
        return self._predict(self.model, images)

    @staticmethod
    @nnx.jit
    def _predict(model: ConvNet, images: Array) -> jax.Array:
        return model(jnp.asarray(images), ctx=nnx.context(flags=TESTING))

    def parameters(self) -> nnx.State:
        """All the arrays of the model."""
        return self.model.partition()[0]


STYLES: dict[str, Callable[[int], Trainer]] = {"functional": Functional, "lifted": Lifted}


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        step: the last step taken.
        accuracy: on the test images; None if the run was interrupted.
        history: what was measured: by step `loss` and `accuracy`; by epoch `test_step`, `test_loss`, `test_accuracy`.
        parameters: all the arrays of the model.
        signal: the number of the signal that interrupted the run, or None.
    """

    step: int
    accuracy: float | None
    history: dict[str, list[float]]
    parameters: nnx.State
    signal: int | None = None


def run(
    out: str | Path = "runs/digits",
    *,
    steps: int = STEPS,
    seed: int | None = None,
    style: str | None = None,
    resume: bool = False,
) -> Result:
    """Train, or go on training, and write the report.

    Args:
        out: the directory of checkpoints and report.
        steps: how many steps the whole run has.
        seed: of parameters, dropout, augmentation and the order of the data; None for 0, or that of the resumed run.
        style: `"functional"` or `"lifted"`; None for the first, or that of the resumed run.
        resume: whether to go on from the newest checkpoint in `out`.

    Raises:
        RunError: `out` holds another run, or nothing to resume, or one that has more steps already.
    """
    if steps < 1:
        raise RunError(f"--steps must be at least 1, got {steps}")
    if seed is not None and seed < 0:
        raise RunError(f"--seed must not be negative, got {seed}")
    if style not in (*STYLES, None):
        raise RunError(f"--style must be one of {', '.join(STYLES)}, got {style}")
    out = Path(out)
    config = _settle_config(out, {"seed": seed, "style": style}, resume=resume)
    data = load_digits()
    trainer = STYLES[config["style"]](config["seed"])
    with nnx.Checkpointer(out / "checkpoints", save_every=CHECKPOINT_EVERY, keep_last=2) as checkpointer:
        step = 0
        history: dict[str, list[float]] = {name: [] for name in MEASURED}
        if resume:
            restored = checkpointer.restore(like=trainer.checkpointed)
            trainer.checkpointed, step, history = restored.value, restored.step, restored.extra["history"]
            if step > steps:
                raise RunError(f"the run in {out} is at step {step} already: --steps {steps} is less")
            print(f"resumed at step {step} of {steps}")
        with Interrupt() as interrupt:
            step = _train(
                trainer, data, checkpointer, interrupt, step=step, steps=steps, seed=config["seed"], history=history
            )
            checkpointer.save(step, trainer.checkpointed, extra={"history": history}, force=True)
            checkpointer.wait()
    if step < steps:
        return Result(step, None, history, trainer.parameters(), interrupt.signal)
    accuracy = _report(out, trainer, data, history, step, config)
    return Result(step, accuracy, history, trainer.parameters())


def _train(
    trainer: Trainer,
    data: Digits,
    checkpointer: nnx.Checkpointer,
    interrupt: Interrupt,
    *,
    step: int,
    steps: int,
    seed: int,
    history: dict[str, list[float]],
) -> int:
    from tqdm import tqdm

    size = len(data.train_labels)
    per_epoch = size // BATCH_SIZE
    pending: list[dict[str, jax.Array]] = []

    def collect() -> None:
        # The only place where the host waits for the device: to read a number at each step would stall both.
        for metrics in jax.device_get(pending):
            for name, value in metrics.items():
                history[name].append(float(value))
        pending.clear()

    # `disable=None`: no bar where the output is no terminal.
    with tqdm(total=steps, initial=step, unit="step", disable=None, dynamic_ncols=True) as bar:
        while step < steps and interrupt.signal is None:
            batch = batch_indices(step, size=size, batch_size=BATCH_SIZE, seed=seed)
            pending.append(trainer.train_step(data.train_images[batch], data.train_labels[batch]))
            step += 1
            if step % per_epoch == 0:
                collect()
                loss, accuracy = _evaluate(trainer, data)[1:]
                history["test_step"].append(step)
                history["test_loss"].append(loss)
                history["test_accuracy"].append(accuracy)
                bar.set_postfix(
                    {"loss": f"{history['loss'][-1]:.4f}", "test accuracy": f"{accuracy:.4f}"}, refresh=False
                )
            if checkpointer.should_save(step):
                collect()
                checkpointer.save(step, trainer.checkpointed, extra={"history": history})
            bar.update()
    collect()
    return step


def _evaluate(trainer: Trainer, data: Digits) -> tuple[np.ndarray, float, float]:
    """Logits, loss and accuracy of the test images."""
    logits = np.asarray(trainer.predict(data.test_images))
    loss = float(cross_entropy(jnp.asarray(logits), jnp.asarray(data.test_labels)))
    return logits, loss, float((logits.argmax(-1) == data.test_labels).mean())


def _report(
    out: Path, trainer: Trainer, data: Digits, history: dict[str, list[float]], step: int, config: dict[str, Any]
) -> float:
    logits, loss, accuracy = _evaluate(trainer, data)
    per_epoch = len(data.train_labels) // BATCH_SIZE
    ends = [*range(per_epoch, step + 1, per_epoch)]
    if not ends or ends[-1] != step:
        ends.append(step)
    epochs = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    last = [] if history["test_step"][-1:] == [step] else [(step, loss, accuracy)]
    test = [*zip(history["test_step"], history["test_loss"], history["test_accuracy"], strict=True), *last]
    curves = Curves(
        ends,
        [float(np.mean(history["loss"][epoch])) for epoch in epochs],
        [float(np.mean(history["accuracy"][epoch])) for epoch in epochs],
        *zip(*test, strict=True),
    )
    draw_report(
        out / "report.png",
        title=f"test accuracy {accuracy:.4f} at step {step} ({config['style']} style, seed {config['seed']})",
        curves=curves,
        images=data.test_images,
        labels=data.test_labels,
        logits=logits,
    )
    return accuracy


def _settle_config(out: Path, asked: dict[str, Any], *, resume: bool) -> dict[str, Any]:
    """Decide what is run in `out`, and refuse to mix up two runs."""
    file = out / "config.json"
    found: Any = json.loads(file.read_text()) if file.exists() else None
    checkpoints = out / "checkpoints"
    steps = (
        sorted(int(entry.name) for entry in checkpoints.iterdir() if entry.name.isdigit())
        if checkpoints.is_dir()
        else []
    )
    if resume and (found is None or not steps):
        raise RunError(
            f"there is nothing to resume in {out}: it holds no checkpoint. Leave out --resume to start a run there"
        )
    if out.exists() and not out.is_dir():
        raise RunError(f"--out {out} is a file, not a directory")
    defaults = found if resume else {"seed": 0, "style": "functional"}
    config = {name: defaults[name] if value is None else value for name, value in asked.items()}
    if steps and found != config:
        what = "a run that it knows nothing of" if found is None else ", ".join(f"--{n} {v}" for n, v in found.items())
        raise RunError(
            f"{out} holds the checkpoints of another run ({what}; at step {steps[-1]}). "
            + ("Resume it with its own options" if resume else "Choose another --out, or delete them")
        )
    if steps and not resume:
        print(f"starting over in {out}, which held the same run at step {steps[-1]} (--resume goes on with it)")
        shutil.rmtree(checkpoints)
    out.mkdir(parents=True, exist_ok=True)
    if not resume:
        # By rename, so that a kill in between leaves a whole file.
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(config) + "\n")
        partial.replace(file)
    return config


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code: 0, or 128 and the signal's number if it was interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m nnx.examples.digits",
        description="Train a convolutional network on scikit-learn's 1,797 handwritten digits, and write a report. "
        "Ctrl-C saves a checkpoint and ends; --resume goes on as if nothing had happened.",
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of the whole run (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="of all randomness (default: 0, or the resumed run's)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/digits"), help="where everything is kept (default: %(default)s)"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    parser.add_argument(
        "--style",
        choices=list(STYLES),
        help="TrainState and jax.jit, or Module and nnx.jit (default: functional, or the resumed run's)",
    )
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    try:
        result = run(options.out, steps=options.steps, seed=options.seed, style=options.style, resume=options.resume)
    except RunError as error:
        parser.error(str(error))
    if result.signal is not None and result.accuracy is None:
        print(f"interrupted: saved at step {result.step} in {options.out}. The same command with --resume goes on")
        return 128 + result.signal
    print(f"test accuracy: {result.accuracy:.4f}")
    print(f"report: {options.out / 'report.png'} ({time.perf_counter() - start:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
