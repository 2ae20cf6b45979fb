"""nnx-checkpoint: each of its commands on checkpoints of ours and on those of orbax alone."""

import importlib.metadata
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy

import nnx
from nnx.train.cli import main


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """Two checkpoints of a model, an optimizer, a key and a number, and one that was put aside."""
    root = tmp_path_factory.mktemp("ours") / "run"
    model = nnx.Linear(2, 3, ctx=nnx.context(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3))
    with nnx.Checkpointer(root, save_every=10) as checkpointer:
        for step in (10, 20):
            value = {"model": model, "optimizer": optimizer, "key": jax.random.key(step), "number": step}
            checkpointer.save(
                step, value, context=nnx.context(noise=1), metrics={"loss": 1 / step}, extra={"note": "an extra"}
            )
            model.kernel += 0.25
            model.kernel = model.kernel.at[0, 0].add(0.5)
    (root / "corrupt-5").mkdir()
    return root


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """What orbax's own managers write: one item, several, none, and steps with a prefix."""
    root = tmp_path_factory.mktemp("theirs")
    tree = {"params": {"kernel": jnp.arange(6.0).reshape(2, 3)}, "list": [jnp.ones(2, jnp.bfloat16)], "step": 3}
    with ocp.CheckpointManager(root / "one") as manager:
        manager.save(1, args=ocp.args.StandardSave(tree))
        manager.save(2, args=ocp.args.StandardSave({**tree, "step": 4}))
    options = ocp.CheckpointManagerOptions(step_prefix="ckpt", step_format_fixed_length=6)
    with ocp.CheckpointManager(root / "several", options=options) as manager:
        manager.save(7, args=ocp.args.Composite(state=ocp.args.StandardSave(tree), notes=ocp.args.JsonSave({"a": 1})))
    ocp.PyTreeCheckpointer().save(root / "bare", tree)
    return root


def command(capsys, *arguments, code=0):
    assert main([str(argument) for argument in arguments]) == code
    out, err = capsys.readouterr()
    assert (err == "") == (code != 2)
    return out if code != 2 else err


def columns(out):
    return [line.split() for line in out.splitlines()]


def test_ls(capsys, ours, theirs):
    out = columns(command(capsys, "ls", ours))
    assert out[0] == ["step", "saved", "leaves", "size", "by", "metrics"]
    assert [(row[0], row[3], row[4], row[6], row[7]) for row in out[1:3]] == [
        ("10", "12", "136", "nnx", "loss=0.1"),
        ("20", "12", "136", "nnx", "loss=0.05"),
    ]
    assert out[3] == ["put", "aside:", "corrupt-5"]
    assert [(row[0], row[3], row[6]) for row in columns(command(capsys, "ls", theirs / "one"))[1:]] == [
        ("1", "3", "orbax"),
        ("2", "3", "orbax"),
    ]
    assert columns(command(capsys, "ls", theirs / "several"))[1][0] == "7"
    assert "cannot look into" in command(capsys, "ls", theirs / "nowhere", code=2)


def test_show(capsys, ours, theirs):
    out = command(capsys, "show", ours)
    assert "metric loss: 0.05" in out
    assert 'extra: {"note": "an extra"}' in out
    rows = {(row[0], row[1]): row for row in columns(out) if row[0] in ("state", "context")}
    assert rows["state", "model/kernel"][2:5] == ["float32[2,3]", "params", "24"]
    assert rows["state", "optimizer/opt_state/0/mu/kernel"][3] == "opt_state"
    assert rows["state", "number"][2:] == ["a", "Python", "int", "20", "0"]
    assert ("context", "noise/0") in rows
    assert "model/bias" not in command(capsys, "show", f"{ours}@10", "--only", "**/kernel")
    out = command(capsys, "show", theirs / "several")
    assert "state    params/kernel  float32[2,3]" in out or "state  params/kernel  float32[2,3]" in out
    assert "list/0" in command(capsys, "show", theirs / "bare")
    assert "there are: [10, 20]" in command(capsys, "show", f"{ours}@15", code=2)


