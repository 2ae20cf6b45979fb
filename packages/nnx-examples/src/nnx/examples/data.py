"""Data for the examples: real, small, and on the machine already, with batches that are a function of seed and step."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

__all__ = ["Digits", "batch_indices", "load_digits"]


class Digits(NamedTuple):
    """Handwritten digits, split for training and testing.

    Attributes:
        train_images: [n_train, 8, 8, 1] float32, between 0 (paper) and 1 (ink).
        train_labels: [n_train] int32, 0 to 9.
        test_images: [n_test, 8, 8, 1] float32.
        test_labels: [n_test] int32.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load_digits(test_size: int = 360) -> Digits:
    """Load scikit-learn's 1,797 scans of handwritten digits; the split is always the same, and even over the digits.

    Args:
        test_size: the number of images held back for testing.

    Source: Alpaydin and Kaynak, 1998, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository.
    """
    # Imported here, as scikit-learn takes longer to import than `--help` should take to print.
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    pixels, labels = load(return_X_y=True)
    images = (pixels.reshape(-1, 8, 8, 1) / 16).astype(np.float32)
    labels = labels.astype(np.int32)
    train, test = train_test_split(np.arange(len(labels)), test_size=test_size, stratify=labels, random_state=0)
    return Digits(images[train], labels[train], images[test], labels[test])


def batch_indices(step: int, *, size: int, batch_size: int, seed: int) -> np.ndarray:
    """The examples of one step's batch.

    Each epoch goes through the data in an order of its own, and leaves out the remainder that fills no batch. The order
    depends on nothing but the arguments, so a run that is resumed sees what it would have seen.

    Args:
        step: steps taken before this one.
        size: the number of examples.
        batch_size: the number of examples in a batch, at most `size`.
        seed: not negative.

    Returns:
        [batch_size] integers below `size`.

    Example:
        >>> epoch = [batch_indices(step, size=12, batch_size=4, seed=0) for step in (3, 4, 5)]
        >>> sorted(np.concatenate(epoch).tolist()) == list(range(12))
        True
    """
    epoch, batch = divmod(step, size // batch_size)
    order = np.random.default_rng((seed, epoch)).permutation(size)
    return order[batch * batch_size : (batch + 1) * batch_size]
