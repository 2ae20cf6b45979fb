"""What users write, under a checker's strictest settings: checked against the built wheels, and never run.

Where an error is due, `type: ignore` with its code stands for it, and a missing error is one.
"""

# mypy: warn-unused-ignores, warn-return-any, disallow-untyped-calls, disallow-untyped-decorators, strict-equality

import dataclasses
import functools
from typing import Any, assert_type

import jax
import jax.numpy as jnp
import optax

import nnx


# Collections of one's own, with the type of their values and without.
class Count(nnx.Variable):
    pass


class Ema(nnx.Variable[jax.Array]):
    pass


class Net(nnx.Module):
    def __init__(self, width: int, *, ctx: nnx.Context) -> None:
        self.layers = [nnx.Linear(width, width, ctx=ctx) for _ in range(2)]
        self.heads = {"a": nnx.Linear(width, 1, ctx=ctx)}
        self.count = Count(0)
        self.average = Ema(jnp.zeros(width))
        self.dropout = nnx.Dropout(0.5)

    def __call__(self, x: jax.Array, *, ctx: nnx.Context | None = None) -> jax.Array:
        self.count += 1
        for layer in self.layers:
            x = self.dropout(nnx.relu(layer(x)), ctx=ctx)
        self.average = 0.9 * self.average + 0.1 * x.mean(0)
        return self.heads["a"](x)


net = Net(4, ctx=nnx.context(0))
x = jnp.ones((2, 4))
assert_type(net(x), jax.Array)
assert_type(net.layers[0].kernel, jax.Array)
assert_type(net.average, jax.Array)
net("x")  # type: ignore[arg-type]


# Transforms as Modules: what makes one takes the arguments of the Module inside.
assert_type(nnx.Stack(nnx.Linear, 3)(4, 4, ctx=nnx.context(0)), nnx.Stack)
assert_type(nnx.Remat(nnx.Linear)(4, 4, ctx=nnx.context(0)), nnx.Remat)
assert_type(nnx.Scan(nnx.Linear, length=3)(4, 4, ctx=nnx.context(0)), nnx.Scan)
nnx.Stack(nnx.Linear, 3)(4, ctx=nnx.context(0))  # type: ignore[call-arg]
nnx.Stack(nnx.Linear)  # type: ignore[call-arg]


# Methods under jit in any class: the instance is an argument like any other, or a static one.
class Trainer:
    def __init__(self, rate: float) -> None:
        self.rate = rate

    @nnx.jit(static_argnums=0)
    def step(self, model: Net, x: jax.Array, *, scale: float = 1.0) -> jax.Array:
        return model(x) * scale * self.rate

    @functools.partial(nnx.jit, static_argnums=0)
    def partially(self, model: Net, x: jax.Array) -> jax.Array:
        return model(x) * self.rate

    @staticmethod
    @nnx.jit
    def static(model: Net, x: jax.Array) -> jax.Array:
        return model(x)

    @staticmethod
    @nnx.jit(donate_argnums=0)
    def donating(model: Net, x: jax.Array) -> jax.Array:
        return model(x)

    @classmethod
    @nnx.jit(static_argnums=0)
    def of_class(cls, model: Net, x: jax.Array) -> jax.Array:
        return model(x)


trainer = Trainer(0.1)
assert_type(trainer.step(net, x, scale=2.0), jax.Array)
trainer.step(x, net)  # type: ignore[arg-type]
trainer.step(net)  # type: ignore[call-arg]
trainer.step.lower(net, x).compile()
assert_type(trainer.static(net, x), jax.Array)
assert_type(Trainer.static(net, x), jax.Array)
trainer.static(net)  # type: ignore[call-arg]
assert_type(trainer.donating(net, x), jax.Array)
assert_type(Trainer.donating(net, x), jax.Array)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Batch:
    images: jax.Array

    @nnx.jit
    def logits(self, model: Net) -> jax.Array:
        return model(self.images)


assert_type(Batch(x).logits(net), jax.Array)
Batch(x).logits()  # type: ignore[call-arg]


# Immutable pytrees.
class Point(nnx.Pytree):
    def __init__(self, x: jax.Array, name: str) -> None:
        self.x, self.name = x, name


point = Point(x, "p")
assert_type(point, Point)
assert_type(point.replace(name="q"), Point)
Point(x)  # type: ignore[call-arg]


# A training step in both styles.
@nnx.jit(donate_argnums=(0, 1), max_traces=1)
def train_step(model: Net, optimizer: nnx.Optimizer, x: jax.Array) -> jax.Array:
    def loss_fn(model: Net) -> jax.Array:
        return model(x).mean()

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    assert_type(loss, jax.Array)
    optimizer.update(model, grads)
    return loss


assert_type(train_step(net, nnx.Optimizer(net, optax.adam(1e-3)), x), jax.Array)
train_step(net, x)  # type: ignore[call-arg]

state = nnx.TrainState.from_module(net, optax.adam(1e-3))
assert_type(state, nnx.TrainState[Net])
assert_type(state.merge(), Net)
assert_type(state.moduledef, nnx.ModuleDef[Net])
assert_type(state.params, nnx.State)


@jax.jit
def functional_step(state: nnx.TrainState[Net], x: jax.Array) -> nnx.TrainState[Net]:
    def loss_fn(params: nnx.State) -> jax.Array:
        y, _ = state.apply(params, "counts")(x)
        return jnp.mean(y)

    return state.apply_gradients(jax.grad(loss_fn)(state.params))


def unparametrised(state: nnx.TrainState, definition: nnx.ModuleDef, blocks: nnx.Sequence) -> Any:
    return state.merge(), definition.merge(state.params), blocks[0]


params, moduledef = net.partition(nnx.Param)
again = nnx.TrainState(moduledef, params=params, tx=optax.sgd(0.1))
assert_type(again.replace(step=jnp.int32(3)).merge(), Net)


# Functions without types stay callable, and what comes of them fits where it is due: a State for a Module. (Overloads
# that say so would make an editor take the argument of every lambda for a Module.)
def untyped(model, x):  # type: ignore[no-untyped-def]
    return model(x).sum()


grads: nnx.State = nnx.grad(untyped)(net, x)
array: jax.Array = nnx.grad(lambda x: x.sum())(x)
of_model: nnx.State = nnx.grad(lambda model: model(x).sum())(net)
value, both = nnx.value_and_grad(lambda model: model(x).sum())(net)
assert_type(nnx.jit(lambda model, x: model(x))(net, x), Any)


class Losses:
    @nnx.value_and_grad(argnums=1, wrt=nnx.PathGlob("heads/**"))
    def loss(self, model: Net, x: jax.Array) -> jax.Array:
        return model(x).sum()


assert_type(Losses().loss(net, x), tuple[jax.Array, Any])
Losses().loss(net)  # type: ignore[call-arg]

# Filters.
selected = net.filter(nnx.All(nnx.Param, nnx.Not(nnx.PathGlob("heads/*"))))
assert_type(selected, nnx.State)
assert_type(net.filter(Count, ...), tuple[nnx.State, ...])
assert_type(net.filter(lambda path, value: path[-1] == "kernel"), nnx.State)
