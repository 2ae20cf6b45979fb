"""The digits example: both styles agree, a resumed run is the same run, and slips at the command line are answered."""

import json
import resource
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from nnx.examples import digits
from nnx.examples.data import batch_indices, load_digits

STEPS = 30


@pytest.fixture(scope="module", autouse=True)
def small_checkpoint_interval():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "CHECKPOINT_EVERY", 7)
        yield


@pytest.fixture(scope="module", params=list(digits.STYLES))
def style(request):
    return request.param


@pytest.fixture(scope="module")
def whole(style, tmp_path_factory):
    """A run that nothing interrupted, and its directory."""
    out = tmp_path_factory.mktemp(style)
    return digits.run(out, steps=STEPS, style=style), out


def assert_same_run(a, b):
    assert a.step == b.step
    assert a.history == b.history
    assert a.parameters.paths == b.parameters.paths
    for path, x, y in zip(
        a.parameters.paths, jax.tree.leaves(a.parameters), jax.tree.leaves(b.parameters), strict=True
    ):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


def command(out, *arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "nnx.examples.digits", "--out", str(out), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        **options,
    )


def test_it_learns_and_writes_a_report(whole):
    result, out = whole
    assert len(result.history["loss"]) == len(result.history["accuracy"]) == STEPS
    assert result.history["test_step"] == [22]
    assert np.mean(result.history["loss"][-5:]) < 0.6 * result.history["loss"][0]
    assert result.accuracy > 0.5
    report = (out / "report.png").read_bytes()
    assert report.startswith(b"\x89PNG")
    assert len(report) > 20_000


