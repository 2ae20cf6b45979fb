"""Affine maps over the last axis or over several: Linear, LinearGeneral, and MLP, a stack of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from nnx.core import Context, Module, Param, ShapeError, VariableMetadata
from nnx.layers import _activations
from nnx.layers._common import (
    NO_METADATA,
    Axes,
    DefaultNames,
    Layer,
    Metadata,
    Names,
    PrecisionLike,
    PromoteDtype,
    add,
    add_bias,
    as_tuple,
    check_features,
    default_bias_init,
    default_kernel_init,
    make_param,
    normalize_axes,
    project,
)
from nnx.layers._dropout import Dropout
from nnx.layers._dtypes import promote_dtype
from nnx.layers._explicit import fit_weights
from nnx.layers._settled import settled
from nnx.layers.initializers import Initializer

__all__ = ["MLP", "Linear", "LinearGeneral"]


class Linear(Layer):
    """An affine map of the last axis: `y = x @ kernel + bias`.

    Attributes:
        kernel: Param, [in_features, out_features].
        bias: Param, [out_features], or None.

    Reference: LeCun et al., 1998, Efficient BackProp, for the scale of the first kernel.

    Example:
        >>> import nnx, jax.numpy as jnp
        >>> layer = nnx.Linear(2, 4, ctx=nnx.context(0))
        >>> layer(jnp.ones((8, 2))).shape
        (8, 4)
        >>> layer.kernel.shape, layer.bias.shape
        ((2, 4), (4,))
    """

    kernel: jax.Array
    bias: jax.Array | None
    dot_general: Callable[..., Any] = staticmethod(lax.dot_general)
    preferred_element_type: DTypeLike | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = default_bias_init,
        dot_general: Callable[..., Any] = lax.dot_general,
        promote_dtype: PromoteDtype = promote_dtype,
        preferred_element_type: DTypeLike | None = None,
        ctx: Context,
        kernel_metadata: Metadata = NO_METADATA,
        bias_metadata: Metadata = NO_METADATA,
    ) -> None:
        """Makes the layer.

        Args:
            in_features: size of the last axis of the inputs.
            out_features: size of the last axis of the outputs.
            use_bias: whether to add a bias.
            dtype: dtype to compute in; `None` takes the common type of inputs and parameters.
            param_dtype: dtype of the parameters.
            precision: precision of the product, see `jax.lax.Precision`.
            kernel_init: initializer of the kernel.
            bias_init: initializer of the bias.
            dot_general: computes the product, with the arguments of `jax.lax.dot_general`; may be a Module.
            promote_dtype: casts the tuple of inputs, kernel and bias, with the arguments of `nnx.promote_dtype`.
            preferred_element_type: dtype of the product, to which the bias is added in their common type.
            ctx: gives the keys, from its stream "params".
            kernel_metadata: metadata of the kernel, which win over those of its initializer and of the layer.
            bias_metadata: the same for the bias.
        """
        self.in_features = in_features
        self.out_features = out_features
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self._choose(
            dot_general=dot_general, promote_dtype=promote_dtype, preferred_element_type=preferred_element_type
        )
        self.kernel = make_param(
            ctx, kernel_init, (in_features, out_features), param_dtype, names=("in", "out"), metadata=kernel_metadata
        )
        self.bias = None
        if use_bias:
            self.bias = make_param(ctx, bias_init, (out_features,), param_dtype, names=("out",), metadata=bias_metadata)

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Applies the map.

        Args:
            inputs: [..., in_features].
            out_sharding: on a mesh of explicit axes, how the outputs are split, such as a PartitionSpec; `None` splits
                them as inputs and kernel are.

        Returns:
            [..., out_features].

        Raises:
            ShapeError: the last axis of `inputs` is not `in_features`.
        """
        check_features(self, "inputs", inputs, self.in_features, f"in_features={self.in_features}")
        x, kernel, bias = self.promote_dtype((inputs, self.kernel, self.bias), dtype=self.dtype)
        y = project(
            x,
            kernel,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
            out_sharding=out_sharding,
            dot_general=self.dot_general,
        )
        return add_bias(y, bias)


