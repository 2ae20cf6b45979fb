"""nnx.custom_vjp: gradients of one's own as States, with the state of the forward function kept."""

import jax.numpy as jnp
import numpy as np
import pytest
from tests.core.models import Leaf

import nnx


class Net(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jnp.float32(3))
        self.b = nnx.Param(jnp.float32(1))
        self.seen = nnx.BatchStat(jnp.float32(0))


def forward_pass(net, x):
    net.seen = net.seen + x
    return net.w * x + net.b


def made(bwd, fwd=None, **options):
    f = nnx.custom_vjp(forward_pass, **options)
    f.defvjp(fwd or (lambda net, x: (f(net, x), (net, x))), bwd)
    return f


def clipped(residuals, g):
    net, x = residuals
    return nnx.State({"w": nnx.Param(10 * g * x)}), g * net.w


@pytest.mark.parametrize("wrap", [lambda f: f, nnx.jit], ids=["eager", "jit"])
def test_the_gradient_is_the_given_one_and_statistics_survive(wrap):
    f = made(clipped)
    net = Net()
    assert wrap(f)(net, 2.0) == 7.0
    assert net.seen == 2.0
    grads, x_bar = wrap(nnx.grad(lambda net, x: f(net, x) ** 2, argnums=(0, 1)))(net, 2.0)
    # The cotangent is 2 * 7; a Variable that is not named has the gradient zero.
    assert {path: float(node.value) for path, node in grads.items()} == {("w",): 280.0, ("b",): 0.0}
    assert x_bar == 42.0
    assert net.seen == 4.0


def test_none_is_zero_and_residuals_may_be_anything():
    f = made(lambda residuals, g: (None, g * residuals["k"]), lambda net, x: (forward_pass(net, x), {"k": 5.0 * x}))
    net = Net()
    grads, x_bar = nnx.grad(f, argnums=(0, 1))(net, 2.0)
    assert (float(grads["w"].value), float(grads["b"].value), float(x_bar)) == (0.0, 0.0, 10.0)
    assert net.seen == 2.0


def test_arguments_that_are_not_differentiated():
    @nnx.custom_vjp
    def plain(net, x):
        return net.w * x

    scaled = nnx.custom_vjp(lambda how, net, x: net.w * x, nondiff_argnums=0)
    seen = []

    def bwd(how, residuals, g):
        seen.append(how)
        return None, g * 100

    scaled.defvjp(lambda how, net, x: (net.w * x, None), bwd)
    assert nnx.grad(scaled, argnums=2)("up", Net(), 2.0) == 100.0
    assert seen == ["up"]
    with pytest.raises(TypeError, match=r"`.*plain` has no gradient yet, call `.*plain\.defvjp\(fwd, bwd\)`"):
        plain(Net(), 1.0)


def test_on_methods():
    class Straight(nnx.Module):
        def __init__(self):
            self.scale = nnx.Param(jnp.float32(2))

        @nnx.custom_vjp
        def __call__(self, x):
            return jnp.round(x * self.scale)

    Straight.__call__.defvjp(
        lambda self, x: (jnp.round(x * self.scale), self), lambda module, g: (None, g * module.scale)
    )
    module = Straight()
    assert module(1.3) == 3.0
    assert nnx.grad(lambda x: module(x) + 0)(1.3) == 2.0


def test_under_the_other_transforms():
    f = made(clipped)
    xs = jnp.arange(1.0, 4.0)
    mapped = nnx.vmap(nnx.grad(f), in_axes=(None, 0), variable_reduce={nnx.BatchStat: "sum"})
    net = Net()
    np.testing.assert_allclose(mapped(net, xs)["w"].value, 10 * xs)
    assert net.seen == 6.0
    net = Net()

    def total(net):
        return nnx.scan(lambda net, carry, x: (carry + f(net, x), None))(net, jnp.float32(0), xs)[0]

    assert nnx.grad(total)(net)["w"].value == 60.0
    assert net.seen == 6.0


def test_shared_modules_get_the_sum():
    f = nnx.custom_vjp(lambda a, b: a.w * b.w)
    f.defvjp(
        lambda a, b: (a.w * b.w, None),
        lambda _, g: (nnx.State({"w": nnx.Param(g)}), nnx.State({"w": nnx.Param(10 * g)})),
    )
    leaf = Leaf(2.0)
    assert nnx.grad(lambda leaf: f(leaf, leaf))(leaf)["w"].value == 11.0


@pytest.mark.parametrize(
    ("bwd", "fwd", "error", "match"),
    [
        (lambda r, g: g, None, nnx.StructureError, "returns a tuple with a part for each of the 2 arguments, got"),
        (lambda r, g: (None, None, None), None, nnx.StructureError, "each of the 2 arguments, got 3 parts"),
        (lambda r, g: (g, g), None, nnx.StructureError, "for a Net, whose gradient is a State"),
        (
            lambda r, g: (nnx.State({"v": nnx.Param(g)}), g),
            None,
            nnx.StructureError,
            "gives a gradient for `v`, which the Net does not have",
        ),
        (
            lambda r, g: (nnx.State({"w": nnx.Param(g * jnp.ones(3))}), g),
            None,
            nnx.StructureError,
            r"gives `w` a gradient of shapes \[\(3,\)\], and the Variable has \[\(\)\]",
        ),
        (
            lambda r, g: (setattr(r[0], "w", g), None),
            None,
            nnx.VariableError,
            "changes a Module of its residuals",
        ),
        (clipped, lambda net, x: net.w * x, nnx.StructureError, r"returns \(output, residuals\)"),
    ],
)
def test_wrong_rules(bwd, fwd, error, match):
    f = made(bwd, fwd)
    net = Net()
    with pytest.raises(error, match=match):
        nnx.grad(f, argnums=(0, 1))(net, 2.0)
    assert net.seen == 0.0


def test_a_forward_function_that_changes_more_than_the_function():
    f = nnx.custom_vjp(lambda net, x: net.w * x)

    def fwd(net, x):
        net.seen = x
        return net.w * x, None

    f.defvjp(fwd, lambda r, g: (None, g))
    with pytest.raises(nnx.VariableError, match="both must change the same"):
        nnx.grad(nnx.jit(f), argnums=1)(Net(), 2.0)
