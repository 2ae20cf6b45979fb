"""Eight devices: recipes equal one device, on auto and on explicit axes; what moves between devices is what must."""

import collections
import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tests.sharding.eight import KINDS, MANY, MESHES, make_mesh, needs_devices

import nnx

FOLDER = Path(__file__).parent
FILES = [FOLDER / f"test_{name}.py" for name in ("eight_devices", "explicit", "transformer")]
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"


def test_the_folder_on_eight_devices(request):
    if MANY:
        return
    # How well a processor runs what one device does is for other tests: unoptimized, it compiles in half of the time.
    env = {**os.environ, "XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu"}
    marks = request.config.getoption("-m")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-m", marks, *FILES]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stdout[-6000:]


pytestmark = pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")

# The transformer of the example, in one block: what it computes is not affected by how many there are.


@functools.cache
def losses(recipe, axes):
    from nnx.examples import transformer_sharded as example

    sizes = MESHES[recipe] if recipe else {"data": 1}
    mesh = example.make_mesh(sizes, axes)
    return example.run(
        mesh, recipe or "data_parallel", steps=3, batch_size=8, embed=16, mlp=32, heads=2, layers=2, dropout=0.1
    )


@needs_devices
@pytest.mark.parametrize("axes", ["auto", pytest.param("explicit", marks=pytest.mark.slow)])
def test_the_example_gives_the_losses_of_one_device_with_dropout(axes):
    np.testing.assert_allclose(losses("combined", axes), losses(None, "auto"), rtol=2e-6)


# Convolutions, statistics of batches, dropout, metrics and clipping.


class ConvNet(nnx.Module):
    def __init__(self, *, ctx):
        self.conv = nnx.Conv(1, 16, (3, 3), ctx=ctx)
        self.norm = nnx.BatchNorm(16, momentum=0.5, ctx=ctx)
        self.hidden = nnx.Linear(16, 16, ctx=ctx)
        self.dropout = nnx.Dropout(0.5)
        self.logits = nnx.Linear(16, 4, ctx=ctx)

    def __call__(self, x, *, ctx):
        x = nnx.relu(self.norm(self.conv(x), ctx=ctx)).mean((1, 2))
        return self.logits(self.dropout(nnx.relu(self.hidden(x)), ctx=ctx))


TX = optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(1.0))


@nnx.jit
def conv_step(model, optimizer, metrics, x, labels):
    ctx = nnx.context(dropout=0, flags={"deterministic": False, "use_running_average": False})

    def loss_fn(model, ctx):
        logits = model(x, ctx=ctx)
        return optax.softmax_cross_entropy(logits, jax.nn.one_hot(labels, 4)).mean(), logits

    (loss, logits), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model, ctx)
    optimizer.update(model, grads)
    metrics.update(loss=loss, logits=logits, labels=labels)
    return loss, jnp.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(grads)))


def train_conv(mesh, rules):
    metrics = nnx.MultiMetric(loss=nnx.Average("loss"), accuracy=nnx.Accuracy())

    def create():
        model = ConvNet(ctx=nnx.context(0))
        return model, nnx.Optimizer(model, TX)

    model, optimizer = nnx.sharded_init(create, mesh, rules)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(16, 6, 6, 1)).astype(np.float32)
    x, labels = (
        jax.device_put(a, NamedSharding(mesh, nnx.logical_to_mesh(P("batch"), rules)))
        for a in (x * np.linspace(0.1, 3, 16, dtype=np.float32)[:, None, None, None], rng.integers(0, 4, 16))
    )
    with jax.set_mesh(mesh), nnx.logical_axis_rules(rules):
        norms = [[float(a) for a in conv_step(model, optimizer, metrics, x, labels)] for _ in range(2)]
    return [np.asarray(model.norm.mean), np.asarray(model.norm.var), norms, metrics.compute()], model


