"""Convolution over any number of spatial axes, channels last."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from nnx.core import Context, ShapeError
from nnx.layers._common import (
    NO_METADATA,
    Layer,
    Metadata,
    PrecisionLike,
    PromoteDtype,
    add_bias,
    as_tuple,
    default_bias_init,
    default_kernel_init,
    flatten_batch,
    make_param,
    per_dimension,
)
from nnx.layers._dtypes import promote_dtype
from nnx.layers._explicit import convolve
from nnx.layers._grouped import Options, convolve_in_groups, has_copies
from nnx.layers.initializers import Initializer

__all__ = ["Conv"]

PaddingLike = str | int | Sequence[int | tuple[int, int]]
Padding = str | tuple[tuple[int, int], ...]

_LAX_PADDINGS = ("SAME", "SAME_LOWER", "VALID")
# Padding with the inputs' own elements, which `lax` does not do and `jnp.pad` does in these modes.
_PAD_MODES = {"CIRCULAR": "wrap", "REFLECT": "reflect"}


def canonicalize_padding(padding: PaddingLike, rank: int, kind: str, names: Sequence[str] = _LAX_PADDINGS) -> Padding:
    """A padding as one of `names` or a tuple of `rank` pairs (low, high); errors begin with `kind`, the layer."""
    if isinstance(padding, str):
        if padding.upper() not in names:
            raise ValueError(
                f"{kind}: unknown padding {padding!r}: use one of {', '.join(sorted(names))}, an int, or (low, high)"
                " pairs"
            )
        return padding.upper()
    try:
        sides = list(padding) if isinstance(padding, Iterable) else [padding] * rank
        pairs = [as_tuple(side) if isinstance(side, Iterable) else as_tuple(side) * 2 for side in sides]
    except TypeError:  # neither ints nor sequences of them
        pairs = []
    if len(pairs) != rank or any(len(pair) != 2 for pair in pairs):
        raise ValueError(
            f"{kind}: padding needs an int, or an int or a (low, high) pair for each of {rank} spatial dimensions, got"
            f" {padding}"
        )
    return tuple((low, high) for low, high in pairs)


def check_sizes(kind: str, **sizes: int | Sequence[int]) -> None:
    """Raises ValueError unless all of a layer's sizes are positive."""
    for name, size in sizes.items():
        if any(n < 1 for n in as_tuple(size)):
            raise ValueError(f"{kind}: {name} must be positive, got {size}")


class ConvBase(Layer):
    """What Conv and ConvTranspose share: a kernel that may be masked, a bias, and inputs with space before features."""

    kernel: jax.Array
    bias: jax.Array | None
    mask: jax.Array | None
    in_features: int
    kernel_size: tuple[int, ...]
    padding: Padding
    preferred_element_type: DTypeLike | None = None

    def _as_mask(self, mask: ArrayLike | None) -> jax.Array | None:
        """`mask` as an array of the kernel's shape."""
        if mask is None:
            return None
        array = jnp.asarray(mask)
        if array.shape != self.kernel.shape:
            raise ShapeError(
                f"{type(self).__name__}: expected `mask` of the kernel's shape {self.kernel.shape}, got {array.shape}"
            )
        return array

    def _masked_kernel(self) -> jax.Array:
        """The kernel, times the mask if there is one."""
        return self.kernel if self.mask is None else self.kernel * self.mask.astype(self.kernel.dtype)

    def _check_inputs(self, inputs: jax.Array) -> None:
        """Raises ShapeError unless `inputs` are [..., *space, in_features] and can be extended where they must be."""
        kind, rank = type(self).__name__, len(self.kernel_size)
        if inputs.ndim < rank + 1 or inputs.shape[-1] != self.in_features:
            raise ShapeError(
                f"{kind}: expected `inputs` of shape [..., {'space, ' * rank}{self.in_features}]"
                f" (kernel_size={self.kernel_size}, in_features={self.in_features}), got {tuple(inputs.shape)}"
            )
        if self.padding in ("CIRCULAR", "REFLECT") and 0 in inputs.shape[inputs.ndim - rank - 1 : -1]:
            raise ShapeError(
                f"{kind}: {self.padding} padding repeats the inputs, so it expected at least one element along each"
                f" spatial axis, got {tuple(inputs.shape)}"
            )


