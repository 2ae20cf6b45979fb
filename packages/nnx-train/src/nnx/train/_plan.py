"""What a training step takes of each chip: memory and communication, from shapes and rules alone."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnx.core import Context, Module, Param, ShardingError, context, eval_shape, get_named_sharding
from nnx.core._sharding import Annotated
from nnx.train._optimizer import Optimizer

__all__ = ["Plan", "Sizes", "plan", "recipe_mesh", "sizes_of"]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What of a model does not depend on the mesh.

    Attributes:
        parameters: the number of parameters.
        model: the abstract Module.
        optimizer: the abstract Optimizer, or None.
        saved: the shapes and dtypes of what the forward pass saves for the gradient, besides the parameters.
        tokens: the product of the first two sizes of the input: sequences times their length.
        activation_bytes: of one number of the residual stream.
    """

    parameters: int
    model: Module
    optimizer: Optimizer | None
    saved: tuple[Any, ...]
    tokens: int
    activation_bytes: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step takes, in bytes for each chip.

    Attributes:
        mesh: the size of each mesh axis.
        parameters: of the model's Variables.
        optimizer: of the optimizer's state.
        gradients: of the gradients, which are split as the parameters are.
        gathered: of the largest layer's parameters, gathered over "fsdp" to be used, twice: one is computed with while
            the next one comes.
        activations: of what the forward pass saves.
        communication: what a chip sends in a step over each mesh axis.
    """

    mesh: Mapping[str, int]
    parameters: int
    optimizer: int
    gradients: int
    gathered: int
    activations: int
    communication: Mapping[str, int]

    @property
    def chips(self) -> int:
        """The number of chips."""
        return math.prod(self.mesh.values())

    @property
    def state(self) -> int:
        """What stays from step to step: parameters and optimizer."""
        return self.parameters + self.optimizer

    @property
    def total(self) -> int:
        """Everything at the same time."""
        return self.state + self.gradients + self.gathered + self.activations


def sizes_of(
    create: Callable[[], Module],
    tx: Any = None,
    *,
    inputs: Sequence[Any] = (),
    ctx: Callable[[], Context] | None = None,
    activation_bytes: int = 4,
) -> Sizes:
    """Look at a model by `nnx.eval_shape`: nothing is computed, and no array is made.

    Args:
        create: makes the model.
        tx: an optax gradient transformation; None counts no optimizer.
        inputs: `jax.ShapeDtypeStruct`s of one step's inputs, of all chips together; none counts no activations.
        ctx: makes the Context that the model is called with; None is one with the flags `deterministic` and
            `use_running_average` off and a stream "dropout".
        activation_bytes: the bytes of one number of the residual stream.

    Example:
        >>> import jax, nnx
        >>> sizes = nnx.train.sizes_of(lambda: nnx.MLP(64, 256, 64, ctx=nnx.context(0)))
        >>> sizes.parameters
        33088
    """

    def build() -> Any:
        model = create()
        return (model, Optimizer(model, tx)) if tx is not None else (model, None)

    model, optimizer = eval_shape(build)
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model.filter(Param)))
    saved: tuple[Any, ...] = ()
    if inputs:
        saved = _saved(model, inputs, ctx)
    tokens = math.prod(inputs[0].shape[:2]) if inputs else 0
    return Sizes(parameters, model, optimizer, saved, tokens, activation_bytes)


def _saved(model: Any, inputs: Sequence[Any], ctx: Callable[[], Context] | None) -> tuple[Any, ...]:
    state, moduledef = model.partition()
    values = [jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), v) for v in state.raw_values]

    def residuals(values: Any, *inputs: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            out, _ = moduledef.apply(state.replace_values(params))(*inputs, ctx=(ctx or _training)())
            return jnp.sum(out)

        return jax.vjp(loss, values)[1]

    found = jax.tree.leaves(jax.eval_shape(residuals, values, *inputs))
    # Parameters are saved as well, without taking memory a second time.
    held = collections.Counter((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(values))
    saved = []
    for leaf in found:
        if held[leaf.shape, leaf.dtype] > 0:
            held[leaf.shape, leaf.dtype] -= 1
        else:
            saved.append(leaf)
    return tuple(saved)


def _training() -> Context:
    return context(dropout=0, flags={"deterministic": False, "use_running_average": False})


def plan(sizes: Sizes, mesh: Mapping[str, int], rules: Mapping[str, Any]) -> Plan:
    """What a step takes of each chip of a mesh.

    Parameters, gradients and optimizer state are exact: their shapes, split as the rules say. Activations are what the
    forward pass saves, split over the axes of "batch"; where "activation_mlp" has an axis, that splits those whose last
    size is not one of "embed"; where "length" has one, that splits the others. What the compiler fuses away, and what
    it needs while a single layer runs, it alone knows.

    Communication counts rings: reducing over `n` chips sends `2 (n - 1) / n` of the bytes, gathering or scattering
    `(n - 1) / n`. Over an axis of the batch that a parameter is not split over, its gradient is reduced. One that it is
    split over gathers it twice and scatters its gradient. Over the axis of "mlp", each kernel whose sum is split gives
    one reduction of its outputs, and one more in the gradient. That is the least that a step has to send: a compiler
    that reduces where it could scatter, as XLA does on CPUs, sends more.

    Args:
        sizes: what `sizes_of` gives.
        mesh: the size of each axis.
        rules: from logical axes to mesh axes; axes that the mesh lacks count as 1.

    Raises:
        ShardingError: a name has no rule, a size does not divide, or the batch does not.

    Example:
        >>> import nnx, optax
        >>> sizes = nnx.train.sizes_of(lambda: nnx.MLP(64, 256, 64, ctx=nnx.context(0)), optax.adam(1e-3))
        >>> nnx.train.plan(sizes, {"fsdp": 8}, nnx.sharding_rules("fsdp")).state < 4 * 3 * 33088 / 8 * 1.1
        True
    """
    axes = {axis: mesh.get(axis, 1) for axis in dict.fromkeys([*mesh, "data", "fsdp", "tensor"])}
    names = tuple(axes)
    abstract = jax.sharding.AbstractMesh(tuple(axes.values()), names)
    batch = _axes_of(rules.get("batch"))
    tensor = _axes_of(rules.get("mlp"))
    over = math.prod(axes[axis] for axis in batch)
    if sizes.tokens and sizes.saved and sizes.tokens % over:
        raise ShardingError(f"{sizes.tokens} tokens do not divide over the {over} chips of the axes {batch!r}")

    parameters = _shard_bytes(sizes.model, abstract, rules)
    optimizer = 0 if sizes.optimizer is None else _shard_bytes(sizes.optimizer, abstract, rules)
    params = sizes.model.filter(Param)
    gradients = _shard_bytes(params, abstract, rules)

    communication: collections.Counter[str] = collections.Counter()
    largest: collections.Counter[str] = collections.Counter()
    part = Annotated(params, "")
    shardings = jax.tree.leaves(get_named_sharding(params, abstract, rules))
    for leaf, labels, path, sharding in zip(part.leaves, part.names, part.labels, shardings, strict=True):
        used = {axis for entry in sharding.spec for axis in _axes_of(entry)}
        mine = math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        gathered = mine * math.prod(axes[axis] for axis in used if axis in batch)
        for axis in batch:
            n = axes[axis]
            if axis in used:
                communication[axis] += 3 * gathered * (n - 1) // n
            else:
                communication[axis] += 2 * mine * (n - 1) // n
        count = leaf.shape[0] if labels and labels[0] == "layers" else 1
        if any(axes[axis] > 1 for axis in used & set(batch)):
            largest[_layer_of(path, stacked=count > 1)] += gathered // count
        if labels and _sums_over(labels, rules, tensor):
            n = math.prod(axes[axis] for axis in tensor)
            outputs = sizes.tokens // over * leaf.shape[-1] * sizes.activation_bytes
            for axis in tensor:
                communication[axis] += 2 * count * 2 * outputs * (n - 1) // n
    return Plan(
        mesh=dict(mesh),
        parameters=parameters,
        optimizer=optimizer,
        gradients=gradients,
        gathered=2 * max(largest.values(), default=0),
        activations=_activations(sizes, axes, rules, over),
        communication={axis: int(communication[axis]) for axis in names if communication[axis]},
    )


def _axes_of(entry: Any) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _shard_bytes(tree: Any, mesh: Any, rules: Mapping[str, Any]) -> int:
    state = tree.partition()[0] if isinstance(tree, Module) else tree
    shardings = jax.tree.leaves(get_named_sharding(state, mesh, rules))
    return sum(
        math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, sharding in zip(jax.tree.leaves(state), shardings, strict=True)
        if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended)
    )


def _layer_of(path: str, *, stacked: bool) -> str:
    """Which layer a parameter is gathered with: of a Stack a whole one at a time, else each Module by itself."""
    parts = path.split("/")
    return "/".join(parts[: parts.index("layers") + 1]) if stacked and "layers" in parts else "/".join(parts[:-1])


def _sums_over(names: Sequence[Any], rules: Mapping[str, Any], tensor: tuple[str, ...]) -> bool:
    """Whether a product with a kernel of these axes sums over split ones: its last axis is whole, one before is not."""
    *before, last = [_axes_of(rules.get(name)) if name else () for name in names]
    return names[-1] == "embed" and not set(last) & set(tensor) and any(set(entry) & set(tensor) for entry in before)


def _activations(sizes: Sizes, axes: Mapping[str, int], rules: Mapping[str, Any], over: int) -> int:
    part = Annotated(sizes.model, "")
    embed = {
        size
        for leaf, names in zip(part.leaves, part.names, strict=True)
        for size, name in zip(leaf.shape, names or (), strict=bool(names))
        if name == "embed"
    }
    tensor = math.prod(axes[axis] for axis in _axes_of(rules.get("activation_mlp")))
    length = math.prod(axes[axis] for axis in _axes_of(rules.get("length")))
    total = 0
    for leaf in sizes.saved:
        if math.prod(leaf.shape) < sizes.tokens:  # no activation: positions, masks, keys
            continue
        nbytes = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
        total += nbytes // over // (length if leaf.shape[-1] in embed else tensor)
    return total


def recipe_mesh(recipe: str, chips: int, *, tensor: int = 8, fsdp: int | None = None) -> dict[str, int]:
    """A mesh of so many chips for a recipe of `nnx.sharding_rules`.

    Args:
        recipe: its name.
        chips: the number of chips.
        tensor: the most chips that share a layer, those with fast links between them.
        fsdp: the most chips that share a copy of the parameters, beside `tensor`; None for all.

    Raises:
        ValueError: the chips do not divide so.

    Example:
        >>> recipe_mesh("combined", 512, tensor=8, fsdp=16)
        {'data': 4, 'fsdp': 16, 'tensor': 8}
    """
    if recipe == "data_parallel":
        return {"data": chips}
    if recipe == "fsdp":
        return {"fsdp": chips}
    inner = min(tensor, chips)
    if recipe == "tensor_parallel":
        return {"data": chips // inner, "tensor": inner}
    shards = min(fsdp or chips, chips // inner)
    if inner * shards * (chips // inner // shards) != chips:
        raise ValueError(f"{chips} chips do not divide into {inner} for `tensor` and {shards} for `fsdp`")
    return {"data": chips // inner // shards, "fsdp": shards, "tensor": inner}
