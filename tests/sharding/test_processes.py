"""Several processes over loopback: they train as one, save together, and go on as another number of processes."""

import json
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nnx.train.launch import launch, main

PROGRAM = str(Path(__file__).with_name("program.py"))


def run(out, checkpoints, *, processes, devices, steps=6, die_at=0):
    command = [sys.executable, PROGRAM, str(out), str(checkpoints), str(steps), str(die_at)]
    return launch(command, processes, devices=devices, timeout=400)


def records(out, processes):
    return [json.loads((out / f"{processes}-{number}.json").read_text()) for number in range(processes)]


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_with_another_number_of_processes(tmp_path):
    out, saved = tmp_path / "out", tmp_path / "saved"
    out.mkdir()
    assert run(out, tmp_path / "alone", processes=1, devices=4) == 0
    (alone,) = records(out, 1)
    assert list(alone["losses"]) == [str(n) for n in range(1, 7)]

    assert run(out, saved, processes=2, devices=2, die_at=5) == -signal.SIGKILL
    first, second = records(out, 2)
    assert first["held"] == second["held"] == [[4, 32], [4, 32]]
    assert first["losses"] == {**second["losses"], **first["losses"]}
    assert sorted(path.name for path in saved.iterdir() if path.name.isdecimal()) == ["2", "4"]
    files = [path for path in (saved / "4" / "state").glob("ocdbt.process_*") if any((path / "d").iterdir())]
    assert len(files) == 2, "each process writes its own shards"

    assert run(out, saved, processes=4, devices=1) == 0
    others = records(out, 4)
    for record in others:
        assert record["from"] == 4
        assert record["held"] == [[4, 32]]
        assert list(record["losses"]) == ["5", "6"]
        assert record["average"] == others[0]["average"]
    together = {**first["losses"], **others[0]["losses"]}
    np.testing.assert_allclose(
        [together[str(n)] for n in range(1, 7)], [alone["losses"][str(n)] for n in range(1, 7)], rtol=2e-6
    )

    # And back: one process reads what four have written.
    assert run(out, saved, processes=1, devices=4, steps=7) == 0
    (last,) = records(out, 1)
    assert last["from"] == 6
    assert list(last["losses"]) == ["7"]


def test_the_launcher_numbers_the_processes_and_their_lines(capfd):
    code = "import os; print(os.environ['NNX_PROCESS_ID'], os.environ['NNX_NUM_PROCESSES'], os.environ['XLA_FLAGS'])"
    assert main(["-n", "2", "-d", "3", "--", "-c", code]) == 0
    lines = sorted(capfd.readouterr().out.splitlines())
    assert [line.split()[:3] for line in lines] == [["[0]", "0", "2"], ["[1]", "1", "2"]]
    assert all(line.endswith("--xla_force_host_platform_device_count=3") for line in lines)


def test_the_launcher_ends_the_others_when_one_fails():
    code = "import os, sys, time; os.environ['NNX_PROCESS_ID'] == '1' and sys.exit(7); time.sleep(60)"
    start = time.monotonic()
    assert launch([sys.executable, "-c", code], 2) == 7
    assert launch([sys.executable, "-c", "import time; time.sleep(60)"], 2, timeout=0.5) == 124
    assert time.monotonic() - start < 40


def test_the_launcher_says_what_it_lacks(capsys):
    with pytest.raises(ValueError, match="processes and devices are at least 1, got 0 and 1"):
        launch(["true"], 0)
    with pytest.raises(SystemExit):
        main([])
    assert "give the program to run" in capsys.readouterr().err
