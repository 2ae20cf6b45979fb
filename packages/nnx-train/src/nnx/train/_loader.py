"""ArrayLoader: shuffled batches of arrays in memory, from any point of which the rest can be had again exactly."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from nnx.core import ShapeError, StructureError

__all__ = ["ArrayLoader"]


class ArrayLoader:
    """An iterator over batches of arrays in memory, epoch after epoch, that can be saved and resumed.

    Each epoch has an order of its own, which depends on the seed and the number of the epoch alone, and is the same on
    every machine and under every version of NumPy. A loader set to the state of another gives, bit by bit, the batches
    that the other one would have given.

    Args:
        arrays: a pytree of arrays with a common first axis, `{"image": ..., "label": ...}` say; batches are pytrees of
            NumPy arrays like it.
        batch_size: the number of examples in a batch.
        seed: determines the orders.
        shuffle: whether the order is random; else it is that of the arrays.
        drop_last: whether an epoch's last batch is left out if it is smaller. It is by default, as each size of a batch
            compiles a step anew.
        epochs: the number of epochs after which the iterator ends; None goes on for ever.

    Attributes:
        batches_per_epoch: how many batches an epoch has.
        epoch: the number of the epoch that the next batch is of, from 0; `epochs` at the end.

    Raises:
        ShapeError: there are no arrays, or their first axes differ.
        ValueError: an epoch has no batch, or a number makes no sense.

    Example:
        >>> data = {"x": np.arange(12.0).reshape(6, 2), "y": np.arange(6)}
        >>> loader = nnx.ArrayLoader(data, 2, seed=0, epochs=2)
        >>> [batch["y"].tolist() for batch in loader.one_epoch()]
        [[0, 3], [5, 1], [2, 4]]
        >>> state = loader.get_state()
        >>> [batch["y"].tolist() for batch in loader]
        [[3, 4], [2, 1], [5, 0]]
        >>> loader.set_state(state)
        >>> next(loader)["y"].tolist(), loader.epoch
        ([3, 4], 1)
    """

    def __init__(
        self,
        arrays: Any,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        epochs: int | None = None,
    ) -> None:
        paths, self._treedef = jax.tree_util.tree_flatten_with_path(arrays)
        self._arrays = [np.asarray(array) for _, array in paths]
        names = [jax.tree_util.keystr(path) or "the array" for path, _ in paths]
        self._size = _common_size(names, self._arrays)
        self._batch_size = _at_least("batch_size", batch_size, 1)
        self._seed = _at_least("seed", seed, 0)
        self._shuffle = bool(shuffle)
        self._drop_last = bool(drop_last)
        self._epochs = None if epochs is None else _at_least("epochs", epochs, 1)
        if self.batches_per_epoch == 0:
            raise ValueError(
                f"ArrayLoader: {self._size} examples make no batch of {self._batch_size}; take a smaller batch_size"
                + (", or drop_last=False" if self._size else "")
            )
        self._epoch = 0
        self._position = 0
        self._order: tuple[int, np.ndarray[Any, Any]] | None = None

    @property
    def batches_per_epoch(self) -> int:
        """How many batches an epoch has."""
        whole, rest = divmod(self._size, self._batch_size)
        return whole + (rest > 0 and not self._drop_last)

    @property
    def epoch(self) -> int:
        """The number of the epoch that the next batch is of, from 0."""
        return self._epoch

    def __iter__(self) -> Iterator[Any]:
        """The loader itself: a loop goes on where the last one stopped."""
        return self

    def __next__(self) -> Any:
        """The next batch.

        Raises:
            StopIteration: the last epoch is over.
        """
        if self._epochs is not None and self._epoch >= self._epochs:
            raise StopIteration
        start = self._position
        stop = min(start + self._batch_size, self._size)
        # Copies also where a slice would do: whoever edits a batch must not edit the data.
        chosen = self._permutation()[start:stop] if self._shuffle else slice(start, stop)
        batch = [array[chosen] if self._shuffle else array[chosen].copy() for array in self._arrays]
        left = self._size - stop
        if left == 0 or (self._drop_last and left < self._batch_size):
            self._epoch, self._position = self._epoch + 1, 0
        else:
            self._position = stop
        return jax.tree.unflatten(self._treedef, batch)

    def one_epoch(self) -> Iterator[Any]:
        """The batches that are left of the epoch under way; the next call gives those of the next epoch.

        A loop for each epoch that may be interrupted and resumed within one:

            while loader.epoch < 10:
                for batch in loader.one_epoch():
                    step(state, batch)
                evaluate(state)
        """
        epoch = self._epoch
        while self._epoch == epoch:
            try:
                batch = next(self)
            except StopIteration:
                return
            yield batch

    def reset(self) -> None:
        """Go back to the first epoch's first batch."""
        self._epoch = self._position = 0

    def get_state(self) -> dict[str, Any]:
        """Where the loader is, and what that depends on, as JSON holds it."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "size": self._size,
            "seed": self._seed,
            "shuffle": self._shuffle,
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go to where another loader was.

        Batch size, `drop_last` and `epochs` may differ from that loader's: the next batch starts at the same example.

        Args:
            state: what its `get_state` gave.

        Raises:
            StructureError: the state is of other data or of another order; nothing is changed.
        """
        own = self.get_state()
        if not isinstance(state, Mapping) or own.keys() != state.keys():
            keys = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
            raise StructureError(f"ArrayLoader.set_state takes what get_state gave, with {sorted(own)}; got {keys}")
        wrong = [
            f"{name} {state[name]!r}, here {own[name]!r}"
            for name in ("size", "seed", "shuffle")
            if state[name] != own[name]
        ]
        if wrong:
            raise StructureError(
                f"ArrayLoader.set_state: the state is of another loader: {'; '.join(wrong)}. Make the loader as it was "
                "made then, with the same data"
            )
        epoch, position = operator.index(state["epoch"]), operator.index(state["position"])
        if epoch < 0 or not 0 <= position < self._size:
            raise StructureError(
                f"ArrayLoader.set_state: no example {position} of {self._size} in epoch {epoch}: the state is damaged"
            )
        if self._drop_last and self._size - position < self._batch_size:
            epoch, position = epoch + 1, 0
        self._epoch, self._position = epoch, position

    def _permutation(self) -> np.ndarray[Any, Any]:
        """The order of the epoch under way."""
        if self._order is None or self._order[0] != self._epoch:
            # NumPy's own shuffles may change from version to version. The raw stream of a bit generator does not.
            bits = np.random.Philox(np.random.SeedSequence([self._seed, self._epoch])).random_raw(self._size)
            self._order = self._epoch, np.argsort(bits, kind="stable")
        return self._order[1]

    def __repr__(self) -> str:
        of = "" if self._epochs is None else f" of {self._epochs}"
        return (
            f"ArrayLoader({self._size} examples, batch_size={self._batch_size}, epoch {self._epoch}{of}, "
            f"at example {self._position})"
        )


def _common_size(names: list[str], arrays: list[np.ndarray[Any, Any]]) -> int:
    if not arrays:
        raise ShapeError("ArrayLoader: there are no arrays")
    if scalars := [name for name, array in zip(names, arrays, strict=True) if array.ndim == 0]:
        raise ShapeError(f"ArrayLoader: {', '.join(scalars)} has no axis of examples")
    sizes = {name: len(array) for name, array in zip(names, arrays, strict=True)}
    if len({*sizes.values()}) > 1:
        raise ShapeError(
            "ArrayLoader: the arrays have different numbers of examples: "
            + ", ".join(f"{name} {size}" for name, size in sizes.items())
        )
    return len(arrays[0])


def _at_least(name: str, value: Any, least: int) -> int:
    number = operator.index(value)
    if number < least:
        raise ValueError(f"ArrayLoader: {name} is at least {least}, got {number}")
    return number
