"""Models that must hold many features in few dimensions."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Array, Float, Int, Scalar

from sae_jax.base import Batch, require
from sae_jax.synthetic import World


def identity(x: Array) -> Array:
    """x itself: the activation of a linear model."""
    return x


class Superposition(nnx.Module):
    """Features squeezed into fewer dimensions and read back by the same weights.

        h = inner(x W);   x' = outer(h W^T + b)

    W has a row per feature, as a decoder has: the transpose of the paper's. The paper's model has no `inner`.
    The earlier post's linear model has neither, `outer=identity`; its ReLU model has both,
    `inner=jax.nn.relu`.

    Args:
      features: n, the width of x.
      hidden: m, the width of h.
      inner: of the hidden layer.
      outer: of the output.
      std: of the normal draw of W; None for Xavier's sqrt(2 / (n + m)).
      rngs: of nnx.

    Raises:
      InputError: a size under 1.

    Example:
      >>> Superposition(5, 2, rngs=nnx.Rngs(0))(jnp.ones((8, 5))).shape
      (8, 5)

    Source: Elhage et al. 2022, "Toy Models of Superposition".
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        *,
        inner: Callable[[Array], Array] = identity,
        outer: Callable[[Array], Array] = jax.nn.relu,
        std: float | None = None,
        rngs: nnx.Rngs,
    ):
        require(features >= 1, f"features must be at least 1, got {features}")
        require(hidden >= 1, f"hidden must be at least 1, got {hidden}")
        scale = math.sqrt(2 / (features + hidden)) if std is None else std
        self.W = nnx.Param(scale * jax.random.normal(rngs.params(), (features, hidden)))
        self.b = nnx.Param(jnp.zeros(features))
        self.inner = inner
        self.outer = outer

    def hidden(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch hidden"]:
        """h = inner(x W)."""
        return self.inner(x @ self.W[...])

    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        """x' = outer(h W^T + b)."""
        return self.outer(self.hidden(x) @ self.W[...].T + self.b[...])


def importance_weighted(importance: Float[Array, "features"]) -> Callable[[nnx.Module, Batch], Scalar]:
    """A loss in which some features count for more.

        mean over the batch of sum_i I_i (y_i - x'_i)^2

    Args:
      importance: I, one number per feature.

    Returns:
      `loss(model, batch) -> scalar`.

    Example:
      >>> loss = importance_weighted(0.7 ** jnp.arange(20))
    """

    def loss(model, batch: Batch) -> Scalar:
        return (importance * jnp.square(batch.y - model(batch.x))).sum(axis=-1).mean()

    return loss


@struct.dataclass
class Features:
    """The features of a world themselves, as a source: what a model reads before it squeezes them.

    Where the world's directions are the axes this is the world, without a product by the identity.

    Args:
      world: whose amounts are the rows.
    """

    world: World

    @property
    def batch_size(self) -> int:
        """Rows per step."""
        return self.world.batch_size

    def batch(self, i: Int[Array, ""]) -> Batch:
        """The amounts behind batch `i` of the world."""
        amounts = self.world.amounts(self.world.key(i), self.batch_size)
        return Batch(amounts, amounts)

    def evaluation(self, rows: int) -> Iterator[Batch]:
        """The amounts behind the world's held-out rows."""
        return (Batch(amounts, amounts) for _, amounts in self.world.labelled(rows))


def superposed(world: World, W: Float[Array, "features hidden"]) -> World:
    """The world as the hidden layer of a trained `Superposition` has it: a source for SAEs, with its truth.

        h = a W

    The directions are the rows of W; a feature that the model does not represent has one near 0. Only for a
    model without `inner`, trained on `Features(world)`.

    Args:
      world: what the model was trained on.
      W: its weights.

    Returns:
      The same world in `hidden` dimensions.

    Raises:
      InputError: W has another number of rows than the world has features.

    Example:
      >>> source = superposed(world, fitted.model().W[...])
    """
    features = len(world.directions)
    require(len(W) == features, f"W has {len(W)} rows, but this world has {features} features")
    return replace(world, directions=W, bias=jnp.zeros(W.shape[-1], W.dtype))
