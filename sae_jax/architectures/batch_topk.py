"""The BatchTopK SAE: a fixed number of features per batch, and a threshold for single rows."""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Shaped

from sae_jax import activations, initialisation, linear, losses
from sae_jax import auxk as conventions
from sae_jax.base import SAE, Info, architecture, known, require_k, require_positive, require_weight
from sae_jax.sparse import one_by_one, pays


@architecture
def batch_topk(
    d_in: int,
    d_sae: int,
    *,
    k: int | float | Shaped[Array, ""],
    k_max: int | float | None = None,
    auxk: float | Shaped[Array, ""] = 1.0,
    auxk_loss: conventions.Convention = conventions.saelens,
    k_aux: int | None = None,
    dead_after: int | Shaped[Array, ""] = 1000,
    threshold_decay: float | Shaped[Array, ""] = 0.99,
    threshold_start: int | Shaped[Array, ""] = 0,
    threshold_init: float | Shaped[Array, ""] = -1.0,
    rescale_acts_by_decoder_norm: bool = False,
    apply_b_dec_to_input: bool = True,
    decoder_init_norm: float = 1.0,
    reconstruction: losses.Reconstruction = losses.summed,
    sparse: bool | None = None,
) -> SAE:
    """Sparse autoencoder that keeps the k n largest pre-activations of a batch of n rows.

        pi    = (x - b_dec) W_enc + b_enc          (times |W_dec_i| where rescale_acts_by_decoder_norm)
        f     = ReLU(pi) [pi among the floor(k n) largest of the batch]             while training
        f     = ReLU(pi) [pi > threshold]                                           in `encode`
        x_hat = f W_dec + b_dec                    (f_i / |W_dec_i| in place of f_i where rescaled)
        loss  = |x_hat - x|^2 + auxk AuxK

        threshold <- threshold_decay threshold + (1 - threshold_decay) min {f_bi > 0}

    Args:
      d_in: width of the activations.
      d_sae: number of latents.
      k: mean features per row, need not be whole; otherwise as in `topk`.
      k_max, auxk, auxk_loss, k_aux, dead_after: as in `topk`.
      threshold_decay: of the moving average.
      threshold_start: the first step that enters it.
      threshold_init: before it; below 0, the first minimum is taken as it is.
      rescale_acts_by_decoder_norm, apply_b_dec_to_input, decoder_init_norm: as in `topk`.
      reconstruction, sparse: as in `topk`.

    Returns:
      An `SAE`. Params: as `topk`, and `threshold` [], which no gradient moves.

    Raises:
      InputError: a size under 1, k outside (0, d_sae], a negative `auxk`.

    Example:
      >>> sae = batch_topk(d_in=64, d_sae=256, k=8)

    Source: Bussmann et al. 2024 (arXiv 2412.06410).
    """
    require_k(k, d_sae, False, k_max)
    require_weight("auxk", auxk)
    require_positive("decoder_init_norm", decoder_init_norm)
    require_positive("k_aux", k_aux)
    k_aux = max(1, d_in // 2) if k_aux is None else k_aux
    bound: Any = k if k_max is None and known(k) else k_max

    def init(key, dtype=jnp.float32):
        params = initialisation.tied_rows(key, d_in, d_sae, decoder_init_norm, dtype)
        # its average moves by shares that half precision would lose
        exact = jnp.promote_types(dtype, jnp.float32)
        return {**params, "threshold": jnp.asarray(threshold_init, exact)}

    def pre_activations(params, x, way=linear.pre_activations):
        # pi = (x - b_dec) W_enc + b_enc
        pre = way(params, x, apply_b_dec_to_input)
        return linear.to_decoder_units(params, pre) if rescale_acts_by_decoder_norm else pre

    def coefficients(params, f):
        return linear.from_decoder_units(params, f) if rescale_acts_by_decoder_norm else f

    def encode(params, x):
        # f = ReLU(pi) [pi > threshold]
        f = activations.relu(pre_activations(params, x))
        return jnp.where(f > params["threshold"], f, 0)

    def decode(params, f, x=None):
        # x_hat = f W_dec + b_dec
        return linear.decode(params, coefficients(params, f), x)

    def objective(hyper, params, batch, progress, encoded=pre_activations, reviving=True):
        pre = encoded(params, batch.x)
        f = activations.batch_topk(pre, hyper["k"], bound)
        # |x_hat - x|^2
        x_hat, error = reconstruction(params, coefficients(params, f), batch)
        fired, l0 = activations.activity(f)
        total, logs = error, {"reconstruction": error, "l0": l0}
        if conventions.wanted(auxk):
            # AuxK: the dead latents' reconstruction of x - x_hat
            logs["auxk"] = jnp.zeros_like(error) if not reviving else auxk_loss(
                pre, batch.y - x_hat, batch.y,
                lambda a: linear.matmul(coefficients(params, a), params["W_dec"]),
                fired, progress, k_aux, hyper["dead_after"],
            )  # fmt: skip
            total = error + hyper["auxk"] * logs["auxk"]
        threshold = following(params["threshold"], f, progress.step)
        return total, Info(logs, fired, assigned={"threshold": threshold})

    few = partial(objective, encoded=partial(pre_activations, way=linear.remembered))
    by_entries = one_by_one(few, partial(few, reviving=False), conventions.needed)

    def loss(params, batch, progress):
        hyper = {"k": k, "auxk": auxk, "dead_after": dead_after}
        sparsely = reconstruction in losses.WHOLE and pays(sparse, len(batch.x), d_in, d_sae, bound)
        return (by_entries if sparsely else objective)(hyper, params, batch, progress)

    def following(threshold, f, step):
        # threshold <- decay threshold + (1 - decay) min {f_bi > 0}
        smallest = activations.smallest(f)
        average = threshold_decay * threshold + (1 - threshold_decay) * smallest
        moved = jnp.where(threshold < 0, smallest, average)
        return jnp.where((step >= threshold_start) & jnp.isfinite(smallest), moved, threshold).astype(
            threshold.dtype
        )

    return SAE(init, encode, decode, loss)
