"""Sparse features that a small model must hold in fewer dimensions."""

import jax.numpy as jnp

from sae_jax.base import require
from sae_jax.synthetic.directions import gaussian, orthogonalised
from sae_jax.synthetic.firing import Independent, Uniform, require_probabilities
from sae_jax.synthetic.world import Number, Seed, World, key_of, require_seed, world


def toy_superposition(
    features: int = 20,
    density: Number = 0.1,
    d_in: int | None = None,
    *,
    seed: Seed = 0,
    data_seed: Seed = 0,
    batch_size: int = 1024,
) -> World:
    """The inputs of toy models of superposition.

        x_i = U[0, 1] with probability `density`, else 0

    Args:
      features: n.
      density: 1 - S of the paper; it may be traced.
      d_in: None for the features themselves, what a target model reads; fewer dimensions for rows in which
        they already lie over each other, along directions pushed apart.
      seed: names the directions.
      data_seed: names the rows.
      batch_size: rows per step.

    Raises:
      InputError: a density outside [0, 1], or fewer than one feature or dimension.

    Example:
      >>> toy_superposition(features=200, density=0.05).batch(0).x.shape
      (1024, 200)

    Source: Elhage et al. 2022, "Toy Models of Superposition".
    """
    require(features >= 1, f"features must be at least 1, got {features}")
    require_probabilities(density, "density")
    require_seed(seed)
    if d_in is None:
        directions = jnp.eye(features)
    else:
        directions = orthogonalised(gaussian(key_of(seed), features, d_in), 500, 0.01)
    fires = Independent(jnp.full(features, density))
    return world(directions, fires, Uniform(), data_seed=data_seed, batch_size=batch_size)


def forty_in_five(
    sparsity: Number = 0.9,
    d_in: int | None = 5,
    *,
    seed: Seed = 0,
    data_seed: Seed = 0,
    batch_size: int = 1024,
) -> World:
    """The world of the post before the seed's: 40 features in 5 dimensions.

        a_i = 0 with probability `sparsity`, else U[0, 1];   x = a D

    Args:
      sparsity: S; it may be traced.
      d_in: 5 for rows in which they lie over each other; None for the features themselves, what the post's
        two models read.
      seed: names the directions.
      data_seed: names the rows.
      batch_size: rows per step.

    Raises:
      InputError: a sparsity outside [0, 1].

    Example:
      >>> forty_in_five(sparsity=0.9).batch(0).x.shape
      (1024, 5)

    Source: the blog post before the one that this package grew out of.
    """
    require_probabilities(sparsity, "sparsity")
    return toy_superposition(40, 1 - sparsity, d_in, seed=seed, data_seed=data_seed, batch_size=batch_size)
