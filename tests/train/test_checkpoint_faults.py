"""Damage, full disks, read-only directories and two processes: nothing is lost, and nothing wrong is loaded.

Random damage and random kills are in tests/faults.
"""

import os
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
from nnx.train._writer import LOSES_THREADS_AT_EXIT

VALUE = {"a": jnp.arange(40_000.0), "b": jnp.arange(5), "c": {"key": jax.random.key(3)}}
LIKE = {"a": jnp.zeros(40_000), "b": jnp.zeros(5, int), "c": {"key": jax.random.key(0)}}


def shifted(by):
    return {**VALUE, "a": VALUE["a"] + by}


def data_of(value):
    return [jax.random.key_data(x) if x.dtype != np.float32 and x.ndim == 0 else x for x in jax.tree.leaves(value)]


def equal(value, expected):
    return all(np.array_equal(a, b) for a, b in zip(data_of(value), data_of(expected), strict=True))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("saved") / "run"
    with nnx.Checkpointer(root, save_every=1) as checkpointer:
        checkpointer.save(1, shifted(1))
        checkpointer.save(2, shifted(2))
    return root


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


@pytest.mark.parametrize("empty", [False, True])
def test_a_step_without_its_manifest_is_a_damaged_one(saved, tmp_path, empty):
    root = tmp_path / "run"
    shutil.copytree(saved, root)
    for entry in list((root / "2").iterdir()):
        if entry.name == "nnx_manifest.json":
            entry.unlink()
        elif empty:
            shutil.rmtree(entry)
    with nnx.Checkpointer(root, save_every=1) as checkpointer:
        assert checkpointer.steps == (1,)
        with pytest.raises(nnx.CorruptError, match="step 2 .* is damaged: it has no manifest"):
            checkpointer.restore(2, like=LIKE)
        with pytest.warns(nnx.CheckpointWarning, match="no manifest; it was renamed to corrupt-2, and") as caught:
            assert checkpointer.restore(like=LIKE).step == 1
        assert len(caught) == 1
        assert checkpointer.save(2, shifted(2))
    # One that lost it since: the next save puts it aside as well.
    (root / "2" / "nnx_manifest.json").unlink()
    with nnx.Checkpointer(root, save_every=1) as checkpointer:
        with pytest.warns(nnx.CheckpointWarning, match="renamed to corrupt-2-1"):
            checkpointer.save(2, shifted(2))
        assert equal(checkpointer.restore(2, like=LIKE).value, shifted(2))
    shutil.rmtree(root / "1")
    (root / "2" / "nnx_manifest.json").unlink()
    with (
        nnx.Checkpointer(root) as checkpointer,
        pytest.warns(nnx.CheckpointWarning),
        pytest.raises(nnx.CorruptError, match="step 2 .* no manifest"),
    ):
        checkpointer.restore(like=LIKE)


def test_what_is_no_damage_puts_nothing_aside(saved, tmp_path, monkeypatch):
    root = tmp_path / "run"
    shutil.copytree(saved, root)
    with nnx.Checkpointer(root) as checkpointer:

        def refuse(step):
            raise PermissionError(13, "Permission denied", str(root / str(step)))

        with monkeypatch.context() as patch:
            patch.setattr(checkpointer._storage, "read_manifest", refuse)
            with pytest.raises(nnx.CheckpointError, match="Permission denied.*That is no damage") as error:
                checkpointer.restore(like=LIKE)
            assert not isinstance(error.value, nnx.CorruptError)
        with monkeypatch.context() as patch:

            def no_files_left(*_, **__):
                raise ValueError("RESOURCE_EXHAUSTED: Too many open files")

            patch.setattr(checkpointer._ocp.Checkpointer, "restore", no_files_left)
            with pytest.raises(nnx.CheckpointError, match="it can be tried again"):
                checkpointer.restore(like=LIKE)
        assert checkpointer.restore(like=LIKE).step == 2


def test_a_step_that_its_writer_removes_while_it_is_read(saved, tmp_path, monkeypatch):
    root = tmp_path / "run"
    shutil.copytree(saved, root)
    with nnx.Checkpointer(root) as reader:
        read = reader._reader.read

        def overtaken(step, *args, **options):
            if step == 2:  # what retention does
                (root / "2").rename(root / ".removed-2")
                (root / "1").rename(root / "3")
                text = (root / "3" / "nnx_manifest.json").read_text()
                from nnx.train._manifest import Manifest

                manifest = Manifest.from_text(text)
                (root / "3" / "nnx_manifest.json").write_text(Manifest(3, manifest.items).to_text())
            return read(step, *args, **options)

        monkeypatch.setattr(reader._reader, "read", overtaken)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            restored = reader.restore(like=LIKE)
        assert restored.step == 3
        assert equal(restored.value, shifted(1))


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


@pytest.mark.skipif(LOSES_THREADS_AT_EXIT, reason="Python before 3.12.3 saves nothing in the background")
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


