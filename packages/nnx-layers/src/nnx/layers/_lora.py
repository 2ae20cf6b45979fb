"""Low-rank adaptation: a small product of matrices beside a layer learns what the layer itself need not."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from nnx.core import Context, Module, Param, Variable
from nnx.layers import initializers
from nnx.layers._common import (
    NO_METADATA,
    Layer,
    Metadata,
    PrecisionLike,
    PromoteDtype,
    check_features,
    make_param,
    normalize_axes,
    project,
)
from nnx.layers._dtypes import promote_dtype, statistics_dtype
from nnx.layers._explicit import like
from nnx.layers._linear import Linear, LinearGeneral
from nnx.layers.initializers import Initializer

__all__ = ["LoRA", "LoRALinear", "LoRALinearGeneral", "LoRAParam"]

default_a_initializer = initializers.he_uniform()
default_b_initializer = initializers.zeros


class LoRAParam(Param[Any]):
    """A parameter of a LoRA layer: `wrt=LoRAParam` trains these and nothing else. It is a Param too.

    Reference: Hu et al., 2021, LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685.

    Example:
        >>> import nnx
        >>> layer = nnx.LoRALinear(3, 4, lora_rank=2, ctx=nnx.context(0))
        >>> layer.filter(nnx.LoRAParam).paths
        (('lora', 'lora_a'), ('lora', 'lora_b'))
    """

    collection = "lora_params"


class LoRA(Layer):
    """A map of low rank: `y = scale * x @ lora_a @ lora_b`, added to what `base_module` gives, if there is one.

    `scale` is `alpha / lora_rank`, or 1 without `alpha`. `lora_b` starts at zero, and so does the map.

    Attributes:
        lora_a: LoRAParam, [in_features, lora_rank].
        lora_b: LoRAParam, [lora_rank, out_features].
        base_module: a Module, or None.

    Reference: Hu et al., 2021, LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685.

    Example:
        >>> import nnx, jax.numpy as jnp
        >>> ctx = nnx.context(0)
        >>> base = nnx.Linear(3, 4, ctx=ctx)
        >>> layer = nnx.LoRA(3, 2, 4, base_module=base, ctx=ctx)
        >>> x = jnp.ones((16, 3))
        >>> bool((layer(x) == base(x)).all())
        True
        >>> layer.filter(nnx.LoRAParam).paths
        (('lora_a',), ('lora_b',))
    """

    lora_a: jax.Array
    lora_b: jax.Array

    def __init__(
        self,
        in_features: int,
        lora_rank: int,
        out_features: int,
        *,
        base_module: Module | None = None,
        alpha: float | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: PrecisionLike = None,
        a_initializer: Initializer = default_a_initializer,
        b_initializer: Initializer = default_b_initializer,
        lora_param_type: type[Variable[Any]] = LoRAParam,
        promote_dtype: PromoteDtype = promote_dtype,
        ctx: Context,
        a_metadata: Metadata = NO_METADATA,
        b_metadata: Metadata = NO_METADATA,
    ) -> None:
        """Makes the layer.

        Args:
            in_features: size of the last axis of the inputs.
            lora_rank: the rank of the map.
            out_features: size of the last axis of the outputs.
            base_module: a Module that is called with the same inputs, and to whose outputs the map is added.
            alpha: the map is scaled by `alpha / lora_rank`; `None` leaves it unscaled.
            dtype: dtype to compute in; `None` takes the common type of inputs and parameters.
            param_dtype: dtype of the parameters.
            precision: precision of the products, see `jax.lax.Precision`.
            a_initializer: initializer of `lora_a`.
            b_initializer: initializer of `lora_b`; anything but zeros changes the outputs before any training.
            lora_param_type: the Variable type of the parameters.
            promote_dtype: casts the tuple of inputs, `lora_a` and `lora_b`, with the arguments of `nnx.promote_dtype`.
            ctx: gives the keys, from its stream "params".
            a_metadata: metadata of `lora_a`, which win over those of its initializer and of the layer.
            b_metadata: the same for `lora_b`.

        Raises:
            TypeError: `base_module` cannot be called.
            ValueError: `lora_rank` is less than 1.
        """
        kind = type(self).__name__
        if lora_rank < 1:
            raise ValueError(f"{kind}: lora_rank must be at least 1, got {lora_rank}")
        if base_module is not None and not callable(base_module):
            raise TypeError(f"{kind}: base_module must be callable, got a {type(base_module).__name__}")
        self.in_features = in_features
        self.lora_rank = lora_rank
        self.out_features = out_features
        self.alpha = alpha
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.base_module = base_module
        self._choose(promote_dtype=promote_dtype)
        self.lora_a = make_param(
            ctx, a_initializer, (in_features, lora_rank), param_dtype, lora_param_type, ("in", "lora"), a_metadata
        )
        self.lora_b = make_param(
            ctx, b_initializer, (lora_rank, out_features), param_dtype, lora_param_type, ("lora", "out"), b_metadata
        )

    @property
    def scale(self) -> float:
        """What the product of `lora_a` and `lora_b` is multiplied by."""
        return 1.0 if self.alpha is None else self.alpha / self.lora_rank

    def __call__(self, x: jax.Array, **kwargs: Any) -> jax.Array:
        """Applies the map, and `base_module`.

        Args:
            x: [..., in_features].
            **kwargs: further arguments of `base_module`.

        Returns:
            [..., out_features], in the dtype of what `base_module` gives, if there is one.

        Raises:
            ShapeError: the last axis of `x` is not `in_features`.
        """
        check_features(self, "x", x, self.in_features, f"in_features={self.in_features}")
        inputs, a, b = self.promote_dtype((x, self.lora_a, self.lora_b), dtype=self.dtype)
        # Scaled where it is smallest.
        y = project(project(inputs, a, precision=self.precision) * self.scale, b, precision=self.precision)
        if self.base_module is None:
            return y
        base: jax.Array = self.base_module(x, **kwargs)  # type: ignore[operator]
        return base + y.astype(base.dtype)

    def delta(self) -> jax.Array:
        """The map as one matrix, `scale * lora_a @ lora_b`, in float32 or wider.

        Returns:
            [in_features, out_features].
        """
        work = statistics_dtype(self.lora_a.dtype)
        return project(self.lora_a.astype(work), self.lora_b.astype(work), precision="highest") * self.scale


class LoRALinear(Linear):
    """A Linear with a map of low rank beside it: `y = x @ kernel + bias + scale * x @ lora_a @ lora_b`.

    `kernel` and `bias` have the paths that they have in a Linear, so its weights fit.

    Attributes:
        kernel: Param, [in_features, out_features].
        bias: Param, [out_features], or None.
        lora: a LoRA.

    Reference: Hu et al., 2021, LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685.

    Example:
        >>> import nnx, jax.numpy as jnp
        >>> layer = nnx.LoRALinear(3, 4, lora_rank=2, ctx=nnx.context(0))
        >>> layer(jnp.ones((16, 3))).shape, layer.lora.lora_a.shape
        ((16, 4), (3, 2))
    """

    lora: LoRA

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        lora_rank: int,
        alpha: float | None = None,
        lora_dtype: DTypeLike | None = None,
        lora_param_dtype: DTypeLike = jnp.float32,
        a_initializer: Initializer = default_a_initializer,
        b_initializer: Initializer = default_b_initializer,
        lora_param_type: type[Variable[Any]] = LoRAParam,
        lora_promote_dtype: PromoteDtype = promote_dtype,
        ctx: Context,
        a_metadata: Metadata = NO_METADATA,
        b_metadata: Metadata = NO_METADATA,
        **kwargs: Any,
    ) -> None:
        """Makes the layer.

        Args:
            in_features: size of the last axis of the inputs.
            out_features: size of the last axis of the outputs.
            lora_rank: the rank of the map beside the layer.
            alpha: that map is scaled by `alpha / lora_rank`; `None` leaves it unscaled.
            lora_dtype: dtype to compute the map in; `None` takes the common type of inputs and its parameters. What it
                gives is cast to the dtype of the layer's outputs.
            lora_param_dtype: dtype of its parameters.
            a_initializer: initializer of `lora_a`.
            b_initializer: initializer of `lora_b`.
            lora_param_type: the Variable type of its parameters.
            lora_promote_dtype: the map's `promote_dtype`.
            ctx: gives the keys, from its stream "params".
            a_metadata: metadata of `lora_a`.
            b_metadata: metadata of `lora_b`.
            **kwargs: the other options of Linear.

        Raises:
            ValueError: `lora_rank` is less than 1.
        """
        super().__init__(in_features, out_features, ctx=ctx, **kwargs)
        self.lora = LoRA(
            in_features,
            lora_rank,
            out_features,
            alpha=alpha,
            dtype=lora_dtype,
            param_dtype=lora_param_dtype,
            precision=self.precision,
            a_initializer=a_initializer,
            b_initializer=b_initializer,
            lora_param_type=lora_param_type,
            promote_dtype=lora_promote_dtype,
            ctx=ctx,
            a_metadata=a_metadata,
            b_metadata=b_metadata,
        )

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Applies the layer and the map beside it.

        Args:
            inputs: [..., in_features].
            out_sharding: on a mesh of explicit axes, how the outputs are split, such as a PartitionSpec; `None` splits
                them as inputs and kernel are.

        Returns:
            [..., out_features].

        Raises:
            ShapeError: the last axis of `inputs` is not `in_features`.
        """
        y = super().__call__(inputs, out_sharding)
        return y + like(self.lora(inputs).astype(y.dtype), y)


