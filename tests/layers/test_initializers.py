"""Initializers: JAX's values, and identity by value."""

import copy
import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx
from nnx.layers import initializers


def _truncated(lower, upper):
    """The variance of a standard normal that is cut."""

    def density(x):
        return math.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)

    mass = (math.erf(upper / math.sqrt(2)) - math.erf(lower / math.sqrt(2))) / 2
    mean = (density(lower) - density(upper)) / mass
    return 1 + (lower * density(lower) - upper * density(upper)) / mass - mean**2


# Each with the variance of a parameter of this shape, whose fans are 300 and 600 where no option says otherwise.
SHAPE = (3, 100, 200)
VARIANCES = {
    "constant": ((0.5,), {}, 0.0),
    "delta_orthogonal": ((), {}, 1 / 200 / 3),  # rows of length 1, and zeros at two places of three
    "glorot_normal": ((), {}, 2 / (300 + 600)),
    "glorot_uniform": ((), {"in_axis": -1, "out_axis": -2}, 2 / (300 + 600)),
    "he_normal": ((), {}, 2 / 300),
    "he_uniform": ((), {}, 2 / 300),
    "kaiming_normal": ((), {"in_axis": -1, "out_axis": -2}, 2 / 600),
    "kaiming_uniform": ((), {}, 2 / 300),
    "lecun_normal": ((), {"batch_axis": (0,)}, 1 / 100),
    "lecun_uniform": ((), {}, 1 / 300),
    "normal": ((0.02,), {}, 0.02**2),
    "orthogonal": ((2.0,), {"column_axis": 0}, 2.0**2 / (100 * 200)),  # three columns, each as long
    "truncated_normal": ((0.1,), {"lower": -1.0, "upper": 1.5}, 0.1**2 * _truncated(-1.0, 1.5)),
    "uniform": ((0.3,), {}, 0.3**2 / 12),
    "variance_scaling": ((2.0, "fan_avg", "uniform"), {"in_axis": [0, 1]}, 2 / ((300 + 200) / 2)),
    "xavier_normal": ((), {}, 2 / (300 + 600)),
    "xavier_uniform": ((), {}, 2 / (300 + 600)),
}
FACTORIES = [(name, args, kwargs) for name, (args, kwargs, _) in VARIANCES.items()]


def test_no_initializer_is_left_out():
    assert {*VARIANCES, "Initializer", "ones", "ones_init", "zeros", "zeros_init"} == {*initializers.__all__}


@pytest.mark.parametrize("name", VARIANCES)
def test_values_are_those_of_jax_and_vary_as_they_should(name, key):
    args, kwargs, variance = VARIANCES[name]
    ours = getattr(initializers, name)(*args, **kwargs)(key, SHAPE)
    theirs = getattr(jax.nn.initializers, name)(*args, **kwargs)
    theirs = jax.jit(theirs, static_argnums=(1, 2))  # ours are compiled, which rounds differently from op by op
    np.testing.assert_array_equal(ours, theirs(key, SHAPE, jnp.float32))
    assert ours.dtype == jnp.float32
    values = np.asarray(ours, np.float64)
    assert values.var() == pytest.approx(variance, rel=0.03, abs=1e-12)
    if name in ("constant", "uniform"):
        assert values.mean() == pytest.approx({"constant": 0.5, "uniform": 0.15}[name], rel=0.01)
    elif name == "truncated_normal":
        assert -0.1 <= values.min() < -0.099
        assert 0.149 < values.max() <= 0.15
    else:
        assert abs(values.mean()) < 5 * math.sqrt(variance / values.size)


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
