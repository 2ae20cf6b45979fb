"""Recurrent cells against NumPy in float64; RNN and Bidirectional against loops over a cell."""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import nnx

BATCH, STEPS, IN, HIDDEN = 3, 6, 3, 4
LENGTHS = np.array([6, 0, 4])

CELLS = {
    "LSTMCell": nnx.LSTMCell,
    "OptimizedLSTMCell": nnx.OptimizedLSTMCell,
    "GRUCell": nnx.GRUCell,
    "SimpleCell": nnx.SimpleCell,
    "SimpleCell residual": functools.partial(nnx.SimpleCell, residual=True),
}


@pytest.fixture
def make(both):
    """A function from a name in CELLS to a cell whose parameters are drawn with NumPy."""

    def cell(name, seed=0, **options):
        return CELLS[name](
            IN, HIDDEN, **both, recurrent_kernel_init=both["kernel_init"], **options, ctx=nnx.context(seed)
        )

    return cell


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def affine(layer, x):
    y = x @ np.asarray(layer.kernel, np.float64)
    return y if layer.bias is None else y + np.asarray(layer.bias, np.float64)


def expected_step(cell, carry, x):
    """The equations of the cells, in NumPy."""
    if isinstance(cell, nnx.LSTMCell | nnx.OptimizedLSTMCell):
        c, h = carry
        if isinstance(cell, nnx.LSTMCell):
            i, f, g, o = (
                affine(getattr(cell, of_x), x) + affine(getattr(cell, of_h), h)
                for of_x, of_h in (("ii", "hi"), ("if_", "hf"), ("ig", "hg"), ("io", "ho"))
            )
        else:
            i, f, g, o = np.split(affine(cell.dense_i, x) + affine(cell.dense_h, h), 4, axis=-1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        return (c, h), h
    of_x, of_h = affine(cell.dense_i, x), affine(cell.dense_h, carry)
    if isinstance(cell, nnx.SimpleCell):
        h = np.tanh(of_x + of_h + (carry if cell.residual else 0))
        return h, h
    (xr, xz, xn), (hr, hz, hn) = np.split(of_x, 3, axis=-1), np.split(of_h, 3, axis=-1)
    z = sigmoid(xz + hz)
    h = (1 - z) * np.tanh(xn + sigmoid(xr + hr) * hn) + z * carry
    return h, h


def zeros(cell, batch):
    carry = np.zeros((*batch, HIDDEN))
    return (carry, carry) if "LSTM" in type(cell).__name__ else carry


def expected_sequence(cell, carry, x):
    """Outputs and last carry of a loop over the first axis of `x`."""
    outputs = []
    for now in np.asarray(x, np.float64):
        carry, y = expected_step(cell, carry, now)
        outputs.append(y)
    return carry, np.stack(outputs) if outputs else np.zeros((0, HIDDEN))


def assert_close(got, expected, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **({"atol": 2e-6} | tolerance)), got, expected)


@pytest.mark.parametrize("batch", [(), (2,), (2, 5)])
@pytest.mark.parametrize("name", CELLS)
def test_cell(name, batch, make, normal):
    cell, x = make(name), normal(*batch, IN)
    first = cell.initialize_carry(x.shape)
    assert_close(first, zeros(cell, batch))
    carry = jax.tree.map(lambda part: normal(*part.shape), first)
    assert_close(cell(carry, x), expected_step(cell, jax.tree.map(np.float64, carry), np.float64(x)))


