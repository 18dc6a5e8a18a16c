"""The TopK SAE: a fixed number of features per row, and no penalty."""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Shaped

from sae_jax import activations, initialisation, linear, losses
from sae_jax import auxk as conventions
from sae_jax.base import SAE, Info, architecture, known, require_k, require_positive, require_weight
from sae_jax.sparse import one_by_one, pays


@architecture
def topk(
    d_in: int,
    d_sae: int,
    *,
    k: int | float | Shaped[Array, ""],
    k_max: int | None = None,
    auxk: float | Shaped[Array, ""] = 1.0,
    auxk_loss: conventions.Convention = conventions.saelens,
    k_aux: int | None = None,
    dead_after: int | Shaped[Array, ""] = 1000,
    rescale_acts_by_decoder_norm: bool = False,
    apply_b_dec_to_input: bool = True,
    decoder_init_norm: float = 1.0,
    reconstruction: losses.Reconstruction = losses.summed,
    sparse: bool | None = None,
) -> SAE:
    """Sparse autoencoder that keeps the k largest pre-activations of each row.

        pi    = (x - b_dec) W_enc + b_enc          (times |W_dec_i| where rescale_acts_by_decoder_norm)
        f     = ReLU(pi) [pi among the k largest of its row]
        x_hat = f W_dec + b_dec                    (f_i / |W_dec_i| in place of f_i where rescaled)
        loss  = |x_hat - x|^2 + auxk AuxK

    Args:
      d_in: width of the activations.
      d_sae: number of latents.
      k: features per row; an axis of a sweep under `k_max`, or traced like every number below that sets no
        shape.
      k_max: the largest k that will come; None for `k` itself. `sweep` sets it from its grid.
      auxk: weight of the auxiliary loss that revives dead latents; the Python number 0 leaves it out.
      auxk_loss: whose convention of it: `auxk.saelens`, `.normalised`, `.fvu`, `.attached`. The default is
        in the unit of the error; 1/32 of `.normalised` is for inputs of mean square 1.
      k_aux: how many dead latents each row may use; None for d_in // 2.
      dead_after: steps of silence after which a latent is dead.
      rescale_acts_by_decoder_norm: choose and report features in units of their decoder rows (SAELens).
      apply_b_dec_to_input: subtract `b_dec` from the input.
      decoder_init_norm: of the decoder's rows at the start, the encoder their transpose, biases 0.
      reconstruction: how the reconstruction is judged: `losses.summed`, `.averaged`, `.unexplained`.
      sparse: True to train by products of the chosen entries alone, False by products of whole matrices,
        None for what is quicker at these sizes. Losses and gradients differ by rounding only.

    Returns:
      An `SAE`. Params: `W_enc` [d_in, d_sae], `b_enc` [d_sae], `W_dec` [d_sae, d_in], `b_dec` [d_in].

    Raises:
      InputError: a size under 1, k outside [1, d_sae] or not whole, a negative `auxk`.

    Example:
      >>> sae = topk(d_in=64, d_sae=256, k=8)

    Source: Gao et al. 2024 (arXiv 2406.04093), sections 2.3 and 2.4, appendix A.2.
    """
    require_k(k, d_sae, True, k_max)
    require_weight("auxk", auxk)
    require_positive("decoder_init_norm", decoder_init_norm)
    require_positive("k_aux", k_aux)
    k_aux = max(1, d_in // 2) if k_aux is None else k_aux
    bound: Any = int(k) if k_max is None and known(k) else k_max

    def init(key, dtype=jnp.float32):
        return initialisation.tied_rows(key, d_in, d_sae, decoder_init_norm, dtype)

    def pre_activations(params, x, way=linear.pre_activations):
        # pi = (x - b_dec) W_enc + b_enc
        pre = way(params, x, apply_b_dec_to_input)
        return linear.to_decoder_units(params, pre) if rescale_acts_by_decoder_norm else pre

    def coefficients(params, f):
        return linear.from_decoder_units(params, f) if rescale_acts_by_decoder_norm else f

    def encode(params, x):
        # f = ReLU(pi) [pi among the k largest of its row]
        return activations.topk(pre_activations(params, x), k, bound)

    def decode(params, f, x=None):
        # x_hat = f W_dec + b_dec
        return linear.decode(params, coefficients(params, f), x)

    def objective(hyper, params, batch, progress, encoded=pre_activations, reviving=True):
        pre = encoded(params, batch.x)
        f = activations.topk(pre, hyper["k"], bound)
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
        return total, Info(logs, fired, assigned={})

    few = partial(objective, encoded=partial(pre_activations, way=linear.remembered))
    by_entries = one_by_one(few, partial(few, reviving=False), conventions.needed)

    def loss(params, batch, progress):
        hyper = {"k": k, "auxk": auxk, "dead_after": dead_after}
        sparsely = reconstruction in losses.WHOLE and pays(sparse, len(batch.x), d_in, d_sae, bound)
        return (by_entries if sparsely else objective)(hyper, params, batch, progress)

    return SAE(init, encode, decode, loss)
