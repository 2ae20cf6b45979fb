"""Recurrent cells: one step of a recurrent layer, from a carry and an input to the next carry and an output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from nnx.core import Context, ContextError, Module, ShapeError
from nnx.layers import _activations, initializers
from nnx.layers._common import (
    NO_METADATA,
    Layer,
    Metadata,
    PrecisionLike,
    PromoteDtype,
    check_features,
    default_bias_init,
    default_kernel_init,
)
from nnx.layers._dtypes import promote_dtype, statistics_dtype, widest
from nnx.layers._linear import Linear
from nnx.layers.initializers import Initializer

__all__ = ["GRUCell", "RNNCellBase", "SimpleCell"]

Carry = Any
Activation = str | Callable[[jax.Array], jax.Array]

_orthogonal = initializers.orthogonal()


def default_recurrent_kernel_init(key: jax.Array, shape: Sequence[int], dtype: DTypeLike = jnp.float32, /) -> jax.Array:
    """An orthogonal matrix, drawn in float32 or wider: the decomposition that makes it knows no half precision."""
    return _orthogonal(key, tuple(shape), statistics_dtype(dtype)).astype(dtype)


class RNNCellBase(Module):
    """The base of recurrent cells: `carry, output = cell(carry, inputs)`.

    A cell of your own has `initialize_carry` and `__call__`, and `num_feature_axes` if its features have several axes.

    Reference: Elman, 1990, Finding Structure in Time, Cognitive Science 14(2).

    Example:
        >>> import nnx, jax.numpy as jnp
        >>> class Sum(nnx.RNNCellBase):
        ...     def initialize_carry(self, input_shape, ctx=None, carry_init=None):
        ...         return jnp.zeros(input_shape)
        ...     def __call__(self, carry, inputs):
        ...         return carry + inputs, carry + inputs
        >>> nnx.RNN(Sum())(jnp.ones((3, 1))).tolist()
        [[1.0], [2.0], [3.0]]
    """

    in_features: int
    hidden_features: int

    @property
    def num_feature_axes(self) -> int:
        """The number of last axes of the inputs that are features: the time axis comes before them."""
        return 1

    @property
    def is_bounded(self) -> bool:
        """Whether the carry stays finite over any number of steps with inputs of zeros, whatever the weights.

        RNN then lets sequences that have ended run on if nobody asks for the carry, which is cheaper than to hold it.
        """
        return False

    def initialize_carry(
        self, input_shape: Sequence[int], ctx: Context | None = None, carry_init: Initializer | None = None
    ) -> Carry:
        """Makes the carry to start from.

        Args:
            input_shape: the shape of the inputs of one time step, [*batch, in_features].
            ctx: gives the keys, from its stream "carry". Not needed where nothing is drawn.
            carry_init: initializer of the carry; `None` is zeros.

        Returns:
            An array, [*batch, hidden_features], or a tuple of such, of the dtype of the parameters.

        Raises:
            ContextError: `carry_init` draws, and there is no stream to draw from.
            ShapeError: the last size of `input_shape` is not `in_features`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no `initialize_carry`, which every cell must have")

    def __call__(self, carry: Carry, inputs: jax.Array) -> tuple[Carry, Any]:
        """Takes one step.

        Args:
            carry: as `initialize_carry` makes it.
            inputs: [*batch, in_features].

        Returns:
            The next carry, and the output, [*batch, hidden_features].

        Raises:
            ShapeError: the inputs or the carry have another shape than the cell expects.
        """
        raise NotImplementedError(f"{type(self).__name__} has no `__call__`, which every cell must have")


_GATES = ("sigmoid", "hard_sigmoid")
_BOUNDED = ("tanh", "hard_tanh", "soft_sign")


