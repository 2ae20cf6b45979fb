"""Operations counted in a jaxpr, beside what the definition says and what XLA counts."""

import jax
import jax.numpy as jnp
import pytest

from nnx.core._flops import TOTAL, count_flops, scope


def flops(function, *args):
    return count_flops(jax.make_jaxpr(function)(*args)).flops[TOTAL]


A, B = jnp.ones((3, 4)), jnp.ones((4, 5))


def test_products_and_elements():
    assert flops(lambda a, b: a @ b, A, B) == 2 * 3 * 4 * 5
    assert flops(lambda a: jnp.tanh(a) + 1, A) == 24
    assert flops(lambda a: a.sum(), A) == 12
    assert flops(lambda a: a.T.reshape(-1)[:3], A) == 0
    assert flops(lambda i: i + 1, jnp.arange(3)) == 0


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions(groups):
    image, kernel = jnp.ones((2, 8, 8, 4)), jnp.ones((3, 3, 4 // groups, 6))

    def convolve(image, kernel):
        return jax.lax.conv_general_dilated(
            image, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
        )

    counted = flops(convolve, image, kernel)
    assert counted == 2 * (2 * 6 * 6 * 6) * (3 * 3 * 4 // groups)


def test_loops_and_branches():
    def body(carry, _):
        return carry @ carry, None

    square = jnp.ones((4, 4))
    assert flops(lambda a: jax.lax.scan(body, a, length=7)[0], square) == 7 * 2 * 64
    assert flops(lambda a: jax.lax.while_loop(lambda a: a[0, 0] < 9, lambda a: a @ a, a), square) == 2 * 64
    assert flops(lambda p, a: jax.lax.cond(p, lambda a: a @ a, jnp.tanh, a), True, square) == 2 * 64
    assert flops(jax.checkpoint(jax.jit(lambda a: a @ a)), square) == 2 * 64


def test_scopes_count_for_all_around_them():
    inner = jax.jit(lambda a: a @ a)

    def function(a):
        with scope(0, 0):
            a = a + 1
            with scope(1, 1):
                a, _ = jax.lax.scan(lambda carry, _: (inner(carry), None), a, length=2)
        with scope(1, 2):
            return jnp.exp(a)

    found = count_flops(jax.make_jaxpr(function)(jnp.ones((4, 4))))
    assert found.flops == {TOTAL: 16 + 256 + 16, 0: 16 + 256, 1: 256 + 16}
    assert found.calls == {0: {0}, 1: {1, 2}}


def test_it_agrees_with_xla():
    def network(x, kernel):
        return jax.nn.relu(x @ kernel) @ kernel.T

    x, kernel = jnp.ones((16, 32)), jnp.ones((32, 64))
    compiled = jax.jit(network).lower(x, kernel).compile().cost_analysis()
    assert flops(network, x, kernel) == pytest.approx(compiled["flops"], rel=0.01)
