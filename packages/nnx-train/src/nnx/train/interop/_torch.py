"""Parameters of torch: into a model whose layers are ours, by name, each turned as its layer's layout asks."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnx.core import BatchStat, Module, Param, State, StructureError, Variable
from nnx.train._leaves import Leaf, Spec, spec_of
from nnx.train._manifest import Entry
from nnx.train._match import castable, pattern_of, renamed_paths
from nnx.train._reader import decode_leaf
from nnx.train.interop._format import read
from nnx.train.interop._torch_layers import sources

__all__ = ["TorchReport", "load_torch_state_dict"]

_COUNTS = "num_batches_tracked"


@dataclasses.dataclass(frozen=True)
class TorchReport:
    """What went from a state dict of torch into a model, and what did not.

    Attributes:
        loaded: for each path of the model that was written, the names that it came from.
        missing: for each path of the model that nothing was found for, the name that was looked for.
        unexpected: the names that nothing in the model was found for.
        mismatched: for each path of the model that something does not fit into, why not.
        ignored: the names left out on purpose.
    """

    loaded: dict[str, tuple[str, ...]]
    missing: dict[str, str]
    unexpected: tuple[str, ...]
    mismatched: dict[str, str]
    ignored: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether everything found its place."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} loaded, {len(self.ignored)} ignored"]
        lines += [f"missing: `{path}`, for which there is no `{name}`" for path, name in self.missing.items()]
        lines += [f"unexpected: `{name}`" for name in self.unexpected]
        lines += [f"mismatched: `{path}`: {why}" for path, why in self.mismatched.items()]
        return "\n  ".join(lines)


def load_torch_state_dict(
    model: Module,
    source: Mapping[str, Any] | str | os.PathLike[str],
    *,
    rename: Mapping[str, str] | None = None,
    ignore: Sequence[str] = (),
    only: Any = (Param, BatchStat),
    partial: bool = False,
    cast: bool = False,
) -> TorchReport:
    """Write the parameters of a torch module into a model, in place: all that is asked for, or nothing.

    A name of torch such as `layers.0.weight` goes to the path `layers/0/...`; what it is called there, and how it is
    turned, follows from the layer: a Linear's `weight` is [out, in] in torch, its `kernel` [in, out] here. Known are
    Linear, LinearGeneral, Conv, ConvTranspose, Embed, the norms with their running averages, PReLU, MultiHeadAttention
    (torch's, or a Linear for each projection), and LSTM, GRU and simple cells, in an RNN or alone. What a Module of
    your own holds is looked for under its own name, and taken as it is.

    Args:
        model: the model.
        source: a state dict, of tensors or of arrays; or a safetensors file. A file of `torch.save` is a pickle, which
            may execute anything: read it with `torch.load(path, weights_only=True)`.
        rename: patterns of torch's names and what they are to be: `{"transformer.h.*.ln_1.*": "blocks.*.norm.*"}`; `*`
            stands for any text in one part of a name, `**` for any text.
        ignore: patterns of names to leave out, after `rename`. Counts of batches always are.
        only: a filter: what of the model is written.
        partial: whether to write what fits, and leave the rest of the model as it is.
        cast: whether floats and integers may have another precision in the model.

    Returns:
        What was loaded, missing, unexpected and mismatched.

    Raises:
        StructureError: something is missing, unexpected or mismatched, and `partial` is not set; all of it is listed.
        ValueError: the file is a pickle, or no safetensors file.

    Example:
        >>> import nnx, numpy as np
        >>> model = nnx.Linear(2, 3, ctx=nnx.context(0))
        >>> weight = np.arange(6, dtype=np.float32).reshape(3, 2)  # as in torch: [out, in]
        >>> report = nnx.load_torch_state_dict(model, {"weight": weight, "bias": np.ones(3, np.float32)})
        >>> print(model.kernel)
        [[0. 2. 4.]
         [1. 3. 5.]]
        >>> report.loaded
        {'bias': ('bias',), 'kernel': ('weight',)}
    """
    given = _named_arrays(source)
    renames = {old.replace(".", "/"): new.replace(".", "/") for old, new in (rename or {}).items()}
    targets: dict[str, str] = {}
    for name, target in {**{name: name for name in given}, **renamed_paths(given, renames)}.items():
        if target in targets:
            raise StructureError(f"rename: `{_dotted(targets[target])}` and `{_dotted(name)}` become one name")
        targets[target] = name
    left_out = [pattern_of(text.replace(".", "/")) for text in ignore]
    ignored = {
        target
        for target in targets
        if target.rpartition("/")[2] == _COUNTS or any(pattern.fullmatch(target) for pattern in left_out)
    }
    state = model.filter(only)
    values: dict[tuple[str, ...], Any] = {}
    loaded: dict[str, tuple[str, ...]] = {}
    missing: dict[str, str] = {}
    mismatched: dict[str, str] = {}
    used: set[str] = set()
    for path, node in state.items():
        own = "/".join(path)
        ways = [
            (["/".join((*prefix, *name.split("/"))) for name in way.names], way)
            for prefix, way in sources(_modules(model, path), path)
        ]
        found = next((way for way in ways if all(n in targets and n not in ignored for n in way[0])), None)
        if found is None:
            missing[own] = _dotted(ways[0][0][0])
            continue
        names, way = found
        used.update(names)
        try:
            array = way.make(*(given[targets[name]] for name in names))
            values[path] = _fitted(own, node.value if isinstance(node, Variable) else node, array, cast=cast)
        except ValueError as error:
            mismatched[own] = f"{' and '.join(f'`{_dotted(targets[name])}`' for name in names)}: {error}"
        else:
            loaded[own] = tuple(_dotted(targets[name]) for name in names)
    unexpected = tuple(_dotted(targets[name]) for name in targets if name not in used and name not in ignored)
    report = TorchReport(
        loaded, missing, unexpected, mismatched, tuple(_dotted(targets[name]) for name in targets if name in ignored)
    )
    if not report.fits and not partial:
        raise StructureError(f"the state dict does not fit the {type(model).__name__}: {report}")
    model.update_state(
        State({path: node for path, node in state.items() if path in values}).map(lambda p, _: values[p])
    )
    return report


def _named_arrays(source: Mapping[str, Any] | str | os.PathLike[str]) -> dict[str, np.ndarray[Any, Any]]:
    if isinstance(source, Mapping):
        return {name.replace(".", "/"): _array(name, value) for name, value in source.items()}
    path = Path(source)
    if path.suffix in (".pt", ".pth", ".bin", ".ckpt", ".pkl"):
        raise ValueError(
            f"load_torch_state_dict: {path} is a pickle, which may execute anything, and is not read here: hand over "
            "`torch.load(path, weights_only=True)`, or convert it to a safetensors file"
        )
    return {name.replace(".", "/"): array for name, array in read(path)[0].items()}


def _array(name: str, value: Any) -> np.ndarray[Any, Any]:
    if hasattr(value, "detach"):  # a tensor of torch, which need not be installed
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":  # which NumPy alone does not know; there and back it is exact
            return np.asarray(value.float().numpy()).astype(jnp.bfloat16)
        value = value.numpy()
    array = np.asarray(value)
    if array.dtype == object:
        raise TypeError(f"load_torch_state_dict: `{name}` is a {type(value).__name__}, and no array")
    return array


def _modules(model: Module, path: tuple[str, ...]) -> list[Any]:
    found: list[Any] = [model]
    for part in path[:-1]:
        found.append(getattr(found[-1], part, None))
    return found


def _fitted(own: str, like: Any, array: np.ndarray[Any, Any], *, cast: bool) -> Any:
    """The array as the model has it; a ValueError says why it cannot be."""
    saved = Spec("array", array.shape, array.dtype.name)
    leaf = Leaf(own, like, None)
    wanted = spec_of(leaf)
    if wanted.kind != "array" or saved.shape != wanted.shape:
        raise ValueError(f"it would be {saved}, and the model has {wanted}")
    if saved.dtype != wanted.dtype and not (cast and castable(saved, wanted)):
        hint = "; cast=True converts it" if castable(saved, wanted) else ""
        raise ValueError(f"it would be {saved}, and the model has {wanted}{hint}")
    array = np.ascontiguousarray(array).reshape(array.shape)
    value = decode_leaf(leaf, own, Entry(saved, nbytes=array.nbytes), {f"leaf:{own}": array})
    return jax.block_until_ready(value)


def _dotted(name: str) -> str:
    return name.replace("/", ".")
