"""The transcoder: an SAE that gives, from the activations before a layer, those after it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from sae_jax import initialisation
from sae_jax.architectures.relu import relu
from sae_jax.base import SAE, InputError, architecture, require


@architecture
def transcoder(
    d_in: int,
    d_sae: int,
    *,
    d_out: int,
    skip: bool = False,
    of: Callable[..., SAE] = relu,
    **arguments: Any,
) -> SAE:
    """Any architecture between two sites: its input is x [d_in], its target y [d_out].

        f     as the architecture `of` gives it from x
        y_hat = f W_dec + b_dec                    (+ x W_skip where skip)
        loss  = that of `of`, with y_hat - y in place of x_hat - x

    Decoder rows are drawn apart from the encoder, at the same norms; `W_skip` starts at 0.

    Args:
      d_in: width of the input.
      d_sae: number of latents.
      d_out: width of the target.
      skip: add a linear map from input to output, to leave the latents what is not linear.
      of: the architecture: `relu`, `topk`, `jumprelu`, ...
      arguments: of that architecture. `apply_b_dec_to_input` is fixed at False: `b_dec` is of another space.

    Returns:
      An `SAE` with the params of `of`, `W_dec` [d_sae, d_out], `b_dec` [d_out] and, where skip, `W_skip`
      [d_in, d_out].

    Raises:
      InputError: a size under 1, tied weights, `apply_b_dec_to_input`, or what `of` says.

    Example:
      >>> sae = transcoder(d_in=64, d_sae=256, d_out=96, of=topk, k=8, skip=True)
      >>> source = in_memory(before, y=after)

    Source: Dunefsky et al. 2024 (arXiv 2406.11944); skip: Paulo et al. 2025 (arXiv 2501.18823).
    """
    require(d_out >= 1, f"d_out must be at least 1, got {d_out}")
    fixed = arguments.get("apply_b_dec_to_input", False) is False
    require(fixed, "a transcoder cannot subtract b_dec from its input: it is a point of the output's space")
    require(
        not arguments.get("tied"), "a transcoder cannot tie its encoder to its decoder: their sizes differ"
    )
    try:
        inner = of(d_in, d_sae, **{**arguments, "apply_b_dec_to_input": False})
    except TypeError as error:
        raise InputError(f"transcoder of {of.__name__}: {error}") from None

    def init(key, dtype=jnp.float32):
        params = inner.init(key, dtype)
        drawn = jax.random.normal(jax.random.fold_in(key, 1), (d_sae, d_out), dtype)
        norms = jnp.linalg.norm(params["W_dec"], axis=-1, keepdims=True)
        params |= {
            "W_dec": initialisation.scaled_rows(drawn, 1.0) * norms,
            "b_dec": jnp.zeros(d_out, dtype),
        }
        return {**params, "W_skip": jnp.zeros((d_in, d_out), dtype)} if skip else params

    return replace(inner, init=init)
