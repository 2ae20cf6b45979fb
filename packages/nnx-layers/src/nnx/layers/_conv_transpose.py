"""Transposed convolution: each input element adds a copy of the kernel to the outputs around it."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from nnx.core import Context
from nnx.layers._common import (
    NO_METADATA,
    Metadata,
    Names,
    PrecisionLike,
    PromoteDtype,
    add_bias,
    as_tuple,
    default_bias_init,
    default_kernel_init,
    flatten_batch,
    make_arranged_param,
    make_param,
    per_dimension,
)
from nnx.layers._conv import ConvBase, Padding, PaddingLike, canonicalize_padding, check_sizes
from nnx.layers._dtypes import promote_dtype
from nnx.layers._explicit import convolve
from nnx.layers.initializers import Initializer

__all__ = ["ConvTranspose"]

_PADDINGS = ("SAME", "VALID", "CIRCULAR", "CAUSAL")


class ConvTranspose(ConvBase):
    """A transposed convolution over the spatial axes of its inputs, which with strides makes them larger.

    `y[n, q, o] = bias[o] + sum_{p, k, c} x[n, p, c] kernel[k, c, o]`, over the `p` and `k` with
    `strides * p = q + kernel_dilation * k - low`

    This is a convolution of inputs that have `strides - 1` zeros between their elements and `low` before them. The
    number of spatial axes is the length of `kernel_size`. Axes are in the order batch, space, channels (NWC, NHWC,
    NDHWC).

    With `transpose_kernel` the kernel is `kernel[k, o, c]` and flipped along space. The layer then is the transpose of
    the linear map of a Conv from `out_features` to `in_features` with the same kernel, strides and padding: for
    "VALID", and where the strides divide the size of the outputs for "SAME" and "CIRCULAR". For "CIRCULAR", also
    `ceil(max(extent - stride, 0) / 2) = floor((extent - 1) / 2)` must hold, `extent` being the size of the dilated
    kernel, as it does for odd extents with stride 1 and for all with stride 2; else the outputs are rolled against the
    transpose's.

    Initializers are called with [*kernel_size, in_features, out_features] whether the kernel is transposed or not, so
    that fans count what they should.

    Attributes:
        kernel: Param, [*kernel_size, in_features, out_features]; with `transpose_kernel`,
            [*kernel_size, out_features, in_features].
        bias: Param, [out_features], or None.

    Example:
        >>> import nnx, jax.numpy as jnp
        >>> layer = nnx.ConvTranspose(3, 8, (4, 4), strides=2, ctx=nnx.context(0))
        >>> layer(jnp.ones((1, 16, 16, 3))).shape
        (1, 32, 32, 8)
        >>> nnx.ConvTranspose(3, 8, 3, padding="VALID", ctx=nnx.context(0))(jnp.ones((1, 8, 3))).shape
        (1, 10, 8)

    Source: Dumoulin and Visin, 2016, arXiv:1603.07285.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] | None = None,
        *,
        padding: PaddingLike = "SAME",
        kernel_dilation: int | Sequence[int] | None = None,
        use_bias: bool = True,
        mask: ArrayLike | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = default_bias_init,
        transpose_kernel: bool = False,
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
            strides: step in the outputs from one input element to the next; an int holds for all axes, `None` is 1.
            padding: "SAME" (out = in * stride), "VALID" (all outputs that an input reaches: in * stride, plus extent -
                stride if that is positive), "CIRCULAR" (periodic, out = in * stride), "CAUSAL" (one spatial axis: no
                output sees later inputs, out = in * stride), an int, or an int or a (low, high) pair for each axis. The
                numbers are what is put around the spaced inputs, as in `jax.lax.conv_transpose`; more of it makes the
                outputs larger.
            kernel_dilation: spacing of kernel elements; an int holds for all axes, `None` is 1.
            use_bias: whether to add a bias.
            mask: an array that multiplies the kernel at each call, of the kernel's shape; kept as a buffer.
            dtype: dtype to compute in; `None` takes the common type of inputs and parameters.
            param_dtype: dtype of the parameters.
            precision: precision of the products, see `jax.lax.Precision`.
            kernel_init: initializer of the kernel.
            bias_init: initializer of the bias.
            transpose_kernel: whether the kernel is that of the convolution which this layer transposes: flipped along
                space, and with inputs and outputs swapped.
            promote_dtype: casts the tuple of inputs, kernel and bias, with the arguments of `nnx.promote_dtype`.
            preferred_element_type: dtype of the convolution, no narrower than that of its operands; the bias is added
                in their common type.
            ctx: gives the keys, from its stream "params".
            kernel_metadata: metadata of the kernel, which win over those of its initializer and of the layer.
            bias_metadata: the same for the bias.

        Raises:
            ValueError: a size is not positive, or an option does not fit the number of spatial axes.
            ShapeError: `mask` has another shape than the kernel.
        """
        self.in_features = in_features
        self.out_features = out_features
        self.kernel_size: tuple[int, ...] = as_tuple(kernel_size)
        kind, rank = type(self).__name__, len(self.kernel_size)
        check_sizes(kind, in_features=in_features, out_features=out_features, kernel_size=self.kernel_size)
        self.strides: tuple[int, ...] = per_dimension(strides, rank, f"{kind}: strides")
        self.padding: Padding = canonicalize_padding(padding, rank, kind, _PADDINGS)
        self.kernel_dilation: tuple[int, ...] = per_dimension(kernel_dilation, rank, f"{kind}: kernel_dilation")
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.transpose_kernel = transpose_kernel
        self._choose(promote_dtype=promote_dtype, preferred_element_type=preferred_element_type)
        if self.padding == "CAUSAL" and rank != 1:
            raise ValueError(f"{kind}: CAUSAL padding needs one spatial axis, got kernel_size {self.kernel_size}")
        shape = (*self.kernel_size, in_features, out_features)
        spatial = (None,) * rank
        if transpose_kernel:
            names: Names = (*spatial, "conv_out", "conv_in")
            self.kernel = make_arranged_param(
                kind, ctx, kernel_init, shape, param_dtype, _swap_channels, names, kernel_metadata
            )
        else:
            names = (*spatial, "conv_in", "conv_out")
            self.kernel: jax.Array = make_param(
                ctx, kernel_init, shape, param_dtype, names=names, metadata=kernel_metadata
            )
        self.bias: jax.Array | None = None
        if use_bias:
            bias = (out_features,)
            self.bias = make_param(ctx, bias_init, bias, param_dtype, names=("conv_out",), metadata=bias_metadata)
        self.mask: jax.Array | None = self._as_mask(mask)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Applies the transposed convolution.

        Args:
            inputs: [*batch, *space, in_features], with any number of batch axes, also none.

        Returns:
            [*batch, *space, out_features].

        Raises:
            ShapeError: `inputs` has too few axes or another number of channels, or a spatial axis is empty and padding
                is "CIRCULAR".
        """
        self._check_inputs(inputs)
        rank = len(self.kernel_size)
        x, kernel, bias = self.promote_dtype((inputs, self._masked_kernel(), self.bias), dtype=self.dtype)
        x, batch = flatten_batch(x, rank + 1)
        space = tuple(range(1, rank + 1))
        layout = (0, rank + 1, *space)
        channels = (rank + 1, rank)
        if self.transpose_kernel:
            kernel, channels = lax.rev(kernel, tuple(range(rank))), (rank, rank + 1)
        y = convolve(
            x,
            kernel,
            lax.ConvDimensionNumbers(layout, (*channels, *range(rank)), layout),
            window_strides=(1,) * rank,
            padding=self._pads(),
            lhs_dilation=self.strides,
            rhs_dilation=self.kernel_dilation,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
        )
        if self.padding == "CIRCULAR":
            y = self._fold(y, x.shape[1:-1])
        y = add_bias(y, bias)
        return y if len(batch) == 1 else y.reshape(batch + y.shape[1:])

    def _pads(self) -> tuple[tuple[int, int], ...]:
        """What is put before and after the spaced inputs, along each axis."""
        if not isinstance(self.padding, str):
            return self.padding
        pads = []
        for size, dilation, stride in zip(self.kernel_size, self.kernel_dilation, self.strides, strict=True):
            reach = (size - 1) * dilation
            # Of the outputs that inputs reach, this many are more than the stride times the number of inputs.
            excess = max(reach + 1 - stride, 0)
            low, high = reach, stride - 1
            if self.padding == "SAME":
                low, high = reach - excess // 2, high + excess // 2
            elif self.padding != "CAUSAL":
                high += excess
            pads.append((low, high))
        return tuple(pads)

    def _fold(self, y: jax.Array, space: tuple[int, ...]) -> jax.Array:
        """Adds up the elements of a "VALID" result that are whole periods apart, and aligns what comes out."""
        periods = [size * stride for size, stride in zip(space, self.strides, strict=True)]
        pads = []
        for reached, period in zip(y.shape[1:-1], periods, strict=True):
            # Half of the excess lies before the first output; the odd element too if the kernel is a convolution's.
            before = -((reached - period + self.transpose_kernel) // 2) % period
            pads.append((before, -(before + reached) % period))
        y = jnp.pad(y, [(0, 0), *pads, (0, 0)])
        for axis, period in enumerate(periods, 1):
            y = y.reshape(*y.shape[:axis], y.shape[axis] // period, period, *y.shape[axis + 1 :]).sum(axis)
        return y


def _swap_channels(kernel: jax.Array) -> jax.Array:
    return jnp.swapaxes(kernel, -1, -2)
