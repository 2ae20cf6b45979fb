"""What a type checker knows of users' code: checked by `hatch run check` against the built wheels, and never run.

Where an error is due, `type: ignore` with its code stands for it, and a missing error is one.
"""

# mypy: warn-unused-ignores

from typing import assert_type

import jax
import optax

import nnx


class Model(nnx.Module):
    def __init__(self, *, ctx: nnx.Context) -> None:
        self.linear = nnx.Linear(2, 3, ctx=ctx)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear(x)


# The names of every installed package are in `nnx`, with their types; a misspelt one is an error.
model = Model(ctx=nnx.context(0))
assert_type(model.linear, nnx.layers.Linear)
assert_type(nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param), nnx.train.Optimizer)
nnx.Linaer  # type: ignore[attr-defined]


# A compiled function keeps its signature.
@nnx.jit
def forward(model: Model, x: jax.Array, *, scale: float = 1.0) -> jax.Array:
    return model(x) * scale


assert_type(forward(model, jax.numpy.ones((4, 2)), scale=2.0), jax.Array)
forward(model)  # type: ignore[call-arg]
forward(model, "x")  # type: ignore[arg-type]
