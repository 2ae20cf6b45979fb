"""while_loop and fori_loop: a body runs again and again on the same Modules."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from nnx.core._context import RngStream
from nnx.core._errors import StructureError, VariableError
from nnx.core._explain import attribute_differences
from nnx.core._graph import walk
from nnx.core._state import path_text
from nnx.core._variable import Intermediate
from nnx.core.transforms._callable import lift_callable
from nnx.core.transforms._first import First, Numbers, either, numbers_of
from nnx.core.transforms._inputs import Call
from nnx.core.transforms._lift import Packed
from nnx.core.transforms._outcome import HoleNode, Outcome, distinct, finish, identity_differences
from nnx.core.transforms._staging import Once, Operands, grow, stage, zeros_of

__all__ = ["check_returned", "fori_loop", "is_hole", "raise_unstable", "settled", "while_loop", "written_values"]

T = TypeVar("T")


def while_loop(cond_fun: Callable[[T], Any], body_fun: Callable[[T], T], init_val: T) -> T:
    """Call a body on Modules, Contexts and arrays while a condition holds, as `jax.lax.while_loop` does.

    What the body writes is there in its next run, and in place when the loop has ended.

    Args:
        cond_fun: `cond_fun(val)` gives a boolean scalar, and changes nothing.
        body_fun: `body_fun(val)` returns the next `val`: Modules as they are, arrays of the same shapes and dtypes.
        init_val: a pytree of Modules, Contexts and arrays.

    Returns:
        The last `val`, in which the Modules are those of `init_val`. What the body changes of their structure is
        changed even if it never ran, since that is known only when the compiled code runs; a Variable that it makes
        is zero then.

    Raises:
        StructureError: the body returns another structure, or changes the Modules' structure in each run.
        VariableError: a Variable comes out of the body with another shape or dtype, or the condition writes to one.

    Example:
        >>> import jax.numpy as jnp, nnx
        >>> class Counter(nnx.Module):
        ...     def __init__(self):
        ...         self.count = nnx.var("counts", jnp.int32(0))
        >>> def body(counter):
        ...     counter.count += 2
        ...     return counter
        >>> counter = Counter()
        >>> nnx.while_loop(lambda counter: counter.count < 5, body, counter) is counter, int(counter.count)
        (True, 6)
    """
    condition, condition_bound = lift_callable(cond_fun, "nnx.while_loop")
    body, body_bound = lift_callable(body_fun, "nnx.while_loop")
    implementation = functools.partial(_while, condition, body)
    args = (condition_bound, body_bound, init_val)
    return stage("nnx.while_loop", (body, condition), None, implementation, args, {}, "flags")


def fori_loop(
    lower: Any, upper: Any, body_fun: Callable[[Any, T], T], init_val: T, *, unroll: int | bool | None = None
) -> T:
    """Call a body on Modules, Contexts and arrays for each integer of a range, as `jax.lax.fori_loop` does.

    Args:
        lower: the first integer.
        upper: the integer after the last.
        body_fun: `body_fun(i, val)` returns the next `val`: Modules as they are, arrays of the same shapes and dtypes.
        init_val: a pytree of Modules, Contexts and arrays.
        unroll: as for `jax.lax.fori_loop`.

    Returns:
        The last `val`; see `while_loop`.

    Raises:
        StructureError: the body returns another structure, or changes the Modules' structure in each run.
        VariableError: a Variable comes out of the body with another shape or dtype.

    Example:
        >>> import jax.numpy as jnp, nnx
        >>> class Total(nnx.Module):
        ...     def __init__(self):
        ...         self.total = nnx.var("totals", jnp.int32(0))
        >>> def body(i, module):
        ...     module.total += i
        ...     return module
        >>> int(nnx.fori_loop(0, 5, body, Total()).total)
        10
    """
    body, bound = lift_callable(body_fun, "nnx.fori_loop")
    if unroll:  # then JAX wants to know the bounds
        known = functools.partial(_fori, body, unroll, int(lower), int(upper))
        return stage("nnx.fori_loop", (body,), (unroll, lower, upper), known, (bound, init_val), {}, "flags")
    implementation = functools.partial(_fori, body, unroll)
    return stage("nnx.fori_loop", (body,), unroll, implementation, (lower, upper, bound, init_val), {}, "flags")


def _while(condition: Any, body: Any, condition_bound: Any, body_bound: Any, init: Any) -> Any:
    def run(_: Any, __: Any, body_bound: Any, val: Any) -> Any:
        return body(*body_bound, val)

    def test(condition_bound: Any, _: Any, val: Any) -> Any:
        return condition(*condition_bound, val)

    def ask(operands: Operands, dynamic: Any) -> Any:
        out, _, outcome = operands.call.run(test, operands.leaves(dynamic))
        _check_pure(operands.call, outcome)
        return out

    def loop(carry: Carry, step: Callable[[Any, Any], Any], dynamic: Any, first: First | None, before: Any) -> Any:
        later = functools.partial(ask, carry.operands)

        def holds(state: Any) -> Any:
            dynamic, is_first = state
            if first is None:
                return later(dynamic)
            # It is asked once before the body has run, when the structure is as it was.
            at_first = functools.partial(ask, before[0])
            return jax.lax.cond(
                is_first,
                lambda dynamic: jnp.asarray(at_first(carry.given_first(dynamic, first, before[0]))),
                lambda dynamic: jnp.asarray(later(dynamic)),
                dynamic,
            )

        start = (dynamic, None if first is None else jnp.bool_(True))
        return jax.lax.while_loop(holds, functools.partial(step, 0), start)[0]

    return _loop("nnx.while_loop", body, run, (condition_bound, body_bound, init), loop, 0)


def _fori(body: Any, unroll: Any, lower: Any, upper: Any, bound: Any, init: Any) -> Any:
    dtype = jnp.result_type(lower, upper)
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"the bounds of nnx.fori_loop are integers, got {lower!r} and {upper!r}")

    def run(i: Any, bound: Any, val: Any) -> Any:
        return body(*bound, i, val)

    def loop(_: Carry, step: Callable[[Any, Any], Any], dynamic: Any, first: First | None, __: Any) -> Any:
        def counted(i: Any, state: Any) -> Any:
            return step(jax.lax.convert_element_type(i, dtype), state)

        start = (dynamic, None if first is None else jnp.bool_(True))
        return jax.lax.fori_loop(lower, upper, counted, start, unroll=unroll)[0]

    return _loop("nnx.fori_loop", body, run, (bound, init), loop, jax.ShapeDtypeStruct((), dtype))


def _loop(what: str, body: Any, run: Any, args: tuple[Any, ...], loop: Any, index: Any) -> Any:
    """Trace the body, run the loop and write back; trace once more where the body makes Variables."""
    before: tuple[Operands, Once] | None = None
    for _ in range(2):
        call = Call(args, {})
        operands = Operands(call, "flags")

        def traced(i: Any, dynamic: Any, call: Call = call, operands: Operands = operands) -> Any:
            return call.run(functools.partial(run, i), operands.leaves(dynamic))

        once = Once(traced, index, operands.dynamic)
        out, values, outcome = once.out
        check_returned(what, call, call.spans[-2], call.structure(-2), out)
        if outcome.post is None:
            break
        if before is not None:
            raise_unstable(what, body, call, outcome)
        before = operands, once
        grow(call, values, outcome)
    carry = Carry(what, operands, once.out)
    if carry.settle(once.out):
        once = Once(traced, index, operands.dynamic)
        carry = Carry(what, operands, once.out)
    first, alike = None, True
    if before is not None:
        first = First(before[0].call.frame, before[1], call.frame, before[1].out[2])
        alike = not carry.differs(once, first, *before)
        if alike and what != "nnx.while_loop":  # whose condition may differ all the same
            first = None

    def step(i: Any, state: Any) -> Any:
        dynamic, is_first = state
        if alike:
            return carry.after(dynamic, once(i, dynamic)), None if is_first is None else jnp.bool_(False)

        def later(dynamic: Any) -> list[Any]:
            return carry.after(dynamic, once(i, dynamic))

        def run_first(dynamic: Any) -> list[Any]:
            return carry.after_first(dynamic, first, before[0], i)  # type: ignore[arg-type, index]

        return either(is_first, run_first, later, dynamic), jnp.bool_(False)

    final = loop(carry, step, operands.dynamic, first, before)
    return carry.finish(final, once.out, None if alike else first)


class Carry:
    """The operands of a loop as what one run of its body hands to the next.

    Attributes:
        call: the call, whose last positional argument is the value that the body takes and returns.
        operands: its operands.
    """

    def __init__(self, what: str, operands: Operands, out: tuple[Any, Any, Outcome]) -> None:
        """Make it of what `check_returned` has checked."""
        self._what = what
        self.call = operands.call
        self.operands = operands
        self._span = self.call.spans[-2]
        self._outcome = out[2]
        self._tree = self.call.structure(-2)
        self._roots = {position: k for k, position in enumerate(self.call.packed)}
        own = {position for position in operands.places if self._span[0] <= position < self._span[1]}
        self._own = {position: i for i, position in enumerate(range(*self._span)) if position in own}

    def after(self, given: Sequence[Any], result: tuple[Any, Any, Outcome], *, abstract: bool = False) -> list[Any]:
        """What the next run of the body is given.

        Args:
            given: what this run was given.
            result: what it returned.
            abstract: whether these are abstract values, which cannot be counted with.
        """
        out, values, _ = result
        drawn = {} if abstract else {(root, position): keys for root, position, keys in self._outcome.draws}
        return self._following(given, out, written_values(self._outcome, values), drawn)

    def differs(self, once: Once, first: First, before: Operands, once_before: Once) -> bool:
        """Whether the first run, which found the structure as it was, does anything else than those after it."""

        def numbers(operands: Operands, trace: Once) -> tuple[list[int], dict[tuple[int, int], list[int]], Any]:
            index, dynamic = numbers_of((0, operands.dynamic))
            places = {
                (root, position): jax.tree.leaves(value)
                for root in self._roots.values()
                for position, value in enumerate(dynamic[operands.values_of(root)])
            }
            others = [
                number for place, number in zip(operands.places, dynamic, strict=True) if place not in self._roots
            ]
            return [index, *others], places, numbers_of(trace.out)

        others, inputs, (out, values, _) = numbers(before, once_before)
        first_numbers = Numbers(others, inputs, jax.tree.leaves(out), list(map(jax.tree.leaves, values)), {})
        others, inputs, (out, values, _) = numbers(self.operands, once)
        written = {at: jax.tree.leaves(value) for at, value in written_values(self._outcome, values).items()}
        drawn = {(root, position): keys for root, position, keys in self._outcome.draws}
        return first.differs(once, first_numbers, Numbers(others, inputs, jax.tree.leaves(out), written, drawn))

    def given_first(self, given: Sequence[Any], first: First, before: Operands) -> list[Any]:
        """What the first run is given.

        Args:
            given: the same, with the Variables that it makes.
            first: what the first run does.
            before: the operands of a call without these Variables.
        """
        dynamic: list[Any] = []
        for i, place in enumerate(before.places):
            root = self._roots.get(place)
            if root is None:
                dynamic.append(given[i])
                continue
            held = []
            for position, own in enumerate(before.dynamic[i]):
                at = first.place(root, position)
                held.append(own if at is None else given[self.operands.values_of(at[0])][at[1]])
            dynamic.append(held)
        return dynamic

    def after_first(self, given: Sequence[Any], first: First, before: Operands, index: Any) -> list[Any]:
        """What the second run is given, if the first does something else than it; `index` is given to the body."""
        out, values, _ = first.run(index, self.given_first(given, first, before))
        return self._following(given, out, first.written(values), first.drawn)

    def _following(self, given: Sequence[Any], out: Any, written: Any, drawn: Any) -> list[Any]:
        leaves = jax.tree.leaves(out, is_leaf=is_hole)
        following = []
        for place, own in zip(self.operands.places, given, strict=True):
            root = self._roots.get(place)
            if root is None:
                following.append(leaves[self._own[place]] if place in self._own else own)
                continue
            held = []
            for position, value in enumerate(own):
                keys = drawn.get((root, position), 0)
                given_on = (value[0], value[1] + np.uint32(keys)) if keys else value
                held.append(written.get((root, position), given_on))
            following.append(held)
        return following

    def settle(self, out: tuple[Any, Any, Outcome]) -> bool:
        """Give what goes into the first run the types of what comes out, where JAX's promotion allows it.

        Returns:
            Whether anything changed, so that the body is to be traced anew.

        Raises:
            VariableError: a Variable comes out with another shape or dtype.
            StructureError: another value does.
        """
        following = self.after(self.operands.dynamic, out, abstract=True)
        changed = False
        for i, (place, own, new) in enumerate(zip(self.operands.places, self.operands.dynamic, following, strict=True)):
            root = self._roots.get(place)
            if root is None:
                name = f"leaf {self._own.get(place, place)} of the carry"
                self.operands.dynamic[i] = settled(self._what, name, own, new)
                changed = changed or self.operands.dynamic[i] is not own
                continue
            kind = type(self.call.frame.roots[root]).__name__
            entries = self.call.frame.layouts[root].moduledef.schema.entries
            for position, (path, variable, _) in enumerate(entries):
                name = f"`{path_text(path)}` of the {kind}"
                fresh = issubclass(variable, Intermediate)
                value = settled(self._what, name, own[position], new[position], variable=True, fresh=fresh)
                changed = changed or value is not own[position]
                own[position] = value
        return changed

    def finish(self, final: Sequence[Any], out: tuple[Any, Any, Outcome], first: First | None = None) -> Any:
        """Write what the loop changed into the Modules, and give what it returns."""
        frame, outcome = self.call.frame, self._outcome
        in_first = {*first.writes, *first.drawn} if first is not None else set()
        touched = sorted(
            {*written_values(outcome, out[1]), *((root, position) for root, position, _ in outcome.draws), *in_first}
        )
        writes: dict[int, list[int]] = {}
        for root, position in touched:
            writes.setdefault(root, []).append(position)
        values = [final[self.operands.values_of(root)][position] for root, position in touched]
        leaves = self.operands.leaves(final)[slice(*self._span)]
        roots = self.call.frame.roots
        leaves = [
            roots[self._roots[place]] if type(leaf) is Packed else leaf
            for place, leaf in zip(range(*self._span), leaves, strict=True)
        ]
        streams = any(isinstance(frame.layouts[k].cells[i], RngStream) for k, i in touched)
        joint = Outcome(tuple((root, tuple(positions)) for root, positions in writes.items()), streams=streams)
        finish(frame, None, values, joint)
        return jax.tree.unflatten(self._tree, leaves)


def is_hole(value: Any) -> bool:
    """Whether a leaf of an output stands for a Module."""
    return type(value) is HoleNode


def written_values(outcome: Outcome, values: Sequence[Any]) -> dict[tuple[int, int], Any]:
    """What a trace that kept the structure wrote, by root and position."""
    places = [(root, position) for root, positions in outcome.writes for position in positions]
    return dict(zip(places, values, strict=True))


def settled(what: str, name: str, own: Any, new: Any, *, variable: bool = False, fresh: bool = False) -> Any:
    """A value as it goes into the first run of a body, given its abstract value as it comes out of one.

    Args:
        what: the transform.
        name: what an error calls the value.
        own: the value.
        new: its abstract value after a run, or the very value if it did not change.
        variable: whether it is a Variable's.
        fresh: whether each run writes it before it reads it, so that it may start as zeros.
    """
    if new is own:
        return own
    tree: Any
    leaves, tree = jax.tree.flatten(own)
    after, tree_after = jax.tree.flatten(new)
    if tree == tree_after:
        result = [_settled_leaf(leaf, aval) for leaf, aval in zip(leaves, after, strict=True)]
        if not any(leaf is None for leaf in result):
            same = all(new_leaf is leaf for new_leaf, leaf in zip(result, leaves, strict=True))
            return own if same else jax.tree.unflatten(tree, result)
    if fresh:
        return jax.tree.map(zeros_of, new)
    error = VariableError if variable else StructureError
    raise error(
        f"{name} goes into the body of {what} as {_types(own)} and comes out as {_types(new)}: a compiled loop carries "
        "one shape and dtype. Give it this shape and dtype from the start, or cast the result in the body"
    )


def _settled_leaf(leaf: Any, aval: Any) -> Any:
    own = jax.typeof(leaf)
    if own.shape != aval.shape:
        return None
    if own.dtype == aval.dtype:
        strong = getattr(own, "weak_type", False) and not getattr(aval, "weak_type", False)
        return jnp.asarray(leaf, aval.dtype) if strong else leaf
    if getattr(own, "weak_type", False) and jnp.promote_types(own.dtype, aval.dtype) == aval.dtype:
        return jnp.asarray(leaf, aval.dtype)
    return None


def _types(value: Any) -> str:
    def text(leaf: Any) -> str:
        aval = leaf if hasattr(leaf, "dtype") else jax.typeof(leaf)
        return f"{aval.dtype}[{','.join(map(str, aval.shape))}]"

    leaves = jax.tree.leaves(value)
    if isinstance(value, (tuple, list, dict)):
        return f"a {type(value).__name__} of {', '.join(map(text, leaves)) or 'nothing'}"
    return ", ".join(map(text, leaves))


def raise_unstable(what: str, body: Any, call: Call, outcome: Outcome) -> None:
    """Raise since a body changes the structure in every run."""
    roots = distinct(call.frame.roots)
    post = outcome.post
    assert post is not None
    # With one root its number in front of a path says nothing; what the body let go of may be among the roots after.
    start = 1 if len(roots) == 1 and len(post.roots) > 1 else 0
    made = [
        (path[start:], node.type)
        for path, node, origin in zip(post.node_paths(), post.nodes, outcome.objects, strict=True)
        if origin < 0
    ]
    made += [
        (path[start:], kind)
        for (path, kind, _), origin in zip(post.schema.entries, outcome.cells, strict=True)
        if origin < 0 and not any(path[start : start + len(above)] == above for above, _ in made)
    ]
    before = walk(roots).moduledef
    lines = "\n  ".join(
        [f"`{path_text(path)}` is a new {kind.__name__} each time" for path, kind in made]
        or attribute_differences(before, post)
        or identity_differences(before, Outcome(), outcome)
        or ["the order or sharing of Modules changes"]
    )
    raise StructureError(
        f"each run of the body of {what}, `{getattr(body, '__qualname__', body)}`, leaves the Modules in another "
        f"structure:\n  {lines}\nA compiled loop runs one and the same body, so what it leaves must be what it "
        "finds: make attributes before the loop, and inside only change their values"
    )


def _check_pure(call: Call, outcome: Outcome) -> None:
    if outcome.post is None and not outcome.writes and not outcome.draws:
        return
    layouts = call.frame.layouts
    written = [(k, i) for k, positions in outcome.writes for i in positions] + [(k, i) for k, i, _ in outcome.draws]
    paths = [f"`{path_text(layouts[k].moduledef.schema.paths[i])}`" for k, i in written if k >= 0]
    raise VariableError(
        f"the condition of nnx.while_loop changes {', '.join(paths) or 'the structure of a Module'}: a condition only "
        "reads. Make the change in the body"
    )


def check_returned(what: str, call: Call, span: tuple[int, int], tree: Any, out: Any) -> None:
    """Check what a body returned for a carry.

    Args:
        what: the transform.
        call: the call.
        span: where the carry is among the call's leaves.
        tree: its structure, with Modules as leaves.
        out: what the body returned.

    Raises:
        StructureError: it has another structure than the carry, or another Module in a Module's place.
    """
    got: Any
    leaves, got = jax.tree.flatten(out, is_leaf=is_hole)
    if got != tree:
        raise StructureError(
            f"the body of {what} returns another structure than it was given: given {tree}, returned {got}. A compiled "
            "loop hands one structure from run to run: return every part of the carry, changed or not"
        )
    roots = call.frame.roots
    for i, (place, leaf) in enumerate(zip(range(*span), leaves, strict=True)):
        if type(call.leaves[place]) is not Packed:
            if is_hole(leaf):
                raise StructureError(f"the body of {what} returns a Module where it was given a value (leaf {i})")
            continue
        root = roots[call.packed.index(place)]
        if not is_hole(leaf) or leaf.hole.root < 0 or roots[leaf.hole.root] is not root:
            raise StructureError(
                f"the body of {what} returns something else in the place of the {type(root).__name__} that is carried "
                f"(leaf {i}): return the {type(root).__name__} itself, with its values changed in place"
            )
