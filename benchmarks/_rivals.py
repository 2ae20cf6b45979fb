"""The same models in flax.nnx and in equinox, each written as its own documentation does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from flax import nnx as flax_nnx

from benchmarks._measure import Side
from benchmarks._models import FEATURES, Step, data, make_tx

FLAX = "flax.nnx"
FLAX_TREE = "flax.nnx, tree mode"
FLAX_CACHED = "flax.nnx, cached_partial"
EQUINOX = "equinox"

TREE = {"graph": False, "graph_updates": False}
"""The options of flax's tree mode, which gives up shared references."""


class FlaxBlock(flax_nnx.Module):
    """Linear and LayerNorm: four arrays."""

    def __init__(self, rngs: flax_nnx.Rngs) -> None:
        self.linear = flax_nnx.Linear(FEATURES, FEATURES, rngs=rngs)
        self.norm = flax_nnx.LayerNorm(FEATURES, rngs=rngs)


class FlaxBlocks(flax_nnx.Module):
    """A list of blocks."""

    def __init__(self, blocks: int) -> None:
        rngs = flax_nnx.Rngs(0)
        self.blocks = flax_nnx.List([FlaxBlock(rngs) for _ in range(blocks)])


class EquinoxBlock(eqx.Module):
    """Linear and LayerNorm: four arrays."""

    linear: eqx.nn.Linear
    norm: eqx.nn.LayerNorm

    def __init__(self, key: jax.Array) -> None:
        self.linear = eqx.nn.Linear(FEATURES, FEATURES, key=key)
        self.norm = eqx.nn.LayerNorm(FEATURES)


