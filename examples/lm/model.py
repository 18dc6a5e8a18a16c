"""A transformer of one layer: the language model of "Towards Monosemanticity"."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int


class Linear(nnx.Linear):
    """A linear layer that takes [batch, context, width] as so many rows.

    XLA's gradient of a product with two axes of rows takes three times as long on CPU.
    """

    def __call__(self, x: Float[Array, "batch context inputs"]) -> Float[Array, "batch context outputs"]:
        return super().__call__(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


def rotated(x: Float[Array, "batch heads context size"]) -> Float[Array, "batch heads context size"]:
    """Queries or keys turned by their position, so that products tell how far apart two stand.

    Source: Su et al. 2021 (arXiv 2104.09864).
    """
    context, half = x.shape[-2], x.shape[-1] // 2
    angle = jnp.outer(jnp.arange(context), 1000.0 ** -(jnp.arange(half) / half))
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate(
        [a * jnp.cos(angle) - b * jnp.sin(angle), a * jnp.sin(angle) + b * jnp.cos(angle)], axis=-1
    )


class Attention(nnx.Module):
    """Causal attention."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.heads = heads
        self.queries_keys_values = Linear(width, 3 * width, use_bias=False, rngs=rngs)
        self.out = Linear(width, width, use_bias=False, rngs=rngs)

    def __call__(self, x: Float[Array, "batch context width"]) -> Float[Array, "batch context width"]:
        batch, context, _ = x.shape
        split = self.queries_keys_values(x).reshape(batch, context, 3, self.heads, -1)
        q, k, v = jnp.moveaxis(split, (2, 3), (0, 2))
        scores = jnp.einsum("bhqd,bhkd->bhqk", rotated(q), rotated(k)) / math.sqrt(q.shape[-1])
        seen = jnp.where(jnp.tril(jnp.ones((context, context), bool)), 0, -1e9)
        read = jnp.einsum("bhqk,bhkd->bhqd", jax.nn.softmax(scores + seen), v)
        return self.out(jnp.moveaxis(read, 1, 2).reshape(x.shape))


class MLP(nnx.Module):
    """ReLU neurons, whose activations are what SAEs are trained on."""

    def __init__(self, width: int, neurons: int, *, rngs: nnx.Rngs):
        self.into = Linear(width, neurons, rngs=rngs)
        self.out = Linear(neurons, width, rngs=rngs)

    def hidden(self, x: Float[Array, "batch context width"]) -> Float[Array, "batch context neurons"]:
        """Activations of the neurons."""
        return jax.nn.relu(self.into(x))

    def __call__(self, x: Float[Array, "batch context width"]) -> Float[Array, "batch context width"]:
        return self.out(self.hidden(x))


class OneLayer(nnx.Module):
    """One layer of attention and an MLP, each added to the residual stream.

    Args:
      vocabulary: how many tokens there are.
      width: of the residual stream.
      neurons: of the MLP.
      heads: of attention.
      rngs: of nnx.
    """

    def __init__(
        self, vocabulary: int, width: int = 128, neurons: int = 512, heads: int = 4, *, rngs: nnx.Rngs
    ):
        self.width = width
        self.embed = nnx.Embed(vocabulary, width, rngs=rngs)
        self.norm_attention = nnx.RMSNorm(width, rngs=rngs)
        self.attention = Attention(width, heads, rngs=rngs)
        self.norm_mlp = nnx.RMSNorm(width, rngs=rngs)
        self.mlp = MLP(width, neurons, rngs=rngs)
        self.norm_out = nnx.RMSNorm(width, rngs=rngs)
        self.unembed = Linear(width, vocabulary, use_bias=False, rngs=rngs)

    def __call__(self, tokens: Int[Array, "batch context"]) -> Float[Array, "batch context vocabulary"]:
        """Logits of each next token."""
        x = self.embed(tokens)
        x = x + self.attention(self.norm_attention(x))
        x = x + self.mlp(self.norm_mlp(x))
        return self.unembed(self.norm_out(x))
