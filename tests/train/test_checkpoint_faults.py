"""Damage, kills, full disks, read-only directories and two processes: nothing is lost, and nothing wrong is loaded."""

import os
import random
import shutil
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx

VALUE = {"a": jnp.arange(40_000.0), "b": jnp.arange(5), "c": {"key": jax.random.key(3)}}
LIKE = {"a": jnp.zeros(40_000), "b": jnp.zeros(5, int), "c": {"key": jax.random.key(0)}}


def shifted(by):
    return {**VALUE, "a": VALUE["a"] + by}


def data_of(value):
    return [jax.random.key_data(x) if x.dtype != np.float32 and x.ndim == 0 else x for x in jax.tree.leaves(value)]


def equal(value, expected):
    return all(np.array_equal(a, b) for a, b in zip(data_of(value), data_of(expected), strict=True))


def damage(folder, seed):
    """Flip a bit, cut a file short, remove one, or empty a folder."""
    rng = random.Random(seed)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    file = rng.choice(files)
    how = rng.choice(["flip", "flip", "truncate", "remove", "empty"])
    if how == "flip":
        content = bytearray(file.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
    elif how == "truncate":
        os.truncate(file, rng.randrange(file.stat().st_size))
    elif how == "remove":
        file.unlink()
    else:
        for entry in file.parent.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    return how, file


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("saved") / "run"
    with nnx.Checkpointer(root, save_every=1) as checkpointer:
        checkpointer.save(1, shifted(1))
        checkpointer.save(2, shifted(2))
    return root


DAMAGES = int(os.environ.get("NNX_DAMAGES", "24"))


# What reads the arrays leaves callbacks behind when a file is damaged, and their event loop is gone when they come.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("part", range(4))
def test_damage_is_found_and_the_checkpoint_before_it_is_used(saved, tmp_path, part):
    for seed in range(part, DAMAGES, 4):
        root = tmp_path / str(seed)
        shutil.copytree(saved, root)
        how, file = damage(root / "2", seed)
        with nnx.Checkpointer(root, save_every=1) as checkpointer, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            restored = checkpointer.restore(like=LIKE)
            # Whatever was damaged, what comes out is what was saved: that of step 2 where the damage does not matter.
            assert equal(restored.value, shifted(restored.step)), (seed, how, file)
            if restored.step == 1:
                gone = not (root / "2").exists()
                assert gone == any("corrupt-2" in str(warning.message) for warning in caught), (seed, how, file)
                # And the run goes on from there.
                if gone:
                    assert checkpointer.save(2, shifted(2))
                    assert equal(checkpointer.restore(2, like=LIKE).value, shifted(2))
        shutil.rmtree(root)


def test_errors_name_step_item_and_path(saved, tmp_path):
    root = tmp_path / "run"
    shutil.copytree(saved, root)
    manifest = root / "2" / "nnx_manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"crc": ', '"crc": 1', 2))
    with nnx.Checkpointer(root) as checkpointer:
        with pytest.raises(nnx.CorruptError, match="does not have its own checksum") as error:
            checkpointer.restore(2, like=LIKE)
        assert (error.value.step, error.value.item, error.value.path) == (2, None, None)
    assert (root / "2").exists()  # a step that was asked for by number is left where it is
    manifest.write_text(text)
    from nnx.train._manifest import Entry, Manifest

    found = Manifest.from_text(text)
    entry = found.items["state"]["a"]
    found.items["state"]["a"] = Entry(entry.spec, entry.crc + 1, entry.offset, entry.nbytes)
    manifest.write_text(found.to_text())
    with nnx.Checkpointer(root) as checkpointer:
        with pytest.raises(nnx.CorruptError, match="`a` of `state` does not have its checksum") as error:
            checkpointer.restore(2, like=LIKE)
        assert (error.value.step, error.value.item, error.value.path) == (2, "state", "a")
        assert equal(checkpointer.restore(2, like=LIKE, verify=False).value, shifted(2))


def test_when_everything_is_damaged(saved, tmp_path):
    root = tmp_path / "run"
    shutil.copytree(saved, root)
    for step in (1, 2):
        (root / str(step) / "nnx_manifest.json").write_text("{")
    model = {"a": jnp.zeros(40_000), "b": jnp.zeros(5, int), "c": {"key": jax.random.key(0)}}
    with nnx.Checkpointer(root) as checkpointer:
        with (
            pytest.warns(nnx.CheckpointWarning) as caught,
            pytest.raises(nnx.CorruptError, match="step 2 .* is damaged: the manifest is no JSON"),
        ):
            checkpointer.restore(like=model)
        assert len(caught) == 2
        assert checkpointer.steps == ()
    assert {path.name for path in root.iterdir()} - {".lock"} == {"corrupt-1", "corrupt-2"}


def run(program, *args):
    source = textwrap.dedent(program)
    command = [sys.executable, "-c", source, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_an_exit_without_waiting_loses_nothing(tmp_path):
    done = run(
        """
        import sys, jax.numpy as jnp, nnx
        checkpointer = nnx.Checkpointer(sys.argv[1], save_every=1)
        checkpointer.save(1, {"x": jnp.arange(3_000_000.0)})
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    with nnx.Checkpointer(tmp_path) as checkpointer:
        assert float(checkpointer.restore(like={"x": jnp.zeros(3_000_000)}).value["x"][-1]) == 2_999_999


def test_a_failure_in_the_background_is_raised_and_does_not_hang(tmp_path):
    done = run(
        """
        import resource, signal, sys, jax.numpy as jnp, nnx
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with nnx.Checkpointer(sys.argv[1], save_every=1) as checkpointer:
            checkpointer.save(1, {"x": jnp.ones(10)})
            checkpointer.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))  # the disk is full
            import numpy as np
            checkpointer.save(2, {"x": jnp.asarray(np.random.default_rng(0).normal(size=1_000_000))})
            try:
                checkpointer.wait()
            except nnx.CheckpointError as error:
                print("raised:", error)
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            assert checkpointer.steps == (1,)
            checkpointer.save(3, {"x": jnp.ones(10)})
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "raised: saving in" in done.stdout
    with nnx.Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.steps == (1, 3)
    assert not list(Path(tmp_path).glob(".writing-*"))


def test_an_error_is_raised_by_the_next_call_and_once(tmp_path, monkeypatch):
    with nnx.Checkpointer(tmp_path, save_every=1) as checkpointer:
        checkpointer.save(1, {"x": jnp.ones(1)})
        checkpointer.wait()
        monkeypatch.setattr(checkpointer._storage, "writing", lambda *_: (_ for _ in ()).throw(OSError("no space")))
        checkpointer.save(2, {"x": jnp.ones(1)})
        checkpointer._writer._thread.join()
        with pytest.raises(nnx.CheckpointError, match="failed in the background: no space"):
            checkpointer.restore(like={"x": jnp.zeros(1)})
        assert checkpointer.restore(like={"x": jnp.zeros(1)}).step == 1


def test_two_processes(tmp_path):
    with nnx.Checkpointer(tmp_path, save_every=1) as first, nnx.Checkpointer(tmp_path, save_every=1) as second:
        first.save(1, {"x": jnp.ones(1)})
        with pytest.raises(nnx.CheckpointError, match="another process or Checkpointer is saving in"):
            second.save(2, {"x": jnp.ones(1)})
        first.wait()
        assert second.restore(like={"x": jnp.zeros(1)}).step == 1  # to read is fine
    with nnx.Checkpointer(tmp_path, save_every=1) as third:
        assert third.save(2, {"x": jnp.ones(1)})


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only to root")
def test_a_read_only_directory(tmp_path):
    with nnx.Checkpointer(tmp_path, save_every=1) as checkpointer:
        checkpointer.save(1, {"x": jnp.ones(1)})
    tmp_path.chmod(0o500)
    try:
        with nnx.Checkpointer(tmp_path, save_every=1) as checkpointer:
            with pytest.raises(nnx.CheckpointError, match="cannot keep checkpoints in"):
                checkpointer.save(2, {"x": jnp.ones(1)})
            assert checkpointer.restore(like={"x": jnp.zeros(1)}).step == 1
    finally:
        tmp_path.chmod(0o700)


def test_a_place_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        nnx.Checkpointer(tmp_path / "file" / "run", save_every=1) as checkpointer,
        pytest.raises(nnx.CheckpointError, match="cannot keep checkpoints in"),
    ):
        checkpointer.save(1, {"x": jnp.ones(1)})
    with pytest.raises(nnx.CheckpointError, match="a directory of a file system is needed"):
        nnx.Checkpointer("gs://bucket/run")


