"""Recipes of parallelism: each is one rule set from the layers' logical axes to the axes of a mesh."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

__all__ = ["RECIPES", "sharding_rules"]

MeshAxes = str | tuple[str, ...] | None

_WHOLE: Final[dict[str, MeshAxes]] = {
    # What the layers of nnx call the axes of their parameters.
    "cache_length": None,
    "conv_in": None,
    "conv_out": None,
    "embed": None,
    "features": None,
    "head_dim": None,
    "heads": None,
    "in": None,
    "kv_heads": None,
    "layers": None,
    "lora": None,
    "mlp": None,
    "out": None,
    "vocab": None,
    # What a model may call those of its activations. Parameters are gathered before they are used, and activations are
    # not, so that the two need names of their own.
    "batch": None,
    "length": None,
    "activation_embed": None,
    "activation_heads": None,
    "activation_length": None,
    "activation_mlp": None,
    "activation_vocab": None,
}
_SPLIT = ("heads", "kv_heads", "mlp", "vocab", "activation_heads", "activation_mlp", "activation_vocab")
_TENSOR: Final[dict[str, MeshAxes]] = dict.fromkeys(_SPLIT, "tensor")
_FSDP: Final[dict[str, MeshAxes]] = dict.fromkeys(("conv_out", "embed", "in"), "fsdp")

RECIPES: Final[Mapping[str, Mapping[str, MeshAxes]]] = {
    "data_parallel": {**_WHOLE, "batch": "data"},
    "fsdp": {**_WHOLE, **_FSDP, "batch": "fsdp"},
    "tensor_parallel": {**_WHOLE, **_TENSOR},
    "combined": {**_WHOLE, **_TENSOR, **_FSDP, "batch": ("data", "fsdp")},
    "sequence_parallel": {**_WHOLE, **_TENSOR, **_FSDP, "batch": ("data", "fsdp"), "length": "tensor"},
}


def sharding_rules(recipe: str, mesh: Any = None, **changes: MeshAxes) -> dict[str, MeshAxes]:
    """The rules of a recipe, for `nnx.sharded_init`, `nnx.logical_axis_rules` and their kin.

    The mesh axes are called "data", "fsdp" and "tensor":

    - "data_parallel": the batch over "data"; each device has the whole model.
    - "fsdp": the batch and the parameters, with their gradients and moments, over "fsdp" (ZeRO-3).
    - "tensor_parallel": heads, hidden units and vocabulary over "tensor".
    - "combined": the batch over "data" and "fsdp", parameters over "fsdp" and "tensor".
    - "sequence_parallel": as "combined", and the sequence over "tensor" between the blocks of a transformer.

    Args:
        recipe: its name.
        mesh: leaves out the axes that this mesh does not have; None keeps all.
        **changes: mesh axes by logical axis, in the place of the recipe's or for names of your own.

    Raises:
        ValueError: there is no such recipe.

    References: Rajbhandari et al., 2019, ZeRO, arXiv:1910.02054; Shoeybi et al., 2019, Megatron-LM, arXiv:1909.08053;
    Korthikanti et al., 2022, Reducing Activation Recomputation, arXiv:2205.05198.

    Example:
        >>> import nnx
        >>> rules = nnx.sharding_rules("combined", vocab=None, experts="data")
        >>> rules["embed"], rules["mlp"], rules["batch"], rules["vocab"], rules["experts"]
        ('fsdp', 'tensor', ('data', 'fsdp'), None, 'data')
    """
    if recipe not in RECIPES:
        raise ValueError(f"sharding_rules: there is no recipe {recipe!r}; there are {', '.join(RECIPES)}")
    rules = {**RECIPES[recipe], **changes}
    if mesh is not None:
        rules = {name: _present(axes, mesh.axis_names) for name, axes in rules.items()}
    return rules


def _present(axes: MeshAxes, names: Any) -> MeshAxes:
    kept = tuple(axis for axis in (axes if isinstance(axes, tuple) else (axes,)) if axis is not None and axis in names)
    return kept if len(kept) > 1 else kept[0] if kept else None