def test_parameters_have_the_names_and_shapes_of_flax(make):
    kernels = {"i": (IN, HIDDEN), "h": (HIDDEN, HIDDEN)}
    lstm = {(f"{kind}{gate}", "kernel"): kernels[kind] for kind in "ih" for gate in "ifgo"}
    lstm[("if_", "kernel")] = lstm.pop(("if", "kernel"))
    lstm |= {(f"h{gate}", "bias"): (HIDDEN,) for gate in "ifgo"}
    expected = {
        "LSTMCell": lstm,
        "OptimizedLSTMCell": {
            ("dense_i", "kernel"): (IN, 4 * HIDDEN),
            ("dense_h", "kernel"): (HIDDEN, 4 * HIDDEN),
            ("dense_h", "bias"): (4 * HIDDEN,),
        },
        "GRUCell": {
            ("dense_i", "kernel"): (IN, 3 * HIDDEN),
            ("dense_i", "bias"): (3 * HIDDEN,),
            ("dense_h", "kernel"): (HIDDEN, 3 * HIDDEN),
        },
        "SimpleCell": {
            ("dense_i", "kernel"): (IN, HIDDEN),
            ("dense_i", "bias"): (HIDDEN,),
            ("dense_h", "kernel"): (HIDDEN, HIDDEN),
        },
    }
    for name, shapes in expected.items():
        state = make(name).filter(nnx.Param)
        assert {path: variable.value.shape for path, variable in state.items()} == shapes


def test_recurrent_kernels_are_orthogonal_by_default_in_half_precision_too():
    cell = nnx.GRUCell(IN, HIDDEN, param_dtype=jnp.bfloat16, ctx=nnx.context(0))
    assert cell.dense_h.kernel.dtype == jnp.bfloat16
    kernel = np.asarray(cell.dense_h.kernel).astype(np.float32)
    np.testing.assert_allclose(kernel @ kernel.T, np.eye(HIDDEN), atol=0.02)


def test_activations_by_name_and_by_function(make, normal):
    x = normal(2, IN)
    named, given = make("GRUCell", activation_fn="relu"), make("GRUCell", activation_fn=jax.nn.relu)
    carry = named.initialize_carry(x.shape)
    np.testing.assert_array_equal(named(carry, x)[1], given(carry, x)[1])
    assert pickle.loads(pickle.dumps(named)).activation_fn == "relu"
    for name, option in (("LSTMCell", "gate_fn"), ("SimpleCell", "activation_fn")):
        with pytest.raises(ValueError, match=rf"{name}: nnx has no activation 'relo' for {option}"):
            make(name, **{option: "relo"})


def test_initializers_may_name_the_axes_for_sharding(both):
    init = nnx.with_metadata(both["kernel_init"], sharding=("embed", "hidden"))
    cell = nnx.GRUCell(IN, HIDDEN, kernel_init=init, recurrent_kernel_init=both["kernel_init"], ctx=nnx.context(0))
    assert cell.dense_i.get_variable("kernel").sharding == ("embed", "hidden")


def test_carry_init_draws_from_the_stream_carry(make):
    cell = make("LSTMCell")
    c, h = cell.initialize_carry((2, IN), nnx.context(carry=0), nnx.initializers.normal())
    assert c.shape == h.shape == (2, HIDDEN)
    assert not np.array_equal(c, h)
    np.testing.assert_array_equal(cell.initialize_carry((IN,), None, nnx.initializers.ones)[0], np.ones(HIDDEN))
    with pytest.raises(nnx.ContextError, match=r"LSTMCell: .*stream 'carry'.*no Context.*nnx.context\(carry=seed\)"):
        cell.initialize_carry((2, IN), None, nnx.initializers.normal())
    with pytest.raises(nnx.ContextError, match=r"LSTMCell: .*the Context that was passed has none"):
        cell.initialize_carry((2, IN), nnx.context(0), nnx.initializers.normal())


@pytest.mark.parametrize("options", [{}, {"reverse": True}, {"reverse": True, "keep_order": True}])
@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell"])
def test_rnn_is_a_loop_over_the_cell(name, options, make, normal):
    cell, x = make(name), normal(BATCH, STEPS, IN)
    carry, outputs = nnx.RNN(cell, return_carry=True, **options)(x)
    turned = np.swapaxes(x, 0, 1)[::-1] if options else np.swapaxes(x, 0, 1)
    expected_carry, expected = expected_sequence(cell, zeros(cell, (BATCH,)), turned)
    if "keep_order" in options:
        expected = expected[::-1]
    assert_close(outputs, np.swapaxes(expected, 0, 1))
    assert_close(carry, expected_carry)
    # The options of the call win over those of the constructor.
    np.testing.assert_array_equal(nnx.RNN(cell)(x, return_carry=False, **options), outputs)


