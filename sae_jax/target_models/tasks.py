"""Labelled tasks whose latent factors are known."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sae_jax.base import require
from sae_jax.synthetic.directions import gaussian
from sae_jax.synthetic.firing import require_probabilities
from sae_jax.synthetic.world import key_of


class Task(NamedTuple):
    """Rows, what is to be said of each, and what each is made of."""

    x: Float[Array, "rows inputs"]
    labels: Float[Array, "rows labels"]
    factors: Float[Array, "rows factors"]
    """How much of each factor is in each row; 0 for none."""


def mixed_factors(
    rows: int = 5000,
    factors: int = 10,
    inputs: int = 20,
    density: float = 0.1,
    noise: float = 0.1,
    *,
    seed: int = 0,
    data_seed: int = 0,
) -> Task:
    """Sparse graded factors behind a noisy mixture; the labels are which of them are there.

        x = a D + noise * N(0, 1);   a_i ~ U[1/2, 1] with probability density, else 0;   label_i = [a_i > 0]

    Args:
      rows: how many.
      factors: how many, each with a label of its own.
      inputs: width of x; the directions D are random unit vectors in it.
      density: how often a factor is there.
      noise: its standard deviation.
      seed: names the mixture.
      data_seed: names the rows.

    Returns:
      A `Task`.

    Raises:
      InputError: no rows, no factors, a density outside [0, 1], negative noise.

    Example:
      >>> task = mixed_factors()
      >>> task.x.shape, task.labels.shape
      ((5000, 20), (5000, 10))
    """
    for name, size in (("rows", rows), ("factors", factors), ("inputs", inputs)):
        require(size >= 1, f"{name} must be at least 1, got {size}")
    require_probabilities(density, "density")
    require(noise >= 0, f"noise must not be negative, got {noise}")
    of_presence, of_amount, of_noise = jax.random.split(jax.random.key(data_seed), 3)
    directions = gaussian(key_of(seed), factors, inputs)
    present = jax.random.uniform(of_presence, (rows, factors)) < density
    amounts = jnp.where(present, jax.random.uniform(of_amount, (rows, factors), minval=0.5), 0)
    x = amounts @ directions + noise * jax.random.normal(of_noise, (rows, inputs))
    return Task(x, present.astype(x.dtype), amounts)


def agreement(rows: int = 4096, noise: float = 0.1, *, seed: int = 0) -> Task:
    """Subject and verb: does their number agree?

    Two inputs, whether the subject is plural and whether the verb is, as -1 or 1 with noise; two labels,
    "agrees" and "does not agree". Neither input alone says anything of the labels. The factors are the four
    combinations, in the order of `AGREEMENT_CASES`.

    Args:
      rows: how many.
      noise: its standard deviation.
      seed: names the rows.

    Returns:
      A `Task`.

    Raises:
      InputError: no rows, or negative noise.

    Example:
      >>> agreement().factors.mean(axis=0)  # each about 1/4
    """
    require(rows >= 1, f"rows must be at least 1, got {rows}")
    require(noise >= 0, f"noise must not be negative, got {noise}")
    of_case, of_noise = jax.random.split(jax.random.key(seed))
    case = jax.random.randint(of_case, (rows,), 0, 4)
    subject, verb = case // 2, case % 2
    x = 2.0 * jnp.stack([subject, verb], axis=1) - 1
    x = x + noise * jax.random.normal(of_noise, x.shape)
    agrees = (subject == verb).astype(x.dtype)
    return Task(x, jnp.stack([agrees, 1 - agrees], axis=1), jax.nn.one_hot(case, 4))


AGREEMENT_INPUTS = ("subject plural", "verb plural")
AGREEMENT_OUTPUTS = ("agrees", "does not")
AGREEMENT_CASES = ("the cat runs", "the cat run", "the cats runs", "the cats run")
