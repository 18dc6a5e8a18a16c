"""From pre-activations to features."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sae_jax.selection import Number, largest, largest_of_all


def relu(pre: Float[Array, "*batch d_sae"]) -> Float[Array, "*batch d_sae"]:
    """Rectify: `f = max(pre, 0)`.

    The derivative at exactly 0 is 0, as in PyTorch, so that parity holds on latents that start there.

    Args:
      pre: pre-activations, any float dtype.

    Returns:
      Features of the same shape and dtype.

    Example:
      >>> relu(jnp.array([-1.0, 2.0]))
      Array([0., 2.], dtype=float32)
    """
    return jax.nn.relu(pre)


def topk(
    pre: Float[Array, "*batch d_sae"], k: Number, k_max: int | None = None
) -> Float[Array, "*batch d_sae"]:
    """Keep the `k` largest pre-activations of each row, rectified: `f = ReLU(pre) [pre among the k largest]`.

    Rectifying before the choice or after it gives the same features and gradients: what differs is only
    which zeros count as chosen.

    Args:
      pre: pre-activations.
      k, k_max: as in `largest`.

    Returns:
      Features, at most `k` of a row above 0.

    Example:
      >>> topk(jnp.array([3.0, 1.0, 2.0]), k=2)
      Array([3., 0., 2.], dtype=float32)

    Source: Gao et al. 2024 (arXiv 2406.04093), section 2.3.
    """
    return jnp.where(largest(pre, k, k_max), relu(pre), 0)


def batch_topk(
    pre: Float[Array, "batch d_sae"], k: Number, k_max: int | float | None = None
) -> Float[Array, "batch d_sae"]:
    """Keep the `floor(k n)` largest rectified pre-activations of a batch of n rows.

    Args:
      pre: pre-activations of the whole batch.
      k: mean number of features per row; need not be whole.
      k_max: as in `largest`.

    Returns:
      Features, at most `floor(k n)` of the batch above 0.

    Source: Bussmann et al. 2024 (arXiv 2412.06410), section 3.
    """
    rows = len(pre)
    if k_max is None and isinstance(k, int | float):
        k_max = k
    count = None if k_max is None else int(k_max * rows)
    return jnp.where(largest_of_all(pre, jnp.floor(k * rows), count), relu(pre), 0)


def jumprelu(
    pre: Float[Array, "*batch d_sae"],
    threshold: Float[Array, "*#d_sae"],
    bandwidth: Number,
    ste_to_input: bool = False,
) -> Float[Array, "*batch d_sae"]:
    """Features above a learned threshold: `f = pre H(pre - threshold)`.

    H is the Heaviside step. Its derivative is estimated by a rectangle of width `bandwidth` (the
    straight-through estimator):

        df/dthreshold = -(threshold / bandwidth) rect((pre - threshold) / bandwidth)
        df/dpre       = H(pre - threshold)        minus df/dthreshold where ste_to_input

    Args:
      pre: pre-activations.
      threshold: one per latent, not negative.
      bandwidth: width of the rectangle, in the unit of `pre`.
      ste_to_input: let the estimator reach the encoder too (Anthropic, January 2025 update).

    Returns:
      Features.

    Source: Rajamanoharan et al. 2024 (arXiv 2407.14435), equations 11 and 12 and appendix J.
    """
    active = (pre > threshold).astype(pre.dtype)
    slope = threshold / bandwidth * rectangle((pre - threshold) / bandwidth)
    return pre * active + surrogate(slope, pre, threshold, ste_to_input)


def step(
    pre: Float[Array, "*batch d_sae"],
    threshold: Float[Array, "*#d_sae"],
    bandwidth: Number,
    ste_to_input: bool = False,
) -> Float[Array, "*batch d_sae"]:
    """Whether each latent is active, as a number: `H(pre - threshold)`; summed, it is L0 with a gradient.

        dH/dthreshold = -(1 / bandwidth) rect((pre - threshold) / bandwidth)
        dH/dpre       = 0                         minus dH/dthreshold where ste_to_input

    Arguments, returns and source: as `jumprelu`.
    """
    active = jax.lax.stop_gradient((pre > threshold).astype(pre.dtype))
    slope = rectangle((pre - threshold) / bandwidth) / bandwidth
    return active + surrogate(slope, pre, threshold, ste_to_input)


def rectangle(z: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The kernel of the estimators: 1 where |z| < 1/2, else 0."""
    return (jnp.abs(z) < 0.5).astype(z.dtype)


def surrogate(
    slope: Float[Array, "*batch d_sae"],
    pre: Float[Array, "*batch d_sae"],
    threshold: Float[Array, "*#d_sae"],
    ste_to_input: bool,
) -> Float[Array, "*batch d_sae"]:
    """A zero whose derivative by `threshold` is `-slope`, and by `pre` `slope` where `ste_to_input`."""
    stop = jax.lax.stop_gradient
    zero = threshold - stop(threshold)
    if ste_to_input:
        zero = zero - (pre - stop(pre))
    return -stop(slope) * zero
