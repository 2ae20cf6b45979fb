"""A linear map written as an einsum equation of two operands: the inputs and a kernel."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from nnx.core import Context, ShapeError
from nnx.layers._common import (
    NO_METADATA,
    Layer,
    Metadata,
    PrecisionLike,
    PromoteDtype,
    add,
    as_tuple,
    default_bias_init,
    default_kernel_init,
    make_arranged_param,
    make_param,
)
from nnx.layers._dtypes import promote_dtype
from nnx.layers._explicit import contraction, fit_weights, is_explicit
from nnx.layers.initializers import Initializer

__all__ = ["Einsum"]

Labels = tuple[str, ...]
ELLIPSIS = "..."


@dataclasses.dataclass(frozen=True)
class Equation:
    """The labels of an einsum equation's two operands and of its outputs; "..." stands as one label."""

    text: str
    inputs: Labels
    kernel: Labels
    outputs: Labels


@functools.lru_cache(maxsize=1024)
def parse(kind: str, text: str) -> Equation:
    """The equation without its spaces, read and checked; errors begin with `kind`, the layer."""
    text = text.replace(" ", "")
    prefix = f"{kind}: `einsum_str` {text!r}"
    operands, arrow, outputs = text.partition("->")
    if not arrow:
        raise ValueError(f"{prefix} does not say what its outputs are: write them after '->', as in '...a,ab->...b'")
    if operands.count(",") != 1:
        raise ValueError(
            f"{prefix} has {operands.count(',') + 1} operands: it needs two, the inputs and the kernel, as in"
            " '...a,ab->...b'"
        )
    inputs, kernel = operands.split(",")
    equation = Equation(text, *(_labels(prefix, term) for term in (inputs, kernel, outputs)))
    known = {*equation.inputs, *equation.kernel}
    unknown = [label for label in equation.outputs if label not in known]
    if unknown:
        raise ValueError(f"{prefix} has outputs {unknown} that neither operand has")
    if len(set(equation.outputs)) != len(equation.outputs):
        raise ValueError(f"{prefix} names an axis of its outputs twice")
    if ELLIPSIS in known and ELLIPSIS not in equation.outputs:
        raise ValueError(f"{prefix} has '...' among its operands, so its outputs need it too")
    return equation


def _labels(prefix: str, term: str) -> Labels:
    before, found, after = term.partition(ELLIPSIS)
    wrong = sorted({letter for letter in before + after if not letter.isalpha()})
    if wrong:
        raise ValueError(f"{prefix} has {', '.join(map(repr, wrong))} in {term!r}: axes are letters, and '...' once")
    return (*before, *([ELLIPSIS] if found else []), *after)


def expand(labels: Labels, ndim: int) -> Labels | None:
    """A label for each of `ndim` axes, "..." counted from its right as ...1, ...0; None if there are not as many."""
    hidden = ndim - sum(label != ELLIPSIS for label in labels)
    if hidden < 0 or (hidden > 0 and ELLIPSIS not in labels):
        return None
    return _spell_out(labels, hidden)


def _count_hidden(labels: Labels) -> int:
    return sum(label.startswith(ELLIPSIS) for label in labels)


def _spell_out(labels: Labels, count: int) -> Labels:
    """`labels` with `count` of their own in place of "...": NumPy aligns these axes at the right."""
    axes = tuple(f"{ELLIPSIS}{i}" for i in reversed(range(count)))
    return tuple(axis for label in labels for axis in (axes if label == ELLIPSIS else (label,)))


