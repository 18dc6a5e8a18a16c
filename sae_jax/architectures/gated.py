"""The Gated SAE: one affine map decides which latents are active, another how much."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from sae_jax import activations, control, initialisation, linear, losses
from sae_jax.base import SAE, Info, architecture, require_positive, require_target, require_weight


@architecture
def gated(
    d_in: int,
    d_sae: int,
    *,
    l1: float | Shaped[Array, ""] = 0.1,
    target_l0: float | Shaped[Array, ""] | None = None,
    l1_warmup: int | Shaped[Array, ""] = 0,
    decoder_norm_l1: bool = False,
    detach_auxiliary: bool = True,
    apply_b_dec_to_input: bool = True,
    decoder_init_norm: float = 1.0,
    reconstruction: losses.Reconstruction = losses.summed,
) -> SAE:
    """Sparse autoencoder whose encoder tells which latents are active apart from how much.

        h       = (x - b_dec) W_enc
        pi_gate = h + b_gate;     pi_mag = exp(r_mag) h + b_mag
        f       = H(pi_gate) ReLU(pi_mag)
        x_hat   = f W_dec + b_dec
        loss    = |x_hat - x|^2 + l1 |ReLU(pi_gate)|_1 + |ReLU(pi_gate) [W_dec] + [b_dec] - x|^2

    The penalty reaches only the gate, so it does not shrink magnitudes; the last term, in which [ ] takes
    no gradient, is what trains the gate.

    Args:
      d_in: width of the activations.
      d_sae: number of latents.
      l1: weight of the penalty, at least 0; may be traced, as the two below.
      target_l0: mean number of active latents to arrive at; the weight then starts at `l1` and is steered
        (`control.steer`), and kept as the leaf `log_penalty`.
      l1_warmup: steps over which the penalty rises from 0.
      decoder_norm_l1: weigh each latent's penalty by the norm of its decoder row (SAELens).
      detach_auxiliary: keep the last term's gradient from the decoder, as the paper and
        dictionary_learning do; SAELens lets it through.
      apply_b_dec_to_input: subtract `b_dec` from the input.
      decoder_init_norm: of the decoder's rows at the start, the encoder their transpose, the rest 0.
      reconstruction: how the reconstruction is judged: `losses.summed`, `.averaged`, `.unexplained`.

    Returns:
      An `SAE`. Params: `W_enc` [d_in, d_sae], `b_gate`, `b_mag`, `r_mag` [d_sae], `W_dec` [d_sae, d_in],
      `b_dec` [d_in].

    Raises:
      InputError: a size under 1, a negative `l1`, a `target_l0` outside (0, d_sae].

    Example:
      >>> sae = gated(d_in=64, d_sae=256, l1=0.5)

    Source: Rajamanoharan et al. 2024 (arXiv 2404.16014), equations 6 to 8.
    """
    require_weight("l1", l1)
    require_target(target_l0, d_sae)
    if target_l0 is not None:
        require_positive("l1", l1)
    require_positive("decoder_init_norm", decoder_init_norm)

    def init(key, dtype=jnp.float32):
        params = initialisation.tied_rows(key, d_in, d_sae, decoder_init_norm, dtype)
        zeros = params.pop("b_enc")
        params |= {"b_gate": zeros, "b_mag": zeros, "r_mag": zeros}
        return params if target_l0 is None else control.steered(params, dtype)

    def gate_and_features(params, x):
        # h = (x - b_dec) W_enc
        h = linear.matmul(x - params["b_dec"] if apply_b_dec_to_input else x, params["W_enc"])
        # pi_gate = h + b_gate;   pi_mag = exp(r_mag) h + b_mag
        gate = h + params["b_gate"]
        magnitude = activations.relu(jnp.exp(params["r_mag"]) * h + params["b_mag"])
        # f = H(pi_gate) ReLU(pi_mag)
        return activations.relu(gate), jnp.where(gate > 0, magnitude, 0)

    def encode(params, x):
        return gate_and_features(params, x)[1]

    def loss(params, batch, progress):
        open_gate, f = gate_and_features(params, batch.x)
        # |x_hat - x|^2,   x_hat = f W_dec + b_dec
        _, error = reconstruction(params, f, batch)
        # |ReLU(pi_gate)|_1
        norms = jnp.linalg.norm(params["W_dec"], axis=-1) if decoder_norm_l1 else None
        sparsity, (fired, l0) = losses.l1(open_gate, norms, mean_features=False), activations.activity(f)
        # |ReLU(pi_gate) [W_dec] + [b_dec] - x|^2
        decoder = {name: leaf for name, leaf in params.items() if name in ("W_dec", "b_dec", "W_skip")}
        decoder = jax.lax.stop_gradient(decoder) if detach_auxiliary else decoder
        auxiliary = losses.squared_error(linear.decode(decoder, open_gate, batch.x), batch.y, False)
        weight, assigned = control.penalty_weight(params, progress.step, l0, l1, l1_warmup, target_l0)
        logs = {"reconstruction": error, "sparsity": sparsity, "auxiliary": auxiliary, "l0": l0}
        return error + weight * sparsity + auxiliary, Info(logs, fired, assigned)

    return SAE(init, encode, linear.decode, loss)
