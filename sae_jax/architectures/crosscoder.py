"""The crosscoder: one dictionary over several sources, such as the layers or the versions of a model."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from sae_jax import activations, control, initialisation, linear, losses
from sae_jax.base import (
    SAE,
    Info,
    Params,
    architecture,
    require,
    require_positive,
    require_target,
    require_weight,
)


@architecture
def crosscoder(
    d_in: int,
    d_sae: int,
    *,
    sources: int = 2,
    l1: float | Shaped[Array, ""] = 0.1,
    target_l0: float | Shaped[Array, ""] | None = None,
    l1_warmup: int | Shaped[Array, ""] = 0,
    decoder_init_norm: float = 0.08,
) -> SAE:
    """Sparse autoencoder that reads several sources at once and gives each of them back.

        f       = ReLU(sum_s x_s W_enc_s + b_enc)
        x_hat_s = f W_dec_s + b_dec_s
        loss    = sum_s |x_hat_s - x_s|^2 + l1 sum_i f_i sum_s |W_dec_is|

    The norms are summed, not taken together, so that a latent of one source alone costs no more than one
    that is shared: latents specialise where they may.

    Args:
      d_in: width of each source.
      d_sae: number of latents, shared by all sources.
      sources: how many there are; rows of data are [sources, d_in].
      l1: weight of the penalty, at least 0; may be traced, as the two below.
      target_l0: mean number of active latents to arrive at; the weight then starts at `l1` and is steered
        (`control.steer`), and kept as the leaf `log_penalty`.
      l1_warmup: steps over which the penalty rises from 0.
      decoder_init_norm: of each source's decoder rows at the start, the encoder their transpose, biases 0.

    Returns:
      An `SAE`. Params: `W_enc` [sources, d_in, d_sae], `b_enc` [d_sae], `W_dec` [d_sae, sources, d_in],
      `b_dec` [sources, d_in].

    Raises:
      InputError: a size under 1, a negative `l1`, a `target_l0` outside (0, d_sae]; when it runs, rows of
        another shape.

    Example:
      >>> sae = crosscoder(d_in=64, d_sae=256, sources=2)
      >>> source = in_memory(np.stack([base, tuned], axis=1))

    Source: Lindsey et al. 2024, "Sparse Crosscoders for Cross-Layer Features and Model Diffing".
    """
    require(sources >= 1, f"sources must be at least 1, got {sources}")
    require_weight("l1", l1)
    require_target(target_l0, d_sae)
    if target_l0 is not None:
        require_positive("l1", l1)
    require_positive("decoder_init_norm", decoder_init_norm)

    def init(key, dtype=jnp.float32):
        drawn = initialisation.tied_rows(key, d_in, d_sae * sources, decoder_init_norm, dtype)
        W_dec = drawn["W_dec"].reshape(d_sae, sources, d_in)
        params = {
            "W_enc": W_dec.transpose(1, 2, 0),
            "b_enc": jnp.zeros(d_sae, dtype),
            "W_dec": W_dec,
            "b_dec": jnp.zeros((sources, d_in), dtype),
        }
        return params if target_l0 is None else control.steered(params, dtype)

    def encode(params, x):
        fits = x.shape[-2:] == (sources, d_in)
        require(fits, f"this crosscoder reads rows of [{sources}, {d_in}], got {tuple(x.shape[-2:])}")
        # f = ReLU(sum_s x_s W_enc_s + b_enc)
        flat = x.reshape(*x.shape[:-2], sources * d_in)
        return activations.relu(
            linear.matmul(flat, params["W_enc"].reshape(sources * d_in, d_sae)) + params["b_enc"]
        )

    def decode(params, f, x=None):
        # x_hat_s = f W_dec_s + b_dec_s
        flat = linear.matmul(f, params["W_dec"].reshape(d_sae, sources * d_in))
        return flat.reshape(*f.shape[:-1], sources, d_in) + params["b_dec"]

    def loss(params, batch, progress):
        f = encode(params, batch.x)
        # |x_hat_s - x_s|^2 of each source
        errors = jnp.square(decode(params, f) - batch.y).sum(axis=-1).mean(axis=0)
        # sum_i f_i sum_s |W_dec_is|
        norms = jnp.linalg.norm(params["W_dec"], axis=-1).sum(axis=-1)
        error, sparsity = errors.sum(), losses.l1(f, norms, mean_features=False)
        fired, l0 = activations.activity(f)
        weight, assigned = control.penalty_weight(params, progress.step, l0, l1, l1_warmup, target_l0)
        logs = {"reconstruction": error, "sparsity": sparsity, "l0": l0}
        logs |= {f"reconstruction_{s}": errors[s] for s in range(sources)}
        return error + weight * sparsity, Info(logs, fired, assigned)

    return SAE(init, encode, decode, loss)


def decoder_shares(params: Params) -> Float[np.ndarray, "sources d_sae"]:
    """Which source each latent belongs to: `|W_dec_is| / sum_t |W_dec_it|`.

    0.5 each is a latent that two sources share; 1 and 0 one that only the first has.

    Args:
      params: of a crosscoder.

    Returns:
      Shares that add up to 1 over sources; NaN for a latent whose rows are all 0.

    Source: Lindsey et al. 2024, section on model diffing.
    """
    norms = np.linalg.norm(np.asarray(params["W_dec"], np.float64), axis=-1).T
    with np.errstate(invalid="ignore"):
        return norms / norms.sum(axis=0)
