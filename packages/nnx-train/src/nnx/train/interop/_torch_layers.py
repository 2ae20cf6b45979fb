"""How torch lays out what each layer holds: under which names, and what turns its arrays into ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from nnx.core import Module

__all__ = ["Source", "sources"]

Array = np.ndarray[Any, Any]
Path = tuple[str, ...]
Rule = Callable[[Any, Path, Sequence[Any]], "Iterator[Source]"]


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the array of a leaf comes from.

    Attributes:
        names: torch's names, below the Module that the rule is for; `up` levels above it where torch has one module for
            what are several here.
        make: what makes the leaf of the arrays of those names; it may raise a ValueError that says why it cannot.
        up: how many levels above.
    """

    names: tuple[str, ...]
    make: Callable[..., Array]
    up: int = 0


def sources(modules: Sequence[Any], path: Path) -> Iterator[tuple[Path, Source]]:
    """The ways in which torch may hold a leaf, the likeliest first, each with the path that its names are below.

    Args:
        modules: the Modules on the way to the leaf, from the root on, as many as the path has parts.
        path: the leaf's path.
    """
    for depth in range(len(path) - 1, -1, -1):
        tail = path[depth:]
        for cls in type(modules[depth]).__mro__:
            # By name: the layers are in a package that need not be installed.
            rule = _RULES.get(cls.__name__) if cls.__module__.startswith("nnx.layers.") else None
            if rule is not None:
                for source in rule(modules[depth], tail, modules[:depth]):
                    yield path[: depth - source.up], source
                break
    yield path[:-1], Source((path[-1],), _same)


def _same(x: Array) -> Array:
    return x


def _linear(_: Module, tail: Path, __: Sequence[Any]) -> Iterator[Source]:
    if tail == ("kernel",):
        yield Source(("weight",), np.transpose)


def _general(module: Any, tail: Path, _: Sequence[Any]) -> Iterator[Source]:
    """A Linear of several axes: torch has them flattened to one."""
    if tail in (("kernel",), ("bias",)):
        shape = np.shape(getattr(module, tail[0]))

        def shaped(x: Array) -> Array:
            return np.transpose(x).reshape(shape) if x.size == np.prod(shape) else x

        yield Source(("weight" if tail == ("kernel",) else "bias",), shaped)


def _conv(_: Module, tail: Path, __: Sequence[Any]) -> Iterator[Source]:
    """[out, in, *space] in torch, [*space, in, out] here."""
    if tail == ("kernel",):
        yield Source(("weight",), lambda x: np.transpose(x, (*range(2, x.ndim), 1, 0)))


def _conv_transpose(module: Any, tail: Path, _: Sequence[Any]) -> Iterator[Source]:
    """[in, out, *space] in torch; turned around in space here, unless `transpose_kernel` says so too."""

    def turned(x: Array) -> Array:
        space = tuple(range(2, x.ndim))
        return np.transpose(np.flip(x, space), (*space, 0, 1))

    if tail == ("kernel",):
        if module.transpose_kernel:
            yield Source(("weight",), lambda x: np.transpose(x, (*range(2, x.ndim), 1, 0)))
        else:
            yield Source(("weight",), turned)


def _named(names: Mapping[str, str]) -> Rule:
    """The same arrays under other names."""

    def rule(_: Any, tail: Path, __: Sequence[Any]) -> Iterator[Source]:
        if len(tail) == 1 and tail[0] in names:
            yield Source((names[tail[0]],), _same)

    return rule


def _prelu(_: Any, tail: Path, __: Sequence[Any]) -> Iterator[Source]:
    if tail == ("negative_slope",):
        yield Source(("weight",), lambda x: x.reshape(()) if x.size == 1 else x)


