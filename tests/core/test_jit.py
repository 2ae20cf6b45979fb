"""nnx.jit: jax.jit for functions of Modules, with everything that they do to them."""

import functools
import threading
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx


class Leaf(nnx.Module):
    def __init__(self, value=1.0, rate=0.5):
        self.w = nnx.Param(jnp.float32(value))
        self.rate = rate

    def __call__(self, x):
        return x * self.w

    def scaled(self, x, factor):
        return x * self.w * factor

    @nnx.jit
    def compiled(self, x):
        self.w = self.w + x
        return self.w

    @nnx.jit(static_argnums=(1,), static_argnames=("power",))
    def powered(self, n, *, power=1):
        assert isinstance(n, int)
        return self.w * n**power


class Model(nnx.Module):
    def __init__(self):
        self.left = Leaf(2.0)
        self.right = Leaf(3.0)
        self.count = nnx.var("counts", 0)

    def __call__(self, x):
        self.count += 1
        return self.right(self.left(x))


class Pair(NamedTuple):
    first: object
    second: object


def traced(function=None, **options):
    """A function under nnx.jit that counts its traces."""
    if function is None:
        return functools.partial(traced, **options)
    count = [0]

    @functools.wraps(function)
    def counted(*args, **kwargs):
        count[0] += 1
        return function(*args, **kwargs)

    wrapped = nnx.jit(counted, **options)
    wrapped.traces = count
    return wrapped


# --- where Modules may be ---


def test_a_module_as_an_argument():
    model = Model()
    y = nnx.jit(lambda m, x: m(x))(model, 2.0)
    assert float(y) == 12.0
    assert model.count == 1


@pytest.mark.parametrize(
    ("pack", "unpack"),
    [
        (lambda m: [m, 1.0], lambda a: a[0]),
        (lambda m: (1.0, (2.0, m)), lambda a: a[1][1]),
        (lambda m: {"a": {"model": m}, "b": jnp.ones(2)}, lambda a: a["a"]["model"]),
        (lambda m: Pair(m, None), lambda a: a.first),
        (lambda m: [None, {"x": Pair(1, [m])}], lambda a: a[1]["x"].second[0]),
        (lambda m: nnx.TreeNode([1.0, m]), lambda a: a.value[1]),
    ],
)
def test_modules_inside_of_containers(pack, unpack):
    model = Model()

    @traced
    def step(box, *, other):
        unpack(other)(1.0)
        return unpack(box)(1.0), unpack(box)

    for i in range(1, 3):
        y, got = step(pack(model), other=pack(model))
        assert float(y) == 6.0
        assert got is model
        assert model.count == 2 * i
    assert step.traces == [1]


def test_modules_and_contexts_in_every_place_at_once():
    @traced
    def step(a, b, *rest, c, d=None, **more):
        for module in (a, b["m"], rest[1], c, d, more["e"][0]):
            module.w = module.w + 1
        key = more["ctx"].make_rng("dropout")
        return {"out": [c, (more["e"][0], more["ctx"])], "key": key}

    a, b, r, c, d, e = (Leaf(i) for i in range(6))
    ctx = nnx.context(dropout=0)
    for _ in range(2):
        out = step(a, {"m": b}, 1.0, r, c=c, d=d, e=[e], ctx=ctx)
        assert out["out"][0] is c
        assert out["out"][1][0] is e
        assert out["out"][1][1] is ctx
    assert [float(m.w) for m in (a, b, r, c, d, e)] == [2, 3, 4, 5, 6, 7]
    assert ctx.rngs["dropout"].count == 2
    assert step.traces == [1]


def test_keywords_only():
    model = Model()

    @traced
    def step(*, x, model):
        return model(x), model

    for order in ({"model": model, "x": 1.0}, {"x": 1.0, "model": model}):
        y, got = step(**order)
        assert float(y) == 6.0
        assert got is model
    assert model.count == 2
    assert step.traces == [1]


def test_positional_and_keyword_calls_of_one_function():
    step = nnx.jit(lambda model, x: model(x))
    model = Model()
    assert float(step(model, 1.0)) == float(step(model=model, x=1.0)) == float(step(model, x=1.0)) == 6.0
    assert model.count == 3


def test_no_modules_at_all():
    assert float(nnx.jit(lambda x, y=1: x + y)(1.0, y=2)) == 3.0
    assert float(nnx.jit(lambda: jnp.ones(()))()) == 1.0
    assert nnx.jit(lambda: None)() is None


def test_the_first_argument_may_be_any_pytree():
    step = nnx.jit(lambda first, m: (first, m(1.0)))
    model = Model()
    for first in (None, (), {}, [1.0], {"a": (1.0, None)}):
        got, y = step(first, model)
        assert jax.tree.structure(got) == jax.tree.structure(first)
        assert float(y) == 6.0


def test_default_arguments():
    @nnx.jit
    def step(model, x=2.0):
        return model(x)

    assert float(step(Model())) == 12.0


