"""nnx.jit: jax.jit for functions of Modules, with everything that they do to them."""

import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.core.jit_models import Leaf, Model, Pair, traced

import nnx

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


# --- both ways to find Modules ---


def test_modules_in_containers_after_modules_as_arguments():
    """The first are found among the arguments; the others by JAX, from then on for all."""
    step = traced(lambda leaf, rest: setattr(leaf, "w", leaf.w + rest["x"].w) if isinstance(rest, dict) else leaf.w)
    a, b = Leaf(1.0), Leaf(2.0)
    assert float(step(a, 3.0)) == 1.0
    for i in range(3):
        step(a, {"x": b})
        assert float(a.w) == 1 + 2 * (i + 1)
    assert float(step(a, 3.0)) == 7.0
    step(a, {"x": a})
    assert float(a.w) == 14.0


def test_a_dict_with_a_definition_as_its_key_is_no_module():
    leaf = Leaf(2.0)
    state, moduledef = leaf.partition()
    out = nnx.jit(lambda given: {key: value["w"].value for key, value in given.items()})({moduledef: state})
    assert float(out[moduledef]) == 2.0


def test_an_error_of_the_kind_that_jit_itself_reacts_to_is_raised_once():
    calls = []

    @nnx.jit
    def step(leaf):
        calls.append(1)
        jax.jit(lambda m: m.w)(leaf)

    with pytest.raises(nnx.AttributeKindError, match="is an nnx.Module and not a pytree"):
        step(Leaf())
    assert calls == [1]


@pytest.mark.parametrize("wrap", [lambda leaf: leaf, lambda leaf: {"m": leaf}], ids=["itself", "in a container"])
def test_under_disable_jit_the_function_gets_the_very_arguments(wrap):
    seen = []
    step = nnx.jit(lambda given, *, other: seen.append((given, other)))
    given, other = wrap(Leaf()), Leaf()
    with jax.disable_jit():
        step(given, other=other)
    assert seen == [(given, other)]


def test_lowering_and_calling_trace_once():
    step = traced(lambda leaf, x: leaf.w + x)
    leaf = Leaf(1.0)
    step.lower(leaf, 2.0)
    step(leaf, 2.0)
    assert step.traces == [1]
