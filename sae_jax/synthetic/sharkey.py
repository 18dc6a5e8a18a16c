"""The two worlds of "Taking features out of superposition with sparse autoencoders" (Sharkey et al. 2022)."""

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax.base import require
from sae_jax.synthetic.directions import gaussian
from sae_jax.synthetic.firing import Drifting, Uniform, independent
from sae_jax.synthetic.world import Number, Seed, World, key_of, world


def sharkey_uncorrelated(
    features: int = 512,
    d_in: int = 256,
    active: Number = 5.0,
    decay: Number = 0.99,
    *,
    seed: Seed = 0,
    data_seed: Seed = 0,
    batch_size: int = 4096,
) -> World:
    """Features that fire independently, with amounts from U[0, 1].

        p_i = (active / features) decay^i

    Args:
      features: how many, along directions uniform on the sphere.
      d_in: width.
      active: mean number of active features before the decay; it may be traced.
      decay: of the probability, from each feature to the next; it may be traced.
      seed: names the directions.
      data_seed: names the rows.
      batch_size: rows per step.

    Raises:
      InputError: a probability outside [0, 1], or fewer than one feature or dimension.

    Example:
      >>> round(sharkey_uncorrelated().expected_l0.item(), 3)
      0.971

    Source: Sharkey, Braun & Millidge 2022, "Taking features out of superposition with sparse autoencoders".
    """
    directions = gaussian(key_of(seed), features, d_in)
    fires = independent(active / features * decay ** jnp.arange(features))
    return world(directions, fires, Uniform(), data_seed=data_seed, batch_size=batch_size)


def sharkey_correlated(
    features: int = 512,
    d_in: int = 256,
    active: float = 5.0,
    decay: float = 0.99,
    *,
    seed: int = 0,
    data_seed: int = 0,
    batch_size: int = 4096,
) -> World:
    """Features whose probabilities are drawn together for each batch; see `firing.Drifting`.

    The covariance is a symmetrised matrix of U[0, 1] plus a multiple of the identity that makes it positive
    definite.

    Args:
      features, d_in, active, decay, seed, data_seed, batch_size: as for `sharkey_uncorrelated`; the mean
        probability over features is active / features in every batch.

    Raises:
      InputError: active not above 0 or above the number of features, a decay outside (0, 1], or fewer than
        one feature or dimension.

    Example:
      >>> sharkey_correlated(features=64, d_in=32).batch(0).x.shape
      (4096, 32)

    Source: as for `sharkey_uncorrelated`; the code of HoagyC/sparse_coding.
    """
    require(features >= 1, f"features must be at least 1, got {features}")
    require(0 < active <= features, f"active must lie above 0 and at most at {features}, got {active}")
    require(0 < decay <= 1, f"decay must lie above 0 and at most at 1, got {decay}")
    of_directions, of_correlation = jax.random.split(key_of(seed))
    # in double precision, so that the number of threads does not show in what is kept of it
    raw = np.asarray(jax.random.uniform(of_correlation, (features, features)), np.float64)
    symmetric = (raw + raw.T) / 2
    shift = 1.001 * max(-np.linalg.eigvalsh(symmetric)[0], 0)
    factor = np.linalg.cholesky(symmetric + (shift + 1e-3) * np.eye(features))
    fires = Drifting(
        jnp.asarray(factor, float), decay ** jnp.arange(features), jnp.asarray(active / features, float)
    )
    directions = gaussian(of_directions, features, d_in)
    return world(directions, fires, Uniform(), data_seed=data_seed, batch_size=batch_size)
