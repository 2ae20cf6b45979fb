"""Checkpointer: what is saved comes back bit by bit into a value of the same structure, or an error lists why not."""

import json
import os
import shutil
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import nnx


class Net(nnx.Module):
    def __init__(self, *, ctx: nnx.Context):
        self.first = nnx.Linear(3, 4, ctx=ctx)
        self.norm = nnx.BatchNorm(4, ctx=ctx)
        self.blocks = nnx.Sequence([nnx.Linear(4, 4, ctx=ctx) for _ in range(11)])
        self.table = np.arange(5)

    def __call__(self, x, *, ctx):
        x = self.norm(nnx.relu(self.first(x)), ctx=ctx)
        for block in self.blocks:
            x = block(x)
        return x


TX = optax.adam(1e-2)


@pytest.fixture
def checkpointer(tmp_path):
    with nnx.Checkpointer(tmp_path / "checkpoints", save_every=1) as checkpointer:
        yield checkpointer


def make(seed):
    model = Net(ctx=nnx.context(seed))
    return {"model": model, "optimizer": nnx.Optimizer(model, TX), "state": nnx.TrainState.from_module(model, TX)}


def leaves(value):
    if isinstance(value, nnx.Module):
        value = value.get_state()
    return jax.tree_util.tree_leaves_with_path(value)


def assert_identical(a, b):
    pairs = list(zip(leaves(a), leaves(b), strict=True))
    assert pairs
    for (path, x), (other, y) in pairs:
        assert path == other
        assert type(x) is type(y), path
        if isinstance(x, jax.Array):
            assert x.dtype == y.dtype, path
            assert x.aval == y.aval, path
            assert x.sharding == y.sharding, path
            if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
                assert_identical(jax.random.key_data(x), jax.random.key_data(y))
                continue
        if isinstance(x, (bool, int, float, complex)):
            assert repr(x) == repr(y), path
            continue
        assert np.asarray(x).dtype == np.asarray(y).dtype, path
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


@pytest.mark.parametrize("what", ["model", "optimizer", "state"])
def test_a_round_trip_is_exact(checkpointer, what):
    saved, other = make(0)[what], make(1)[what]
    assert checkpointer.save(3, saved, extra={"a": [1, 2.5]})
    restored = checkpointer.restore(like=other)
    assert (restored.step, restored.extra) == (3, {"a": [1, 2.5]})
    assert_identical(saved, restored.value)
    assert (restored.value is other) == isinstance(other, nnx.Module)


def test_a_dict_of_everything(checkpointer):
    saved, other = make(0), make(1)
    saved["nested"] = {"params": saved["model"].filter(nnx.Param), "list": [jnp.ones(2), 3]}
    other["nested"] = {"params": other["model"].filter(nnx.Param), "list": [jnp.zeros(2), 0]}
    saved["optimizer"].update(saved["model"], saved["model"].filter(nnx.Param))
    checkpointer.save(1, saved)
    restored = checkpointer.restore(like=other).value
    for name in ("model", "optimizer"):
        assert restored[name] is other[name]
    assert restored["nested"]["list"][1] == 3
    for name in saved:
        assert_identical(saved[name], restored[name])


def special_values():
    nan = np.array([0x7FC00001, 0xFF800000, 0x80000000, 1], np.uint32).view(np.float32)
    return {
        "nan payloads": jnp.asarray(nan),
        "bfloat16": jnp.asarray(np.arange(7, dtype=np.uint16).view(ml_dtypes.bfloat16)),
        "float8": jnp.arange(4).astype(jnp.float8_e4m3fn),
        "int4": jnp.arange(-4, 4).astype(jnp.int4),
        "bool": jnp.array([True, False]),
        "complex": jnp.array([1 + 2j, -0.0j]),
        "scalar": jnp.float32(1.5),
        "weak": jnp.asarray(2.0) * 1.5,
        "weak integer": jnp.asarray(2) + 1,
        "no elements": jnp.zeros((0, 3), jnp.int8),
        "numpy float64": np.array([0.1, -0.0, np.nan]),
        "numpy int64": np.array(2**62),
        "numpy scalar": np.float64(0.1),
        "numpy without elements": np.zeros((2, 0)),
        "int": 2**80,
        "float": 0.1,
        "minus zero": -0.0,
        "infinity": float("inf"),
        "true": True,
        "complex number": 1 - 2.5j,
        "key": jax.random.key(7),
        "keys": jax.random.split(jax.random.key(7), (2, 3)),
        "rbg": jax.random.key(7, impl="rbg"),
        "no keys": jax.random.split(jax.random.key(7), 2)[:0],
        "raw key": jax.random.PRNGKey(3),
    }


