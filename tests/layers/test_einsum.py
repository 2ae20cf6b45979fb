"""Einsum against NumPy's einsum, with the bias put where the equation says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import nnx

# An equation, the shapes of kernel, bias and inputs, and the axes of the outputs over which the bias is spread.
CASES = [
    ("nta,hab->nthb", (8, 2, 4), (8, 4), (3, 5, 2), (0, 1)),
    ("ab,bc->ac", (3, 4), (4,), (2, 3), (0,)),
    ("ab,cb->ca", (4, 3), (4,), (2, 3), (1,)),
    ("...a,ab->...b", (3, 4), (4,), (3,), ()),
    ("...a,ab->...b", (3, 4), (4,), (2, 5, 3), (0, 1)),
    ("a...,ab->b...", (3, 4), (4,), (3, 2, 5), (1, 2)),
    ("...hi,hio->...ho", (2, 3, 4), (2, 4), (5, 2, 3), (0,)),
    ("...hd,hdm->...m", (2, 3, 4), (4,), (5, 6, 2, 3), (0, 1)),
    ("...a,...ab->...b", (2, 3, 4), (2, 4), (5, 2, 3), (0,)),
    ("...a,...ab->...b", (5, 1, 3, 4), (5, 1, 4), (2, 3), ()),
    ("...a,...ab->...b", (3, 4), (4,), (5, 2, 3), (0, 1)),
    ("ta,a->ta", (3,), (3,), (2, 3), (0,)),
    ("ta,ta->", (2, 3), (), (2, 3), ()),
    ("ta,abc->tb", (3, 4, 2), (4,), (5, 3), (0,)),
    ("taa,ab->tb", (3, 4), (4,), (5, 3, 3), (0,)),
    ("ta,bba->tb", (4, 4, 3), (4,), (5, 3), (0,)),
    ("t,->t", (), (), (5,), (0,)),
    ("ab,bc->ac", (3, 4), (4,), (0, 3), (0,)),
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("equation", "kernel_shape", "bias_shape", "shape", "spread"), CASES)
def test_is_that_of_numpy(equation, kernel_shape, bias_shape, shape, spread, bias, rng, both):
    layer = nnx.Einsum(equation, kernel_shape, bias_shape if bias else None, ctx=nnx.context(0), **both)
    assert layer.kernel.shape == kernel_shape
    x = rng.normal(size=shape).astype(np.float32)
    expected = np.einsum(equation, x, np.asarray(layer.kernel))
    if bias:
        assert layer.bias.shape == bias_shape
        expected = expected + np.expand_dims(np.asarray(layer.bias), spread)
    else:
        assert layer.bias is None
    y = layer(jnp.asarray(x))
    assert y.shape == expected.shape
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_spaces_do_not_matter(normal, both):
    x = normal(2, 3)
    plain, spaced = (nnx.Einsum(s, (3, 4), 4, ctx=nnx.context(0), **both) for s in ("ta,ab->tb", " t a, ab -> tb"))
    assert spaced.einsum_str == "ta,ab->tb"
    np.testing.assert_array_equal(plain(x), spaced(x))
    np.testing.assert_array_equal(plain(x, " t a, ab -> tb"), spaced(x))


def test_the_equation_of_a_call(normal, both):
    layer = nnx.Einsum("ta,ab->tb", (3, 4), (4,), ctx=nnx.context(0), **both)
    x = normal(2, 5, 3)
    np.testing.assert_allclose(layer(x, "nta,ab->ntb"), x @ layer.kernel + layer.bias.reshape(1, 1, 4), rtol=1e-5)
    np.testing.assert_allclose(layer(x[0]), layer(x, "nta,ab->ntb")[0], rtol=1e-5)


def test_an_equation_in_calls_alone(normal, both):
    layer = nnx.Einsum(None, (3, 4), ctx=nnx.context(0), **both)
    x = normal(2, 3)
    np.testing.assert_allclose(layer(x, "ta,ab->tb"), x @ layer.kernel, rtol=1e-5)
    np.testing.assert_allclose(layer(x @ layer.kernel, "tb,ab->ta"), x @ layer.kernel @ layer.kernel.T, rtol=1e-4)
    with pytest.raises(ValueError, match="Einsum: there is no equation: give `einsum_str`"):
        layer(x)


@pytest.mark.parametrize(
    ("equation", "kernel_shape", "fan_in"),
    [
        ("nta,hab->nthb", (8, 25, 100), 25),
        ("nthb,hba->nta", (8, 25, 100), 200),
        ("ta,ba->tb", (400, 50), 50),
        ("...hi,hio->...ho", (8, 25, 100), 25),
        ("...a,...ab->...b", (8, 25, 100), 25),
        ("t,tab->ab", (5, 60, 70), 5),
        ("ta,a->ta", (20000,), 1),
    ],
)
def test_fan_in_counts_what_is_summed(equation, kernel_shape, fan_in):
    layer = nnx.Einsum(equation, kernel_shape, ctx=nnx.context(0))
    assert float(jnp.var(layer.kernel)) == pytest.approx(1 / fan_in, rel=0.05)


def test_initializers_lay_the_kernel_out_by_its_labels():
    def ranked(_, shape, dtype):
        assert shape == (6, 20)
        return jnp.arange(120, dtype=dtype).reshape(shape)

    layer = nnx.Einsum("tac,baCc->tbC", (4, 2, 5, 3), kernel_init=ranked, ctx=nnx.context(0))
    expected = np.arange(120).reshape(2, 3, 4, 5).transpose(2, 0, 3, 1)
    np.testing.assert_array_equal(layer.kernel, expected)


def test_metadata_is_about_the_kernel_as_it_is(init):
    named = nnx.with_metadata(init, sharding=("heads", "in", "out"))
    layer = nnx.Einsum("nta,hab->nthb", (8, 2, 4), kernel_init=named, ctx=nnx.context(0))
    assert layer.get_variable("kernel").sharding == ("heads", "in", "out")
    assert layer.kernel.shape == (8, 2, 4)


@pytest.mark.parametrize("low", ["bfloat16", "float16"])
def test_half_precision(low, normal, both):
    x = normal(3, 5, 2)
    arguments = ("nta,hab->nthb", (8, 2, 4), (8, 4))
    exact = nnx.Einsum(*arguments, ctx=nnx.context(0), **both)(x)
    layer = nnx.Einsum(*arguments, param_dtype=low, ctx=nnx.context(0), **both)
    with jax.numpy_dtype_promotion("strict"):
        y = layer(x.astype(low))
    assert y.dtype == layer.kernel.dtype == layer.bias.dtype == low
    np.testing.assert_allclose(np.asarray(y, np.float32), exact, atol=0.05, rtol=0.05)
    assert layer(x).dtype == jnp.float32


def test_integers_are_accepted(both):
    layer = nnx.Einsum("ta,ab->tb", (3, 4), ctx=nnx.context(0), **both)
    x = jnp.arange(6).reshape(2, 3)
    np.testing.assert_array_equal(layer(x), layer(x.astype(jnp.float32)))


def test_precision_reaches_the_product(both):
    layer = nnx.Einsum("ta,ab->tb", (3, 4), precision="highest", ctx=nnx.context(0), **both)
    assert "HIGHEST" in str(jax.make_jaxpr(lambda x: nnx.Einsum.__call__(layer, x))(jnp.ones((2, 3))))


def test_gradients_by_finite_differences(rng, both):
    with jax.enable_x64(True):
        layer = nnx.Einsum("...hi,hio->o...h", (2, 3, 4), (4, 2), param_dtype=jnp.float64, ctx=nnx.context(0), **both)
        state, definition = layer.partition()
        x = jnp.asarray(rng.normal(size=(2, 2, 3)))
        run = jax.jit(lambda state, x: definition.merge(state)(x))
        check_grads(run, (state, x), order=1, modes=("rev",), rtol=1e-6)


def test_options_are_static_and_a_second_model_compiles_nothing(both):
    traces = []

    @nnx.jit
    def run(layer, x):
        traces.append(1)
        return layer(x)

    for equation, kernel_shape, bias_shape in [("ta,ab->tb", (3, 4), 4), ("ta, ab -> tb", [3, 4], [4])]:
        run(nnx.Einsum(equation, kernel_shape, bias_shape, ctx=nnx.context(0), **both), jnp.ones((2, 3)))
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("equation", "kernel_shape", "shape", "wanted"),
    [
        ("nta,hab->nthb", (8, 2, 4), (16, 11, 3), r"\[n, t, a=2\]"),
        ("nta,hab->nthb", (8, 2, 4), (11, 2), r"\[n, t, a=2\]"),
        ("nta,hab->nthb", (8, 2, 4), (5, 16, 11, 2), r"\[n, t, a=2\]"),
        ("...a,ab->...b", (3, 4), (), r"\[\.\.\., a=3\]"),
        ("...a,ab->...b", (3, 4), (3, 2), r"\[\.\.\., a=3\]"),
        ("...a,...ab->...b", (5, 3, 4), (2, 3), r"\[\.\.\.=\(5,\), a=3\]"),
        ("nnt,tb->nb", (3, 4), (2, 5, 3), r"\[n, n, t=3\]"),
        ("ta,ab->tb", (3, 4), (2, 1), r"\[t, a=3\]"),
    ],
)
def test_wrong_inputs(equation, kernel_shape, shape, wanted, both):
    layer = nnx.Einsum(equation, kernel_shape, ctx=nnx.context(0), **both)
    with pytest.raises(nnx.ShapeError, match=rf"Einsum: expected `inputs` of shape {wanted} \(einsum_str=.* got \("):
        layer(jnp.ones(shape))


@pytest.mark.parametrize(
    ("equation", "message"),
    [
        ("ta,ab", "does not say what its outputs are: write them after '->'"),
        ("ta->t", "has 1 operands: it needs two, the inputs and the kernel"),
        ("ta,ab,bc->tc", "has 3 operands: it needs two"),
        ("ta,ab->tc", r"has outputs \['c'\] that neither operand has"),
        ("ta,ab->...tb", r"has outputs \['\.\.\.'\] that neither operand has"),
        ("ta,ab->tbb", "names an axis of its outputs twice"),
        ("...a,ab->b", "has '...' among its operands, so its outputs need it too"),
        ("t1,1b->tb", "has '1' in 't1': axes are letters, and '...' once"),
        ("..a,ab->tb", "has '.' in '..a': axes are letters, and '...' once"),
        ("...a...,ab->tb", "has '.' in '...a...': axes are letters, and '...' once"),
        ("ta,ab->tb->tb", "has '-', '>' in 'tb->tb': axes are letters"),
        ("", "does not say what its outputs are"),
    ],
)
def test_wrong_equations(equation, message, both):
    with pytest.raises(ValueError, match=rf"Einsum: `einsum_str` '{equation}' {message}"):
        nnx.Einsum(equation, (3, 4), ctx=nnx.context(0), **both)
    layer = nnx.Einsum(None, (3, 4), ctx=nnx.context(0), **both)
    with pytest.raises(ValueError, match=message):
        layer(jnp.ones((2, 3)), equation)


@pytest.mark.parametrize(
    ("equation", "kernel_shape", "bias_shape", "message"),
    [
        ("ta,ab->tb", (3, 4, 5), None, r"expected `kernel_shape` with the axes \[a, b\] .*, got \(3, 4, 5\)"),
        ("ta,ab->tb", 3, None, r"expected `kernel_shape` with the axes \[a, b\] .*, got \(3,\)"),
        ("ta,aa->t", (3, 4), None, r"expected `kernel_shape` with the axes \[a, a\] .*, got \(3, 4\)"),
        ("ta,...ab->t...b", 3, None, r"expected `kernel_shape` with the axes \[\.\.\., a, b\] .*, got \(3,\)"),
        ("nta,hab->nthb", (8, 2, 4), (4, 8), r"expected `bias_shape` \(8, 4\), the sizes .*, got \(4, 8\)"),
        ("nta,hab->ntbh", (8, 2, 4), (8, 4), r"expected `bias_shape` \(4, 8\), the sizes .*, got \(8, 4\)"),
        ("nta,hab->nthb", (8, 2, 4), (32,), r"expected `bias_shape` \(8, 4\), the sizes .*, got \(32,\)"),
        ("ta,ab->tb", (3, 4), (), r"expected `bias_shape` \(4,\), the sizes .*, got \(\)"),
    ],
)
def test_wrong_shapes(equation, kernel_shape, bias_shape, message, both):
    with pytest.raises(nnx.ShapeError, match=f"Einsum: {message}"):
        nnx.Einsum(equation, kernel_shape, bias_shape, ctx=nnx.context(0), **both)


def test_a_call_that_would_put_the_bias_elsewhere(both):
    layer = nnx.Einsum("nta,hab->nthb", (8, 2, 4), (8, 4), ctx=nnx.context(0), **both)
    with pytest.raises(nnx.ShapeError, match=r"expected `bias_shape` \(4, 8\).*einsum_str='nta,hab->ntbh'"):
        layer(jnp.ones((3, 5, 2)), "nta,hab->ntbh")


def test_errors_name_the_subclass(both):
    class Heads(nnx.Einsum):
        pass

    with pytest.raises(nnx.ShapeError, match="Heads: expected `inputs`"):
        Heads("ta,ab->tb", (3, 4), ctx=nnx.context(0), **both)(jnp.ones((2, 4)))