def _attention(module: Any, tail: Path, _: Sequence[Any]) -> Iterator[Source]:
    """Heads are parts of one axis in torch, and queries, keys and values parts of one matrix."""
    if len(tail) != 2 or tail[1] not in ("kernel", "bias"):
        return
    shape = np.shape(getattr(getattr(module, tail[0]), tail[1]))

    def shaped(x: Array) -> Array:
        return np.transpose(x).reshape(shape) if x.size == np.prod(shape) else x

    kind = "weight" if tail[1] == "kernel" else "bias"
    if tail[0] == "out":
        yield Source((f"out_proj/{kind}",), shaped)
    elif tail[0] in ("query", "key", "value"):
        number = ("query", "key", "value").index(tail[0])

        def third(x: Array) -> Array:
            if x.shape[0] % 3:
                raise ValueError(f"{x.shape[0]} rows are no queries, keys and values of equal size")
            return shaped(np.split(x, 3)[number])

        yield Source((f"in_proj_{kind}",), third)
        yield Source((f"{tail[0][0]}_proj_{kind}",), shaped)
        yield Source((f"{tail[0][0]}_proj/{kind}",), shaped)


def _recurrent(cell: Callable[[Path, str], Source | None]) -> Rule:
    """A cell: as a cell of torch, or as a layer of one direction or of two, which here is an RNN around the cell."""

    def rule(_: Any, tail: Path, above: Sequence[Any]) -> Iterator[Source]:
        kinds = [type(module).__name__ for module in reversed(above[-2:])]
        suffixes = [("", 0)]
        if kinds[:1] == ["RNN"]:
            suffixes.append(("_l0", 1))
        if kinds == ["RNN", "Bidirectional"]:
            backward = above[-2].backward_rnn is above[-1]
            suffixes.append(("_l0_reverse" if backward else "_l0", 2))
        for suffix, up in suffixes:
            source = cell(tail, suffix)
            if source is not None:
                yield dataclasses.replace(source, up=up)

    return rule


def _sum(a: Array, b: Array) -> Array:
    return a + b


def _biases(suffix: str) -> tuple[str, str]:
    return f"bias_ih{suffix}", f"bias_hh{suffix}"


def _lstm(tail: Path, suffix: str) -> Source | None:
    """A Linear for each gate here, all side by side in torch; torch has a second bias, which adds nothing."""
    source, gate = tail[0][0], tail[0][1]
    number = "ifgo".index(gate)
    if tail[1] == "kernel":
        return Source((f"weight_{source}h{suffix}",), lambda x: np.split(x, 4)[number].T)
    return Source(_biases(suffix), lambda a, b: np.split(a + b, 4)[number])


def _side_by_side(bias_of: str, join: Callable[[Array, Array], Array]) -> Callable[[Path, str], Source | None]:
    def rule(tail: Path, suffix: str) -> Source | None:
        if tail[1] == "kernel":
            return Source((f"weight_{'ih' if tail[0] == 'dense_i' else 'hh'}{suffix}",), np.transpose)
        return Source(_biases(suffix), join) if tail[0] == bias_of else None

    return rule


def _gru_bias(inputs: Array, carry: Array) -> Array:
    reset_and_update, candidate = carry[: 2 * len(carry) // 3], carry[2 * len(carry) // 3 :]
    if candidate.any():
        raise ValueError("torch's GRU has a bias inside of the reset gate, which GRUCell has not, and it is not 0")
    return inputs + np.concatenate([reset_and_update, np.zeros_like(candidate)])


_NORM = _named({"scale": "weight", "mean": "running_mean", "var": "running_var"})

_RULES: dict[str, Rule] = {
    "Linear": _linear,
    "LinearGeneral": _general,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Embed": _named({"embedding": "weight"}),
    "Norm": _NORM,
    "PReLU": _prelu,
    "MultiHeadAttention": _attention,
    "LSTMCell": _recurrent(_lstm),
    "OptimizedLSTMCell": _recurrent(_side_by_side("dense_h", _sum)),
    "GRUCell": _recurrent(_side_by_side("dense_i", _gru_bias)),
    "SimpleCell": _recurrent(_side_by_side("dense_i", _sum)),
}
