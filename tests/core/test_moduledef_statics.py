"""ModuleDef: statics that change in place, and statics that reach Modules."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from tests.core.static_models import (
    Config,
    Frozen,
    Holder,
    Plain,
    Point,
    Slotted,
    definition,
    function,
)

import nnx

# --- mutable statics ---


@pytest.mark.parametrize(
    ("make", "edit"),
    [
        (lambda: [1, 2], lambda v: v.append(3)),
        (lambda: {"a": [1]}, lambda v: v["a"].append(2)),
        (lambda: {1}, lambda v: v.add(2)),
        (lambda: (1, [2]), lambda v: v[1].append(3)),
        (lambda: Config(1, ["a"]), lambda v: v.names.append("b")),
        (lambda: Config(1, ["a"]), lambda v: setattr(v, "size", 2)),
        (lambda: Frozen(1, [1]), lambda v: v.inner.append(2)),
        (lambda: Plain(a=[1]), lambda v: v.a.append(2)),
        (lambda: Plain(a=1), lambda v: setattr(v, "b", 2)),
        (lambda: Slotted(1, [1]), lambda v: v.b.append(2)),
        (lambda: functools.partial(function, [1]), lambda v: v.args[0].append(2)),
        (lambda: nnx.Static(np.zeros(2)), lambda v: v.__setitem__(0, 1)),
        (lambda: nnx.Static({"a": np.zeros(2)}), lambda v: v["a"].__setitem__(0, 1)),
        (lambda: Point(1, [2]), lambda v: v.y.append(3)),
    ],
)
def test_two_modules_never_share_a_mutable_static(make, edit):
    module = Holder(make())
    state, moduledef = module.partition()
    one, other = moduledef.merge(state), moduledef.merge(state)
    assert type(one.value) is type(module.value)
    edit(one.value)
    assert module.partition().moduledef is moduledef
    assert other.partition().moduledef is moduledef
    assert moduledef.merge(state).partition().moduledef is moduledef
    assert one.partition().moduledef is not moduledef
    edit(module.value)
    assert module.partition().moduledef is one.partition().moduledef
    assert moduledef.merge(state).partition().moduledef is moduledef


def test_an_edit_in_place_is_seen_without_an_assignment():
    module = Holder([1])
    before = module.partition().moduledef
    module.value.append(2)
    after = module.partition().moduledef
    assert before is not after
    assert after is definition([1, 2])
    module.value.pop()
    assert module.partition().moduledef is before


def test_one_list_in_two_places_stays_one_list():
    sizes = [1]
    module = Holder(sizes)
    module.sub = Holder(sizes)
    merged = module.partition().merge()
    assert merged.value is merged.sub.value
    assert merged.value is not sizes


def test_two_equal_lists_stay_two_lists():
    shared = Holder([1])
    shared.sub = Holder(shared.value)
    shared.partition()
    split = Holder([1])
    split.sub = Holder([1])
    merged = split.partition().merge()
    merged.value.append(2)
    assert merged.sub.value == [1]


def test_sharing_a_list_inside_of_jit_comes_out():
    module = Holder([1])
    module.sub = Holder([1])
    own = module.value

    @nnx.jit
    def share(module):
        module.sub.value = module.value

    share(module)
    assert module.sub.value is module.value is own

    @nnx.jit
    def split(module):
        module.sub.value = [1]

    split(module)
    assert module.value is own
    assert module.sub.value is not own
    assert module.sub.value == own


def test_lists_that_a_structural_change_does_not_touch_stay_themselves():
    module = Holder([1])
    module.more = {"a": [1]}
    module.array = nnx.Static(np.zeros(2))
    value, more, array = module.value, module.more, module.array
    nnx.jit(lambda m: setattr(m, "note", "x"))(module)
    assert module.note == "x"
    assert module.value is value
    assert module.more is more
    assert module.array is array


def test_immutable_statics_are_the_same_objects():
    value = (1, ("a", Frozen(1)))
    assert Holder(value).partition().merge().value is value


# --- statics that reach Modules ---


def test_a_bound_method_of_the_graph_is_bound_again():
    module = Holder(1)
    module.sub = Holder(2)
    module.hook = module.sub.method
    module.sub.up = module.other
    merged = module.partition().merge()
    merged.sub.w, merged.w = jnp.float32(5), jnp.float32(7)
    assert float(merged.hook()) == 5.0
    assert float(merged.sub.up()) == -7.0
    assert merged.hook.__self__ is merged.sub


def test_which_method_is_bound_is_part_of_the_definition():
    one, other = Holder(1), Holder(1)
    one.hook, other.hook = one.method, other.other
    assert one.partition().moduledef is not other.partition().moduledef
    again = Holder(1)
    again.hook = again.method
    assert one.partition().moduledef is again.partition().moduledef


def test_a_bound_method_of_a_stranger_is_an_error():
    module = Holder(1)
    module.hook = Holder(2).method
    with pytest.raises(
        nnx.StaticError, match="`hook` is a bound method of a Holder that is not part of the same Module"
    ):
        module.partition()


def _closure(module):
    return lambda x: module.w * x


def _default(module):
    def hook(x, m=module):
        return m.w * x

    return hook


@pytest.mark.parametrize(
    ("wrap", "where"),
    [
        (lambda m: functools.partial(function, m), r"a Holder .*\(at `hook\.args\[0\]`\)"),
        (lambda m: functools.partial(Holder.method, self=m), r"a Holder .*\(at `hook\.keywords\['self'\]`\)"),
        (lambda m: functools.partial(m.method), r"a Holder .*\(at `hook\.func"),
        (_closure, r"a Holder \(at `hook closes over `module`"),
        (_default, r"a Holder \(at `hook has a default"),
        (lambda m: Plain(module=m), r"a Holder .*\(at `hook\.module`\)"),
        (lambda m: Config(size=m), r"a Holder .*\(at `hook\.size`\)"),
        (lambda m: Frozen(1, [m]), r"a Holder .*\(at `hook\.inner\[0\]`\)"),
        (
            lambda m: Plain(deep={"a": Plain(b=(1, m.get_variable("w")))}),
            r"a Param .*\(at `hook\.deep\['a'\]\.b\[1\]`\)",
        ),
        (lambda m: Plain(w=m.w), r"a JAX array float32\[\] \(at `hook\.w`\)"),
        (lambda m: functools.partial(function, y=m.w), r"a JAX array float32\[\] \(at `hook\.keywords\['y'\]`\)"),
    ],
)
def test_any_other_way_to_a_module_is_an_error_with_its_path(wrap, where):
    module = Holder(1)
    module.sub = Holder(2)
    module.sub.hook = wrap(module)
    with pytest.raises(
        nnx.StaticError, match=r"the static attribute `sub/hook` holds " + where.replace("`hook", "`sub/hook")
    ):
        module.partition()


def test_the_error_says_what_to_do():
    module = Holder(Plain(w=jnp.ones(2)))
    with pytest.raises(
        nnx.StaticError, match="put arrays into an nnx.Param, another Variable or an nnx.Node, or wrap a constant"
    ):
        module.partition()