class Einsum(Layer):
    """A linear map of the inputs that an einsum equation describes, plus a bias.

    `y = einsum(einsum_str, inputs, kernel) + bias`, where the bias lies along those axes of `y` that `kernel` has.

    Initializers are called with the kernel's axes merged to [inputs, outputs], so that fans count what the equation
    sums: axes of the kernel that `y` lacks are inputs, all others are outputs. Without an equation in the constructor
    they are called with `kernel_shape`.

    Attributes:
        kernel: Param, `kernel_shape`.
        bias: Param, `bias_shape`, or None.

    Reference: `jax.numpy.einsum`, which computes it.

    Example:
        >>> import nnx, jax.numpy as jnp
        >>> layer = nnx.Einsum("nta,hab->nthb", (8, 2, 4), (8, 4), ctx=nnx.context(0))
        >>> layer(jnp.ones((16, 11, 2))).shape
        (16, 11, 8, 4)
        >>> layer.kernel.shape, layer.bias.shape
        ((8, 2, 4), (8, 4))
    """

    kernel: jax.Array
    bias: jax.Array | None
    einsum_op: Callable[..., Any] = staticmethod(jnp.einsum)
    preferred_element_type: DTypeLike | None = None

    def __init__(
        self,
        einsum_str: str | None,
        kernel_shape: int | Sequence[int],
        bias_shape: int | Sequence[int] | None = None,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = default_bias_init,
        promote_dtype: PromoteDtype = promote_dtype,
        einsum_op: Callable[..., Any] = jnp.einsum,
        preferred_element_type: DTypeLike | None = None,
        ctx: Context,
        kernel_metadata: Metadata = NO_METADATA,
        bias_metadata: Metadata = NO_METADATA,
    ) -> None:
        """Makes the layer.

        Args:
            einsum_str: an equation of two operands, the inputs and the kernel, and "->" with the outputs, such as
                "...a,ab->...b". `None` leaves it to the calls.
            kernel_shape: shape of the kernel.
            bias_shape: shape of the bias: the sizes of those axes of the outputs that the kernel has, in the order in
                which the outputs have them. `None` is no bias.
            dtype: dtype to compute in; `None` takes the common type of inputs and parameters.
            param_dtype: dtype of the parameters.
            precision: precision of the product, see `jax.lax.Precision`.
            kernel_init: initializer of the kernel.
            bias_init: initializer of the bias.
            promote_dtype: casts the tuple of inputs, kernel and bias, with the arguments of `nnx.promote_dtype`.
            einsum_op: computes the product, with the arguments of `jax.numpy.einsum`; may be a Module.
            preferred_element_type: dtype of the product, to which the bias is added in their common type.
            ctx: gives the keys, from its stream "params".
            kernel_metadata: metadata of the kernel, which win over those of its initializer and of the layer.
            bias_metadata: the same for the bias.

        Raises:
            ValueError: the equation is not one of two operands with its outputs spelled out.
            ShapeError: `kernel_shape` or `bias_shape` does not fit the equation.
        """
        self.einsum_str: str | None = None if einsum_str is None else einsum_str.replace(" ", "")
        self.kernel_shape: tuple[int, ...] = as_tuple(kernel_shape)
        self.bias_shape: tuple[int, ...] | None = None if bias_shape is None else as_tuple(bias_shape)
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self._choose(promote_dtype=promote_dtype, einsum_op=einsum_op, preferred_element_type=preferred_element_type)
        if self.einsum_str is None:
            self.kernel = make_param(
                ctx,
                kernel_init,
                self.kernel_shape,
                param_dtype,
                names=(None,) * len(self.kernel_shape),
                metadata=kernel_metadata,
            )
        else:
            kernel, shared = self._check_parameters(parse(type(self).__name__, self.einsum_str))
            summed = [i for i, label in enumerate(kernel) if label not in shared]
            order = [*summed, *(i for i in range(len(kernel)) if i not in summed)]
            sizes = tuple(self.kernel_shape[i] for i in order)
            first = next((i for i in range(len(kernel)) if i not in summed), None)
            inverse = [order.index(i) for i in range(len(order))]
            self.kernel = make_arranged_param(
                type(self).__name__,
                ctx,
                kernel_init,
                (math.prod(sizes[: len(summed)]), math.prod(sizes[len(summed) :])),
                param_dtype,
                lambda value: jnp.transpose(jnp.reshape(value, sizes), inverse),
                names=tuple("in" if [i] == summed[:1] else "out" if i == first else None for i in range(len(kernel))),
                metadata=kernel_metadata,
            )
        self.bias = None
        if self.bias_shape is not None:
            # Its axes are in the order of the outputs: none is sure to be the one that the kernel's name is of.
            names = (None,) * len(self.bias_shape)
            self.bias = make_param(ctx, bias_init, self.bias_shape, param_dtype, names=names, metadata=bias_metadata)

    def __call__(self, inputs: jax.Array, einsum_str: str | None = None, out_sharding: Any = None) -> jax.Array:
        """Applies the map.

        Args:
            inputs: an array with the axes of the equation's first operand.
            einsum_str: an equation for this call, in place of the constructor's.
            out_sharding: on a mesh of explicit axes, how the outputs are split, such as a PartitionSpec; `None` splits
                them as inputs and kernel are.

        Returns:
            An array with the axes of the equation's outputs.

        Raises:
            ValueError: there is no equation here nor in the constructor, or it is not one of two operands with its
                outputs spelled out.
            ShapeError: `inputs`, the kernel or the bias does not fit the equation.
        """
        kind = type(self).__name__
        text = self.einsum_str if einsum_str is None else einsum_str
        if text is None:
            raise ValueError(
                f"{kind}: there is no equation: give `einsum_str`, such as '...a,ab->...b', to the constructor or here"
            )
        equation = parse(kind, text)
        labels, _ = self._check_parameters(equation)
        of_inputs, outputs = self._check_inputs(equation, inputs, labels)
        x, kernel, bias = self.promote_dtype((inputs, self.kernel, self.bias), dtype=self.dtype)
        if is_explicit(x) or is_explicit(kernel):
            kernel, known = contraction(x, kernel, (of_inputs, labels, outputs))
            out_sharding = known if out_sharding is None else out_sharding
        options = {"preferred_element_type": self.preferred_element_type, "out_sharding": out_sharding}
        asked = {name: value for name, value in options.items() if value is not None}
        y: jax.Array = self.einsum_op(equation.text, x, kernel, precision=self.precision, **asked)
        if bias is None:
            return y
        sizes = dict(zip(labels, self.kernel_shape, strict=True))
        return add(y, fit_weights(bias.reshape(tuple(sizes.get(label, 1) for label in outputs)), y))

    def _check_parameters(self, equation: Equation) -> tuple[Labels, Labels]:
        """Labels of the kernel's axes, and those of them that are outputs; an error unless the shapes fit them."""
        kind = type(self).__name__
        labels = expand(equation.kernel, len(self.kernel_shape))
        sizes = {} if labels is None else dict(zip(labels, self.kernel_shape, strict=True))
        if labels is None or tuple(sizes[label] for label in labels) != self.kernel_shape:
            raise ShapeError(
                f"{kind}: expected `kernel_shape` with the axes [{', '.join(equation.kernel)}]"
                f" (einsum_str={equation.text!r}), got {self.kernel_shape}"
            )
        outputs = _spell_out(equation.outputs, _count_hidden(labels))
        shared = tuple(axis for axis in outputs if axis in sizes)
        expected = tuple(sizes[axis] for axis in shared)
        if self.bias_shape not in (None, expected):
            raise ShapeError(
                f"{kind}: expected `bias_shape` {expected}, the sizes of the outputs' axes that the kernel has"
                f" (einsum_str={equation.text!r}, kernel_shape={self.kernel_shape}), got {self.bias_shape}"
            )
        return labels, shared

    def _check_inputs(self, equation: Equation, inputs: jax.Array, kernel: Labels) -> tuple[Labels, Labels]:
        """Labels of the axes of `inputs` and of the outputs; an error unless `inputs` fit equation and kernel."""
        sizes = dict(zip(kernel, self.kernel_shape, strict=True))
        labels = expand(equation.inputs, inputs.ndim)
        fits = labels is not None
        for label, size in zip(labels or (), inputs.shape, strict=False):
            expected = sizes.setdefault(label, size)
            fits &= size == expected or (label.startswith(ELLIPSIS) and 1 in (size, expected))
        if labels is None or not fits:
            shape = dict(zip(kernel, self.kernel_shape, strict=True))
            hidden = tuple(size for label, size in shape.items() if label.startswith(ELLIPSIS))
            known = shape | ({ELLIPSIS: hidden} if hidden else {})
            wanted = ", ".join(f"{label}={known[label]}" if label in known else label for label in equation.inputs)
            raise ShapeError(
                f"{type(self).__name__}: expected `inputs` of shape [{wanted}] (einsum_str={equation.text!r},"
                f" kernel_shape={self.kernel_shape}), got {tuple(inputs.shape)}"
            )
        return labels, _spell_out(equation.outputs, max(_count_hidden(labels), _count_hidden(kernel)))