def test_states_and_definitions_as_arguments():
    model = Model()

    @traced
    def step(pure, x):
        y, pure = pure.apply(x)
        return y, pure

    y, pure = step(model.partition(), 1.0)
    y, pure = step(pure, 1.0)
    assert float(y) == 6.0
    assert int(pure.merge().count) == 2
    assert model.count == 0
    assert step.traces == [1]


# --- what may be compiled ---


def test_a_module_itself():
    model = Model()
    forward = nnx.jit(model)
    assert float(forward(1.0)) == 6.0
    model.left.w = jnp.float32(10)
    assert float(forward(1.0)) == 30.0
    assert model.count == 2


def test_a_bound_method():
    leaf = Leaf(3.0)
    scaled = nnx.jit(leaf.scaled, static_argnums=1)
    assert float(scaled(2.0, 5)) == 30.0
    leaf.w = jnp.float32(1)
    assert float(scaled(2.0, 5)) == 10.0


def test_a_decorated_method():
    leaf, other = Leaf(1.0), Leaf(10.0)
    assert float(leaf.compiled(1.0)) == 2.0
    assert float(leaf.compiled(1.0)) == 3.0
    assert float(other.compiled(1.0)) == 11.0
    assert (float(leaf.w), float(other.w)) == (3.0, 11.0)
    assert float(Leaf.compiled(leaf, 1.0)) == 4.0


def test_a_decorated_method_with_static_arguments():
    leaf = Leaf(1.0)
    assert float(leaf.powered(3)) == 3.0
    assert float(leaf.powered(3, power=2)) == 9.0


def test_a_decorated_call():
    class Twice(nnx.Module):
        def __init__(self):
            self.leaf = Leaf(2.0)

        @nnx.jit
        def __call__(self, x):
            return self.leaf(self.leaf(x))

    assert float(Twice()(1.0)) == 4.0


def test_a_decorated_method_called_inside_of_another():
    @nnx.jit
    def outer(leaf):
        return leaf.compiled(1.0) + leaf.compiled(1.0)

    leaf = Leaf(1.0)
    assert float(outer(leaf)) == 5.0
    assert float(leaf.w) == 3.0


def test_the_decorator_with_options_and_without():
    @nnx.jit
    def plain(model, n):
        return model.w * n

    @nnx.jit(static_argnames="n")
    def static(model, n):
        return model.w * sum(range(n))

    assert float(plain(Leaf(2.0), 3)) == 6.0
    assert float(static(Leaf(2.0), n=3)) == 6.0
    assert float(static(Leaf(2.0), 4)) == 12.0


def test_a_partial():
    def scale(factor, model, x):
        return model(x) * factor

    assert float(nnx.jit(functools.partial(scale, 2.0))(Leaf(3.0), 1.0)) == 6.0


def test_a_callable_object():
    class Loss:
        def __call__(self, model, x):
            return model(x) + 1

    assert float(nnx.jit(Loss())(Leaf(3.0), 1.0)) == 4.0


def test_what_cannot_be_called_is_refused():
    with pytest.raises(TypeError, match="nnx.jit takes a callable, got int"):
        nnx.jit(3)


def test_the_function_keeps_its_name_and_documentation():
    @nnx.jit
    def step(model):
        """One step."""

    assert step.__name__ == "step"
    assert step.__doc__ == "One step."
    assert "step" in repr(step)


def test_the_compiled_function_names_the_function():
    @nnx.jit
    def my_train_step(model):
        return model.w

    assert "my_train_step" in my_train_step.lower(Leaf()).as_text()


# --- static arguments ---


@pytest.mark.parametrize(
    "options", [{"static_argnums": 0}, {"static_argnums": (0,)}, {"static_argnums": -2}, {"static_argnames": "mode"}]
)
def test_a_static_first_argument(options):
    @traced(**options)
    def step(mode, model):
        model.w = model.w * (2 if mode == "double" else 3)
        return model.w

    leaf = Leaf(1.0)
    assert float(step("double", leaf)) == 2.0
    assert float(step("triple", leaf)) == 6.0
    assert float(step("double", leaf)) == 12.0
    assert step.traces == [2]


def test_all_arguments_static():
    @traced(static_argnums=(0, 1))
    def step(a, b):
        return jnp.ones(()) * (a + b)

    assert float(step(1, 2)) == 3.0
    assert float(step(1, 2)) == 3.0
    assert step.traces == [1]


def test_a_static_argument_by_name_between_modules():
    @traced(static_argnames=("n",))
    def step(a, n, b):
        b.w = b.w + a.w * n
        return n

    a, b = Leaf(1.0), Leaf(0.0)
    step(a, 2, b)
    step(a, n=2, b=b)
    assert float(b.w) == 4.0


def test_an_unhashable_static_argument_is_refused():
    with pytest.raises((TypeError, ValueError), match="[Nn]on-hashable|unhashable"):
        nnx.jit(lambda m, n: m.w, static_argnums=1)(Leaf(), [1])


