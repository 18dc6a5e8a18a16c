"""optax transformations for SAE training: constraints go in the optimizer chain, never in the step."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from sae_jax.base import InputError, Params, known
from sae_jax.selection import Number


def unit_norm_decoder(
    eps: float | None = 0.0, before_update: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Keep every decoder row at norm 1.

        W_dec_i <- (W_dec_i + u_i) / (|W_dec_i + u_i| + eps)      or  W_dec_i / |W_dec_i| + u_i

    Last in a chain: it bends the update so that what the step arrives at has unit rows. Rows are brought
    to norm 1 by the first step, whatever they start from.

    Args:
      eps: added to the norm; None for the dtype's machine epsilon, which dictionary_learning adds.
      before_update: normalise the weights before the update and leave it as it is: openai's order.

    Returns:
      An optax transformation without state, for params with a leaf `W_dec` [d_sae, d_out].

    Example:
      >>> optimizer = optax.chain(optax.adam(1e-3), unit_norm_decoder())

    Source: Bricken et al. 2023, "Towards Monosemanticity", appendix on the training of the autoencoder.
    """

    def constrain(W_dec, update):
        added = float(jnp.finfo(W_dec.dtype).eps) if eps is None else eps
        if before_update:
            return unit(W_dec, added) - W_dec + update
        return unit(W_dec + update, added) - W_dec

    return _on_leaf("W_dec", constrain, "unit_norm_decoder")


def project_decoder_gradient(eps: float = 0.0) -> optax.GradientTransformationExtraArgs:
    """Remove from each decoder row's gradient what is parallel to the row.

        g_i <- g_i - (g_i . w_i) w_i,   w_i = W_dec_i / (|W_dec_i| + eps)

    First in a chain, before the moments: what would only change a norm that is reset anyway should not
    enter them.

    Args:
      eps: added to the norm (dictionary_learning adds 1e-6).

    Source: Bricken et al. 2023; Gao et al. 2024, appendix A.
    """

    def project(W_dec, gradient):
        direction = unit(W_dec, eps)
        return gradient - (gradient * direction).sum(axis=-1, keepdims=True) * direction

    return _on_leaf("W_dec", project, "project_decoder_gradient")


def non_negative_threshold() -> optax.GradientTransformationExtraArgs:
    """Keep every threshold at 0 or above: `threshold <- max(threshold + u, 0)` (SAELens's JumpReLU)."""
    return _on_leaf(
        "threshold", lambda leaf, update: jnp.maximum(leaf + update, 0) - leaf, "non_negative_threshold"
    )


