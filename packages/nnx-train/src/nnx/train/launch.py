"""Start one program as several processes of JAX on this machine: `python -m nnx.train.launch -n 2 program.py`.

The program calls `nnx.train.launch.initialize()` before anything else of JAX. On a cluster, where something else starts
the processes, that does nothing, and `jax.distributed.initialize()` is called as JAX says.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import IO

__all__ = ["initialize", "launch", "main"]

_COORDINATOR, _COUNT, _ID = "NNX_COORDINATOR", "NNX_NUM_PROCESSES", "NNX_PROCESS_ID"
_GRACE = 5.0  # seconds that the others have to end by themselves, once one has failed


def initialize(*, heartbeat_timeout_seconds: int = 10) -> bool:
    """Join the processes that the launcher started, if it started this one.

    Args:
        heartbeat_timeout_seconds: after how long without a sign of life a process counts as dead, and the others end.

    Returns:
        Whether this is one of several processes.
    """
    if _COORDINATOR not in os.environ:
        return False
    import jax

    jax.distributed.initialize(
        os.environ[_COORDINATOR],
        num_processes=int(os.environ[_COUNT]),
        process_id=int(os.environ[_ID]),
        heartbeat_timeout_seconds=heartbeat_timeout_seconds,
    )
    return True


def launch(
    command: Sequence[str],
    processes: int,
    *,
    devices: int = 1,
    timeout: float | None = None,
    grace: float = _GRACE,
) -> int:
    """Run a command as several processes over loopback, each with CPU devices of its own, until all have ended.

    When one fails, the others are ended too: what is left of them waits for it. So are all when the launcher is told to
    end, by Ctrl-C or SIGTERM. Which one failed, and how, is said on the standard error.

    Args:
        command: the command and its arguments.
        processes: the number of processes.
        devices: the number of CPU devices of each.
        timeout: seconds after which all are ended; None waits.
        grace: seconds that those to be ended have after SIGTERM, such as to save, before they are killed.

    Returns:
        The first exit code that is not 0, negative for a signal; 124 after the timeout; else 0.

    Raises:
        ValueError: a number is less than 1.
    """
    if processes < 1 or devices < 1:
        raise ValueError(f"launch: processes and devices are at least 1, got {processes} and {devices}")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in flag]
    common = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join([*flags, f"--xla_force_host_platform_device_count={devices}"]),
        _COORDINATOR: f"127.0.0.1:{port}",
        _COUNT: str(processes),
    }
    running: list[subprocess.Popen[str]] = []
    readers: list[threading.Thread] = []
    try:
        with _sigterm_raises():
            for number in range(processes):
                child = subprocess.Popen(  # noqa: S603, what the user has asked for is what it runs
                    command,
                    env={**common, _ID: str(number)},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
                running.append(child)
                assert child.stdout is not None
                readers.append(threading.Thread(target=_copy, args=(child.stdout, number), daemon=True))
                readers[-1].start()
            code = _wait(running, timeout)
    except KeyboardInterrupt:
        code = -signal.SIGINT
    except _TerminatedError:
        code = -signal.SIGTERM
    finally:
        _end(running, grace)
        for child, reader in zip(running, readers, strict=True):
            reader.join(timeout=_GRACE)
            if child.stdout is not None and not reader.is_alive():
                child.stdout.close()
    return code


class _TerminatedError(BaseException):
    """SIGTERM."""


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Within, SIGTERM raises, so that the processes are ended and not left behind. On the main thread alone."""

    def raises(*_: object) -> None:
        raise _TerminatedError

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, raises)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _copy(stream: IO[str], number: int) -> None:
    for line in stream:
        sys.stdout.write(f"[{number}] {line}")
        sys.stdout.flush()


def _wait(running: Sequence[subprocess.Popen[str]], timeout: float | None) -> int:
    end = None if timeout is None else time.monotonic() + timeout
    while True:
        codes = [child.poll() for child in running]
        failed = [(code, number) for number, code in enumerate(codes) if code]
        if failed:
            # Who was killed comes before those that fail for the lack of it.
            code, number = min(failed) if min(failed) < (0, 0) else failed[0]
            how = f"was killed by {_signal_of(-code)}" if code < 0 else f"ended with exit code {code}"
            rest = {0: "", 1: "; the other is ended"}.get(len(codes) - 1, "; the others are ended")
            sys.stderr.write(f"nnx.train.launch: process {number} {how}{rest}\n")
            return code
        if None not in codes:
            return 0
        if end is not None and time.monotonic() > end:
            alive = ", ".join(str(number) for number, code in enumerate(codes) if code is None)
            sys.stderr.write(f"nnx.train.launch: the timeout of {timeout:g} s is over; still running: {alive}\n")
            return 124
        time.sleep(0.05)


def _signal_of(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _end(running: Sequence[subprocess.Popen[str]], grace: float) -> None:
    alive = [child for child in running if child.poll() is None]
    for child in alive:
        child.terminate()
    end = time.monotonic() + grace
    for child in alive:
        try:
            child.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code, that of the first process that failed."""
    parser = argparse.ArgumentParser(
        prog="python -m nnx.train.launch",
        description="Run a Python program as several JAX processes on this machine, connected over loopback. The "
        "program calls nnx.train.launch.initialize() first.",
    )
    parser.add_argument("-n", "--processes", type=int, default=2, help="how many (default: %(default)s)")
    parser.add_argument("-d", "--devices", type=int, default=1, help="CPU devices of each (default: %(default)s)")
    parser.add_argument("--timeout", type=float, help="seconds after which all are ended (default: none)")
    parser.add_argument(
        "--grace", type=float, default=_GRACE, help="seconds from SIGTERM to SIGKILL, to save in (default: %(default)s)"
    )
    parser.add_argument("program", help="a script, or -m and a module", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    program = options.program[1:] if options.program[:1] == ["--"] else options.program
    if not program:
        parser.error("give the program to run: a script, or `-- -m module`")
    try:
        code = launch(
            [sys.executable, *program],
            options.processes,
            devices=options.devices,
            timeout=options.timeout,
            grace=options.grace,
        )
    except ValueError as error:
        parser.error(str(error))
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
