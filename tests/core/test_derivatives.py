"""nnx.vjp, jvp, jacfwd, jacrev and hessian against plain JAX, with state once and errors that change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.core.models import Leaf

import nnx


class Net(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jax.random.normal(jax.random.key(0), (3, 2)))
        self.b = nnx.Param(jnp.ones(2))
        self.mean = nnx.BatchStat(jnp.zeros(2))
        self.calls = nnx.var("counts", jnp.int32(0))

    def __call__(self, x, ctx=None):
        y = jnp.tanh(x @ self.w + self.b)
        if ctx is not None:
            y = y * jax.random.uniform(ctx.make_rng("noise"))
        self.mean = self.mean + y
        self.calls += 1
        return y


BIAS = nnx.PathGlob("b")
X = np.linspace(-1, 1, 3, dtype=np.float32)


def plain(params, x):
    return jnp.tanh(x @ params["w"] + params["b"])


def params_of(net):
    return {path[0]: node.value for path, node in net.filter(nnx.Param).items()}


def close(state, expected):
    assert {path[0] for path in state.paths} == set(expected)
    for path, node in state.items():
        np.testing.assert_allclose(node.value, expected[path[0]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrap", [lambda f: f, nnx.jit], ids=["eager", "jit"])
def test_vjp(wrap):
    def both(net, x):
        y, pull = nnx.vjp(Net.__call__, net, x)
        return y, pull(jnp.arange(2.0)), pull(jnp.ones(2))

    net = Net()
    expected_y, expected_pull = jax.vjp(plain, params_of(net), X)
    y, first, second = wrap(both)(net, X)
    np.testing.assert_allclose(y, expected_y, rtol=1e-6)
    for got, cotangent in ((first, jnp.arange(2.0)), (second, jnp.ones(2))):
        params, x_bar = expected_pull(cotangent)
        close(got[0], params)
        np.testing.assert_allclose(got[1], x_bar, rtol=1e-5)
    assert net.calls == 1
    np.testing.assert_allclose(net.mean, y)


def test_vjp_of_a_method_with_aux_and_wrt():
    net = Net()

    def call(net, x):
        y = net(x)
        return y.sum(), {"y": y, "net": net}

    out, pull, aux = nnx.vjp(call, net, X, has_aux=True, wrt=BIAS)
    assert aux["net"] is net
    np.testing.assert_allclose(out, aux["y"].sum())
    state, _ = pull(jnp.float32(1))
    assert state.paths == (("b",),)
    _, pull = nnx.vjp(net.__call__, X)
    assert len(pull(jnp.ones(2))) == 2  # the Module's gradient, then that of x
    assert net.calls == 2


@pytest.mark.parametrize("wrap", [lambda f: f, nnx.jit], ids=["eager", "jit"])
def test_jvp(wrap):
    net, ctx = Net(), nnx.context(noise=0)
    direction = net.filter(nnx.Param).map(lambda path, w: jnp.ones_like(w))
    nothing = nnx.State({})

    def push(net, x, ctx):
        return nnx.jvp(Net.__call__, (net, x, ctx), (direction, jnp.ones(3), nothing))

    y, dy = wrap(push)(net, X, ctx)
    scale = jax.random.uniform(nnx.context(noise=0).make_rng("noise"))
    params = params_of(net)
    expected = jax.jvp(lambda *a: plain(*a) * scale, (params, X), (jax.tree.map(jnp.ones_like, params), jnp.ones(3)))
    np.testing.assert_allclose(y, expected[0], rtol=1e-5)
    np.testing.assert_allclose(dy, expected[1], rtol=1e-5)
    assert (int(net.calls), int(ctx.rngs["noise"].count)) == (1, 1)


def test_tangents_that_are_not_named_are_zero():
    net = Net()
    state = net.filter(BIAS).map(lambda path, b: jnp.ones_like(b))
    y, dy, aux = nnx.jvp(lambda net: (net(X), 3), (net,), (state,), has_aux=True)
    np.testing.assert_allclose(dy, 1 - y**2, rtol=1e-5)
    assert aux == 3


@pytest.mark.parametrize("name", ["jacfwd", "jacrev"])
@pytest.mark.parametrize("wrap", [lambda f: f, nnx.jit], ids=["eager", "jit"])
def test_jacobians(wrap, name):
    net = Net()
    ours, raw = getattr(nnx, name), getattr(jax, name)
    close(wrap(ours(Net.__call__))(net, X), raw(plain)(params_of(net), X))
    assert net.calls == 1
    state, by_x = wrap(ours(Net.__call__, argnums=(0, 1)))(net, X)
    expected, expected_x = raw(plain, argnums=(0, 1))(params_of(net), X)
    close(state, expected)
    np.testing.assert_allclose(by_x, expected_x, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(net.mean, 2 * plain(params_of(net), X), rtol=1e-5)
    jacobian, aux = ours(lambda net: (net(X), {"n": 1}), has_aux=True, wrt=BIAS)(net)
    assert jacobian.paths == (("b",),)
    assert aux == {"n": 1}


def test_hessian():
    net = Net()

    def loss(net, x):
        return (net(x) ** 3).sum()

    got = nnx.hessian(loss, argnums=1)(net, X)
    expected = jax.hessian(lambda params, x: (plain(params, x) ** 3).sum(), argnums=1)(params_of(net), X)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert net.calls == 1
    rows = nnx.hessian(loss)(net, X)
    every = jax.hessian(lambda params, x: (plain(params, x) ** 3).sum())(params_of(net), X)
    for path, row in rows.items():
        for column, node in row.value.items():
            np.testing.assert_allclose(node.value, every[path[0]][column[0]], rtol=1e-4, atol=1e-5)


def test_what_is_shared_has_one_derivative():
    leaf = Leaf(3.0)
    _, pull = nnx.vjp(lambda a, b: a.w * b.w, leaf, leaf)
    first, second = pull(jnp.float32(1))
    assert float(first["w"].value) == float(second["w"].value) == 6.0
    assert nnx.jacrev(lambda a: a.w**2)(leaf)["w"].value == 6.0


@pytest.mark.parametrize(
    "call",
    [
        nnx.vjp,
        lambda f, net: nnx.jvp(f, (net,), (nnx.State({}),)),
        lambda f, net: nnx.jacfwd(f)(net),
        lambda f, net: nnx.jacrev(f)(net),
        lambda f, net: nnx.hessian(f)(net),
    ],
)
def test_an_error_inside_changes_nothing(call):
    def bad(net):
        net(X)
        net.extra = nnx.Cache(jnp.ones(2))
        raise ZeroDivisionError

    net = Net()
    with pytest.raises(ZeroDivisionError):
        call(bad, net)
    assert net.calls == 0
    assert not hasattr(net, "extra")
    np.testing.assert_array_equal(net.mean, np.zeros(2))


@pytest.mark.parametrize("name", ["jacfwd", "jacrev", "hessian"])
def test_nothing_to_differentiate_by(name):
    with pytest.raises(nnx.VariableError, match="differentiates by nothing: wrt=.*Cache"):
        getattr(nnx, name)(lambda net: net(X).sum(), wrt=nnx.Cache)(Net())


def test_tangents_that_do_not_fit():
    net = Net()
    with pytest.raises(nnx.StructureError, match="a tangent for each argument: got 2 arguments, 1 tangents"):
        nnx.jvp(Net.__call__, (net, X), (nnx.State({}),))
    with pytest.raises(nnx.StructureError, match="does not have"):
        nnx.jvp(lambda net: net(X), (net,), (nnx.State({"v": nnx.Param(jnp.ones(2))}),))
