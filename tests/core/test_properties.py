"""Laws that hold for every module graph and every program on it."""

import copy
import gc
import pickle
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.core.strategies import build, execute, observe, parts, plans, programs

import nnx

_slow = settings(
    max_examples=30,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@given(plans)
def test_partition_and_merge_are_inverse(plan):
    module = build(plan)
    state, moduledef = module.partition()
    merged = moduledef.merge(state)
    assert observe(merged) == observe(module)
    again, same = merged.partition()
    assert same is moduledef
    assert again.paths == state.paths
    # NumPy arrays are copied, as they can be edited in place; nothing else is.
    leaves = zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True)
    assert all(new is old or isinstance(old, np.ndarray) for new, old in leaves)


@given(plans)
def test_merge_of_parts_is_the_merge_of_the_whole(plan):
    module = build(plan)
    states, moduledef = module.partition(nnx.Param, nnx.buffers, "counts", ...)
    assert observe(moduledef.merge(*states)) == observe(module)
    assert observe(moduledef.merge(*reversed(states))) == observe(module)


@given(plans)
def test_equal_plans_make_equal_definitions(plan):
    assert build(plan).partition().moduledef is build(plan).partition().moduledef


@given(plans)
def test_clone_deepcopy_and_pickle_keep_what_can_be_seen(plan):
    module = build(plan)
    module.partition()
    for copied in (module.clone(), copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert observe(copied) == observe(module)
        mine, theirs = parts(module), parts(copied)
        assert not any(one is other for one in mine[0] for other in theirs[0])
        assert not any(one is other for one in mine[1] for other in theirs[1])


@given(plans)
def test_pickled_partitions_merge(plan):
    module = build(plan)
    state, moduledef = pickle.loads(pickle.dumps(module.partition()))
    assert moduledef is module.get_module_def()
    assert observe(moduledef.merge(state)) == observe(module)


@given(plans)
def test_nested_dicts_hold_what_the_state_holds(plan):
    state = build(plan).get_state()
    again = nnx.State.from_nested_dict(state.to_nested_dict())
    assert again.schema is state.schema
    assert all(new is old for new, old in zip(again.raw_values, state.raw_values, strict=True))


@given(plans, programs, programs)
@_slow
def test_layouts_follow_every_write(plan, first, second):
    """What a cached layout says is what a walk from nothing would say."""
    module = build(plan)
    for program in (first, second):
        module.partition()
        execute(program, module, jnp.float32(2))
        fresh = copy.deepcopy(module)
        assert fresh.partition().moduledef is module.partition().moduledef
        assert observe(module.partition().merge()) == observe(module)


@given(plans, programs)
@_slow
def test_jit_of_a_program_equals_the_program(plan, program):
    eager, jitted = build(plan), build(plan)
    eager_parts, jitted_parts = parts(eager), parts(jitted)
    step = nnx.jit(lambda module, x: execute(program, module, x))
    for _ in range(2):
        total, member, fresh = execute(program, eager, jnp.float32(2))
        got_total, got_member, got_fresh = step(jitted, jnp.float32(2))
        assert observe(jitted, jitted_parts, dtypes=False) == observe(eager, eager_parts, dtypes=False)
        np.testing.assert_allclose(got_total, total)
        at = [i for i, item in enumerate(parts(eager)[0]) if item is member]
        assert [i for i, item in enumerate(parts(jitted)[0]) if item is got_member] == at
        assert observe(got_fresh, dtypes=False) == observe(fresh, dtypes=False)
        # Sown values grow from one plain call to the next, and start afresh at each lifted one.
        eager.pop_state("intermediates")
        jitted.pop_state("intermediates")


@given(plans, programs)
@_slow
def test_a_program_that_raises_changes_nothing(plan, program):
    module = build(plan)
    originals, before = parts(module), observe(module, parts(module))

    @nnx.jit
    def fail(module, x):
        execute(program, module, x)
        raise KeyError("on purpose")

    with pytest.raises(KeyError, match="on purpose"):
        fail(module, jnp.float32(2))
    assert observe(module, originals) == before


@given(plans, programs, st.booleans())
@_slow
def test_jit_of_two_roots_equals_the_program_on_both(plan, program, whole):
    """The second root is a part of the first, or the first itself."""
    # A part that keeps a method of the whole cannot be partitioned on its own, which is what the program does to it.
    plan = [
        (kind, [("method", "m1", True) if how == "method" else (how, *rest) for how, *rest in attributes])
        for kind, attributes in plan
    ]
    results = []
    for lift in (lambda f: f, nnx.jit):
        module = build(plan)
        originals = parts(module)
        part = module if whole else originals[0][-1]

        def both(module, part, x):
            execute(program, part, x)
            total, *_ = execute(program, module, x)
            return part, total

        got, total = lift(both)(module, part, jnp.float32(2))
        assert got is part
        results.append((observe(module, originals, dtypes=False), observe(part, originals, dtypes=False), float(total)))
    assert results[0] == results[1]


@given(plans)
def test_a_dropped_graph_without_cycles_is_freed_at_once(plan):
    module = build(_without_cycles(plan))
    module.partition()
    references = [weakref.ref(part) for group in parts(module) for part in group]
    gc.disable()
    try:
        del module
        assert [reference for reference in references if reference() is not None] == []
    finally:
        gc.enable()


def _without_cycles(plan):
    """The plan with references to later Modules only."""
    result = []
    for i, (kind, attributes) in enumerate(plan):
        later = len(plan) - i - 1
        kept = []
        for how, name, *rest in attributes:
            if how == "child" and later:
                kept.append((how, name, i + 1 + rest[0] % later))
            elif how in ("data", "static", "mutable", "tie"):
                kept.append((how, name, *rest))
        result.append((kind, kept))
    return result
