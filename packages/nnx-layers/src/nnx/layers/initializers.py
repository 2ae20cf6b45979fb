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
    """A function from a key, a shape and a dtype to the first value of a parameter (or to a value with metadata)."""

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


constant = _by_value(_jax.constant, "Every element is `value`.")
normal = _by_value(_jax.normal, "Normal with mean 0 and standard deviation `stddev`.")
truncated_normal = _by_value(
    _jax.truncated_normal,
    "Normal with standard deviation `stddev` before truncation, cut at `lower` and `upper` standard deviations.",
)
uniform = _by_value(_jax.uniform, "Uniform over [0, `scale`).")
variance_scaling = _by_value(
    _jax.variance_scaling,
    """Variance `scale / n`, where `n` is the fan in, the fan out, or a mean of both.

    Args:
        scale: the numerator of the variance.
        mode: "fan_in", "fan_out", "fan_avg" or "fan_geo_avg".
        distribution: "truncated_normal", "normal" or "uniform".
        in_axis: axis or axes of the inputs in the parameter's shape.
        out_axis: axis or axes of the outputs.
        batch_axis: axis or axes that count for neither. Those left over are the receptive field.
        dtype: the dtype where a call names none.
    """,
)
lecun_normal = _by_value(
    _jax.lecun_normal, "Truncated normal of variance 1 / fan in (Klambauer et al., 2017, arXiv:1706.02515)."
)
lecun_uniform = _by_value(
    _jax.lecun_uniform, "Uniform of variance 1 / fan in (LeCun et al., 1998, Efficient BackProp)."
)
glorot_normal = _by_value(
    _jax.glorot_normal, "Truncated normal of variance 1 / mean of fan in and fan out (Glorot and Bengio, 2010)."
)
glorot_uniform = _by_value(
    _jax.glorot_uniform, "Uniform of variance 1 / mean of fan in and fan out (Glorot and Bengio, 2010)."
)
he_normal = _by_value(_jax.he_normal, "Truncated normal of variance 2 / fan in (He et al., 2015, arXiv:1502.01852).")
he_uniform = _by_value(_jax.he_uniform, "Uniform of variance 2 / fan in (He et al., 2015, arXiv:1502.01852).")
orthogonal = _by_value(
    _jax.orthogonal,
    "A random matrix with orthonormal rows or columns, times `scale` (Saxe et al., 2013, arXiv:1312.6120).",
)
delta_orthogonal = _by_value(
    _jax.delta_orthogonal,
    "A convolution kernel, orthogonal at its centre and zero elsewhere (Xiao et al., 2018, arXiv:1806.05393).",
)

xavier_normal = glorot_normal
xavier_uniform = glorot_uniform
kaiming_normal = he_normal
kaiming_uniform = he_uniform

# These are initializers themselves, not makers of them, and module-level functions already compare equal.
zeros = _jax.zeros
ones = _jax.ones


def zeros_init() -> Initializer:
    """The initializer `zeros`, for those used to calling every name of this module."""
    return zeros


def ones_init() -> Initializer:
    """The initializer `ones`, for those used to calling every name of this module."""
    return ones
