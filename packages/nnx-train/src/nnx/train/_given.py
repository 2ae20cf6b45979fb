"""What a Checkpointer is given beside the value, refused before anything is written or read if it cannot be saved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from nnx.train._leaves import Flat

__all__ = ["check_concrete", "floats_of", "method_of", "through_json"]


def through_json(extra: Any) -> Any:
    """What JSON makes of a value, so that what is saved no longer changes; a TypeError if it cannot hold it."""
    try:
        return json.loads(json.dumps(extra))
    except (TypeError, ValueError) as error:
        raise TypeError(f"Checkpointer.save: `extra` must be what JSON can hold: {error}") from error


def check_concrete(items: Mapping[str, Flat]) -> None:
    """Raise a TypeError if a leaf has no data."""
    for flat in items.values():
        for leaf in flat.leaves:
            if isinstance(leaf.value, jax.ShapeDtypeStruct):
                raise TypeError(f"Checkpointer.save: `{leaf.path}` is a ShapeDtypeStruct, which has no data")


def floats_of(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Metrics as floats; a TypeError if one is no number."""
    result = {}
    for name, value in metrics.items():
        try:
            result[str(name)] = float(np.asarray(value).reshape(()))
        except (TypeError, ValueError):
            raise TypeError(f"Checkpointer.save: the metric {name!r} is a number, got {value!r:.60}") from None
    return result


def method_of(data_iter: Any, method: str) -> Any:
    """A method that a data iterator has to have; a TypeError if it has not."""
    found = getattr(data_iter, method, None)
    if not callable(found):
        raise TypeError(
            f"Checkpointer: a data iterator has `get_state` and `set_state`, and a {type(data_iter).__name__} has no "
            f"`{method}`"
        )
    return found
