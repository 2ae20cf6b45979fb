"""tabulate: what a model is made of and what a call of it would cost, without running anything."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp

from nnx.core._errors import StructureError
from nnx.core._explain import unnoted
from nnx.core._filters import FilterLike
from nnx.core._flops import TOTAL, count_flops, scope
from nnx.core._graph import CELL, OBJECT, Graph, walk
from nnx.core._module import Module
from nnx.core._object import Object, invalidate
from nnx.core._state import Path, State, path_text
from nnx.core._table import render
from nnx.core._variable import Buffer, Param
from nnx.core.transforms._callable import lift_callable
from nnx.core.transforms._inputs import Call
from nnx.core.transforms._staging import Operands

__all__ = ["Summary", "SummaryRow", "count_parameters", "tabulate"]


@dataclasses.dataclass(frozen=True)
class SummaryRow:
    """One Module, Variable or array of a model.

    Attributes:
        path: where it is; the first place of what is shared.
        type: its class; `jax.Array` for a bare array.
        is_module: whether it is a Module (or another object with attributes), and not data.
        shared_with: where it was seen first; None for what is in one place. It counts nothing then.
        value: for data its shape and dtype, for a Module what its first call returned, both with
            `jax.ShapeDtypeStruct` in the place of arrays; None for a Module that was not called.
        calls: how often the Module is called in the trace, where a scan calls its body once.
        parameters: the numbers in its Params, those of its submodules included.
        bytes: the memory of all its data, in bytes, that of its submodules included.
        flops: floating-point operations of its calls; None where nothing was called.
    """

    path: Path
    type: type
    is_module: bool
    shared_with: Path | None = None
    value: Any = None
    calls: int = 0
    parameters: int = 0
    bytes: int = 0
    flops: int | None = None


@dataclasses.dataclass(frozen=True, repr=False)
class Summary:
    """What `tabulate` found; printing it prints the table.

    Attributes:
        rows: the Module itself, and everything in it, parents first.
        parameters: the numbers in all Params, each once.
        bytes: the memory of all data, each once, in bytes.
        flops: floating-point operations of the call; None without a call.
        collections: numbers and bytes by the name of the Variable's class.
    """

    rows: tuple[SummaryRow, ...]
    parameters: int
    bytes: int
    flops: int | None
    collections: dict[str, tuple[int, int]]

    def text(
        self,
        *,
        depth: int | None = None,
        variables: bool = True,
        width: int | None = None,
        max_rows: int | None = None,
    ) -> str:
        """The table as plain text.

        Args:
            depth: how many levels below the model are shown; all by default.
            variables: whether Variables and arrays have rows of their own.
            width: characters in a line; those of the terminal by default.
            max_rows: leaves out the deepest levels until no more rows than this remain, and says so.
        """
        return render(self, depth=depth, variables=variables, width=width, max_rows=max_rows)

    def __str__(self) -> str:
        return self.text(max_rows=200)

    def __repr__(self) -> str:
        return str(self)


def tabulate(model: Any, /, *args: Any, **kwargs: Any) -> Summary:
    """Tell what a model is made of and, given the arguments of a call, what that call returns and costs.

    Nothing is computed: the call is traced with shapes alone, so that a model made by `nnx.eval_shape` will do, and the
    model and its random streams stay as they are. FLOPs are counted in the trace: two for a multiplication with its
    addition, one for any other arithmetic on floats; a scan's body counts once for each step, a `while_loop`'s once.

    Args:
        model: a Module, or a bound method of one (`model.encode`), which is then what is called.
        *args: the arguments of the call: arrays or `jax.ShapeDtypeStruct`, Contexts, anything that it takes. Without
            any, a Module is not called.
        **kwargs: the arguments by name.

    Returns:
        A `Summary`: print it, ask its `text` for another width or depth, or read its rows. Shared Modules and tied
        Variables count where they are first.

    Raises:
        StructureError: `model` is neither a Module nor a bound method of one.

    What the call itself raises gets a note with the path of the Module that was being called.

    Example:
        >>> import jax, jax.numpy as jnp, nnx
        >>> class Linear(nnx.Module):
        ...     def __init__(self, din, dout, *, ctx):
        ...         self.kernel = nnx.Param(jax.random.normal(ctx.make_rng("params"), (din, dout)))
        ...     def __call__(self, x):
        ...         return x @ self.kernel
        >>> model = nnx.Sequence([Linear(2, 8, ctx=nnx.context(0)), jnp.tanh, Linear(8, 3, ctx=nnx.context(1))])
        >>> print(nnx.tabulate(model, jnp.ones((4, 2))).text(width=80))
        Path      Type      Output or value  Parameters  Bytes  FLOPs
        --------  --------  ---------------  ----------  -----  -----
                  Sequence  float32[4,3]             40  160 B    352
        0         Linear    float32[4,8]             16   64 B    128
        0/kernel  Param     float32[2,8]             16   64 B
        2         Linear    float32[4,3]             24   96 B    192
        2/kernel  Param     float32[8,3]             24   96 B
        --------  --------  ---------------  ----------  -----  -----
        Total                                        40  160 B    352
    """
    owner = getattr(model, "__self__", model)
    if not isinstance(owner, Module):
        raise StructureError(
            f"nnx.tabulate takes a Module or a bound method of one, got {type(model).__name__}. Make a Module first; "
            "nnx.eval_shape makes one that takes no memory"
        )
    graph = walk((owner,))
    recorder = None
    if args or kwargs or owner is not model:
        recorder = _trace(model, graph, args, kwargs)
    rows = _rows(graph, recorder)
    sizes: dict[str, tuple[int, int]] = {}
    for cell in graph.cells:
        name = _cell_type(cell).__name__ if not isinstance(cell, Buffer) else "array"
        count, size = sizes.get(name, (0, 0))
        sizes[name] = (count + _numbers(cell._value), size + _bytes(cell._value))
    return Summary(
        rows=tuple(rows),
        parameters=rows[0].parameters,
        bytes=rows[0].bytes,
        flops=recorder.flops[TOTAL] if recorder is not None else None,
        collections=sizes,
    )


def count_parameters(model: Module | State, filter: FilterLike = Param) -> int:
    """The numbers in a model's parameters, those of tied Variables once.

    Args:
        model: a Module, abstract or not, or a State.
        filter: which Variables to count; Params by default.

    Example:
        >>> import jax.numpy as jnp, nnx
        >>> module = nnx.Module()
        >>> module.kernel, module.mean = nnx.Param(jnp.ones((2, 3))), nnx.BatchStat(jnp.zeros(3))
        >>> nnx.count_parameters(module), nnx.count_parameters(module, ...)
        (6, 9)
    """
    if not isinstance(model, (Module, State)):
        raise StructureError(f"nnx.count_parameters takes a Module or a State, got {type(model).__name__}")
    return sum(_numbers(value) for value in model.filter(filter).raw_values)


def _numbers(value: Any) -> int:
    return sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(value))


def _bytes(value: Any) -> int:
    return sum(math.prod(jnp.shape(leaf)) * _dtype(leaf).itemsize for leaf in jax.tree.leaves(value))


def _dtype(leaf: Any) -> Any:
    return leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)


def abstract(value: Any) -> Any:
    """A value with `jax.ShapeDtypeStruct` in the place of its arrays."""

    def shape(leaf: Any) -> Any:
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        return type(leaf) if isinstance(leaf, Object) else leaf

    return jax.tree.map(shape, value, is_leaf=lambda item: isinstance(item, Object))


def _cell_type(cell: Any) -> type:
    return jax.Array if isinstance(cell, Buffer) else type(cell)


# -- The trace


class _Recorder:
    """What the Modules of one trace were seen to do, by their number in the walk of the model."""

    def __init__(self, token: int, paths: Sequence[Path]) -> None:
        self.token = token
        self.paths = paths
        self.calls: dict[int, int] = {}
        self.outputs: dict[int, Any] = {}
        self.flops: dict[int, int] = {}
        self.count = itertools.count()

    def mark(self, model: Module) -> None:
        """Number the Modules, which are copies made for this trace.

        The number is a static attribute, so that it is still there in the copies that a transform inside makes, and
        the token in it makes those transforms trace anew: what they trace is what is recorded.
        """
        for number, item in enumerate(walk((model,)).objects):
            if isinstance(item, Module):
                invalidate(item)
                item.__dict__[_MARK] = (self.token, number)

    def call(self, module: Module, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        token, number = module.__dict__.get(_MARK, (None, 0))
        if token != self.token:
            return function(*args, **kwargs)
        try:
            with scope(number, next(self.count)):
                out = function(*args, **kwargs)
        except Exception as error:
            notes = getattr(error, "__notes__", ())
            if not any(note.startswith(_NOTE) for note in notes):
                where = f"`{path_text(self.paths[number])}`" if self.paths[number] else "the model itself"
                given = ", ".join([*map(_short, args), *(f"{name}={_short(item)}" for name, item in kwargs.items())])
                error.add_note(f"{_NOTE} {where}, a {type(module).__name__}, with ({given})")
            raise
        self.calls[number] = self.calls.get(number, 0) + 1
        self.outputs.setdefault(number, abstract(out))
        return out


_MARK = "_nnx_summary"
_NOTE = "nnx.tabulate: in the call of"
_tokens = itertools.count()
_patching = threading.RLock()
_active = threading.local()


def _short(value: Any) -> str:
    from nnx.core._table import value_text

    return value_text(abstract(value))


def _trace(model: Any, graph: Graph, args: Any, kwargs: Any) -> _Recorder:
    recorder = _Recorder(next(_tokens), graph.moduledef.node_paths())
    owner = getattr(model, "__self__", model)
    # Taken from the class: an instance's own `__call__` is the one that is watched.
    method = type(owner).__call__ if model is owner else model.__func__

    def function(module: Any, *given: Any, **named: Any) -> None:
        recorder.mark(module)
        bound = module if model is owner else method.__get__(module, type(module))
        bound(*given, **named)

    lifted, _ = lift_callable(function, "nnx.tabulate")
    call = Call((owner, *args), kwargs)
    operands = Operands(call, "arrays")
    with unnoted(), _watching({type(item) for item in graph.objects if isinstance(item, Module)}, recorder):
        closed = jax.make_jaxpr(lambda dynamic: call.run(lifted, operands.leaves(dynamic)))(operands.dynamic)
    counted = count_flops(closed)
    recorder.flops = counted.flops
    # JAX traces some bodies twice and keeps the second: what left no trace in the jaxpr did not happen.
    recorder.calls |= {number: len(found) for number, found in counted.calls.items()}
    return recorder


@contextmanager
def _watching(kinds: set[type], recorder: _Recorder) -> Iterator[None]:
    """Have the calls of some classes' instances pass by a recorder, in this thread."""
    owners = {base for kind in kinds for base in kind.__mro__ if "__call__" in base.__dict__ and base is not object}
    before = getattr(_active, "recorder", None)
    with _patching:
        originals = {base: base.__dict__["__call__"] for base in owners}
        try:
            for base, original in originals.items():
                type.__setattr__(base, "__call__", _watched(original))
            _active.recorder = recorder
            yield
        finally:
            _active.recorder = before
            for base, original in originals.items():
                type.__setattr__(base, "__call__", original)


