"""fit: a loop that logs, evaluates, saves, resumes and stops, and waits for the device only where a number is shown."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnx.core import Context, Module, NnxError
from nnx.train import _together as together
from nnx.train._checkpoint import Checkpointer
from nnx.train._errors import CheckpointWarning
from nnx.train._interrupt import Interrupt
from nnx.train._leaves import flatten
from nnx.train._loggers import Logger, TerminalLogger

__all__ = ["FitResult", "NonFiniteError", "fit"]


class NonFiniteError(NnxError, ArithmeticError):
    """A number of a step is infinite or no number.

    Attributes:
        step: the step at which it was seen.
        names: the metrics that are not finite.
        paths: the `/`-joined paths of the arrays of the state that are not finite.
    """

    def __init__(self, step: int, names: Sequence[str], paths: Sequence[str]) -> None:
        shown = ", ".join(f"`{path}`" for path in paths[:10]) + (" ..." if len(paths) > 10 else "")
        super().__init__(
            f"at step {step} {', '.join(f'`{name}`' for name in names)} is not finite; in the state "
            + (f"{len(paths)} arrays are not: {shown}" if paths else "all arrays are")
            + ". Nothing was saved since. Lower the learning rate, clip the gradients, or look at the batch"
        )
        self.step = step
        self.names: tuple[str, ...] = tuple(names)
        self.paths: tuple[str, ...] = tuple(paths)


@dataclasses.dataclass(frozen=True)
class FitResult:
    """What `fit` gives.

    Attributes:
        step: the steps taken in all, those before a resume included.
        state: the state at the end; Modules are those that were passed.
        metrics: the numbers that were logged last, those of the last evaluation included.
        signal: the number of the signal that ended the run early, or None.
    """

    step: int
    state: Any
    metrics: dict[str, float]
    signal: int | None = None


def fit(
    step_fn: Callable[..., Any],
    state: Any,
    data: Iterable[Any],
    *,
    steps: int,
    context: Context | None = None,
    checkpointer: Checkpointer | None = None,
    evaluate: Callable[[Any], Mapping[str, Any]] | None = None,
    evaluate_every: int | None = None,
    log_every: int = 100,
    loggers: Sequence[Logger] | None = None,
    progress: bool | None = None,
    check_finite: bool = True,
) -> FitResult:
    """Train.

    Calls `step_fn(state, batch)`, or `step_fn(state, batch, context)`, until `steps` steps are taken. In the functional
    style (the state is a TrainState, a State or another pytree of arrays) it returns `(state, metrics)`; in the lifted
    style (the state is a Module, an Optimizer, or a pytree of those) it changes the state in place and returns the
    metrics. Metrics are a dict of scalars, which stay on the device until they are logged.

    With a `checkpointer`, the newest checkpoint is restored first, so the same program run again goes on where it
    stopped, and the loggers forget what they were told of later steps; the state, the context, the position of the data
    and the number of steps are saved when the checkpointer says so and at the end. SIGTERM and Ctrl-C let the step end,
    save, and return; a second one ends the program.

    With several processes of `jax.distributed`, each calls this with the same arguments. The first one alone logs. A
    signal that one of them gets ends all, after the same step: a multiple of `log_every`, at which they agree on it.

    Args:
        step_fn: one step; compiled by `nnx.jit` or `jax.jit`.
        state: what is trained.
        data: batches: an iterator, or an iterable that is gone through again when it ends. What has `get_state` and
            `set_state`, the data or the iterator that they give, has its position saved and restored.
        steps: the steps in all.
        context: handed to each step, and saved.
        checkpointer: where to save; None to save nothing. The best are those of its `best_metric`, or of the step's
            metric "loss".
        evaluate: `evaluate(state)` gives a dict of scalars.
        evaluate_every: after how many steps; None for the end alone.
        log_every: after how many steps metrics are logged.
        loggers: where to; None for the terminal.
        progress: whether to show a progress bar; None shows it on a terminal only.
        check_finite: whether to stop if a metric that is logged, or that belongs to a step that is saved, is infinite
            or no number.

    Returns:
        The state and the last metrics.

    Raises:
        NonFiniteError: a metric is not finite; the last good checkpoint is not touched.
        ValueError: a number of steps is not positive, or the data are empty.
        CheckpointError: saving failed, now or in the background.

    Example:
        >>> import jax.numpy as jnp, nnx, optax
        >>> model = nnx.Linear(2, 1, ctx=nnx.context(0))
        >>> optimizer = nnx.Optimizer(model, optax.sgd(0.1))
        >>> @nnx.jit
        ... def step(state, batch):
        ...     model, optimizer = state
        ...     loss, grads = nnx.value_and_grad(lambda model: ((model(batch) - 1) ** 2).mean())(model)
        ...     optimizer.update(model, grads)
        ...     return {"loss": loss}
        >>> result = nnx.fit(step, (model, optimizer), [jnp.ones((4, 2))], steps=50, log_every=50, loggers=[])
        >>> result.step, result.metrics["loss"] < 1e-3
        (50, True)
    """
    for name, number in (("steps", steps), ("log_every", log_every), ("evaluate_every", evaluate_every)):
        if number is not None and number < 1:
            raise ValueError(f"fit: {name} is positive, got {number}")
    loggers = [TerminalLogger()] if loggers is None else list(loggers)
    if not together.is_first():
        loggers, progress = [], False
    run = _Run(step_fn, state, data, context, checkpointer, loggers)
    run.log_every, run.evaluate_every, run.evaluate = log_every, evaluate_every, evaluate
    run.check_finite = check_finite
    try:
        return run.run(steps, progress)
    finally:
        for logger in run.loggers:
            logger.close()


def _is_object(value: Any) -> bool:
    return isinstance(value, (Module, Context))


class _Run:
    """One run."""

    log_every: int
    evaluate_every: int | None
    evaluate: Callable[[Any], Mapping[str, Any]] | None
    check_finite: bool

    def __init__(
        self,
        step_fn: Callable[..., Any],
        state: Any,
        data: Iterable[Any],
        context: Context | None,
        checkpointer: Checkpointer | None,
        loggers: list[Logger],
    ) -> None:
        self.step_fn, self.state, self.context = step_fn, state, context
        self.checkpointer, self.loggers = checkpointer, loggers
        self.in_place = any(map(_is_object, jax.tree.leaves(state, is_leaf=_is_object)))
        self.several = together.is_together()
        self.more = () if context is None else (context,)
        self.batches = _Batches(data)
        self.step = 0
        self.last: Mapping[str, Any] = {}
        self.shown: dict[str, float] = {}

    def run(self, steps: int, progress: bool | None) -> FitResult:
        self._resume()
        with Interrupt() as interrupt, _bar(steps, self.step, progress) as bar:
            while self.step < steps and not self._is_told_to_stop(interrupt):
                out = self.step_fn(self.state, next(self.batches), *self.more)
                if self.in_place:
                    self.last = out
                else:
                    self.state, self.last = out
                self.step += 1
                bar.update(1)
                if self.step % self.log_every == 0 or self.step == steps:
                    self._log(bar)
                if self.evaluate is not None and (
                    self.step == steps or (self.evaluate_every is not None and self.step % self.evaluate_every == 0)
                ):
                    self._evaluate()
                if self.checkpointer is not None and self.checkpointer.should_save(self.step):
                    self._save()
            if self.checkpointer is not None and self.step:
                self._save()
                self.checkpointer.wait()
        return FitResult(self.step, self.state, self.shown, interrupt.signal)

    def _is_told_to_stop(self, interrupt: Interrupt) -> bool:
        if not self.several:
            return interrupt.signal is not None
        if self.step % self.log_every:
            return False
        # Signals come to processes at different steps, or to one alone; all have to stop after the same one.
        interrupt.signal = max(together.gather(interrupt.signal or 0)) or None
        return interrupt.signal is not None

    def _resume(self) -> None:
        if self.checkpointer is None:
            return
        if not self.checkpointer.empty:
            restored = self.checkpointer.restore(
                like=self.state, context=self.context, data_iter=self.batches.positioned
            )
            self.step, self.state = restored.step, restored.value
            if self.batches.positioned is None:
                warnings.warn(
                    f"fit goes on at step {self.step}, and the data begin anew: what has no `get_state` and "
                    "`set_state` has no position to save. An nnx.ArrayLoader and the iterators of grain have one",
                    CheckpointWarning,
                    stacklevel=4,
                )
        # A life that ended before its first save has logged steps that are taken again as well.
        for logger in self.loggers:
            logger.resume(self.step)

    def _numbers(self, values: Mapping[str, Any]) -> dict[str, float]:
        numbers = {name: float(value) for name, value in jax.device_get(dict(values)).items()}
        bad = [name for name, value in numbers.items() if not math.isfinite(value)]
        if bad and self.check_finite:
            raise NonFiniteError(self.step, bad, _not_finite(self.state))
        return numbers

    def _write(self, values: dict[str, float]) -> None:
        self.shown = {**self.shown, **values}
        for logger in self.loggers:
            logger.log(self.step, values)

    def _log(self, bar: Any) -> None:
        values = self._numbers(self.last)
        self._write(values)
        bar.set_postfix(values, refresh=False)

    def _evaluate(self) -> None:
        assert self.evaluate is not None
        self._write(self._numbers(self.evaluate(self.state)))

    def _save(self) -> None:
        assert self.checkpointer is not None
        if self.step in self.checkpointer.steps:
            return
        metrics = self._numbers(self.last)  # a state that went bad is not saved over good ones
        # `jax.jit` sorts them by name, and the first is what the best checkpoints are chosen by.
        first = {"loss": metrics["loss"]} if "loss" in metrics else {}
        self.checkpointer.save(
            self.step,
            self.state,
            context=self.context,
            data_iter=self.batches.positioned,
            metrics={**first, **metrics, **{n: value for n, value in self.shown.items() if n not in metrics}},
            force=True,
        )


class _Batches:
    """Batches without an end: what can be gone through again is.

    Attributes:
        positioned: what has the position, the data or the iterator of it at hand; None if neither has one.
    """

    def __init__(self, data: Iterable[Any]) -> None:
        self._data = data
        self.positioned: Any = None
        self._begin()

    def _begin(self) -> None:
        self._iterator = iter(self._data)
        has_one = (item for item in (self._data, self._iterator) if _has_position(item))
        self.positioned = next(has_one, None)

    def __next__(self) -> Any:
        try:
            return next(self._iterator)
        except StopIteration:
            self._begin()
        try:
            return next(self._iterator)
        except StopIteration:
            raise ValueError("fit: the data are empty, or an iterator that has come to its end") from None


def _has_position(item: Any) -> bool:
    return hasattr(item, "get_state") and hasattr(item, "set_state")


def _bar(steps: int, done: int, progress: bool | None) -> Any:
    from tqdm import tqdm

    # `None` leaves it to tqdm, which is quiet where there is no terminal.
    quiet = None if progress is None else not progress
    return tqdm(total=steps, initial=done, unit="step", disable=quiet, smoothing=0.1)


def _not_finite(state: Any) -> list[str]:
    return [leaf.path for leaf in flatten(state, "the state").leaves if not _finite(leaf.value)]


def _finite(value: Any) -> bool:
    if not isinstance(value, (jax.Array, np.ndarray)) or not jnp.issubdtype(value.dtype, jnp.inexact):
        return True
    return bool(jnp.isfinite(value).all())
