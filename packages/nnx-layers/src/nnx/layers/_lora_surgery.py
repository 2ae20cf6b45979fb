"""LoRA by surgery: layers of a model replaced, in place, by layers with a map of low rank beside them, and back."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from nnx.core import Context, Module, Variable, to_filter
from nnx.layers._dtypes import statistics_dtype
from nnx.layers._linear import Linear, LinearGeneral
from nnx.layers._lora import (
    LoRA,
    LoRALinear,
    LoRALinearGeneral,
    LoRAParam,
    default_a_initializer,
    default_b_initializer,
)
from nnx.layers.initializers import Initializer

__all__ = ["apply_lora", "lora_merge"]

Path = tuple[str, ...]

# Subclasses of these are not replaced: what their own code does would be lost.
_ADAPTED: dict[type, type] = {Linear: LoRALinear, LinearGeneral: LoRALinearGeneral}
_PLAIN: dict[type, type] = {adapted: plain for plain, adapted in _ADAPTED.items()}


def apply_lora(
    model: Module,
    filter: Any,
    rank: int,
    *,
    alpha: float | None = None,
    param_dtype: DTypeLike = jnp.float32,
    a_initializer: Initializer = default_a_initializer,
    b_initializer: Initializer = default_b_initializer,
    lora_param_type: type[Variable[Any]] = LoRAParam,
    ctx: Context,
) -> tuple[Path, ...]:
    """Replaces Linear and LinearGeneral layers of a model, in place, by layers with a map of low rank beside them.

    A new layer, a LoRALinear or LoRALinearGeneral, holds the very `kernel` and `bias` of the old one, at the same
    paths. A layer that stands in several places is replaced by one new layer in all of them. Subclasses of the two,
    layers that have LoRA already, and those with a `batch_axis` are left alone.

    Args:
        model: the model.
        filter: which layers to replace: a filter over their paths (`nnx.PathGlob("**/query")`, `...` for all) or a
            function `(path, layer) -> bool`.
        rank: the rank of the maps.
        alpha: they are scaled by `alpha / rank`; `None` leaves them unscaled.
        param_dtype: dtype of their parameters. They compute in the dtype and with the precision of their layers.
        a_initializer: initializer of `lora_a`.
        b_initializer: initializer of `lora_b`; the default, zeros, leaves the model's outputs as they are.
        lora_param_type: the Variable type of their parameters.
        ctx: gives the keys, from its stream "params".

    Returns:
        The paths of the layers that were replaced.

    Raises:
        TraceContextError: the model belongs to another trace.
        ValueError: the filter matches no such layer, or it matches the model itself, which nothing holds.

    Reference: Hu et al., 2021, LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685.

    Example:
        >>> import nnx, jax.numpy as jnp
        >>> model = nnx.MLP(2, (8,), 1, ctx=nnx.context(0))
        >>> nnx.apply_lora(model, nnx.PathGlob("layers/*"), 2, ctx=nnx.context(1))
        (('layers', '0'), ('layers', '1'))
        >>> loss = lambda model: jnp.square(model(jnp.ones((4, 2)))).sum()
        >>> nnx.grad(loss, wrt=nnx.LoRAParam)(model).paths[0]
        ('layers', '0', 'lora', 'lora_a')
        >>> paths = nnx.lora_merge(model)
        >>> type(model.layers[0]).__name__
        'Linear'
    """
    wanted = to_filter(filter)

    def chosen(place: _Place) -> bool:
        return any(wanted.match(path, type(place.layer), lambda: place.layer) for path in (place.path, *place.paths))

    places = [place for place in _places(model, _ADAPTED) if chosen(place)]
    if not places:
        known = [f"{_text(p.path) or '.'} ({type(p.layer).__name__})" for p in _places(model, _ADAPTED | _PLAIN)]
        raise ValueError(
            f"apply_lora: the filter {wanted!r} matches no Linear or LinearGeneral of the {type(model).__name__}. A"
            " filter sees the paths of layers, not of their kernels. Layers there are:"
            f" {', '.join(known) or 'none'}"
        )
    _check_held("apply_lora", model, places)

    def adapted(layer: Any) -> Any:
        new = _converted(layer, _ADAPTED)
        size_in, size_out = (
            size if isinstance(size, int) else math.prod(size) for size in (layer.in_features, layer.out_features)
        )
        new.lora = LoRA(
            size_in,
            rank,
            size_out,
            alpha=alpha,
            dtype=layer.dtype,
            param_dtype=param_dtype,
            precision=layer.precision,
            a_initializer=a_initializer,
            b_initializer=b_initializer,
            lora_param_type=lora_param_type,
            ctx=ctx,
        )
        return new

    _replace(model, places, [adapted(place.layer) for place in places])
    return tuple(place.path for place in places)


def lora_merge(model: Module) -> tuple[Path, ...]:
    """Adds the maps of low rank into the kernels beside them, in place: the inverse of the surgery of `apply_lora`.

    `kernel <- kernel + scale * lora_a @ lora_b`, computed in float32 or wider, for every LoRALinear and
    LoRALinearGeneral of the model, each of which becomes a Linear or LinearGeneral again. Where nothing was trained the
    kernels stay as they were, to the last digit. Kernels keep their dtype.

    Args:
        model: the model.

    Returns:
        The paths of the layers that were merged.

    Raises:
        TraceContextError: the model belongs to another trace.
        ValueError: a kernel is tied to another attribute, which would change too; or the model itself is such a layer,
            which nothing holds.

    Reference: Hu et al., 2021, LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685.

    Example:
        >>> import nnx
        >>> model = nnx.Sequence([nnx.LoRALinear(2, 3, lora_rank=1, ctx=nnx.context(0))])
        >>> nnx.lora_merge(model)
        (('0',),)
        >>> type(model[0]).__name__
        'Linear'
    """
    places = _places(model, _PLAIN)
    _check_held("lora_merge", model, places)
    for place in places:
        if place.kernel_ties:
            ties = ", ".join(f"`{_text(path)}`" for path in place.kernel_ties)
            raise ValueError(
                f"lora_merge: the kernel of `{_text(place.path)}` is also {ties}, which merging would change too."
                " Untie them first: `del layer.kernel; layer.kernel = nnx.Param(value)`"
            )
    kernels = [_merged_kernel(place.layer) for place in places]
    new = [_converted(place.layer, _PLAIN, without="lora") for place in places]
    _replace(model, places, new)
    for layer, kernel in zip(new, kernels, strict=True):
        layer.kernel = kernel
    return tuple(place.path for place in places)


def _merged_kernel(layer: Any) -> jax.Array:
    kernel: jax.Array = layer.kernel
    work = statistics_dtype(kernel.dtype)
    return (kernel.astype(work) + layer.lora.delta().astype(work).reshape(kernel.shape)).astype(kernel.dtype)


class _Place(NamedTuple):
    """A layer in a model: its path, all paths by which others hold it, and what else holds its kernel."""

    layer: Any
    path: Path
    paths: list[Path]
    kernel_ties: list[Path]


def _text(path: Path) -> str:
    """A path as users write it."""
    return "/".join(path)


def _at(model: Any, path: Path) -> Any:
    return functools.reduce(getattr, path, model)


def _places(model: Module, kinds: Mapping[type, type]) -> list[_Place]:
    """The layers of exactly these types in a model."""
    definition = model.get_module_def()
    nodes = list(zip(definition.node_paths(), definition.nodes, strict=True))
    holders: dict[tuple[str, int], list[Path]] = {}
    for path, node in nodes:
        for name, kind, payload in node.attributes:
            if kind in ("object", "cell"):
                holders.setdefault((kind, payload), []).append((*path, name))
    found = []
    for index, (path, node) in enumerate(nodes):
        if node.type in kinds and not getattr(_at(model, path), "batch_axis", None):
            kernel = next(payload for name, _, payload in node.attributes if name == "kernel")
            ties = [tie for tie in holders["cell", kernel] if tie != (*path, "kernel")]
            found.append(_Place(_at(model, path), path, holders.get(("object", index), []), ties))
    return found


def _converted(layer: Any, kinds: Mapping[type, type], without: str = "") -> Any:
    """A Module of another class with the same attributes: the same Variables, submodules and statics."""
    kind: Any = kinds[type(layer)]
    new = kind.__new__(kind)  # its constructor would draw a kernel of its own
    for name, value in vars(layer).items():
        if name not in ("_nnx", without):
            setattr(new, name, value)
    for path, node in layer.get_state().items():
        if len(path) == 1:
            # The Variable itself, so that whoever holds it too goes on doing so.
            setattr(new, path[0], layer.get_variable(path[0]) if isinstance(node, Variable) else node)
    return new


def _check_held(what: str, model: Module, places: list[_Place]) -> None:
    if any(place.layer is model for place in places):
        raise ValueError(
            f"{what}: the model itself is the {type(model).__name__} to replace, which takes a Module that holds it."
            " Call it with `nnx.Sequence([layer])`, and go on with the Sequence"
        )


def _replace(model: Module, places: list[_Place], new: list[Any]) -> None:
    """Puts each of `new` in all the places of the layer that it stands for."""
    for place, layer in zip(places, new, strict=True):
        for path in place.paths:
            setattr(_at(model, path[:-1]), path[-1], layer)