@needs_devices
@pytest.mark.parametrize("axes", list(KINDS))
def test_statistics_dropout_metrics_and_clipping_are_global(axes):
    whole, _ = train_conv(make_mesh({"data": 1}), nnx.sharding_rules("data_parallel"))
    for recipe, sizes in (("data_parallel", {"data": 8}), ("combined", MESHES["combined"])):
        mesh = make_mesh(sizes, axes)
        found, model = train_conv(mesh, nnx.sharding_rules(recipe, mesh, out=None))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), found, whole)
        if recipe == "combined":
            assert model.hidden.kernel.addressable_shards[0].data.shape == (8, 16)
            assert model.conv.kernel.addressable_shards[0].data.shape == (3, 3, 1, 8)


@needs_devices
def test_dropout_masks_differ_over_data_and_agree_over_tensor():
    mesh = make_mesh({"data": 4, "tensor": 2})
    x = jax.device_put(jnp.ones((8, 64)), NamedSharding(mesh, P("data", None)))
    drop = nnx.jit(lambda x: nnx.Dropout(0.5)(x, deterministic=False, ctx=nnx.context(dropout=0)))
    y = drop(x)
    shards = {shard.device.id: np.asarray(shard.data) for shard in y.addressable_shards}
    rows = [tuple(map(tuple, shards[device.id] > 0)) for device in mesh.devices[:, 0]]
    assert len(set(rows)) == 4
    for first, second in mesh.devices:
        np.testing.assert_array_equal(shards[first.id], shards[second.id])
    # By hand, on shards: `split_rngs` names the axes along which masks differ.
    manual = nnx.shard_map(
        lambda x, ctx: nnx.Dropout(0.5)(x, deterministic=False, ctx=ctx),
        mesh=mesh,
        in_specs=(P("data"), P()),
        out_specs=P("data"),
        split_rngs=("data",),
    )
    z = np.asarray(manual(x, nnx.context(dropout=0))).reshape(4, 2, 64)
    assert len({tuple(part.ravel() > 0) for part in z}) == 4


# Birth in shards.


class Wide(nnx.Module):
    def __init__(self, *, ctx):
        self.layers = [nnx.MLP(512, 2048, 512, ctx=ctx) for _ in range(4)]


@needs_devices
@pytest.mark.parametrize("axes", list(KINDS))
def test_no_device_holds_the_whole_at_birth(axes):
    mesh = make_mesh({"fsdp": 8}, axes)
    rules = nnx.sharding_rules("fsdp", mesh, mlp="fsdp", embed=None)
    tx = optax.adam(1e-3)
    compiled = []

    def create():
        model = Wide(ctx=nnx.context(0))
        return model, nnx.Optimizer(model, tx)

    with pytest.MonkeyPatch.context() as patch:
        kept = nnx.core.transforms._sharded_init.jit

        def watched(function):
            jitted = kept(function)

            def call():
                compiled.append(jitted.lower().compile().memory_analysis())
                return jitted()

            return call

        patch.setattr(nnx.core.transforms._sharded_init, "jit", watched)
        model, optimizer = nnx.sharded_init(create, mesh, rules)
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves((model.partition()[0], optimizer.partition()[0])))
    held = collections.Counter()
    for leaf in jax.tree.leaves((model.partition()[0], optimizer.partition()[0])):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    assert max(held.values()) < whole / 8 * 1.02
    # All that a device needs at once, arguments and temporaries included: its share, and the random bits of a part.
    (memory,) = compiled
    peak = memory.output_size_in_bytes + memory.temp_size_in_bytes + memory.argument_size_in_bytes
    assert peak < whole / 8 * 1.5, (peak, whole)


# The fast path and checkpoints.


class TwoLayers(nnx.Module):
    def __init__(self, *, ctx):
        self.mlp = nnx.MLP(32, 64, 32, ctx=ctx)
        self.norm = nnx.LayerNorm(32, ctx=ctx)

    def __call__(self, x):
        return self.norm(x + self.mlp(nnx.with_logical_constraint(x, ("batch", "activation_embed"))))


ADAM = optax.adam(1e-2)


