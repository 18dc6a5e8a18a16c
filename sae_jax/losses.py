"""The terms that losses are made of."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar

from sae_jax.base import Batch, Params
from sae_jax.linear import decode, matmul
from sae_jax.selection import Number
from sae_jax.sparse import Few


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


def lp(
    f: Float[Array, "batch d_sae"],
    p: Number,
    weights: Float[Array, "d_sae"] | None = None,
    mean_features: bool = True,
    root: bool = False,
) -> Scalar:
    """Sparsity penalty that leans less on large features where p < 1: `reduce((|f_i| w_i)^p)`.

    Args:
      f: features.
      p: the exponent, above 0; may be traced.
      weights, mean_features: as in `l1`.
      root: the norm itself, `mean_b (sum_i (|f_bi| w_i)^p)^(1/p)` (SAELens's `lp_norm`, the `Lp` of
        dictionary_learning); `mean_features` then has no part in it.

    Returns:
      A scalar.

    Source: Karvonen et al. 2024 (arXiv 2408.00113), section 4.
    """
    size = jnp.abs(f) if weights is None else jnp.abs(f) * weights
    p = jnp.asarray(p, size.dtype)
    # the derivative of 0^p is infinite: where f is 0 it is taken as 0
    powers = jnp.where(size > 0, jnp.where(size > 0, size, 1) ** p, 0)
    if not root:
        return reduce(powers, mean_features)
    total = powers.sum(axis=-1)
    return jnp.where(total > 0, jnp.where(total > 0, total, 1) ** (1 / p), 0).mean()


# How a reconstruction is made and judged: (params, f, batch) -> (x_hat, error)

Reconstruction = Callable[[Params, Float[Array, "batch d_sae"] | Few, Batch], tuple[Array, Scalar]]


def summed(params: Params, f: Float[Array, "batch d_sae"] | Few, batch: Batch) -> tuple[Array, Scalar]:
    """`mean_b sum_d (x_hat - y)^2`: SAELens, dictionary_learning, the papers."""
    x_hat = decode(params, f, batch.x)
    return x_hat, squared_error(x_hat, batch.y, mean_features=False)


def averaged(params: Params, f: Float[Array, "batch d_sae"] | Few, batch: Batch) -> tuple[Array, Scalar]:
    """`mean_b mean_d (x_hat - y)^2`: the seed, the BatchTopK repository."""
    x_hat = decode(params, f, batch.x)
    return x_hat, squared_error(x_hat, batch.y)


def unexplained(params: Params, f: Float[Array, "batch d_sae"] | Few, batch: Batch) -> tuple[Array, Scalar]:
    """`sum (x_hat - y)^2 / sum (y - mean_b y)^2`, the fraction of variance unexplained: sparsify."""
    x_hat = decode(params, f, batch.x)
    spread = jnp.square(batch.y - batch.y.mean(axis=0)).sum()
    return x_hat, jnp.square(x_hat - batch.y).sum() / jnp.where(spread > 0, spread, 1)


WHOLE = (summed, averaged, unexplained)
"""Those that take all latents in one product."""


def nested(prefixes: Sequence[int], weights: Sequence[float]) -> Reconstruction:
    """A reconstruction by every prefix of the latents, each judged (Matryoshka): `sum_g weights_g error_g`.

        x_hat_g = f[:m_g] W_dec[:m_g] + b_dec;   error_g = mean_b sum_d (x_hat_g - y)^2

    Args:
      prefixes: the m_g, increasing, the last d_sae.
      weights: one per prefix.

    Returns:
      A function like `summed`; its reconstruction is that of the last prefix.

    Source: Bussmann et al. 2025 (arXiv 2503.17547), section 3.
    """

    def reconstruct(params: Params, f: Any, batch: Batch) -> tuple[Array, Scalar]:
        x_hat = decode({**params, "W_dec": params["W_dec"][:0]}, f[:, :0], batch.x)
        x_hat, total, start = jnp.broadcast_to(x_hat, batch.y.shape), jnp.zeros((), x_hat.dtype), 0
        for end, weight in zip(prefixes, weights, strict=True):
            x_hat = x_hat + matmul(f[:, start:end], params["W_dec"][start:end])
            total = total + weight * squared_error(x_hat, batch.y, mean_features=False)
            start = end
        return x_hat, total

    return reconstruct


# Penalties of JumpReLU: (active, size, target_l0, tanh_scale) -> scalar


def step_l0(
    active: Float[Array, "batch d_sae"],
    size: Float[Array, "batch d_sae"],
    target_l0: Number,
    tanh_scale: Number,
) -> Scalar:
    """`mean_b L0_b`, L0_b = sum_i H(pre_bi - threshold_i) (Rajamanoharan et al. 2024, arXiv 2407.14435)."""
    return active.sum(axis=-1).mean()


def tanh_l0(
    active: Float[Array, "batch d_sae"],
    size: Float[Array, "batch d_sae"],
    target_l0: Number,
    tanh_scale: Number,
) -> Scalar:
    """`mean_b sum_i tanh(c f_bi |W_dec_i|)` (Anthropic, Circuits Updates January 2025)."""
    return jnp.tanh(tanh_scale * size).sum(axis=-1).mean()


def quadratic_l0(
    active: Float[Array, "batch d_sae"],
    size: Float[Array, "batch d_sae"],
    target_l0: Number,
    tanh_scale: Number,
) -> Scalar:
    """`mean_b (2 / L0*) (L0_b - L0*)^2` for a target L0* (Gemma Scope 2, as SAELens reads it)."""
    return (2 / target_l0 * jnp.square(active.sum(axis=-1) - target_l0)).mean()


def quadratic_mean_l0(
    active: Float[Array, "batch d_sae"],
    size: Float[Array, "batch d_sae"],
    target_l0: Number,
    tanh_scale: Number,
) -> Scalar:
    """`(mean_b L0_b / L0* - 1)^2` for a target L0* (dictionary_learning)."""
    return jnp.square(active.sum(axis=-1).mean() / target_l0 - 1)


AIMED = (quadratic_l0, quadratic_mean_l0)
"""Penalties that are least at a target L0, rather than at none."""