def zeros_like(value):
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0, impl=jax.random.key_impl(value)), value.shape)
    if isinstance(value, jax.Array) and value.dtype != bool:
        return value * 0  # and not `zeros_like`: what is weakly typed stays so
    if isinstance(value, (jax.Array, np.ndarray)):
        return jnp.zeros_like(value) if isinstance(value, jax.Array) else np.zeros_like(value)
    return type(value)(0)


def test_dtypes_keys_and_numbers(checkpointer):
    saved = special_values()
    checkpointer.save(0, saved)
    restored = checkpointer.restore(like={name: zeros_like(value) for name, value in saved.items()}).value
    assert_identical(saved, restored)


def test_abstract_targets(checkpointer):
    saved = make(0)["state"]
    checkpointer.save(0, {"state": saved, "key": jax.random.key(1)})
    like = jax.eval_shape(lambda: {"state": make(1)["state"], "key": jax.random.key(0)})
    like["state"] = like["state"].replace(buffers=saved.buffers)
    restored = checkpointer.restore(like=like).value
    assert_identical(saved, restored["state"])
    assert_identical(jax.random.key(1), restored["key"])


def test_a_restored_state_compiles_nothing_anew_and_can_be_donated(checkpointer):
    traces = []

    @jax.jit
    def read(state):
        traces.append(1)
        return state.step

    double = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + leaf, state), donate_argnums=0)
    state = make(0)["state"].replace(buffers=nnx.State())
    read(state)
    before = read._cache_size()
    checkpointer.save(1, state)
    restored = checkpointer.restore(like=state).value
    read(restored)
    assert len(traces) == 1
    assert read._cache_size() == before
    once = jax.tree.map(np.array, restored)
    twice = double(restored)
    for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(twice), strict=True):
        np.testing.assert_array_equal(a + a, b)


def test_what_is_changed_or_donated_after_save_is_saved_as_it_was(checkpointer):
    clear = jax.jit(lambda x: x * 0, donate_argnums=0)
    for step in range(3):
        value = {"jax": jnp.arange(1_000_000.0) + step, "numpy": np.arange(1_000_000.0) + step}
        checkpointer.save(step, value)
        clear(value["jax"]).block_until_ready()
        value["numpy"][:] = -1
        restored = checkpointer.restore(like={"jax": jnp.zeros(1_000_000), "numpy": np.zeros(1_000_000)}).value
        np.testing.assert_array_equal(restored["jax"], np.arange(1_000_000.0) + step)
        np.testing.assert_array_equal(restored["numpy"], np.arange(1_000_000.0) + step)


def test_random_streams_of_a_context(checkpointer):
    ctx = nnx.context(0, dropout=1)
    [ctx.make_rng("dropout") for _ in range(3)]
    checkpointer.save(0, {"x": jnp.ones(2)}, context=ctx)
    expected = [jax.random.key_data(ctx.make_rng(name)) for name in ("dropout", "params", "dropout")]
    other = nnx.context(5, dropout=9)
    assert checkpointer.restore(like={"x": jnp.zeros(2)}, context=other).step == 0
    for name, key in zip(("dropout", "params", "dropout"), expected, strict=True):
        np.testing.assert_array_equal(jax.random.key_data(other.make_rng(name)), key)
    with pytest.raises(nnx.StructureError, match="context: missing in the checkpoint: `noise/0`"):
        checkpointer.restore(like={"x": jnp.zeros(2)}, context=nnx.context(5, dropout=9, noise=1))


def test_a_continued_run_equals_one_that_was_not_interrupted(checkpointer, rng):
    x = rng.normal(size=(4, 3)).astype(np.float32)

    @nnx.jit
    def step(model, optimizer, ctx, x):
        def loss(model, ctx):
            noise = jax.random.normal(ctx.make_rng("noise"), x.shape)
            return (model(x + noise, ctx=ctx) ** 2).mean()

        optimizer.update(model, nnx.grad(loss)(model, ctx))

    def start(seed):
        return *(make(seed)[name] for name in ("model", "optimizer")), nnx.context(
            noise=seed, flags={"use_running_average": False}
        )

    def run(parts, steps):
        for _ in range(steps):
            step(*parts, x)
        return parts

    whole = run(start(0), 6)
    half = run(start(0), 3)
    checkpointer.save(3, {"model": half[0], "optimizer": half[1]}, context=half[2])
    rest = start(1)
    checkpointer.restore(like={"model": rest[0], "optimizer": rest[1]}, context=rest[2])
    run(rest, 3)
    for a, b in zip(whole[:2], rest[:2], strict=True):
        assert_identical(a, b)


