"""Norms of weights: a layer called with some of its parameters normalised, while those it holds stay as they are."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from nnx.core import All, BatchStat, Context, Module, Param, PathGlob, Sequence, ShapeError, State, StructureError
from nnx.layers import initializers
from nnx.layers._common import Axes, as_tuple, as_value, make_param, normalize_axes
from nnx.layers._dtypes import canonicalize_dtype, statistics_dtype
from nnx.layers._explicit import last, like, row_product
from nnx.layers.initializers import Initializer

__all__ = ["SpectralNorm", "WeightNorm"]

Path = tuple[str, ...]

_default_u_init = initializers.normal()
_kernels = PathGlob("**/kernel")


class _WeightNorm(Module):
    """What both share: the layer, the paths of the parameters to normalise, and the call with other values there."""

    layer_instance: Module
    paths: tuple[Path, ...]

    def _set_layer(self, layer: Module, params: State) -> None:
        self.layer_instance = layer
        self.paths = params.paths

    def _params(self) -> dict[Path, jax.Array]:
        state = self.layer_instance.get_state()
        for path in self.paths:
            if path not in state:
                raise StructureError(
                    f"{type(self).__name__}: the layer has no parameter `{'/'.join(path)}` any more, which it had when"
                    f" it was wrapped. It has: {', '.join('/'.join(known) for known in state.paths)}"
                )
        return {path: state[path].value for path in self.paths}

    def _call(self, params: Mapping[Path, jax.Array], args: Any, kwargs: Any, ctx: Context | None) -> Any:
        """The layer's call with `params` at their paths.

        A copy is what is called: to write the parameters of the layer itself, if only for the time of the call, is
        allowed in no other trace than its own, such as the body of `jax.vmap`. What else the call changed, running
        averages for example, is taken over.
        """
        layer = self.layer_instance
        state, definition = layer.partition()
        held = dict(zip(state.paths, state.raw_values, strict=True))
        copy = definition.merge(state.replace_values([params.get(path, value) for path, value in held.items()]))
        leaves = copy.mutable_state_dict()
        before = {path: leaf.value for path, leaf in leaves.items()}
        # A chain of one, which hands `ctx` to a layer that takes it.
        out = Sequence([copy])(*args, ctx=ctx, **kwargs)
        for path, param in params.items():
            if leaves[path].value is param:
                before[path] = leaves[path].value = held[path]
        if copy.get_module_def() is not definition or any(leaf.value is not before[p] for p, leaf in leaves.items()):
            layer.update_state(copy)
        return out


def _check_module(kind: str, layer: Any) -> None:
    if not isinstance(layer, Module):
        raise TypeError(f"{kind}: expected `layer_instance` to be a Module, got {type(layer).__name__}")


def _holder(root: Module, path: Path) -> Module:
    """The Module at `path` below `root`, made where there is none."""
    for name in path:
        if name not in vars(root):
            setattr(root, name, Module())
        root = getattr(root, name)
    return root


def _at(root: Any, path: Path) -> Any:
    return functools.reduce(getattr, path, root)


def _unit(x: jax.Array, axes: tuple[int, ...] | None, epsilon: float) -> jax.Array:
    """`x` divided by its norm over `axes`; zeros stay zeros."""
    return x * lax.rsqrt(jnp.sum(x * x, axis=axes, keepdims=True) + epsilon)


@jax.custom_jvp
def _largest(matrix: Any, v: Any, u: Any, sigma: jax.Array) -> jax.Array:  # noqa: ARG001 - for the rule below
    """`v matrix u^T`, which is known to be `sigma`; no gradient goes through the others."""
    return sigma


@_largest.defjvp
def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    _, v, u, sigma = primals
    return sigma, row_product(row_product(v, tangents[0]), u.T)[0, 0]


class WeightNorm(_WeightNorm):
    """A layer whose weights are split into length and direction: `w = scale * v / |v|`.

    `v` is the layer's own parameter, which stays as it is, and `|v|` its norm over all axes but `feature_axes`.

    Attributes:
        layer_instance: the layer.
        scales: a Module with a Param for each normalised parameter, at its path, [sizes of `feature_axes`]; or None.

    Reference: Salimans and Kingma, 2016, Weight Normalization, arXiv:1602.07868.

    Example:
        >>> import nnx, jax.numpy as jnp
        >>> ctx = nnx.context(0)
        >>> layer = nnx.WeightNorm(nnx.Linear(8, 4, use_bias=False, ctx=ctx), ctx=ctx)
        >>> effective = layer(jnp.eye(8))
        >>> print(jnp.linalg.norm(effective, axis=0).round(3))
        [1. 1. 1. 1.]
        >>> layer.scales.kernel.shape
        (4,)
    """

    def __init__(
        self,
        layer_instance: Module,
        *,
        feature_axes: Axes | None = -1,
        use_scale: bool = True,
        scale_init: Initializer = initializers.ones,
        epsilon: float = 1e-12,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        variable_filter: Any = _kernels,
        ctx: Context,
    ) -> None:
        """Makes the layer.

        Args:
            layer_instance: the layer to wrap.
            feature_axes: the axes that have a norm and a scale for each index; `None` is one norm for the whole.
            use_scale: whether the length is learned; else it is 1.
            scale_init: initializer of the scales.
            epsilon: added to the square of a norm.
            dtype: dtype of the normalised parameters; `None` takes the common type of parameter and scale.
            param_dtype: dtype of the scales.
            variable_filter: the parameters to normalise, a filter over their paths and Variables; by default those
                called `kernel`.
            ctx: gives the keys, from its stream "params".

        Raises:
            ShapeError: a parameter lacks one of `feature_axes`.
            TypeError: `layer_instance` is no Module.
            ValueError: the filter matches no parameter.
        """
        kind = type(self).__name__
        _check_module(kind, layer_instance)
        params = layer_instance.filter(All(Param, variable_filter))
        if not params:
            raise ValueError(
                f"{kind}: variable_filter matches no parameter of the {type(layer_instance).__name__}, which has:"
                f" {', '.join('/'.join(path) for path in layer_instance.filter(Param).paths) or 'none'}"
            )
        self._set_layer(layer_instance, params)
        self.feature_axes: tuple[int, ...] = () if feature_axes is None else as_tuple(feature_axes)
        self.use_scale = use_scale
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.scales: Module | None = Module() if use_scale else None
        for path, variable in params.items():
            axes = self._axes(variable.value)
            if self.scales is not None:
                shape = tuple(variable.value.shape[axis] for axis in axes)
                scale = make_param(ctx, scale_init, shape, param_dtype, names=(None,) * len(shape))
                setattr(_holder(self.scales, path[:-1]), path[-1], scale)

    def _axes(self, param: jax.Array) -> tuple[int, ...]:
        return tuple(sorted(normalize_axes(self.feature_axes, param.ndim, f"{type(self).__name__}: feature_axes")))

    def _normalized(self, path: Path, param: jax.Array) -> jax.Array:
        axes = self._axes(param)
        work = statistics_dtype(param.dtype)
        unit = _unit(param.astype(work), tuple(i for i in range(param.ndim) if i not in axes), self.epsilon)
        if self.scales is None:
            return unit.astype(canonicalize_dtype(param, dtype=self.dtype))
        scale = _at(self.scales, path)
        aligned = scale.reshape([size if i in axes else 1 for i, size in enumerate(param.shape)])
        return (unit * aligned.astype(work)).astype(canonicalize_dtype(param, scale, dtype=self.dtype))

    def __call__(self, x: Any, *args: Any, ctx: Context | None = None, **kwargs: Any) -> Any:
        """Calls the layer with its weights normalised.

        Args:
            x: the layer's first argument.
            *args: its further arguments.
            ctx: handed to the layer if it takes `ctx`.
            **kwargs: its keyword arguments.

        Returns:
            What the layer returns.

        Raises:
            StructureError: the layer has lost one of the parameters that it was wrapped with.
        """
        normalized = {path: self._normalized(path, param) for path, param in self._params().items()}
        return self._call(normalized, (x, *args), kwargs, ctx)


class SpectralNorm(_WeightNorm):
    """A layer whose weight matrices are divided by their largest singular value: `w / sigma(w)`.

    ```
    v = u w^T / |u w^T|,  u <- v w / |v w|      n_steps times
    sigma = v w u^T
    ```

    This is a power iteration; one step a call is enough, as `u` is kept and weights change slowly. No gradient goes
    through `u` and `v`. Parameters with more than two axes count as matrices of all axes but the last, by the last;
    those with fewer than two are left alone. The layer's own parameters stay as they are.

    Attributes:
        layer_instance: the layer.
        batch_stats: a Module that has, at the path of each normalised parameter, two BatchStats: `u`, [1, last size],
            and `sigma`, a scalar.

    Reference: Miyato et al., 2018, Spectral Normalization for Generative Adversarial Networks, arXiv:1802.05957.

    Example:
        >>> import nnx, jax.numpy as jnp
        >>> ctx = nnx.context(0)
        >>> layer = nnx.SpectralNorm(nnx.Linear(4, 4, use_bias=False, ctx=ctx), n_steps=50, ctx=ctx)
        >>> effective = layer(jnp.eye(4))
        >>> print(jnp.linalg.norm(effective, ord=2).round(3))
        1.0
        >>> layer.batch_stats.kernel.u.shape
        (1, 4)
    """

    def __init__(
        self,
        layer_instance: Module,
        *,
        n_steps: int = 1,
        epsilon: float = 1e-12,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        error_on_non_matrix: bool = False,
        update_stats: bool | None = None,
        ctx: Context,
    ) -> None:
        """Makes the layer.

        Args:
            layer_instance: the layer to wrap.
            n_steps: number of steps of the power iteration in a call.
            epsilon: added to the squares of norms in it.
            dtype: dtype of the normalised parameters; `None` is their own.
            param_dtype: dtype of `u` and `sigma`, but at least float32.
            error_on_non_matrix: whether a parameter with more than two axes is an error.
            update_stats: whether calls keep the new `u` and `sigma`; `None` leaves it to the call or the Context, and
                is True where neither says so.
            ctx: gives the keys of the first `u`, from its stream "params".

        Raises:
            ShapeError: a parameter has more than two axes, and `error_on_non_matrix` is set.
            TypeError: `layer_instance` is no Module.
            ValueError: `n_steps` is less than 1, or no parameter has two axes.
        """
        kind = type(self).__name__
        _check_module(kind, layer_instance)
        if n_steps < 1:
            raise ValueError(f"{kind}: n_steps must be at least 1, got {n_steps}")
        params = layer_instance.filter(All(Param, lambda _, variable: variable.value.ndim > 1))
        if not params:
            raise ValueError(f"{kind}: the {type(layer_instance).__name__} has no parameter with two axes or more")
        self._set_layer(layer_instance, params)
        self.n_steps = n_steps
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.error_on_non_matrix = error_on_non_matrix
        self.update_stats = update_stats
        self.batch_stats: Module = Module()
        for path, variable in params.items():
            shape = variable.value.shape
            if error_on_non_matrix and len(shape) > 2:
                raise ShapeError(f"{kind}: expected matrices, got `{'/'.join(path)}` of shape {tuple(shape)}")
            work = statistics_dtype(param_dtype)
            stats: Any = _holder(self.batch_stats, path)
            stats.u = as_value(
                BatchStat(_default_u_init(ctx.make_rng("params"), (1, shape[-1]), work), sharding=(None, None))
            )
            stats.sigma = as_value(BatchStat(jnp.ones((), work)))

    def _normalized(self, path: Path, param: jax.Array, *, update: bool) -> jax.Array:
        stats = _at(self.batch_stats, path)
        work = statistics_dtype(param.dtype)
        matrix = last(param.astype(work)).reshape(-1, param.shape[-1])
        fixed = lax.stop_gradient(matrix)
        u = v = before = stats.u.astype(work)
        square = inverse = jnp.ones((), work)
        for _ in range(self.n_steps):
            v = _unit(row_product(u, fixed.T), None, self.epsilon)
            u = row_product(v, fixed)
            square = jnp.sum(u * u)
            inverse = lax.rsqrt(square + self.epsilon)
            u = u * inverse
        sigma = _largest(matrix, v, u, square * inverse)  # for the last `u` before its division is `v w`
        known = sigma > 0
        if update:
            # A matrix of zeros has no direction: the next one would start from `u = 0` and never leave it.
            stats.u = jnp.where(known, like(u, before), before).astype(stats.u.dtype)
            stats.sigma = lax.stop_gradient(sigma).astype(stats.sigma.dtype)
        scaled = matrix / jnp.where(known, sigma, 1)
        return like(scaled.reshape(param.shape), param).astype(canonicalize_dtype(param, dtype=self.dtype))

    def __call__(self, x: Any, update_stats: bool | None = None, *, ctx: Context | None = None, **kwargs: Any) -> Any:
        """Calls the layer with its weights normalised.

        Args:
            x: the layer's argument.
            update_stats: whether to keep the new `u` and `sigma`; overrides the constructor and the Context.
            ctx: handed to the layer if it takes `ctx`; with its flag `use_running_average` set, nothing is kept.
            **kwargs: the layer's keyword arguments.

        Returns:
            What the layer returns.

        Raises:
            StructureError: the layer has lost one of the parameters that it was wrapped with.
        """
        update = self.update_stats if update_stats is None else update_stats
        if update is None:
            update = ctx is None or not ctx.get_flag("use_running_average", default=False)
        normalized = {path: self._normalized(path, param, update=update) for path, param in self._params().items()}
        return self._call(normalized, (x,), kwargs, ctx)
