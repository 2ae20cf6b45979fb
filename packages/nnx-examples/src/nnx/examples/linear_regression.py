"""One linear regression in four styles, side by side: `python -m nnx.examples.linear_regression`.

Functional, lifted, `TrainState` and `Pure`: the same model on the same data, with the same losses. The data are 442
patients, with ten measurements each and how far their diabetes had progressed a year later.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import nnx
from nnx.examples._common import new_figure, options_of, save_figure

__all__ = ["STYLES", "Regression", "load_diabetes", "main"]

LEARNING_RATE = 0.1


class Calls(nnx.Variable):
    """How often a Module was called: state beside the parameters."""


class Regression(nnx.Module):
    """`y = x @ w + b`: [batch, features] to [batch]."""

    calls: Any  # assigned as a Variable, read and written as its value

    def __init__(self, features: int, *, ctx: nnx.Context) -> None:
        self.linear = nnx.Linear(features, 1, ctx=ctx)
        self.calls = Calls(jnp.int32(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Predict."""
        self.calls += 1
        return self.linear(x)[:, 0]


def load_diabetes() -> tuple[np.ndarray, np.ndarray]:
    """The measurements, [442, 10], and the progression, [442], each with mean 0 and variance 1.

    Source: Efron et al., 2004, Least Angle Regression, Annals of Statistics 32(2).
    """
    from sklearn.datasets import load_diabetes as load

    x, y = load(return_X_y=True)
    x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
    return x.astype(np.float32), y.astype(np.float32)


def functional(model: Regression, x: jax.Array, y: jax.Array, steps: int) -> list[float]:
    """The Module is taken apart; the step is a pure function of States under plain `jax.jit`."""
    (params, calls), moduledef = model.partition(nnx.Param, Calls)

    @jax.jit
    def train_step(params: nnx.State, calls: nnx.State) -> tuple[nnx.State, nnx.State, jax.Array]:
        def loss_fn(params: nnx.State) -> tuple[jax.Array, nnx.State]:
            prediction, (state, _) = moduledef.apply(params, calls)(x)
            return jnp.mean((prediction - y) ** 2), state.filter(Calls)

        (loss, changed), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        return jax.tree.map(lambda w, g: w - LEARNING_RATE * g, params, grads), changed, loss

    losses = []
    for _ in range(steps):
        params, calls, loss = train_step(params, calls)
        losses.append(loss)
    model.update_state((params, calls))
    return [float(loss) for loss in losses]


def lifted(model: Regression, x: jax.Array, y: jax.Array, steps: int) -> list[float]:
    """The transforms of nnx take the Module and change it in place."""

    @nnx.jit
    def train_step(model: Regression, x: jax.Array, y: jax.Array) -> jax.Array:
        loss, grads = nnx.value_and_grad(lambda model: jnp.mean((model(x) - y) ** 2), wrt=nnx.Param)(model)
        model.update_state(jax.tree.map(lambda w, g: w - LEARNING_RATE * g, model.filter(nnx.Param), grads))
        return loss

    return [float(loss) for loss in [train_step(model, x, y) for _ in range(steps)]]


def train_state(model: Regression, x: jax.Array, y: jax.Array, steps: int) -> list[float]:
    """A TrainState holds parameters, optimizer and the other States, and is one pytree."""
    (params, calls), moduledef = model.partition(nnx.Param, Calls)
    state = nnx.TrainState(moduledef, params=params, tx=optax.sgd(LEARNING_RATE), calls=calls)

    @jax.jit
    def train_step(state: nnx.TrainState) -> tuple[nnx.TrainState, jax.Array]:
        def loss_fn(params: nnx.State) -> tuple[jax.Array, nnx.State]:
            prediction, (updates, _) = state.apply(params, "calls")(x)
            return jnp.mean((prediction - y) ** 2), updates.filter(Calls)

        (loss, changed), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        return state.apply_gradients(grads, calls=changed), loss

    losses = []
    for _ in range(steps):
        state, loss = train_step(state)
        losses.append(loss)
    model.update_state((state.params, state.calls))
    return [float(loss) for loss in losses]


def pure(model: Regression, x: jax.Array, y: jax.Array, steps: int) -> list[float]:
    """A Pure is the pair of States and definition as one pytree, with the Module's own methods."""
    pure_model = model.partition(nnx.Param, Calls)

    @jax.jit
    def train_step(pure_model: nnx.Pure) -> tuple[nnx.Pure, jax.Array]:
        params, calls = pure_model.states

        def loss_fn(params: nnx.State) -> tuple[jax.Array, nnx.State]:
            prediction, (state, _) = pure_model.moduledef.apply(params, calls)(x)
            return jnp.mean((prediction - y) ** 2), state.filter(Calls)

        (loss, changed), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        params = jax.tree.map(lambda w, g: w - LEARNING_RATE * g, params, grads)
        return pure_model.moduledef.merge(params, changed).partition(nnx.Param, Calls), loss

    losses = []
    for _ in range(steps):
        pure_model, loss = train_step(pure_model)
        losses.append(loss)
    model.update_state(tuple(pure_model.states))
    return [float(loss) for loss in losses]


STYLES: dict[str, Callable[[Regression, jax.Array, jax.Array, int], list[float]]] = {
    "functional": functional,
    "lifted": lifted,
    "TrainState": train_state,
    "Pure": pure,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code."""
    options = options_of(
        "linear_regression", "Fit a linear regression in four styles, which give the same losses.", arguments, steps=100
    )
    x, y = map(jnp.asarray, load_diabetes())
    losses: dict[str, list[float]] = {}
    for name, style in STYLES.items():
        model = Regression(x.shape[1], ctx=nnx.context(options.seed))
        losses[name] = style(model, x, y, options.steps)
        print(f"{name:10}  loss {losses[name][-1]:.6f}  calls {int(model.calls)}")
    with_bias = np.c_[np.asarray(x), np.ones(len(x))]
    residual = np.asarray(y) - with_bias @ np.linalg.lstsq(with_bias, np.asarray(y), rcond=None)[0]
    best = float(np.mean(residual**2))
    print(f"{'by algebra':10}  loss {best:.6f}")
    nnx.save_safetensors(options.out / "model.safetensors", model)
    saved = Regression(x.shape[1], ctx=nnx.context(options.seed + 1))
    nnx.load_safetensors(options.out / "model.safetensors", like=saved)
    figure = new_figure(9, 4)
    curves, fit = figure.subplots(1, 2)
    for width, (name, values) in zip((7, 5, 3, 1), losses.items(), strict=True):
        curves.plot(values, linewidth=width, alpha=0.7, label=name)
    curves.axhline(best, color="black", linestyle="--", linewidth=1, label="least squares")
    curves.set(xlabel="step", ylabel="mean squared error", title="four styles, one curve")
    curves.legend(frameon=False)
    fit.scatter(y, saved(x), s=8, alpha=0.6)
    fit.plot([-2, 2.5], [-2, 2.5], color="black", linewidth=1)
    fit.set(xlabel="progression", ylabel="predicted", title=f"{len(x)} patients")
    save_figure(figure, options.out / "report.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