class FlaxMLP(flax_nnx.Module):
    """Linear layers of one width, each followed by a ReLU."""

    def __init__(self, depth: int, width: int) -> None:
        rngs = flax_nnx.Rngs(0)
        self.layers = flax_nnx.List([flax_nnx.Linear(width, width, rngs=rngs) for _ in range(depth)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the layers."""
        for layer in self.layers:
            x = jax.nn.relu(layer(x))
        return x


class EquinoxMLP(eqx.Module):
    """Linear layers of one width, each followed by a ReLU."""

    layers: list[eqx.nn.Linear]

    def __init__(self, depth: int, width: int) -> None:
        keys = jax.random.split(jax.random.key(0), depth)
        self.layers = [eqx.nn.Linear(width, width, key=key) for key in keys]

    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the layers to one example."""
        for layer in self.layers:
            x = jax.nn.relu(layer(x))
        return x


def _flax_update(model: FlaxBlocks, x: jax.Array) -> jax.Array:
    for block in model.blocks:
        for variable in (block.linear.kernel, block.linear.bias, block.norm.scale, block.norm.bias):
            variable[...] = variable[...] + 1
    return x + 1


def read_sides(blocks: int, x: Any, use: Callable[[Any], jax.Array]) -> dict[str, Side]:
    """Calls that read the model and change nothing; `use` makes the output from the other argument."""

    def read(model: Any, x: Any) -> jax.Array:
        return use(x)

    model = FlaxBlocks(blocks)
    default = flax_nnx.jit(read)
    tree = flax_nnx.jit(read, **TREE)
    cached = flax_nnx.cached_partial(flax_nnx.jit(read), FlaxBlocks(blocks))
    module = [EquinoxBlock(key) for key in jax.random.split(jax.random.key(0), blocks)]
    filtered = eqx.filter_jit(read)
    return {
        FLAX: lambda: default(model, x),
        FLAX_TREE: lambda: tree(model, x),
        FLAX_CACHED: lambda: cached(x),
        EQUINOX: lambda: filtered(module, x),
    }


def update_sides(blocks: int, x: jax.Array) -> dict[str, Side]:
    """Calls that write every array."""
    models = FlaxBlocks(blocks), FlaxBlocks(blocks)
    default = flax_nnx.jit(_flax_update)
    tree = flax_nnx.jit(_flax_update, **TREE)
    cached = flax_nnx.cached_partial(flax_nnx.jit(_flax_update), FlaxBlocks(blocks))
    module = [EquinoxBlock(key) for key in jax.random.split(jax.random.key(0), blocks)]

    @eqx.filter_jit
    def update(module: Any, x: jax.Array) -> Any:
        return jax.tree.map(lambda leaf: leaf + 1, module), x + 1

    def equinox_side() -> jax.Array:
        nonlocal module
        module, out = update(module, x)
        return out

    return {
        FLAX: lambda: default(models[0], x),
        FLAX_TREE: lambda: tree(models[1], x),
        FLAX_CACHED: lambda: cached(x),
        EQUINOX: equinox_side,
    }


def flax_step(depth: int, width: int, options: dict[str, bool]) -> Step:
    """A training step of flax.nnx: `(model, optimizer, x, y)` changes the two in place and gives the loss."""
    model = FlaxMLP(depth, width)

    def make() -> Callable[..., Any]:
        def step(model: FlaxMLP, optimizer: flax_nnx.Optimizer, x: jax.Array, y: jax.Array) -> jax.Array:
            def loss_fn(model: FlaxMLP) -> jax.Array:
                return jnp.mean((model(x) - y) ** 2)

            loss, grads = flax_nnx.value_and_grad(loss_fn, **options)(model)
            optimizer.update(model, grads)
            return loss

        return step

    return Step(make, (model, flax_nnx.Optimizer(model, make_tx(), wrt=flax_nnx.Param)))


def equinox_step(depth: int, width: int) -> Step:
    """A training step of equinox: `(batch, model, opt_state)` gives the new ones and the loss."""
    tx = make_tx()
    model = EquinoxMLP(depth, width)

    def make() -> Callable[..., Any]:
        def step(batch: tuple[jax.Array, jax.Array], model: EquinoxMLP, opt_state: optax.OptState) -> Any:
            x, y = batch

            @eqx.filter_value_and_grad
            def loss_fn(model: EquinoxMLP) -> jax.Array:
                return jnp.mean((jax.vmap(model)(x) - y) ** 2)

            loss, grads = loss_fn(model)
            updates, opt_state = tx.update(grads, opt_state, eqx.filter(model, eqx.is_array))
            return eqx.apply_updates(model, updates), opt_state, loss

        return step

    return Step(make, (model, tx.init(eqx.filter(model, eqx.is_array))))


def train_sides(depth: int, width: int, *, donate: bool) -> dict[str, Side]:
    """Compiled training steps."""
    x, y = batch = data(width)
    numbers: dict[str, Any] = {"donate_argnums": (0, 1)} if donate else {}
    sides: dict[str, Side] = {}
    for name, options in ((FLAX, {}), (FLAX_TREE, TREE)):
        make, arguments = flax_step(depth, width, options)
        sides[name] = functools.partial(flax_nnx.jit(make(), **numbers, **options), *arguments, x, y)
    make, arguments = flax_step(depth, width, {})
    sides[FLAX_CACHED] = functools.partial(flax_nnx.cached_partial(flax_nnx.jit(make(), **numbers), *arguments), x, y)
    make, (model, opt_state) = equinox_step(depth, width)
    filtered = eqx.filter_jit(make(), donate="all-except-first" if donate else "none")

    def equinox_side() -> jax.Array:
        nonlocal model, opt_state
        model, opt_state, loss = filtered(batch, model, opt_state)
        return loss

    return {**sides, EQUINOX: equinox_side}


def lower_sides(depth: int, width: int) -> dict[str, Side]:
    """Tracing and lowering of training steps."""
    x, y = batch = data(width)
    flax, tree, equinox = (flax_step(depth, width, {}), flax_step(depth, width, TREE), equinox_step(depth, width))
    return {
        FLAX: lambda: _nothing(flax_nnx.jit(flax.make()).lower(*flax.arguments, x, y)),
        FLAX_TREE: lambda: _nothing(flax_nnx.jit(tree.make(), **TREE).lower(*tree.arguments, x, y)),
        EQUINOX: lambda: _nothing(eqx.filter_jit(equinox.make()).lower(batch, *equinox.arguments)),
    }


def _nothing(_: object) -> None:
    """Drop a result that is not to be waited for."""


class FlaxHolder(flax_nnx.Module):
    """A Variable and a plain attribute."""

    def __init__(self) -> None:
        self.kernel = flax_nnx.Param(jnp.ones(3))
        self.rate = 0.5


class EquinoxHolder(eqx.Module):
    """An array and a plain attribute."""

    kernel: jax.Array
    rate: float


def make_mlps(depth: int, width: int) -> dict[str, Side]:
    """Construction of a model of `depth` Linear layers."""
    return {FLAX: lambda: _nothing(FlaxMLP(depth, width)), EQUINOX: lambda: _nothing(EquinoxMLP(depth, width))}


def flax_layer(
    make: Callable[[Any, Any], Any], call: Callable[..., Any], *, draws: bool
) -> tuple[Any, Any, Callable[..., Any]]:
    """The parameters of a layer, its random streams, and what they and the input give: output, statistics, streams."""
    graphdef, params, rest = flax_nnx.split(make(flax_nnx, flax_nnx.Rngs(0)), flax_nnx.Param, ...)
    streamsdef, streams = flax_nnx.split(flax_nnx.Rngs(dropout=1) if draws else flax_nnx.Rngs())

    def run(params: Any, streams: Any, x: jax.Array) -> Any:
        module = flax_nnx.merge(graphdef, params, rest, copy=True)
        rngs = flax_nnx.merge(streamsdef, streams, copy=True)
        out = call(module, x, **({"rngs": rngs} if draws else {}))
        return out, (flax_nnx.state(module, flax_nnx.BatchStat), flax_nnx.state(rngs))

    return params, streams, run


class FlaxDecoderBlock(flax_nnx.Module):
    """Attention and an MLP, each after a norm."""

    def __init__(self, width: int, heads: int, rngs: flax_nnx.Rngs) -> None:
        self.norm1 = flax_nnx.LayerNorm(width, rngs=rngs)
        self.attention = flax_nnx.MultiHeadAttention(num_heads=heads, in_features=width, decode=True, rngs=rngs)
        self.norm2 = flax_nnx.LayerNorm(width, rngs=rngs)
        self.up = flax_nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = flax_nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the block to the next token of each row."""
        x = x + self.attention(self.norm1(x))
        return x + self.down(jax.nn.gelu(self.up(self.norm2(x))))


class FlaxDecoder(flax_nnx.Module):
    """A decoder that gives the next token."""

    def __init__(self, layers: int, width: int, heads: int, vocabulary: int) -> None:
        rngs = flax_nnx.Rngs(0)
        self.embed = flax_nnx.Embed(vocabulary, width, rngs=rngs)
        self.blocks = flax_nnx.List([FlaxDecoderBlock(width, heads, rngs) for _ in range(layers)])

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """The likeliest token after each row, [batch, 1]."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return jnp.argmax(self.embed.attend(x), axis=-1)


def decode_sides(batch: int) -> dict[str, Side]:
    """Decoding of one token for each row."""
    from benchmarks.decode import HEADS, LAYERS, ROOM, VOCABULARY, WIDTH

    def call(model: FlaxDecoder, tokens: jax.Array) -> jax.Array:
        return model(tokens)

    def made() -> FlaxDecoder:
        model = FlaxDecoder(LAYERS, WIDTH, HEADS, VOCABULARY)
        for block in model.blocks:
            block.attention.init_cache((batch, ROOM, WIDTH))
        return model

    def side(step: Callable[[jax.Array], jax.Array], model: FlaxDecoder) -> Side:
        tokens = jnp.zeros((batch, 1), jnp.int32)
        count = 0

        def run() -> jax.Array:
            nonlocal tokens, count
            if count % ROOM == 0:
                for block in model.blocks:
                    index = block.attention.cache_index
                    index[...] = jnp.zeros_like(index[...])
            count += 1
            tokens = step(tokens)
            return tokens

        return run

    model, kept = made(), made()
    default = flax_nnx.jit(call)
    cached = flax_nnx.cached_partial(flax_nnx.jit(call), kept)
    return {FLAX: side(lambda tokens: default(model, tokens), model), FLAX_CACHED: side(cached, kept)}
