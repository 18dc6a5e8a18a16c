"""The ReLU SAE with an L1 penalty: the seed's, and by its arguments the field's."""

from math import inf

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Shaped

from sae_jax import losses
from sae_jax.activations import relu as rectify
from sae_jax.base import SAE, Info, architecture, require
from sae_jax.linear import matmul


@architecture
def relu(
    d_in: int,
    d_sae: int,
    *,
    l1: float | Shaped[Array, ""] = 0.1,
    mean_features: bool = True,
    decoder_norm_l1: bool = False,
    apply_b_dec_to_input: bool = False,
    tied: bool = False,
) -> SAE:
    """Sparse autoencoder with ReLU features and an L1 penalty.

        f     = ReLU(x W_enc + b_enc)            (x - b_dec in place of x where apply_b_dec_to_input)
        x_hat = f W_dec + b_dec
        loss  = mean (x_hat - x)^2 + l1 mean |f| (|f_i| |W_dec_i| where decoder_norm_l1)

    The defaults are the seed's: untied plain linear layers drawn as `torch.nn.Linear` draws them, both
    means over every element, no constraint on the decoder. A decoder that is free can shrink `f` and
    grow itself to escape the penalty; `decoder_norm_l1`, or `transforms.unit_norm_decoder` in the
    optimizer chain, closes that way out.

    Args:
      d_in: width of the activations.
      d_sae: number of latents.
      l1: weight of the penalty, at least 0; may be traced.
      mean_features: average both terms over features too (the seed); False sums them (SAELens, papers).
      decoder_norm_l1: weigh each latent's penalty by the norm of its decoder row.
      apply_b_dec_to_input: subtract `b_dec` from the input (the pre-encoder bias).
      tied: use `W_dec` transposed as the encoder; `params` then has no `W_enc`.

    Returns:
      An `SAE`. Params: `W_enc` [d_in, d_sae], `b_enc` [d_sae], `W_dec` [d_sae, d_in], `b_dec` [d_in].

    Raises:
      InputError: a size under 1, or a negative `l1`.

    Example:
      >>> sae = relu(d_in=4, d_sae=6, l1=0.1)
      >>> params = sae.init(jax.random.key(0))
      >>> sae.encode(params, jnp.ones((8, 4))).shape
      (8, 6)

    Source: Cunningham et al. 2023 (arXiv 2309.08600), section 2; Bricken et al. 2023, "Towards
    Monosemanticity"; decoder-norm weights: Anthropic, Circuits Updates April 2024.
    """
    require(isinstance(l1, jax.Array) or 0 <= l1 < inf, f"l1 must be finite and not negative, got {l1}")

    def init(key, dtype=jnp.float32):
        # U(+-1/sqrt(fan_in)) for every weight and bias, as torch.nn.Linear; in one draw, because each
        # further one takes a third of a second to compile
        draws = jax.random.uniform(key, ((d_in + 1) * d_sae + (d_sae + 1) * d_in,), dtype, -1, 1)
        encoder, decoder = jnp.split(draws, [(d_in + 1) * d_sae])
        encoder = encoder.reshape(d_in + 1, d_sae) * d_in**-0.5
        decoder = decoder.reshape(d_sae + 1, d_in) * d_sae**-0.5
        params = {"W_enc": encoder[:-1], "b_enc": encoder[-1], "W_dec": decoder[:-1], "b_dec": decoder[-1]}
        return {name: leaf for name, leaf in params.items() if not (tied and name == "W_enc")}

    def encode(params, x):
        W_enc = params["W_dec"].T if tied else params["W_enc"]
        # x - b_dec
        centred = x - params["b_dec"] if apply_b_dec_to_input else x
        # f = ReLU(x W_enc + b_enc)
        return rectify(matmul(centred, W_enc) + params["b_enc"])

    def decode(params, f):
        # x_hat = f W_dec + b_dec
        return matmul(f, params["W_dec"]) + params["b_dec"]

    def loss(params, batch, progress):
        f = encode(params, batch.x)
        # mean (x_hat - x)^2
        reconstruction = losses.squared_error(decode(params, f), batch.y, mean_features)
        # mean |f_i| |W_dec_i|
        norms = optax.safe_norm(params["W_dec"], 0.0, axis=-1) if decoder_norm_l1 else None
        sparsity = losses.l1(f, norms, mean_features)
        logs = {"reconstruction": reconstruction, "sparsity": sparsity, "l0": losses.l0(f)}
        return reconstruction + l1 * sparsity, Info(logs, fired=(f > 0).any(axis=0), assigned={})

    return SAE(init, encode, decode, loss)
