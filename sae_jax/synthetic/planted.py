"""Rows of features that fire in groups."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sae_jax.base import require


class Planted(NamedTuple):
    """Activations made of features that are known."""

    x: Float[Array, "rows d_in"]
    directions: Float[Array, "features d_in"]
    """Unit vectors."""
    probabilities: Float[Array, "features"]
    """How often each feature is active; their sum is the mean number of active features per row."""


def planted(
    rows: int,
    d_in: int = 64,
    features: int = 256,
    active: float = 8.0,
    correlation: float = 0.5,
    seed: int = 0,
) -> Planted:
    """Rows that are sparse sums of random directions, more than there are dimensions, that fire in groups.

        x = sum_i a_i d_i;   a_i = m_i [z_i < Phi^-1(p_i)],   m_i ~ |N(1, 0.25)|,   p_i ~ i^-1/2 (Zipf)

    z is Gaussian with unit variance; a share `correlation` of the variance of each z_i comes from ten
    factors common to all features.

    Args:
      rows: how many.
      d_in: width.
      features: how many directions.
      active: mean number of active features per row.
      correlation: from 0, features independent, to below 1.
      seed: names the world and its rows.

    Returns:
      `Planted`.

    Raises:
      InputError: `active` outside (0, features / 4], or a correlation outside [0, 1).

    Example:
      >>> x = planted(100_000).x
    """
    require(0 < active <= features / 4, f"active must be above 0 and at most features / 4, got {active}")
    require(0 <= correlation < 1, f"correlation must be at least 0 and below 1, got {correlation}")
    keys = jax.random.split(jax.random.key(seed), 5)
    directions = jax.random.normal(keys[0], (features, d_in))
    directions = directions / jnp.linalg.norm(directions, axis=1, keepdims=True)
    weights = jnp.arange(1, features + 1) ** -0.5
    # the likeliest would pass 1 where many features are active: it is cut, and the rest make up for it
    probabilities = jnp.minimum(active * weights / weights.sum(), 0.9)
    probabilities = jnp.minimum(probabilities * active / probabilities.sum(), 0.95)
    loadings = jax.random.normal(keys[1], (10, features))
    loadings = loadings / jnp.linalg.norm(loadings, axis=0)
    common = jax.random.normal(keys[2], (rows, 10)) @ loadings
    own = jax.random.normal(keys[3], (rows, features))
    z = jnp.sqrt(correlation) * common + jnp.sqrt(1 - correlation) * own
    magnitudes = jnp.abs(1 + 0.25 * jax.random.normal(keys[4], (rows, features)))
    amounts = jnp.where(z < jax.scipy.special.ndtri(probabilities), magnitudes, 0)
    return Planted(amounts @ directions, directions, probabilities)
