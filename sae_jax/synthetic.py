"""Data whose features are known."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sae_jax.base import require


class Tokens(NamedTuple):
    """Named rows of activations, and what each feature that should be found is active on."""

    names: tuple[str, ...]
    x: Float[np.ndarray, "tokens d_in"]
    truth: dict[str, frozenset[str]]


def seed_tokens() -> Tokens:
    """The eight tokens, four activations each, of the post that this package grew out of.

    Returns:
      Their names, the [8, 4] float32 matrix, and the three features that the post reads off its figure,
      each with the tokens that it is active on.

    Example:
      >>> seed_tokens().x.shape
      (8, 4)

    Source: "From superposition to interpretable features", a blog post of early 2025; its running example.
    """
    rows = {
        "cat": (0.80, 0.30, 0.10, 0.05),
        "happy cat": (0.82, 0.32, 0.12, 0.06),
        "dog": (0.70, 0.20, 0.05, 0.20),
        "energetic dog": (0.75, 0.30, 0.10, 0.25),
        "not cat": (0.05, 0.90, 0.40, 0.40),
        "not dog": (0.15, 0.85, 0.35, 0.50),
        "robot": (0.00, 0.70, 0.90, 0.80),
        "AI assistant": (0.10, 0.60, 0.85, 0.75),
    }
    truth = {
        "animal": frozenset({"cat", "happy cat", "dog", "energetic dog"}),
        "artificial": frozenset({"robot", "AI assistant"}),
        "not an animal": frozenset({"not cat", "not dog", "robot", "AI assistant"}),
    }
    return Tokens(tuple(rows), np.array(list(rows.values()), np.float32), truth)


def features_found(
    f: Float[np.ndarray, "*members tokens d_sae"], tokens: Tokens
) -> Bool[np.ndarray, "*members truths"]:
    """Which of the true features a dictionary has: those that some latent is active on exactly the tokens of.

    Args:
      f: encoded tokens, in the order of `tokens.names`.
      tokens: whose `truth` to look for.

    Returns:
      One flag per entry of `tokens.truth`, in its order.

    Example:
      >>> features_found(result.member(0).encode(tokens.x), tokens)
    """
    active = np.asarray(f) > 0
    truths = [np.array([name in where for name in tokens.names]) for where in tokens.truth.values()]
    return np.stack([(active == truth[:, None]).all(axis=-2).any(axis=-1) for truth in truths], axis=-1)


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
