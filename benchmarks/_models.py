"""The models that are measured, in raw JAX and in nnx: the same arrays, and the same operations in the same order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import nnx

BATCH = 32
FEATURES = 8
"""The width of a block of the dispatch benchmark: small, so that the time is the call's and not the arithmetic's."""

RawLayer = tuple[jax.Array, jax.Array]
"""Bias and kernel: in the order of a State, as the order of the arguments moves XLA's temporaries by some bytes."""
RawModel = Callable[[list[RawLayer], jax.Array], jax.Array]


class Block(nnx.Module):
    """Linear and LayerNorm: four arrays."""

    def __init__(self, *, ctx: nnx.Context) -> None:
        self.linear = nnx.Linear(FEATURES, FEATURES, ctx=ctx)
        self.norm = nnx.LayerNorm(FEATURES, ctx=ctx)


class Blocks(nnx.Module):
    """A list of blocks."""

    def __init__(self, blocks: int, *, ctx: nnx.Context) -> None:
        self.blocks = [Block(ctx=ctx) for _ in range(blocks)]


def raw_blocks(blocks: int) -> list[jax.Array]:
    """The arrays of `Blocks` as one flat list."""
    model = Blocks(blocks, ctx=nnx.context(0))
    return [jnp.copy(leaf) for leaf in jax.tree.leaves(model.partition()[0])]


class MLP(nnx.Module):
    """Linear layers of one width, each followed by a ReLU."""

    def __init__(self, depth: int, width: int, *, ctx: nnx.Context) -> None:
        self.layers = [nnx.Linear(width, width, ctx=ctx) for _ in range(depth)]

    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the layers."""
        for layer in self.layers:
            x = jax.nn.relu(layer(x))
        return x


class RematMLP(MLP):
    """The same with each layer computed again in the backward pass, by `jax.checkpoint` through the functional API."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the layers."""
        for layer in self.layers:
            state, moduledef = layer.partition()

            def apply(state: Any, x: jax.Array, moduledef: Any = moduledef) -> jax.Array:
                return jax.nn.relu(moduledef.merge(state)(x))

            x = jax.checkpoint(apply)(state, x)
        return x


def raw_mlp(layers: list[RawLayer], x: jax.Array) -> jax.Array:
    """`MLP` by hand."""
    for bias, kernel in layers:
        x = jax.nn.relu(x @ kernel + bias)
    return x


def raw_remat_mlp(layers: list[RawLayer], x: jax.Array) -> jax.Array:
    """`RematMLP` by hand."""

    @jax.checkpoint
    def apply(layer: RawLayer, x: jax.Array) -> jax.Array:
        bias, kernel = layer
        return jax.nn.relu(x @ kernel + bias)

    for layer in layers:
        x = apply(layer, x)
    return x


def raw_layers(depth: int, width: int) -> list[RawLayer]:
    """The arrays of an MLP, layer by layer."""
    model = MLP(depth, width, ctx=nnx.context(0))
    return [(jnp.copy(layer.bias), jnp.copy(layer.kernel)) for layer in model.layers]


def data(width: int, batch: int = BATCH) -> tuple[jax.Array, jax.Array]:
    """Inputs and targets."""
    x, y = jax.random.normal(jax.random.key(1), (2, batch, width))
    return x, y


class Step(NamedTuple):
    """A training step.

    Attributes:
        make: makes the function, a new one each time, so that JAX has not seen it before.
        arguments: what it is first called with, before the data.
    """

    make: Callable[[], Callable[..., Any]]
    arguments: tuple[Any, ...]


def make_tx() -> optax.GradientTransformation:
    """The optimizer of all sides."""
    return optax.adam(1e-3)


def raw_step(depth: int, width: int, model: RawModel = raw_mlp, *, counted: bool = False) -> Step:
    """A training step by hand: `(layers, opt_state, x, y)` gives the new ones and the loss.

    Args:
        depth: the number of layers.
        width: their width.
        model: the forward pass.
        counted: whether the steps are counted too, as an `nnx.Optimizer` does, for where bytes are compared.
    """
    tx = make_tx()
    layers = raw_layers(depth, width)

    def make() -> Callable[..., Any]:
        def loss_fn(layers: list[RawLayer], x: jax.Array, y: jax.Array) -> jax.Array:
            return jnp.mean((model(layers, x) - y) ** 2)

        def step(layers: list[RawLayer], opt_state: Any, x: jax.Array, y: jax.Array) -> Any:
            loss, grads = jax.value_and_grad(loss_fn)(layers, x, y)
            updates, opt_state = tx.update(grads, opt_state, layers)
            return optax.apply_updates(layers, updates), opt_state, loss

        def counted_step(layers: list[RawLayer], opt_state: Any, x: jax.Array, y: jax.Array) -> Any:
            layers, inner, loss = step(layers, opt_state[0], x, y)
            return layers, (inner, opt_state[1] + 1), loss

        return counted_step if counted else step

    opt_state = tx.init(layers)
    return Step(make, (layers, (opt_state, jnp.zeros((), jnp.int32)) if counted else opt_state))


def lifted_step(depth: int, width: int, kind: type[MLP] = MLP) -> Step:
    """The same in the lifted style: `(model, optimizer, x, y)` changes the two in place and gives the loss."""
    model = kind(depth, width, ctx=nnx.context(0))

    def make() -> Callable[..., Any]:
        def step(model: MLP, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> jax.Array:
            def loss_fn(model: MLP) -> jax.Array:
                return jnp.mean((model(x) - y) ** 2)

            loss, grads = nnx.value_and_grad(loss_fn)(model)
            optimizer.update(model, grads)
            return loss

        return step

    return Step(make, (model, nnx.Optimizer(model, make_tx())))


def state_step(depth: int, width: int, kind: type[MLP] = MLP) -> Step:
    """The same through TrainState: `(state, x, y)` gives the new state and the loss."""
    params, moduledef = kind(depth, width, ctx=nnx.context(0)).partition(nnx.Param)

    def make() -> Callable[..., Any]:
        def step(state: nnx.TrainState, x: jax.Array, y: jax.Array) -> Any:
            def loss_fn(params: nnx.State) -> jax.Array:
                prediction, _ = state.apply(params)(x)
                return jnp.mean((prediction - y) ** 2)

            loss, grads = jax.value_and_grad(loss_fn)(state.params)
            return state.apply_gradients(grads), loss

        return step

    return Step(make, (nnx.TrainState(moduledef, params=params, tx=make_tx()),))
