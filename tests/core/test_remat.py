"""nnx.remat: the same numbers, state once, the same keys when it is computed again, less kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx


class Net(nnx.Module):
    def __init__(self, *, ctx):
        self.w = nnx.Param(jax.random.normal(ctx.make_rng("params"), (8, 8)))
        self.mean = nnx.BatchStat(jnp.zeros(8))
        self.calls = nnx.var("counts", jnp.int32(0))

    def __call__(self, x, ctx, scale=1.0):
        keep = jax.random.bernoulli(ctx.make_rng("dropout"), 0.5, x.shape)
        y = jnp.sin(jnp.where(keep, x, 0.0) @ self.w) * scale
        self.mean = self.mean + y.mean(0)
        self.calls += 1
        return y


X = np.linspace(-1, 1, 32, dtype=np.float32).reshape(4, 8)


def run(call, wrap):
    net, ctx = Net(ctx=nnx.context(0)), nnx.context(dropout=1)
    grads = wrap(nnx.grad(lambda net, ctx: (call(net, X, ctx) ** 2).sum()))(net, ctx)
    return grads["w"].value, net, ctx


@pytest.mark.parametrize("wrap", [lambda f: f, nnx.jit], ids=["eager", "jit"])
def test_it_is_the_function(wrap):
    expected, net, ctx = run(Net.__call__, wrap)
    got, other, other_ctx = run(nnx.remat(Net.__call__), wrap)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    np.testing.assert_allclose(other.mean, net.mean, rtol=1e-5)
    assert net.calls == other.calls == 1
    assert int(ctx.rngs["dropout"].count) == int(other_ctx.rngs["dropout"].count) == 1


def test_policies_and_options_reach_jax():
    def residuals(policy):
        def loss(net, ctx):
            return nnx.remat(Net.__call__, policy=policy, prevent_cse=False)(net, X, ctx).sum()

        return str(nnx.make_jaxpr(nnx.grad(loss))(Net(ctx=nnx.context(0)), nnx.context(dropout=1)))

    policies = jax.checkpoint_policies
    everything, nothing = residuals(policies.everything_saveable), residuals(policies.nothing_saveable)
    assert nothing.count(" sin ") == everything.count(" sin ") + 0
    assert nothing.count("dot_general") > everything.count("dot_general")
    assert "prevent_cse=False" in nothing


def test_modules_methods_and_decorators():
    class Twice(nnx.Module):
        def __init__(self, *, ctx):
            self.net = Net(ctx=ctx)

        @nnx.remat
        def once(self, x, ctx):
            return self.net(x, ctx)

        @nnx.remat(static_argnums=3)
        def __call__(self, x, ctx, again):
            y = self.once(x, ctx)
            return self.net(y, ctx) if again else y

    twice, ctx = Twice(ctx=nnx.context(0)), nnx.context(dropout=1)
    twice(X, ctx, True)
    assert (int(twice.net.calls), int(ctx.rngs["dropout"].count)) == (2, 2)
    nnx.remat(twice.net)(X, ctx)
    nnx.remat(twice.once)(X, ctx)
    assert (int(twice.net.calls), int(ctx.rngs["dropout"].count)) == (4, 4)


def test_static_arguments_are_what_they_are():
    seen = []

    def call(net, x, ctx, layers, mode, *, flag):
        seen.append((layers, mode, flag))
        for _ in range(layers):
            x = net(x, ctx)
        return x

    net, ctx = Net(ctx=nnx.context(0)), nnx.context(dropout=1)
    nnx.remat(call, static_argnums=3)(net, X, ctx, 2, "fast", flag=True)
    assert seen == [(2, "fast", True)]
    assert net.calls == 2


def test_new_structure_comes_out_and_modules_come_back_as_themselves():
    def call(net, ctx):
        net.last = nnx.Cache(net(X, ctx))
        return net

    net, ctx = Net(ctx=nnx.context(0)), nnx.context(dropout=1)
    assert nnx.remat(call)(net, ctx) is net
    assert net.last.shape == (4, 8)


def test_an_error_inside_changes_nothing():
    def bad(net, ctx):
        net(X, ctx)
        raise ZeroDivisionError

    net, ctx = Net(ctx=nnx.context(0)), nnx.context(dropout=1)
    with pytest.raises(ZeroDivisionError):
        nnx.remat(bad)(net, ctx)
    assert (int(net.calls), int(ctx.rngs["dropout"].count)) == (0, 0)