def test_every_difference_is_listed_and_nothing_is_changed(checkpointer):
    checkpointer.save(0, {"model": make(0)["model"], "gone": 1, "step": 3, "key": jax.random.key(0)})
    model = make(1)["model"]
    before = model.get_state()
    model.first = nnx.Linear(5, 4, ctx=nnx.context(0))
    model.norm.mean = model.norm.mean.astype(jnp.float16)
    del model.blocks[10]
    del model.norm.var
    model.norm.var = nnx.Param(jnp.ones(4))
    with pytest.raises(nnx.StructureError) as error:
        checkpointer.restore(
            like={"model": model, "new": jnp.ones((2, 3)), "step": jnp.ones(()), "key": jnp.ones(2, jnp.uint32)}
        )
    lines = str(error.value).splitlines()
    assert "step 0" in lines[0]
    assert [line.strip() for line in lines[1:]] == [
        "missing in the checkpoint: `new` (float32[2,3])",
        "unexpected in the checkpoint: `gone` (a Python int)",
        "unexpected in the checkpoint: `model/blocks/10/bias` (float32[4])",
        "unexpected in the checkpoint: `model/blocks/10/kernel` (float32[4,4])",
        "different: `key` is saved as key<fry>[], `like` has uint32[2]",
        "different: `model/first/kernel` is saved as float32[3,4], `like` has float32[5,4]",
        "different: `model/norm/mean` is saved as float32[4], `like` has float16[4]; cast=True converts it",
        "different: `model/norm/var` is saved as one of `batch_stats`, `like` has it in `params`",
        "different: `step` is saved as a Python int, `like` has float32[]",
    ]
    np.testing.assert_array_equal(model.blocks[0].kernel, before["blocks/0/kernel"].value)


def test_steps_saving_and_retention(tmp_path):
    value = {"x": jnp.ones(2)}
    with nnx.Checkpointer(tmp_path / "c", save_every=5, keep_last=2) as checkpointer:
        assert (checkpointer.steps, checkpointer.latest_step) == ((), None)
        done = [step for step in range(1, 23) if checkpointer.save(step, value)]
        assert done == [5, 10, 15, 20]
        assert [step for step in range(20, 31) if checkpointer.should_save(step)] == [25, 30]
        assert checkpointer.save(jnp.array(22), value, force=True)
        assert not checkpointer.save(22, value, force=True)
        checkpointer.wait()
        assert checkpointer.steps == (20, 22)
        with pytest.raises(nnx.CheckpointError, match=r"cannot save step 21 .* step 22 is there"):
            checkpointer.save(21, value, force=True)
        with pytest.raises(nnx.CheckpointNotFoundError, match=r"no checkpoint of step 5 .*\[20, 22\]"):
            checkpointer.restore(5, like=value)
        assert checkpointer.restore(20, like=value).step == 20
        assert "steps=[20, 22]" in repr(checkpointer)
    with pytest.raises(nnx.CheckpointError, match="closed"):
        checkpointer.save(23, value, force=True)
    checkpointer.close()
    assert "closed" in repr(checkpointer)
    with nnx.Checkpointer(tmp_path / "c", keep_last=None, async_save=False) as checkpointer:
        for step in (23, 24, 25):
            checkpointer.save(step, value, force=True)
        assert checkpointer.steps == (20, 22, 23, 24, 25)


def test_a_save_that_was_killed_leaves_nothing_that_matters(tmp_path):
    program = """
import os, sys, jax.numpy as jnp, nnx
checkpointer = nnx.Checkpointer(sys.argv[1])
checkpointer.save(0, {"x": jnp.ones(2)})
checkpointer.wait()
checkpointer.save(1000, {"x": jnp.ones(4_000_000)})
os.kill(os.getpid(), 9)
"""
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False, timeout=120)
    assert killed.returncode == -9
    with nnx.Checkpointer(tmp_path) as checkpointer:
        # Whether the second was done when the signal came or not: what is listed is whole.
        size = {0: 2, 1000: 4_000_000}[checkpointer.latest_step]
        assert float(checkpointer.restore(like={"x": jnp.zeros(size)}).value["x"].sum()) == size
        assert checkpointer.save(2000, {"x": jnp.full(2, 7.0)})
        np.testing.assert_array_equal(checkpointer.restore(like={"x": jnp.zeros(2)}).value["x"], [7, 7])