@pytest.mark.parametrize("pack", [lambda m: m, lambda m: (1, m)])
def test_a_static_module_is_refused(pack):
    with pytest.raises(
        nnx.AttributeKindError, match="a Leaf cannot be a static argument.*Leave it out of static_argnums"
    ):
        nnx.jit(lambda m, x: x, static_argnums=0)(pack(Leaf()), 1.0)


# --- what comes out ---


def test_values_come_out_and_unchanged_values_stay_themselves():
    model = Model()
    left, right = model.left.w, model.right.w

    @nnx.jit
    def step(model):
        model.left.w = model.left.w + 1

    step(model)
    assert float(model.left.w) == 3.0
    assert model.left.w is not left
    assert model.right.w is right


def test_only_what_changes_is_an_output():
    model = Model()
    read = nnx.jit(lambda m: m.left.w).lower(model)
    assert len(jax.tree.leaves(read.out_info)) == 1

    @nnx.jit
    def write(m):
        m.left.w = m.left.w * 2
        m.right.w = m.right.w  # the same value

    assert len(jax.tree.leaves(write.lower(model).out_info)) == 1


def test_new_attributes_come_out():
    model = Model()

    @nnx.jit
    def step(model, x):
        model.left.seen = nnx.Intermediate(x)
        model.buffer = x + 1
        model.extra = Leaf(5.0)
        model.mode = "trained"
        model.blocks = [Leaf(1.0), Leaf(2.0)]

    step(model, 3.0)
    assert float(model.left.seen) == 3.0
    assert isinstance(model.left.get_variable("seen"), nnx.Intermediate)
    assert float(model.buffer) == 4.0
    assert float(model.extra.w) == 5.0
    assert model.mode == "trained"
    assert [float(block.w) for block in model.blocks] == [1.0, 2.0]
    model.extra.w = jnp.float32(7)  # new Modules belong to the caller's trace
    model.blocks.append(Leaf())
    model.left.seen = 0.0


def test_removed_attributes_are_gone():
    model = Model()
    model.note = "x"

    @nnx.jit
    def step(model):
        del model.left.w
        del model.right
        del model.note

    step(model)
    assert not hasattr(model.left, "w")
    assert not hasattr(model, "right")
    assert not hasattr(model, "note")
    assert model.get_state().paths == (("count",),)


def test_popped_state_is_gone():
    model = Model()
    model.y = nnx.Intermediate(jnp.float32(1))

    @nnx.jit
    def step(model):
        return model.pop_state(nnx.Intermediate)

    popped = step(model)
    assert float(popped["y"].value) == 1.0
    assert not hasattr(model, "y")


def test_an_attribute_may_change_its_type():
    model = Model()

    @nnx.jit
    def step(model):
        value = model.left.w
        del model.left.w
        model.left.w = nnx.BatchStat(value * 2, sharding=None)
        model.right, model.left = model.left, model.right

    left, right = model.left, model.right
    step(model)
    assert model.right is left
    assert model.left is right
    assert isinstance(left.get_variable("w"), nnx.BatchStat)
    assert float(left.w) == 4.0


def test_changed_statics_come_out():
    model = Model()
    model.sizes = [1, 2]
    model.config = {"a": {"b": 1}}

    @nnx.jit
    def step(model):
        model.left.rate = 0.25
        model.sizes.append(3)
        model.config["a"]["b"] = 2

    step(model)
    assert model.left.rate == 0.25
    assert model.sizes == [1, 2, 3]
    assert model.config == {"a": {"b": 2}}
    step(model)
    assert model.sizes == [1, 2, 3, 3]


def test_ties_made_inside_come_out():
    model = Model()

    @nnx.jit
    def tie(model):
        model.right.w = model.left.get_variable("w")

    tie(model)
    model.left.w = jnp.float32(9)
    assert float(model.right.w) == 9.0
    assert model.filter(nnx.Param).paths == (("left", "w"),)


def test_ties_undone_inside_come_out():
    model = Model()
    model.right.w = model.left.get_variable("w")

    @nnx.jit
    def untie(model):
        value = model.right.w
        del model.right.w
        model.right.w = nnx.Param(value + 1)

    untie(model)
    assert (float(model.left.w), float(model.right.w)) == (2.0, 3.0)
    assert len(model.filter(nnx.Param)) == 2


def test_cycles_made_and_cut_inside():
    model = Model()

    @nnx.jit
    def cycle(model):
        model.left.parent = model

    @nnx.jit
    def cut(model):
        del model.left.parent
        model.count += 1

    cycle(model)
    assert model.left.parent is model
    cut(model)
    assert not hasattr(model.left, "parent")
    assert model.count == 1


def test_a_changed_dtype_and_shape_come_out():
    leaf = Leaf()

    @nnx.jit
    def step(leaf):
        leaf.w = jnp.zeros((2, 3), jnp.int32)

    step(leaf)
    assert leaf.w.shape == (2, 3)
    assert leaf.w.dtype == jnp.int32


