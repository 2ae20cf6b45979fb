"""ArrayLoader: every example once an epoch, orders that never change, and an exact way back to any batch."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nnx


def data(size=10):
    return {"x": np.arange(2.0 * size).reshape(size, 2), "y": np.arange(size, dtype=np.int16)}


def rows(loader, count=None):
    batches = loader if count is None else (next(loader) for _ in range(count))
    return [batch["y"].tolist() for batch in batches]


def flatten(batches):
    return [row for batch in batches for row in batch]


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_has_every_example_once(shuffle):
    loader = nnx.ArrayLoader(data(), 3, shuffle=shuffle, drop_last=False, epochs=2)
    assert loader.batches_per_epoch == 4
    first, second = rows(loader.one_epoch()), rows(loader.one_epoch())
    assert [len(batch) for batch in first] == [3, 3, 3, 1]
    assert sorted(flatten(first)) == sorted(flatten(second)) == list(range(10))
    assert (first != second) == shuffle
    assert rows(loader.one_epoch()) == rows(loader) == []
    loader.reset()
    assert rows(loader) == first + second


def test_batches_are_pytrees_like_the_arrays_and_keep_dtypes():
    batch = next(nnx.ArrayLoader({"a": (np.ones((4, 2), np.float16), jnp.arange(4)), "b": [np.arange(4)]}, 2))
    assert jax.tree.structure(batch) == jax.tree.structure({"a": (0, 0), "b": [0]})
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(batch))
    assert batch["a"][0].dtype == np.float16
    np.testing.assert_array_equal(batch["a"][1], batch["b"][0])


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_batch_can_be_edited(shuffle):
    source = data()
    for batch in nnx.ArrayLoader(source, 5, shuffle=shuffle, epochs=1):
        batch["x"][:] = -1
    np.testing.assert_array_equal(source["x"], data()["x"])


def test_the_last_smaller_batch_is_left_out_by_default():
    loader = nnx.ArrayLoader(data(), 4, epochs=1)
    assert [len(batch) for batch in rows(loader)] == [4, 4]
    assert loader.epoch == 1


def test_the_order_is_written_in_stone():
    # Were it to change, runs could no longer be resumed by a newer version.
    loader = nnx.ArrayLoader(data(), 10, seed=7)
    assert rows(loader, 3) == [
        [8, 4, 3, 6, 2, 1, 0, 5, 9, 7],
        [7, 9, 6, 1, 4, 8, 3, 2, 5, 0],
        [0, 3, 5, 1, 8, 4, 9, 2, 6, 7],
    ]


def test_the_seed_decides_and_nothing_else():
    first, again, other = (rows(nnx.ArrayLoader(data(50), 50, seed=seed), 2) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    np.random.seed(1)  # noqa: NPY002 - what a user's global seed must not touch
    assert rows(nnx.ArrayLoader(data(50), 50), 2) == first


def test_orders_are_uniform():
    loader = nnx.ArrayLoader(data(4), 4)
    counts = np.zeros((4, 4))
    for order in rows(loader, 2000):
        counts[np.arange(4), order] += 1
    # 500 expected in each cell, with a standard deviation of 19.
    assert np.abs(counts - 500).max() < 90


@given(
    size=st.integers(1, 12),
    batch_size=st.integers(1, 5),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
    taken=st.integers(0, 20),
    seed=st.integers(0, 2**70),
)
def test_resumed_at_any_batch_it_gives_the_same_rest(size, batch_size, shuffle, drop_last, taken, seed):
    if drop_last and batch_size > size:
        return
    options = {"seed": seed, "shuffle": shuffle, "drop_last": drop_last}
    loader = nnx.ArrayLoader(data(size), batch_size, **options)
    rows(loader, taken)
    state = json.loads(json.dumps(loader.get_state()))
    rest = rows(loader, 9)
    resumed = nnx.ArrayLoader(data(size), batch_size, **options)
    resumed.set_state(state)
    assert resumed.get_state() == state
    assert rows(resumed, 9) == rest
    loader.set_state(state)
    assert rows(loader, 9) == rest


def test_another_batch_size_goes_on_at_the_same_example():
    loader = nnx.ArrayLoader(data(), 2)
    order = flatten(rows(nnx.ArrayLoader(data(), 10), 1))
    rows(loader, 2)
    other = nnx.ArrayLoader(data(), 3, drop_last=False, epochs=1)
    other.set_state(loader.get_state())
    assert rows(other) == [order[4:7], order[7:]]
    # Of the two examples left no batch of 4 can be made.
    rows(loader, 2)
    larger = nnx.ArrayLoader(data(), 4)
    larger.set_state(loader.get_state())
    assert larger.epoch == 1


def test_a_finished_loader_stays_finished():
    loader = nnx.ArrayLoader(data(), 5, epochs=1)
    rows(loader)
    resumed = nnx.ArrayLoader(data(), 5, epochs=1)
    resumed.set_state(loader.get_state())
    assert rows(resumed) == []
    longer = nnx.ArrayLoader(data(), 5, epochs=2)
    longer.set_state(loader.get_state())
    assert len(rows(longer)) == 2


def test_training_resumed_in_an_epoch_is_training_that_never_stopped():
    tx = optax.sgd(0.01)
    step = nnx.jit(
        lambda model, optimizer, batch: optimizer.update(
            model, nnx.grad(lambda model: ((model(batch["x"])[:, 0] - batch["y"]) ** 2).mean())(model)
        )
    )

    def start():
        model = nnx.Linear(2, 1, ctx=nnx.context(0))
        return model, nnx.Optimizer(model, tx), nnx.ArrayLoader(data(), 4)

    model, optimizer, loader = start()
    saved = None
    for number in range(7):
        if number == 3:
            saved = model.get_state(), optimizer.get_state(), loader.get_state()
        step(model, optimizer, next(loader))
    other, other_optimizer, other_loader = start()
    for target, state in ((other, saved[0]), (other_optimizer, saved[1])):
        target.update_state(state)
    other_loader.set_state(saved[2])
    for _ in range(4):
        step(other, other_optimizer, next(other_loader))
    np.testing.assert_array_equal(other.kernel, model.kernel)


def test_what_does_not_fit_is_refused():
    with pytest.raises(nnx.ShapeError, match=r"different numbers of examples: \['x'\] 3, \['y'\] 4"):
        nnx.ArrayLoader({"x": np.ones(3), "y": np.ones(4)}, 1)
    with pytest.raises(nnx.ShapeError, match="there are no arrays"):
        nnx.ArrayLoader({}, 1)
    with pytest.raises(nnx.ShapeError, match=r"\['y'\] has no axis of examples"):
        nnx.ArrayLoader({"x": np.ones(3), "y": 1.0}, 1)
    with pytest.raises(ValueError, match="10 examples make no batch of 11; .*or drop_last=False"):
        nnx.ArrayLoader(data(), 11)
    with pytest.raises(ValueError, match="0 examples make no batch of 1"):
        nnx.ArrayLoader(data(0), 1, drop_last=False)
    for name, value in (("batch_size", 0), ("seed", -1), ("epochs", 0)):
        with pytest.raises(ValueError, match=f"{name} is at least"):
            nnx.ArrayLoader(data(), **{"batch_size": 2, name: value})
    loader = nnx.ArrayLoader(data(), 2)
    rows(loader, 2)
    state = loader.get_state()
    with pytest.raises(nnx.StructureError, match="of another loader: size 9, here 10; seed 3, here 0"):
        loader.set_state({**state, "size": 9, "seed": 3})
    with pytest.raises(nnx.StructureError, match=r"takes what get_state gave, .*got \['epoch'\]"):
        loader.set_state({"epoch": 1})
    with pytest.raises(nnx.StructureError, match="got bytes"):
        loader.set_state(b"")
    with pytest.raises(nnx.StructureError, match="no example 10 of 10 in epoch 0: the state is damaged"):
        loader.set_state({**state, "position": 10})
    assert loader.get_state() == state
    assert repr(loader) == "ArrayLoader(10 examples, batch_size=2, epoch 0, at example 4)"