@needs_devices
@pytest.mark.parametrize("axes", list(KINDS))
def test_a_step_on_sharded_arrays_is_traced_once_and_keeps_its_layout(axes):
    mesh = make_mesh({"fsdp": 8}, axes)
    rules = nnx.sharding_rules("fsdp", mesh)

    def create():
        model = TwoLayers(ctx=nnx.context(0))
        return model, nnx.Optimizer(model, ADAM)

    model, optimizer = nnx.sharded_init(create, mesh, rules)
    traced = []

    @nnx.jit
    def step(model, optimizer, x):
        traced.append(x)
        grads = nnx.grad(lambda model: (model(x) ** 2).mean())(model)
        optimizer.update(model, grads)

    x = jax.device_put(jnp.ones((16, 32)), NamedSharding(mesh, P("fsdp")))
    before = model.mlp.layers[0].kernel.sharding
    with jax.set_mesh(mesh), nnx.logical_axis_rules(rules):
        for _ in range(3):
            step(model, optimizer, x)
    assert len(traced) == 1
    assert step._cache_size() == 1
    assert model.mlp.layers[0].kernel.sharding.is_equivalent_to(before, 2)


@needs_devices
def test_a_checkpoint_goes_from_one_mesh_to_another(tmp_path):
    def create():
        model = TwoLayers(ctx=nnx.context(0))
        return model, nnx.Optimizer(model, ADAM)

    mesh = make_mesh({"fsdp": 8})
    model, optimizer = nnx.sharded_init(create, mesh, nnx.sharding_rules("fsdp", mesh))
    saved = np.asarray(model.mlp.layers[0].kernel)
    other = make_mesh(MESHES["combined"])
    rules = nnx.sharding_rules("combined", other)
    with nnx.Checkpointer(tmp_path, save_every=1) as checkpointer:
        checkpointer.save(1, {"model": model, "optimizer": optimizer})
        target, target_optimizer = nnx.sharded_init(create, other, rules)
        target.mlp.layers[0].kernel = target.mlp.layers[0].kernel * 0
        checkpointer.restore(like={"model": target, "optimizer": target_optimizer})
        np.testing.assert_array_equal(target.mlp.layers[0].kernel, saved)
        assert tuple(target.mlp.layers[0].kernel.sharding.spec) == ("fsdp", "tensor")
        # A model of one device, restored to a mesh by the rules.
        plain = TwoLayers(ctx=nnx.context(1))
        with nnx.logical_axis_rules(rules):
            checkpointer.restore(like={"model": plain}, partial=True, mesh=other)
        np.testing.assert_array_equal(plain.mlp.layers[0].kernel, saved)
        assert tuple(plain.mlp.layers[0].kernel.sharding.spec) == ("fsdp", "tensor")
        assert plain.mlp.layers[0].get_variable("kernel").sharding == ("embed", "mlp")


@needs_devices
def test_constraints_on_auto_explicit_mixed_and_manual_axes():
    rules = {"batch": "data", "mlp": "model"}
    x = np.ones((8, 4), np.float32)
    constrain = nnx.jit(lambda x: nnx.with_logical_constraint(x * 2, ("batch", "mlp")))
    for kinds in (("auto", "auto"), ("explicit", "explicit"), ("explicit", "auto")):
        mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=tuple(KINDS[kind] for kind in kinds))
        with jax.set_mesh(mesh), nnx.logical_axis_rules(rules):
            y = constrain(x)
        assert y.sharding.is_equivalent_to(NamedSharding(mesh, P("data", "model")), 2), kinds
    mesh = make_mesh({"data": 4, "model": 2})
    with jax.set_mesh(mesh), nnx.logical_axis_rules(rules):
        inside = nnx.jit(
            nnx.shard_map(
                lambda x: nnx.with_logical_constraint(x, ("batch", "mlp")), in_specs=(P("data"),), out_specs=P("data")
            )
        )
        np.testing.assert_array_equal(inside(x), x)
    with pytest.raises(nnx.ShardingError, match=r"dimension 0 \(`batch`\) of `the constrained value` has the size 6"):
        nnx.with_logical_constraint(jnp.ones((6, 4)), ("batch", "mlp"), rules=rules, mesh=mesh)


