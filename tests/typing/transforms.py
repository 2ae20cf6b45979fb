"""Functions and methods keep their signatures under the transforms: checked against the built wheels, and never run.

Where an error is due, `type: ignore` with its code stands for it, and a missing error is one.
"""

# mypy: warn-unused-ignores

from typing import Any, assert_type

import jax
import jax.numpy as jnp

import nnx


class Model(nnx.Module):
    def __init__(self, width: int, *, ctx: nnx.Context) -> None:
        self.linear = nnx.Linear(width, width, ctx=ctx)

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        return self.linear(x)

    @nnx.jit
    def compiled(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        return self(x, train=train)

    @nnx.jit(static_argnames="train", max_traces=2)
    def compiled_with(self, x: jax.Array, *, train: bool) -> jax.Array:
        return self(x, train=train)

    @nnx.remat
    def checkpointed(self, x: jax.Array) -> jax.Array:
        return self(x)

    @nnx.remat(prevent_cse=False)
    def configured(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        return self(x, train=train)

    @nnx.vmap(in_axes=(None, 0))
    def each(self, x: jax.Array) -> jax.Array:
        return self(x)

    @nnx.scan(in_axes=(None, nnx.Carry, 0))
    def along(self, carry: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return carry + x, self(x)


model = Model(4, ctx=nnx.context(0))
x = jnp.ones((2, 4))

# Methods.
assert_type(model.compiled(x, train=True), jax.Array)
model.compiled("x")  # type: ignore[arg-type]
model.compiled(x, True)  # type: ignore[call-arg]
assert_type(model.compiled_with(x, train=True), jax.Array)
model.compiled_with(x)  # type: ignore[call-arg]
assert_type(Model.compiled(model, x), jax.Array)
model.compiled.lower(x).compile()
model.compiled.lower()  # type: ignore[call-arg]
assert_type(model.checkpointed(x), jax.Array)
model.checkpointed()  # type: ignore[call-arg]
assert_type(model.configured(x, train=True), jax.Array)
model.configured(x, train="yes")  # type: ignore[arg-type]
assert_type(model.each(x), jax.Array)
model.each("x")  # type: ignore[arg-type]
assert_type(model.along(x, x), tuple[jax.Array, jax.Array])
model.along(x)  # type: ignore[call-arg]


def loss(model: Model, x: jax.Array, *, scale: float = 1.0) -> jax.Array:
    return model(x).sum() * scale


def loss_and_logits(model: Model, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    logits = model(x)
    return logits.sum(), {"logits": logits}


# Derivatives: what comes out depends on what goes in, and is a State for a Module.
gradient: nnx.State = nnx.grad(loss)(model, x, scale=2.0)
nnx.grad(loss)(model)  # type: ignore[call-arg]
nnx.grad(loss, wrt=nnx.Param)(model, "x")  # type: ignore[arg-type]
nnx.grad(loss, wrong=nnx.Param)  # type: ignore[call-overload]
_, aux = nnx.grad(loss_and_logits, has_aux=True)(model, x)
assert_type(aux, dict[str, jax.Array])
assert_type(nnx.value_and_grad(loss)(model, x), tuple[jax.Array, Any])
assert_type(
    nnx.value_and_grad(loss_and_logits, has_aux=True)(model, x), tuple[tuple[jax.Array, dict[str, jax.Array]], Any]
)
nnx.value_and_grad(loss)(model)  # type: ignore[call-arg]
nnx.hessian(loss)(model)  # type: ignore[call-arg]
nnx.jacrev(loss, argnums=1)("model", x)  # type: ignore[arg-type]


@nnx.value_and_grad(wrt=nnx.PathGlob("linear/**"))
def decorated(model: Model, x: jax.Array) -> jax.Array:
    return loss(model, x)


assert_type(decorated(model, x), tuple[jax.Array, Any])
decorated(x, model)  # type: ignore[arg-type]

# Maps, loops and branches.
assert_type(nnx.vmap(loss, in_axes=(None, 0))(model, x), jax.Array)
nnx.vmap(loss)(model, x, scale="x")  # type: ignore[arg-type]
assert_type(nnx.vmap(Model, in_axes=None, axis_size=3)(4, ctx=nnx.context(0)), Model)
assert_type(nnx.scan(Model, in_axes=None, length=3)(4, ctx=nnx.context(0)), Model)
nnx.scan(Model, length=3)(4)  # type: ignore[call-arg]
assert_type(nnx.cond(True, loss, loss, model, x), jax.Array)
assert_type(nnx.switch(1, [loss, loss], model, x), jax.Array)
assert_type(nnx.while_loop(lambda v: v[1] < 3, lambda v: (v[0], v[1] + 1), (model, 0)), tuple[Model, int])
assert_type(nnx.fori_loop(0, 3, lambda i, v: jnp.multiply(v, i), x), jax.Array)
assert_type(nnx.remat(loss)(model, x), jax.Array)
nnx.remat(loss, policy=jax.checkpoint_policies.dots_saveable)(model)  # type: ignore[call-arg]


@nnx.custom_vjp
def clipped(model: Model, x: jax.Array) -> jax.Array:
    return model(x)


assert_type(clipped(model, x), jax.Array)
clipped(model)  # type: ignore[call-arg]

# Without running.
assert_type(nnx.eval_shape(Model, 4, ctx=nnx.context(0)), Model)
assert_type(nnx.eval_shape(lambda: model), Model)
error, logits = nnx.checkify(loss)(model, x)
error.throw()
assert_type(logits, jax.Array)

# Compiled functions, also with options and ahead of time.


@nnx.jit(static_argnames="train", donate_argnums=0)
def step(model: Model, x: jax.Array, *, train: bool) -> tuple[Model, jax.Array]:
    return model, model(x, train=train)


assert_type(step(model, x, train=True), tuple[Model, jax.Array])
step(model, x)  # type: ignore[call-arg]
step.lower(model, x, train=False).compile()
step.lower(model)  # type: ignore[call-arg]


class Trainer:
    @staticmethod
    @nnx.jit
    def step(model: Model, x: jax.Array) -> jax.Array:
        return model(x)


assert_type(Trainer().step(model, x), jax.Array)
assert_type(nnx.jit(model)(x, train=True), jax.Array)
nnx.jit(model)(x, train="yes")  # type: ignore[arg-type]
