"""Several processes over loopback: they train as one, save together, and go on as another number of processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tests.faults.processes import Life, committed
from tests.sharding import program

import nnx
from nnx.train._storage import MANIFEST
from nnx.train.launch import launch, main


def records(out, processes):
    return [json.loads((out / f"{processes}-{number}.json").read_text()) for number in range(processes)]


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_with_another_number_of_processes(tmp_path, capfd):
    out, saved = tmp_path / "out", tmp_path / "saved"
    out.mkdir()
    assert Life(out, tmp_path / "alone", processes=1, steps=8).end() == 0
    (alone,) = records(out, 1)
    assert list(alone["losses"]) == [str(n) for n in range(1, 9)]

    # Two processes, the second of which is killed while both are writing step 6.
    life = Life(out, saved, processes=2, steps=8)
    assert life.kill(1, when=(saved / ".writing-6").exists) == -signal.SIGKILL
    assert "process 1 was killed by SIGKILL; the other is ended" in capfd.readouterr().err
    first, second = records(out, 2)
    assert first["held"] == second["held"] == [[4, 32], [4, 32]]
    assert first["losses"] == {**second["losses"], **first["losses"]}
    steps = committed(saved)
    assert steps in ([2, 4], [2, 4, 6])
    files = [path for path in (saved / "4" / "state").glob("ocdbt.process_*") if any((path / "d").iterdir())]
    assert len(files) == 2, "each process writes its own shards"

    # The newest is damaged so that no process can tell by itself: what they have read together does not add up.
    with nnx.Checkpointer(saved) as checkpointer:
        manifest = checkpointer.inspect()
    entry = manifest.items["state"]["model/mlp/layers/0/kernel"]
    assert entry.crc is None
    manifest.items["state"]["model/mlp/layers/0/kernel"] = type(entry)(
        entry.spec, nbytes=entry.nbytes, sum=entry.sum + 1
    )
    (saved / str(steps[-1]) / MANIFEST).write_text(manifest.to_text())

    # Four processes put it aside, all of them, and go on from the one before. One of them may not write at step 7.
    life = Life(out, saved, processes=4, steps=8, fail_at=7)
    assert life.end() == 0
    others = records(out, 4)
    for number, record in enumerate(others):
        assert record["from"] == steps[-2]
        assert len(record["said"]) == 1
        assert f"does not have its checksum; it was renamed to corrupt-{steps[-1]}" in record["said"][0]
        assert record["held"] == [[4, 32]]
        assert list(record["losses"]) == [str(n) for n in range(steps[-2] + 1, 9)]
        assert record["average"] == others[0]["average"]
        said = {0: "process 1 could not write its part", 1: "File too large"}.get(number, "another process could not")
        assert "step 7" in record["failed"]
        assert said in record["failed"]
    assert committed(saved)[-2:] == [6, 8]
    together = {**first["losses"], **others[0]["losses"]}
    np.testing.assert_allclose(
        [together[str(n)] for n in range(1, 9)], [alone["losses"][str(n)] for n in range(1, 9)], rtol=2e-6
    )

    # And back: one process reads what four have written, in whole, and checks it.
    program.main(out, saved, 9)
    (last,) = records(out, 1)
    assert last["from"] == 8
    assert last["said"] == []
    assert list(last["losses"]) == ["9"]


@pytest.mark.slow
def test_a_signal_to_one_of_the_processes_ends_fit_in_all(tmp_path):
    command = [sys.executable, "-W", "error", str(Path(__file__).with_name("fit_program.py")), str(tmp_path)]
    assert launch(command, 2, timeout=200) == 0
    for process in range(2):
        found = json.loads((tmp_path / f"{process}.json").read_text())
        assert found == {"step": 4, "signal": signal.SIGTERM, "loss": 28.0}
    assert committed(tmp_path / "saved") == [4]
    # The first one alone has logged, each step once.
    lines = (tmp_path / "log.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["step", "2", "4"]


def test_the_launcher_numbers_the_processes_and_their_lines(capfd):
    code = "import os; print(os.environ['NNX_PROCESS_ID'], os.environ['NNX_NUM_PROCESSES'], os.environ['XLA_FLAGS'])"
    assert main(["-n", "2", "-d", "3", "--", "-c", code]) == 0
    lines = sorted(capfd.readouterr().out.splitlines())
    assert [line.split()[:3] for line in lines] == [["[0]", "0", "2"], ["[1]", "1", "2"]]
    assert all(line.endswith("--xla_force_host_platform_device_count=3") for line in lines)


def test_the_launcher_ends_the_others_when_one_fails(capsys):
    code = "import os, sys, time; os.environ['NNX_PROCESS_ID'] == '1' and sys.exit(7); time.sleep(60)"
    start = time.monotonic()
    assert launch([sys.executable, "-c", code], 2) == 7
    assert "process 1 ended with exit code 7; the other is ended" in capsys.readouterr().err
    assert launch([sys.executable, "-c", "import time; time.sleep(60)"], 2, timeout=0.5) == 124
    assert "the timeout of 0.5 s is over; still running: 0, 1" in capsys.readouterr().err
    assert time.monotonic() - start < 40


def test_a_launcher_that_is_ended_leaves_nothing_running(tmp_path):
    code = f"import os, time; open(f'{tmp_path}/{{os.getpid()}}', 'w').close(); time.sleep(60)"
    command = [sys.executable, "-m", "nnx.train.launch", "-n", "2", "--", "-c", code]
    launcher = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list(tmp_path.iterdir())) < 2:
        time.sleep(0.05)
    launcher.terminate()
    assert launcher.wait(30) == 128 + signal.SIGTERM
    for file in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.name), 0)


def test_the_launcher_says_what_it_lacks(capsys):
    with pytest.raises(ValueError, match="processes and devices are at least 1, got 0 and 1"):
        launch(["true"], 0)
    with pytest.raises(SystemExit):
        main([])
    assert "give the program to run" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["-n", "0", "--", "x.py"])
    assert "processes and devices are at least 1, got 0 and 1" in capsys.readouterr().err