def clip_by_global_norm(max_norm: Number, eps: float = 1e-6) -> optax.GradientTransformation:
    """Shrink the gradients together where their norm is above `max_norm`, as PyTorch does.

        g <- g min(1, max_norm / (|g| + eps))

    `optax.clip_by_global_norm` has no eps, and so differs from the PyTorch libraries in the sixth digit.

    Args:
      max_norm: of all leaves together.
      eps: PyTorch's 1e-6.
    """

    def update(updates, state, params=None):
        factor = jnp.minimum(1, max_norm / (optax.tree.norm(updates) + eps))
        return jax.tree.map(lambda leaf: leaf * factor.astype(leaf.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def scale_by_adam(b1: Number = 0.9, b2: Number = 0.999, eps: float = 1e-8) -> optax.GradientTransformation:
    """Adam's direction, with bias corrections as exact in float32 as PyTorch's.

        m <- b1 m + (1 - b1) g;   v <- b2 v + (1 - b2) g^2
        u = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

    `optax.scale_by_adam` takes 1 - b2^t from a b2 that is rounded to float32 first, and so has it wrong by
    1.3e-5 of itself for 0.999. That alone is most of what parts a float32 run from PyTorch's.

    Args:
      b1, b2: decay of the moments; where traced, they are rounded as they come.
      eps: added to the root.

    Source: Kingma and Ba 2015 (arXiv 1412.6980), algorithm 1.
    """
    moments = optax.scale_by_adam(b1, b2, eps)

    def risen(decay, count):
        # 1 - decay^count
        if not known(decay):
            return 1 - decay**count
        return -jnp.expm1(count.astype(float) * (math.log(decay) if decay > 0 else -math.inf))

    def update(updates, state, params=None):
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment(updates, state.nu, b2, 2)
        first, second = risen(b1, count), risen(b2, count)

        def direction(m, v):
            return m / first.astype(m.dtype) / (jnp.sqrt(v / second.astype(v.dtype)) + eps)

        return jax.tree.map(direction, mu, nu), optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(moments.init, update)


def trapezoid(warmup: Number = 0, steps: Number = 0, decay: Number = 0, first: float = 0.0) -> optax.Schedule:
    """A factor for a learning rate that rises, stays at 1, and falls: warm-up and decay, both linear.

        rising (step + first) / warmup;   falling (steps - step) / decay over the last `decay` steps

    Args:
      warmup: steps of the rise; 0 for none.
      steps: of the whole run; only looked at where there is a decay.
      decay: steps of the fall to 0; 0 for none.
      first: 0 starts the rise at 0 (dictionary_learning), 1 at 1 / warmup (SAELens, from PyTorch's
        LinearLR).

    Returns:
      An optax schedule, for `optax.scale_by_schedule`.

    Example:
      >>> optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(trapezoid(100)), optax.scale(-lr))
    """

    def factor(step):
        # whole numbers over whole numbers would be float32 in double precision too
        risen, left = jnp.asarray(step + first, float), jnp.asarray(steps - step, float)
        rise = jnp.where(step < warmup, risen / jnp.maximum(warmup, 1), 1)
        fall = jnp.where((decay > 0) & (left < decay), left / jnp.maximum(decay, 1), 1)
        return jnp.minimum(rise, fall)

    return factor


class AverageState(NamedTuple):
    """What `average_weights` keeps: `average` is what evaluation and saving take."""

    count: Int[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
    average: Params


def average_weights(decay: float = 0.999) -> optax.GradientTransformationExtraArgs:
    """Keep an exponential moving average of the weights beside those that are trained.

        average_t = sum_s decay^(t - s) params_s / sum_s decay^(t - s)

    Last in a chain. Training goes on with the weights themselves; `train.trained_params`, and with it a
    sweep's metrics and what it saves, take the average.

    Args:
      decay: of the average.

    Source: Gao et al. 2024 (arXiv 2406.04093), appendix A.
    """

    def init(params):
        return AverageState(jnp.int32(0), jax.tree.map(jnp.asarray, params))

    def update(updates, state, params=None, **extra_args):
        if params is None:
            raise InputError("average_weights needs the params: optimizer.update(grads, state, params)")
        count = state.count + 1
        share = (1 - decay) / (1 - decay ** count.astype(jnp.float32))

        def towards(average, leaf, change):
            return average + share.astype(leaf.dtype) * (leaf + change - average)

        return updates, AverageState(count, jax.tree.map(towards, state.average, params, updates))

    return optax.GradientTransformationExtraArgs(init, update)


def unit(rows: Float[Array, "*rows d"], eps: float = 0.0) -> Float[Array, "*rows d"]:
    """Each row over its norm plus eps; a row of zeros has no direction and stays."""
    norm = jnp.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / jnp.where(norm > 0, norm + eps, 1)


def _on_leaf(name: str, change, transformation: str) -> optax.GradientTransformationExtraArgs:
    """A stateless transformation that bends one leaf's update by what the leaf is."""

    def update(updates: Any, state, params: Any = None, **extra_args):
        if params is None:
            raise InputError(f"{transformation} needs the params: optimizer.update(grads, state, params)")
        if name not in params:
            raise InputError(f"{transformation} needs a leaf {name}; there are: {', '.join(params)}")
        return {**updates, name: change(params[name], updates[name])}, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