def test_time_may_come_first_and_the_batch_may_have_any_axes(make, normal):
    layer, x = nnx.RNN(make("GRUCell")), normal(2, BATCH, STEPS, IN)
    y = layer(x)
    assert y.shape == (2, BATCH, STEPS, HIDDEN)
    np.testing.assert_allclose(layer(jnp.moveaxis(x, -2, 0), time_major=True), jnp.moveaxis(y, -2, 0), atol=1e-6)
    np.testing.assert_allclose(layer(x[0, 1]), y[0, 1], atol=1e-6)
    lengths = jnp.array([[6, 0, 4], [1, 2, 3]])
    carry, y = layer(x, seq_lengths=lengths, return_carry=True)
    np.testing.assert_allclose(layer(x[0, 2], seq_lengths=jnp.array(4)), y[0, 2], atol=1e-6)
    np.testing.assert_allclose(carry[1, 0], y[1, 0, 0])


@pytest.mark.parametrize("options", [{}, {"reverse": True}, {"reverse": True, "keep_order": True}])
@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell"])
def test_padding_is_ignored_whatever_it_holds(name, options, make, normal):
    cell, x = make(name), normal(BATCH, STEPS, IN)
    real = np.arange(STEPS) < LENGTHS[:, None]
    layer = nnx.RNN(cell, return_carry=True, **options)

    def run(layer, x):
        carry, y = layer(x, seq_lengths=jnp.asarray(LENGTHS))
        return jnp.square(y).sum() + sum(jnp.sum(part) for part in jax.tree.leaves(carry)), (carry, y)

    both = nnx.jit(nnx.value_and_grad(run, argnums=(0, 1), has_aux=True))
    (_, (carry, outputs)), (of_layer, of_x) = both(layer, jnp.where(real[..., None], x, jnp.nan))
    assert np.all(np.asarray(outputs)[~real] == 0)
    for i, length in enumerate(LENGTHS):
        row = np.asarray(x)[i, :length]
        expected_carry, expected = expected_sequence(cell, zeros(cell, ()), row[::-1] if options else row)
        if "keep_order" in options:
            expected = expected[::-1]
        assert_close(outputs[i, :length], expected)
        assert_close(jax.tree.map(lambda part, i=i: part[i], carry), expected_carry)
    # Gradients are those of padding with zeros, and none goes into the padding.
    (_, _), (of_layer_zeros, of_x_zeros) = both(layer, jnp.where(real[..., None], x, 0))
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(of_layer))
    jax.tree.map(np.testing.assert_array_equal, (of_layer, of_x), (of_layer_zeros, of_x_zeros))
    assert np.all(np.asarray(of_x)[~real] == 0)


def test_padding_is_ignored_where_nobody_asks_for_the_carry(make, normal):
    """The loop then runs on, over zeros, if the cell stays bounded."""
    cell, x = make("GRUCell"), normal(BATCH, STEPS, IN)
    padded = jnp.where((np.arange(STEPS) < LENGTHS[:, None])[..., None], x, jnp.nan)

    def run(layer, x):
        y = layer(x, seq_lengths=jnp.asarray(LENGTHS))
        return jnp.square(y).sum(), y

    (_, y), gradients = nnx.value_and_grad(run, argnums=(0, 1), has_aux=True)(nnx.RNN(cell), padded)
    _, expected = nnx.RNN(cell)(padded, seq_lengths=jnp.asarray(LENGTHS), return_carry=True)
    np.testing.assert_array_equal(y, expected)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradients))