def test_containers_edited_in_place():
    class Box(nnx.Module):
        def __init__(self):
            self.node = nnx.Node([jnp.float32(1), {"a": jnp.float32(2)}])
            self.cache = nnx.Cache({"keys": [jnp.float32(0)], "index": 0})

    @nnx.jit
    def step(box, x):
        box.node[1]["a"] = box.node[1]["a"] + x
        box.cache["keys"].append(x)
        box.cache["index"] += 1

    box = Box()
    step(box, 1.0)
    step(box, 5.0)
    assert [float(x) for x in jax.tree.leaves(box.node)] == [1.0, 8.0]
    assert [float(x) for x in box.cache["keys"]] == [0.0, 1.0, 5.0]
    assert int(box.cache["index"]) == 2
    assert not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(box.get_state()))


def test_a_container_edited_before_an_exception_is_as_it_was():
    module = nnx.Module()
    module.node = nnx.Node([jnp.float32(1)])
    held = module.node

    @nnx.jit
    def step(module):
        module.node.append(module.node[0])
        raise KeyError("no")

    with pytest.raises(KeyError):
        step(module)
    assert module.node is held
    assert len(held) == 1


# --- identity ---


def test_returned_arguments_are_the_same_objects():
    model, ctx = Model(), nnx.context(0)
    got = nnx.jit(lambda m, c: (m, [c, m], {"left": m.left}))(model, ctx)
    assert got[0] is model
    assert got[1][0] is ctx
    assert got[1][1] is model
    assert got[2]["left"] is model.left


def test_returned_arguments_of_a_changed_structure_are_the_same_objects():
    @nnx.jit
    def step(model):
        model.left, model.right = model.right, model.left
        model.new = Leaf()
        return model, model.left, model.new

    model = Model()
    left, right = model.left, model.right
    got, got_left, got_new = step(model)
    assert got is model
    assert got_left is model.left is right
    assert model.right is left
    assert got_new is model.new


def test_a_submodule_that_is_detached_and_returned_is_the_same_object():
    @nnx.jit
    def step(model):
        left = model.left
        del model.left
        left.w = left.w + 1
        return left

    model = Model()
    left = model.left
    assert step(model) is left
    assert float(left.w) == 3.0


def test_a_submodule_that_is_detached_and_changed_is_changed():
    """Somebody outside may still hold it, as it would be without the transform."""

    @nnx.jit
    def step(model):
        left = model.left
        del model.left
        left.w = left.w + 1

    model = Model()
    left = model.left
    step(model)
    assert float(left.w) == 3.0


def test_fresh_modules_are_returned():
    @nnx.jit
    def make(ctx):
        model = Model()
        model.left.w = jax.random.normal(ctx.make_rng("params"))
        return model, [model.left], nnx.context(dropout=1)

    model, (left,), ctx = make(nnx.context(0))
    assert model.left is left
    assert not isinstance(left.w, jax.core.Tracer)
    left.w = jnp.float32(1)
    assert float(model(1.0)) == 3.0
    assert ctx.make_rng("dropout").shape == ()


def test_fresh_modules_are_fresh_at_each_call():
    make = traced(lambda x: Leaf(value=x))
    a, b = make(1.0), make(2.0)
    assert a is not b
    assert (float(a.w), float(b.w)) == (1.0, 2.0)
    assert make.traces == [1]


def test_fresh_modules_that_hold_arguments():
    @nnx.jit
    def wrap(leaf):
        model = Model()
        model.left = leaf
        leaf.w = leaf.w + 1
        return model

    leaf = Leaf(1.0)
    model = wrap(leaf)
    assert model.left is leaf
    assert float(leaf.w) == 2.0


def test_the_same_module_twice():
    @traced
    def step(a, b):
        assert a is b
        a.w = a.w + 1
        b.w = b.w + 1
        return b

    leaf = Leaf(0.0)
    assert step(leaf, leaf) is leaf
    assert float(leaf.w) == 2.0
    step(leaf, leaf)
    assert step.traces == [1]


def test_one_function_called_with_the_same_and_with_different_modules():
    @traced
    def step(a, b):
        a.w = a.w + 1
        return a is b

    one, two = Leaf(0.0), Leaf(0.0)
    assert bool(step(one, one)) is True
    assert bool(step(one, two)) is False
    assert bool(step(two, two)) is True
    assert (float(one.w), float(two.w)) == (2.0, 1.0)
    assert step.traces == [2]


@pytest.mark.parametrize("order", [lambda m: (m, m.left), lambda m: (m.left, m)])
def test_a_module_and_its_part(order):
    @traced
    def step(a, b):
        model, left = (a, b) if isinstance(a, Model) else (b, a)
        assert model.left is left
        left.w = left.w * 2
        model.left.w = model.left.w + 1
        return left

    model = Model()
    for expected in (5.0, 11.0):
        assert step(*order(model)) is model.left
        assert float(model.left.w) == expected
    assert step.traces == [1]


