"""Metrics of classifiers: the share that is right, among the best k, and what precision and recall are made of."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from nnx.core import ShapeError
from nnx.train import _sums as sums
from nnx.train._metric import Metric, check_weights, new_sum, real_array, spread, weights_of
from nnx.train._metrics import Mean

__all__ = ["Accuracy", "BinaryPrecision", "BinaryRecall", "F1", "TopKAccuracy"]


def _check(metric: Metric, logits: Any, labels: Any, *, binary: bool) -> tuple[jax.Array, jax.Array]:
    """Logits and labels as arrays that fit."""
    kind = type(metric).__name__
    logits, labels = real_array(logits, f"{kind}: logits"), real_array(labels, f"{kind}: labels")
    if jnp.issubdtype(labels.dtype, jnp.floating):
        raise TypeError(f"{kind}: labels are integers, got {labels.dtype}; of one-hot labels take `labels.argmax(-1)`")
    if binary and logits.shape != labels.shape:
        raise ShapeError(f"{kind}: expected logits and labels of one shape, got {logits.shape} and {labels.shape}")
    if not binary and (logits.ndim == 0 or logits.shape[:-1] != labels.shape):
        raise ShapeError(
            f"{kind}: expected logits [..., classes] and labels of that shape without the last axis, got "
            f"{logits.shape} and {labels.shape}"
        )
    return logits, labels


class Accuracy(Mean):
    """The share of examples whose label is the class of the largest logit, or the side of a threshold.

    Args:
        threshold: None for several classes. For two, what a logit of the class 1 exceeds: 0.0 for logits, 0.5 for
            probabilities.

    Example:
        >>> accuracy = nnx.Accuracy()
        >>> accuracy.update(logits=jnp.array([[0.1, 0.9], [0.8, 0.2]]), labels=jnp.array([1, 1]))
        >>> print(accuracy.compute())
        0.5
    """

    def __init__(self, threshold: float | None = None) -> None:
        super().__init__()
        self.threshold: float | None = None if threshold is None else float(threshold)

    def update(self, *, logits: Any, labels: Any, mask: Any = None, weights: Any = None, **_: Any) -> None:
        """Count a batch.

        Args:
            logits: [..., classes]; with a threshold [...].
            labels: integers, [...].
            mask: booleans, of the first axes of the labels: those under False are not counted.
            weights: real numbers of the first axes of the labels, how often each counts.
            **_: is ignored.

        Raises:
            TypeError: an argument has a wrong type.
            ShapeError: the shapes don't fit.
        """
        logits, labels = _check(self, logits, labels, binary=self.threshold is not None)
        if self.threshold is None:
            correct = jnp.argmax(logits, -1) == labels
        else:
            correct = (logits > self.threshold) == (labels > 0)
        self._add(correct, mask, weights, "Accuracy: `labels`")


class TopKAccuracy(Mean):
    """The share of examples whose label is among the classes of the k largest logits.

    Of equal logits the first count as the larger ones, so that a constant model is not always right.

    Args:
        k: how many classes may be named.

    Raises:
        ValueError: k is less than 1.

    Example:
        >>> top2 = nnx.TopKAccuracy(2)
        >>> top2.update(logits=jnp.array([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]]), labels=jnp.array([1, 2]))
        >>> print(top2.compute())
        0.5
    """

    def __init__(self, k: int = 5) -> None:
        super().__init__()
        if k < 1:
            raise ValueError(f"TopKAccuracy: k counts classes from 1 up, got {k}")
        self.k = k

    def update(self, *, logits: Any, labels: Any, mask: Any = None, weights: Any = None, **_: Any) -> None:
        """Count a batch; the arguments are those of `Accuracy.update`.

        Raises:
            TypeError: an argument has a wrong type.
            ShapeError: the shapes don't fit, or there are fewer than k classes.
        """
        logits, labels = _check(self, logits, labels, binary=False)
        if logits.shape[-1] < self.k:
            raise ShapeError(f"TopKAccuracy: k={self.k} of {logits.shape[-1]} classes, logits have {logits.shape}")
        best = jax.lax.top_k(logits, self.k)[1]
        self._add(jnp.any(best == labels[..., None], -1), mask, weights, "TopKAccuracy: `labels`")


@jax.jit
def _add_hits(totals: tuple[jax.Array, ...], predicted: jax.Array, actual: jax.Array, mask: Any, weights: Any) -> Any:
    """Count true, predicted and actual positives, each by class, and examples.

    `predicted` and `actual` are booleans, [n, classes].
    """
    each = None if weights is None else weights_of(actual.shape[:1], mask, weights)
    every = jnp.ones(actual.shape[:1], bool) if mask is None else mask

    def add(total: jax.Array, hits: jax.Array) -> jax.Array:
        if each is None:
            return sums.add_count(total, jnp.sum(hits & spread(every, hits.shape), 0, dtype=jnp.int32))
        return sums.add(total, jnp.sum(jnp.where(hits, spread(each, hits.shape), 0.0), 0))

    hits = (predicted & actual, predicted, actual, jnp.ones_like(every))
    return tuple(add(total, hit) for total, hit in zip(totals, hits, strict=True))


class _Counts(Metric):
    """Counts of true, predicted and actual positives."""

    true_positives: jax.Array
    predicted_positives: jax.Array
    actual_positives: jax.Array
    count: jax.Array

    def __init__(self, threshold: float, num_classes: int | None = None) -> None:
        self.threshold: float = float(threshold)
        self.num_classes = num_classes
        shape = (1 if num_classes is None else num_classes,)
        self.true_positives = new_sum(shape)
        self.predicted_positives = new_sum(shape)
        self.actual_positives = new_sum(shape)
        self.count = new_sum()

    def update(self, *, logits: Any, labels: Any, mask: Any = None, weights: Any = None, **_: Any) -> None:
        """Count a batch.

        Args:
            logits: [...], or [..., classes] where there are several.
            labels: integers, [...].
            mask: booleans, of the first axes of the labels: those under False are not counted.
            weights: real numbers of the first axes of the labels, how often each counts.
            **_: is ignored.

        Raises:
            TypeError: an argument has a wrong type.
            ShapeError: the shapes don't fit.
        """
        kind, classes = type(self).__name__, self.num_classes
        logits, labels = _check(self, logits, labels, binary=classes is None)
        mask, weights = check_weights(labels.shape, mask, weights, f"{kind}: `labels`")
        mask, weights = (None if x is None else spread(x, labels.shape).reshape(-1) for x in (mask, weights))
        labels = labels.reshape(-1, 1)
        if classes is None:
            predicted, actual = logits.reshape(-1, 1) > self.threshold, labels > 0
        elif logits.shape[-1] != classes:
            raise ShapeError(f"{kind}: expected logits of {classes} classes, got {logits.shape}")
        else:
            every = jnp.arange(classes)[None]
            predicted, actual = jnp.argmax(logits, -1).reshape(-1, 1) == every, labels == every
        totals = (self.true_positives, self.predicted_positives, self.actual_positives, self.count)
        totals = _add_hits(totals, predicted, actual, mask, weights)
        self.true_positives, self.predicted_positives, self.actual_positives, self.count = totals

    def _ratio(self, above: jax.Array, below: jax.Array) -> jax.Array:
        """By class: 0 where nothing is below, NaN if nothing was seen."""
        value = jnp.where(below > 0, above / jnp.where(below > 0, below, 1.0), 0.0)
        return jnp.where(sums.to_float(self.count) > 0, value, jnp.nan)


class BinaryPrecision(_Counts):
    """Of the examples that were called positive, the share that is: `TP / (TP + FP)`.

    Args:
        threshold: what the logit of a positive exceeds: 0.0 for logits, 0.5 for probabilities.

    Example:
        >>> precision = nnx.BinaryPrecision()
        >>> precision.update(logits=jnp.array([2.0, 1.0, -1.0]), labels=jnp.array([1, 0, 1]))
        >>> print(precision.compute())
        0.5
    """

    def __init__(self, threshold: float = 0.0) -> None:
        super().__init__(threshold)

    def compute(self) -> jax.Array:
        """The precision, a float32: 0 if nothing was called positive, NaN if nothing was seen."""
        return self._ratio(sums.to_float(self.true_positives), sums.to_float(self.predicted_positives))[0]


class BinaryRecall(_Counts):
    """Of the examples that are positive, the share that was called so: `TP / (TP + FN)`.

    Args:
        threshold: what the logit of a positive exceeds: 0.0 for logits, 0.5 for probabilities.

    Example:
        >>> recall = nnx.BinaryRecall(threshold=0.5)
        >>> recall.update(logits=jnp.array([0.9, 0.8, 0.1]), labels=jnp.array([1, 0, 1]))
        >>> print(recall.compute())
        0.5
    """

    def __init__(self, threshold: float = 0.0) -> None:
        super().__init__(threshold)

    def compute(self) -> jax.Array:
        """The recall, a float32: 0 if nothing is positive, NaN if nothing was seen."""
        return self._ratio(sums.to_float(self.true_positives), sums.to_float(self.actual_positives))[0]


class F1(_Counts):
    """The harmonic mean of precision and recall, `2 TP / (2 TP + FP + FN)`, of two classes or of each of several.

    Args:
        num_classes: None for two classes, of which 1 is the positive one and `logits` have the shape of the labels.
        threshold: what the logit of a positive exceeds: 0.0 for logits, 0.5 for probabilities. For two classes only.
        average: "macro" is the mean over the classes that occur, as labels or predictions; None gives each class's own,
            0 for one that does not occur.

    Raises:
        ValueError: `num_classes` is less than 2, or the average is not known.

    Example:
        >>> f1 = nnx.F1(num_classes=3)
        >>> logits = jax.nn.one_hot(jnp.array([0, 1, 1, 0]), 3)
        >>> f1.update(logits=logits, labels=jnp.array([0, 1, 1, 1]))
        >>> print(f"{f1.compute():.4f}")
        0.7333
    """

    def __init__(
        self, num_classes: int | None = None, *, threshold: float = 0.0, average: Literal["macro"] | None = "macro"
    ) -> None:
        if num_classes is not None and num_classes < 2:
            raise ValueError(f"F1: num_classes counts from 2 up, or is None for two classes; got {num_classes}")
        if average not in ("macro", None):
            raise ValueError(f"F1: average is 'macro' or None, got {average!r}")
        super().__init__(threshold, num_classes)
        self.average = average

    def compute(self) -> jax.Array:
        """The F1 score, a float32, or [classes] without an average; NaN if nothing was seen."""
        occurs = sums.to_float(self.predicted_positives) + sums.to_float(self.actual_positives)
        scores = self._ratio(2 * sums.to_float(self.true_positives), occurs)
        if self.num_classes is None:
            return scores[0]
        if self.average is None:
            return scores
        return jnp.sum(scores) / jnp.maximum(jnp.sum(occurs > 0), 1)