def test_a_relative_directory_is_fixed_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with nnx.Checkpointer("runs/a") as checkpointer:
        monkeypatch.chdir(tmp_path / "elsewhere")
        checkpointer.save(0, {"x": jnp.ones(1)})
        assert checkpointer.directory == str(tmp_path / "runs/a")
    assert (tmp_path / "runs/a/0").is_dir()


def test_an_empty_value(checkpointer):
    checkpointer.save(0, nnx.State(), extra=None)
    assert len(checkpointer.restore(like=nnx.State()).value) == 0


def test_what_cannot_be_saved_is_refused_at_once(checkpointer, tmp_path):
    with pytest.raises(TypeError, match="`a/name` is a str; a checkpoint holds arrays"):
        checkpointer.save(0, {"a": {"name": "x"}})
    with pytest.raises(TypeError, match="`x` is a ndarray of object"):
        checkpointer.save(0, {"x": np.array([None])})
    with pytest.raises(TypeError, match="`x` is a ShapeDtypeStruct, which has no data"):
        checkpointer.save(0, {"x": jax.ShapeDtypeStruct((2,), jnp.float32)})
    with pytest.raises(nnx.StructureError, match="two leaves with the path `a/b`"):
        checkpointer.save(0, {"a/b": jnp.ones(1), "a": {"b": jnp.zeros(1)}})
    with pytest.raises(TypeError, match="`extra` must be what JSON can hold"):
        checkpointer.save(0, {"x": jnp.ones(1)}, extra={"x": jnp.ones(1)})
    with pytest.raises(TypeError, match="`x` is traced"):
        jax.jit(lambda x: checkpointer.save(0, {"x": x}))(jnp.ones(1))
    with pytest.raises(ValueError, match="a step is not negative"):
        checkpointer.save(-1, {"x": jnp.ones(1)})
    donated = jnp.ones(3)
    jax.jit(lambda x: x + 1, donate_argnums=0)(donated)
    with pytest.raises(TypeError, match="the array at `x` has been deleted: it was donated"):
        checkpointer.save(0, {"x": donated})
    assert checkpointer.steps == ()
    with pytest.raises(ValueError, match="save_every counts steps from 1"):
        nnx.Checkpointer(tmp_path, save_every=0)
    with pytest.raises(ValueError, match="keep_last counts from 1 up"):
        nnx.Checkpointer(tmp_path, keep_last=0)


def test_paths_keep_the_types_of_their_parts(checkpointer):
    value = {"by number": {0: jnp.ones(1), 10: jnp.zeros(1)}, "a/b": jnp.ones(2), "list": [jnp.ones(3)]}
    checkpointer.save(0, value)
    checkpointer.wait()
    with nnx.Checkpointer(checkpointer.directory) as other:  # from the file
        entries = other.inspect().items["state"]
    assert {path: entry.spec.parts for path, entry in entries.items()} == {
        "a/b": ("a/b",),
        "by number/0": ("by number", 0),
        "by number/10": ("by number", 10),
        "list/0": ("list", 0),
    }
    restored = checkpointer.restore(like=jax.tree.map(jnp.zeros_like, value)).value
    np.testing.assert_array_equal(restored["by number"][0], [1])
    with pytest.raises(nnx.StructureError, match="two leaves with the path `x/0`"):
        checkpointer.save(1, {"x": {"0": jnp.ones(1)}, "x/0": jnp.ones(1)})
    with pytest.raises(nnx.PathError, match="'a/b' cannot be a part of a path"):
        checkpointer.save(1, nnx.State([(("a/b",), nnx.Param(jnp.ones(1)))]))


