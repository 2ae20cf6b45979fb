"""Safetensors files: what we write the library of that name reads, the other way round, and nothing damaged is read."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors
import safetensors.numpy

import nnx


def make(seed, dtype=jnp.float32):
    class Net(nnx.Module):
        def __init__(self, *, ctx):
            self.dense = nnx.Linear(3, 4, param_dtype=dtype, ctx=ctx)
            self.norm = nnx.BatchNorm(4, ctx=ctx)

    return Net(ctx=nnx.context(seed))


DTYPES = [
    bool,
    "uint8",
    "int8",
    "uint16",
    "int16",
    "uint32",
    "int32",
    "uint64",
    "int64",
    "float16",
    "float32",
    "float64",
]


def test_the_library_reads_what_we_write(tmp_path, rng):
    arrays = {f"a/{dtype}": rng.integers(0, 2, (3, 2)).astype(dtype) for dtype in DTYPES}
    arrays |= {
        "none": np.zeros((0, 3), np.float32),
        "scalar": np.array(1.5),
        "columns": np.asfortranarray(np.eye(3, 2)),
    }
    nnx.save_safetensors(tmp_path / "x.safetensors", arrays, metadata={"made by": "a test"})
    found = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    assert set(found) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
    with safetensors.safe_open(tmp_path / "x.safetensors", "numpy") as file:
        assert file.metadata()["made by"] == "a test"
    half = {"half": jnp.arange(3, dtype=jnp.bfloat16), "quarter": jnp.ones(5, jnp.float8_e4m3fn)}
    nnx.save_safetensors(tmp_path / "half", half)
    with safetensors.safe_open(tmp_path / "half", "numpy") as file:
        assert {name: file.get_slice(name).get_dtype() for name in half} == {"half": "BF16", "quarter": "F8_E4M3"}
    assert nnx.load_safetensors(tmp_path / "half")["half"].tobytes() == np.asarray(half["half"]).tobytes()


def test_we_read_what_the_library_writes(tmp_path, rng):
    arrays = {f"a.{dtype}": rng.integers(0, 2, (3, 2)).astype(dtype) for dtype in DTYPES}
    arrays["odd"] = np.arange(3, dtype=np.uint8)  # what follows it does not begin at a multiple of its width
    safetensors.numpy.save_file(arrays, tmp_path / "x", metadata={"format": "np"})
    found = nnx.load_safetensors(tmp_path / "x")
    assert set(found) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype


def test_a_whole_run_there_and_back(tmp_path):
    tx = optax.adam(1e-3)

    def parts(seed):
        model = make(seed)
        return {
            "model": model,
            "optimizer": nnx.Optimizer(model, tx),
            "state": nnx.TrainState.from_module(model, tx),
            "key": jax.random.key(seed),
            "number": seed + 0.5,
        }

    saved, like = parts(0), parts(1)
    saved["optimizer"].update(saved["model"], saved["model"].filter(nnx.Param))
    nnx.save_safetensors(tmp_path / "x", saved)
    restored = nnx.load_safetensors(tmp_path / "x", like=like)
    assert restored["model"] is like["model"]
    for name in ("model", "optimizer"):
        for a, b in zip(
            jax.tree.leaves(saved[name].get_state()), jax.tree.leaves(restored[name].get_state()), strict=True
        ):
            np.testing.assert_array_equal(a, b)
    for a, b in zip(jax.tree.leaves(saved["state"]), jax.tree.leaves(restored["state"]), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(*(jax.random.key_data(v["key"]) for v in (saved, restored)))
    assert restored["number"] == 0.5


def test_differences_parts_names_and_types(tmp_path):
    saved, model = make(0), make(1)
    nnx.save_safetensors(tmp_path / "x", saved.filter(nnx.Param))
    before = model.clone()
    with pytest.raises(nnx.StructureError, match=r"missing in the checkpoint: `norm/mean`"):
        nnx.load_safetensors(tmp_path / "x", like=model)
    np.testing.assert_array_equal(model.dense.kernel, before.dense.kernel)
    nnx.load_safetensors(tmp_path / "x", like=model, only=nnx.Param)
    np.testing.assert_array_equal(model.dense.kernel, saved.dense.kernel)
    half = make(2, jnp.bfloat16)
    with pytest.raises(nnx.StructureError, match="cast=True converts it"):
        nnx.load_safetensors(tmp_path / "x", like=half, only=nnx.Param)
    nnx.load_safetensors(tmp_path / "x", like=half, only=nnx.Param, cast=True)
    np.testing.assert_array_equal(half.dense.kernel, saved.dense.kernel.astype(jnp.bfloat16))
    # Another program's file knows of no collections.
    safetensors.numpy.save_file({"body.w": np.ones((3, 4), np.float32), "more": np.ones(1)}, tmp_path / "other")
    nnx.load_safetensors(tmp_path / "other", like=model, rename={"body.w": "dense/kernel"}, partial=True)
    assert (model.dense.kernel == 1).all()
    np.testing.assert_array_equal(model.dense.bias, saved.dense.bias)


def test_what_a_file_cannot_hold(tmp_path):
    with pytest.raises(TypeError, match="`x` is of int4, which a safetensors file does not hold"):
        nnx.save_safetensors(tmp_path / "x", {"x": jnp.ones(2, jnp.int4)})
    with pytest.raises(TypeError, match="`x` is a ShapeDtypeStruct, which has no data"):
        nnx.save_safetensors(tmp_path / "x", {"x": jax.ShapeDtypeStruct((2,), jnp.float32)})
    with pytest.raises(ValueError, match="the name 'nnx' of the metadata is taken"):
        nnx.save_safetensors(tmp_path / "x", {"x": jnp.ones(2)}, metadata={"nnx": "mine"})
    assert list(tmp_path.iterdir()) == []


def file_of(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(start, end, dtype="F32", shape=(1,)):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no safetensors file, or has been cut short"),
        (b"\xff" * 8, "no safetensors file, or has been cut short"),
        (file_of(b"{"), "no safetensors file, or a damaged one"),
        (file_of(b"[]"), "no safetensors file, or a damaged one"),
        (file_of({"x": entry(0, 4)}), "has 69 bytes, and its header speaks of 73"),
        (file_of({"x": entry(0, 8)}, bytes(8)), r"8 bytes for float32\[1\]"),
        (file_of({"x": entry(4, 8)}, bytes(8)), "`x` begins at 4, and what is before it ends at 0"),
        (file_of({"x": entry(0, 4), "y": entry(0, 4)}, bytes(4)), "begins at 0, and what is before it ends at 4"),
        (file_of({"x": entry(0, 4, "F4")}, bytes(4)), "no dtype 'F4' is known"),
        (file_of({"x": entry(0, -4, shape=(-1,))}), "no natural number"),
        (file_of({"x": {"dtype": "F32"}}), "no safetensors file, or a damaged one: 'shape'"),
        (file_of({"x": entry(0, 1, "BOOL")}, b"\x02"), "other bytes than 0 and 1"),
    ],
)
def test_what_is_damaged_is_not_read(tmp_path, content, message):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        nnx.load_safetensors(tmp_path / "x")