def test_the_styles_agree(tmp_path):
    functional = digits.run(tmp_path / "functional", steps=STEPS, style="functional", seed=3)
    lifted = digits.run(tmp_path / "lifted", steps=STEPS, style="lifted", seed=3)
    np.testing.assert_allclose(functional.history["loss"], lifted.history["loss"], rtol=1e-3, atol=1e-4)
    assert functional.parameters.paths == lifted.parameters.paths
    for x, y in zip(jax.tree.leaves(functional.parameters), jax.tree.leaves(lifted.parameters), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("cut", [pytest.param(1, marks=pytest.mark.slow), 16, pytest.param(22, marks=pytest.mark.slow)])
def test_a_run_cut_short_and_resumed_is_the_same_run(whole, tmp_path, style, cut):
    part = digits.run(tmp_path, steps=cut, style=style)
    assert part.step == cut
    assert_same_run(digits.run(tmp_path, steps=STEPS, resume=True), whole[0])


def test_a_run_killed_between_checkpoints_and_resumed_is_the_same_run(whole, tmp_path, style, monkeypatch):
    class Killed(BaseException):
        pass

    trainer = digits.STYLES[style]

    class Mortal(trainer):
        steps = 0

        def train_step(self, images, labels):
            Mortal.steps += 1
            if Mortal.steps == 25:
                raise Killed
            return super().train_step(images, labels)

    monkeypatch.setitem(digits.STYLES, style, Mortal)
    with pytest.raises(Killed):
        digits.run(tmp_path, steps=STEPS, style=style)
    resumed = digits.run(tmp_path, steps=STEPS, resume=True)
    assert Mortal.steps == 25 + STEPS - 21
    assert_same_run(resumed, whole[0])


def test_a_finished_run_can_be_resumed_for_its_report(whole, style, capsys):
    result, out = whole
    (out / "report.png").unlink()
    again = digits.run(out, steps=STEPS, resume=True)
    assert again.accuracy == result.accuracy
    assert (out / "report.png").exists()
    assert "resumed at step 30 of 30" in capsys.readouterr().out
    with pytest.raises(digits.RunError, match="at step 30 already: --steps 10 is less"):
        digits.run(out, steps=10, resume=True)


def test_an_interrupt_saves_at_the_end_of_the_step(whole, tmp_path, style, monkeypatch, capsys):
    trainer = digits.STYLES[style]

    class Interrupted(trainer):
        def train_step(self, images, labels):
            if self.optimizer_step() == 11:
                signal.raise_signal(signal.SIGINT)
            return super().train_step(images, labels)

        def optimizer_step(self):
            state = self.checkpointed
            return int(state["optimizer"].step if isinstance(state, dict) else state.step)

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setitem(digits.STYLES, style, Interrupted)
    assert digits.main(["--out", str(tmp_path), "--steps", str(STEPS), "--style", style]) == 128 + signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is handler
    assert "interrupted: saved at step 12" in capsys.readouterr().out
    monkeypatch.setitem(digits.STYLES, style, trainer)
    assert_same_run(digits.run(tmp_path, steps=STEPS, resume=True), whole[0])


@pytest.mark.slow
def test_a_terminated_process_saves_and_ends(tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "nnx.examples.digits", "--out", str(out), "--steps", "100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 200
    while not any(entry.name.isdigit() for entry in (out / "checkpoints").glob("*")):
        assert time.monotonic() < deadline, "no checkpoint within 200 s"
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    process.terminate()
    output, errors = process.communicate(timeout=100)
    assert process.returncode == 128 + signal.SIGTERM
    assert errors == ""
    saved = max(int(entry.name) for entry in (out / "checkpoints").iterdir() if entry.name.isdigit())
    assert f"interrupted: saved at step {saved}" in output
    result = digits.run(out, steps=saved + 2, resume=True)
    assert len(result.history["loss"]) == saved + 2


@pytest.mark.slow
def test_the_command(tmp_path):
    done = command("runs/a", "--steps", "3", "--seed", "5", "--style", "lifted", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["test accuracy", "report"]
    assert len(lines[0]) == len("test accuracy: 0.1234")
    assert json.loads((tmp_path / "runs/a/config.json").read_text()) == {"seed": 5, "style": "lifted"}
    assert (tmp_path / "runs/a/report.png").exists()


def test_help_is_quick_and_names_the_options():
    done = command("x", "--help")
    assert done.returncode == 0
    for option in ("--steps", "--seed", "--out", "--resume", "--style"):
        assert option in done.stdout


def test_what_does_not_go_together_is_refused(whole, style, tmp_path, capsys):
    _, out = whole
    other = "lifted" if style == "functional" else "functional"
    before = sorted(path.name for path in (out / "checkpoints").iterdir())
    for arguments, message in [
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--seed", "-1"], "--seed must not be negative, got -1"),
        (["--style", "other"], "invalid choice: 'other'"),
        (["--out", str(tmp_path / "nothing"), "--resume"], "there is nothing to resume in"),
        (["--out", str(out), "--seed", "1"], "holds the checkpoints of another run (--seed 0"),
        (["--out", str(out), "--style", other], "Choose another --out, or delete them"),
        (["--out", str(out), "--seed", "1", "--resume"], "Resume it with its own options"),
    ]:
        with pytest.raises(SystemExit) as ended:
            digits.main([*arguments, "--steps", "31"] if "--steps" not in arguments else arguments)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == before
    assert not (tmp_path / "nothing").exists()
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(digits.RunError, match="is a file, not a directory"):
        digits.run(file)
    (tmp_path / "foreign" / "checkpoints" / "5").mkdir(parents=True)
    with pytest.raises(digits.RunError, match="a run that it knows nothing of"):
        digits.run(tmp_path / "foreign")


def test_the_same_run_may_be_started_over(tmp_path, capsys):
    digits.run(tmp_path, steps=8)
    digits.run(tmp_path, steps=3)
    assert "starting over in" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"3", ".lock"}


def test_the_data_is_split_evenly_and_always_the_same():
    data = load_digits()
    assert data.train_images.shape == (1437, 8, 8, 1)
    assert data.test_images.shape == (360, 8, 8, 1)
    assert data.train_images.dtype == np.float32
    assert (data.train_images.min(), data.train_images.max()) == (0.0, 1.0)
    assert set(np.bincount(data.test_labels)) <= {34, 35, 36, 37, 38}
    train, test = ({image.tobytes() for image in images} for images in (data.train_images, data.test_images))
    assert len(train & test) <= 2  # two scans may be equal
    for a, b in zip(data, load_digits(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_batches_depend_on_seed_and_step_alone():
    epoch = [batch_indices(step, size=22, batch_size=5, seed=1) for step in range(4)]
    assert len(np.unique(np.concatenate(epoch))) == 20
    for step, batch in enumerate(epoch):
        np.testing.assert_array_equal(batch, batch_indices(step, size=22, batch_size=5, seed=1))
    assert not np.array_equal(epoch[0], batch_indices(4, size=22, batch_size=5, seed=1))
    assert not np.array_equal(epoch[0], batch_indices(0, size=22, batch_size=5, seed=2))


@pytest.mark.slow
def test_the_default_run_reaches_its_accuracy_in_time(tmp_path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = command(tmp_path / "run")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    accuracy = float(done.stdout.splitlines()[0].removeprefix("test accuracy: "))
    assert accuracy >= 0.98
    # Seconds of work and not of the clock, which also shows what else the machine does.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 90
