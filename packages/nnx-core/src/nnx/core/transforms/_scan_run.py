"""One call of a scanned function: what goes in by which axis, one trace of the body, the loop, and what comes out."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from nnx.core._context import RngStream
from nnx.core._errors import StructureError, VariableError
from nnx.core._graph import walk
from nnx.core._state import path_text
from nnx.core._variable import Intermediate
from nnx.core.transforms._axes import (
    BROADCAST,
    CARRY,
    CARRY_ALL,
    FRESH,
    PARTITION_NAME,
    SPLIT,
    Category,
    Change,
    Rules,
    Split,
    changes,
    common_size,
    mapped_definition,
    mapped_sizes,
    unmapped_definition,
    without,
)
from nnx.core.transforms._first import First, Numbers, either, numbers_of, reads, restructures
from nnx.core.transforms._inputs import Call
from nnx.core.transforms._invariant import hoisted, used_constants, varying
from nnx.core.transforms._join import live_places
from nnx.core.transforms._lift import Packed
from nnx.core.transforms._loops import check_returned, is_hole, settled
from nnx.core.transforms._outcome import Outcome, distinct, finish
from nnx.core.transforms._scan_axes import axes_of_rest, is_constructor, joined, leaf_axes, moved, parts
from nnx.core.transforms._staging import Once, grow, zeros_of

__all__ = ["Run"]


LAST: Final = Category("as the last layer made it")
"""What a constructor makes and no axis or layer owns."""


class Run:
    """One call of a scanned function.

    Each value of the call has a slot: (leaf, position), with position -1 for what is no Module.
    """

    def __init__(
        self,
        function: Any,
        rules: Rules,
        options: Mapping[str, Any],
        bound: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self.function, self.rules, self.options = function, rules, options
        self.call = call = Call(args, kwargs)
        self.makes = is_constructor(function)
        self.axes, self.carried = leaf_axes(call, args, options["in_axes"], bound, self.makes)
        defaults = [_default(self.axes[i]) for i in call.packed]
        self.assigned = rules.assign(call, defaults)
        self.roots = {position: k for k, position in enumerate(call.packed)}
        self.length = common_size("nnx.scan", mapped_sizes(call, self.axes, self.assigned), options["length"])
        self.split = Split(call, self.assigned, self.length)
        self.first: First | None = None
        self._before = self
        self.definitions: dict[int, Any] = {}
        self.carry: dict[tuple[int, int], Any] = {}
        self.xs: dict[tuple[int, int], Any] = {}
        for i, leaf in enumerate(call.leaves):
            if type(leaf) is not Packed:
                self._sort((i, -1), leaf, self.axes[i])
                continue
            root = self.roots[i]
            categories = self.assigned[root]
            sliced = any(isinstance(category, int) for category in categories)
            self.definitions[i] = mapped_definition(leaf.moduledef, categories) if sliced else leaf.definition
            for position, (value, category) in enumerate(zip(leaf.values, categories, strict=True)):
                self._sort((i, position), value, category)

    # What goes in

    def _sort(self, slot: tuple[int, int], value: Any, category: Any) -> None:
        if category is CARRY or category is CARRY_ALL:
            self.carry[slot] = value
        elif category is SPLIT:
            self.xs[slot] = self.split.keys[self.roots[slot[0]], slot[1]]
        elif isinstance(category, int):
            self.xs[slot] = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, category, 0), value)

    def _leaves(self, carry: Sequence[Any], xs: Sequence[Any]) -> list[Any]:
        found = {**dict(zip(self.carry, carry, strict=True)), **dict(zip(self.xs, xs, strict=True))}
        leaves = []
        for i, leaf in enumerate(self.call.leaves):
            if type(leaf) is not Packed:
                leaves.append(found.get((i, -1), leaf))
                continue
            values = list(leaf.values)
            for position, category in enumerate(self.assigned[self.roots[i]]):
                if (i, position) in found:
                    value = found[i, position]
                    values[position] = (value, np.uint32(0)) if category is SPLIT else value
            leaves.append(Packed(self.definitions[i], values))
        return leaves

    def trace(self) -> Once:
        """Trace the body for one run."""

        def body(carry: list[Any], xs: list[Any]) -> Any:
            out, values, outcome = self.call.run(self.function, self._leaves(carry, xs))
            split = (None, out) if self.carried is None else parts(self.function, out, self.options["out_axes"])
            return split, (out if self.makes else None, values, outcome)

        def first(x: Any) -> Any:
            if not self.length:
                return jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
            return jax.eval_shape(lambda x: jax.lax.index_in_dim(x, 0, keepdims=False), x)

        return Once(body, list(self.carry.values()), jax.tree.map(first, list(self.xs.values())))

    # What comes out

    def _category(self, change: Change) -> Any:
        if change.place is not None:
            category = self.assigned[change.place[0]][change.place[1]]
            return 0 if category is FRESH else category
        found = self.rules.explicit(*change.entry, None)
        if found is CARRY and self.makes:
            return LAST
        if found is not None:
            return found
        return 0 if self.makes or issubclass(change.entry[1], Intermediate) else CARRY

    def _is_split(self, change: Change) -> bool:
        return change.place is not None and self.assigned[change.place[0]][change.place[1]] is SPLIT

    def _kept(self, once: Once) -> tuple[list[tuple[int, Change, Any]], Outcome]:
        """The changes that come out, each with the number of its value and its category."""
        _, (_, _, outcome) = once.out
        every = changes(self.call.frame, outcome)
        outcome, kept = without(self.call.frame, outcome, self._is_split)
        return [
            (i, change, self._category(change))
            for i, (change, keep) in enumerate(zip(every, kept, strict=True))
            if keep
        ], outcome

    def must_grow(self, once: Once) -> bool:
        """Whether the body makes Variables that are carried, or changes a structure that the next run finds."""
        if any(change.place is None and category is CARRY for _, change, category in self._kept(once)[0]):
            return True
        outcome = once.out[1][2]
        if self.makes or outcome.post is None:
            return False
        # Where Variables have the axis, each run has a layer of its own, and finds it as it was.
        roots = self.call.frame.roots
        layers = [
            root
            for root, place, own in zip(roots, self.call.packed, self.assigned, strict=True)
            if any(isinstance(axis, int) for axis in (self.axes[place], *own))
        ]
        own = {id(item) for item in walk(distinct(layers)).objects} if layers else set()
        before = walk(distinct(roots))
        exempt = {number for number, item in enumerate(before.objects) if id(item) in own}
        return restructures(before.moduledef, outcome, exempt)

    def grow(self, once: Once) -> None:
        """Make these Variables before the first run, as zeros."""
        _, (_, values, outcome) = once.out
        axes = {change.number: category for _, change, category in self._kept(once)[0] if change.place is None}

        shared = {change.number: i for i, change, category in self._kept(once)[0] if category is BROADCAST}
        constant = self._constant(once, self._kept(once)[0])

        def start(index: int, shape: Any) -> Any:
            if index in shared:
                return constant[shared[index]]
            value = zeros_of(shape)
            axis = axes.get(index)
            if not isinstance(axis, int):
                return value
            return jnp.moveaxis(jnp.broadcast_to(value, (self.length, *value.shape)), 0, axis)

        grow(self.call, values, outcome, start)

    def note_first(self, before: Run, once_before: Once, once: Once) -> None:
        """Run the body as it found the structure first, if that is another computation than what the runs after it do.

        Raises:
            StructureError: a run would see a slice of its own of what the first run makes for all.
        """
        first = First(before.call.frame, once_before, self.call.frame, once_before.out[1][2])
        slots = {(root, position): (self.call.packed[root], position) for root, position in first.made}
        numbers = self._numbers(once)
        sliced = [slot for place, slot in slots.items() if slot in self.xs and reads(once, list(numbers.inputs[place]))]
        if sliced:
            names = [self._slot_name(slot) for slot in sliced]
            raise StructureError(
                f"the body of nnx.scan makes {', '.join(names)}, of which each run has a slice of its own, together "
                "with Variables that are carried, and reads it: the runs after the first would find it, and not make "
                "it. Make it before the scan"
            )
        if first.differs(once, before._numbers(once_before, first=True), numbers):
            self.first, self._before = first, before

    def _numbers(self, once: Once, *, first: bool = False) -> Numbers:
        """Which inputs and outputs of the traced body are what."""
        carry, xs = numbers_of((list(self.carry.values()), list(self.xs.values())))
        inputs = dict(zip([*self.carry, *self.xs], [*carry, *xs], strict=True))
        places = {
            (self.roots[leaf], position): jax.tree.leaves(number)
            for (leaf, position), number in inputs.items()
            if position >= 0
        }
        others = [number for (_, position), number in inputs.items() if position < 0]
        (carry_out, y), (_, values, outcome) = numbers_of(once.out)
        out = jax.tree.leaves((carry_out, y))
        if first:
            return Numbers(others, places, out, list(map(jax.tree.leaves, values)), {})
        written = {
            change.place: jax.tree.leaves(values[i]) for i, change in enumerate(changes(self.call.frame, outcome))
        }
        return Numbers(others, places, out, written, self._draws(outcome))

    def _slot_name(self, slot: tuple[int, int]) -> str:
        root = self.roots[slot[0]]
        path = self.call.frame.layouts[root].moduledef.schema.paths[slot[1]]
        return f"`{path_text(path)}` of the {type(self.call.frame.roots[root]).__name__}"

    def _run_first(self, once: Once, carry: Sequence[Any], xs: Sequence[Any]) -> Any:
        """What the run gives that makes Variables, as `_run_later` gives it."""
        first, before = self.first, self._before
        assert first is not None
        given = {**dict(zip(self.carry, carry, strict=True)), **dict(zip(self.xs, xs, strict=True))}

        def value(slot: tuple[int, int], own: Any) -> Any:
            leaf, position = slot
            at = first.place(self.roots[leaf], position) if position >= 0 else None
            if position >= 0 and at is None:  # what it lets go of, no later run has
                return self._first_slice(own) if slot in before.xs else own
            return given.get(slot if at is None else (self.call.packed[at[0]], at[1]), own)

        inputs = [[value(slot, own) for slot, own in part.items()] for part in (before.carry, before.xs)]
        (carry_out, y), (_, values, _) = first.run(*inputs)
        written = first.written(values)
        following = self._following(carry, carry_out, written, first.drawn)
        slices = [
            written[change.place]
            if change.place in written
            else given[self.call.packed[change.place[0]], change.place[1]]
            for _, change, category in self._kept(once)[0]
            if isinstance(category, int) and change.place is not None
        ]
        return following, (y, slices)

    def _first_slice(self, value: Any) -> Any:
        at = self.length - 1 if self.options["reverse"] else 0
        return jax.tree.map(
            lambda leaf: leaf[at] if self.length else zeros_of(jax.typeof(leaf).update(shape=leaf.shape[1:])), value
        )

    def _run_later(self, once: Once, carry: Sequence[Any], xs: Sequence[Any]) -> Any:
        result = once(carry, xs)
        (_, y), (_, values, _) = result
        slices = [values[i] for i, _, category in self._kept(once)[0] if _is_stacked(category)]
        return self._next_carry(once, carry, result), (y, slices)

    def _next_carry(self, once: Once, carry: Sequence[Any], result: Any, *, abstract: bool = False) -> list[Any]:
        (carry_out, _), (_, values, _) = result
        places = {change.place: values[i] for i, change, category in self._kept(once)[0] if category is CARRY}
        return self._following(carry, carry_out, places, {} if abstract else self._draws(once.out[1][2]))

    def _following(self, carry: Sequence[Any], carry_out: Any, places: Any, draws: Any) -> list[Any]:
        leaves: dict[int, Any] = {}
        if self.carried is not None:
            span = self.call.spans[self.carried]
            leaves = dict(zip(range(*span), jax.tree.leaves(carry_out, is_leaf=is_hole), strict=True))
        following = []
        for (i, position), value in zip(self.carry, carry, strict=True):
            if position < 0:
                following.append(leaves[i])
                continue
            place = (self.roots[i], position)
            keys = draws.get(place, 0)
            following.append(places.get(place, (value[0], value[1] + np.uint32(keys)) if keys else value))
        return following

    def _draws(self, outcome: Outcome) -> dict[tuple[int, int], int]:
        if outcome.post is None:
            return {(root, position): keys for root, position, keys in outcome.draws}
        at = live_places(self.call.frame)
        return {at[outcome.cells[i]]: keys for _, i, keys in outcome.draws}

    def settle(self, once: Once) -> bool:
        """Check the carry, and give what goes into the first run the types of what comes out of it."""
        if self.carried is not None:
            span = self.call.spans[self.carried]
            check_returned("nnx.scan", self.call, span, self.call.structure(self.carried), once.out[0][0])
        following = self._next_carry(once, list(self.carry.values()), once.out, abstract=True)
        changed = False
        for (i, position), new in zip(list(self.carry), following, strict=True):
            own = self.carry[i, position]
            if position < 0:
                start = self.call.spans[self.carried][0] if self.carried is not None else 0
                value = settled("nnx.scan", f"leaf {i - start} of the carry", own, new)
            else:
                root = self.roots[i]
                path, kind, _ = self.call.frame.layouts[root].moduledef.schema.entries[position]
                name = f"`{path_text(path)}` of the {type(self.call.frame.roots[root]).__name__}"
                value = settled("nnx.scan", name, own, new, variable=True, fresh=issubclass(kind, Intermediate))
            changed = changed or value is not own
            self.carry[i, position] = value
        return changed

    def finish(self, once: Once) -> Any:
        """Run, and write back."""
        kept, outcome = self._kept(once)
        if outcome.lost:
            names = [change.name for _, change, _ in kept if change.place is not None and change.number is None]
            raise VariableError(
                f"the body of nnx.scan writes to {', '.join(names)} and then lets go of it: the runs after it would "
                "not find it. Keep the attribute, or leave its value alone"
            )
        constant = self._constant(once, kept)
        stacked = [(i, category) for i, _, category in kept if _is_stacked(category)]

        def step(state: Any, xs: list[Any]) -> Any:
            carry, is_first = state
            later = functools.partial(self._run_later, once)
            if self.first is None:
                carry, given = later(carry, xs)
                return (carry, is_first), given
            carry, given = either(is_first, functools.partial(self._run_first, once), later, carry, xs)
            return (carry, jnp.bool_(False)), given

        (final, _), (ys, slices) = jax.lax.scan(
            step,
            (list(self.carry.values()), None if self.first is None else jnp.bool_(True)),
            list(self.xs.values()),
            length=self.length,
            reverse=self.options["reverse"],
            unroll=self.options["unroll"],
        )
        found = dict(constant)
        for (i, axis), value in zip(stacked, slices, strict=True):
            found[i] = jax.tree.map(functools.partial(self._whole, axis), value)
        last = dict(zip(self.carry, final, strict=True))
        for i, change, category in kept:
            if category is CARRY and change.place is not None:
                root, position = change.place
                found[i] = last[self.call.packed[root], position]
        values = [found[i] for i, _, _ in kept]
        out = self._output(once, ys, last)
        result = finish(self.call.frame, out, values, self._outcome_outside(outcome, kept))
        if self.first is not None:
            self._finish_first(last, {change.place for _, change, _ in kept})
        self.split.finish()
        return result

    def _whole(self, axis: Any, stacked: Any) -> Any:
        if axis is not LAST:
            return jnp.moveaxis(stacked, 0, axis)
        return stacked[0 if self.options["reverse"] else -1]

    def _finish_first(self, last: Mapping[tuple[int, int], Any], written: set[Any]) -> None:
        """Write what is carried and what the first run alone writes, and what each stream came to."""
        places = [
            (self.roots[leaf], position)
            for leaf, position in self.carry
            if position >= 0 and (self.roots[leaf], position) not in written
        ]
        layouts = self.call.frame.layouts
        writes: dict[int, list[int]] = {}
        for root, position in sorted(places):
            writes.setdefault(root, []).append(position)
        streams = any(isinstance(layouts[root].cells[position], RngStream) for root, position in places)
        values = [last[self.call.packed[root], position] for root, position in sorted(places)]
        outcome = Outcome(tuple((root, tuple(positions)) for root, positions in writes.items()), streams=streams)
        finish(self.call.frame, None, values, outcome)

    def _constant(self, once: Once, kept: Sequence[tuple[int, Change, Any]]) -> dict[int, Any]:
        """The values of shared Variables that the body wrote, computed outside of the loop."""
        wanted = [(i, change) for i, change, category in kept if category is BROADCAST]
        if not wanted:
            return {}
        numbers = jax.tree.unflatten(jax.tree.structure(once.out), list(range(len(once.closed.out_avals))))
        values = numbers[1][1]
        differs = varying(once.closed)
        bad = [change.name for i, change in wanted if any(differs[k] for k in jax.tree.leaves(values[i]))]
        if bad:
            raise VariableError(
                f"inside of nnx.scan the shared {', '.join(bad)} got values that differ from run to run. Carry it, "
                "variable_carry=filter, or give each run its own, variable_axes={filter: 0}"
            )
        positions = [k for i, _ in wanted for k in jax.tree.leaves(values[i])]
        self._check_reads(once, [change for _, change in wanted])
        found = iter(hoisted(once.closed, positions))
        return {i: jax.tree.map(lambda _: next(found), values[i]) for i, _ in wanted}

    def _check_reads(self, once: Once, wanted: Sequence[Change]) -> None:
        """What a run reads of a shared Variable before it writes it would be the same in the runs after it."""
        layouts = self.call.frame.layouts
        own = {
            id(leaf): change.name
            for change in wanted
            if change.place is not None and change.entry[1] is not RngStream  # which all runs draw the same from
            for leaf in jax.tree.leaves(layouts[change.place[0]].cells[change.place[1]]._value)
        }
        bad = {own[id(value)] for value in used_constants(once.closed) if id(value) in own}
        if bad:
            raise VariableError(
                f"inside of nnx.scan the shared {', '.join(sorted(bad))} is read and then written: the runs after the "
                "first would not see what was written. Carry it, variable_carry=filter, or only read it"
            )

    def _output(self, once: Once, ys: Any, last: Mapping[tuple[int, int], Any]) -> Any:
        out_axes = axes_of_rest(self.options["out_axes"])
        if out_axes not in (0, None) or (out_axes is None and self.carried is None):
            ys = moved(out_axes if out_axes is not None else 0, ys)
        if self.makes:
            return once.out[1][0] if is_hole(once.out[1][0]) else ys
        if self.carried is None:
            return ys
        tree = self.call.structure(self.carried)
        span = self.call.spans[self.carried]
        holes = jax.tree.leaves(once.out[0][0], is_leaf=is_hole)
        leaves = [hole if is_hole(hole) else last[i, -1] for i, hole in zip(range(*span), holes, strict=True)]
        return joined(jax.tree.unflatten(tree, leaves), ys, self.options["out_axes"])

    def _outcome_outside(self, outcome: Outcome, kept: Sequence[tuple[int, Change, Any]]) -> Outcome:
        """The Outcome as the caller sees it: draws of all runs, and the metadata of the whole axis."""
        times = self._times
        if outcome.post is None:
            return outcome._replace(
                draws=tuple((root, position, keys * times((root, position))) for root, position, keys in outcome.draws)
            )
        at = live_places(self.call.frame)
        axes = {change.number: category for _, change, category in kept}
        every: list[Any] = []
        originals: list[Any] = []
        for i, origin in enumerate(outcome.cells):
            if origin < 0:
                every.append(axes.get(i))
                originals.append(None)
            else:
                root, position = at[origin]
                every.append(self.assigned[root][position])
                originals.append(self.call.frame.layouts[root].moduledef.schema.entries[position][2])
        name = (self.options["metadata_params"] or {}).get(PARTITION_NAME)
        assert outcome.post is not None
        return outcome._replace(
            post=unmapped_definition(outcome.post, every, originals, name),
            draws=tuple((-1, i, keys * times(at[outcome.cells[i]])) for _, i, keys in outcome.draws),
        )

    def _times(self, place: tuple[int, int]) -> int:
        if self.first is not None and self.assigned[place[0]][place[1]] is CARRY:
            return 0  # the count is carried
        return self.length if self.assigned[place[0]][place[1]] is CARRY else 1


def _is_stacked(category: Any) -> bool:
    return isinstance(category, int) or category is LAST


def _default(axis: Any) -> Any:
    return BROADCAST if axis is None else axis
