"""Long short-term memory: the cell with one layer to a gate, and the cell with all gates in two layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from nnx.core import Context, ShapeError
from nnx.layers._common import (
    NO_METADATA,
    Metadata,
    PrecisionLike,
    PromoteDtype,
    default_bias_init,
    default_kernel_init,
)
from nnx.layers._dtypes import promote_dtype, widest
from nnx.layers._linear import Linear
from nnx.layers._recurrent_cells import Activation, Cell, default_recurrent_kernel_init, function_of
from nnx.layers.initializers import Initializer

__all__ = ["LSTMCell", "OptimizedLSTMCell"]


class _LSTM(Cell):
    """What both LSTM cells share: the carry, and what is done with the four gates."""

    gate_fn: Activation
    activation_fn: Activation

    def initialize_carry(
        self, input_shape: Sequence[int], ctx: Context | None = None, carry_init: Initializer | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Makes the carry to start from.

        Args:
            input_shape: the shape of the inputs of one time step, [*batch, in_features].
            ctx: gives the keys, from its stream "carry". Not needed where nothing is drawn.
            carry_init: initializer of the carry; `None` is that of the constructor, or else zeros.

        Returns:
            The memory `c` and the output `h`, both [*batch, hidden_features], of the dtype of the parameters.

        Raises:
            ContextError: `carry_init` draws, and there is no stream to draw from.
            ShapeError: the last size of `input_shape` is not `in_features`.
        """
        return self._initial(input_shape, ctx, carry_init), self._initial(input_shape, ctx, carry_init)

    def _check_carry(self, carry: Any, expected: tuple[int, ...], name: str = "`carry`") -> None:
        if not isinstance(carry, (tuple, list)) or len(carry) != 2:
            got = f"shape {jnp.shape(carry)}" if hasattr(carry, "shape") else type(carry).__name__
            raise ShapeError(f"{type(self).__name__}: expected {name} to be a pair of arrays (c, h), got {got}")
        super()._check_carry(carry[0], expected, f"`c` of {name}")
        super()._check_carry(carry[1], expected, f"`h` of {name}")

    def _next(
        self, c: jax.Array, h: jax.Array, gates: Sequence[jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        gate, activation = function_of(self.gate_fn), function_of(self.activation_fn)
        i, f, g, o = gate(gates[0]), gate(gates[1]), activation(gates[2]), gate(gates[3])
        wide = widest(c, h, g)
        c = f.astype(wide) * c.astype(wide) + (i * g).astype(wide)
        h = o.astype(wide) * activation(c)
        return (c, h), h.astype(g.dtype)


class LSTMCell(_LSTM):
    """Long short-term memory, with a layer of its own for each gate.

    ```
    i = sigmoid(x W_ii + h W_hi + b_hi)
    f = sigmoid(x W_if + h W_hf + b_hf)
    g = tanh(x W_ig + h W_hg + b_hg)
    o = sigmoid(x W_io + h W_ho + b_ho)
    c <- f * c + i * g
    h <- o * tanh(c)
    ```

    The carry is `(c, h)` and the output `h`. `OptimizedLSTMCell` computes the same with two products, not eight.

    Attributes:
        ii, if_, ig, io: Linear layers of the inputs, without bias: kernels [in_features, hidden_features].
        hi, hf, hg, ho: Linear layers of `h`: kernels [hidden_features, hidden_features], biases [hidden_features].

    Reference: Hochreiter and Schmidhuber, 1997, Long Short-Term Memory, Neural Computation 9(8).

    Example:
        >>> import nnx, jax.numpy as jnp
        >>> cell = nnx.LSTMCell(3, 4, ctx=nnx.context(0))
        >>> x = jnp.ones((2, 3))
        >>> (c, h), y = cell(cell.initialize_carry(x.shape), x)
        >>> c.shape, y.shape
        ((2, 4), (2, 4))
    """

    ii: Linear
    if_: Linear
    ig: Linear
    io: Linear
    hi: Linear
    hf: Linear
    hg: Linear
    ho: Linear

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        gate_fn: Activation = "sigmoid",
        activation_fn: Activation = "tanh",
        kernel_init: Initializer = default_kernel_init,
        recurrent_kernel_init: Initializer = default_recurrent_kernel_init,
        bias_init: Initializer = default_bias_init,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        carry_init: Initializer | None = None,
        promote_dtype: PromoteDtype = promote_dtype,
        precision: PrecisionLike = None,
        ctx: Context,
        kernel_metadata: Metadata = NO_METADATA,
        recurrent_kernel_metadata: Metadata = NO_METADATA,
        bias_metadata: Metadata = NO_METADATA,
    ) -> None:
        """Makes the cell.

        Args:
            in_features: size of the last axis of the inputs.
            hidden_features: size of the last axis of the carry and of the outputs.
            gate_fn: activation of the gates: the name of an activation of nnx, or a function of an array.
            activation_fn: activation of the memory and of what is added to it.
            kernel_init: initializer of the kernels of the inputs.
            recurrent_kernel_init: initializer of the kernels of `h`; by default orthogonal.
            bias_init: initializer of the biases.
            dtype: dtype to compute in, and of the outputs; `None` takes the common type of inputs and parameters.
            param_dtype: dtype of the parameters, and of the first carry.
            carry_init: initializer of the first carry, unless `initialize_carry` is given one; `None` is zeros.
            promote_dtype: the same option of the Linear layers.
            precision: precision of the products, see `jax.lax.Precision`.
            ctx: gives the keys, from its stream "params".
            kernel_metadata: metadata of the kernels of the inputs.
            recurrent_kernel_metadata: metadata of the kernels of `h`.
            bias_metadata: metadata of the biases.

        Raises:
            ValueError: there is no activation of that name.
        """
        self._set_options(
            in_features,
            hidden_features,
            dtype,
            param_dtype,
            carry_init,
            promote_dtype,
            gate_fn=gate_fn,
            activation_fn=activation_fn,
        )
        options = self._linear_options(precision, ctx)
        for gate in ("i", "f", "g", "o"):
            name = "if_" if gate == "f" else f"i{gate}"  # `if` is a keyword
            of_inputs = Linear(
                in_features,
                hidden_features,
                use_bias=False,
                kernel_init=kernel_init,
                kernel_metadata=kernel_metadata,
                **options,
            )
            setattr(self, name, of_inputs)
        for gate in ("i", "f", "g", "o"):
            of_carry = Linear(
                hidden_features,
                hidden_features,
                kernel_init=recurrent_kernel_init,
                bias_init=bias_init,
                kernel_metadata=recurrent_kernel_metadata,
                bias_metadata=bias_metadata,
                **options,
            )
            setattr(self, f"h{gate}", of_carry)

    def _step(self, carry: tuple[jax.Array, jax.Array], x: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        c, h = carry
        of_inputs = [layer(x) for layer in (self.ii, self.if_, self.ig, self.io)]
        previous = h.astype(of_inputs[0].dtype)
        layers = (self.hi, self.hf, self.hg, self.ho)
        return self._next(c, h, [y + layer(previous) for y, layer in zip(of_inputs, layers, strict=True)])


class OptimizedLSTMCell(_LSTM):
    """Long short-term memory with the four gates in one product of the inputs and one of `h`.

    ```
    i, f, g, o = x W_i + h W_h + b
    c <- sigmoid(f) * c + sigmoid(i) * tanh(g)
    h <- sigmoid(o) * tanh(c)
    ```

    It computes what `LSTMCell` does; the kernels and the bias of the gates i, f, g, o stand side by side.

    Attributes:
        dense_i: Linear of the inputs, without bias: kernel [in_features, 4 * hidden_features].
        dense_h: Linear of `h`: kernel [hidden_features, 4 * hidden_features], bias [4 * hidden_features].

    Reference: Hochreiter and Schmidhuber, 1997, Long Short-Term Memory, Neural Computation 9(8).

    Example:
        >>> import nnx, jax.numpy as jnp
        >>> cell = nnx.OptimizedLSTMCell(3, 4, ctx=nnx.context(0))
        >>> cell.dense_i.kernel.shape
        (3, 16)
        >>> nnx.RNN(cell)(jnp.ones((2, 5, 3))).shape
        (2, 5, 4)
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        gate_fn: Activation = "sigmoid",
        activation_fn: Activation = "tanh",
        kernel_init: Initializer = default_kernel_init,
        recurrent_kernel_init: Initializer = default_recurrent_kernel_init,
        bias_init: Initializer = default_bias_init,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        carry_init: Initializer | None = None,
        promote_dtype: PromoteDtype = promote_dtype,
        precision: PrecisionLike = None,
        ctx: Context,
        kernel_metadata: Metadata = NO_METADATA,
        recurrent_kernel_metadata: Metadata = NO_METADATA,
        bias_metadata: Metadata = NO_METADATA,
    ) -> None:
        """Makes the cell.

        Args:
            in_features: size of the last axis of the inputs.
            hidden_features: size of the last axis of the carry and of the outputs.
            gate_fn: activation of the gates: the name of an activation of nnx, or a function of an array.
            activation_fn: activation of the memory and of what is added to it.
            kernel_init: initializer of the kernel of the inputs.
            recurrent_kernel_init: initializer of the kernel of `h`; by default orthogonal.
            bias_init: initializer of the bias.
            dtype: dtype to compute in, and of the outputs; `None` takes the common type of inputs and parameters.
            param_dtype: dtype of the parameters, and of the first carry.
            carry_init: initializer of the first carry, unless `initialize_carry` is given one; `None` is zeros.
            promote_dtype: the same option of the Linear layers.
            precision: precision of the products, see `jax.lax.Precision`.
            ctx: gives the keys, from its stream "params".
            kernel_metadata: metadata of the kernel of the inputs.
            recurrent_kernel_metadata: metadata of the kernel of `h`.
            bias_metadata: metadata of the bias.

        Raises:
            ValueError: there is no activation of that name.
        """
        self._set_options(
            in_features,
            hidden_features,
            dtype,
            param_dtype,
            carry_init,
            promote_dtype,
            gate_fn=gate_fn,
            activation_fn=activation_fn,
        )
        options = self._linear_options(precision, ctx)
        self.dense_i: Linear = Linear(
            in_features,
            4 * hidden_features,
            use_bias=False,
            kernel_init=kernel_init,
            kernel_metadata=kernel_metadata,
            **options,
        )
        self.dense_h: Linear = Linear(
            hidden_features,
            4 * hidden_features,
            kernel_init=recurrent_kernel_init,
            bias_init=bias_init,
            kernel_metadata=recurrent_kernel_metadata,
            bias_metadata=bias_metadata,
            **options,
        )

    def _step(self, carry: tuple[jax.Array, jax.Array], x: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        c, h = carry
        of_inputs = self.dense_i(x)
        return self._next(c, h, jnp.split(of_inputs + self.dense_h(h.astype(of_inputs.dtype)), 4, axis=-1))