class Cell(Layer, RNNCellBase):
    """What our cells share: their options, their projections, and carries of [*batch, hidden_features].

    A carry stays in its own dtype or a wider one: it adds up over the steps, where half precision would lose digits.
    Outputs are in the dtype that the cell computes in.
    """

    param_dtype: DTypeLike
    dtype: DTypeLike | None
    carry_init: Initializer | None = None

    @property
    def is_bounded(self) -> bool:
        """Whether the carry stays finite over any number of steps: gates up to 1 mix or add what is itself bounded."""
        options = vars(self)
        return options.get("gate_fn", "sigmoid") in _GATES and options["activation_fn"] in (*_GATES, *_BOUNDED)

    def _set_options(
        self,
        in_features: int,
        hidden_features: int,
        dtype: DTypeLike | None,
        param_dtype: DTypeLike,
        carry_init: Initializer | None,
        promote_dtype: PromoteDtype,
        **activations: Activation,
    ) -> None:
        self.in_features = in_features
        self.hidden_features = hidden_features
        self.dtype = dtype
        self.param_dtype = param_dtype
        self._choose(carry_init=carry_init, promote_dtype=promote_dtype)
        for name, activation in activations.items():
            if isinstance(activation, str) and activation not in _activations.__all__:
                raise ValueError(
                    f"{type(self).__name__}: nnx has no activation {activation!r} for {name}; give the name of one, or"
                    " a function"
                )
            setattr(self, name, activation)

    def _linear_options(self, precision: PrecisionLike, ctx: Context) -> dict[str, Any]:
        """What all projections of the cell are made with."""
        return {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "promote_dtype": self.promote_dtype,
            "precision": precision,
            "ctx": ctx,
        }

    def __call__(self, carry: Carry, inputs: jax.Array) -> tuple[Carry, jax.Array]:
        """Takes one step.

        Args:
            carry: as `initialize_carry` makes it.
            inputs: [*batch, in_features].

        Returns:
            The next carry, and the output, [*batch, hidden_features].

        Raises:
            ShapeError: the inputs or the carry have another shape than the cell expects.
        """
        check_features(self, "inputs", inputs, self.in_features, f"in_features={self.in_features}")
        self._check_carry(carry, (*inputs.shape[:-1], self.hidden_features))
        return self._step(carry, inputs)

    def _step(self, carry: Carry, x: jax.Array) -> tuple[Carry, jax.Array]:
        """`__call__` behind its checks."""
        raise NotImplementedError

    def _check_carry(self, carry: Carry, expected: tuple[int, ...], name: str = "`carry`") -> None:
        if jnp.shape(carry) != expected:
            raise ShapeError(
                f"{type(self).__name__}: expected {name} of shape {expected} ([*batch, hidden_features], as"
                f" `initialize_carry` makes it), got {jnp.shape(carry)}"
            )

    def _initial(self, input_shape: Sequence[int], ctx: Context | None, carry_init: Initializer | None) -> jax.Array:
        kind = type(self).__name__
        shape = tuple(input_shape)
        if not shape or shape[-1] != self.in_features:
            raise ShapeError(
                f"{kind}: expected `input_shape` [*batch, {self.in_features}] (in_features={self.in_features}), got"
                f" {shape}"
            )
        init = self.carry_init if carry_init is None else carry_init
        init = initializers.zeros if init is None else init
        key: Any = None
        if initializers.takes_key(init):
            if ctx is None or not ctx.has_rng("carry"):
                raise ContextError(
                    f"{kind}: `carry_init` draws from the random stream 'carry', and"
                    f" {'no Context was passed' if ctx is None else 'the Context that was passed has none'}. Pass"
                    " `ctx=nnx.context(carry=seed)`"
                )
            key = ctx.make_rng("carry")
        made: jax.Array = init(key, (*shape[:-1], self.hidden_features), self.param_dtype)
        return made


def function_of(activation: Activation) -> Callable[[jax.Array], jax.Array]:
    """The function that an activation is, or that it names."""
    return getattr(_activations, activation) if isinstance(activation, str) else activation


class _OneState(Cell):
    """What the cells share whose carry is a single array, which is also their output."""

    activation_fn: Activation
    dense_i: Linear
    dense_h: Linear

    def initialize_carry(
        self, input_shape: Sequence[int], ctx: Context | None = None, carry_init: Initializer | None = None
    ) -> jax.Array:
        """Makes the carry to start from.

        Args:
            input_shape: the shape of the inputs of one time step, [*batch, in_features].
            ctx: gives the key, from its stream "carry". Not needed where nothing is drawn.
            carry_init: initializer of the carry; `None` is that of the constructor, or else zeros.

        Returns:
            [*batch, hidden_features], of the dtype of the parameters.

        Raises:
            ContextError: `carry_init` draws, and there is no stream to draw from.
            ShapeError: the last size of `input_shape` is not `in_features`.
        """
        return self._initial(input_shape, ctx, carry_init)

    def _set_layers(
        self,
        multiple: int,
        kernel_init: Initializer,
        recurrent_kernel_init: Initializer,
        bias_init: Initializer,
        precision: PrecisionLike,
        ctx: Context,
        kernel_metadata: Metadata,
        recurrent_kernel_metadata: Metadata,
        bias_metadata: Metadata,
    ) -> None:
        """Makes `dense_i` and `dense_h`; their sum needs but one bias."""
        options = self._linear_options(precision, ctx)
        self.dense_i = Linear(
            self.in_features,
            multiple * self.hidden_features,
            kernel_init=kernel_init,
            bias_init=bias_init,
            kernel_metadata=kernel_metadata,
            bias_metadata=bias_metadata,
            **options,
        )
        self.dense_h = Linear(
            self.hidden_features,
            multiple * self.hidden_features,
            use_bias=False,
            kernel_init=recurrent_kernel_init,
            kernel_metadata=recurrent_kernel_metadata,
            **options,
        )


