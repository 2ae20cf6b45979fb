"""The arguments of what flax.nnx has too: where ours differ in name, order, kind or default, and why."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx as flax_nnx

import nnx
from nnx import layers

Place = tuple[str, str, str]
"""A layer or function, its method or "", and the argument."""

_FLAG = "None asks the Context, which carries the flag, as in the first nnx; an answer nowhere is an error, no default"
_VIEW = "sets the flag in a view of a model; here the Context of a call carries it, for the whole model"
_STREAM = "no layer holds a random stream: the call gets one with `ctx`"
_IGNORED = "flax takes it and does nothing with it"
_DEPRECATED = "deprecated in flax, to be removed there; here `layer.query.dot_general = ...` does it, and so on"
_WRITES = (
    "flax's way to say what a cell's own state does in the loop; a cell here may read its Variables, not write them"
)
_CACHE = "the cache is made for a batch and a length, not for a shape of inputs, and its dtype is the layer's"

DIFFERENT: dict[Place, str] = {
    ("BatchNorm", "__init__", "use_running_average"): _FLAG,
    ("BatchNorm", "set_view", ""): _VIEW,
    ("Bidirectional", "__call__", "keep_order"): _IGNORED,
    ("Bidirectional", "__call__", "reverse"): _IGNORED,
    ("Bidirectional", "__init__", "rngs"): _STREAM,
    ("Dropout", "__init__", "deterministic"): _FLAG,
    ("Dropout", "__init__", "rngs"): _STREAM,
    ("Dropout", "set_view", ""): _VIEW,
    ("GRUCell", "__init__", "keep_rngs"): _STREAM,
    ("LSTMCell", "__init__", "keep_rngs"): _STREAM,
    ("LoRALinear", "__call__", "x"): "`inputs`, as in the Linear that it stands for, also after `apply_lora`",
    ("MultiHeadAttention", "__call__", "is_causal"): "None is what the constructor says, which has the option here too",
    ("MultiHeadAttention", "__init__", "keep_rngs"): _STREAM,
    ("MultiHeadAttention", "__init__", "out_dot_general"): _DEPRECATED,
    ("MultiHeadAttention", "__init__", "out_dot_general_cls"): _DEPRECATED,
    ("MultiHeadAttention", "__init__", "qkv_dot_general"): _DEPRECATED,
    ("MultiHeadAttention", "__init__", "qkv_dot_general_cls"): _DEPRECATED,
    ("MultiHeadAttention", "init_cache", "dtype"): _CACHE,
    ("MultiHeadAttention", "init_cache", "input_shape"): _CACHE,
    ("MultiHeadAttention", "set_view", ""): _VIEW,
    ("OptimizedLSTMCell", "__init__", "keep_rngs"): _STREAM,
    ("RNN", "__init__", "broadcast_rngs"): _WRITES,
    ("RNN", "__init__", "rngs"): _STREAM,
    ("RNN", "__init__", "state_axes"): _WRITES,
    ("SimpleCell", "__init__", "keep_rngs"): _STREAM,
    ("SpectralNorm", "__init__", "update_stats"): _FLAG,
    ("WeightNorm", "__init__", "promote_dtype"): _IGNORED,
    ("WeightNorm", "__init__", "variable_filter"): "the same parameters, by a filter of ours",
}
"""Every argument of flax.nnx that is not to be had here as it is there; `rngs` that is `ctx` here is none of them."""


def is_newest() -> bool:
    """Whether this is a flax that the table is about."""
    return hasattr(flax_nnx, "RoPE")


def shared() -> list[str]:
    """The names of layers and functions in both libraries."""
    found = [name for name in layers.__all__ if callable(getattr(layers, name)) and hasattr(flax_nnx, name)]
    return [name for name in found if not _is_variable(getattr(layers, name))]


def _is_variable(made: Any) -> bool:
    return isinstance(made, type) and issubclass(made, nnx.Variable)


def differences(name: str) -> Iterator[tuple[Place, str]]:
    """Where the arguments of a layer or function differ, and how."""
    ours, theirs = getattr(layers, name), getattr(flax_nnx, name)
    if not isinstance(theirs, type):
        pairs: dict[str, tuple[Any, Any]] = {"": (ours, theirs)}
    else:
        pairs = {method: (getattr(ours, method, None), getattr(theirs, method)) for method in _methods(theirs)}
    for method, (mine, given) in pairs.items():
        if mine is None:
            yield (name, method, ""), "there is no such method"
            continue
        for argument, what in _compare(_parameters(mine), _parameters(given)):
            yield (name, method, argument), what


def _methods(made: type) -> list[str]:
    """What a layer of flax can be called with: what it does not have from the base of all Modules."""
    own = {name for name in dir(made) if not name.startswith("_") and not hasattr(flax_nnx.Module, name)}
    own |= {name for name in ("__init__", "__call__") if getattr(made, name, None) is not getattr(object, name, None)}
    # What has an annotation is a field, such as a function that an instance may be given another of.
    return sorted(name for name in own - set(inspect.get_annotations(made)) if inspect.isfunction(getattr(made, name)))


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    return [found for found in inspect.signature(function).parameters.values() if found.name != "self"]


def _compare(ours: list[inspect.Parameter], theirs: list[inspect.Parameter]) -> Iterator[tuple[str, str]]:
    mine = {parameter.name: parameter for parameter in ours}
    for parameter in theirs:
        own = mine.get(parameter.name)
        if parameter.name == "rngs" and "ctx" in mine:
            own = mine["ctx"]
        if own is None:
            yield parameter.name, "not there"
        elif own.kind is not parameter.kind:
            yield parameter.name, f"{own.kind.description}, and {parameter.kind.description} there"
        elif not _is_same(own.default, parameter.default):
            yield parameter.name, f"the default is {own.default}, and {parameter.default} there"
        elif _by_position(ours, own) != _by_position(theirs, parameter):
            yield (
                parameter.name,
                f"argument number {_by_position(ours, own)}, and {_by_position(theirs, parameter)} there",
            )
    known = {parameter.name for parameter in theirs} | {"ctx"}
    if any(parameter.name not in mine and parameter.name != "rngs" for parameter in theirs):
        return  # one of ours may stand in the place of what is not there
    for own in ours:
        optional = own.default is not inspect.Parameter.empty and own.kind is inspect.Parameter.KEYWORD_ONLY
        if own.name not in known and not optional and own.kind is not inspect.Parameter.VAR_KEYWORD:
            yield own.name, "there must be no further argument but optional ones by keyword"


def _by_position(parameters: list[inspect.Parameter], one: inspect.Parameter) -> int | None:
    return parameters.index(one) if one.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD else None


def _is_same(ours: Any, theirs: Any) -> bool:
    """Whether two defaults mean the same in both libraries."""
    if ours is theirs:
        return True
    if isinstance(ours, str) and callable(theirs):  # an activation by its name
        return bool(ours == theirs.__name__)
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        return dict(ours) == dict(theirs)
    if not callable(ours) or not callable(theirs):
        return type(ours) is type(theirs) and bool(ours == theirs)
    drawn = _drawn(ours)
    if drawn is not None:
        return bool(np.array_equal(drawn, _drawn(theirs)))
    names = [getattr(function, "__name__", repr(function)).lstrip("_") for function in (ours, theirs)]
    return names[0] == names[1]


@functools.cache
def _drawn(init: Any) -> Any:
    """What an initializer makes, or None if it is another function."""
    try:
        return np.asarray(init(jax.random.key(0), (4, 6), jnp.float32))
    except TypeError:
        return None
