"""Each example runs, does what it says it does, and draws its picture; the longer ones with a few steps."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import nnx
from nnx.examples import (
    char_transformer,
    cli,
    linear_regression,
    parameter_surgery,
    scan_over_layers,
    transformer_sharded,
    vae,
)


def picture(folder):
    data = (folder / "report.png").read_bytes()
    return data.startswith(b"\x89PNG") and len(data) > 5_000


def test_the_list(capsys):
    assert cli.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(cli.EXAMPLES)
    assert all(len(line.split()) > 3 for line in lines)


def test_each_is_in_the_gallery():
    root = Path(__file__).parent.parent.parent
    page = (root / "docs" / "examples.md").read_text(encoding="utf-8")
    for name in cli.EXAMPLES:
        assert f"\n## {name}\n" in page
    for picture in (root / "docs" / "pictures" / "examples").glob("*.png"):
        assert f"](pictures/examples/{picture.name})" in page


def test_an_unknown_example(capsys):
    with pytest.raises(SystemExit):
        cli.main(["run", "nothing"])
    assert "invalid choice: 'nothing'" in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.EXAMPLES)
def test_help(name, capsys):
    with pytest.raises(SystemExit) as ending:
        cli.main(["run", name, "--help"])
    assert ending.value.code == 0
    assert "--steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--steps", "0"], "--steps must be at least 1"), (["--seed", "-1"], "--seed must not be negative")],
)
def test_slips_at_the_command_line(words, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as ending:
        linear_regression.main([*words, "--out", str(tmp_path)])
    assert ending.value.code == 2
    assert message in capsys.readouterr().err


def test_an_output_that_is_a_file(capsys, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        linear_regression.main(["--out", str(tmp_path / "file")])
    assert "is a file, not a directory" in capsys.readouterr().err


def test_linear_regression(tmp_path, capsys):
    assert linear_regression.main(["--steps", "60", "--out", str(tmp_path)]) == 0
    *styles, best, _ = [line.split() for line in capsys.readouterr().out.splitlines()]
    losses = [float(words[2]) for words in styles]
    assert len(styles) == 4
    np.testing.assert_allclose(losses, losses[0], rtol=1e-6)
    assert float(best[-1]) < losses[0] < 1.05 * float(best[-1])
    assert {words[-1] for words in styles} == {"60"}
    assert int(nnx.load_safetensors(tmp_path / "model.safetensors")["calls"]) == 60
    assert picture(tmp_path)


def test_vae(tmp_path):
    assert vae.main(["--steps", "120", "--out", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    np.testing.assert_allclose(rows[-1]["loss"], rows[-1]["kl"] + rows[-1]["reconstruction"], rtol=1e-5)
    assert picture(tmp_path)


@pytest.mark.slow
def test_scan_over_layers(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scan_over_layers, "DEPTHS", (2,))
    assert scan_over_layers.main(["--layers", "2", "--steps", "60", "--out", str(tmp_path)]) == 0
    first, *_, last, _ = capsys.readouterr().out.splitlines()
    assert float(first.rpartition(": ")[2]) < 1e-5
    assert last.endswith("logits 0e+00 apart")
    assert float(last.removeprefix("test accuracy ").partition(";")[0]) > 0.5
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    assert nnx.Checkpointer(tmp_path / "checkpoints").steps == (60,)
    assert picture(tmp_path)


@pytest.mark.slow
def test_char_transformer(tmp_path, capsys):
    words = ["--steps", "20", "--dim", "32", "--layers", "2", "--characters", "16", "--out", str(tmp_path)]
    assert char_transformer.main(words) == 0
    out = capsys.readouterr().out
    assert "def " in out
    assert "tokens a second" in out
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [row["test loss"] for row in rows if "test loss" in row]
    assert losses[-1] < losses[0] < 6
    assert picture(tmp_path)


def test_a_token_at_a_time_is_the_whole_text_at_once():
    text, vocabulary = char_transformer.load_sources(1000)
    model = char_transformer.Decoder(len(vocabulary), 32, 2, heads=4, kv_heads=2, ctx=nnx.context(0))
    tokens = text[None, :12].astype(np.int32)
    whole = model(tokens)
    model.init_cache(1, 12)
    first = char_transformer.prefill(model, tokens[:, :8])
    np.testing.assert_allclose(first, whole[:, 7], rtol=1e-4, atol=1e-4)
    for i in range(8, 12):
        logits = char_transformer.prefill(model, tokens[:, i : i + 1])
        np.testing.assert_allclose(logits, whole[:, i], rtol=1e-4, atol=1e-4)


def test_windows_go_on_where_they_were():
    text = np.arange(100, dtype=np.uint8)
    windows = char_transformer.TextWindows(text, 4, 8, seed=0)
    next(windows)
    state = windows.get_state()
    batch = next(windows)
    other = char_transformer.TextWindows(text, 4, 8, seed=0)
    other.set_state(state)
    np.testing.assert_array_equal(next(other), batch)
    assert (np.diff(batch, axis=1) == 1).all()


def test_parameter_surgery(tmp_path, capsys):
    assert parameter_surgery.main(["--steps", "60", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "the frozen parameters are as they were" in out
    assert "2,437 of 27,269 parameters trained, 4,876 numbers in the optimizer" in out
    assert float(out.partition("differ by at most ")[2].split()[0]) < 1e-3
    arrays = nnx.load_safetensors(tmp_path / "backbone.safetensors")
    assert sorted(arrays) == ["linear1/bias", "linear1/kernel", "linear2/bias", "linear2/kernel"]
    assert picture(tmp_path)


@pytest.mark.slow
def test_checkpointing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "nnx.examples.checkpointing", "--steps", "40", "--kills", "1", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the same, bit by bit" in done.stdout
    assert picture(tmp_path)


@pytest.mark.slow
def test_transformer_sharded(tmp_path, capsys):
    words = ["--mesh", "data=1,tensor=1", "--recipe", "combined", "--save-every", "2", "--out", str(tmp_path)]
    assert transformer_sharded.main([*words, "--steps", "1"]) == 0
    assert transformer_sharded.main([*words, "--steps", "3"]) == 0  # goes on from the checkpoint
    assert transformer_sharded.main([*words, "--steps", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("step")] == ["1", "2", "3"]
    assert lines[-2] == f"{tmp_path} holds a run of 3 steps already; more --steps go on with it"
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert nnx.Checkpointer(tmp_path / "checkpoints").steps == (1, 2, 3)
    assert picture(tmp_path)
    for mesh, message in (("data=x", "a mesh is given as data=2"), ("data=4096", "takes 4096 devices, and there are")):
        with pytest.raises(SystemExit):
            transformer_sharded.main(["--mesh", mesh])
        assert message in capsys.readouterr().err
    with pytest.raises(nnx.ShardingError, match="a batch of 16 sequences does not divide over 3 devices"):
        transformer_sharded.run(jax.sharding.AbstractMesh((3,), ("data",)), "data_parallel")
