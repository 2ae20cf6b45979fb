"""Recurrent layers: a cell over a sequence in one loop, forwards, backwards or both ways."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from nnx.core import Context, Module, ModuleDef, ShapeError, State
from nnx.layers._explicit import lead, like
from nnx.layers._recurrent_cells import Carry

__all__ = ["RNN", "Bidirectional"]


class RNN(Module):
    """Applies a cell over the time axis of its inputs: `carry, y[t] = cell(carry, x[t])` for each `t`.

    The loop is one `jax.lax.scan`, compiled once for equal cells and shapes, in which the cell may read its Variables,
    not write them.

    Steps past the end of a sequence, by `seq_lengths`, are ignored: the carry stays what it was at the end, outputs are
    0, and what the inputs hold there, NaN included, reaches neither results nor gradients.

    Attributes:
        cell: the cell.

    Reference: Werbos, 1990, Backpropagation Through Time: What It Does and How to Do It, Proc. IEEE 78(10).

    Example:
        >>> import nnx, jax.numpy as jnp
        >>> layer = nnx.RNN(nnx.GRUCell(3, 4, ctx=nnx.context(0)), return_carry=True)
        >>> carry, y = layer(jnp.ones((2, 5, 3)), seq_lengths=jnp.array([5, 2]))
        >>> carry.shape, y.shape
        ((2, 4), (2, 5, 4))
        >>> bool((carry[1] == y[1, 1]).all()), bool((y[1, 2:] == 0).all())
        (True, True)
    """

    def __init__(
        self,
        cell: Any,
        *,
        time_major: bool = False,
        return_carry: bool = False,
        reverse: bool = False,
        keep_order: bool = False,
        unroll: int = 1,
    ) -> None:
        """Makes the layer.

        Args:
            cell: an LSTMCell, a GRUCell, or any Module with the methods of `RNNCellBase`.
            time_major: whether the time axis comes first, and not just before the features.
            return_carry: whether a call also returns the last carry.
            reverse: whether to start from the end of each sequence.
            keep_order: whether outputs of a reversed sequence stand at the time of their inputs, and not in the order
                in which they were computed.
            unroll: the number of steps in one iteration of the compiled loop.
        """
        self.cell = cell
        self.time_major = time_major
        self.return_carry = return_carry
        self.reverse = reverse
        self.keep_order = keep_order
        self.unroll = unroll

    def __call__(
        self,
        inputs: jax.Array,
        *,
        initial_carry: Carry | None = None,
        seq_lengths: jax.Array | None = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
        ctx: Context | None = None,
    ) -> Any:
        """Applies the cell over time. Options given here override those of the constructor.

        Args:
            inputs: [*batch, time, in_features], or [time, *batch, in_features] if `time_major`.
            initial_carry: the carry to start from; `None` lets the cell make one.
            seq_lengths: integers, [*batch]: the number of steps in each sequence; `None` means that all are real.
            return_carry: whether to return the last carry too.
            time_major: whether the time axis comes first.
            reverse: whether to start from the end of each sequence.
            keep_order: whether outputs of a reversed sequence stand at the time of their inputs.
            ctx: handed to the cell's `initialize_carry`.

        Returns:
            The outputs, [*batch, time, hidden_features] or with time first; or the pair `(carry, outputs)`, the carry
            being the one after the last step of each sequence.

        Raises:
            ShapeError: `inputs`, `seq_lengths` or `initial_carry` have another shape than the layer expects.
        """
        kind, cell = type(self).__name__, self.cell
        return_carry = self.return_carry if return_carry is None else return_carry
        time_major = self.time_major if time_major is None else time_major
        reverse = self.reverse if reverse is None else reverse
        keep_order = self.keep_order if keep_order is None else keep_order

        features: int = cell.num_feature_axes
        if inputs.ndim <= features:
            axes = "[time, *batch, features]" if time_major else "[*batch, time, features]"
            raise ShapeError(
                f"{kind}: expected `inputs` of shape {axes}, with at least {features + 1} axes for a"
                f" {type(cell).__name__}, got {tuple(inputs.shape)}"
            )
        time_axis = 0 if time_major else inputs.ndim - features - 1
        x = jnp.moveaxis(inputs, time_axis, 0)
        valid = None
        if seq_lengths is not None:
            valid = self._valid(jnp.asarray(seq_lengths), x.shape[0], x.shape[1 : x.ndim - features])
            x = _where(valid, x, 0)

        carry = initial_carry
        if carry is None:
            batch = range(1, x.ndim - features)
            carry = jax.tree.map(lambda leaf: lead(leaf, x, batch), cell.initialize_carry(x.shape[1:], ctx))
        state, definition = cell.partition()
        # Nobody sees what the carry becomes past the end, unless it is asked for, or more steps of the sequence follow.
        # It must not overflow there: where outputs are masked, gradients would be 0 times infinity.
        keep = valid if return_carry or reverse or not getattr(cell, "is_bounded", False) else None
        carry, outputs = _scan(definition, state, carry, x, keep, reverse, self.unroll)
        if valid is not None and keep is None:
            outputs = jax.tree.map(lambda y: _where(valid, y, 0), outputs)
        if reverse and not keep_order:
            outputs = jax.tree.map(lambda y: _flip(y, seq_lengths), outputs)
        outputs = jax.tree.map(lambda y: jnp.moveaxis(y, 0, time_axis), outputs)
        return (carry, outputs) if return_carry else outputs

    def _valid(self, seq_lengths: jax.Array, steps: int, batch: tuple[int, ...]) -> jax.Array:
        """Whether a step is within its sequence, [time, *batch]."""
        if not jnp.issubdtype(seq_lengths.dtype, jnp.integer) or seq_lengths.shape != batch:
            raise ShapeError(
                f"{type(self).__name__}: expected `seq_lengths` of shape {batch} ([*batch]) and an integer dtype, got"
                f" {tuple(seq_lengths.shape)} and {seq_lengths.dtype.name}"
            )
        return lax.broadcasted_iota(seq_lengths.dtype, (steps, *batch), 0) < jnp.expand_dims(seq_lengths, 0)


# A compiled function of the cell's definition and State, inlined where it is used: a loop over the cell itself would be
# a new one to JAX at each call, which outside of `jit` means to compile it each time.
@functools.partial(jax.jit, static_argnums=(0, 5, 6), inline=True)
def _scan(
    definition: ModuleDef[Any],
    state: State,
    carry: Carry,
    xs: jax.Array,
    valid: jax.Array | None,
    reverse: bool,
    unroll: int,
) -> tuple[Carry, Any]:
    """The last carry and the outputs, time first, of a loop over `xs`.

    Where not `valid`, the carry stays and outputs are 0.
    """
    cell: Any = definition.merge(state)

    def step(carry: Carry, now: tuple[jax.Array, jax.Array | None]) -> tuple[Carry, Any]:
        x, valid = now
        new, y = cell(carry, x)
        new = jax.tree.map(like, new, carry)  # on explicit axes, a loop wants the carry to stay where it is
        if valid is not None:
            new = jax.tree.map(lambda new, old: _where(valid, new, old), new, carry)
            y = jax.tree.map(lambda y: _where(valid, y, 0), y)
        return new, y

    # A loop wants the carry to keep its shapes and dtypes. A first carry narrower than what is computed is widened.
    now = jax.ShapeDtypeStruct(xs.shape[1:], xs.dtype)
    after = jax.eval_shape(lambda carry, now: cell(carry, now)[0], carry, now)
    if jax.tree.map(jnp.shape, carry) != jax.tree.map(jnp.shape, after):
        raise ShapeError(
            f"RNN: a step of {type(cell).__name__} must keep the shape of the carry: it takes"
            f" {jax.tree.map(jnp.shape, carry)} and gives {jax.tree.map(jnp.shape, after)}"
        )
    carry = jax.tree.map(lambda value, like: value.astype(like.dtype), carry, after)
    return lax.scan(step, carry, (xs, valid), reverse=reverse, unroll=unroll)


def _where(valid: jax.Array, x: Any, other: Any) -> Any:
    """`x` where `valid`, which lacks the last axes of `x`, else `other`."""
    return jnp.where(valid.reshape(valid.shape + (1,) * (jnp.ndim(x) - valid.ndim)), x, other)


def _flip(y: jax.Array, seq_lengths: jax.Array | None) -> jax.Array:
    """`y`, time first, with each sequence backwards and its padding still at the end."""
    if seq_lengths is None:
        return jnp.flip(y, 0)
    steps = y.shape[0]
    backwards = jnp.arange(steps - 1, -1, -1).reshape(steps, *(1,) * jnp.ndim(seq_lengths))
    index = (backwards + jnp.expand_dims(jnp.minimum(seq_lengths, steps), 0)) % max(steps, 1)
    return jnp.take_along_axis(y, index.reshape(index.shape + (1,) * (y.ndim - index.ndim)), axis=0)


def concatenate(forward: jax.Array, backward: jax.Array) -> jax.Array:
    """Both outputs side by side: how `Bidirectional` merges them unless told otherwise."""
    return jnp.concatenate([forward, backward], axis=-1)


class Bidirectional(Module):
    """Runs one RNN forwards and another backwards over the same inputs, and merges their outputs time by time.

    `y[t] = merge_fn(forward[t], backward[t])`, where `backward[t]` has seen the sequence from its end down to `t`.

    One RNN given twice is used in both directions, with the same parameters.

    Attributes:
        forward_rnn: the RNN that runs forwards.
        backward_rnn: the RNN that runs backwards.

    Reference: Schuster and Paliwal, 1997, Bidirectional Recurrent Neural Networks, IEEE Trans. Signal Processing 45.

    Example:
        >>> import nnx, jax.numpy as jnp
        >>> ctx = nnx.context(0)
        >>> layer = nnx.Bidirectional(nnx.RNN(nnx.GRUCell(3, 4, ctx=ctx)), nnx.RNN(nnx.GRUCell(3, 4, ctx=ctx)))
        >>> layer(jnp.ones((2, 5, 3))).shape
        (2, 5, 8)
    """

    def __init__(
        self,
        forward_rnn: Any,
        backward_rnn: Any,
        *,
        merge_fn: Callable[[jax.Array, jax.Array], jax.Array] = concatenate,
        time_major: bool = False,
        return_carry: bool = False,
    ) -> None:
        """Makes the layer.

        Args:
            forward_rnn: an RNN; its own options for order and what to return are not asked.
            backward_rnn: an RNN, likewise.
            merge_fn: makes one output of the two; by default they stand side by side in the last axis.
            time_major: whether the time axis comes first, and not just before the features.
            return_carry: whether a call also returns the last carries.
        """
        self.forward_rnn = forward_rnn
        self.backward_rnn = backward_rnn
        self.merge_fn = merge_fn
        self.time_major = time_major
        self.return_carry = return_carry

    def __call__(
        self,
        inputs: jax.Array,
        *,
        initial_carry: tuple[Carry, Carry] | None = None,
        seq_lengths: jax.Array | None = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        ctx: Context | None = None,
    ) -> Any:
        """Applies both RNNs. Options given here override those of the constructor.

        Args:
            inputs: [*batch, time, in_features], or [time, *batch, in_features] if `time_major`.
            initial_carry: the carries to start from, forwards and backwards; `None` lets the cells make them.
            seq_lengths: integers, [*batch]: the number of steps in each sequence; `None` means that all are real.
            return_carry: whether to return the last carries too.
            time_major: whether the time axis comes first.
            ctx: handed to the cells' `initialize_carry`.

        Returns:
            The merged outputs; or the pair `(carries, outputs)`, with the carries of both directions.

        Raises:
            ShapeError: `inputs`, `seq_lengths` or a carry have another shape than the RNNs expect.
        """
        time_major = self.time_major if time_major is None else time_major
        return_carry = self.return_carry if return_carry is None else return_carry
        if initial_carry is not None and (not isinstance(initial_carry, (tuple, list)) or len(initial_carry) != 2):
            raise ShapeError(
                f"{type(self).__name__}: expected `initial_carry` to be a pair of carries (forwards, backwards), got"
                f" {type(initial_carry).__name__}"
            )
        first, second = (None, None) if initial_carry is None else initial_carry
        options: dict[str, Any] = {
            "seq_lengths": seq_lengths,
            "return_carry": return_carry,
            "time_major": time_major,
            "ctx": ctx,
        }
        forward = self.forward_rnn(inputs, initial_carry=first, reverse=False, **options)
        backward = self.backward_rnn(inputs, initial_carry=second, reverse=True, keep_order=True, **options)
        if not return_carry:
            return jax.tree.map(self.merge_fn, forward, backward)
        return (forward[0], backward[0]), jax.tree.map(self.merge_fn, forward[1], backward[1])