TRAIN = """
    import sys, jax, jax.numpy as jnp, nnx, optax
    steps = int(sys.argv[2])
    model = nnx.Linear(4, 4, ctx=nnx.context(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2))
    ctx = nnx.context(noise=0)
    @nnx.jit
    def train(model, optimizer, ctx):
        x = jax.random.normal(ctx.make_rng("noise"), (8, 4))
        loss, grads = nnx.value_and_grad(lambda m: ((m(x) - x) ** 2).mean())(model)
        optimizer.update(model, grads)
        return loss
    with nnx.Checkpointer(sys.argv[1], save_every=2, keep_last=2) as checkpointer:
        start = 0
        if checkpointer.latest_step is not None:
            restored = checkpointer.restore(like={"model": model, "optimizer": optimizer}, context=ctx)
            start = restored.step
        for step in range(start + 1, steps + 1):
            loss = train(model, optimizer, ctx)
            checkpointer.save(step, {"model": model, "optimizer": optimizer}, context=ctx, metrics={"loss": loss})
            print(step, float(loss).hex(), flush=True)
    print("end", model.kernel.tobytes().hex())
"""
KILLS = int(os.environ.get("NNX_KILLS", "3"))


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_is_the_run_that_is_not(tmp_path):
    steps = 40
    whole = run(TRAIN, tmp_path / "whole", steps)
    assert whole.returncode == 0, whole.stderr
    expected = dict(line.split() for line in whole.stdout.splitlines())
    rng = random.Random(0)
    seen = {}
    kills = 0
    while True:
        command = [sys.executable, "-c", textwrap.dedent(TRAIN), str(tmp_path / "killed"), str(steps)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            lines = []
            for line in process.stdout:
                lines.append(line)
                if kills < KILLS and len(lines) >= rng.randint(3, 12):
                    kills += 1
                    process.kill()
                    break
            lines += process.stdout.readlines()
        for line in lines:
            name, value = line.split()
            assert expected[name] == value, name
            seen[name] = value
        if process.returncode == 0:
            break
        assert process.returncode == -9
    assert seen == expected
    assert kills == KILLS
