"""Every snippet of the specification, as users have it in their hands, with the numbers that it must give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx


@pytest.fixture(autouse=True)
def _allow_rank_promotion():
    # The snippets run as written, and they add a bias to a batch.
    with jax.numpy_rank_promotion("allow"):
        yield


class Count(nnx.Variable):
    pass


class Linear(nnx.Module):
    def __init__(self, din: int, dout: int, *, ctx: nnx.Context):
        key = ctx.make_rng("params")
        self.w = nnx.Param(jax.random.uniform(key, (din, dout)))
        self.b = nnx.Param(jnp.zeros((dout,)))
        self.count = Count(0)  # track the number of calls

    def __call__(self, x):
        self.count += 1
        return x @ self.w + self.b


@pytest.fixture
def model():
    model = Linear(din=12, dout=2, ctx=nnx.context(0))
    model(jnp.ones((8, 12)))
    return model


@pytest.fixture
def x():
    return jnp.ones((8, 12))


@pytest.fixture
def y():
    return jnp.linspace(-1.0, 1.0, 16).reshape(8, 2)


# Getting started


def test_forward_pass_counts_its_call():
    model = Linear(din=12, dout=2, ctx=nnx.context(0))

    # Forward pass and verify the call count
    x = jnp.ones((8, 12))
    y = model(x)
    assert model.count == 1
    np.testing.assert_allclose(y, x @ model.w + model.b, rtol=1e-6)


def test_training_with_the_functional_api(model, x, y):
    (params, counts), moduledef = model.partition(nnx.Param, Count)
    first = params

    @jax.jit
    def train_step(params, counts, x, y):
        def loss_fn(params):
            y_pred, (updates, _) = moduledef.apply(params, counts)(x)
            loss = jax.numpy.mean((y_pred - y) ** 2)
            return loss, updates.filter(Count)

        # compute gradient
        grads, counts = jax.grad(loss_fn, has_aux=True)(params)
        # SGD update
        params = jax.tree.map(lambda w, g: w - 0.1 * g, params, grads)

        return params, counts

    # execute the training step
    params, counts = train_step(params, counts, x, y)
    model = moduledef.merge(params, counts)
    assert model.count == 2

    error = x @ first["w"].value + first["b"].value - y
    np.testing.assert_allclose(model.b, first["b"].value - 0.1 * error.mean(0), rtol=1e-4)
    np.testing.assert_allclose(model.w, first["w"].value - 0.1 * (x.T @ error) / 8, rtol=1e-4)


def test_training_with_lifted_transforms(model, x, y):
    first = model.clone()

    @nnx.jit
    def train_step(model, x, y):
        def loss_fn(model):
            y_pred = model(x)
            return jax.numpy.mean((y_pred - y) ** 2)

        # compute gradient
        grads: nnx.State = nnx.grad(loss_fn, wrt=nnx.Param)(model)
        # SGD update
        model.update_state(jax.tree.map(lambda w, g: w - 0.1 * g, model.filter(nnx.Param), grads))

    # execute the training step
    train_step(model, x, y)
    assert model.count == 2

    error = x @ first.w + first.b - y
    np.testing.assert_allclose(model.b, first.b - 0.1 * error.mean(0), rtol=1e-4)
    np.testing.assert_allclose(model.w, first.w - 0.1 * (x.T @ error) / 8, rtol=1e-4)


def test_both_styles_of_training_agree(model, x, y):
    def loss_of(y_pred):
        return jnp.mean((y_pred - y) ** 2)

    (params, counts), moduledef = model.partition(nnx.Param, Count)

    def loss_fn(params):
        y_pred, _ = moduledef.apply(params, counts)(x)
        return loss_of(y_pred)

    functional = jax.grad(loss_fn)(params)
    lifted = nnx.grad(lambda model: loss_of(model(x)), wrt=nnx.Param)(model)
    jax.tree.map(np.testing.assert_array_equal, functional, lifted)
    assert functional.paths == lifted.paths == (("b",), ("w",))


# Modules


def test_attribute_kinds():
    class Foo(nnx.Module):
        def __init__(self, ctx: nnx.Context):
            # node attributes
            self.variable = nnx.Param(jnp.array(1))
            self.np_buffer = np.array(2)
            self.jax_buffer = jnp.array(3)
            self.node = nnx.Node([4, 5])
            self.submodule = nnx.Linear(2, 4, ctx=ctx)
            # static attributes
            self.int = 1
            self.float = 2.0
            self.str = "hello"
            self.list = [1, 2, 3]

    model = Foo(ctx=nnx.context(0))

    state, moduledef = model.partition()

    # The State that the specification prints, path by path and kind by kind.
    assert set(state) == {
        ("jax_buffer",),
        ("node",),
        ("np_buffer",),
        ("submodule", "bias"),
        ("submodule", "kernel"),
        ("variable",),
    }
    assert isinstance(state["jax_buffer"], jax.Array)
    assert isinstance(state["np_buffer"], np.ndarray)
    assert type(state["node"]) is nnx.Node
    assert state["node"].value == [4, 5]
    assert type(state["submodule", "kernel"]) is nnx.Param
    assert type(state["variable"]) is nnx.Param
    assert state["variable"].value == 1

    merged = moduledef.merge(state)
    assert (merged.int, merged.float, merged.str, merged.list) == (1, 2.0, "hello", [1, 2, 3])
    assert merged.node == [4, 5]
    assert merged.variable == 1
    assert merged.np_buffer == 2
    assert merged.jax_buffer == 3
    assert merged.submodule.kernel.shape == (2, 4)
    assert merged.submodule is not model.submodule


def test_functional_api_merge_and_apply():
    class Foo(nnx.Module):
        def __init__(self, ctx):
            self.submodule = nnx.Linear(2, 4, ctx=ctx)
            self.layers = [nnx.Linear(2, 4, ctx=ctx)]
            self.calls = nnx.var("counts", 0)

        def __call__(self, x):
            self.calls += 1
            return self.submodule(x)

        def some_method(self, x):
            self.calls += 10
            return 2 * self.submodule(x)

    model = Foo(nnx.context(0))
    x = jnp.ones((3, 2))
    state, moduledef = model.partition()
    model = moduledef.merge(state)

    # run __call__
    y, (state, moduledef) = moduledef.apply(state)(x)
    np.testing.assert_array_equal(y, model.submodule(x))
    assert state["calls"].value == 1
    # run some_method
    y, (state, moduledef) = moduledef.apply(state).some_method(x)
    np.testing.assert_array_equal(y, 2 * model.submodule(x))
    assert state["calls"].value == 11
    # run submodule
    y, (state, moduledef) = moduledef.apply(state).submodule(x)
    np.testing.assert_array_equal(y, model.submodule(x))
    assert state["calls"].value == 11
    # any nested method or submodule, by `.` and `[]`
    y, (state, moduledef) = moduledef.apply(state).layers[0](x)
    np.testing.assert_array_equal(y, model.layers[0](x))

    assert model.calls == 0


# Partitioning state


class Mixed(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(2, 3, ctx=nnx.context(0))
        self.bn = nnx.BatchNorm(3, ctx=nnx.context(1))

    def __call__(self, x):
        return self.bn(self.linear(x), use_running_average=True)


def test_partition_by_filters():
    model = Mixed()
    # partition the module into the state with all the nodes and the moduledef
    state, moduledef = model.partition()
    assert len(state) == 6
    # verify that the state contains only params, else raise an error
    with pytest.raises(nnx.FilterError, match="2 of 6 nodes are matched by none of the filters"):
        params, moduledef = model.partition(nnx.Param)
    params, _ = model.linear.partition(nnx.Param)
    assert params.paths == (("bias",), ("kernel",))
    # split the state into params and batch_stats, verify no nodes are left
    (params, batch_stats), moduledef = model.partition(nnx.Param, nnx.BatchStat)
    assert (len(params), len(batch_stats)) == (4, 2)
    # if there are any nodes left, use the `...` filter to capture them
    (params, batch_stats, rest), moduledef = model.partition(nnx.Param, nnx.BatchStat, ...)
    assert len(rest) == 0
    # using `...` as the only filter is equivalent to not passing any filters
    everything, same = model.partition(...)
    assert everything.paths == state.paths
    assert same == moduledef
    assert isinstance(everything, nnx.State)

    model = moduledef.merge(params, batch_stats, rest)
    assert isinstance(model, Mixed)
    x = jnp.ones((4, 2))
    y, (state, moduledef) = moduledef.apply(params, batch_stats, rest)(x)
    assert y.shape == (4, 3)

    params, batch_stats, rest = state.partition(nnx.Param, nnx.BatchStat, ...)
    assert (len(params), len(batch_stats), len(rest)) == (4, 2, 0)

    # only get params
    params = state.filter(nnx.Param)
    assert len(params) == 4
    # get params and batch_stats
    params, batch_stats = state.filter(nnx.Param, nnx.BatchStat)
    assert (len(params), len(batch_stats)) == (4, 2)


def test_partition_by_a_predicate():
    biases, rest = Mixed().filter(lambda path, value: path[-1] == "bias", ...)
    assert biases.paths == (("bn", "bias"), ("linear", "bias"))
    assert len(rest) == 4


def test_filters_not_and_buffers():
    module = Mixed()
    module.mask = jnp.ones(3)
    module.table = np.arange(3)
    rest = module.filter(nnx.Not(nnx.Param))
    buffers = module.filter(nnx.buffers)
    assert rest.paths == (("bn", "mean"), ("bn", "var"), ("mask",), ("table",))
    assert buffers.paths == (("mask",), ("table",))
    assert module.filter((nnx.Param, nnx.buffers)).paths == module.filter(nnx.Not(nnx.BatchStat)).paths


# Intermediate values


class Captures(nnx.Module):
    def __init__(self, din: int, dout: int, *, ctx: nnx.Context):
        key = ctx.make_rng("params")
        self.w = nnx.Param(jax.random.uniform(key, (din, dout)))
        self.b = nnx.Param(jnp.zeros((dout,)))

    def __call__(self, x):
        y = x @ self.w + self.b
        self.y = nnx.Intermediate(y)
        return y


def test_capturing_intermediate_values():
    model = Captures(12, 2, ctx=nnx.context(0))
    y = model(jnp.ones((8, 12)))
    intermediates = model.pop_state(nnx.Intermediate)
    assert intermediates.paths == (("y",),)
    assert type(intermediates["y"]) is nnx.Intermediate
    np.testing.assert_array_equal(intermediates["y"].value, y)
    assert not hasattr(model, "y")


def test_capturing_intermediate_values_with_the_functional_api():
    model = Captures(12, 2, ctx=nnx.context(0))
    state, moduledef = model.partition()
    y, (state, moduledef) = moduledef.apply(state)(jnp.ones((8, 12)))
    # "pop" the intermediates from the state
    intermediates, state = state.partition("intermediates", ...)
    np.testing.assert_array_equal(intermediates["y"].value, y)
    assert state.paths == (("b",), ("w",))
    # what was taken out may stay out: the next call captures it anew
    y, (state, moduledef) = moduledef.apply(state)(jnp.ones((8, 12)))
    np.testing.assert_array_equal(state["y"].value, y)


# Manual lifting


class Block(nnx.Module):
    def __init__(self, dim: int, *, ctx: nnx.Context):
        self.linear = nnx.Linear(dim, dim, ctx=ctx)
        self.dropout = nnx.Dropout(0.5)

    def __call__(self, x: jax.Array, *, train: bool, ctx: nnx.Context) -> jax.Array:
        x = self.linear(x)
        x = self.dropout(x, deterministic=not train, ctx=ctx)
        return jax.nn.gelu(x)


class ScanMLP(nnx.Module):
    def __init__(self, dim: int, *, n_layers: int, ctx: nnx.Context):
        params_key = jax.random.split(ctx.make_rng("params"), n_layers)
        self.n_layers = n_layers
        self.layers = jax.vmap(lambda key: Block(dim, ctx=nnx.context(params=key)).partition())(params_key).merge()

    def __call__(self, x: jax.Array, *, train: bool, ctx: nnx.Context) -> jax.Array:
        dropout_key = jax.random.split(ctx.make_rng("dropout"), self.n_layers)
        params, moduledef = self.layers.partition(nnx.Param)

        def scan_fn(x, inputs):
            params, dropout_key = inputs
            module = moduledef.merge(params)
            x = module(x, train=train, ctx=nnx.context(dropout=dropout_key))
            return x, module.filter(nnx.Param)

        x, params = jax.lax.scan(scan_fn, x, (params, dropout_key))
        self.layers.update_state(params)
        return x


def test_scan_over_layers():
    model = ScanMLP(10, n_layers=5, ctx=nnx.context(0))

    x = jnp.ones((3, 10))
    y = model(x, train=True, ctx=nnx.context(dropout=1))

    assert y.shape == (3, 10)
    kernel = model.layers.linear.kernel
    assert kernel.shape == (5, 10, 10)
    assert len(np.unique(np.asarray(kernel)[:, 0, 0])) == 5, "each layer has parameters of its own"

    # Without dropout the scan is the loop over the layers.
    expected = x
    for i in range(5):
        expected = jax.nn.gelu(expected @ kernel[i] + model.layers.linear.bias[i])
    y = model(x, train=False, ctx=nnx.context(dropout=1))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


# Shared state


class SharedBlock(nnx.Module):
    def __init__(self, linear: nnx.Linear, *, ctx: nnx.Context):
        self.linear = linear
        self.bn = nnx.BatchNorm(2, ctx=ctx)

    def __call__(self, x, *, ctx: nnx.Context):
        x = self.linear(x)
        x = self.bn(x, ctx=ctx)
        return nnx.relu(x)


class SharedModel(nnx.Module):
    def __init__(self, *, ctx: nnx.Context):
        shared = nnx.Linear(2, 2, ctx=ctx)
        self.block1 = SharedBlock(shared, ctx=ctx)
        self.block2 = SharedBlock(shared, ctx=ctx)

    def __call__(self, x, *, ctx: nnx.Context):
        x = self.block1(x, ctx=ctx)
        return self.block2(x, ctx=ctx)


def loss_fn(model: SharedModel, x: jax.Array, y: jax.Array):
    ctx = nnx.context(flags={"use_running_average": True})
    y_pred = model(x, ctx=ctx)
    return jnp.mean((y - y_pred) ** 2)


@pytest.mark.parametrize("wrap", [lambda f: f, nnx.jit], ids=["eager", "jit"])
def test_shared_state_stays_in_sync_through_gradient_updates(wrap):
    model = SharedModel(ctx=nnx.context(0))
    x, y = jnp.array([[1.0, 2.0], [3.0, -1.0]]), jnp.ones((2, 2))

    @wrap
    def step(model):
        grads = nnx.grad(loss_fn)(model, x, y)
        model.update_state(jax.tree.map(lambda w, g: w - 0.1 * g, model.filter(nnx.Param), grads))
        return grads

    # The gradient of the one shared kernel is the sum over its two uses.
    def by_hand(kernel1, kernel2):
        h = x
        for kernel in (kernel1, kernel2):
            h = nnx.relu((h @ kernel) / jnp.sqrt(1 + 1e-5))
        return jnp.mean((y - h) ** 2)

    kernel = model.block1.linear.kernel
    first, second = jax.grad(by_hand, argnums=(0, 1))(kernel, kernel)

    state = model.get_state()
    assert [path for path in state if path[-1] == "kernel"] == [("block1", "linear", "kernel")]
    grads = step(model)
    np.testing.assert_allclose(grads["block1", "linear", "kernel"].value, first + second, rtol=1e-4, atol=1e-5)
    assert model.block1.linear is model.block2.linear
    np.testing.assert_allclose(model.block2.linear.kernel, kernel - 0.1 * (first + second), rtol=1e-4, atol=1e-5)


def test_use_running_average_flag_decides_whether_statistics_move():
    model = SharedModel(ctx=nnx.context(0))
    x = jnp.array([[1.0, 2.0], [3.0, -1.0]])
    before = np.asarray(model.block1.bn.mean)
    model(x, ctx=nnx.context(flags={"use_running_average": True}))
    np.testing.assert_array_equal(model.block1.bn.mean, before)
    model(x, ctx=nnx.context(flags={"use_running_average": False}))
    assert not np.array_equal(model.block1.bn.mean, before)