def test_all_is_changed_or_nothing(checkpointer, monkeypatch):
    class Position:
        def __init__(self, at):
            self.at = at

        def get_state(self):
            return self.at

        def set_state(self, state):
            self.at = state

    saved, model = make(0), make(1)["model"]
    ctx, data = nnx.context(3), Position(1)
    checkpointer.save(0, {"model": saved["model"]}, context=nnx.context(4), data_iter=Position(7))
    before = model.clone()

    def refuse(self, *_):
        raise MemoryError("no memory left")

    with monkeypatch.context() as patch:
        patch.setattr(nnx.Context, "update_state", refuse)
        with pytest.raises(MemoryError, match="no memory left"):
            checkpointer.restore(like={"model": model}, context=ctx, data_iter=data)
    assert_identical(model, before)
    assert data.at == 1
    np.testing.assert_array_equal(*(jax.random.key_data(c.fork().make_rng("params")) for c in (ctx, nnx.context(3))))

    class Stubborn(Position):
        def set_state(self, state):
            self.at = state
            if state == 7:
                raise ValueError("cannot go there")

    data = Stubborn(2)
    with pytest.raises(ValueError, match="cannot go there"):
        checkpointer.restore(like={"model": model}, context=ctx, data_iter=data)
    assert_identical(model, before)
    assert data.at == 2
    checkpointer.restore(like={"model": model}, context=ctx)
    assert_identical(model, saved["model"])


def test_bare_arrays(checkpointer):
    checkpointer.save(0, jnp.arange(3))
    np.testing.assert_array_equal(checkpointer.restore(like=jnp.zeros(3, int)).value, [0, 1, 2])
    with pytest.raises(TypeError, match="`value` is a str; a checkpoint holds arrays"):
        checkpointer.save(1, "a text")


def test_nothing_to_restore(checkpointer):
    with pytest.raises(FileNotFoundError, match="there is no checkpoint in"):
        checkpointer.restore(like={"x": jnp.ones(1)})


def test_nothing_to_restore_as_no_step_was_one_to_save_at(tmp_path):
    with nnx.Checkpointer(tmp_path) as checkpointer:
        assert not checkpointer.save(7, {"x": jnp.ones(1)})
        for restore in (
            lambda: checkpointer.restore(like={"x": jnp.ones(1)}),
            lambda: checkpointer.restore(7, like={}),
        ):
            with pytest.raises(
                nnx.CheckpointNotFoundError, match=r"nothing at step 7, .* save_every=1000.* force=True"
            ):
                restore()


def test_a_directory_that_is_none_and_a_checkpoint_that_is_not_ours(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(nnx.CheckpointError, match="cannot keep checkpoints in"):
        nnx.Checkpointer(tmp_path / "file")
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(tmp_path / "other") as manager:
        manager.save(1, args=ocp.args.StandardSave({"x": jnp.ones(1)}))
    with nnx.Checkpointer(tmp_path / "other") as checkpointer:
        assert checkpointer.steps == ()
        with pytest.raises(nnx.CheckpointError, match=r"folders named by steps \(1\), and none was saved by"):
            checkpointer.restore(like={"x": jnp.ones(1)})
        with pytest.raises(nnx.CheckpointError, match="step 1 .* was not saved by"):
            checkpointer.restore(1, like={"x": jnp.ones(1)})
        with pytest.raises(nnx.CheckpointError, match="a folder 1 that no Checkpointer has saved"):
            checkpointer.save(1, {"x": jnp.ones(1)}, force=True)
        assert (tmp_path / "other" / "1").exists()


def test_a_later_format_is_refused(tmp_path):
    with nnx.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, {"x": jnp.ones(1)})
    file = tmp_path / "0" / "nnx_manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "version": 3}))
    with nnx.Checkpointer(tmp_path) as checkpointer, pytest.raises(nnx.CheckpointError, match="format version 3"):
        checkpointer.restore(like={"x": jnp.ones(1)})


def test_shardings_are_those_of_the_target(tmp_path):
    program = """
import sys, jax, jax.numpy as jnp, numpy as np, nnx
from jax.sharding import NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
x = jax.device_put(jnp.arange(16.0).reshape(8, 2), NamedSharding(mesh, P("data")))
with nnx.Checkpointer(sys.argv[1]) as checkpointer:
    checkpointer.save(0, {"x": x, "y": jnp.ones(3)})
    for target in (NamedSharding(mesh, P(None, None)), NamedSharding(mesh, P("data", None)), jax.devices()[2]):
        like = {"x": jax.device_put(jnp.zeros((8, 2)), target), "y": jax.ShapeDtypeStruct((3,), jnp.float32)}
        value = checkpointer.restore(like=like).value
        assert value["x"].sharding == like["x"].sharding, value["x"].sharding
        assert not value["y"].committed
        np.testing.assert_array_equal(value["x"], np.arange(16.0).reshape(8, 2))
"""
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    subprocess.run(
        [sys.executable, "-W", "error", "-c", program, str(tmp_path / "c")], check=True, env=environment, timeout=120
    )


