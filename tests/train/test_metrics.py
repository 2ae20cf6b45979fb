"""Metrics: what they compute, that long runs cost them no digits, and that parts joined are the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nnx
from nnx.train import _sums as sums


@pytest.fixture
def batches(rng):
    """Logits of 5 classes, labels and a mask, in four batches of different sizes."""
    sizes = (7, 4, 9, 1)
    return [
        {
            "logits": rng.normal(size=(n, 5)).astype(np.float32),
            "labels": rng.integers(0, 5, n),
            "mask": rng.random(n) < 0.7,
            "loss": rng.normal(size=n).astype(np.float32),
        }
        for n in sizes
    ]


def joined(batches, name):
    return np.concatenate([batch[name] for batch in batches])


def all_metrics():
    return nnx.MultiMetric(
        loss=nnx.Average("loss"),
        spread=nnx.Welford("loss"),
        accuracy=nnx.Accuracy(),
        top3=nnx.TopKAccuracy(3),
        f1=nnx.F1(5),
    )


def flat(results):
    return {jax.tree_util.keystr(path): float(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(results)}


def assert_same(a, b, rtol=2e-6):
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    np.testing.assert_allclose([*a.values()], [*b.values()], rtol=rtol)


def by_hand(batches):
    keep = joined(batches, "mask")
    logits, labels, loss = (joined(batches, name)[keep] for name in ("logits", "labels", "loss"))
    predicted = logits.argmax(-1)
    scores = [
        2 * ((predicted == c) & (labels == c)).sum() / ((predicted == c).sum() + (labels == c).sum())
        for c in {*predicted, *labels}
    ]
    top3 = [label in np.argsort(-row)[:3] for label, row in zip(labels, logits, strict=True)]
    loss = loss.astype(np.float64)
    return {
        "loss": loss.mean(),
        "spread": nnx.Statistics(loss.mean(), loss.std() / np.sqrt(len(loss)), loss.std()),
        "accuracy": (predicted == labels).mean(),
        "top3": np.mean(top3),
        "f1": np.mean(scores),
    }


@pytest.mark.parametrize("wrap", [lambda f: f, nnx.jit], ids=["eager", "jit"])
def test_they_compute_what_numpy_does_over_all_batches(batches, wrap):
    metrics = all_metrics()

    @wrap
    def step(metrics, batch):
        metrics.update(**batch)

    for batch in batches:
        step(metrics, batch)
    assert_same(metrics.compute(), by_hand(batches))
    assert_same(nnx.jit(lambda metrics: metrics.compute())(metrics), by_hand(batches))
    metrics.reset()
    assert all(np.isnan(value) for value in flat(metrics.compute()).values())
    step(metrics, batches[0])
    assert_same(metrics.compute(), by_hand(batches[:1]) | {"f1": metrics.f1.compute()})


def test_a_step_with_metrics_compiles_once(batches):
    @nnx.testing.counted
    def step(metrics, batch):
        metrics.update(**batch)
        return metrics.compute()

    jitted, metrics = nnx.jit(step), all_metrics()
    with nnx.testing.assert_traces(step, 1):
        for _ in range(3):
            jitted(metrics, batches[0])
            metrics.reset()
        jitted(metrics.fresh(), batches[0])


@pytest.mark.parametrize("kind", ["Average", "Welford", "Accuracy", "TopKAccuracy", "F1"])
def test_integer_weights_are_repetitions(batches, kind):
    metrics = [
        {"Average": nnx.Average, "Welford": nnx.Welford}[kind]("loss")
        if kind in ("Average", "Welford")
        else {"Accuracy": nnx.Accuracy, "TopKAccuracy": lambda: nnx.TopKAccuracy(2), "F1": lambda: nnx.F1(5)}[kind]()
        for _ in range(2)
    ]
    batch = batches[2]
    weights = np.arange(9) % 3
    metrics[0].update(**{**batch, "mask": None}, weights=weights)
    metrics[1].update(**{name: np.repeat(value, weights, axis=0) for name, value in batch.items() if name != "mask"})
    assert_same(metrics[0].compute(), metrics[1].compute())
    metrics[0].reset()
    metrics[0].update(**batch, weights=np.ones(9, np.float32))
    metrics[1].reset()
    metrics[1].update(**batch)
    assert_same(metrics[0].compute(), metrics[1].compute())


@pytest.mark.parametrize("cut", [0, 1, 2, 4])
def test_parts_merged_are_the_whole(batches, cut):
    parts = [all_metrics(), all_metrics()]
    for number, batch in enumerate(batches):
        parts[number >= cut].update(**batch)
    before = flat(parts[1].compute())
    parts[0].merge(parts[1])
    assert_same(parts[0].compute(), by_hand(batches))
    np.testing.assert_array_equal([*before.values()], [*flat(parts[1].compute()).values()])


def test_reduced_over_a_mapped_axis_they_are_the_whole(rng):
    logits = rng.normal(size=(4, 6, 5)).astype(np.float32)
    batch = {
        "logits": logits,
        "labels": rng.integers(0, 5, (4, 6)),
        "loss": (1e4 + rng.normal(size=(4, 6))).astype(np.float32),
        "mask": np.arange(24).reshape(4, 6) % 4 > 0,
    }
    batch["mask"][2] = False
    metrics, whole = all_metrics(), all_metrics()

    @nnx.jit
    @nnx.vmap(in_axes=(None, 0), axis_name="lanes")
    def step(metrics, batch):
        part = metrics.fresh()
        part.update(**batch)
        part.reduce("lanes")
        metrics.merge(part)

    for _ in range(2):
        step(metrics, batch)
        whole.update(**{name: value.reshape(24, *value.shape[2:]) for name, value in batch.items()})
    assert_same(metrics.compute(), whole.compute())
    loss = batch["loss"].astype(np.float64)[batch["mask"]]
    assert_same(metrics.spread.compute(), nnx.Statistics(loss.mean(), loss.std() / np.sqrt(2 * loss.size), loss.std()))


def test_a_lane_that_forgets_to_reduce_is_told(rng):
    metrics = nnx.Average()
    update = nnx.vmap(lambda metrics, x: metrics.update(values=x), in_axes=(None, 0))
    with pytest.raises(nnx.VariableError, match="shared `total`.* got values that differ"):
        update(metrics, jnp.ones(3))


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_sums_stay_exact_past_float32(wrap):
    # float32 counts no further than 2^24; 2^26 is reached here in odd steps.
    step = wrap(lambda total, n: sums.add_count(sums.add(total, 3.0), n))
    total, exact = sums.zeros(), 0
    for number in range(40):
        n = (1 << 21) + 2 * number + 1
        total, exact = step(total, jnp.int32(n)), exact + n + 3
    high, low = np.asarray(total, np.float64)
    assert high + low == exact
    total = sums.join(total, total)
    assert np.asarray(total, np.float64).sum() == 2 * exact
    assert np.asarray(sums.add_count(sums.zeros(), 2**31 - 1), np.float64).sum() == 2**31 - 1
    assert np.asarray(sums.add_count(sums.zeros(), 10**12 + 7), np.float64).sum() == 10**12 + 7


def test_a_million_small_losses_do_not_stall():
    def body(_, state):
        total, count, plain = state
        return sums.add(total, 0.1), sums.add_count(count, 1), plain + 0.1

    start = (jnp.stack([jnp.float32(2**20), jnp.float32(0)]), sums.zeros(), jnp.float32(2**20))
    total, count, plain = jax.lax.fori_loop(0, 10**6, body, start)
    exact = 2**20 + 10**6 * np.float64(np.float32(0.1))
    assert abs(np.asarray(total, np.float64).sum() - exact) < 1e-3
    assert abs(float(plain) - exact) > 1e3
    assert float(sums.to_float(count)) == 10**6


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_shows(value):
    metric = nnx.Average()
    metric.update(values=jnp.array([1.0, value]))
    metric.update(values=2.0)
    np.testing.assert_array_equal(metric.compute(), np.float32(value))


def test_nan_under_a_mask_or_a_zero_weight_does_not_count():
    values, mask = jnp.array([1.0, np.nan, 3.0]), jnp.array([True, False, True])
    for metric in (nnx.Average(), nnx.Welford()):
        metric.update(values=values, mask=mask)
        metric.update(values=values, weights=jnp.array([1.0, 0.0, 1.0]))
        assert float(jax.tree.leaves(metric.compute())[0]) == 2.0


def test_welford_far_from_zero(rng):
    values = (1e6 + rng.normal(size=(200, 50))).astype(np.float32)
    metric = nnx.Welford()
    update = nnx.jit(lambda metric, x: metric.update(values=x))
    for batch in values:
        update(metric, batch)
    exact = values.astype(np.float64)
    assert abs(float(metric.compute().mean) - exact.mean()) < 0.04
    np.testing.assert_allclose(metric.compute().standard_deviation, exact.std(), rtol=1e-5)
    np.testing.assert_allclose(metric.compute().standard_error_of_mean, exact.std() / 100, rtol=1e-5)


def test_binary_counts(rng):
    logits, labels = rng.normal(size=(3, 50)).astype(np.float32), rng.integers(0, 2, (3, 50))
    mask = rng.random((3, 50)) < 0.8
    metrics = nnx.MultiMetric(
        precision=nnx.BinaryPrecision(0.3),
        recall=nnx.BinaryRecall(0.3),
        f1=nnx.F1(threshold=0.3),
        accuracy=nnx.Accuracy(threshold=0.3),
    )
    for i in range(3):
        metrics.update(logits=logits[i], labels=labels[i], mask=mask[i])
    predicted, actual = (logits > 0.3)[mask], labels[mask] == 1
    hits = (predicted & actual).sum()
    precision, recall = hits / predicted.sum(), hits / actual.sum()
    wanted = {
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall),
        "accuracy": (predicted == actual).mean(),
    }
    assert_same(metrics.compute(), wanted)


def test_what_is_undefined():
    precision, recall = nnx.BinaryPrecision(), nnx.BinaryRecall()
    for metric in (precision, recall):
        assert np.isnan(metric.compute())
        metric.update(logits=jnp.array([-1.0, -2.0]), labels=jnp.array([0, 0]))
        assert float(metric.compute()) == 0.0
    f1 = nnx.F1(4, average=None)
    f1.update(logits=jnp.eye(4)[:2], labels=jnp.array([0, 2]))
    np.testing.assert_allclose(f1.compute(), [1.0, 0.0, 0.0, 0.0])
    macro = nnx.F1(4)
    macro.update(logits=jnp.eye(4)[:2], labels=jnp.array([0, 2]))
    np.testing.assert_allclose(macro.compute(), 1 / 3)


def test_a_constant_model_is_not_always_among_the_best():
    metric = nnx.TopKAccuracy(2)
    metric.update(logits=jnp.zeros((10, 5)), labels=jnp.arange(10) % 5)
    np.testing.assert_allclose(metric.compute(), 0.4)


def test_sequences_and_half_precision(rng):
    logits = rng.normal(size=(2, 3, 4)).astype(np.float32)
    labels, mask = rng.integers(0, 4, (2, 3)), np.array([True, False])
    for metric in (nnx.Accuracy(), nnx.TopKAccuracy(1)):
        metric.update(logits=jnp.asarray(logits, jnp.bfloat16), labels=labels, mask=mask)
        np.testing.assert_allclose(metric.compute(), (logits[0].argmax(-1) == labels[0]).mean())
    metric = nnx.Average()
    metric.update(values=jnp.full(1000, 0.1, jnp.bfloat16))
    assert metric.compute().dtype == jnp.float32
    np.testing.assert_allclose(metric.compute(), np.float32(jnp.bfloat16(0.1)), rtol=1e-6)


def test_they_ride_in_a_train_state_and_a_gradient(rng):
    model = nnx.Linear(3, 2, ctx=nnx.context(0))
    params, moduledef = model.partition(nnx.Param)
    metrics = nnx.MultiMetric(loss=nnx.Average("loss"))
    state = nnx.TrainState(moduledef, params=params, tx=optax.sgd(0.1), metrics=metrics.partition())
    x = rng.normal(size=(4, 3)).astype(np.float32)

    @jax.jit
    def step(state):
        loss, grads = jax.value_and_grad(lambda params: (state.apply(params)(x)[0] ** 2).mean())(state.params)
        metrics = state.metrics.merge()
        metrics.update(loss=loss)
        return state.apply_gradients(grads, metrics=metrics.partition()), loss

    losses = []
    for _ in range(3):
        state, loss = step(state)
        losses.append(float(loss))
    np.testing.assert_allclose(state.metrics.merge().compute()["loss"], np.mean(losses), rtol=1e-6)
    assert state.merge().get_module_def() == model.get_module_def()

    def loss_fn(model, metrics):
        out = (model(x) ** 2).mean()
        metrics.update(loss=out)
        return out

    nnx.jit(nnx.grad(loss_fn))(model, metrics)
    np.testing.assert_allclose(metrics.compute()["loss"], losses[0], rtol=1e-6)


def test_their_counts_are_a_collection_of_their_own():
    metrics = all_metrics()
    assert metrics.filter(nnx.MetricState).paths == metrics.get_state().paths == metrics.filter("metrics").paths
    assert not metrics.filter(nnx.Param)


def test_what_does_not_fit_is_refused(batches):
    average, accuracy = nnx.Average("loss"), nnx.Accuracy()
    with pytest.raises(TypeError, match=r"Average.update takes the values as `loss`, got `values`"):
        average.update(values=1.0)
    with pytest.raises(nnx.ShapeError, match=r"`loss` has the shape \(\), and `mask` \(3,\).*values of each example"):
        average.update(loss=1.0, mask=jnp.ones(3, bool))
    with pytest.raises(TypeError, match="a mask is an array of booleans, got float32"):
        average.update(loss=jnp.ones(3), mask=jnp.ones(3))
    with pytest.raises(TypeError, match="expected real numbers, got complex64"):
        average.update(loss=1j)
    with pytest.raises(ValueError, match="argname='mask' is the name of another argument"):
        nnx.Average("mask")
    with pytest.raises(nnx.ShapeError, match=r"logits \[..., classes\].* got \(3, 2\) and \(3, 2\)"):
        accuracy.update(logits=jnp.ones((3, 2)), labels=jnp.ones((3, 2), int))
    with pytest.raises(nnx.ShapeError, match=r"of one shape, got \(3, 2\) and \(3,\)"):
        nnx.BinaryRecall().update(logits=jnp.ones((3, 2)), labels=jnp.ones(3, int))
    with pytest.raises(TypeError, match=r"labels are integers, got float32; .*argmax"):
        accuracy.update(logits=jnp.ones((3, 2)), labels=jnp.ones(3))
    with pytest.raises(nnx.ShapeError, match="k=5 of 2 classes"):
        nnx.TopKAccuracy().update(logits=jnp.ones((3, 2)), labels=jnp.ones(3, int))
    with pytest.raises(nnx.ShapeError, match="expected logits of 4 classes"):
        nnx.F1(4).update(logits=jnp.ones((3, 2)), labels=jnp.ones(3, int))
    with pytest.raises(ValueError, match="k counts classes from 1 up"):
        nnx.TopKAccuracy(0)
    with pytest.raises(ValueError, match="num_classes counts from 2 up"):
        nnx.F1(1)
    with pytest.raises(ValueError, match="average is 'macro' or None, got 'micro'"):
        nnx.F1(3, average="micro")
    with pytest.raises(nnx.StructureError, match="takes another one, got Accuracy"):
        average.merge(accuracy)
    with pytest.raises(nnx.StructureError, match="the two have other settings"):
        nnx.TopKAccuracy(2).merge(nnx.TopKAccuracy(3))
    with pytest.raises(TypeError, match="takes metrics by name"):
        nnx.MultiMetric()
    with pytest.raises(TypeError, match="`loss` is a float, not a metric"):
        nnx.MultiMetric(loss=1.0)
    with pytest.raises(ValueError, match="`update` is a name of its own"):
        nnx.MultiMetric(update=nnx.Accuracy())
    with pytest.raises(NotImplementedError, match="Metric is a metric without `update`"):
        nnx.Metric().update()
