"""A checksum that is the sum of those of the parts, however an array is split."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnx.train._additive import MODULUS, partial_sum, whole_sum

DTYPES = ["bool", "uint8", "int16", "bfloat16", "float32", "int64", "complex64", "complex128"]


def bits(rng, shape, dtype):
    """Random bits as an array of a dtype."""
    if dtype == "bool":
        return np.asarray(rng.integers(0, 2, shape), bool)
    dtype = jnp.dtype(dtype)
    return np.frombuffer(rng.bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape)


def parts(array, cuts):
    """The parts of an array that is cut at one index of each axis, with where they begin."""
    found = [(array, ())]
    for axis, cut in enumerate(cuts):
        found = [
            (half, (*start, begin))
            for part, start in found
            for half, begin in zip(np.split(part, [cut], axis=axis), (0, cut), strict=True)
        ]
    return found


@given(st.data(), st.sampled_from(DTYPES), st.lists(st.integers(1, 7), max_size=4), st.integers(0, 1 << 30))
def test_parts_add_up_to_the_whole(data, dtype, shape, seed):
    array = bits(np.random.default_rng(seed), shape, dtype)
    cuts = [data.draw(st.integers(0, size)) for size in shape]
    assert sum(partial_sum(part, start) for part, start in parts(array, cuts)) % MODULUS == whole_sum(array)


@given(st.sampled_from(DTYPES[1:]), st.integers(1, 6), st.integers(1, 6), st.integers(0, 1 << 30))
def test_a_changed_bit_changes_the_sum(dtype, rows, columns, seed):
    rng = np.random.default_rng(seed)
    array = bits(rng, (rows, columns), dtype)
    changed = bytearray(array.tobytes())
    changed[rng.integers(len(changed))] ^= 1 << int(rng.integers(8))
    assert whole_sum(np.frombuffer(changed, array.dtype).reshape(array.shape)) != whole_sum(array)


@pytest.mark.parametrize("shape", [(200_000,), (3, 70_000), (70_000, 3)])
def test_long_axes_are_summed_in_pieces(shape, rng):
    array = rng.normal(size=shape).astype(np.float32)
    cuts = [size // 3 for size in shape]
    assert sum(partial_sum(part, start) for part, start in parts(array, cuts)) % MODULUS == whole_sum(array)


def test_what_has_moved_has_another_sum(rng):
    array = rng.normal(size=(40, 30))
    sums = {
        whole_sum(changed)
        for changed in (array, array[::-1], array[:, ::-1], np.roll(array, 1, axis=1), array * 0, array.reshape(30, 40))
    }
    assert len(sums) == 6
    # Two sign bits at the top of 64: weights are odd, and their sum even.
    signs = array.copy()
    signs[3, 4] *= -1
    signs[5, 6] *= -1
    assert whole_sum(signs) not in sums
    assert whole_sum(np.zeros((0, 3))) == 0
    assert whole_sum(np.float32(1.5)) != whole_sum(np.float32(-1.5))
