"""The cached layout against a fresh walk: however an edit comes, the cache must never be behind."""

import copy
import gc
import pickle

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import nnx
from nnx.core._context import RngStream
from nnx.core._graph import walk
from nnx.core._layout import layout_after, layout_of, values_of, walk_in_turn
from nnx.core._object import plain_attributes

NAMES = st.sampled_from(["a", "b", "c", "w", "items", "2", "10"])
NUMBERS = st.integers(0, 5)
STATICS = st.one_of(
    st.integers(0, 3),
    st.sampled_from([0.0, -0.0, True, None, "x", "relu"]),
    st.lists(st.integers(0, 2), max_size=2),
    st.dictionaries(st.sampled_from(["k", "l"]), st.integers(0, 2), max_size=2),
)


class Count(nnx.Variable):
    pass


class Holder(nnx.Module):
    """A Module that edits may do anything to."""

    def __init__(self, value: float = 0.0) -> None:
        self.w = nnx.Param(jnp.float32(value))
        self.plain = [1, 2]


class Config:
    """A config object, compared by its fields and edited in place."""

    def __init__(self) -> None:
        self.rate = 0


class Edits(RuleBasedStateMachine):
    """Two roots, which come to share parts, and every edit that there is."""

    @initialize()
    def start(self) -> None:
        self.roots = [Holder(1.0), Holder(2.0)]
        self.pool = list(self.roots)

    def _module(self, number: int) -> nnx.Module:
        return self.pool[number % len(self.pool)]

    def _new(self) -> Holder:
        module = Holder(float(len(self.pool)))
        self.pool = [*self.pool[:2], *self.pool[2:][-4:], module]
        return module

    def _cells(self, module: nnx.Module) -> list[str]:
        return [name for name in module._nnx.cells if not isinstance(module._nnx.cells[name], nnx.Static)]

    def _free(self, module: nnx.Module, name: str) -> None:
        """Make room, since an attribute keeps its kind."""
        if name in module._nnx.cells or name in plain_attributes(module):
            delattr(module, name)

    @rule(number=NUMBERS, name=NAMES, value=STATICS)
    def assign_static(self, number: int, name: str, value: object) -> None:
        module = self._module(number)
        if name in module._nnx.cells:
            self._free(module, name)
        setattr(module, name, value)

    @rule(number=NUMBERS)
    def edit_list_in_place(self, number: int) -> None:
        for value in vars(self._module(number)).values():
            if isinstance(value, list):
                value.append(len(value))
            elif isinstance(value, dict):
                value["z"] = len(value)
            elif isinstance(value, Config):
                value.rate += 1

    @rule(number=NUMBERS, name=NAMES)
    def assign_config(self, number: int, name: str) -> None:
        module = self._module(number)
        self._free(module, name)
        setattr(module, name, Config())

    @rule(number=NUMBERS, name=NAMES, kind=st.sampled_from([nnx.Param, nnx.BatchStat, Count, nnx.Node, None]))
    def assign_data(self, number: int, name: str, kind: type | None) -> None:
        module = self._module(number)
        self._free(module, name)
        value = jnp.float32(number)
        setattr(module, name, value if kind is None else kind(value))

    @rule(number=NUMBERS, name=NAMES, array=st.sampled_from([np.zeros(2), np.ones(2)]))
    def assign_explicit_static(self, number: int, name: str, array: np.ndarray) -> None:
        module = self._module(number)
        self._free(module, name)
        setattr(module, name, nnx.Static(array.copy()))

    @rule(number=NUMBERS)
    def write_values(self, number: int) -> None:
        module = self._module(number)
        for name in self._cells(module):
            setattr(module, name, jnp.float32(7))

    @rule(number=NUMBERS, name=NAMES)
    def delete(self, number: int, name: str) -> None:
        self._free(self._module(number), name)

    @rule(number=NUMBERS, name=NAMES)
    def assign_module(self, number: int, name: str) -> None:
        module = self._module(number)
        self._free(module, name)
        setattr(module, name, self._new())

    @rule(number=NUMBERS, other=NUMBERS, name=NAMES)
    def share_module(self, number: int, other: int, name: str) -> None:
        module = self._module(number)
        self._free(module, name)
        setattr(module, name, self._module(other))

    @rule(number=NUMBERS, other=NUMBERS, name=NAMES)
    def tie(self, number: int, other: int, name: str) -> None:
        source, module = self._module(other), self._module(number)
        names = [item for item in self._cells(source) if isinstance(source._nnx.cells[item], (nnx.Variable, nnx.Node))]
        if names:
            cell = source.get_variable(names[0])
            if name not in module._nnx.cells or module._nnx.cells[name] is not cell:
                self._free(module, name)
            setattr(module, name, cell)

    @rule(number=NUMBERS, name=NAMES)
    def assign_sequence(self, number: int, name: str) -> None:
        module = self._module(number)
        self._free(module, name)
        setattr(module, name, [self._new(), self._module(number + 1)])

    @rule(number=NUMBERS, what=st.sampled_from(["append", "insert", "delete", "reverse", "slice"]))
    def edit_sequence(self, number: int, what: str) -> None:
        for value in list(vars(self._module(number)).values()):
            if isinstance(value, nnx.Sequence):
                if what == "append":
                    value.append(self._new())
                elif what == "insert":
                    value.insert(0, self._new())
                elif what == "delete" and len(value):
                    del value[-1]
                elif what == "reverse":
                    value.reverse()
                elif what == "slice":
                    value[:1] = []

    @rule(number=NUMBERS, name=st.sampled_from(["a", "b"]))
    def edit_dict(self, number: int, name: str) -> None:
        module = self._module(number)
        blocks = plain_attributes(module).get("blocks")
        if not isinstance(blocks, nnx.Dict):
            self._free(module, "blocks")
            module.blocks = {"first": self._new()}
        elif name in blocks:
            del blocks[name]
        else:
            blocks[name] = self._new()

    @rule(number=NUMBERS)
    def method_of_part(self, number: int) -> None:
        module = self._module(number)
        self._free(module, "bound")
        module.bound = module.get_module_def if number % 2 else module.get_state

    @rule(number=NUMBERS)
    def pop(self, number: int) -> None:
        self._module(number).pop_state(Count)

    @rule(number=NUMBERS)
    def update(self, number: int) -> None:
        module = self._module(number)
        module.update_state(module.get_state().map(lambda path, value: value * 2))

    @rule(number=NUMBERS, other=NUMBERS)
    def update_structure(self, number: int, other: int) -> None:
        module, source = self._module(number), self._module(other)
        if type(module) is type(source):
            module.update_state(source.clone())

    @rule(number=NUMBERS, what=st.sampled_from(["write", "add", "delete", "static", "swap", "list"]))
    def edit_under_jit(self, number: int, what: str) -> None:
        def edit(module: nnx.Module) -> None:
            if what == "write" and "w" in self._cells(module):
                module.w = jnp.float32(3) * 2
            elif what == "add":
                self._free(module, "fresh")
                module.fresh = Count(jnp.float32(1))
            elif what == "delete":
                self._free(module, "fresh")
            elif what == "static":
                self._free(module, "rate")
                module.rate = number
            elif what == "swap":
                self._free(module, "part")
                module.part = Holder(5.0)
            elif what == "list" and isinstance(plain_attributes(module).get("plain"), list):
                module.plain.append(9)

        nnx.jit(edit)(self._module(number))

    @rule(number=NUMBERS, how=st.sampled_from(["copy", "deepcopy", "pickle", "clone"]))
    def replace_by_copy(self, number: int, how: str) -> None:
        source = self._module(number)
        copies = {
            "copy": copy.copy,
            "deepcopy": copy.deepcopy,
            "pickle": lambda module: pickle.loads(pickle.dumps(module)),
            "clone": lambda module: module.clone(),
        }
        made = copies[how](source)
        assert made.partition()[1] is not None
        self.roots[1] = made
        self.pool = [self.roots[0], made, *self.pool[2:]]

    @invariant()
    def layouts_agree_with_a_walk(self) -> None:
        if not hasattr(self, "roots"):
            return
        for root in self.roots:
            layout, fresh = layout_of(root), walk((root,))
            assert layout.moduledef is fresh.moduledef
            assert len(layout.cells) == len(fresh.cells)
            assert all(held is found for held, found in zip(layout.cells, fresh.cells, strict=True))
            assert all(
                held is cell._value or isinstance(cell, RngStream)
                for held, cell in zip(values_of(layout), fresh.cells, strict=True)
            )
        first, second = self.roots
        joint = layout_after(second, [first], [layout_of(first)])
        _, graph = walk_in_turn(self.roots)
        assert joint.moduledef is graph.moduledef
        assert all(held is found for held, found in zip(joint.cells, graph.cells, strict=True))

    @invariant()
    def the_compiled_function_sees_what_is_there(self) -> None:
        if not hasattr(self, "roots"):
            return
        first, second = self.roots
        eager = jax.tree.leaves((first.get_state(), second.get_state()))
        jitted = jax.tree.leaves(_read(first, second))
        assert len(eager) == len(jitted)
        for seen, there in zip(jitted, eager, strict=True):
            np.testing.assert_array_equal(seen, there)

    def teardown(self) -> None:
        # A compiled function for every structure met would fill the memory of a long run.
        _read.clear_cache()
        gc.collect()


@nnx.jit
def _read(first: nnx.Module, second: nnx.Module) -> tuple[nnx.State, nnx.State]:
    return first.get_state(), second.get_state()


TestEdits = Edits.TestCase
TestEdits.settings = settings(
    max_examples=25,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