def test_diff(capsys, ours, theirs):
    out = command(capsys, "diff", f"{ours}@10", f"{ours}@20", code=1)
    assert "model/kernel  6 of 6 differ, largest change 0.75" in out
    assert "number        a Python int 10 -> a Python int 20" in out
    assert out.splitlines()[-1] == "3 differ, 9 are equal"
    assert command(capsys, "diff", f"{ours}@10", f"{ours}@20", "--only", "optimizer/**") == "0 differ, 6 are equal\n"
    out = command(capsys, "diff", f"{theirs / 'one'}@1", f"{theirs / 'one'}@2", code=1)
    assert "default  step  1 of 1 differ, largest change 1" in out
    out = command(capsys, "diff", ours, theirs / "bare", code=1)
    assert "model/kernel" in out
    assert "only in A" in out
    assert "only in B" in out


def test_verify(capsys, ours, theirs, tmp_path):
    out = command(capsys, "verify", ours)
    assert f"{ours}@10: 12 leaves, " in out
    assert "11 checksums hold" in out
    assert "it can be read whole; there are no checksums" in command(capsys, "verify", theirs / "one")
    for root in (ours, theirs / "one"):
        shutil.copytree(root, tmp_path / root.name)
        newest = max(int(f.name) for f in (tmp_path / root.name).iterdir() if f.name.isdecimal())
        folder = next((tmp_path / root.name / str(newest)).glob("*/d"))
        for file in folder.iterdir():
            file.write_bytes(b"x" * 10)
        out = command(capsys, "verify", tmp_path / root.name, code=1)
        assert f"@{newest}: DAMAGED: " in out
        assert out.count("DAMAGED") <= 2
    (tmp_path / "run" / "20" / "nnx_manifest.json").write_text("{")
    assert "@20: DAMAGED: the checkpoint of step 20" in command(capsys, "verify", tmp_path / "run", code=1)
    assert "damaged: the checkpoint of step 20" in command(capsys, "ls", tmp_path / "run")


def test_export(capsys, ours, theirs, tmp_path):
    command(capsys, "export", f"{ours}@10", tmp_path / "x.safetensors")
    found = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    model = nnx.Linear(2, 3, ctx=nnx.context(0))
    np.testing.assert_array_equal(found["model/kernel"], model.kernel)
    like = {"model": nnx.Linear(2, 3, ctx=nnx.context(1)), "key": jax.random.key(0), "number": 0}
    restored = nnx.load_safetensors(tmp_path / "x.safetensors", like=like, partial=True)
    np.testing.assert_array_equal(restored["model"].kernel, model.kernel)
    np.testing.assert_array_equal(*(jax.random.key_data(key) for key in (restored["key"], jax.random.key(10))))
    assert restored["number"] == 10
    command(capsys, "export", ours, tmp_path / "part.safetensors", "--only", "model/**")
    assert set(safetensors.numpy.load_file(tmp_path / "part.safetensors")) == {"model/bias", "model/kernel"}
    command(capsys, "export", theirs / "several", tmp_path / "theirs.safetensors", "--item", "state")
    assert set(nnx.load_safetensors(tmp_path / "theirs.safetensors")) == {"params/kernel", "list/0", "step"}
    message = command(capsys, "export", theirs / "several", tmp_path / "no", "--item", "other", code=2)
    assert "has the items state: name one with --item" in message


def test_prune(capsys, theirs, tmp_path):
    with nnx.Checkpointer(tmp_path / "run", save_every=1, keep_last=None) as checkpointer:
        for step in range(6):
            checkpointer.save(step, {"x": jnp.ones(2)}, metrics={"loss": abs(step - 1)})
        checkpointer.wait()
        assert "another process or Checkpointer is saving" in command(
            capsys, "prune", tmp_path / "run", "--keep-last", 1, code=2
        )
    rules = ("--keep-last", 1, "--keep-best", 1, "--keep-every", 4)
    out = command(capsys, "prune", tmp_path / "run", *rules, "--dry-run")
    assert out.count("would remove") == 2
    assert out.splitlines()[-1] == "kept: 0, 1, 4, 5"
    command(capsys, "prune", tmp_path / "run", *rules)
    with nnx.Checkpointer(tmp_path / "run") as checkpointer:
        assert checkpointer.steps == (0, 1, 4, 5)
    shutil.copytree(theirs / "one", tmp_path / "one")
    command(capsys, "prune", tmp_path / "one", "--keep-last", 1)
    with ocp.CheckpointManager(tmp_path / "one") as manager:
        assert manager.all_steps() == [2]


def test_it_is_a_command(ours):
    done = subprocess.run(
        [sys.executable, "-m", "nnx.train.cli", "show", str(ours)], capture_output=True, text=True, check=True
    )
    assert "model/kernel" in done.stdout
    assert done.stderr == ""
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="nnx-checkpoint")
    assert entry.load() is main
