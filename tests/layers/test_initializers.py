"""Initializers: JAX's values, and identity by value."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx
from nnx.layers import initializers

FACTORIES = [
    ("constant", (0.5,), {}),
    ("delta_orthogonal", (), {}),
    ("glorot_normal", (), {}),
    ("glorot_uniform", (), {"in_axis": -1, "out_axis": -2}),
    ("he_normal", (), {}),
    ("he_uniform", (), {}),
    ("kaiming_normal", (), {}),
    ("kaiming_uniform", (), {}),
    ("lecun_normal", (), {"batch_axis": (0,)}),
    ("lecun_uniform", (), {}),
    ("normal", (0.02,), {}),
    ("orthogonal", (2.0,), {"column_axis": 0}),
    ("truncated_normal", (0.1,), {"lower": -1.0, "upper": 1.5}),
    ("uniform", (0.3,), {}),
    ("variance_scaling", (2.0, "fan_avg", "uniform"), {"in_axis": [0, 1]}),
    ("xavier_normal", (), {}),
    ("xavier_uniform", (), {}),
]


@pytest.mark.parametrize(("name", "args", "kwargs"), FACTORIES)
def test_values_are_those_of_jax(name, args, kwargs, key):
    ours = getattr(initializers, name)(*args, **kwargs)
    theirs = getattr(jax.nn.initializers, name)(*args, **kwargs)
    theirs = jax.jit(theirs, static_argnums=(1, 2))  # ours are compiled, which rounds differently from op by op
    np.testing.assert_array_equal(ours(key, (3, 3, 4), jnp.float32), theirs(key, (3, 3, 4), jnp.float32))
    assert ours(key, (3, 3, 4)).dtype == jnp.float32


@pytest.mark.parametrize(("name", "args", "kwargs"), FACTORIES)
def test_equal_by_value(name, args, kwargs):
    make = getattr(initializers, name)
    init = make(*args, **kwargs)
    assert init == make(*args, **kwargs)
    assert hash(init) == hash(make(*args, **kwargs))
    assert init == copy.deepcopy(init) == pickle.loads(pickle.dumps(init))
    assert repr(init).startswith(init.name + "(")


def test_defaults_and_aliases_are_no_difference():
    assert initializers.lecun_normal() == initializers.lecun_normal(in_axis=-2)
    assert initializers.xavier_normal() == initializers.glorot_normal()
    assert initializers.zeros_init() is initializers.zeros
    assert initializers.ones_init() is initializers.ones


def test_different_options_differ():
    assert initializers.normal(0.01) != initializers.normal(0.02)
    assert initializers.normal() != initializers.truncated_normal()
    assert initializers.constant(0.0) != initializers.constant(-0.0)
    assert initializers.constant(1) != initializers.constant(True)
    assert initializers.constant(np.arange(3)) != initializers.constant(np.arange(1, 4))


def test_constant_array_is_compared_by_content_and_kept_safe(key):
    values = np.arange(3.0)
    init = initializers.constant(values)
    assert init == initializers.constant(jnp.arange(3.0, dtype=float).__array__().astype(np.float64))
    values[:] = 7
    np.testing.assert_array_equal(init(key, (2, 3), jnp.float32), [[0, 1, 2]] * 2)


def test_dtype_of_the_factory_holds_where_the_call_names_none(key):
    assert initializers.normal(1.0, jnp.bfloat16)(key, (2,)).dtype == jnp.bfloat16
    assert initializers.normal(1.0, jnp.bfloat16)(key, (2,), jnp.float16).dtype == jnp.float16


@pytest.mark.parametrize(
    ("init", "variance"),
    [
        (initializers.lecun_normal(), 1 / 300),
        (initializers.he_uniform(), 2 / 300),
        (initializers.glorot_normal(), 2 / (300 + 500)),
        (initializers.truncated_normal(0.5, lower=-9.0, upper=9.0), 0.25),
        (initializers.uniform(0.6), 0.6**2 / 12),
    ],
    ids=repr,
)
def test_variance(init, variance, key):
    assert float(jnp.var(init(key, (300, 500), jnp.float32))) == pytest.approx(variance, rel=0.03)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda **kw: nnx.Linear(2, 3, **kw), (2, 3)),
        (lambda **kw: nnx.LinearGeneral(2, (3, 4), **kw), (2, 3, 4)),
        (lambda **kw: nnx.Conv(2, 3, (5,), **kw), (5, 2, 3)),
    ],
    ids=["Linear", "LinearGeneral", "Conv"],
)
def test_metadata_of_an_initializer_reaches_the_parameter(make, shape):
    names = tuple("abc"[: len(shape)])
    init = nnx.with_metadata(initializers.normal(), sharding=names)
    layer = make(kernel_init=init, ctx=nnx.context(0))
    assert layer.kernel.shape == shape
    assert layer.get_variable("kernel").metadata["sharding"] == names