class Conv(ConvBase):
    """A convolution (a cross-correlation, as everywhere in deep learning) over the spatial axes of its inputs.

    `y[n, p, o] = bias[o] + sum_{k, c} x[n, strides * p + kernel_dilation * k - low, c] kernel[k, c, o]`

    The number of spatial axes is the length of `kernel_size`. Axes are in the order batch, space, channels (NWC, NHWC,
    NDHWC).

    Attributes:
        kernel: Param, [*kernel_size, in_features / feature_group_count, out_features].
        bias: Param, [out_features], or None.

    Reference: LeCun et al., 1998, Gradient-Based Learning Applied to Document Recognition, Proc. IEEE 86(11).

    Example:
        >>> import nnx, jax.numpy as jnp
        >>> layer = nnx.Conv(3, 8, (3, 3), strides=2, ctx=nnx.context(0))
        >>> layer(jnp.ones((1, 32, 32, 3))).shape
        (1, 16, 16, 8)
        >>> nnx.Conv(3, 8, 5, padding="CAUSAL", ctx=nnx.context(0))(jnp.ones((1, 20, 3))).shape
        (1, 20, 8)
    """

    conv_general_dilated: Callable[..., Any] = staticmethod(lax.conv_general_dilated)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] | None = 1,
        *,
        padding: PaddingLike = "SAME",
        input_dilation: int | Sequence[int] | None = 1,
        kernel_dilation: int | Sequence[int] | None = 1,
        feature_group_count: int = 1,
        use_bias: bool = True,
        mask: ArrayLike | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = default_bias_init,
        conv_general_dilated: Callable[..., Any] = lax.conv_general_dilated,
        promote_dtype: PromoteDtype = promote_dtype,
        preferred_element_type: DTypeLike | None = None,
        ctx: Context,
        kernel_metadata: Metadata = NO_METADATA,
        bias_metadata: Metadata = NO_METADATA,
    ) -> None:
        """Makes the layer.

        Args:
            in_features: number of input channels.
            out_features: number of output channels.
            kernel_size: size of the kernel along each spatial axis; an int is one axis, not several.
            strides: step between windows, in input elements; an int holds for all axes.
            padding: "SAME" (out = ceil(in / stride)), "SAME_LOWER" (the same, with the odd element before), "VALID"
                (none), "CIRCULAR" (periodic), "REFLECT" (mirrored about the edge element), "CAUSAL" (one spatial axis:
                all before, so that no output sees later inputs), an int, or an int or a (low, high) pair for each axis.
            input_dilation: spacing put between input elements; above 1 this is a transposed convolution. Padding goes
                around the inputs with their gaps, `(in - 1) * input_dilation + 1` elements; a period of "CIRCULAR" has
                a gap after the last element too, which makes `in * input_dilation`.
            kernel_dilation: spacing of kernel elements; above 1 this is an atrous convolution.
            feature_group_count: number of groups that channels are split into; `in_features` makes it depthwise.
            use_bias: whether to add a bias.
            mask: an array that multiplies the kernel at each call, of the kernel's shape; kept as a buffer.
            dtype: dtype to compute in; `None` takes the common type of inputs and parameters.
            param_dtype: dtype of the parameters.
            precision: precision of the products, see `jax.lax.Precision`.
            kernel_init: initializer of the kernel.
            bias_init: initializer of the bias.
            conv_general_dilated: computes the convolution, with the arguments of `jax.lax.conv_general_dilated`; may be
                a Module.
            promote_dtype: casts the tuple of inputs, kernel and bias, with the arguments of `nnx.promote_dtype`.
            preferred_element_type: dtype of the convolution, no narrower than that of its operands; the bias is added
                in their common type.
            ctx: gives the keys, from its stream "params".
            kernel_metadata: metadata of the kernel, which win over those of its initializer and of the layer.
            bias_metadata: the same for the bias.

        Raises:
            ValueError: a size is not positive, an option does not fit the number of spatial axes, or the groups do not
                divide the channels.
            ShapeError: `mask` has another shape than the kernel.
        """
        self.in_features = in_features
        self.out_features = out_features
        self.kernel_size: tuple[int, ...] = as_tuple(kernel_size)
        kind, rank = type(self).__name__, len(self.kernel_size)
        check_sizes(
            kind,
            in_features=in_features,
            out_features=out_features,
            kernel_size=self.kernel_size,
            feature_group_count=feature_group_count,
        )
        self.strides: tuple[int, ...] = per_dimension(strides, rank, f"{kind}: strides")
        self.padding: Padding = canonicalize_padding(padding, rank, kind, (*_LAX_PADDINGS, "CAUSAL", *_PAD_MODES))
        self.input_dilation: tuple[int, ...] = per_dimension(input_dilation, rank, f"{kind}: input_dilation")
        self.kernel_dilation: tuple[int, ...] = per_dimension(kernel_dilation, rank, f"{kind}: kernel_dilation")
        self.feature_group_count = feature_group_count
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self._choose(
            conv_general_dilated=conv_general_dilated,
            promote_dtype=promote_dtype,
            preferred_element_type=preferred_element_type,
        )
        if self.padding == "CAUSAL" and rank != 1:
            raise ValueError(f"{kind}: CAUSAL padding needs one spatial axis, got kernel_size {self.kernel_size}")
        if in_features % feature_group_count or out_features % feature_group_count:
            raise ValueError(
                f"{kind}: feature_group_count={feature_group_count} must divide in_features={in_features} and"
                f" out_features={out_features}"
            )
        shape = (*self.kernel_size, in_features // feature_group_count, out_features)
        names = (*[None] * len(self.kernel_size), "conv_in", "conv_out")
        self.kernel: jax.Array = make_param(ctx, kernel_init, shape, param_dtype, names=names, metadata=kernel_metadata)
        self.bias: jax.Array | None = None
        if use_bias:
            bias = (out_features,)
            self.bias = make_param(ctx, bias_init, bias, param_dtype, names=names[-1:], metadata=bias_metadata)
        self.mask: jax.Array | None = self._as_mask(mask)

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Applies the convolution.

        Args:
            inputs: [*batch, *space, in_features], with any number of batch axes, also none.
            out_sharding: on a mesh of explicit axes, how the outputs are split, such as a PartitionSpec; `None` splits
                them as inputs and kernel are.

        Returns:
            [*batch, *space, out_features].

        Raises:
            ShapeError: `inputs` has too few axes or another number of channels, or a spatial axis is empty and padding
                is "CIRCULAR" or "REFLECT".
        """
        self._check_inputs(inputs)
        rank = len(self.kernel_size)
        x, kernel, bias = self.promote_dtype((inputs, self._masked_kernel(), self.bias), dtype=self.dtype)
        x, batch = flatten_batch(x, rank + 1)
        x, padding = self._pad(x)
        space = tuple(range(1, rank + 1))
        layout = (0, rank + 1, *space)
        # Where batch axes were merged, the outputs are split once these are there again.
        at_once = out_sharding if len(batch) == 1 else None
        dimensions = lax.ConvDimensionNumbers(layout, (rank + 1, rank, *range(rank)), layout)
        if self.feature_group_count > 1 and has_copies() and self.conv_general_dilated is lax.conv_general_dilated:
            y = convolve_in_groups(x, kernel, self._options(x, padding, dimensions, at_once))
        else:
            y = convolve(
                x,
                kernel,
                dimensions,
                self.feature_group_count,
                self.conv_general_dilated,
                at_once,
                window_strides=self.strides,
                padding=padding,
                lhs_dilation=self.input_dilation,
                rhs_dilation=self.kernel_dilation,
                precision=self.precision,
                preferred_element_type=self.preferred_element_type,
            )
        y = add_bias(y, bias)
        if len(batch) == 1:
            return y
        y = y.reshape(batch + y.shape[1:])
        return y if out_sharding is None else jax.sharding.reshard(y, out_sharding)

    def _options(self, x: jax.Array, padding: Any, dimensions: lax.ConvDimensionNumbers, out_sharding: Any) -> Options:
        if isinstance(padding, str):
            reach = [(size - 1) * gap + 1 for size, gap in zip(self.kernel_size, self.kernel_dilation, strict=True)]
            padding = lax.padtype_to_pads(x.shape[1:-1], reach, self.strides, padding)
        return Options(
            self.strides,
            tuple((int(low), int(high)) for low, high in padding),
            self.input_dilation,
            self.kernel_dilation,
            dimensions,
            self.feature_group_count,
            self.precision,
            self.preferred_element_type,
            out_sharding,
        )

    def _pad(self, x: jax.Array) -> tuple[jax.Array, Any]:
        """Pads `x` itself where `lax` has no name for the padding, and says what is left for `lax` to do."""
        extents = [(size - 1) * dilation for size, dilation in zip(self.kernel_size, self.kernel_dilation, strict=True)]
        rank = len(extents)
        if not isinstance(self.padding, str):
            return x, self.padding
        if self.padding in _LAX_PADDINGS:
            if self.input_dilation == (1,) * rank:
                return x, self.padding
            # `lax` knows the names only for undilated inputs; they count the gaps as part of the input here.
            sizes = [max((n - 1) * gap + 1, 0) for n, gap in zip(x.shape[1:-1], self.input_dilation, strict=True)]
            return x, lax.padtype_to_pads(sizes, [extent + 1 for extent in extents], self.strides, self.padding)
        if self.padding == "CAUSAL":
            return x, tuple((extent, 0) for extent in extents)
        # Repeat whole elements, and leave to `lax` the zeros of the gap that the padding ends in.
        elements, zeros = [], []
        for extent, gap in zip(extents, self.input_dilation, strict=True):
            low, high = extent // 2, extent - extent // 2
            if self.padding == "CIRCULAR":
                high += gap - 1  # a period has a gap after its last element too
            elements.append((low // gap, high // gap))
            zeros.append((low % gap, high % gap))
        return jnp.pad(x, [(0, 0), *elements, (0, 0)], mode=_PAD_MODES[self.padding]), tuple(zeros)
