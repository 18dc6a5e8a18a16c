"""Worlds with everything at once: many features of unequal frequency, correlated, in a hierarchy."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from sae_jax.base import require
from sae_jax.synthetic.directions import gaussian, orthogonalised, unit
from sae_jax.synthetic.firing import Normal, independent, low_rank, require_probabilities, zipf
from sae_jax.synthetic.hierarchy import exact, first_order, forest, regular
from sae_jax.synthetic.world import World, key_of, world


def generated(
    probabilities: Float[Any, "features"],
    d_in: int,
    *,
    mean: float | Float[Any, "features"] = 1.0,
    std: float | Float[Any, "features"] = 0.0,
    rank: int = 0,
    scale: float = 0.1,
    parents: Int[Any, "features"] | None = None,
    exclusive: bool = True,
    compensate: Callable[..., Any] = exact,
    scale_children: bool = False,
    steps: int = 0,
    learning_rate: float = 0.01,
    bias_norm: float = 0.0,
    seed: int = 0,
    data_seed: int = 0,
    batch_size: int = 1024,
) -> World:
    """The general generator: sparse sums of unit directions, with whatever structure is asked for.

        x = a D + bias;   a_i = relu(N(mean_i, std_i^2)) where feature i fires, else 0

    Args:
      probabilities: how often each feature is to fire. With `exact` it does where magnitudes are above 0 and
        features are independent but for the hierarchy; what comes out in any case is the world's own
        `probabilities`.
      d_in: width.
      mean: of a feature's magnitude, of all or of each.
      std: of it.
      rank: factors that features share, so that they fire together; 0 for none.
      scale: of a factor's entries.
      parents: of each feature, -1 for none; None for no hierarchy.
      exclusive: whether of a feature's children one fires at most.
      compensate: `hierarchy.exact`, `.first_order` or `.as_given`: how candidates are drawn so that rates
        come out as asked.
      scale_children: multiply children by their parent's amount over its mean.
      steps: of pushing directions apart; 0 leaves them uniform on the sphere.
      learning_rate: of that.
      bias_norm: length of a constant vector, in a random direction, that is added to every row.
      seed: names the world.
      data_seed: names its rows.
      batch_size: rows per step.

    Raises:
      InputError: a probability outside [0, 1], a deviation below 0, a hierarchy that is no forest, exclusive
        children that together fire more often than their parent (with `exact`), or sizes below 1.

    Example:
      >>> generated(zipf(1000, 0.5, 0.2, 5e-4), 128, rank=10).batch(0).x.shape
      (1024, 128)

    Source: `sae_lens.synthetic` (`SyntheticModel`); arXiv 2602.14687.
    """
    require_probabilities(probabilities)
    probabilities = np.asarray(probabilities, np.float64)
    features = len(probabilities)
    require(features >= 1, f"features must be at least 1, got {features}")
    for name, each in (("mean", mean), ("std", std)):
        fits = np.shape(each) in ((), (features,)) and bool(np.isfinite(each).all())
        require(fits, f"{name} is one finite number or one for each of {features} features, got {each}")
    mean, std = (np.broadcast_to(np.asarray(each, np.float64), (features,)) for each in (mean, std))
    require(bool((std >= 0).all()), f"std must not be negative, got {std.min()}")
    require(rank >= 0, f"rank must not be negative, got {rank}")
    tree = None
    if parents is not None:
        require(len(parents) == features, f"there are {features} features but {len(parents)} parents")
        tree = forest(parents, exclusive, mean if scale_children else None)
        probabilities = compensate(probabilities, tree)
    of_directions, of_factors, of_bias = jax.random.split(key_of(seed), 3)
    directions = gaussian(of_directions, features, d_in)
    return world(
        orthogonalised(directions, steps, learning_rate),
        low_rank(probabilities, of_factors, rank, scale) if rank else independent(probabilities),
        Normal(jnp.asarray(mean, float), jnp.asarray(std, float)),
        forest=tree,
        bias=bias_norm * unit(jax.random.normal(of_bias, (d_in,))),
        data_seed=data_seed,
        batch_size=batch_size,
    )


def synthsaebench_16k(
    features: int = 16_384,
    d_in: int = 768,
    exponent: float = 0.5,
    most: float = 0.4,
    least: float = 5e-4,
    roots: int = 128,
    branching: int = 4,
    depth: int = 3,
    rank: int = 25,
    scale: float = 0.1,
    steps: int = 100,
    learning_rate: float = 3e-4,
    bias_norm: float = 0.5,
    *,
    seed: int = 42,
    data_seed: int = 0,
    batch_size: int = 1024,
) -> World:
    """SynthSAEBench-16k, version 2: the same recipe, drawn by JAX's generators and not by PyTorch's.

    Zipf probabilities; a hierarchy with exclusive children, compensated to first order, children scaled by
    their parent; a Gaussian copula of low rank; directions pushed apart; mean magnitudes falling from 5 to
    4, their deviations |N(.5, .5)|; a bias.

    Args:
      features: how many.
      d_in: width.
      exponent, most, least: of the Zipf probabilities.
      roots, branching, depth: of the hierarchy.
      rank, scale: of the correlation.
      steps, learning_rate: of the pushing apart.
      bias_norm: length of the bias.
      seed: names the world.
      data_seed: names its rows.
      batch_size: rows per step.

    Source: Chanin & Garriga-Alonso 2026, arXiv 2602.14687; SAELens, `docs/synth_sae_bench.md`.
    """
    # the first three children of this key are those of `generated`
    of_deviations = jax.random.split(key_of(seed), 4)[3]
    deviations = np.abs(0.5 + 0.5 * np.asarray(jax.random.normal(of_deviations, (features,)), np.float64))
    return generated(
        zipf(features, exponent, most, least),
        d_in,
        mean=np.linspace(5, 4, features),
        std=deviations,
        rank=rank,
        scale=scale,
        parents=regular(features, roots, branching, depth),
        compensate=first_order,
        scale_children=True,
        steps=steps,
        learning_rate=learning_rate,
        bias_norm=bias_norm,
        seed=seed,
        data_seed=data_seed,
        batch_size=batch_size,
    )


synthsaebench_1k = partial(synthsaebench_16k, features=1024, d_in=128, most=0.3, roots=8)
"""`synthsaebench_16k` at a size for a CPU: 1,024 features in 128 dimensions, 5.5 active on a row.

Features to dimensions are 8 to 1 instead of 21 to 1; 5.50 features fire on a row, so that active features
to dimensions are .043 instead of .044. The probabilities that are asked for sum to 9.96: first-order
compensation cannot give them where exclusive children ask for more than their parent fires, as those of
73 % of the parents do. `probabilities` are what comes out.

Its arguments are those of `synthsaebench_16k`, by name.
"""
