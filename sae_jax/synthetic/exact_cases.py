"""Small worlds in which what an SAE does wrong can be told to the digit."""

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax.base import require
from sae_jax.synthetic.directions import orthonormal
from sae_jax.synthetic.firing import (
    Normal,
    correlated,
    independent,
    nearest_correlation,
    require_probabilities,
)
from sae_jax.synthetic.hierarchy import exact, forest
from sae_jax.synthetic.world import Number, Seed, World, key_of, world


def hedging(
    d_in: int = 50,
    first: Number = 0.25,
    second: Number = 0.2,
    *,
    seed: Seed = 0,
    data_seed: Seed = 0,
    batch_size: int = 1024,
) -> World:
    """Two orthogonal features that fire independently, always with amount 1, for an SAE of one latent.

    Args:
      d_in: width.
      first: how often the first fires, which the latent takes; it may be traced.
      second: how often the second does, which the decoder's bias hedges; it may be traced.
      seed: names the directions.
      data_seed: names the rows.
      batch_size: rows per step.

    Raises:
      InputError: a probability outside [0, 1], or fewer than two dimensions.

    Example:
      >>> hedging().probabilities.tolist()
      [0.25, 0.20000000298023224]

    Source: Chanin et al. 2025, "Feature hedging: correlated features break narrow sparse autoencoders".
    """
    directions = orthonormal(key_of(seed), 2, d_in)
    fires = independent(jnp.array([first, second], float))
    return world(directions, fires, data_seed=data_seed, batch_size=batch_size)


def sparse_but_wrong(
    features: int = 50,
    d_in: int = 100,
    std: float = 0.15,
    *,
    seed: int = 0,
    data_seed: int = 0,
    batch_size: int = 1024,
) -> World:
    """Orthogonal features of which most pairs are correlated: too small an L0 makes an SAE mix them.

        p_i = .345 (n - 1 - i) / n + .05;   correlation of a pair 0 with probability .3, else +-U[.3, .9]

    The matrix of correlations is then moved to the nearest that is positive definite.

    Args:
      features: n.
      d_in: width.
      std: of the magnitudes, whose mean is 1.
      seed: names directions and correlations.
      data_seed: names the rows.
      batch_size: rows per step.

    Raises:
      InputError: no features, more of them than dimensions, or a deviation below 0.

    Example:
      >>> round(sparse_but_wrong().expected_l0.item(), 2)
      10.95

    Source: Chanin & Garriga-Alonso 2025, "Sparse but wrong: incorrect L0 leads to incorrect features in
    sparse autoencoders".
    """
    require(0 <= std < np.inf, f"std must be finite and not negative, got {std}")
    of_directions, of_correlation = jax.random.split(key_of(seed))
    directions = orthonormal(of_directions, features, d_in)
    draws = np.random.default_rng(jax.random.bits(of_correlation).item())
    related, positive, strength = draws.random((3, features, features))
    pairs = (related >= 0.3) * np.where(positive < 0.5, 1, -1) * (0.3 + 0.6 * strength)
    upper = np.triu(pairs, 1)
    matrix = nearest_correlation(upper + upper.T + np.eye(features), floor=1e-4)
    probabilities = 0.345 * (features - 1 - np.arange(features)) / features + 0.05
    return world(
        directions,
        correlated(probabilities, matrix),
        Normal(jnp.ones(features), jnp.full(features, std)),
        data_seed=data_seed,
        batch_size=batch_size,
    )


def matryoshka_tree(
    d_in: int = 20,
    parent: float = 0.15,
    child: float = 0.2,
    single: float = 0.05,
    *,
    seed: int = 0,
    data_seed: int = 0,
    batch_size: int = 1024,
) -> World:
    """Twenty orthogonal features: three parents with three exclusive children each, and eight singles.

    Features 0 to 2 are the parents, 3 to 11 their children (3, 4, 5 of the first), 12 to 19 the singles; all
    amounts are 1. Trained on it an SAE absorbs: a parent's latent is silent where a child's already says it.

    Args:
      d_in: width.
      parent: how often a parent fires.
      child: how often one child fires where its parent does.
      single: how often a single fires.
      seed: names the directions.
      data_seed: names the rows.
      batch_size: rows per step.

    Raises:
      InputError: a probability outside [0, 1], children that together pass 1, or fewer than twenty
        dimensions.

    Example:
      >>> round(matryoshka_tree().expected_l0.item(), 3)
      1.12

    Source: Bussmann et al. 2025, "Learning multi-level features with Matryoshka sparse autoencoders".
    """
    tree = forest([-1] * 3 + [0] * 3 + [1] * 3 + [2] * 3 + [-1] * 8, exclusive=True)
    for name, probability in {"parent": parent, "child": child, "single": single}.items():
        require_probabilities(probability, name)
    asked = np.array([parent] * 3 + [parent * child] * 9 + [single] * 8)
    fires = independent(exact(asked, tree))
    directions = orthonormal(key_of(seed), 20, d_in)
    return world(directions, fires, forest=tree, data_seed=data_seed, batch_size=batch_size)
