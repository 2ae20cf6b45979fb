"""The first run of a compiled loop's body finds the structure as it was, as the loop in Python does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx


class Layer(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jnp.float32(1))
        self.rate = 3
        self.names = ["a"]


def reads_a_static_that_it_sets(m, c):
    m.w = m.w + m.rate
    m.rate = 7
    return c + m.w


def sets_a_static_and_reads_it(m, c):
    m.rate = 7
    return c + m.rate


def hands_on_a_static(m, c):
    rate, m.rate = m.rate, 5
    return c + rate


def makes_a_variable_once(m, c):
    if not hasattr(m, "made"):
        m.made = nnx.BatchStat(m.w)
        m.rate = 9
    m.made = m.made + m.rate
    return c + m.made


def greets_at_first(m, c):
    if hasattr(m, "made"):
        m.made = c
    else:
        c = c + 100
        m.made = nnx.BatchStat(c)
    return c + 1


def drops_a_variable(m, c):
    if hasattr(m, "w"):
        c = c + m.w
        del m.w
    return c + 1


def drops_a_module(m, c):
    if hasattr(m, "sub"):
        c = c * m.sub.w
        del m.sub
    return c + 1


def ties(m, c):
    m.other = m.sub
    m.other.w = m.sub.w + 1
    return c + m.w


BODIES = [
    reads_a_static_that_it_sets,
    sets_a_static_and_reads_it,
    hands_on_a_static,
    makes_a_variable_once,
    greets_at_first,
    drops_a_variable,
    drops_a_module,
    ties,
]


def in_python(body, n, m, c):
    for _ in range(n):
        c = body(m, c)
    return c


def in_fori(body, n, m, c):
    return nnx.fori_loop(0, n, lambda i, val: (val[0], body(*val)), (m, c))[1]


def in_while(body, n, m, c):
    return nnx.while_loop(lambda val: val[0] < n, lambda val: (val[0] + 1, val[1], body(*val[1:])), (0, m, c))[2]


def in_scan(body, n, m, c):
    return nnx.scan(lambda m, c, x: (body(m, c), None))(m, c, jnp.arange(float(n)))[0]


def in_scan_as_carry(body, n, m, c):
    def step(carry, x):
        m, c = carry
        return (m, body(m, c)), None

    return nnx.scan(step, reverse=True)((m, c), jnp.arange(float(n)))[0][1]


def made():
    m = Layer()
    m.sub = Layer()
    m.sub.w = jnp.float32(4)
    return m


@pytest.mark.parametrize("loop", [in_fori, in_while, in_scan, in_scan_as_carry])
@pytest.mark.parametrize("body", BODIES)
def test_the_loop_is_the_loop_in_python(body, loop):
    one, other = made(), made()
    np.testing.assert_allclose(loop(body, 3, other, jnp.float32(2)), in_python(body, 3, one, jnp.float32(2)), rtol=1e-6)
    assert other.partition().moduledef is one.partition().moduledef
    for path, value in one.partition().state.items():
        np.testing.assert_allclose(other.partition().state[path].value, value.value, rtol=1e-6)


@pytest.mark.parametrize(
    "more",
    [
        lambda m: (m.rate < 5) & (m.w < 10),
        lambda m: m.w < 10 if m.rate == 3 else m.w < 4,
        lambda m: not hasattr(m, "made") or m.made < 6,
    ],
)
def test_the_condition_is_asked_with_the_structure_as_it_is(more):
    def body(m):
        m.rate = 7
        m.w = m.w + 1
        m.made = m.w * 2 if hasattr(m, "made") else nnx.BatchStat(m.w)
        return m

    one, other = made(), made()
    while more(one):
        body(one)
    assert nnx.while_loop(more, body, other) is other
    assert float(other.w) == float(one.w)
    assert float(other.made) == float(one.made)


def counts(m, c):
    m.rate = m.rate + 1
    return c


def appends(m, c):
    m.names.append("b")
    return c


@pytest.mark.parametrize("loop", [in_fori, in_while, in_scan, in_scan_as_carry])
@pytest.mark.parametrize(("body", "match"), [(counts, "static `rate` 4 -> 5"), (appends, "static `names`")])
def test_a_static_that_changes_in_each_run_is_refused(body, match, loop):
    m = made()
    with pytest.raises(nnx.StructureError, match=match):
        loop(body, 3, m, jnp.float32(0))
    assert m.rate == 3
    assert m.names == ["a"]


class Block(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jnp.float32(2))
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return self.w * x


class Plain(nnx.Module):
    def __init__(self):
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return x + 1


@pytest.mark.parametrize("kind", [Block, Plain])
def test_layers_each_set_their_own_static(kind):
    stack = nnx.Stack(kind, 3)()
    blocks = [kind() for _ in range(3)]
    x = jnp.float32(1)
    for block in blocks:
        x = block(x)
    assert float(stack(jnp.float32(1))) == float(x)
    assert stack.layers.calls == blocks[0].calls == 1


def test_what_is_alike_runs_but_one_body():
    def step(m, c, x):
        m.seen = nnx.BatchStat(jax.nn.relu(c))
        m.rate = 5
        return c + x, None

    def call(m):
        return nnx.scan(step)(m, jnp.float32(0), jnp.arange(3.0))[0]

    assert "cond" not in str(nnx.make_jaxpr(call)(made()))