def test_a_cell_that_grows_without_bound_does_not_do_so_in_the_padding():
    cell = nnx.SimpleCell(
        1,
        1,
        activation_fn="relu",
        kernel_init=nnx.initializers.ones,
        recurrent_kernel_init=nnx.initializers.constant(100.0),
        ctx=nnx.context(0),
    )
    assert not cell.is_bounded
    assert not nnx.GRUCell(1, 1, activation_fn=jnp.sin, ctx=nnx.context(0)).is_bounded
    assert nnx.LSTMCell(1, 1, ctx=nnx.context(0)).is_bounded

    def run(layer, x):
        return layer(x, seq_lengths=jnp.array([2])).sum()

    # 100 ** 39 is past the largest float32.
    gradient = nnx.grad(run)(nnx.RNN(cell), jnp.ones((1, 40, 1)))
    np.testing.assert_allclose(gradient["cell", "dense_h", "kernel"].value, [[1.0]])


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell"])
def test_carry_goes_in_and_out(name, make, normal):
    layer, x = nnx.RNN(make(name), return_carry=True), normal(BATCH, STEPS, IN)
    carry, whole = layer(x)
    middle, first = layer(x[:, :2])
    last, second = layer(x[:, 2:], initial_carry=middle)
    assert_close(jnp.concatenate([first, second], axis=1), whole)
    assert_close(last, carry)


def test_unrolling_changes_nothing_but_the_loop(make, normal):
    cell, x = make("GRUCell"), normal(BATCH, STEPS, IN)
    np.testing.assert_allclose(nnx.RNN(cell, unroll=3)(x), nnx.RNN(cell)(x), atol=1e-6)


def test_no_steps_give_the_first_carry(make):
    carry, y = nnx.RNN(make("GRUCell"), return_carry=True)(jnp.ones((2, 0, IN)))
    assert y.shape == (2, 0, HIDDEN)
    np.testing.assert_array_equal(carry, np.zeros((2, HIDDEN)))


def test_bidirectional(make, normal):
    forward, backward = nnx.RNN(make("GRUCell")), nnx.RNN(make("LSTMCell", seed=1))
    layer, x = nnx.Bidirectional(forward, backward), normal(BATCH, STEPS, IN)
    options = {"seq_lengths": jnp.asarray(LENGTHS), "return_carry": True}
    carries, y = layer(x, **options)
    first, one = forward(x, **options)
    second, other = backward(x, reverse=True, keep_order=True, **options)
    assert_close(y, jnp.concatenate([one, other], axis=-1))
    assert_close(carries, (first, second))
    added = nnx.Bidirectional(forward, backward, merge_fn=jnp.add, time_major=True)
    assert_close(added(jnp.swapaxes(x, 0, 1), seq_lengths=options["seq_lengths"]), jnp.swapaxes(one + other, 0, 1))
    again, _ = layer(x, initial_carry=carries, return_carry=True)
    assert_close(again[0], forward(x, initial_carry=first, return_carry=True)[0])


def test_one_rnn_in_both_directions_shares_its_parameters(make):
    rnn = nnx.RNN(make("SimpleCell"))
    layer = nnx.Bidirectional(rnn, rnn)
    assert len(layer.filter(nnx.Param)) == 3
    assert layer(jnp.ones((2, STEPS, IN))).shape == (2, STEPS, 2 * HIDDEN)


class ColumnSums(nnx.RNNCellBase):
    """A cell whose inputs are matrices, and which reads a Variable."""

    def __init__(self, scale):
        self.scale = nnx.Param(jnp.asarray(scale))

    @property
    def num_feature_axes(self):
        return 2

    def initialize_carry(self, input_shape, ctx=None, carry_init=None):
        return jnp.zeros((*input_shape[:-2], input_shape[-1]), jnp.int32)

    def __call__(self, carry, inputs):
        carry = carry + self.scale * inputs.sum(-2)
        return carry, {"sums": carry}