@pytest.mark.parametrize("order", [lambda m: (m, m.left), lambda m: (m.left, m)])
def test_the_structure_of_a_shared_part_changes(order):
    @nnx.jit
    def step(a, b):
        model, left = (a, b) if isinstance(a, Model) else (b, a)
        left.extra = nnx.Param(jnp.float32(4))
        del model.right
        return model, left

    model = Model()
    left = model.left
    assert step(*order(model)) == (model, left)
    assert model.left is left
    assert float(left.extra) == 4.0
    assert not hasattr(model, "right")


def test_two_modules_with_a_part_in_common():
    a, b = Model(), Model()
    b.left = a.left

    @traced
    def step(a, b):
        assert a.left is b.left
        a.left.w = a.left.w + b.left.w

    step(a, b)
    step(a, b)
    assert float(b.left.w) == 8.0
    assert b.left is a.left
    assert step.traces == [1]


def test_tied_variables_across_arguments():
    a, b = Leaf(1.0), Leaf(2.0)
    b.w = a.get_variable("w")

    @traced
    def step(a, b):
        a.w = a.w + 1
        return b.w

    assert float(step(a, b)) == 2.0
    assert float(step(b, a)) == 3.0
    assert a.get_variable("w") is b.get_variable("w")
    assert step.traces == [1]


def test_a_part_with_a_callback_to_its_parent():
    """Alone the part could not be partitioned; beside its parent it can."""

    class Parent(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.float32(2))
            self.child = nnx.Module()
            self.child.callback = self.double

        def double(self):
            self.w = self.w * 2
            return self.w

    parent = Parent()
    step = nnx.jit(lambda parent, child: child.callback())
    assert float(step(parent, parent.child)) == 4.0
    assert float(step(parent, parent.child)) == 8.0
    assert float(parent.w) == 8.0


def test_the_structure_of_sharing_is_part_of_the_signature():
    @traced
    def step(a, b):
        return a.left is b.left

    a, b = Model(), Model()
    assert not step(a, b)
    b.left = a.left
    assert step(a, b)
    b.left = Leaf()
    assert not step(a, b)


# --- exceptions ---


def test_an_exception_leaves_every_module_as_it_was():
    model, ctx = Model(), nnx.context(dropout=0)
    model.sizes = [1]
    state, moduledef = model.partition()

    @nnx.jit
    def step(model, ctx):
        model.left.w = model.left.w * 2
        ctx.make_rng("dropout")
        model.new = Leaf()
        model.sizes.append(2)
        del model.right
        raise ZeroDivisionError("inside")

    with pytest.raises(ZeroDivisionError, match="inside"):
        step(model, ctx)
    after, same = model.partition()
    assert same is moduledef
    assert all(new is old for new, old in zip(after.raw_values, state.raw_values, strict=True))
    assert ctx.rngs["dropout"].count == 0
    assert model.sizes == [1]


def test_a_function_works_after_an_exception():
    fail = [True]

    @nnx.jit
    def step(model):
        model.count += 1
        if fail[0]:
            raise ValueError("once")

    model = Model()
    with pytest.raises(ValueError, match="once"):
        step(model)
    fail[0] = False
    step(model)
    assert model.count == 1


def test_an_output_that_is_no_array_is_an_error_and_changes_nothing():
    model = Model()

    @nnx.jit
    def step(model):
        model.count += 1
        return object()

    with pytest.raises(TypeError, match="not a valid JAX type"):
        step(model)
    assert model.count == 0


def test_a_value_that_cannot_come_out_is_an_error_with_its_path():
    model = Model()

    @nnx.jit
    def step(model):
        model.left.w = "text"

    with pytest.raises(nnx.VariableError, match="`left/w` was given a str inside of a transform"):
        step(model)
    assert float(model.left.w) == 2.0


def test_after_an_exception_raw_jax_still_refuses_modules():
    with pytest.raises(ZeroDivisionError):
        nnx.jit(lambda m: 1 / 0)(Model())
    with pytest.raises(nnx.AttributeKindError, match="a Model is an nnx.Module and not a pytree"):
        jax.tree.leaves(Model())


def test_an_argument_that_is_no_jax_type_is_jaxs_own_error():
    model = Model()
    with pytest.raises(TypeError, match="Error interpreting argument|not a valid JAX type"):
        nnx.jit(lambda m, x: m.w)(model, object())
    with pytest.raises(nnx.AttributeKindError, match="not a pytree"):
        jax.jit(lambda m: m)(model)


def test_raw_jax_inside_of_the_function_refuses_modules():
    @nnx.jit
    def step(model):
        return jax.vmap(lambda m, x: x, in_axes=(None, 0))(model, jnp.ones(2))

    with pytest.raises(nnx.AttributeKindError, match="a Model is an nnx.Module and not a pytree"):
        step(Model())


# --- traces ---


def test_the_second_call_traces_nothing():
    @traced
    def step(model, x):
        return model(x)

    model = Model()
    for _ in range(4):
        step(model, jnp.ones(3))
    # An int count has become an array by then, which JAX tells apart by its weak type alone.
    assert step.traces[0] <= 2
    before = step.traces[0]
    step(model, jnp.ones(3))
    step(Model(), jnp.ones(3))
    assert step.traces[0] == before


