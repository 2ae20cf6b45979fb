"""Parameter initializers: those of `jax.nn.initializers`, which here compare, hash and print by value.

`jax.nn.initializers.lecun_normal() != jax.nn.initializers.lecun_normal()`: each call makes a new closure. A Module that
keeps one as an attribute would then differ from its twin and compile again. Ours are plain values.

Example:
    >>> import nnx, jax, jax.numpy as jnp
    >>> from nnx import initializers
    >>> init = initializers.normal(0.02)
    >>> init(jax.random.key(0), (2, 3), jnp.bfloat16).shape
    (2, 3)
    >>> init == initializers.normal(stddev=0.02)
    True
    >>> init
    normal(stddev=0.02)
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, Protocol

import jax
import numpy as np
from jax.nn import initializers as _jax
from jax.typing import DTypeLike

__all__ = [
    "Initializer",
    "constant",
    "delta_orthogonal",
    "glorot_normal",
    "glorot_uniform",
    "he_normal",
    "he_uniform",
    "kaiming_normal",
    "kaiming_uniform",
    "lecun_normal",
    "lecun_uniform",
    "normal",
    "ones",
    "ones_init",
    "orthogonal",
    "truncated_normal",
    "uniform",
    "variance_scaling",
    "xavier_normal",
    "xavier_uniform",
    "zeros",
    "zeros_init",
]

P = ParamSpec("P")


class Initializer(Protocol):
    """A function from a key, a shape and a dtype to the first value of a parameter (or to a value with metadata).

    Reference: the initializers of `jax.nn.initializers` are such functions.

    Example:
        >>> import jax.numpy as jnp, nnx
        >>> def eye(key, shape, dtype=jnp.float32):
        ...     return jnp.eye(*shape, dtype=dtype)
        >>> nnx.Linear(2, 2, kernel_init=eye, ctx=nnx.context(0)).kernel.tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """

    def __call__(self, key: jax.Array, shape: Sequence[int], dtype: Any = ..., /) -> Any:
        """Makes the value.

        Args:
            key: a JAX random key.
            shape: the shape of the parameter.
            dtype: its dtype.

        Returns:
            An array, or what `nnx.with_metadata` makes of one.
        """
        ...


@dataclasses.dataclass(frozen=True, repr=False)
class _ByValue:
    """An initializer of `jax.nn.initializers`, held by its name and options rather than as a closure."""

    name: str
    options: tuple[tuple[str, Any], ...] = dataclasses.field(compare=False)
    fingerprint: tuple[tuple[str, Any], ...]

    def __call__(
        self, key: jax.Array, shape: Sequence[int], dtype: DTypeLike | None = None, out_sharding: Any = None
    ) -> jax.Array:
        if any(isinstance(value, jax.core.Tracer) for _, value in self.options):
            return _apply(self, key, tuple(shape), dtype, out_sharding)  # cannot be kept beyond its trace
        return _jitted(self, key, tuple(shape), dtype, out_sharding)

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{name}={value!r}' for name, value in self.options if value is not None)})"


def _apply(init: _ByValue, key: jax.Array, shape: tuple[int, ...], dtype: Any, out_sharding: Any) -> jax.Array:
    # `constant` reads an explicit None as the dtype itself, so what was not given is not passed.
    given: dict[str, Any] = {"dtype": dtype, "out_sharding": out_sharding}
    made: Callable[..., jax.Array] = getattr(_jax, init.name)(**dict(init.options))
    return made(key, shape, **{name: value for name, value in given.items() if value is not None})


# One compiled call: the scale of a variance alone takes four operations, each of which costs as much to dispatch as the
# random numbers take to make.
_jitted = jax.jit(_apply, static_argnums=(0, 2, 3, 4), inline=True)


def takes_key(init: Any) -> bool:
    """Whether what an initializer makes depends on its key."""
    while isinstance(wrapped := getattr(init, "__wrapped__", None), _ByValue) or wrapped in (zeros, ones):
        init = wrapped
    return not (init is zeros or init is ones or (type(init) is _ByValue and init.name == "constant"))


def _frozen(value: Any) -> Any:
    """An option as something that nobody changes later: a tuple for a list, a NumPy copy for an array."""
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, np.ndarray | jax.Array) and not isinstance(value, jax.core.Tracer):
        copy = np.array(value)
        copy.flags.writeable = False
        return copy
    return value


def _fingerprint(value: Any) -> Any:
    """What makes two options equal: content for arrays, else exact type and digits (0.0 is not -0.0, nor 1 True)."""
    if isinstance(value, np.ndarray):
        return (value.shape, value.dtype.str, value.tobytes())
    return (type(value).__name__, id(value) if isinstance(value, jax.core.Tracer) else repr(value))


def _by_value(factory: Callable[P, Any], doc: str) -> Callable[P, _ByValue]:
    """`factory` with the same signature, returning an initializer that compares by value."""
    signature = inspect.signature(factory)

    @functools.wraps(factory)
    def make(*args: P.args, **kwargs: P.kwargs) -> _ByValue:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        options = tuple((name, _frozen(value)) for name, value in bound.arguments.items())
        return _ByValue(factory.__name__, options, tuple((name, _fingerprint(value)) for name, value in options))

    make.__module__ = __name__
    make.__doc__ = doc
    return make


_ARGS = {
    "value": "a number, or an array that broadcasts to the parameter's shape.",
    "stddev": "the standard deviation.",
    "lower": "where the distribution is cut, in standard deviations before truncation.",
    "upper": "the same at the other end.",
    "scale": "what the values are scaled by.",
    "mode": '"fan_in", "fan_out", "fan_avg" or "fan_geo_avg".',
    "distribution": '"truncated_normal", "normal" or "uniform".',
    "in_axis": "axis or axes of the inputs in the parameter's shape.",
    "out_axis": "axis or axes of the outputs.",
    "batch_axis": "axis or axes that count for neither. Those left over are the receptive field.",
    "column_axis": "the axis that holds the columns.",
    "dtype": "the dtype where a call names none; `None` is JAX's default.",
}


def _doc(contract: str, equation: str, factory: Callable[..., Any], reference: str, call: str, result: str) -> str:
    """A docstring; the factories take the same few arguments."""
    args = "\n".join(f"    {name}: {_ARGS[name]}" for name in inspect.signature(factory).parameters)
    modules = "jax, nnx" if "jax." in call else "nnx"
    return (
        f"{contract}\n\n{equation}\n\nArgs:\n{args}\n\nReturns:\n    An initializer.\n\nReference: {reference}\n\n"
        f"Example:\n    >>> import {modules}\n    >>> nnx.initializers.{call}\n    {result}\n"
    )


def _fans(factory: Callable[..., Any], kind: str, variance: str, reference: str) -> Callable[..., _ByValue]:
    """An initializer whose variance goes by the sizes of its parameter."""
    contract = f"{kind}, with mean 0 and a variance that goes by the parameter's fans."
    name = factory.__name__
    call, result = f"{name}(in_axis=(-3, -2))", f"{name}(in_axis=(-3, -2), out_axis=-1, batch_axis=())"
    return _by_value(factory, _doc(contract, f"`variance = {variance}`", factory, reference, call, result))


constant = _by_value(
    _jax.constant,
    _doc(
        "Every element is `value`.",
        "`w = value`",
        _jax.constant,
        "`jax.nn.initializers.constant`.",
        "constant(0.5)(jax.random.key(0), (2,)).tolist()",
        "[0.5, 0.5]",
    ),
)
normal = _by_value(
    _jax.normal,
    _doc(
        "Normal with mean 0.",
        "`variance = stddev ** 2`",
        _jax.normal,
        "`jax.nn.initializers.normal`.",
        "normal()",
        "normal(stddev=0.01)",
    ),
)
truncated_normal = _by_value(
    _jax.truncated_normal,
    _doc(
        "Normal with mean 0 and standard deviation `stddev` before truncation, cut at both ends.",
        "`w = stddev * z`, `z` a standard normal between `lower` and `upper`.",
        _jax.truncated_normal,
        "`jax.nn.initializers.truncated_normal`.",
        "truncated_normal(0.1)",
        "truncated_normal(stddev=0.1, lower=-2.0, upper=2.0)",
    ),
)
uniform = _by_value(
    _jax.uniform,
    _doc(
        "Uniform over [0, `scale`).",
        "`mean = scale / 2`, `variance = scale ** 2 / 12`",
        _jax.uniform,
        "`jax.nn.initializers.uniform`.",
        "uniform()",
        "uniform(scale=0.01)",
    ),
)
variance_scaling = _by_value(
    _jax.variance_scaling,
    _doc(
        "Mean 0 and a variance that goes by the parameter's fans.",
        "`variance = scale / n`, where `n` is the fan in, the fan out, or their arithmetic or geometric mean.",
        _jax.variance_scaling,
        "He et al., 2015, Delving Deep into Rectifiers, arXiv:1502.01852.",
        'variance_scaling(2.0, "fan_in", "normal")',
        "variance_scaling(scale=2.0, mode='fan_in', distribution='normal', in_axis=-2, out_axis=-1, batch_axis=())",
    ),
)

_TRUNCATED, _UNIFORM = "Truncated normal", "Uniform"
_LECUN = "LeCun et al., 1998, Efficient BackProp; Klambauer et al., 2017, arXiv:1706.02515."
_GLOROT = "Glorot and Bengio, 2010, Understanding the difficulty of training deep feedforward neural networks."
_HE = "He et al., 2015, Delving Deep into Rectifiers, arXiv:1502.01852."

lecun_normal = _fans(_jax.lecun_normal, _TRUNCATED, "1 / fan_in", _LECUN)
lecun_uniform = _fans(_jax.lecun_uniform, _UNIFORM, "1 / fan_in", _LECUN)
glorot_normal = _fans(_jax.glorot_normal, _TRUNCATED, "2 / (fan_in + fan_out)", _GLOROT)
glorot_uniform = _fans(_jax.glorot_uniform, _UNIFORM, "2 / (fan_in + fan_out)", _GLOROT)
he_normal = _fans(_jax.he_normal, _TRUNCATED, "2 / fan_in", _HE)
he_uniform = _fans(_jax.he_uniform, _UNIFORM, "2 / fan_in", _HE)
orthogonal = _by_value(
    _jax.orthogonal,
    _doc(
        "A random matrix with orthonormal rows or columns, whichever are fewer, times `scale`.",
        "`w w^T = scale ** 2 I`, or `w^T w`, the matrix having the size of `column_axis` and that of all other axes.",
        _jax.orthogonal,
        "Saxe et al., 2013, Exact solutions to the nonlinear dynamics of learning, arXiv:1312.6120.",
        "orthogonal(2.0)",
        "orthogonal(scale=2.0, column_axis=-1)",
    ),
)
delta_orthogonal = _by_value(
    _jax.delta_orthogonal,
    _doc(
        "A kernel of a convolution, orthogonal at its centre and zero elsewhere.",
        "`w[centre] w[centre]^T = scale ** 2 I`, [in_features, out_features], the outputs being at least as many.",
        _jax.delta_orthogonal,
        "Xiao et al., 2018, Dynamical Isometry and a Mean Field Theory of CNNs, arXiv:1806.05393.",
        "delta_orthogonal()",
        "delta_orthogonal(scale=1.0, column_axis=-1)",
    ),
)

xavier_normal = glorot_normal
xavier_uniform = glorot_uniform
kaiming_normal = he_normal
kaiming_uniform = he_uniform

# These are initializers themselves, not makers of them, and module-level functions already compare equal.
zeros = _jax.zeros
ones = _jax.ones


def zeros_init() -> Initializer:
    """The initializer `zeros`, for those used to calling every name of this module.

    Returns:
        An initializer.

    Reference: `jax.nn.initializers.zeros`, which it is.

    Example:
        >>> import jax, nnx
        >>> nnx.initializers.zeros_init()(jax.random.key(0), (2,)).tolist()
        [0.0, 0.0]
    """
    return zeros


def ones_init() -> Initializer:
    """The initializer `ones`, for those used to calling every name of this module.

    Returns:
        An initializer.

    Reference: `jax.nn.initializers.ones`, which it is.

    Example:
        >>> import jax, nnx
        >>> nnx.initializers.ones_init()(jax.random.key(0), (2,)).tolist()
        [1.0, 1.0]
    """
    return ones
