"""Several processes as one: what the first one finds is everyone's, and what fails in one fails in all of them.

Decisions are taken where all processes are at the same line, by collectives of JAX's. In the background, where a
collective would get between those of a training step, they only wait for one another at barriers of the service that
`jax.distributed` has.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

from nnx.core import NnxError, StructureError
from nnx.train._errors import CheckpointError, CheckpointNotFoundError, CorruptError

__all__ = ["agreed", "barrier", "decide", "gather", "is_first", "is_together", "place", "token"]

_T = TypeVar("_T")
_TIMEOUT = 3_600  # seconds: the slowest process may take that much longer to write its part than the fastest one
_MINIMUM = 256  # bytes: of a power of two, so that few sizes are compiled for
_tokens = itertools.count()


def is_together() -> bool:
    """Whether this is one of several processes."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this process is the one that makes and renames folders."""
    return jax.process_index() == 0


def token() -> int:
    """A number that this process has not given before, to name barriers with."""
    return next(_tokens)


def barrier(ocp: Any, name: str) -> None:
    """Wait until every process has come here, on any thread.

    Args:
        ocp: the module `orbax.checkpoint`, which gets at the service.
        name: one that no barrier has had before.
    """
    ocp.multihost.get_barrier_sync_fn()(key=f"nnx checkpoint {name}", timeout_ms=_TIMEOUT * 1000)


def gather(value: Any) -> list[Any]:
    """What each process has, in every process, through JSON."""
    from jax.experimental import multihost_utils

    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.array([len(data)], np.int32))).reshape(-1)
    padded = np.zeros(max(_MINIMUM, 1 << int(sizes.max() - 1).bit_length()), np.uint8)
    padded[: len(data)] = data
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def decide(find: Callable[[], _T]) -> _T:
    """What the first process finds, in every process, and the error if it raises one.

    Args:
        find: called in the first process alone; gives what JSON can hold.
    """
    if not is_together():
        return find()
    found, error = None, None
    if is_first():
        try:
            found = find()
        except Exception as raised:  # noqa: BLE001 - raised below, once the others know of it
            error = raised
    told, problem = gather([found, _told(error)])[0]
    if error is not None:
        raise error
    if problem is not None:
        raise _error(problem)
    result: _T = told
    return result


def agreed(attempt: Callable[[], tuple[_T, Any]]) -> tuple[_T, list[Any]]:
    """What each process does for itself, unless it fails in one of them: then it has failed in all.

    An error that tells of the machine goes before one that tells of the files, which would be put aside for it.

    Args:
        attempt: gives a result, and what the others are to know of it, as JSON holds it.

    Returns:
        The own result, and what there is to know of every process.
    """
    if not is_together():
        result, known = attempt()
        return result, [known]
    mine: tuple[_T, Any] | None = None
    error: Exception | None = None
    try:
        mine = attempt()
    except Exception as raised:  # noqa: BLE001 - as above
        error = raised
    every = gather([mine and mine[1], _told(error)])
    problems = [(number, problem) for number, (_, problem) in enumerate(every) if problem is not None]
    if problems:
        number, worst = min(problems, key=lambda found: found[1]["kind"] == CorruptError.__name__)
        if error is not None and _told(error) == worst:
            raise error
        raise _error(worst, f"in process {number}: ")
    assert mine is not None
    return mine[0], [known for known, _ in every]


_KINDS: dict[str, type[NnxError]] = {
    kind.__name__: kind for kind in (CheckpointError, CheckpointNotFoundError, StructureError)
}


def _told(error: Exception | None) -> Any:
    if error is None:
        return None
    found: dict[str, Any] = {"kind": type(error).__name__, "message": str(error)}
    if isinstance(error, CorruptError):
        found["where"] = [error.step, error.item, error.path]
    elif type(error).__name__ not in _KINDS:
        found["message"] = f"{type(error).__name__}: {error}"
    return found


def _error(told: Any, who: str = "") -> Exception:
    message = who + told["message"]
    if told["kind"] == CorruptError.__name__:
        return CorruptError(message, *told["where"])
    return _KINDS.get(told["kind"], CheckpointError)(message)


def place(array: np.ndarray[Any, Any], sharding: Any) -> jax.Array:
    """An array that every process has as one that they hold together."""
    return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)
