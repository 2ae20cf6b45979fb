"""nnx.grad and nnx.value_and_grad: derivatives by Variables, against plain JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx


class Linear(nnx.Module):
    def __init__(self, seed=0, din=3, dout=2):
        self.kernel = nnx.Param(jax.random.normal(jax.random.key(seed), (din, dout)))
        self.bias = nnx.Param(jnp.zeros(dout), sharding=("out",))
        self.mean = nnx.BatchStat(jnp.zeros(dout))
        self.calls = nnx.var("counts", jnp.int32(0))

    def __call__(self, x):
        y = x @ self.kernel + self.bias[None]
        self.mean = 0.5 * self.mean + 0.5 * jnp.mean(y, axis=0)
        self.calls += 1
        return y

    def loss(self, x):
        return jnp.mean(self(x) ** 2)


class Scale(nnx.Module):
    def __init__(self, value):
        self.w = nnx.Param(jnp.float32(value))


X = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)


def plain_loss(params, x):
    return jnp.mean((x @ params["kernel"] + params["bias"][None]) ** 2)


def plain(model):
    return {path[0]: node.value for path, node in model.filter(nnx.Param).items()}


def close(state, expected):
    for path, node in state.items():
        np.testing.assert_allclose(node.value, expected[path[0]], rtol=1e-6)
    assert {path[0] for path in state.paths} == set(expected)


@pytest.mark.parametrize("lift", [lambda f: f, nnx.jit], ids=["eager", "jit"])
def test_against_plain_jax(lift):
    model = Linear()
    expected_value, expected = jax.value_and_grad(plain_loss)(plain(model), X)
    value, grads = lift(nnx.value_and_grad(lambda m, x: m.loss(x)))(model, X)
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    close(grads, expected)
    close(lift(nnx.grad(lambda m, x: m.loss(x)))(model, X), expected)


def test_the_gradient_is_a_state_with_the_schema_of_the_filter():
    model = Linear()
    grads = nnx.grad(lambda m, x: m.loss(x))(model, X)
    assert isinstance(grads, nnx.State)
    assert grads.schema is model.filter(nnx.Param).schema
    assert grads["bias"].sharding == ("out",)


def test_state_updates_come_out_exactly_once():
    model, reference = Linear(), Linear()
    reference(X)
    nnx.grad(lambda m, x: m.loss(x))(model, X)
    assert model.calls == 1
    np.testing.assert_allclose(model.mean, reference.mean, rtol=1e-6)
    nnx.jit(nnx.grad(lambda m, x: m.loss(x)))(model, X)
    assert model.calls == 2


def test_the_function_runs_once_a_call():
    runs = []

    def loss(model):
        runs.append(1)
        return model.w**2

    grad = nnx.grad(loss)
    grad(Scale(1.0))
    grad(Scale(1.0))
    assert len(runs) == 2


def test_parameters_are_not_written():
    model = Linear()
    before = model.kernel
    nnx.grad(lambda m, x: m.loss(x))(model, X)
    assert model.kernel is before


def test_a_parameter_written_inside_comes_out():
    def loss(model):
        model.w = model.w * 3
        return model.w**2

    model = Scale(2.0)
    grads = nnx.grad(loss)(model)
    assert float(grads["w"].value) == 36.0  # of (3w)^2 by the w that went in
    assert float(model.w) == 6.0


def test_structure_changed_inside_comes_out():
    def loss(model):
        model.seen = nnx.Intermediate(model.w * 2)
        model.child = Scale(5.0)
        model.note = "x"
        return model.w**2

    for lift in (lambda f: f, nnx.jit):
        model = Scale(2.0)
        grads = lift(nnx.grad(loss))(model)
        assert grads.paths == (("w",),)
        assert (float(model.seen), float(model.child.w), model.note) == (4.0, 5.0, "x")
        model.child.w = jnp.float32(1)
        assert not isinstance(model.seen, jax.core.Tracer)


# --- wrt ---


@pytest.mark.parametrize(
    ("wrt", "paths"),
    [
        (nnx.Param, {"kernel", "bias"}),
        ("params", {"kernel", "bias"}),
        (nnx.PathGlob("kernel"), {"kernel"}),
        (lambda path, node: path[-1] == "bias", {"bias"}),
        (nnx.All(nnx.Param, nnx.Not(nnx.PathGlob("bias"))), {"kernel"}),
        ((nnx.Param, nnx.BatchStat), {"kernel", "bias", "mean"}),
        (nnx.BatchStat, {"mean"}),
        (nnx.Cache, set()),
        (None, set()),
    ],
)
def test_wrt_selects(wrt, paths):
    model = Linear()
    value, grads = nnx.value_and_grad(lambda m, x: m.loss(x) + jnp.sum(m.mean), wrt=wrt)(model, X)
    assert {path[0] for path in grads.paths} == paths
    assert value.shape == ()
    assert model.calls == 1


def test_wrt_does_not_change_what_is_computed():
    model = Linear()
    expected = jax.grad(plain_loss)(plain(model), X)
    grads = nnx.grad(lambda m, x: m.loss(x), wrt=nnx.PathGlob("bias"))(model, X)
    close(grads, {"bias": expected["bias"]})


def test_wrt_buffers():
    module = nnx.Module()
    module.array = jnp.float32(3)
    grads = nnx.grad(lambda m: m.array**2, wrt=nnx.buffers)(module)
    assert float(grads["array"]) == 6.0


def test_an_integer_parameter_is_an_error_with_its_path():
    model = Scale(1.0)
    model.sub = Linear()
    message = (
        r"cannot differentiate with respect to `sub/calls` \(Counts\) of the Scale: its dtype is int32\. .*narrow the"
    )
    with pytest.raises(nnx.VariableError, match=message):
        nnx.grad(lambda m: m.w, wrt=...)(model)
    assert model.sub.calls == 0


def test_a_python_integer_parameter_is_an_error():
    module = nnx.Module()
    module.w = nnx.Param(2)
    with pytest.raises(nnx.VariableError, match="`w` .* its dtype is int32"):
        nnx.grad(lambda m: m.w * 1.0)(module)


def test_allow_int():
    grads = nnx.grad(lambda m: m.kernel.sum(), wrt=..., allow_int=True)(Linear())
    assert grads["calls"].value.dtype == jax.dtypes.float0
    np.testing.assert_array_equal(grads["kernel"].value, np.ones((3, 2)))


def test_a_python_float_parameter():
    module = nnx.Module()
    module.w = nnx.Param(2.0)
    assert float(nnx.grad(lambda m: m.w**2)(module)["w"].value) == 4.0


# --- argnums ---


def test_argnums_an_array():
    model = Linear()
    expected = jax.grad(plain_loss, argnums=1)(plain(model), X)
    np.testing.assert_allclose(nnx.grad(lambda m, x: m.loss(x), argnums=1)(model, X), expected, rtol=1e-6)
    np.testing.assert_allclose(nnx.grad(lambda m, x: m.loss(x), argnums=-1)(model, X), expected, rtol=1e-6)


def test_argnums_a_tuple_of_both():
    model = Linear()
    expected = jax.grad(plain_loss, argnums=(0, 1))(plain(model), X)
    params, x = nnx.grad(lambda m, x: m.loss(x), argnums=(0, 1))(model, X)
    close(params, expected[0])
    np.testing.assert_allclose(x, expected[1], rtol=1e-6)
    x, params = nnx.grad(lambda m, x: m.loss(x), argnums=(1, 0))(model, X)
    close(params, expected[0])
    np.testing.assert_allclose(x, expected[1], rtol=1e-6)


def test_a_tuple_of_one_gives_a_tuple():
    (grads,) = nnx.grad(lambda m: m.w**2, argnums=(0,))(Scale(3.0))
    assert float(grads["w"].value) == 6.0


def test_two_modules():
    a, b = nnx.grad(lambda a, b: a.w * b.w**2, argnums=(0, 1))(Scale(2.0), Scale(3.0))
    assert (float(a["w"].value), float(b["w"].value)) == (9.0, 12.0)


def test_only_the_second_of_two_modules():
    first, second = Scale(2.0), Scale(3.0)
    grads = nnx.grad(lambda a, b: a.w * b.w**2, argnums=1)(first, second)
    assert float(grads["w"].value) == 12.0


def test_modules_and_arrays_inside_of_containers():
    box = {"models": [Scale(2.0), (Scale(3.0), None)], "x": jnp.float32(4)}

    def loss(box, y):
        first, (second, _) = box["models"]
        return first.w * second.w * box["x"] * y

    grads = nnx.grad(loss)(box, 1.0)
    assert float(grads["models"][0]["w"].value) == 12.0
    assert float(grads["models"][1][0]["w"].value) == 8.0
    assert grads["models"][1][1] is None
    assert float(grads["x"]) == 6.0


def test_keywords_are_passed_and_not_differentiated():
    model, other = Scale(2.0), Scale(5.0)

    def loss(m, *, other, x):
        other.w = other.w + 1
        return m.w * other.w * x

    grads = nnx.grad(loss)(model, x=2.0, other=other)
    assert float(grads["w"].value) == 12.0
    assert float(other.w) == 6.0


def test_an_argument_that_is_not_there():
    with pytest.raises(
        ValueError, match="argnums names argument 2, but the function was called with 1 positional arguments"
    ):
        nnx.grad(lambda m: m.w, argnums=2)(Scale(1.0))


def test_no_module_at_all():
    assert float(nnx.grad(lambda x: x**2)(3.0)) == 6.0
    value, grad = nnx.value_and_grad(lambda x, y: x * y, argnums=(0, 1))(3.0, 4.0)
    assert (float(value), float(grad[0]), float(grad[1])) == (12.0, 4.0, 3.0)


def test_integer_arguments_beside_are_fine():
    assert float(nnx.grad(lambda m, n, flag: m.w * n if flag else m.w)(Scale(1.0), 3, True)["w"].value) == 3.0


def test_a_static_argument_beside_a_module():
    """What is not differentiated may be of any type, as with jax.grad."""
    assert float(nnx.grad(lambda m, mode: m.w * 2 if mode == "double" else m.w)(Scale(1.0), "double")["w"].value) == 2.0


def test_an_integer_array_that_is_differentiated_is_jaxs_own_error():
    with pytest.raises(TypeError, match="grad requires real- or complex-valued inputs"):
        nnx.grad(lambda m, n: m.w * n, argnums=1)(Scale(1.0), 3)


# --- what is differentiated ---


def test_a_bound_method_and_a_module():
    model = Linear()
    expected = jax.grad(plain_loss)(plain(model), X)
    close(nnx.grad(model.loss)(X), expected)
    assert model.calls == 1

    class Loss(Scale):
        def __call__(self, x):
            return self.w**2 * x

    assert float(nnx.grad(Loss(3.0))(2.0)["w"].value) == 12.0


def test_the_decorator_with_options_and_without():
    @nnx.grad
    def plain_grad(m):
        return m.w**2

    @nnx.value_and_grad(has_aux=True, wrt=nnx.Param)
    def with_aux(m):
        return m.w**2, "aux"

    assert float(plain_grad(Scale(3.0))["w"].value) == 6.0
    (value, aux), grads = with_aux(Scale(3.0))
    assert (float(value), aux, float(grads["w"].value)) == (9.0, "aux", 6.0)
    assert plain_grad.__name__ == "plain_grad"


def test_what_cannot_be_called_is_refused():
    with pytest.raises(TypeError, match="nnx.grad takes a callable, got int"):
        nnx.grad(3)


def test_a_value_that_is_no_scalar_is_jaxs_own_error():
    model = Linear()
    with pytest.raises(TypeError, match="only defined for scalar-output functions"):
        nnx.grad(lambda m, x: m(x))(model, X)
    assert model.calls == 0


# --- aux ---


def test_aux():
    model = Linear()
    grads, aux = nnx.grad(lambda m, x: (m.loss(x), {"y": m(x), "model": m, "fresh": Scale(4.0)}), has_aux=True)(
        model, X
    )
    assert aux["model"] is model
    assert aux["y"].shape == (4, 2)
    assert float(aux["fresh"].w) == 4.0
    aux["fresh"].w = jnp.float32(1)
    assert grads.schema is model.filter(nnx.Param).schema
    assert model.calls == 2


def test_aux_of_any_type():
    (_, aux), _ = nnx.value_and_grad(lambda m: (m.w, ("text", None, 3)), has_aux=True)(Scale(1.0))
    assert aux == ("text", None, 3)


@pytest.mark.parametrize("out", [1.0, (1.0,), (1.0, 2.0, 3.0), [1.0, 2.0]])
def test_aux_that_is_missing(out):
    with pytest.raises(TypeError, match=r"with has_aux=True the function returns \(output, aux\), got"):
        nnx.grad(lambda m: out, has_aux=True)(Scale(1.0))


# --- sharing ---


def test_tied_variables_have_one_gradient():
    model = nnx.Module()
    model.a, model.b = Scale(3.0), Scale(0.0)
    model.b.w = model.a.get_variable("w")
    grads = nnx.grad(lambda m: m.a.w * m.b.w)(model)
    assert grads.paths == (("a", "w"),)
    assert float(grads["a", "w"].value) == 6.0


def test_a_shared_module_has_one_gradient():
    model = nnx.Module()
    model.a = model.b = Scale(3.0)
    grads = nnx.grad(lambda m: m.a.w * m.b.w)(model)
    assert {path: float(node.value) for path, node in grads.items()} == {("a", "w"): 6.0}


def test_variables_tied_across_arguments_are_one():
    a, b = Scale(3.0), Scale(0.0)
    b.w = a.get_variable("w")
    first, second = nnx.grad(lambda a, b: a.w * b.w, argnums=(0, 1))(a, b)
    assert float(first["w"].value) == float(second["w"].value) == 6.0


def test_one_module_as_two_arguments():
    a = Scale(3.0)
    grads = nnx.grad(lambda a, b: a.w * b.w)(a, a)
    assert float(grads["w"].value) == 6.0


def test_a_part_beside_its_whole():
    model = nnx.Module()
    model.part = Scale(3.0)
    for argnums in (0, 1):
        args = (model, model.part)
        grads = nnx.grad(lambda m, part: m.part.w * part.w, argnums=argnums)(*args)
        assert [float(node.value) for node in grads.values()] == [6.0]


def test_a_cycle():
    model = Scale(3.0)
    model.itself = model
    assert float(nnx.grad(lambda m: m.itself.w * m.w)(model)["w"].value) == 6.0


# --- nesting ---


def test_a_gradient_of_a_gradient():
    def loss(model):
        model.count = nnx.var("counts", 1) if not hasattr(model, "count") else model.count + 1
        return model.w**3

    def outer(model):
        return nnx.grad(loss)(model)["w"].value

    model = Scale(2.0)
    grads = nnx.grad(outer)(model)
    assert float(grads["w"].value) == 12.0
    assert int(model.count) == 1
    assert not isinstance(model.count, jax.core.Tracer)


@pytest.mark.parametrize("lift", [lambda f: f, nnx.jit])
def test_a_step_by_the_gradient_of_an_inner_step(lift):
    """Differentiate through an update: the meta-gradient."""

    def inner_step(model, x):
        grads = nnx.grad(lambda m: (m.w * x - 1) ** 2)(model)
        model.w = model.w - 0.1 * grads["w"].value

    def outer(model, x):
        inner_step(model, x)
        return (model.w - 5) ** 2

    def reference(w, x):
        w = w - 0.1 * jax.grad(lambda w: (w * x - 1) ** 2)(w)
        return (w - 5) ** 2

    model = Scale(2.0)
    grads = lift(nnx.grad(outer))(model, 3.0)
    np.testing.assert_allclose(grads["w"].value, jax.grad(reference)(2.0, 3.0), rtol=1e-6)
    np.testing.assert_allclose(model.w, 2.0 - 0.1 * 2 * (6 - 1) * 3, rtol=1e-6)


def test_inside_of_raw_grad_by_merge():
    state, moduledef = Scale(2.0).partition()

    def loss(state):
        model = moduledef.merge(state)
        inner = nnx.grad(lambda m: m.w**3)(model)
        return inner["w"].value

    assert float(jax.grad(loss)(state)["w"].value) == 12.0


def test_jit_inside_of_grad():
    @nnx.jit
    def forward(model, x):
        model.calls += 1
        return jnp.mean((x @ model.kernel) ** 2)

    model = Linear()
    grads = nnx.grad(lambda m, x: forward(m, x) + forward(m, x))(model, X)
    expected = jax.grad(lambda k: 2 * jnp.mean((X @ k) ** 2))(model.kernel)
    np.testing.assert_allclose(grads["kernel"].value, expected, rtol=1e-6)
    assert model.calls == 2


def test_a_training_step():
    @nnx.jit
    def step(model, x):
        value, grads = nnx.value_and_grad(lambda m, x: m.loss(x))(model, x)
        model.update_state(jax.tree.map(lambda w, g: w - 0.1 * g, model.filter(nnx.Param), grads))
        return value

    model = Linear()
    params = plain(model)
    for _ in range(3):
        value, grads = jax.value_and_grad(plain_loss)(params, X)
        params = jax.tree.map(lambda w, g: w - 0.1 * g, params, grads)
        np.testing.assert_allclose(step(model, X), value, rtol=1e-5)
    close(model.filter(nnx.Param), params)
    assert model.calls == 3
    assert step._cache_size() == 1


def test_under_vmap_by_partition():
    states, moduledef = jax.vmap(lambda v: Scale(v).partition())(jnp.arange(3.0))
    grads = jax.vmap(lambda state: nnx.grad(lambda m: m.w**2)(moduledef.merge(state)))(states)
    np.testing.assert_array_equal(grads["w"].value, [0.0, 2.0, 4.0])


# --- exceptions ---


def test_an_exception_leaves_the_module_as_it_was():
    model = Linear()
    state, moduledef = model.partition()

    def loss(model):
        model(X)
        model.extra = 1
        raise ZeroDivisionError("inside")

    with pytest.raises(ZeroDivisionError, match="inside"):
        nnx.grad(loss)(model)
    after, same = model.partition()
    assert same is moduledef
    assert all(new is old for new, old in zip(after.raw_values, state.raw_values, strict=True))


def test_a_module_of_the_outside_is_not_written():
    model, other = Scale(1.0), Scale(2.0)

    def loss(model):
        other.w = model.w
        return model.w**2

    with pytest.raises(nnx.TraceContextError, match=r"cannot write `Scale\.w` here"):
        nnx.grad(loss)(model)
    assert float(other.w) == 2.0


def test_a_module_of_the_outside_may_be_read():
    other = Scale(3.0)
    assert float(nnx.grad(lambda m: m.w * other.w)(Scale(1.0))["w"].value) == 3.0


def test_raw_grad_of_a_module_says_what_to_do():
    with pytest.raises(nnx.AttributeKindError, match=r"a Scale is an nnx\.Module and not a pytree.*nnx\.grad"):
        jax.grad(lambda m: m.w)(Scale(1.0))


# --- holomorphic, containers ---


def test_holomorphic():
    module = nnx.Module()
    module.w = nnx.Param(jnp.complex64(1 + 2j))
    grads = nnx.grad(lambda m: m.w**2, holomorphic=True)(module)
    np.testing.assert_allclose(grads["w"].value, 2 + 4j)


def test_a_parameter_that_is_a_pytree():
    module = nnx.Module()
    module.w = nnx.Param({"a": jnp.float32(2), "b": [jnp.float32(3)]})
    grads = nnx.grad(lambda m: m.w["a"] * m.w["b"][0])(module)
    assert jax.tree.map(float, grads["w"].value) == {"a": 3.0, "b": [2.0]}


def test_a_partial_of_a_function():
    def loss(factor, model):
        return model.w * factor

    assert float(nnx.grad(functools.partial(loss, 4.0))(Scale(1.0))["w"].value) == 4.0


def test_the_compiled_step_is_as_large_as_the_hand_written_one():
    """Gradients and aux of an inner grad carry only what changed, so compiled memory equals the hand-written step's."""
    model = Linear(0, 64, 64)
    x = jnp.ones((8, 64))

    @nnx.jit
    def step(model, x):
        grads = nnx.grad(lambda m, x: jnp.mean((x @ m.kernel) ** 2))(model, x)
        model.kernel = model.kernel - 0.1 * grads["kernel"].value

    @jax.jit
    def hand(kernel, x):
        return kernel - 0.1 * jax.grad(lambda k: jnp.mean((x @ k) ** 2))(kernel)

    ours = step.lower(model, x).compile().memory_analysis()
    theirs = hand.lower(model.kernel, x).compile().memory_analysis()
    assert ours.output_size_in_bytes == theirs.output_size_in_bytes
    assert ours.temp_size_in_bytes <= theirs.temp_size_in_bytes
