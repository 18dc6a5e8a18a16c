"""The JumpReLU SAE: a learned threshold per latent, and a penalty on L0 itself."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Scalar, Shaped

from sae_jax import activations, control, initialisation, linear, losses
from sae_jax.base import SAE, Info, architecture, require, require_positive, require_target, require_weight


@architecture
def jumprelu(
    d_in: int,
    d_sae: int,
    *,
    l0_coefficient: float | Shaped[Array, ""] = 1.0,
    target_l0: float | Shaped[Array, ""] | None = None,
    l0_warmup: int | Shaped[Array, ""] = 0,
    penalty: Callable[..., Scalar] = losses.step_l0,
    tanh_scale: float | Shaped[Array, ""] = 4.0,
    bandwidth: float | Shaped[Array, ""] = 0.05,
    threshold_init: float | Shaped[Array, ""] = 0.01,
    log_threshold: bool = False,
    ste_to_input: bool = False,
    penalty_of_features: bool = False,
    pre_act: float | Shaped[Array, ""] = 0.0,
    dead_after: int | Shaped[Array, ""] = 1000,
    apply_b_dec_to_input: bool = False,
    decoder_init_norm: float = 1.0,
    reconstruction: losses.Reconstruction = losses.summed,
) -> SAE:
    """Sparse autoencoder with a learned threshold per latent and a penalty on the number of features.

        pi    = x W_enc + b_enc                    (x - b_dec in place of x where apply_b_dec_to_input)
        f     = pi H(pi - threshold)
        x_hat = f W_dec + b_dec
        loss  = |x_hat - x|^2 + l0_coefficient penalty,   penalty = L0 = sum_i H(pi_i - threshold_i)

    The Heaviside step H has no useful derivative; `activations.jumprelu` and `activations.step` estimate it.

    Args:
      d_in: width of the activations.
      d_sae: number of latents.
      l0_coefficient: weight of the penalty, at least 0; may be traced, as every number below.
      target_l0: mean number of active latents to arrive at. The quadratic penalties are least there by
        themselves; of the others the weight then starts at `l0_coefficient` and is steered
        (`control.steer`), and kept as the leaf `log_penalty`.
      l0_warmup: steps over which the penalty rises from 0.
      penalty: `losses.step_l0`, `.tanh_l0`, `.quadratic_l0` or `.quadratic_mean_l0`.
      tanh_scale: c of `losses.tanh_l0`.
      bandwidth: of the estimators, in the unit of pi.
      threshold_init: every threshold at the start.
      log_threshold: learn the logarithm of the threshold, the leaf then being `log_threshold`.
      ste_to_input: let the estimators reach the encoder too (Anthropic).
      penalty_of_features: count `f > threshold` where `pi > threshold` is meant, so that half of each
        estimator's window is lost: what dictionary_learning does.
      pre_act: weight of `mean_b sum_i ReLU(threshold_i - pi_i) |W_dec_i|` over dead latents, which draws
        them back (Anthropic; over dead latents only: SAELens).
      dead_after: steps of silence after which a latent is dead.
      apply_b_dec_to_input: subtract `b_dec` from the input.
      decoder_init_norm: of the decoder's rows at the start, the encoder their transpose, biases 0.
      reconstruction: how the reconstruction is judged: `losses.summed`, `.averaged`, `.unexplained`.

    Returns:
      An `SAE`. Params: `W_enc` [d_in, d_sae], `b_enc` [d_sae], `threshold` [d_sae], `W_dec` [d_sae, d_in],
      `b_dec` [d_in].

    Raises:
      InputError: a size under 1, a negative weight, a `target_l0` outside (0, d_sae] or missing for a
        quadratic penalty, a bandwidth not above 0.

    Example:
      >>> sae = jumprelu(d_in=64, d_sae=256, target_l0=8)

    Source: Rajamanoharan et al. 2024 (arXiv 2407.14435); tanh and pre_act: Anthropic, Circuits Updates
    January 2025; quadratic: Gemma Scope 2.
    """
    require_weight("l0_coefficient", l0_coefficient)
    require_weight("pre_act", pre_act)
    require_target(target_l0, d_sae)
    require_positive("bandwidth", bandwidth)
    aimed = penalty in losses.AIMED
    require(target_l0 is not None or not aimed, f"the penalty {penalty.__name__} needs target_l0")
    steering = target_l0 is not None and not aimed
    if steering:
        require_positive("l0_coefficient", l0_coefficient)
    require_positive("threshold_init", threshold_init if log_threshold else None)
    require_positive("decoder_init_norm", decoder_init_norm)
    has_pre_act = not (isinstance(pre_act, float | int) and pre_act == 0)

    def init(key, dtype=jnp.float32):
        params = initialisation.tied_rows(key, d_in, d_sae, decoder_init_norm, dtype)
        # steps of a learning rate would be lost in half precision
        start = jnp.full(d_sae, threshold_init, jnp.promote_types(dtype, jnp.float32))
        params |= {"log_threshold": jnp.log(start)} if log_threshold else {"threshold": start}
        return control.steered(params, dtype) if steering else params

    def threshold_of(params, pre):
        threshold = jnp.exp(params["log_threshold"]) if log_threshold else params["threshold"]
        return threshold.astype(pre.dtype)

    def encode(params, x):
        # f = pi H(pi - threshold), the threshold not below 0
        pre = linear.pre_activations(params, x, apply_b_dec_to_input)
        return jnp.where(pre > threshold_of(params, pre), activations.relu(pre), 0)

    def loss(params, batch, progress):
        pre = linear.pre_activations(params, batch.x, apply_b_dec_to_input)
        threshold = threshold_of(params, pre)
        f = activations.jumprelu(pre, threshold, bandwidth, ste_to_input)
        # |x_hat - x|^2,   x_hat = f W_dec + b_dec
        _, error = reconstruction(params, f, batch)
        # L0 = sum_i H(pi_i - threshold_i)
        counted = f if penalty_of_features else pre
        active = activations.step(counted, threshold, bandwidth, ste_to_input)
        norms = jnp.linalg.norm(params["W_dec"], axis=-1)
        sparsity, (fired, l0) = penalty(active, f * norms, target_l0, tanh_scale), activations.activity(f)
        weight, assigned = control.penalty_weight(
            params, progress.step, l0, l0_coefficient, l0_warmup, target_l0 if steering else None
        )
        total, logs = error + weight * sparsity, {"reconstruction": error, "sparsity": sparsity, "l0": l0}
        if has_pre_act:
            # mean_b sum_i ReLU(threshold_i - pi_i) |W_dec_i| [i is dead]
            dead = progress.since_fired > dead_after
            shortfall = jnp.where(dead, activations.relu(threshold - pre), 0)
            logs["pre_act"] = (shortfall * norms).sum(axis=-1).mean()
            total = total + pre_act * logs["pre_act"]
        return total, Info(logs, fired, assigned)

    return SAE(init, encode, linear.decode, loss)