class LinearGeneral(Layer):
    """An affine map from some axes of the inputs to new last axes of the outputs.

    `y[..., o] = sum_i x[..., i] kernel[i, o] + bias[o]`, where `i` runs over the axes `axis` and `o` over the new ones.

    Initializers are called with the kernel's axes merged to [inputs, outputs], so that fans count all of them. With
    `batch_axis` there is such a map for each index of those axes, `y[b, ..., o] = sum_i x[b, ..., i] kernel[b, i, o] +
    bias[b, o]`, each from a call of its own.

    Attributes:
        kernel: Param, [*sizes of batch_axis, *in_features, *out_features].
        bias: Param, [*sizes of batch_axis, *out_features], or None.

    Reference: `jax.lax.dot_general`, which computes it.

    Example:
        >>> import nnx, jax.numpy as jnp
        >>> layer = nnx.LinearGeneral((2, 3), (4, 5), axis=(-2, -1), ctx=nnx.context(0))
        >>> layer(jnp.ones((16, 2, 3))).shape
        (16, 4, 5)
        >>> layer.kernel.shape
        (2, 3, 4, 5)
        >>> experts = nnx.LinearGeneral(2, 4, batch_axis={0: 8}, ctx=nnx.context(0))
        >>> experts(jnp.ones((8, 16, 2))).shape, experts.kernel.shape
        ((8, 16, 4), (8, 2, 4))
    """

    kernel: jax.Array
    bias: jax.Array | None
    batch_axis: Mapping[int, int] = MappingProxyType({})
    dot_general: Callable[..., Any] | None = None
    dot_general_cls: Callable[[], Callable[..., Any]] | None = None
    preferred_element_type: DTypeLike | None = None

    def __init__(
        self,
        in_features: int | Sequence[int],
        out_features: int | Sequence[int],
        *,
        axis: Axes = -1,
        batch_axis: Mapping[int, int] = MappingProxyType({}),
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = default_bias_init,
        precision: PrecisionLike = None,
        promote_dtype: PromoteDtype = promote_dtype,
        dot_general: Callable[..., Any] | None = None,
        dot_general_cls: Callable[[], Callable[..., Any]] | None = None,
        preferred_element_type: DTypeLike | None = None,
        ctx: Context,
        kernel_metadata: Metadata = NO_METADATA,
        bias_metadata: Metadata = NO_METADATA,
    ) -> None:
        """Makes the layer.

        Args:
            in_features: sizes of the axes to contract.
            out_features: sizes of the new axes.
            axis: the axes to contract, one to a size in `in_features`.
            batch_axis: the sizes of the axes, by their positions from 0 on, along which each index has a map of its
                own.
            use_bias: whether to add a bias.
            dtype: dtype to compute in; `None` takes the common type of inputs and parameters.
            param_dtype: dtype of the parameters.
            kernel_init: initializer of the kernel.
            bias_init: initializer of the bias.
            precision: precision of the product, see `jax.lax.Precision`.
            promote_dtype: casts the tuple of inputs, kernel and bias, with the arguments of `nnx.promote_dtype`.
            dot_general: computes the product, with the arguments of `jax.lax.dot_general`, which it is for `None`.
            dot_general_cls: makes `dot_general` anew in each call, in place of the argument above.
            preferred_element_type: dtype of the product, to which the bias is added in their common type.
            ctx: gives the keys, from its stream "params".
            kernel_metadata: metadata of the kernel, which win over those of its initializer and of the layer.
            bias_metadata: the same for the bias.

        Raises:
            ValueError: `axis` and `in_features` differ in length, or `batch_axis` are not the first axes.
        """
        self.in_features: tuple[int, ...] = as_tuple(in_features)
        self.out_features: tuple[int, ...] = as_tuple(out_features)
        self.axis: tuple[int, ...] = as_tuple(axis)
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        if len(self.in_features) != len(self.axis):
            raise ValueError(
                f"LinearGeneral: in_features {self.in_features} and axis {self.axis} must have the same length"
            )
        if sorted(batch_axis) != list(range(len(batch_axis))):
            raise ValueError(
                f"LinearGeneral: batch_axis gives the sizes of the first axes, by their positions 0, 1 and so on; got"
                f" {dict(batch_axis)}"
            )
        self._choose(
            promote_dtype=promote_dtype,
            dot_general=dot_general,
            dot_general_cls=dot_general_cls,
            preferred_element_type=preferred_element_type,
        )
        batch = tuple(batch_axis[position] for position in range(len(batch_axis)))
        if batch:
            self.batch_axis = dict(enumerate(batch))
            kernel_init, bias_init = (_Each(init, math.prod(batch)) for init in (kernel_init, bias_init))
        n_in, n_out = math.prod(self.in_features), math.prod(self.out_features)
        unnamed = (None,) * len(batch)
        names_out = _first("out", len(self.out_features))
        names = unnamed + _first("in", len(self.in_features)) + names_out
        kernel = make_param(ctx, kernel_init, (n_in, n_out), param_dtype, names=names, metadata=kernel_metadata)
        self.kernel = _reshaped(kernel, batch + self.in_features + self.out_features)
        self.bias = None
        if use_bias:
            bias = make_param(ctx, bias_init, (n_out,), param_dtype, names=unnamed + names_out, metadata=bias_metadata)
            self.bias = _reshaped(bias, batch + self.out_features)

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Applies the map.

        Args:
            inputs: an array whose axes `axis` have the sizes `in_features`.
            out_sharding: on a mesh of explicit axes, how the outputs are split, such as a PartitionSpec; `None` splits
                them as inputs and kernel are.

        Returns:
            The axes of `inputs` that are left, in order, followed by `out_features`.

        Raises:
            ShapeError: `inputs` lacks one of the axes, or it has another size.
        """
        axes = normalize_axes(self.axis, inputs.ndim, f"{type(self).__name__}: axes")
        batch = tuple(self.batch_axis.values())
        if tuple(inputs.shape[axis] for axis in axes) != self.in_features:
            raise ShapeError(
                f"{type(self).__name__}: expected `inputs` with sizes {self.in_features} at the axes {self.axis}"
                f" (in_features), got {tuple(inputs.shape)}"
            )
        if batch and (inputs.shape[: len(batch)] != batch or min(axes) < len(batch)):
            raise ShapeError(
                f"{type(self).__name__}: expected `inputs` with first axes of the sizes {batch} (batch_axis), none of"
                f" them among the axes to contract, {self.axis}; got {tuple(inputs.shape)}"
            )
        x, kernel, bias = self.promote_dtype((inputs, self.kernel, self.bias), dtype=self.dtype)
        y = project(
            x,
            kernel,
            axes=axes,
            batch=len(batch),
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
            out_sharding=out_sharding,
            dot_general=self._dot_general(),
        )
        if bias is None or not batch:
            return add_bias(y, bias)
        between = (1,) * (y.ndim - bias.ndim)
        return add(y, fit_weights(bias.reshape(batch + between + self.out_features), y))

    def _dot_general(self) -> Callable[..., Any]:
        if self.dot_general_cls is not None:
            return self.dot_general_cls()
        return lax.dot_general if self.dot_general is None else self.dot_general


class _Each:
    """An initializer that makes `count` arrays of the shape it is called with, each with a key of its own."""

    def __init__(self, init: Initializer, count: int) -> None:
        self.__wrapped__ = init
        self.count = count

    def __call__(self, key: Any, shape: Sequence[int], dtype: Any = jnp.float32) -> Any:
        """The arrays along a first axis, with the metadata of the last one."""
        keys: Any = [None] * self.count if key is None else jax.random.split(key, self.count)
        made: list[Any] = [self.__wrapped__(key, shape, dtype) for key in keys]
        boxed = isinstance(made[-1], VariableMetadata)
        values = jnp.stack([each.value if boxed else each for each in made])
        return VariableMetadata(values, made[-1].metadata) if boxed else values


def _first(name: str, count: int) -> Names:
    """The name for the first of some dimensions alone: one mesh axis cannot split two."""
    return (name, *[None] * (count - 1))[:count]


def _reshaped(param: Param[Any], shape: tuple[int, ...]) -> Any:
    """`param` with its value in `shape`, keeping its metadata."""
    if param.value.shape != shape:
        param.value = jnp.reshape(param.value, shape)
    return param


class MLP(Module):
    """A multilayer perceptron: Linear layers with an activation, and optionally dropout, between them.

    `x <- dropout(activation(x @ kernel + bias))` for each hidden layer, then a last Linear without either.

    The kernels' logical axes are ("embed", "mlp") and ("mlp", "embed") in turns. Where logical axis rules split
    "activation_mlp" over a mesh, so are the hidden layers.

    Attributes:
        layers: a Sequence of `len(hidden_features) + 1` Linear layers.
        dropout: a Dropout, or None.

    Reference: Rumelhart et al., 1986, Learning representations by back-propagating errors, Nature 323.

    Example:
        >>> import nnx, jax.numpy as jnp
        >>> model = nnx.MLP(2, (16, 16), 1, ctx=nnx.context(0))
        >>> model(jnp.ones((8, 2))).shape
        (8, 1)
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | Sequence[int],
        out_features: int,
        *,
        activation: str | Callable[[jax.Array], jax.Array] = "relu",
        dropout_rate: float = 0.0,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = default_bias_init,
        ctx: Context,
    ) -> None:
        """Makes the model.

        Args:
            in_features: size of the last axis of the inputs.
            hidden_features: sizes of the hidden layers, first to last; an empty sequence makes one Linear.
            out_features: size of the last axis of the outputs.
            activation: applied after each hidden layer: the name of an activation of nnx, or a function of an array.
                JAX's own functions do not pickle, nor does a model made with `jax.nn.relu`; with "relu" it does.
            dropout_rate: the probability of dropping a hidden unit; 0 makes no dropout layer.
            use_bias: whether the layers have a bias.
            dtype: dtype to compute in; `None` takes the common type of inputs and parameters.
            param_dtype: dtype of the parameters.
            precision: precision of the products, see `jax.lax.Precision`.
            kernel_init: initializer of the kernels.
            bias_init: initializer of the biases.
            ctx: gives the keys, from its stream "params".

        Raises:
            ValueError: there is no activation of that name.
        """
        if isinstance(activation, str) and activation not in _activations.__all__:
            raise ValueError(f"MLP: nnx has no activation {activation!r}; give the name of one, or a function")
        sizes = (in_features, *as_tuple(hidden_features), out_features)
        self.layers: list[Linear] = [
            Linear(
                n_in,
                n_out,
                use_bias=use_bias,
                dtype=dtype,
                param_dtype=param_dtype,
                precision=precision,
                # In turns, so that what one layer splits the next one sums over.
                kernel_init=DefaultNames(kernel_init, ("mlp", "embed") if i % 2 else ("embed", "mlp")),
                bias_init=DefaultNames(bias_init, ("embed",) if i % 2 else ("mlp",)),
                ctx=ctx,
            )
            for i, (n_in, n_out) in enumerate(itertools.pairwise(sizes))
        ]
        self.activation = activation
        self.dropout: Dropout | None = Dropout(dropout_rate) if dropout_rate > 0 else None

    def __call__(
        self, inputs: jax.Array, *, deterministic: bool | None = None, ctx: Context | None = None
    ) -> jax.Array:
        """Applies the model.

        Args:
            inputs: [..., in_features].
            deterministic: whether to skip dropout; `None` leaves it to the Context.
            ctx: carries the stream "dropout" and flags. Not needed without dropout.

        Returns:
            [..., out_features].

        Raises:
            ContextError: there is dropout, and `deterministic` is set nowhere or there is no random stream.
            ShapeError: the last axis of `inputs` is not `in_features`.
        """
        activation = getattr(_activations, self.activation) if isinstance(self.activation, str) else self.activation
        x = inputs
        for layer in self.layers[:-1]:
            x = settled(activation(layer(x)), -1, "activation_mlp")
            if self.dropout is not None:
                x = self.dropout(x, deterministic=deterministic, ctx=ctx)
        return self.layers[-1](x)
