"""States as flax.nnx has them, into models of ours and back; tests/parity compares with flax itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx


class Net(nnx.Module):
    def __init__(self, *, ctx):
        self.layers = [nnx.Linear(2, 3, ctx=ctx), nnx.Linear(3, 1, use_bias=False, ctx=ctx)]
        self.norm = nnx.BatchNorm(3, ctx=ctx)
        self.steps = nnx.var("counts", jnp.int32(3))


def theirs(offset=0.0):
    """Nested as in flax: integers for the items of a list, random streams beside the parameters."""
    return {
        "layers": {
            0: {"kernel": jnp.full((2, 3), 1 + offset), "bias": jnp.full(3, 2 + offset)},
            1: {"kernel": jnp.full((3, 1), 3 + offset)},
        },
        "norm": {name: jnp.full(3, number + offset) for number, name in enumerate(("bias", "mean", "scale", "var"))},
        "dropout": {"rngs": {"key": jax.random.key(0), "count": jnp.uint32(5)}},
    }


@pytest.fixture
def net():
    return Net(ctx=nnx.context(0))


def test_there_and_back(net):
    nnx.load_flax_state(net, theirs())
    np.testing.assert_array_equal(net.layers[1].kernel, np.full((3, 1), 3.0))
    np.testing.assert_array_equal(net.norm.var, np.full(3, 3.0))
    assert net.steps == 3
    back = nnx.to_flax_state(net, theirs(offset=7.0))
    assert jax.tree.structure(back) == jax.tree.structure(theirs())
    back.pop("dropout")
    expected = theirs()
    expected.pop("dropout")
    jax.tree.map(np.testing.assert_array_equal, back, expected)


def test_the_target_may_be_abstract(net):
    target = jax.eval_shape(theirs)
    assert nnx.to_flax_state(net, target)["norm"]["scale"] is net.norm.scale


def test_renamed_and_left_out(net):
    state = theirs()
    state["blocks"] = state.pop("layers")
    state["head"] = jnp.ones(2)
    nnx.load_flax_state(net, state, rename={"blocks/**": "layers/**"}, ignore=["head"])
    assert float(net.layers[0].bias[0]) == 2
    del state["head"]
    back = nnx.to_flax_state(net.get_state(), state, rename={"blocks/**": "layers/**"})
    assert back["blocks"][0]["bias"] is net.layers[0].bias
    with pytest.raises(nnx.StructureError, match="`layers/0/bias` and `layers/1/kernel` become one path, `x`"):
        nnx.load_flax_state(net, theirs(), rename={"layers/0/bias": "x", "layers/1/kernel": "x"})


def test_what_does_not_fit_is_listed_and_nothing_is_written(net):
    state = theirs()
    del state["norm"]["mean"]
    state["extra"] = jnp.ones(2)
    state["layers"][0]["bias"] = jnp.ones(4)
    before = net.norm.scale
    with pytest.raises(nnx.StructureError, match="does not fit the Net") as caught:
        nnx.load_flax_state(net, state)
    lines = [line.strip() for line in str(caught.value).splitlines()[1:]]
    assert lines[0].startswith("mismatched: `layers/0/bias`: it would be ")
    assert lines[1:] == ["missing: `norm/mean`", "unexpected: `extra`"]
    assert net.norm.scale is before
    with pytest.raises(nnx.StructureError, match="the model has no `extra`") as caught:
        nnx.to_flax_state(net, state)
    assert r"`layers/0/bias` is float32[4] in flax, and float32[3] in the model" in str(caught.value)
    with pytest.raises(nnx.StructureError, match="expected a State of flax.nnx or nested dicts, got a Net of ours"):
        nnx.load_flax_state(net, net)


def test_precision_is_converted_when_asked(net):
    state = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, theirs())
    with pytest.raises(nnx.StructureError, match="cast=True converts it"):
        nnx.load_flax_state(net, state)
    nnx.load_flax_state(net, state, cast=True)
    assert net.norm.var.dtype == jnp.float32
    assert float(net.norm.var[0]) == 3
