"""One job at a time in the background, whose error is raised at the next occasion and which no exit cuts off."""

from __future__ import annotations

import concurrent.futures.thread  # noqa: F401 - registers its own end first, so that ours comes before it
import sys
import threading
import weakref
from collections.abc import Callable

__all__ = ["LOSES_THREADS_AT_EXIT", "Writer"]

_writers: weakref.WeakSet[Writer] = weakref.WeakSet()

# These start no thread once the program has come to its end (python/cpython#113964, mended in 3.12.3), and a save
# that is under way needs some: what they cannot end at the exit is not left for it.
LOSES_THREADS_AT_EXIT = (3, 12) <= sys.version_info < (3, 12, 3)


class Writer:
    """Runs jobs in turn on a thread.

    Args:
        in_background: whether to use a thread at all. Python 3.12.0 to 3.12.2 use none in any case.
    """

    def __init__(self, *, in_background: bool) -> None:
        self._in_background = in_background and not LOSES_THREADS_AT_EXIT
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        _writers.add(self)

    def submit(self, job: Callable[[], None]) -> None:
        """Run a job once the one before is done.

        Raises:
            BaseException: what the job before raised, or this one if it is not in the background.
        """
        self.wait()
        if not self._in_background:
            job()
            return

        def run() -> None:
            try:
                job()
            except BaseException as error:  # noqa: BLE001 - raised by `check`, in the thread of who saves
                self._error = error

        self._thread = threading.Thread(target=run, name="nnx-checkpoint", daemon=True)
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether a job that has ended raised, and nobody was told."""
        return self._error is not None

    def check(self) -> None:
        """Raise what a job that has ended raised."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self) -> None:
        """Wait for the job, and raise what it raised."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
        self.check()


def _drain() -> None:
    for writer in list(_writers):
        thread = writer._thread
        if thread is not None:
            thread.join()
        if writer._error is not None:
            print(f"nnx: a checkpoint could not be saved: {writer._error}", file=sys.stderr)  # noqa: T201


# Before the pools of other libraries are shut down, which a save in the background works with: `atexit` comes after
# that. The function is private and in every supported Python; without it a program has to call `close`.
_register = getattr(threading, "_register_atexit", None)
if _register is not None:
    _register(_drain)
