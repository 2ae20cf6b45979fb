"""The planner: what it says of parameters is exact, and its command prints it for models that nothing could hold."""

import re
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

import nnx
from nnx.train.plan_cli import main

TRANSFORMER = "nnx.examples.transformer_sharded:Transformer"


def make(size=64):
    return nnx.MLP(size, 4 * size, size, ctx=nnx.context(0))


def test_parameters_and_moments_are_split_as_the_rules_say():
    sizes = nnx.sizes_of(make, optax.adam(1e-3))
    kernels, biases = 2 * 64 * 256 * 4, (64 + 256) * 4
    assert sizes.parameters * 4 == kernels + biases
    whole = nnx.plan(sizes, {"data": 8}, nnx.sharding_rules("data_parallel"))
    assert whole.parameters == whole.gradients == kernels + biases
    assert whole.optimizer == 2 * whole.parameters + 8  # and two counts
    assert whole.communication == {"data": 2 * 7 * (kernels + biases) // 8}
    assert whole.gathered == 0

    split = nnx.plan(sizes, {"fsdp": 8}, nnx.sharding_rules("fsdp"))
    # The kernels and the bias of `embed` are split, the bias of `mlp` is not.
    assert split.parameters == (kernels + 64 * 4) // 8 + 256 * 4
    assert split.gathered == 2 * (64 * 256 * 4 + 64 * 4)
    assert split.communication == {"fsdp": 3 * 7 * (kernels + 64 * 4) // 8 + 2 * 7 * 256 * 4 // 8}
    assert split.total == split.state + split.gradients + split.gathered + split.activations

    combined = nnx.plan(sizes, {"data": 2, "fsdp": 2, "tensor": 2}, nnx.sharding_rules("combined"))
    assert combined.parameters == kernels // 4 + 256 * 4 // 2 + 64 * 4 // 2
    assert combined.chips == 8


def test_activations_and_the_sums_of_tensor_parallelism():
    class Net(nnx.Module):
        def __init__(self, *, ctx):
            self.mlp = nnx.MLP(64, 256, 64, activation="tanh", ctx=ctx)

        def __call__(self, x, *, ctx):
            return self.mlp(x)

    inputs = [jax.ShapeDtypeStruct((16, 8, 64), jnp.float32)]
    sizes = nnx.sizes_of(lambda: Net(ctx=nnx.context(0)), inputs=inputs)
    tokens = 16 * 8
    found = nnx.plan(sizes, {"tensor": 4}, {**nnx.sharding_rules("tensor_parallel"), "batch": None})
    # Once forward and once in the gradient, a ring over 4 chips.
    assert found.communication["tensor"] == 2 * 2 * tokens * 64 * 4 * 3 // 4
    alone = nnx.plan(sizes, {"data": 1}, nnx.sharding_rules("data_parallel"))
    halved = nnx.plan(sizes, {"data": 2}, nnx.sharding_rules("data_parallel"))
    assert alone.activations == 2 * halved.activations > 0
    with pytest.raises(nnx.ShardingError, match="128 tokens do not divide over the 3 chips"):
        nnx.plan(sizes, {"data": 3}, nnx.sharding_rules("data_parallel"))


def test_what_does_not_divide_names_the_parameter():
    sizes = nnx.sizes_of(lambda: make(36))
    with pytest.raises(
        nnx.ShardingError, match=r"`layers/0/kernel` has the size 36 .* does not divide over the mesh axis"
    ):
        nnx.plan(sizes, {"fsdp": 8}, nnx.sharding_rules("fsdp"))


def test_meshes_of_recipes():
    assert nnx.recipe_mesh("data_parallel", 8) == {"data": 8}
    assert nnx.recipe_mesh("combined", 65536, fsdp=512) == {"data": 16, "fsdp": 512, "tensor": 8}
    assert nnx.recipe_mesh("tensor_parallel", 64) == {"data": 8, "tensor": 8}
    with pytest.raises(ValueError, match="12 chips do not divide into 8"):
        nnx.recipe_mesh("combined", 12)


def test_the_command_plans_a_model_of_a_trillion_parameters(capsys):
    sizes = '{"embed": 25600, "heads": 160, "mlp": 102400, "layers": 128, "vocabulary": 32768, "remat": true}'
    command = [TRANSFORMER, "--arguments", sizes, "--batch", "8192", "--length", "2048", "--chips", "65536"]
    assert main([*command, "--recipes", "combined,sequence_parallel", "--fsdp", "512"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("1,007,")
    assert "| combined | data=16 fsdp=512 tensor=8 |" in out
    assert main([TRANSFORMER[:-1] + "x"]) == 2
    assert "nnx-plan: module 'nnx.examples.transformer_sharded' has no attribute" in capsys.readouterr().err
    assert main(["nnx.examples"]) == 2
    assert "give the model as module:name" in capsys.readouterr().err


PAGE = (Path(__file__).parents[2] / "docs" / "guides" / "planning.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "table"), re.findall(r"```bash\nnnx-plan (.*?)\n```\n\n(.*?\n)(?=\n#|\Z)", PAGE, re.DOTALL)
)
def test_the_page_shows_what_the_command_prints(command, table, capsys):
    assert main(shlex.split(command.replace("\\\n", " "))) == 0
    assert capsys.readouterr().out == table