ON_MANY = """
import sys, jax, jax.numpy as jnp, numpy as np, nnx, optax
from jax.sharding import NamedSharding, PartitionSpec as P

folder, devices, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
assert len(jax.devices()) == devices
mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
rows, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())

class Net(nnx.Module):
    def __init__(self, *, ctx):
        init = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(init(ctx.make_rng("params"), (16, 8)), sharding=("data", None))
        self.last = nnx.Linear(8, 1, ctx=ctx)
    def __call__(self, x):
        return self.last(nnx.relu(x @ self.kernel))

model = Net(ctx=nnx.context(0))
state = nnx.TrainState.from_module(model, optax.adam(1e-2))
place = lambda leaf: jax.device_put(leaf, rows if leaf.shape[:1] == (16,) else whole)
state = jax.tree.map(place, state)

@jax.jit
def step(state, x):
    def loss(params):
        y, _ = state.apply(params)(x)
        return ((y - x.sum(1, keepdims=True)) ** 2).mean()
    value, grads = jax.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads), {"loss": value}

class Data:
    def __init__(self): self.at = 0
    def __iter__(self): return self
    def __next__(self):
        self.at += 1
        return jax.device_put(np.random.default_rng(self.at).normal(size=(8, 16)).astype(np.float32), rows)
    def get_state(self): return self.at
    def set_state(self, at): self.at = at

class Out:
    def resume(self, step): print("resumed", step)
    def log(self, step, values): print(step, values["loss"].hex())
    def close(self): pass

with nnx.Checkpointer(folder, save_every=4) as checkpointer:
    if checkpointer.latest_step is not None:
        restored = checkpointer.restore(like=state)
        for leaf, like in zip(jax.tree.leaves(restored.value), jax.tree.leaves(state), strict=True):
            assert leaf.sharding == like.sharding and leaf.committed, (leaf.sharding, like.sharding)
        kernel = np.asarray(restored.value.params["kernel"].value)
        print("restored", restored.report.resharded != (), kernel.tobytes().hex())
        # By the names of the axes in the Variables, whatever `like` says.
        onto = checkpointer.restore(like=nnx.eval_shape(lambda: state), mesh=mesh).value.params["kernel"].value
        assert onto.sharding.is_equivalent_to(rows, 2), onto.sharding
    result = nnx.fit(step, state, Data(), steps=last, checkpointer=checkpointer, log_every=1, loggers=[Out()])
print("kernel", np.asarray(result.state.params["kernel"].value).tobytes().hex())
"""


@pytest.mark.slow
def test_a_run_goes_on_on_another_number_of_devices(tmp_path):
    def life(folder, devices, steps):
        env = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-W", "error", "-c", ON_MANY, str(tmp_path / folder), str(devices), str(steps)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        lines = [line.split() for line in done.stdout.splitlines()]
        losses = {int(line[0]): float.fromhex(line[1]) for line in lines if line[0].isdecimal()}
        return losses, {line[0]: line[1:] for line in lines if not line[0].isdecimal()}

    whole, end = life("whole", 8, 12)
    first, saved = life("run", 8, 4)
    shutil.copytree(tmp_path / "run", tmp_path / "same")
    # Where the layout is the same, every bit is.
    second, told = life("same", 8, 12)
    assert told["restored"] == ["False", saved["kernel"][0]]
    assert {**first, **second} == whole
    assert told["kernel"] == end["kernel"]
    for devices, steps in ((4, 8), (1, 12)):
        before = saved["kernel"][0]
        second, saved = life("run", devices, steps)
        assert saved["restored"] == ["True", before]  # exactly what was saved, on other devices
        first |= second
    assert first.keys() == whole.keys()
    np.testing.assert_allclose(list(first.values()), list(whole.values()), rtol=1e-5)


def test_orbax_is_imported_only_when_a_checkpointer_is_made(tmp_path):
    program = "import sys, nnx.train; assert not [name for name in sys.modules if name.partition('.')[0] == 'orbax']"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_a_context_is_part_of_a_value_too(checkpointer):
    ctx, other = nnx.context(dropout=1), nnx.context(dropout=2)
    ctx.make_rng("dropout")
    checkpointer.save(0, {"ctx": ctx})
    assert checkpointer.restore(like={"ctx": other}).value["ctx"] is other
    np.testing.assert_array_equal(*(jax.random.key_data(c.make_rng("dropout")) for c in (ctx, other)))


def test_no_warning_reaches_the_user(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with nnx.Checkpointer(tmp_path) as checkpointer:
            state = make(0)["state"]
            checkpointer.save(0, state)
            checkpointer.restore(like=state)