def test_equal_modules_share_a_trace():
    step = traced(lambda model: model.left.w)
    for _ in range(3):
        step(Model())
    assert step.traces == [1]


def test_values_of_another_shape_or_dtype_trace_anew():
    step = traced(lambda leaf: leaf.w)
    leaf = Leaf()
    step(leaf)
    leaf.w = jnp.ones(3)
    step(leaf)
    leaf.w = jnp.ones(3, jnp.int32)
    step(leaf)
    assert step.traces == [3]


def test_wrapping_a_function_again_finds_what_was_compiled():
    count = [0]

    def step(leaf):
        count[0] += 1
        return leaf.w

    nnx.jit(step)(Leaf())
    nnx.jit(step)(Leaf())
    assert count == [1]


def test_clear_cache():
    step = traced(lambda leaf: leaf.w)
    step(Leaf())
    step.clear_cache()
    step(Leaf())
    assert step.traces == [2]


def _set_static(m):
    m.left.rate = 0.125


def _same_static(m):
    m.left.rate = float("0.5")


def _add(m):
    m.left.extra = nnx.Param(jnp.float32(1))


def _delete(m):
    del m.right


def _retype(m):
    del m.left.w
    m.left.w = nnx.BatchStat(jnp.float32(2))


def _metadata(m):
    m.left.w = m.left.get_variable("w").replace(sharding=None)


def _new_metadata(m):
    del m.left.w
    m.left.w = nnx.Param(jnp.float32(2), sharding=("a",))


def _replace(m):
    m.left = m.right


def _equal_module(m):
    m.left = Leaf(2.0)


def _tie(m):
    m.left.w = m.right.get_variable("w")


def _static_to_data(m):
    del m.left.rate
    m.left.rate = jnp.float32(1)


def _append(m):
    m.sizes.append(1)


def _edit_dict(m):
    m.config["a"]["b"] = 3


def _grow(m):
    m.blocks.append(Leaf())


def _shrink(m):
    del m.blocks[0]


def _name(m):
    m.named["c"] = Leaf()


def _value(m):
    m.left.w = jnp.float32(7)


def _buffer(m):
    m.buffer = np.ones(2)


def _static_array(m):
    m.constant = np.ones(3)


def _undo(m):
    m.sizes.append(5)
    m.sizes.pop()


@pytest.mark.parametrize(
    ("write", "traces"),
    [
        (_set_static, 2),
        (_same_static, 1),
        (_add, 2),
        (_delete, 2),
        (_retype, 2),
        (_metadata, 1),
        (_new_metadata, 2),
        (_replace, 2),
        (_equal_module, 1),
        (_tie, 2),
        (_static_to_data, 2),
        (_append, 2),
        (_edit_dict, 2),
        (_grow, 2),
        (_shrink, 2),
        (_name, 2),
        (_value, 1),
        (_buffer, 1),
        (_static_array, 2),
        (_undo, 1),
    ],
)
def test_a_write_between_calls_is_seen(write, traces):
    model = Model()
    model.sizes = [1]
    model.config = {"a": {"b": 1}}
    model.blocks = [Leaf(1.0), Leaf(2.0)]
    model.named = {"a": Leaf(1.0), "b": Leaf(2.0)}
    model.buffer = np.zeros(2)
    model.constant = nnx.Static(np.zeros(3))
    seen = []

    @traced
    def step(model, part):
        seen.append((model.partition().moduledef, model.left is part))
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(model.get_state()))

    assert float(step(model, model.left)) == _total(model)
    write(model)
    assert float(step(model, model.left)) == _total(model)
    assert step.traces == [traces]
    assert seen[-1] == (model.partition().moduledef, True)


def _total(model):
    return float(sum(np.sum(np.asarray(leaf)) for leaf in jax.tree.leaves(model.get_state())))


def test_a_module_slipped_into_a_static_list_is_an_error_with_its_path():
    model = Model()
    model.blocks = []
    step = nnx.jit(lambda m: m.left.w)
    step(model)
    model.blocks.append(Leaf())
    with pytest.raises(nnx.StaticError, match=r"the static attribute `blocks` holds a Leaf \(at `blocks\[0\]`\)"):
        step(model)


# --- donation ---


@pytest.mark.parametrize("options", [{"donate_argnums": 0}, {"donate_argnums": (0,)}, {"donate_argnames": "leaf"}])
def test_a_donated_module_stays_usable(options):
    @traced(**options)
    def step(leaf, x):
        leaf.w = leaf.w + x
        return leaf

    leaf = Leaf()
    leaf.w, leaf.b = jnp.zeros(100), jnp.ones(50)
    old = leaf.w
    for _ in range(3):
        assert step(leaf, 1.0) is leaf
    np.testing.assert_array_equal(leaf.w, np.full(100, 3.0))
    np.testing.assert_array_equal(leaf.b, np.ones(50))
    assert old.is_deleted()
    assert step.traces[0] <= 2


