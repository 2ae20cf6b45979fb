"""Which checkpoints are kept: the newest, the best, and every so many steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

__all__ = ["Keep"]


class Keep:
    """The policy.

    Args:
        last: how many of the newest are kept; None for all.
        best: how many of the best are kept; None for none.
        mode: "min" or "max": what is better.
        metric: the name of the metric that decides; None for the first.
        every: the multiples of so many steps are kept for good; None for none.

    Raises:
        ValueError: a number is below 1, or the mode is unknown.
    """

    def __init__(
        self, last: int | None, best: int | None, mode: str, every: int | None, metric: str | None = None
    ) -> None:
        for name, number in (("keep_last", last), ("keep_best", best), ("keep_every", every)):
            if number is not None and number < 1:
                raise ValueError(f"Checkpointer: {name} counts from 1 up, or is None; got {number}")
        if mode not in ("min", "max"):
            raise ValueError(f"Checkpointer: best_mode is 'min' or 'max', got {mode!r}")
        self.last, self.best, self.mode, self.every, self.metric = last, best, mode, every, metric

    def ranked(self, metrics: Mapping[int, Mapping[str, float]]) -> list[int]:
        """The steps from the best on; those without a finite metric are left out."""
        sign = 1 if self.mode == "min" else -1
        named = {step: values.get(self.metric or next(iter(values), "")) for step, values in metrics.items()}
        found = [(sign * value, step) for step, value in named.items() if value is not None]
        finite = [(value, -step) for value, step in found if math.isfinite(value)]
        return [-step for _, step in sorted(finite)]  # of equals the later first

    def removable(self, steps: Sequence[int], metrics: Mapping[int, Mapping[str, float]]) -> list[int]:
        """The steps that no rule keeps."""
        kept = set(steps if self.last is None else steps[-self.last :])
        if self.best is not None:
            kept.update(self.ranked(metrics)[: self.best])
        if self.every is not None:
            kept.update(step for step in steps if step % self.every == 0)
        return [step for step in steps if step not in kept]
