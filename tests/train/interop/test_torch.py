"""State dicts as arrays: names, reports, what is refused. Against torch itself: tests/parity/test_state_dict.py."""

import jax.numpy as jnp
import numpy as np
import pytest

import nnx


class Net(nnx.Module):
    def __init__(self, *, ctx, dtype=jnp.float32):
        self.blocks = [nnx.Linear(3, 3, param_dtype=dtype, ctx=ctx) for _ in range(2)]
        self.norm = nnx.BatchNorm(3, ctx=ctx)
        self.scale = nnx.Param(jnp.ones(3))
        self.embed = nnx.Embed(5, 3, ctx=ctx)
        self.tied = self.embed.get_variable("embedding")


def state_dict(rng):
    def drawn(*shape):
        return rng.normal(size=shape).astype(np.float32)

    return {
        "blocks.0.weight": drawn(3, 3),
        "blocks.0.bias": drawn(3),
        "blocks.1.weight": drawn(3, 3),
        "blocks.1.bias": drawn(3),
        "norm.weight": drawn(3),
        "norm.bias": drawn(3),
        "norm.running_mean": drawn(3),
        "norm.running_var": drawn(3) ** 2,
        "norm.num_batches_tracked": np.array(7),
        "scale": drawn(3),
        "embed.weight": drawn(5, 3),
    }


@pytest.fixture
def model():
    return Net(ctx=nnx.context(0))


def test_every_leaf_from_its_name(model, rng):
    source = state_dict(rng)
    report = nnx.load_torch_state_dict(model, source)
    np.testing.assert_array_equal(model.blocks[1].kernel, source["blocks.1.weight"].T)
    np.testing.assert_array_equal(model.norm.var, source["norm.running_var"])
    np.testing.assert_array_equal(model.scale, source["scale"])
    np.testing.assert_array_equal(model.tied, source["embed.weight"])
    assert report.fits
    assert report.loaded["blocks/1/kernel"] == ("blocks.1.weight",)
    assert report.ignored == ("norm.num_batches_tracked",)
    assert str(report) == "10 loaded, 1 ignored"


def test_all_that_does_not_fit_is_listed_and_nothing_is_changed(model, rng):
    source = state_dict(rng)
    before = model.clone()
    del source["norm.bias"]
    source["head.weight"] = np.ones(2)
    source["blocks.0.weight"] = np.ones((3, 4), np.float32)
    source["blocks.1.weight"] = source["blocks.1.weight"].astype(np.float16)
    with pytest.raises(nnx.StructureError) as error:
        nnx.load_torch_state_dict(model, source)
    assert [line.strip() for line in str(error.value).splitlines()] == [
        "the state dict does not fit the Net: 7 loaded, 1 ignored",
        "missing: `norm/bias`, for which there is no `norm.bias`",
        "unexpected: `head.weight`",
        "mismatched: `blocks/0/kernel`: `blocks.0.weight`: it would be float32[4,3], and the model has float32[3,3]",
        (
            "mismatched: `blocks/1/kernel`: `blocks.1.weight`: it would be float16[3,3], and the model has "
            "float32[3,3]; cast=True converts it"
        ),
    ]
    np.testing.assert_array_equal(model.scale, before.scale)
    report = nnx.load_torch_state_dict(model, source, partial=True, cast=True)
    assert not report.fits
    np.testing.assert_array_equal(model.blocks[1].kernel, source["blocks.1.weight"].T.astype(np.float32))
    np.testing.assert_array_equal(model.blocks[0].kernel, before.blocks[0].kernel)
    np.testing.assert_array_equal(model.scale, source["scale"])


def test_renamed_ignored_and_only_a_part(model, rng):
    source = state_dict(rng)
    other = {name.replace("blocks.", "encoder.layer.").replace("norm", "bn"): array for name, array in source.items()}
    other["pooler.dense.weight"] = np.ones((3, 3))
    nnx.load_torch_state_dict(
        model, other, rename={"encoder.layer.**": "blocks.**", "bn.*": "norm.*"}, ignore=["pooler.**"]
    )
    np.testing.assert_array_equal(model.blocks[0].kernel, source["blocks.0.weight"].T)
    with pytest.raises(nnx.StructureError, match="no path of the checkpoint matches 'nothing/"):
        nnx.load_torch_state_dict(model, other, rename={"nothing.*": "x.*"})
    with pytest.raises(nnx.StructureError, match=r"`blocks\.\d\.weight` and `blocks\.\d\.weight` become one name"):
        nnx.load_torch_state_dict(model, source, rename={"blocks.0.weight": "blocks.1.weight"})
    fresh = Net(ctx=nnx.context(1))
    before = fresh.clone()
    report = nnx.load_torch_state_dict(
        fresh, {"blocks.0.weight": source["blocks.0.weight"]}, only=nnx.PathGlob("blocks/0/kernel")
    )
    assert report.loaded == {"blocks/0/kernel": ("blocks.0.weight",)}
    np.testing.assert_array_equal(fresh.scale, before.scale)


def test_half_precision_files_and_what_is_no_array(model, tmp_path, rng):
    source = state_dict(rng)
    half = Net(ctx=nnx.context(0), dtype=jnp.bfloat16)
    nnx.load_torch_state_dict(half, source, cast=True)
    np.testing.assert_array_equal(half.blocks[0].kernel, source["blocks.0.weight"].T.astype(jnp.bfloat16))
    nnx.save_safetensors(tmp_path / "x.safetensors", source)
    nnx.load_torch_state_dict(model, tmp_path / "x.safetensors")
    np.testing.assert_array_equal(model.blocks[0].kernel, source["blocks.0.weight"].T)
    with pytest.raises(ValueError, match=r"x\.pt is a pickle, which may execute anything, and is not read here"):
        nnx.load_torch_state_dict(model, tmp_path / "x.pt")
    with pytest.raises(TypeError, match="`scale` is a dict, and no array"):
        nnx.load_torch_state_dict(model, {"scale": {}})
