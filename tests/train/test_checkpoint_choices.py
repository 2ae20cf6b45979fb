"""What is kept, and what of a checkpoint goes where: policies, filters, renames, casts, iterators, reports."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nnx


class Model(nnx.Module):
    def __init__(self, *, ctx, dtype=jnp.float32):
        self.encoder = nnx.Linear(3, 4, param_dtype=dtype, ctx=ctx)
        self.norm = nnx.BatchNorm(4, ctx=ctx)
        self.head = nnx.Linear(4, 2, param_dtype=dtype, ctx=ctx)


def make(seed=0, **options):
    return Model(ctx=nnx.context(seed), **options)


def same(a, b):
    for x, y in zip(jax.tree.leaves(a.get_state()), jax.tree.leaves(b.get_state()), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture
def checkpointer(tmp_path):
    with nnx.Checkpointer(tmp_path / "run", save_every=1, keep_last=None) as made:
        yield made


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"keep_last": 2}, (8, 9)),
        ({"keep_last": 1, "keep_every": 4}, (0, 4, 8, 9)),
        ({"keep_last": 1, "keep_best": 2}, (3, 6, 9)),
        ({"keep_last": 1, "keep_best": 1, "best_mode": "max"}, (5, 9)),
        ({"keep_last": 2, "keep_best": 1, "keep_every": 7}, (0, 6, 7, 8, 9)),
    ],
)
def test_policies_add_up(tmp_path, options, kept):
    losses = [5.0, 4.0, float("nan"), 1.0, 3.0, 8.0, 0.5, float("-inf"), 7.0, 6.0]
    with nnx.Checkpointer(tmp_path, save_every=1, **options) as checkpointer:
        for step, loss in enumerate(losses):
            checkpointer.save(step, {"x": jnp.float32(step)}, metrics={"loss": jnp.float32(loss), "other": 0})
        checkpointer.wait()
        assert checkpointer.steps == kept
        if "keep_best" in options:
            assert checkpointer.best_step == (5 if options.get("best_mode") == "max" else 6)
            assert checkpointer.restore(checkpointer.best_step, like={"x": jnp.zeros(())}).metrics["other"] == 0.0
        assert checkpointer.latest_step == 9


def test_the_best_by_name(tmp_path):
    # The first would be the accuracy: a dict that went through jit is sorted.
    metrics = jax.jit(lambda step: {"loss": (step - 2) ** 2, "accuracy": step})
    with nnx.Checkpointer(tmp_path, save_every=1, keep_last=1, keep_best=1, best_metric="loss") as checkpointer:
        for step in range(5):
            checkpointer.save(step, {"x": jnp.ones(())}, metrics=metrics(step))
        assert checkpointer.best_step == 2
        assert checkpointer.steps == (2, 4)
        with pytest.raises(ValueError, match="best_metric is 'loss', and the metrics are 'lost'"):
            checkpointer.save(5, {"x": jnp.ones(())}, metrics={"lost": 1})


def test_there_is_no_best_without_finite_metrics(checkpointer):
    assert checkpointer.best_step is None
    checkpointer.save(0, {"x": jnp.ones(())}, metrics={"loss": float("nan")})
    checkpointer.save(1, {"x": jnp.ones(())})
    assert checkpointer.best_step is None
    with pytest.raises(TypeError, match="the metric 'loss' is a number, got 'low'"):
        checkpointer.save(2, {"x": jnp.ones(())}, metrics={"loss": "low"})


def test_only_a_part(checkpointer):
    saved, model = make(0), make(1)
    before = model.clone()
    checkpointer.save(0, saved)
    report = checkpointer.restore(like=model, only=nnx.PathGlob("encoder/**")).report
    np.testing.assert_array_equal(model.encoder.kernel, saved.encoder.kernel)
    np.testing.assert_array_equal(model.head.kernel, before.head.kernel)
    assert set(report.loaded) == {"encoder/bias", "encoder/kernel"}
    assert "head/kernel" in report.kept
    # From a checkpoint of more than the model.
    checkpointer.save(1, {"model": saved, "optimizer": nnx.Optimizer(saved, optax.adam(1e-3))})
    checkpointer.restore(like={"model": model}, only=nnx.Param)
    np.testing.assert_array_equal(model.head.kernel, saved.head.kernel)


def test_only_a_part_of_an_optimizers_state(checkpointer):
    """Whose keys are paths: `opt_state/0/mu/encoder/kernel`."""
    tx = optax.adam(1e-3)
    state = nnx.TrainState.from_module(make(0), tx)
    moved = state.apply_gradients(state.params)
    checkpointer.save(0, {"run": moved, "a": jnp.ones(1), "a/b": jnp.ones(2)})
    like = {"run": state, "a": jnp.zeros(1), "a/b": jnp.zeros(2)}
    restored = checkpointer.restore(like=like, only=nnx.PathGlob("**/mu/encoder/*")).value["run"]
    np.testing.assert_array_equal(restored.opt_state[0].mu["encoder/kernel"], moved.opt_state[0].mu["encoder/kernel"])
    assert not restored.opt_state[0].nu["encoder/kernel"].any()
    np.testing.assert_array_equal(restored.params["encoder/kernel"].value, state.params["encoder/kernel"].value)


def test_renames(checkpointer):
    class Renamed(nnx.Module):
        def __init__(self, *, ctx):
            self.body = nnx.Linear(3, 4, ctx=ctx)
            self.norm = nnx.BatchNorm(4, ctx=ctx)
            self.out = nnx.Linear(4, 2, ctx=ctx)

    saved, model = make(0), Renamed(ctx=nnx.context(1))
    checkpointer.save(0, saved)
    report = checkpointer.restore(like=model, rename={"encoder/**": "body/**", "head/*": "out/*"}).report
    np.testing.assert_array_equal(model.body.kernel, saved.encoder.kernel)
    np.testing.assert_array_equal(model.out.bias, saved.head.bias)
    assert report.renamed["encoder/kernel"] == "body/kernel"
    with pytest.raises(nnx.StructureError, match=r"no path of the checkpoint matches 'encodr/\*\*'"):
        checkpointer.restore(like=model, rename={"encodr/**": "body/**"})
    with pytest.raises(nnx.StructureError, match="two saved leaves become `head/bias`"):
        checkpointer.restore(like=saved, rename={"encoder/**": "head/**"})


def test_partial(checkpointer):
    saved, model = make(0), make(1)
    model.extra = nnx.Linear(2, 2, ctx=nnx.context(2))
    del saved.norm
    checkpointer.save(0, {"model": saved, "more": jnp.ones(2)})
    with pytest.raises(nnx.StructureError, match=r"missing in the checkpoint: `model/extra/bias`"):
        checkpointer.restore(like={"model": model})
    extra = model.extra.kernel
    report = checkpointer.restore(like={"model": model}, partial=True).report
    np.testing.assert_array_equal(model.head.kernel, saved.head.kernel)
    np.testing.assert_array_equal(model.extra.kernel, extra)
    assert report.unexpected == ("more",)
    assert {"model/extra/kernel", "model/norm/mean"} <= set(report.missing)
    abstract = nnx.eval_shape(lambda: make(0))
    with pytest.raises(nnx.StructureError, match="is abstract in `like` and not restored"):
        checkpointer.restore(like={"model": abstract}, partial=True)


def test_casts(checkpointer):
    saved = make(0)
    checkpointer.save(0, saved)
    model = make(1, dtype=jnp.bfloat16)
    with pytest.raises(nnx.StructureError, match=r"`encoder/kernel` is saved as float32.*cast=True converts it"):
        checkpointer.restore(like=model)
    report = checkpointer.restore(like=model, cast=True).report
    np.testing.assert_array_equal(model.encoder.kernel, saved.encoder.kernel.astype(jnp.bfloat16))
    assert report.cast["encoder/kernel"] == ("float32", "bfloat16")
    checkpointer.save(1, {"x": jnp.ones(2)})
    with pytest.raises(nnx.StructureError, match="no cast keeps what it means"):
        checkpointer.restore(like={"x": jnp.ones(2, jnp.int32)}, cast=True)


def test_a_report_before_anything_is_read(checkpointer):
    saved = make(0)
    checkpointer.save(0, saved, metrics={"loss": 1.5}, extra={"note": "x"})
    model = make(1)
    report = checkpointer.check(like=model)
    assert report.fits
    assert report.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(saved.get_state()))
    wrong = nnx.Linear(3, 4, ctx=nnx.context(0))
    report = checkpointer.check(like={"encoder": wrong, "new": jnp.ones(1)})
    assert not report.fits
    assert report.missing == ("new",)
    assert "unexpected: " in str(report)
    manifest = checkpointer.inspect()
    assert (manifest.step, manifest.metrics, manifest.extra) == (0, {"loss": 1.5}, {"note": "x"})
    assert manifest.items["state"]["encoder/kernel"].spec.shape == (3, 4)
    assert manifest.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(saved.get_state()))


class Numbers:
    """A data iterator."""

    def __init__(self, encoding=dict):
        self.at = 0
        self.encoding = encoding

    def __next__(self):
        self.at += 1
        return self.at

    def get_state(self):
        return str(self.at).encode() if self.encoding is bytes else {"at": self.at}

    def set_state(self, state):
        self.at = int(state) if self.encoding is bytes else state["at"]


@pytest.mark.parametrize("encoding", [dict, bytes])
def test_the_position_of_a_data_iterator(checkpointer, encoding):
    data, other = Numbers(encoding), Numbers(encoding)
    for _ in range(5):
        next(data)
    checkpointer.save(0, {"x": jnp.ones(1)}, data_iter=data)
    next(data)
    checkpointer.restore(like={"x": jnp.ones(1)}, data_iter=other)
    assert next(other) == 6
    checkpointer.save(1, {"x": jnp.ones(1)})
    with pytest.raises(nnx.StructureError, match="has no position of a data iterator"):
        checkpointer.restore(like={"x": jnp.ones(1)}, data_iter=other)
    with pytest.raises(TypeError, match="a list_iterator has no `get_state`"):
        checkpointer.save(2, {"x": jnp.ones(1)}, data_iter=iter([1]))
    data.get_state = object
    with pytest.raises(TypeError, match="must be bytes or what JSON can hold"):
        checkpointer.save(2, {"x": jnp.ones(1)}, data_iter=data)


def test_small_and_large_leaves_and_names(checkpointer):
    value = {
        "packed": jnp.arange(3),
        "leaf:packed": jnp.arange(4.0),
        "large": jnp.arange(100_000),
        "half": jnp.ones(7, jnp.bfloat16),
        "empty": jnp.zeros((0, 3)),
        "keys": jax.random.split(jax.random.key(1), 3),
        "flags": np.array([True, False]),
        "order": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
    }
    checkpointer.save(0, value)
    like = jax.tree.map(lambda leaf: leaf * 0 if leaf.dtype != bool else leaf, {**value, "keys": value["order"] * 0})
    like["keys"] = jax.random.split(jax.random.key(0), 3)
    for verify in (True, False):
        restored = checkpointer.restore(like=like, verify=verify).value
        for name, leaf in value.items():
            got, expected = (jax.random.key_data(x) if name == "keys" else x for x in (restored[name], leaf))
            np.testing.assert_array_equal(got, expected)
            assert restored[name].dtype == leaf.dtype
