"""optax transformations for SAE training: constraints go in the optimizer chain, never in the step."""

import jax.numpy as jnp
import optax

from sae_jax.base import InputError


def unit_norm_decoder() -> optax.GradientTransformationExtraArgs:
    """Keep every decoder row at norm 1.

        W_dec_i <- (W_dec_i + u_i) / |W_dec_i + u_i|

    Last in a chain: it bends the update so that what the step arrives at has unit rows. Rows are brought
    to norm 1 by the first step, whatever they start from.

    Returns:
      An optax transformation without state, for params with a leaf `W_dec` [d_sae, d_out].

    Example:
      >>> optimizer = optax.chain(optax.adam(1e-3), unit_norm_decoder())

    Source: Bricken et al. 2023, "Towards Monosemanticity", appendix on the training of the autoencoder.
    """

    def update(updates, state, params=None, **extra_args):
        if params is None:
            raise InputError("unit_norm_decoder needs the params: optimizer.update(grads, state, params)")
        W_dec = params["W_dec"]
        target = W_dec + updates["W_dec"]
        # a row of zeros has no direction: it stays
        norm = jnp.linalg.norm(target, axis=-1, keepdims=True)
        unit = target / jnp.where(norm > 0, norm, 1)
        return {**updates, "W_dec": unit - W_dec}, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