@pytest.mark.skipif(LOSES_THREADS_AT_EXIT, reason="Python before 3.12.3 saves nothing in the background")
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


def test_what_counts_is_on_the_disk_before_it_counts(tmp_path, monkeypatch):
    """Every file and folder of a step is flushed before the step has its name, and the name after that."""
    done = []
    flush, rename = os.fsync, Path.rename

    def fsync(descriptor):
        done.append(os.path.realpath(f"/proc/self/fd/{descriptor}"))
        flush(descriptor)

    def renamed(self, target):
        done.append(f"{self} -> {target}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", renamed)
    with nnx.Checkpointer(tmp_path, save_every=1, async_save=False) as checkpointer:
        checkpointer.save(1, VALUE)
    writing, step = tmp_path / ".writing-1", tmp_path / "1"
    at = done.index(f"{writing} -> {step}")
    inside = [step, *step.rglob("*")]
    assert len(inside) > 5
    assert {str(writing / path.relative_to(step)) for path in inside} <= set(done[:at])
    assert str(tmp_path) in done[at + 1 :]


def test_a_step_that_is_not_kept_is_renamed_before_its_files_go(tmp_path, monkeypatch):
    seen = []
    remove = shutil.rmtree

    def slowly(folder, **options):
        if Path(folder).name.startswith(".removed-"):
            seen.append((Path(folder).name, sorted(p.name for p in tmp_path.iterdir() if p.name.isdecimal())))
            if len(seen) == 1:
                return  # as if killed here
        remove(folder, **options)

    monkeypatch.setattr(shutil, "rmtree", slowly)
    with nnx.Checkpointer(tmp_path, save_every=1, keep_last=1) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, {"x": jnp.ones(1)})
    assert seen == [(".removed-1", ["2"]), (".removed-2", ["3"])]
    (tmp_path / ".writing-9").mkdir()
    assert (tmp_path / ".removed-1").exists()
    with nnx.Checkpointer(tmp_path, save_every=1) as checkpointer:
        assert checkpointer.steps == (3,)
        checkpointer.save(4, {"x": jnp.ones(1)})
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "3", "4"}


def test_orbax_alone_reads_what_is_saved(saved):
    """The arrays are orbax's own, and its manager finds them."""
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(saved) as manager:
        assert manager.all_steps() == [1, 2]
        found = manager.restore(2, args=ocp.args.Composite(state=ocp.args.PyTreeRestore())).state
    np.testing.assert_array_equal(found["leaf:a"], shifted(2)["a"])


def test_two_processes(tmp_path):
    with nnx.Checkpointer(tmp_path, save_every=1) as first, nnx.Checkpointer(tmp_path, save_every=1) as second:
        first.save(1, {"x": jnp.ones(1)})
        with pytest.raises(nnx.CheckpointError, match="another process or Checkpointer is saving in"):
            second.save(2, {"x": jnp.ones(1)})
        first.wait()
        assert second.restore(like={"x": jnp.zeros(1)}).step == 1  # to read is fine
    with nnx.Checkpointer(tmp_path, save_every=1) as third:
        assert third.save(2, {"x": jnp.ones(1)})


def test_a_read_only_directory(tmp_path):
    root = tmp_path / "run"
    with nnx.Checkpointer(root, save_every=1) as checkpointer:
        checkpointer.save(1, {"x": jnp.ones(1)})
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid() and "pytest" in str(folder):
            folder.chmod(0o755)
    root.chmod(0o555)
    # Nothing is read-only to root, which tests in containers often run as: they hand over to another user.
    done = run(
        """
        import os, sys, jax.numpy as jnp, nnx
        value = {"x": jnp.ones(1)}
        with nnx.Checkpointer(sys.argv[2], save_every=1) as warm:  # what is imported late may not be readable then
            warm.save(0, value)
            warm.restore(like=value)
        with nnx.Checkpointer(sys.argv[1], save_every=1) as checkpointer:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setresgid(65534, 65534, 65534)
                os.setresuid(65534, 65534, 65534)
            try:
                checkpointer.save(2, value)
            except nnx.CheckpointError as error:
                print("refused:", error)
            print("restored", checkpointer.restore(like=value).step)
        """,
        root,
        tmp_path / "warm",
    )
    root.chmod(0o755)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "refused: cannot keep checkpoints in" in done.stdout
    assert "restored 1" in done.stdout
    with nnx.Checkpointer(root) as checkpointer:
        assert checkpointer.steps == (1,)


def test_a_place_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        nnx.Checkpointer(tmp_path / "file" / "run", save_every=1) as checkpointer,
        pytest.raises(nnx.CheckpointError, match="cannot keep checkpoints in"),
    ):
        checkpointer.save(1, {"x": jnp.ones(1)})
    with pytest.raises(nnx.CheckpointError, match="a directory of a file system is needed"):
        nnx.Checkpointer("gs://bucket/run")