def test_a_donated_module_by_keyword():
    step = nnx.jit(lambda x, *, leaf: setattr(leaf, "w", leaf.w + x), donate_argnames="leaf")
    leaf = Leaf(1.0)
    step(1.0, leaf=leaf)
    step(1.0, leaf=leaf)
    assert float(leaf.w) == 3.0


def test_a_donated_module_inside_of_a_container():
    step = nnx.jit(lambda box: setattr(box["m"], "w", box["m"].w + 1), donate_argnums=0)
    leaf = Leaf(1.0)
    leaf.other = nnx.Param(jnp.ones(4))
    step({"m": leaf})
    step({"m": leaf})
    assert float(leaf.w) == 3.0
    np.testing.assert_array_equal(leaf.other, np.ones(4))


def test_one_array_in_two_slots_of_a_donated_module():
    shared = jnp.arange(4.0)
    leaf = Leaf()
    leaf.a, leaf.b = nnx.Param(shared), nnx.Param(shared)
    step = nnx.jit(lambda leaf: setattr(leaf, "a", leaf.a + 1), donate_argnums=0)
    step(leaf)
    step(leaf)
    np.testing.assert_array_equal(leaf.a, np.arange(4.0) + 2)
    np.testing.assert_array_equal(leaf.b, np.arange(4.0))


def test_one_array_in_a_donated_module_and_in_one_that_is_not():
    shared = jnp.arange(4.0)
    a, b = Leaf(), Leaf()
    a.w, b.w = shared, shared
    step = nnx.jit(lambda a, b: setattr(a, "w", a.w + b.w), donate_argnums=0)
    step(a, b)
    np.testing.assert_array_equal(a.w, 2 * np.arange(4.0))
    np.testing.assert_array_equal(b.w, np.arange(4.0))


def test_one_array_in_two_donated_modules():
    shared = jnp.arange(4.0)
    a, b = Leaf(), Leaf()
    a.w, b.w = shared, shared
    step = nnx.jit(lambda a, b: setattr(a, "w", a.w + b.w), donate_argnums=(0, 1))
    step(a, b)
    step(a, b)
    np.testing.assert_array_equal(a.w, 3 * np.arange(4.0))
    np.testing.assert_array_equal(b.w, np.arange(4.0))


def test_one_donated_module_twice():
    leaf = Leaf(1.0)
    step = nnx.jit(lambda a, b: setattr(a, "w", a.w + b.w), donate_argnums=(0, 1))
    step(leaf, leaf)
    assert float(leaf.w) == 2.0


def test_a_part_of_a_donated_module_beside_it():
    model = Model()
    step = nnx.jit(lambda m, left: setattr(left, "w", m.right.w + left.w), donate_argnums=0)
    step(model, model.left)
    step(model, model.left)
    assert float(model.left.w) == 8.0
    assert float(model.right.w) == 3.0


def test_a_donated_module_whose_structure_changes():
    @nnx.jit(donate_argnums=0)
    def step(model):
        model.new = nnx.Param(model.left.w)
        del model.right

    model = Model()
    step(model)
    assert float(model.new) == float(model.left.w) == 2.0


def test_a_donated_context():
    ctx = nnx.context(dropout=0)
    step = nnx.jit(lambda ctx: ctx.make_rng("dropout"), donate_argnums=0)
    reference = nnx.context(dropout=0)
    for _ in range(3):
        assert jnp.array_equal(jax.random.key_data(step(ctx)), jax.random.key_data(reference.make_rng("dropout")))


def test_donated_arrays_beside_modules():
    step = nnx.jit(lambda leaf, x: leaf.w + x, donate_argnums=1)
    x = jnp.ones(3)
    np.testing.assert_array_equal(step(Leaf(1.0), x), [2.0, 2.0, 2.0])
    assert x.is_deleted()


def test_a_donated_method():
    class Counter(nnx.Module):
        def __init__(self):
            self.total = nnx.Param(jnp.zeros(3))

        @functools.partial(nnx.jit, donate_argnums=0)
        def add(self, x):
            self.total = self.total + x

    counter = Counter()
    counter.add(1.0)
    counter.add(2.0)
    np.testing.assert_array_equal(counter.total, [3.0, 3.0, 3.0])


# --- lower, compile, trace ---


def test_lower_and_compile():
    @nnx.jit
    def step(model, x):
        return model(x), model

    model = Model()
    model.count = jnp.int32(0)
    lowered = step.lower(model, 1.0)
    assert model.count == 0
    assert "func" in lowered.as_text()
    compiled = lowered.compile()
    for i in range(1, 3):
        y, got = compiled(model, 1.0)
        assert got is model
        assert float(y) == 6.0
        assert model.count == i
    assert compiled.cost_analysis() is not None


