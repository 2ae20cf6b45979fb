"""Data iterators of grain: their positions are saved, and an interrupted run sees what another one sees."""

import grain
import jax.numpy as jnp
import numpy as np
import pytest

import nnx


def dataset():
    return grain.MapDataset.source(np.arange(48)).shuffle(seed=1).repeat(3).batch(4)


def of_a_dataset():
    return iter(dataset().to_iter_dataset())


def with_random_transforms():
    noisy = dataset().seed(5).random_map(lambda x, rng: x + rng.integers(0, 1000, x.shape))
    return iter(noisy.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))


def of_a_window_shuffle():
    numbers = grain.MapDataset.source(np.arange(48)).repeat(3).to_iter_dataset()
    return iter(grain.experimental.WindowShuffleIterDataset(numbers, window_size=6, seed=2).batch(4))


def of_a_loader():
    sampler = grain.samplers.IndexSampler(48, shuffle=True, seed=3, num_epochs=3)
    loader = grain.DataLoader(
        data_source=list(range(48)), sampler=sampler, operations=[grain.transforms.Batch(4)], worker_count=0
    )
    return iter(loader)


ITERATORS = [of_a_dataset, with_random_transforms, of_a_window_shuffle, of_a_loader]


@pytest.mark.parametrize("make", ITERATORS, ids=lambda make: make.__name__)
def test_its_position_is_saved(make, tmp_path):
    data = make()
    seen = [next(data) for _ in range(7)]
    with nnx.Checkpointer(tmp_path, save_every=1) as checkpointer:
        checkpointer.save(7, {"x": jnp.ones(1)}, data_iter=data)
        rest = [next(data) for _ in range(8)]
        other = make()
        next(other)
        checkpointer.restore(like={"x": jnp.ones(1)}, data_iter=other)
    for a, b in zip([next(other) for _ in range(8)], rest, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(seen[0], rest[0])


@pytest.mark.parametrize("make", [of_a_dataset, of_a_loader], ids=lambda make: make.__name__)
def test_fit_resumes_it(make, tmp_path):
    def run(folder, steps, seen):
        def step(state, batch):
            seen.append(np.asarray(batch).tolist())
            return {"sum": state + batch.sum()}["sum"], {"loss": 1.0}

        with nnx.Checkpointer(tmp_path / folder, save_every=3) as checkpointer:
            return nnx.fit(step, jnp.zeros((), int), make(), steps=steps, checkpointer=checkpointer, loggers=[]).state

    whole, first, second = [], [], []
    total = run("whole", 11, whole)
    run("cut", 5, first)
    assert run("cut", 11, second) == total
    assert first + second == whole


def test_a_dataset_has_the_position_of_its_iterator(tmp_path):
    data = grain.MapDataset.source(np.arange(6)).batch(2).to_iter_dataset()

    def run(steps, seen):
        def step(state, batch):
            seen.append(int(batch[0]))
            return state, {"loss": 1.0}

        with nnx.Checkpointer(tmp_path, save_every=100) as checkpointer:
            nnx.fit(step, jnp.zeros(()), data, steps=steps, checkpointer=checkpointer, loggers=[])

    first, second = [], []
    run(5, first)
    run(8, second)
    assert first + second == [0, 2, 4, 0, 2, 4, 0, 2]
    with pytest.raises(ValueError, match="an iterator that has come to its end"):
        nnx.fit(lambda state, _: (state, {}), jnp.zeros(()), iter(data), steps=4, loggers=[])
