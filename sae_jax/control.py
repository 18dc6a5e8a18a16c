"""What moves a hyper-parameter while training goes on: warm-ups, annealing, and the way to a target L0."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Scalar

from sae_jax.base import Params
from sae_jax.selection import Number

INTEGRAL, PROPORTIONAL, LARGEST = 0.01, 1.0, 10.0
"""Gains of `steer`, per step and at once (docs/target_l0.md), and how far its integral may go."""


def warmup(step: Int[Array, ""], steps: Number) -> Scalar:
    """A factor that rises linearly from 0 at step 0 to 1 at step `steps`: `min(step / steps, 1)`.

    With 0 steps it is 1. SAELens and dictionary_learning warm their sparsity penalties up so.
    """
    # whole numbers over whole numbers would be float32 in double precision too
    return jnp.where(step < steps, step.astype(float) / jnp.maximum(steps, 1), 1)


def anneal(step: Int[Array, ""], first: Number, last: Number, start: Number, end: Number) -> Scalar:
    """A value that is `first` up to step `start`, goes linearly to `last` at step `end`, and stays there."""
    share = jnp.clip((step - start).astype(float) / jnp.maximum(end - start, 1), 0, 1)
    return first + (last - first) * share


def steer(params: Params, l0: Scalar, target_l0: Number) -> tuple[Scalar, Params]:
    """The factor on a sparsity penalty that brings L0 to a target: a proportional-integral controller.

        error  = clip(log(L0 / L0*), -1, 1)
        factor = exp(log_penalty + PROPORTIONAL error)
        log_penalty <- clip(log_penalty + INTEGRAL error, -LARGEST, LARGEST)

    It works on logarithms because L0 answers to a factor on the penalty with a factor. The integral goes
    on until the mean error is 0, so the member lands on its target whatever weight the penalty started at.

    Args:
      params: holds the leaf `log_penalty` [].
      l0: of this batch.
      target_l0: L0*, above 0.

    Returns:
      The factor, and the leaf to assign.
    """
    l0 = jax.lax.stop_gradient(l0)
    error = jnp.clip(jnp.log(jnp.maximum(l0, 1e-3) / target_l0), -1, 1)
    log_penalty = jax.lax.stop_gradient(params["log_penalty"])
    factor = jnp.exp(log_penalty + PROPORTIONAL * error)
    moved = jnp.clip(log_penalty + INTEGRAL * error, -LARGEST, LARGEST)
    return factor.astype(l0.dtype), {"log_penalty": moved.astype(log_penalty.dtype)}


def penalty_weight(
    params: Params, step: Int[Array, ""], l0: Scalar, weight: Number, steps: Number, target_l0: Number | None
) -> tuple[Scalar, Params]:
    """The weight of a sparsity penalty at a step: warmed up, and steered where there is a target.

        weight(step) = weight warmup(step, steps) steer(L0, target_l0)

    Args:
      params: hold the leaf `log_penalty` where there is a target.
      step: steps done.
      l0: of this batch; the weight is of its dtype.
      weight: as the user gave it.
      steps: of the warm-up.
      target_l0: or None.

    Returns:
      The weight, and the leaves to assign.
    """
    factor, assigned = (1, {}) if target_l0 is None else steer(params, l0, target_l0)
    return (weight * warmup(step, steps) * factor).astype(l0.dtype), assigned


def continued(params: Params, now: Scalar, following: Scalar) -> tuple[Scalar, Params]:
    """The factor that keeps a penalty from jumping while its form changes from step to step.

        factor = exp(log_penalty);   log_penalty <- log_penalty + log(now / following)

    Args:
      params: holds the leaf `log_penalty` [].
      now: the bare penalty of this batch in the form of this step.
      following: the same batch's in the form of the next.

    Returns:
      The factor, and the leaf to assign.

    Source: Karvonen et al. 2024 (arXiv 2408.00113), section 4, there every so many steps and over a queue
    of batches.
    """
    now, following, log_penalty = jax.lax.stop_gradient((now, following, params["log_penalty"]))
    some = (now > 0) & (following > 0)
    ratio = jnp.where(some, now, 1) / jnp.where(some, following, 1)
    return jnp.exp(log_penalty).astype(now.dtype), {
        "log_penalty": (log_penalty + jnp.log(ratio)).astype(log_penalty.dtype)
    }


def steered(params: Params, dtype) -> Params:
    """`params` with the leaf that `steer` and `continued` keep."""
    # steps of a hundredth would be lost in half precision
    return {**params, "log_penalty": jnp.zeros((), jnp.promote_types(dtype, jnp.float32))}