def test_a_cell_of_ones_own(normal):
    x = normal(BATCH, STEPS, 2, IN)
    layer = nnx.RNN(ColumnSums(2.0), return_carry=True)
    carry, y = layer(x)
    expected = np.cumsum(2 * np.asarray(x).sum(-2), axis=1)
    np.testing.assert_allclose(y["sums"], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(carry, expected[:, -1], rtol=1e-5, atol=1e-5)
    gradient = nnx.grad(lambda layer: layer(x)[0].sum())(layer)
    np.testing.assert_allclose(gradient["cell/scale"].value, np.asarray(x).sum(), rtol=1e-4)


def test_a_cell_may_not_write_in_the_loop():
    class Counts(ColumnSums):
        def __call__(self, carry, inputs):
            self.scale = self.scale + 1
            return super().__call__(carry, inputs)

    with pytest.raises(nnx.TraceContextError, match=r"cannot write `Counts.scale`"):
        nnx.RNN(Counts(1.0))(jnp.ones((STEPS, 3, 2)))


def test_a_second_call_traces_nothing(normal):
    traced = []

    class Traced(nnx.GRUCell):
        def __call__(self, carry, inputs):
            traced.append(inputs.shape)
            return super().__call__(carry, inputs)

    layer, x = nnx.RNN(Traced(IN, HIDDEN, ctx=nnx.context(0))), normal(2, STEPS, IN)
    first = layer(x)
    count = len(traced)
    layer.cell.dense_i.kernel = 2 * layer.cell.dense_i.kernel
    assert np.abs(layer(x) - first).max() > 1e-3
    assert len(traced) == count


def test_a_cell_without_its_methods_says_so():
    with pytest.raises(NotImplementedError, match="RNNCellBase has no `initialize_carry`"):
        nnx.RNN(nnx.RNNCellBase())(jnp.ones((2, IN)))
    with pytest.raises(NotImplementedError, match="RNNCellBase has no `__call__`"):
        nnx.RNNCellBase()(jnp.ones(2), jnp.ones(2))


@pytest.mark.parametrize("name", CELLS)
def test_gradients_by_finite_differences(name, make, rng):
    with jax.enable_x64(True):
        state, definition = nnx.RNN(make(name, param_dtype=jnp.float64, dtype=jnp.float64)).partition()
        x = jnp.asarray(rng.normal(size=(2, 3, IN)))
        lengths = jnp.array([3, 2])

        def run(state, x):
            return definition.merge(state)(x, seq_lengths=lengths, return_carry=True)

        check_grads(jax.jit(run), (state, x), order=1, modes=("rev",), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", CELLS)
def test_the_carry_adds_up_in_its_own_dtype(name, make, normal):
    layer, x = nnx.RNN(make(name, dtype=jnp.bfloat16), return_carry=True), normal(BATCH, STEPS, IN)
    carry, y = layer(x)
    assert y.dtype == jnp.bfloat16
    assert all(part.dtype == jnp.float32 for part in jax.tree.leaves(carry))
    # A carry that comes in narrower than what is computed is made wide enough.
    narrow = jax.tree.map(lambda part: part.astype(jnp.float16), carry)
    carry, y = nnx.RNN(make(name), return_carry=True)(x, initial_carry=narrow)
    assert y.dtype == jnp.float32
    assert all(part.dtype == jnp.float32 for part in jax.tree.leaves(carry))


def test_simple_cell_computes_in_float32_unless_told_otherwise(make, normal):
    x = normal(2, IN, dtype="bfloat16")
    for options, expected in (({}, jnp.float32), ({"dtype": None}, jnp.bfloat16)):
        cell = make("SimpleCell", param_dtype=jnp.bfloat16, **options)
        assert cell(cell.initialize_carry(x.shape), x)[1].dtype == expected


@pytest.mark.parametrize("name", CELLS)
def test_cells_refuse_wrong_shapes(name, make):
    cell, kind = make(name), name.split()[0]
    carry = cell.initialize_carry((2, IN))
    with pytest.raises(nnx.ShapeError, match=rf"{kind}: expected `inputs` .*3\] \(in_features=3\), got \(2, 5\)"):
        cell(carry, jnp.ones((2, 5)))
    with pytest.raises(nnx.ShapeError, match=rf"{kind}: expected .*`carry` of shape \(5, 4\).*got \(2, 4\)"):
        cell(carry, jnp.ones((5, IN)))
    with pytest.raises(nnx.ShapeError, match=rf"{kind}: expected `input_shape` .*in_features=3\), got \(2, 4\)"):
        cell.initialize_carry((2, 4))


@pytest.mark.parametrize("name", ["LSTMCell", "OptimizedLSTMCell"])
def test_lstm_cells_take_a_pair(name, make):
    with pytest.raises(nnx.ShapeError, match=rf"{name}: expected `carry` to be a pair .*got shape \(2, 4\)"):
        make(name)(jnp.ones((2, HIDDEN)), jnp.ones((2, IN)))
    with pytest.raises(nnx.ShapeError, match=rf"{name}: expected `h` of `carry` of shape \(2, 4\)"):
        make(name)((jnp.ones((2, HIDDEN)), jnp.ones((2, IN))), jnp.ones((2, IN)))


def test_rnn_refuses_wrong_shapes(make):
    layer, x = nnx.RNN(make("GRUCell")), jnp.ones((2, STEPS, IN))
    with pytest.raises(nnx.ShapeError, match=r"RNN: expected `inputs` .*time, features\], with at least 2.*got \(3,\)"):
        layer(jnp.ones(IN))
    for lengths, got in ((jnp.ones(3, int), r"\(3,\) and int32"), (jnp.ones(2), r"\(2,\) and float32")):
        with pytest.raises(nnx.ShapeError, match=rf"RNN: expected `seq_lengths` of shape \(2,\).*got {got}"):
            layer(x, seq_lengths=lengths)
    with pytest.raises(nnx.ShapeError, match=r"GRUCell: expected `carry` of shape \(2, 4\).*got \(4,\)"):
        layer(x, initial_carry=jnp.ones(HIDDEN))
    with pytest.raises(nnx.ShapeError, match="Bidirectional: expected `initial_carry` to be a pair .*got ArrayImpl"):
        nnx.Bidirectional(layer, layer)(x, initial_carry=jnp.ones((2, HIDDEN)))

    class Grows(ColumnSums):
        def __call__(self, carry, inputs):
            return jnp.concatenate([carry, carry], axis=-1), inputs

    with pytest.raises(nnx.ShapeError, match=r"RNN: a step of Grows must keep .* takes \(2,\) and gives \(4,\)"):
        nnx.RNN(Grows(1.0))(jnp.ones((STEPS, 3, 2)))


@pytest.mark.parametrize("cell", [nnx.LSTMCell, nnx.OptimizedLSTMCell, nnx.GRUCell, nnx.SimpleCell])
def test_a_carry_init_of_the_constructor(cell, init):
    made = cell(3, 4, carry_init=nnx.initializers.constant(2.0), kernel_init=init, ctx=nnx.context(0))
    assert all((leaf == 2).all() for leaf in jax.tree.leaves(made.initialize_carry((5, 3))))
    # What the call is given comes before it.
    assert not any(leaf.any() for leaf in jax.tree.leaves(made.initialize_carry((5, 3), None, nnx.initializers.zeros)))


def test_a_carry_init_that_draws_takes_the_stream_of_the_call(init):
    cell = nnx.GRUCell(3, 4, carry_init=nnx.initializers.normal(), kernel_init=init, ctx=nnx.context(0))
    x = jnp.ones((2, 1, 3))
    rnn = nnx.RNN(cell)
    first, same, other = (rnn(x, ctx=nnx.context(carry=seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, same)
    assert not np.array_equal(first, other)
    with pytest.raises(nnx.ContextError, match="GRUCell: `carry_init` draws from the random stream 'carry'"):
        rnn(x)