def _watched(original: Any) -> Any:
    @functools.wraps(original, updated=())
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        function = original.__get__(self, type(self))
        recorder = getattr(_active, "recorder", None)
        return function(*args, **kwargs) if recorder is None else recorder.call(self, function, args, kwargs)

    return call


# -- The rows


def _rows(graph: Graph, recorder: _Recorder | None) -> list[SummaryRow]:
    """The rows of a graph, depth first; every object's data before its submodules."""
    definition = graph.moduledef
    first_objects: dict[int, Path] = {}
    first_cells: dict[int, Path] = {}
    rows: list[SummaryRow] = []
    stack: list[tuple[int, Path]] = [(definition.roots[0], ())]
    while stack:
        index, path = stack.pop()
        kind = definition.nodes[index].type
        if index in first_objects:
            rows.append(SummaryRow(path, kind, True, shared_with=first_objects[index]))
            continue
        first_objects[index] = path
        calls = recorder.calls.get(index, 0) if recorder is not None else 0
        rows.append(
            SummaryRow(
                path,
                kind,
                True,
                value=recorder.outputs.get(index) if recorder is not None else None,
                calls=calls,
                flops=recorder.flops[index] if recorder is not None and calls else None,
            )
        )
        attributes = definition.nodes[index].attributes
        for name, how, payload in attributes:
            if how is CELL:
                cell, own = graph.cells[payload], (*path, name)
                row = SummaryRow(own, _cell_type(cell), False, value=abstract(cell._value))
                if payload in first_cells:
                    rows.append(dataclasses.replace(row, shared_with=first_cells[payload]))
                    continue
                first_cells[payload] = own
                numbers = _numbers(cell._value) if isinstance(cell, Param) else 0
                rows.append(dataclasses.replace(row, parameters=numbers, bytes=_bytes(cell._value)))
        stack.extend((payload, (*path, name)) for name, how, payload in reversed(attributes) if how is OBJECT)
    return _with_sums(rows)


def _with_sums(rows: list[SummaryRow]) -> list[SummaryRow]:
    """Give each Module the sums of its data and of its submodules."""
    sums: dict[Path, tuple[int, int]] = {}
    out = list(rows)
    for i in range(len(rows) - 1, -1, -1):
        row = rows[i]
        if row.is_module and row.shared_with is None:
            count, size = sums.get(row.path, (0, 0))
            row = out[i] = dataclasses.replace(row, parameters=count, bytes=size)
        if row.path:
            count, size = sums.get(row.path[:-1], (0, 0))
            sums[row.path[:-1]] = (count + row.parameters, size + row.bytes)
    return out
