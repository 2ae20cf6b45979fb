"""Embed: a table from integers to vectors, and back to logits."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from nnx.core import Context, ShapeError
from nnx.layers import initializers
from nnx.layers._common import NO_METADATA, Layer, Metadata, PromoteDtype, check_features, make_param, project
from nnx.layers._dtypes import promote_dtype
from nnx.layers._explicit import is_explicit, rows
from nnx.layers._settled import settled
from nnx.layers.initializers import Initializer

__all__ = ["Embed"]

# Fan in is the size of a vector, so that a vector has an expected square norm of 1 whatever its size.
default_embedding_init = initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=1, out_axis=0)


class Embed(Layer):
    """A table of `num_embeddings` vectors: `y[..., :] = embedding[x[...], :]`.

    An index past either end gives NaN rather than a neighbour's vector; negative indices count from the end.

    Attributes:
        embedding: Param, [num_embeddings, features].

    Reference: Bengio et al., 2003, A Neural Probabilistic Language Model, JMLR 3; for `attend`
    Press and Wolf, 2016, Using the Output Embedding to Improve Language Models, arXiv:1608.05859.

    Example:
        >>> import nnx, jax.numpy as jnp
        >>> layer = nnx.Embed(10, 4, ctx=nnx.context(0))
        >>> vectors = layer(jnp.array([[1, 2, 3]]))
        >>> vectors.shape
        (1, 3, 4)
        >>> layer.attend(vectors).shape
        (1, 3, 10)
    """

    embedding: jax.Array

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        embedding_init: Initializer = default_embedding_init,
        promote_dtype: PromoteDtype = promote_dtype,
        ctx: Context,
        embedding_metadata: Metadata = NO_METADATA,
    ) -> None:
        """Makes the layer.

        Args:
            num_embeddings: number of vectors.
            features: size of a vector.
            dtype: dtype of the vectors handed out; `None` takes that of the table.
            param_dtype: dtype of the table.
            embedding_init: initializer of the table; by default each vector has an expected square norm of 1.
            promote_dtype: casts the tuple of the table, or of query and table, with the arguments of
                `nnx.promote_dtype`.
            ctx: gives the key, from its stream "params".
            embedding_metadata: metadata of the table, which win over those of its initializer and of the layer.
        """
        self.num_embeddings = num_embeddings
        self.features = features
        self.dtype = dtype
        self.param_dtype = param_dtype
        self._choose(promote_dtype=promote_dtype)
        self.embedding = make_param(
            ctx,
            embedding_init,
            (num_embeddings, features),
            param_dtype,
            names=("vocab", "embed"),
            metadata=embedding_metadata,
        )

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Looks up vectors.

        Args:
            inputs: integers of any shape, from 0 to `num_embeddings - 1`.
            out_sharding: on a mesh of explicit axes, how the outputs are split, such as a PartitionSpec; `None` splits
                them as inputs and table are.

        Returns:
            [*inputs.shape, features].

        Raises:
            ShapeError: `inputs` are not integers.
        """
        if not jnp.issubdtype(inputs.dtype, jnp.integer):
            raise ShapeError(f"{type(self).__name__}: expected integer `inputs`, got dtype {inputs.dtype.name}")
        (table,) = self.promote_dtype((self.embedding,), dtype=self.dtype, inexact=False)
        if is_explicit(table) or out_sharding is not None:
            return rows(table, inputs, out_sharding)
        # Else XLA keeps the vectors split as FSDP has them, gathers the other axis, and looks into plans that copy the
        # whole batch to every device ("involuntary full rematerialization").
        return jnp.take(settled(table, -1, "activation_embed"), inputs, axis=0)

    def attend(self, query: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Scores each vector of the table against `query`: `logits = query @ embedding.T`.

        This is the output layer of a language model that ties its input and output embeddings.

        Args:
            query: [..., features].
            out_sharding: on a mesh of explicit axes, how the logits are split; `None` splits them as query and table
                are.

        Returns:
            [..., num_embeddings].

        Raises:
            ShapeError: the last axis of `query` is not `features`.

        Reference: Press and Wolf, 2017, Using the Output Embedding to Improve Language Models, arXiv:1608.05859.
        """
        check_features(self, "query", query, self.features, f"features={self.features}")
        x, table = self.promote_dtype((query, self.embedding), dtype=self.dtype)
        return project(x, table.T, out_sharding=out_sharding)