@needs_devices
def test_hidden_units_follow_the_rules_where_the_mesh_can():
    mesh = make_mesh({"data": 2, "tensor": 4})
    rules = nnx.sharding_rules("combined", mesh)
    x = np.ones((8, 4), np.float32)
    for hidden, rules_in_force, split in (
        (8, rules, 1),
        (6, rules, 0),
        (8, {"activation_mlp": "elsewhere"}, 0),
        (8, {}, 0),
    ):
        model = nnx.MLP(4, hidden, 4, ctx=nnx.context(0))
        with jax.set_mesh(mesh), nnx.logical_axis_rules(rules_in_force):
            lowered = nnx.jit(lambda model, x: model(x)).lower(model, x)
            assert lowered.as_text().count("sdy.sharding_constraint") == split, hidden
            np.testing.assert_allclose(lowered.compile()(model, x), model(x), rtol=1e-6)


def sent_on_a_cpu(planned, sizes, mesh, rules, layers, embed):
    """What the planner says of each axis, and what XLA sends besides on a CPU.

    It scatters nothing there: the gradients of parameters that the batch's axes split are reduced, and then cut. And it
    reduces the gradients through queries, keys and values each by itself, where one reduction of their sum would do.
    """
    found = dict(planned.communication)
    batch = [axis for axis in ("data", "fsdp") if axis in mesh.axis_names and rules["batch"]]
    params = sizes.model.filter(nnx.Param)
    shardings = jax.tree.leaves(nnx.get_named_sharding(params, mesh, rules))
    for leaf, sharding in zip(jax.tree.leaves(params), shardings, strict=True):
        mine = int(np.prod(sharding.shard_shape(leaf.shape))) * 4
        for axis in jax.tree.leaves(tuple(sharding.spec)):
            if axis in batch:
                found[axis] += mine * (mesh.shape[axis] - 1)
    n = mesh.shape.get("tensor", 1)
    if n > 1:
        over = int(np.prod([mesh.shape[axis] for axis in batch]))
        found["tensor"] += 2 * layers * 2 * (sizes.tokens // over * embed * 4) * (n - 1) // n
    return found


SLOWLY = ("data_parallel", "tensor_parallel", "combined", "sequence_parallel")


@needs_devices
@pytest.mark.parametrize("recipe", ["fsdp", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOWLY)])
def test_the_plan_of_a_step_is_what_is_compiled(recipe):
    from tests.sharding.hlo import sent_by_axes

    from nnx.examples import transformer_sharded as example

    mesh = make_mesh(MESHES[recipe])
    rules = nnx.sharding_rules(recipe, mesh)
    tx = example.make_optimizer()
    tokens = jax.ShapeDtypeStruct((32, 64), jnp.int32)

    def make():
        return example.Transformer(128, 4, 512, 4, vocabulary=256, ctx=nnx.context(0))

    def create():
        model = make()
        return model, nnx.Optimizer(model, tx)

    sizes = nnx.sizes_of(make, tx, inputs=[tokens])
    planned = nnx.plan(sizes, MESHES[recipe], rules)
    model, optimizer = nnx.sharded_init(create, mesh, rules)
    placed = NamedSharding(mesh, nnx.logical_to_mesh(P("batch", None), rules))
    batch = jax.device_put(np.zeros(tokens.shape, np.int32), placed)
    with jax.set_mesh(mesh), nnx.logical_axis_rules(rules):
        compiled = example.train_step.lower(model, optimizer, batch, jax.random.key(0)).compile()
    memory = compiled.memory_analysis()
    # The state exactly, but for the tokens and the key that are arguments too.
    assert 0 <= memory.argument_size_in_bytes - planned.state < 64 + tokens.size * 4
    ratio = planned.total / (memory.argument_size_in_bytes + memory.temp_size_in_bytes)
    assert 0.75 < ratio < 1.2, ratio

    sent = sent_by_axes(compiled.as_text(), mesh)
    expected = sent_on_a_cpu(planned, sizes, mesh, rules, layers=4, embed=128)
    assert set().union(*sent) == set(expected)
    ratio = sum(sent.values()) / sum(expected.values())
    if recipe == "sequence_parallel":
        # There too what could be scattered is reduced.
        assert 1 < ratio < 1.3, ratio
        return
    assert 0.95 < ratio < 1.05, (ratio, sent, expected)
    for axis, nbytes in expected.items():
        assert 0.9 < sent[axis,] / nbytes < 1.1, (axis, sent, expected)
