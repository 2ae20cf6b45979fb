"""One picture of a finished run: the curves, the confusion matrix, and the images that the model got wrong."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Curves", "draw_report"]

_TRAIN, _TEST = "#8a93a6", "#1f5fbf"
_SHOWN = 24


class Curves(NamedTuple):
    """What a run measured, by step.

    Attributes:
        train_steps: the steps of the training values.
        train_loss: the mean loss over the epoch that ends there.
        train_accuracy: the mean accuracy over that epoch.
        test_steps: the steps of the test values.
        test_loss: the loss over the test images.
        test_accuracy: the accuracy over the test images.
    """

    train_steps: Sequence[float]
    train_loss: Sequence[float]
    train_accuracy: Sequence[float]
    test_steps: Sequence[float]
    test_loss: Sequence[float]
    test_accuracy: Sequence[float]


def draw_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    curves: Curves,
    images: np.ndarray,
    labels: np.ndarray,
    logits: np.ndarray,
) -> None:
    """Draw the report into a PNG file.

    Args:
        path: the file.
        title: the line at the top.
        curves: what was measured.
        images: [n, 8, 8, 1], the test images.
        labels: [n], their digits.
        logits: [n, 10], what the model gave for them.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure: Any = Figure(figsize=(13, 8.5), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    # Without pyplot: no global state, no window, whatever the user's matplotlib is set to.
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=14, fontweight="bold")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.1))
    loss_axes, accuracy_axes = left.subplots(2, 1, sharex=True)
    confusion, mistakes = right.subfigures(2, 1, height_ratios=(1.45, 1))
    _draw_curves(loss_axes, "loss", curves.train_steps, curves.train_loss, curves.test_steps, curves.test_loss)
    loss_axes.set_yscale("log")
    _draw_curves(
        accuracy_axes, "accuracy", curves.train_steps, curves.train_accuracy, curves.test_steps, curves.test_accuracy
    )
    accuracy_axes.set_ylim(min(0.9, curves.test_accuracy[-1] - 0.02, curves.train_accuracy[-1] - 0.02), 1.003)
    accuracy_axes.set_xlabel("step")
    predicted = logits.argmax(-1)
    _draw_confusion(confusion, labels, predicted)
    _draw_mistakes(mistakes, images, labels, logits, predicted)
    figure.savefig(path, dpi=110)


def _draw_curves(axes: Any, name: str, train_steps: Any, train: Any, test_steps: Any, test: Any) -> None:
    marker = "o" if len(test) < 3 else None
    axes.plot(train_steps, train, color=_TRAIN, marker=marker, markersize=4, label="train (augmented, with dropout)")
    axes.plot(test_steps, test, color=_TEST, marker=marker, markersize=4, linewidth=1.8, label="test")
    axes.set_ylabel(name)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def _draw_confusion(figure: Any, labels: np.ndarray, predicted: np.ndarray) -> None:
    counts = np.zeros((10, 10), int)
    np.add.at(counts, (labels, predicted), 1)
    axes = figure.subplots()
    # By rows, so that digits with more images look no better; and by root, so that a single mistake can be seen.
    shares = np.sqrt(counts / np.maximum(counts.sum(1, keepdims=True), 1))
    right = np.eye(10, dtype=bool)
    axes.imshow(np.ma.masked_where(~right, shares), cmap="Blues", vmin=0, vmax=1.15)
    axes.imshow(np.ma.masked_where(right | (counts == 0), shares), cmap="Reds", vmin=0, vmax=1.15)
    for (row, column), count in np.ndenumerate(counts):
        if count:
            color = "white" if shares[row, column] > 0.6 else "black"
            axes.text(column, row, str(count), ha="center", va="center", fontsize=9, color=color, fontweight="bold")
    axes.set_xticks(range(10))
    axes.set_yticks(range(10))
    axes.set_xlabel("predicted digit")
    axes.set_ylabel("true digit")
    axes.set_title(f"confusion on {len(labels)} test images", fontsize=11)


def _draw_mistakes(
    figure: Any, images: np.ndarray, labels: np.ndarray, logits: np.ndarray, predicted: np.ndarray
) -> None:
    wrong = np.flatnonzero(predicted != labels)
    # The surest mistakes first: they say the most about the model, or about the label.
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    sureness = (shifted / shifted.sum(-1, keepdims=True))[np.arange(len(labels)), predicted]
    wrong = wrong[np.argsort(-sureness[wrong], kind="stable")]
    shown = wrong[:_SHOWN]
    more = f", the surest {len(shown)} shown" if len(shown) < len(wrong) else ""
    figure.suptitle(f"wrong: {len(wrong)} of {len(labels)}{more}", fontsize=11)
    if not len(wrong):
        axes = figure.subplots()
        axes.axis("off")
        axes.text(0.5, 0.5, "none", ha="center", va="center", fontsize=14, color=_TRAIN)
        return
    columns = min(len(shown), 8)
    grid = figure.subplots(-(-len(shown) // columns), columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, index in zip(grid.flat, shown, strict=False):
        axes.imshow(images[index, :, :, 0], cmap="gray_r", vmin=0, vmax=1)
        axes.set_title(
            f"{labels[index]} read as {predicted[index]}\n{sureness[index]:.0%} sure", fontsize=8, color="#b3261e"
        )
