"""From pre-activations to features."""

from typing import NamedTuple, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Scalar

from sae_jax import sharding
from sae_jax.selection import Number, entries, entries_of_all, largest, largest_of_all
from sae_jax.sparse import Encoded, Few


@overload
def relu(pre: Few) -> Few: ...
@overload
def relu(pre: Float[Array, "*batch d_sae"]) -> Float[Array, "*batch d_sae"]: ...
def relu(pre: Float[Array, "*batch d_sae"] | Few) -> Float[Array, "*batch d_sae"] | Few:
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
    return pre.relu() if isinstance(pre, Few) else jax.nn.relu(pre)


@overload
def topk(pre: Encoded, k: Number, k_max: int | None = None) -> Few: ...
@overload
def topk(
    pre: Float[Array, "*batch d_sae"], k: Number, k_max: int | None = None
) -> Float[Array, "*batch d_sae"]: ...
def topk(
    pre: Float[Array, "*batch d_sae"] | Encoded, k: Number, k_max: int | None = None
) -> Float[Array, "*batch d_sae"] | Few:
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
    if isinstance(pre, Encoded):
        latents, chosen = entries(pre.values, k, k_max)
        above = jnp.take_along_axis(pre.values, latents, axis=-1) > 0
        return relu(pre.per_row(latents, chosen & above))
    return jnp.where(largest(pre, k, k_max), relu(pre), 0)


@overload
def batch_topk(pre: Encoded, k: Number, k_max: int | float | None = None) -> Few: ...
@overload
def batch_topk(
    pre: Float[Array, "batch d_sae"], k: Number, k_max: int | float | None = None
) -> Float[Array, "batch d_sae"]: ...
def batch_topk(
    pre: Float[Array, "batch d_sae"] | Encoded, k: Number, k_max: int | float | None = None
) -> Float[Array, "batch d_sae"] | Few:
    """Keep the `floor(k n)` largest rectified pre-activations of a batch of n rows.

    Args:
      pre: pre-activations of the whole batch.
      k: mean number of features per row; need not be whole.
      k_max: as in `largest`.

    Returns:
      Features, at most `floor(k n)` of the batch above 0.

    Source: Bussmann et al. 2024 (arXiv 2412.06410), section 3.
    """
    rows = len(pre.pre if isinstance(pre, Encoded) else pre)
    if k_max is None and isinstance(k, int | float):
        k_max = k
    count = None if k_max is None else int(k_max * rows)
    if isinstance(pre, Encoded):
        places, chosen = entries_of_all(pre.values, jnp.floor(k * rows), count)
        above = pre.values.reshape(-1)[places] > 0
        most = pre.pre.size if count is None else min(count, pre.pre.size)
        return relu(pre.of_all(places, chosen & above, most))
    return jnp.where(largest_of_all(pre, jnp.floor(k * rows), count), relu(pre), 0)


ROWS = 32
"""How many rows `activity` looks at in one pass of its loop."""


class Activity(NamedTuple):
    """Which latents a batch made active."""

    active: Bool[Array, "d_sae"]
    """On some row."""
    l0: Scalar
    """Mean number per row, in the dtype of the features."""


def activity(f: Float[Array, "batch d_sae"] | Few) -> Activity:
    """Which latents are active on some row, and how many on the average row: one count per latent for both.

        n_i = #{b: f_bi > 0};   active_i = n_i > 0;   l0 = sum_i n_i / batch

    Args:
      f: features.

    Returns:
      An `Activity`; no gradient flows through it.
    """
    if isinstance(f, Few):
        return Activity(f.fired(), f.l0())
    f = jax.lax.stop_gradient(f)
    if sharding.in_force():
        counts = _counts(f)
    else:
        counts = jax.lax.platform_dependent(f, cpu=_counts_in_a_loop, default=_counts)
    total = counts.astype(jnp.promote_types(f.dtype, jnp.float32)).sum()
    return Activity(counts > 0, (total / len(f)).astype(f.dtype))


def _counts(f: Float[Array, "batch d_sae"]) -> Float[Array, "d_sae"]:
    # floating point, because a whole batch may hold more than 2^31 active latents
    return (f > 0).sum(axis=0).astype(jnp.float32)


def _counts_in_a_loop(f: Float[Array, "batch d_sae"]) -> Float[Array, "d_sae"]:
    """`_counts` by adding up blocks of rows: XLA's CPU compiler would write the mask out to sum it."""
    passes = len(f) // ROWS
    if passes < 2:
        return _counts(f)

    def added(i, sums):
        # of f as it is: of f in another shape XLA would write a copy out
        return sums + (jax.lax.dynamic_slice_in_dim(f, i * ROWS, ROWS) > 0)

    sums = jax.lax.fori_loop(0, passes, added, jnp.zeros((ROWS, f.shape[1]), jnp.float32))
    return sums.sum(axis=0) + _counts(f[passes * ROWS :])


def smallest(f: Float[Array, "batch d_sae"] | Few) -> Float[Array, ""]:
    """The smallest feature above 0; infinite where there is none.

    Args:
      f: features.
    """
    return f.smallest() if isinstance(f, Few) else jnp.min(f, where=f > 0, initial=jnp.inf)


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
