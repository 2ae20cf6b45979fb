"""eval_shape, make_jaxpr and checkify of functions of Modules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from tests.core.models import Everything, Leaf

import nnx


class Net(nnx.Module):
    def __init__(self, din, dout, *, ctx):
        self.w = nnx.Param(jax.random.normal(ctx.make_rng("params"), (din, dout)), sharding=("in", "out"))
        self.calls = nnx.var("counts", jnp.int32(0))

    def __call__(self, x):
        self.calls += 1
        self.last = nnx.Cache(x)
        return x @ self.w


def test_a_constructor():
    ctx = nnx.context(0)
    net = nnx.eval_shape(Net, 10**6, 10**7, ctx=ctx)  # 40 terabytes
    assert isinstance(net, Net)
    assert net.w == jax.ShapeDtypeStruct((10**6, 10**7), jnp.float32)
    assert net.get_variable("w").sharding == ("in", "out")
    assert int(ctx.rngs["params"].count) == 0
    real = Net(2, 3, ctx=nnx.context(0))
    assert nnx.eval_shape(Net, 2, 3, ctx=nnx.context(0)).partition().moduledef == real.partition().moduledef


def test_a_call_leaves_its_arguments_alone():
    net = Net(2, 3, ctx=nnx.context(0))
    out = nnx.eval_shape(net, jnp.ones((4, 2)))
    assert out == jax.ShapeDtypeStruct((4, 3), jnp.float32)
    assert net.calls == 0
    assert not hasattr(net, "last")


def test_a_returned_module_is_a_changed_copy():
    net = Net(2, 3, ctx=nnx.context(0))

    def call(net, x):
        net(x)
        return net

    copy = nnx.eval_shape(call, net, jax.ShapeDtypeStruct((4, 2), jnp.float32))
    assert copy is not net
    assert copy.last == jax.ShapeDtypeStruct((4, 2), jnp.float32)
    assert isinstance(net.w, jax.Array)
    again = nnx.eval_shape(call, copy, jax.ShapeDtypeStruct((5, 2), jnp.float32))
    assert again.last.shape == (5, 2)


def test_it_agrees_with_the_concrete_call():
    model = nnx.eval_shape(Everything)
    state, moduledef = model.partition()
    real, real_moduledef = Everything().partition()
    assert moduledef == real_moduledef
    assert [(np.shape(a), jnp.result_type(a)) for a in jax.tree.leaves(real)] == [
        (a.shape, a.dtype) for a in jax.tree.leaves(state)
    ]


def test_statics_stay_what_they_are():
    def call(leaf, n, how, flag):
        assert (n, how, flag) == (3, "up", True)
        return leaf(jnp.ones(n))

    assert nnx.eval_shape(call, Leaf(), 3, "up", True).shape == (3,)
    shapes = nnx.jit(call, static_argnums=(1, 2, 3)).eval_shape(Leaf(), 3, "up", True)
    assert shapes.shape == (3,)


def test_keys_and_shardings():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    out = nnx.eval_shape(lambda x: x + 1, jax.ShapeDtypeStruct((4,), jnp.float32, sharding=sharding))
    assert out.shape == (4,)
    model = Leaf()
    model.key = nnx.var("keys", jax.random.key(0))
    copy = nnx.eval_shape(lambda m: m, model)
    assert jnp.issubdtype(copy.key.dtype, jax.dtypes.prng_key)


def test_the_jaxpr():
    net = Net(2, 3, ctx=nnx.context(0))
    jaxpr = nnx.make_jaxpr(lambda net, x: net(x))(net, jnp.ones((4, 2)))
    # calls and w go in beside x; what is returned, calls and the new Variable come out.
    assert len(jaxpr.in_avals) == 3
    assert [aval.shape for aval in jaxpr.out_avals] == [(4, 3), (), (4, 2)]
    assert net.calls == 0
    jaxpr, shapes = nnx.make_jaxpr(net, return_shape=True)(jnp.ones((4, 2)))
    assert shapes.shape == (4, 3)
    assert "dot_general" in str(jaxpr)


def checked(net, x):
    y = net(x)
    checkify.check((x > 0).all(), "not positive: {x}", x=x.min())
    return jnp.log(y)


@pytest.mark.parametrize("wrap", [lambda f: f, nnx.jit], ids=["eager", "jit"])
def test_checkify(wrap):
    net = Net(2, 3, ctx=nnx.context(0))
    run = wrap(nnx.checkify(checked))
    error, y = run(net, jnp.ones((4, 2)))
    error.throw()
    assert y.shape == (4, 3)
    error, _ = run(net, -jnp.ones((4, 2)))
    with pytest.raises(checkify.JaxRuntimeError, match="not positive: -1"):
        error.throw()
    assert net.calls == 2
    error, _ = wrap(nnx.checkify(jnp.log, errors=checkify.float_checks))(jnp.float32(-1))
    assert "nan" in error.get()
