"""The terms that losses are made of."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar


def reduce(values: Float[Array, "batch features"], mean_features: bool) -> Scalar:
    """Average over the batch; over features average too, or sum.

    `mean_b mean_i v_bi` where `mean_features`, else `mean_b sum_i v_bi`.

    Args:
      values: one term per row and feature.
      mean_features: True for the seed's convention, False for the one of SAELens and the papers.

    Returns:
      A scalar of the same dtype.
    """
    return values.mean() if mean_features else values.sum(axis=-1).mean()


def squared_error(
    x_hat: Float[Array, "batch d"], y: Float[Array, "batch d"], mean_features: bool = True
) -> Scalar:
    """Reconstruction error: `reduce((x_hat - y)^2)`.

    Args:
      x_hat: reconstructions.
      y: what they should be, in the same unit; the result is in its square.
      mean_features: see `reduce`.

    Returns:
      A scalar.

    Example:
      >>> squared_error(jnp.ones((1, 4)), jnp.zeros((1, 4)), mean_features=False)
      Array(4., dtype=float32)
    """
    return reduce(jnp.square(x_hat - y), mean_features)


def l1(
    f: Float[Array, "batch d_sae"],
    weights: Float[Array, "d_sae"] | None = None,
    mean_features: bool = True,
) -> Scalar:
    """Sparsity penalty: `reduce(|f_i| w_i)`.

    Args:
      f: features.
      weights: one factor per latent, such as the norm of its decoder row (Anthropic, April 2024 update);
        None for 1.
      mean_features: see `reduce`.

    Returns:
      A scalar.

    Example:
      >>> l1(jnp.array([[0.0, 2.0]]))
      Array(1., dtype=float32)
    """
    size = jnp.abs(f)
    return reduce(size if weights is None else size * weights, mean_features)


def l0(f: Float[Array, "batch d_sae"]) -> Scalar:
    """Mean number of active latents per row: `mean_b #{i: f_bi > 0}`.

    Args:
      f: features.

    Returns:
      A scalar of the dtype of `f`; no gradient flows through it.
    """
    return (f > 0).sum(axis=-1).mean(dtype=f.dtype)