def test_lower_by_keyword_and_with_statics():
    @nnx.jit(static_argnames="n")
    def step(*, model, n):
        return model.w * n

    compiled = step.lower(model=Leaf(2.0), n=3).compile()
    assert float(compiled(model=Leaf(5.0))) == 15.0


def test_lower_of_methods_and_modules():
    leaf = Leaf(2.0)
    assert float(leaf.compiled.lower(1.0).compile()(1.0)) == 3.0
    assert float(nnx.jit(leaf).lower(2.0).compile()(2.0)) == 6.0


def test_a_compiled_function_refuses_other_structures():
    compiled = nnx.jit(lambda m: m.w).lower(Leaf()).compile()
    with pytest.raises(TypeError, match="does not match"):
        compiled(Leaf(rate=0.25))


def test_trace():
    traced_ = nnx.jit(lambda m, x: m(x)).trace(Model(), 1.0)
    assert "mul" in str(traced_.jaxpr)


def test_lowering_an_abstract_module():
    model = jax.eval_shape(lambda: Model().partition()).merge()
    lowered = nnx.jit(lambda m, x: m(x)).lower(model, 1.0)
    assert lowered.compile() is not None


# --- shardings ---


def test_shardings_are_accepted():
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    step = nnx.jit(lambda m, x: m(x), in_shardings=(None, sharding), out_shardings=sharding)
    model = Model()
    assert float(step(model, jnp.float32(1))) == 6.0
    assert model.count == 1
    everywhere = nnx.jit(lambda m, x: m(x), in_shardings=sharding)
    assert float(everywhere(model, jnp.float32(1))) == 6.0


# --- inside of others ---


def test_nested_jit():
    @nnx.jit
    def inner(leaf, x):
        leaf.w = leaf.w + x
        return leaf

    @traced
    def outer(model):
        assert inner(model.left, 1.0) is model.left
        inner(model.left, 1.0)
        inner(model.right, 2.0)
        return model.left.w

    model = Model()
    assert float(outer(model)) == 4.0
    assert float(outer(model)) == 6.0
    assert (float(model.left.w), float(model.right.w)) == (6.0, 7.0)
    assert outer.traces == [1]


def test_nested_jit_that_changes_the_structure():
    @nnx.jit
    def inner(leaf):
        leaf.seen = nnx.Intermediate(leaf.w)

    @nnx.jit
    def outer(model):
        inner(model.left)
        model.right.w = model.left.seen * 10

    model = Model()
    outer(model)
    assert float(model.left.seen) == 2.0
    assert float(model.right.w) == 20.0


def test_inside_of_raw_jit_by_merge():
    state, moduledef = Model().partition()
    step = nnx.jit(lambda model, x: model(x))

    @jax.jit
    def raw(state, x):
        model = moduledef.merge(state)
        return step(model, x), model.partition()[0]

    y, new = raw(state, 1.0)
    assert float(y) == 6.0
    assert int(new["count"].value) == 1


def test_a_module_of_an_outer_trace_is_not_written():
    model = Model()

    @jax.jit
    def raw(x):
        nnx.jit(lambda m: m(1.0))(model)
        return x

    with pytest.raises(nnx.TraceContextError, match="cannot write `count` here"):
        raw(1.0)
    assert model.count == 0


def test_a_module_of_an_outer_trace_may_be_read():
    model = Model()
    assert float(jax.jit(lambda x: nnx.jit(lambda m: m.left.w)(model) + x)(1.0)) == 3.0


def test_vmapped_raw_use_via_partition():
    stacked, moduledef = jax.vmap(lambda value: Leaf(value).partition())(jnp.arange(3.0))

    def one(state, x):
        leaf = moduledef.merge(state)
        leaf.w = leaf.w + 1
        return nnx.jit(lambda m, x: m(x))(leaf, x), leaf.partition()[0]

    y, state = jax.vmap(one, in_axes=(0, None))(stacked, 2.0)
    np.testing.assert_array_equal(y, [2.0, 4.0, 6.0])
    np.testing.assert_array_equal(state["w"].value, [1.0, 2.0, 3.0])


def test_under_disable_jit():
    model = Model()
    with jax.disable_jit():
        assert float(nnx.jit(lambda m, x: m(x))(model, 1.0)) == 6.0
    assert model.count == 1


def test_eval_shape_of_a_jitted_function_leaves_the_module_alone():
    model = Model()
    step = nnx.jit(lambda m: m.left.w * 2)
    assert jax.eval_shape(lambda: step(model)).shape == ()
    assert float(model.left.w) == 2.0


# --- threads ---


def test_threads_do_not_disturb_each_other():
    step = nnx.jit(lambda leaf, x: setattr(leaf, "w", leaf.w + x) or leaf)
    leaves = [Leaf(0.0) for _ in range(4)]
    errors = []
    barrier = threading.Barrier(len(leaves))

    def work(number):
        try:
            barrier.wait()
            for _ in range(50):
                assert step(leaves[number], float(number)) is leaves[number]
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(leaves))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert [float(leaf.w) for leaf in leaves] == [0.0, 50.0, 100.0, 150.0]