class LoRALinearGeneral(LinearGeneral):
    """A LinearGeneral, such as the projections of attention, with a map of low rank beside it.

    `y[..., o] = sum_i x[..., i] (kernel[i, o] + scale * sum_r lora_a[i, r] lora_b[r, o]) + bias[o]`

    The map goes from the contracted axes, merged into one, to the new axes. `apply_lora` makes such layers.

    Attributes:
        kernel: Param, [*in_features, *out_features].
        bias: Param, [*out_features], or None.
        lora: a LoRA.

    Reference: Hu et al., 2021, LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685.

    Example:
        >>> import nnx, jax.numpy as jnp
        >>> layer = nnx.LoRALinearGeneral(4, (2, 3), lora_rank=1, ctx=nnx.context(0))
        >>> layer(jnp.ones((16, 4))).shape, layer.lora.lora_b.shape
        ((16, 2, 3), (1, 6))
    """

    lora: LoRA

    def __init__(
        self,
        in_features: int | tuple[int, ...],
        out_features: int | tuple[int, ...],
        *,
        lora_rank: int,
        alpha: float | None = None,
        lora_dtype: DTypeLike | None = None,
        lora_param_dtype: DTypeLike = jnp.float32,
        a_initializer: Initializer = default_a_initializer,
        b_initializer: Initializer = default_b_initializer,
        lora_param_type: type[Variable[Any]] = LoRAParam,
        lora_promote_dtype: PromoteDtype = promote_dtype,
        ctx: Context,
        a_metadata: Metadata = NO_METADATA,
        b_metadata: Metadata = NO_METADATA,
        **kwargs: Any,
    ) -> None:
        """Makes the layer.

        Args:
            in_features: sizes of the axes to contract.
            out_features: sizes of the new axes.
            lora_rank: the rank of the map beside the layer.
            alpha: that map is scaled by `alpha / lora_rank`; `None` leaves it unscaled.
            lora_dtype: dtype to compute the map in; `None` takes the common type of inputs and its parameters. What it
                gives is cast to the dtype of the layer's outputs.
            lora_param_dtype: dtype of its parameters.
            a_initializer: initializer of `lora_a`.
            b_initializer: initializer of `lora_b`.
            lora_param_type: the Variable type of its parameters.
            lora_promote_dtype: the map's `promote_dtype`.
            ctx: gives the keys, from its stream "params".
            a_metadata: metadata of `lora_a`.
            b_metadata: metadata of `lora_b`.
            **kwargs: the other options of LinearGeneral.

        Raises:
            ValueError: `lora_rank` is less than 1, `axis` and `in_features` differ in length, or there is a
                `batch_axis`.
        """
        if kwargs.get("batch_axis"):
            raise ValueError(
                f"{type(self).__name__}: the map of low rank is one for all, so `batch_axis` is left out; got"
                f" {dict(kwargs['batch_axis'])}"
            )
        super().__init__(in_features, out_features, ctx=ctx, **kwargs)
        self.lora = LoRA(
            math.prod(self.in_features),
            lora_rank,
            math.prod(self.out_features),
            alpha=alpha,
            dtype=lora_dtype,
            param_dtype=lora_param_dtype,
            precision=self.precision,
            a_initializer=a_initializer,
            b_initializer=b_initializer,
            lora_param_type=lora_param_type,
            promote_dtype=lora_promote_dtype,
            ctx=ctx,
            a_metadata=a_metadata,
            b_metadata=b_metadata,
        )

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Applies the layer and the map beside it.

        Args:
            inputs: an array whose axes `axis` have the sizes `in_features`.
            out_sharding: on a mesh of explicit axes, how the outputs are split, such as a PartitionSpec; `None` splits
                them as inputs and kernel are.

        Returns:
            The axes of `inputs` that are left, in order, followed by `out_features`.

        Raises:
            ShapeError: `inputs` lacks one of the axes, or it has another size.
        """
        y = super().__call__(inputs, out_sharding)
        axes = normalize_axes(self.axis, inputs.ndim, f"{type(self).__name__}: axes")
        last = jnp.moveaxis(inputs, axes, range(inputs.ndim - len(axes), inputs.ndim))
        flat = last.reshape(*last.shape[: inputs.ndim - len(axes)], self.lora.in_features)
        return y + like(self.lora(flat).reshape(y.shape).astype(y.dtype), y)