class GRUCell(_OneState):
    """A gated recurrent unit.

    ```
    r = sigmoid(x W_ir + b_ir + h W_hr)
    z = sigmoid(x W_iz + b_iz + h W_hz)
    n = tanh(x W_in + b_in + r * (h W_hn))
    h <- (1 - z) * n + z * h
    ```

    The carry and the output are `h`. The kernels and the bias of r, z, n stand side by side.

    Attributes:
        dense_i: Linear of the inputs: kernel [in_features, 3 * hidden_features], bias [3 * hidden_features].
        dense_h: Linear of `h`, without bias: kernel [hidden_features, 3 * hidden_features].

    Reference: Cho et al., 2014, Learning Phrase Representations using RNN Encoder-Decoder, arXiv:1406.1078.

    Example:
        >>> import nnx, jax.numpy as jnp
        >>> cell = nnx.GRUCell(3, 4, ctx=nnx.context(0))
        >>> x = jnp.ones((2, 3))
        >>> h, y = cell(cell.initialize_carry(x.shape), x)
        >>> h.shape, bool((h == y).all())
        ((2, 4), True)
    """

    gate_fn: Activation

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
            activation_fn: activation of what the gate `z` mixes into `h`.
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
        metadata = (kernel_metadata, recurrent_kernel_metadata, bias_metadata)
        self._set_layers(3, kernel_init, recurrent_kernel_init, bias_init, precision, ctx, *metadata)

    def _step(self, carry: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        gate, activation = function_of(self.gate_fn), function_of(self.activation_fn)
        of_inputs = self.dense_i(x)
        r_i, z_i, n_i = jnp.split(of_inputs, 3, axis=-1)
        r_h, z_h, n_h = jnp.split(self.dense_h(carry.astype(of_inputs.dtype)), 3, axis=-1)
        r, z = gate(r_i + r_h), gate(z_i + z_h)
        n = activation(n_i + r * n_h)
        wide = widest(carry, n)
        # The mixture with one product where its formula has two.
        h = n.astype(wide) + z.astype(wide) * (carry.astype(wide) - n.astype(wide))
        return h, h.astype(n.dtype)


class SimpleCell(_OneState):
    """The plain recurrent cell: `h <- tanh(x W_i + b_i + h W_h)`, plus `h` inside of tanh with `residual`.

    The carry and the output are `h`.

    Attributes:
        dense_i: Linear of the inputs: kernel [in_features, hidden_features], bias [hidden_features].
        dense_h: Linear of `h`, without bias: kernel [hidden_features, hidden_features].

    Reference: Elman, 1990, Finding Structure in Time, Cognitive Science 14(2).

    Example:
        >>> import nnx, jax.numpy as jnp
        >>> cell = nnx.SimpleCell(3, 4, ctx=nnx.context(0))
        >>> x = jnp.ones((2, 3))
        >>> h, y = cell(cell.initialize_carry(x.shape), x)
        >>> y.shape
        (2, 4)
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        dtype: DTypeLike | None = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        carry_init: Initializer | None = None,
        residual: bool = False,
        activation_fn: Activation = "tanh",
        kernel_init: Initializer = default_kernel_init,
        recurrent_kernel_init: Initializer = default_recurrent_kernel_init,
        bias_init: Initializer = default_bias_init,
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
            dtype: dtype to compute in, and of the outputs: here float32 unless told otherwise, as in flax; `None` takes
                the common type of inputs and parameters.
            param_dtype: dtype of the parameters, and of the first carry.
            carry_init: initializer of the first carry, unless `initialize_carry` is given one; `None` is zeros.
            residual: whether `h` is added before the activation.
            activation_fn: the activation: the name of an activation of nnx, or a function of an array.
            kernel_init: initializer of the kernel of the inputs.
            recurrent_kernel_init: initializer of the kernel of `h`; by default orthogonal.
            bias_init: initializer of the bias.
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
            activation_fn=activation_fn,
        )
        self.residual = residual
        metadata = (kernel_metadata, recurrent_kernel_metadata, bias_metadata)
        self._set_layers(1, kernel_init, recurrent_kernel_init, bias_init, precision, ctx, *metadata)

    def _step(self, carry: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        of_inputs = self.dense_i(x)
        total = of_inputs + self.dense_h(carry.astype(of_inputs.dtype))
        wide = widest(carry, total)
        if self.residual:
            total = total.astype(wide) + carry.astype(wide)
        h = function_of(self.activation_fn)(total).astype(wide)
        return h, h.astype(of_inputs.dtype)
