"""The ReLU SAE with an L1 penalty: the seed's, and by its arguments the field's."""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Shaped

from sae_jax import activations, control, initialisation, linear, losses
from sae_jax.base import SAE, Info, architecture, require, require_positive, require_target, require_weight


@architecture
def relu(
    d_in: int,
    d_sae: int,
    *,
    l1: float | Shaped[Array, ""] = 0.1,
    target_l0: float | Shaped[Array, ""] | None = None,
    l1_warmup: int | Shaped[Array, ""] = 0,
    p: float | Shaped[Array, ""] = 1.0,
    p_end: float | Shaped[Array, ""] | None = None,
    p_anneal: tuple[int, int] = (0, 1),
    lp_root: bool = False,
    mean_features: bool = True,
    decoder_norm_l1: bool = False,
    apply_b_dec_to_input: bool = False,
    tied: bool = False,
    decoder_init_norm: float | None = None,
    reconstruction: losses.Reconstruction | None = None,
) -> SAE:
    """Sparse autoencoder with ReLU features and an L1 penalty.

        f     = ReLU(x W_enc + b_enc)            (x - b_dec in place of x where apply_b_dec_to_input)
        x_hat = f W_dec + b_dec
        loss  = mean (x_hat - x)^2 + l1 mean |f|^p       (|f_i| |W_dec_i| where decoder_norm_l1)

    The defaults are the seed's: untied plain linear layers drawn as `torch.nn.Linear` draws them, both
    means over every element, no constraint on the decoder. A decoder that is free can shrink `f` and
    grow itself to escape the penalty; `decoder_norm_l1`, or `transforms.unit_norm_decoder` in the
    optimizer chain, closes that way out.

    Args:
      d_in: width of the activations.
      d_sae: number of latents.
      l1: weight of the penalty, at least 0; may be traced, as every number below that sets no shape.
      target_l0: mean number of active latents to arrive at; the penalty's weight then starts at `l1` and is
        steered (`control.steer`), and kept as the leaf `log_penalty`.
      l1_warmup: steps over which the penalty rises from 0.
      p: the exponent of the penalty; with `p_end` its first value.
      p_end: its last, reached linearly between the two steps of `p_anneal` (p-annealing); meanwhile the
        weight is rescaled so that the penalty does not jump, in the leaf `log_penalty` too.
      p_anneal: the steps between which p moves.
      lp_root: the norm (sum |f|^p)^(1/p) in place of sum |f|^p.
      mean_features: average both terms over features too (the seed); False sums them (SAELens, papers).
      decoder_norm_l1: weigh each latent's penalty by the norm of its decoder row.
      apply_b_dec_to_input: subtract `b_dec` from the input (the pre-encoder bias).
      tied: use `W_dec` transposed as the encoder; `params` then has no `W_enc`.
      decoder_init_norm: start from decoder rows of that norm, the encoder their transpose, biases 0.
      reconstruction: how the reconstruction is judged; None for the squared error after `mean_features`.

    Returns:
      An `SAE`. Params: `W_enc` [d_in, d_sae], `b_enc` [d_sae], `W_dec` [d_sae, d_in], `b_dec` [d_in].

    Raises:
      InputError: a size under 1, a negative `l1`, a `target_l0` outside (0, d_sae], a `p` not above 0.

    Example:
      >>> sae = relu(d_in=4, d_sae=6, l1=0.1)
      >>> params = sae.init(jax.random.key(0))
      >>> sae.encode(params, jnp.ones((8, 4))).shape
      (8, 6)

    Source: Cunningham et al. 2023 (arXiv 2309.08600), section 2; Bricken et al. 2023, "Towards
    Monosemanticity"; decoder-norm weights: Anthropic, Circuits Updates April 2024; p-annealing: Karvonen
    et al. 2024 (arXiv 2408.00113).
    """
    require_weight("l1", l1)
    require_target(target_l0, d_sae)
    if target_l0 is not None:
        require_positive("l1", l1)
    require_positive("decoder_init_norm", decoder_init_norm)
    require_positive("p", p)
    require_positive("p_end", p_end)
    annealed = p_end is not None
    increases = len(p_anneal) == 2 and 0 <= p_anneal[0] < p_anneal[1]
    require(increases, f"p_anneal must be two steps, the first before the second, got {p_anneal}")
    reconstruct = reconstruction or (losses.averaged if mean_features else losses.summed)

    def init(key, dtype=jnp.float32):
        if decoder_init_norm is None:
            params = initialisation.linear_layers(key, d_in, d_sae, dtype)
        else:
            params = initialisation.tied_rows(key, d_in, d_sae, decoder_init_norm, dtype)
        if tied:
            del params["W_enc"]
        return control.steered(params, dtype) if annealed or target_l0 is not None else params

    def encode(params, x):
        # f = ReLU(x W_enc + b_enc)
        return activations.relu(linear.pre_activations(params, x, apply_b_dec_to_input))

    def penalty(f, norms, exponent):
        if not annealed and isinstance(exponent, float | int) and exponent == 1:
            return losses.l1(f, norms, mean_features and not lp_root)
        return losses.lp(f, exponent, norms, mean_features, lp_root)

    def loss(params, batch, progress):
        f = encode(params, batch.x)
        # mean (x_hat - x)^2,   x_hat = f W_dec + b_dec
        _, error = reconstruct(params, f, batch)
        # mean |f_i|^p |W_dec_i|^p
        norms = optax.safe_norm(params["W_dec"], 0.0, axis=-1) if decoder_norm_l1 else None
        exponent, following = (
            control.anneal(progress.step + i, p, p_end, *p_anneal) if annealed else p for i in (0, 1)
        )
        sparsity, (fired, l0) = penalty(f, norms, exponent), activations.activity(f)
        weight, assigned = control.penalty_weight(params, progress.step, l0, l1, l1_warmup, target_l0)
        if annealed and target_l0 is None:
            factor, assigned = control.continued(params, sparsity, penalty(f, norms, following))
            weight = weight * factor
        logs = {"reconstruction": error, "sparsity": sparsity, "l0": l0}
        return error + weight * sparsity, Info(logs, fired, assigned)

    return SAE(init, encode, linear.decode, loss)
