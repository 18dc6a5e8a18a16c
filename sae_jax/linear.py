"""The affine maps that every architecture shares, and the matrix product in the form fastest for its size."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from optax import safe_norm

from sae_jax.base import Params

TINY = 4096
"""Multiply-adds up to which a product costs more to call than to compute, measured in docs/design.md."""


def matmul(
    a: Float[Array | np.ndarray, "*batch inner"], b: Float[Array | np.ndarray, "inner out"]
) -> Float[Array, "*batch out"]:
    """`a b`, computed by a library call or, where that costs more than the work, by a fused loop.

        c_bj = sum_i a_bi b_ij

    A thousand vmapped 4 -> 6 models on a CPU are a thousand library calls per product, each some hundred
    nanoseconds of overhead around a few dozen multiply-adds. Written as multiply and sum, XLA fuses all
    members into one vectorised loop, forward and backward. The choice is made while tracing, from shapes.

    Args:
      a: rows, under any leading axes.
      b: weights.

    Returns:
      The product, in the common dtype. The two forms differ by rounding only.
    """
    rows = math.prod(a.shape[:-1])
    # a number that is only a symbol, as in an exported program, is no int
    if isinstance(rows, int) and rows * b.size <= TINY:
        return (jnp.asarray(a)[..., None] * b).sum(axis=-2)
    return jnp.matmul(a, b)


def pre_activations(
    params: Params, x: Float[Array | np.ndarray, "*batch d_in"], apply_b_dec_to_input: bool
) -> Float[Array, "*batch d_sae"]:
    """What an encoder rectifies: `x W_enc + b_enc`, with `x - b_dec` in place of x where asked for.

    Args:
      params: `W_enc` (or `W_dec` alone, where the two are tied), `b_enc`, `b_dec`.
      x: activations.
      apply_b_dec_to_input: subtract the decoder's bias first (the pre-encoder bias).

    Returns:
      Pre-activations.
    """
    W_enc = params["W_enc"] if "W_enc" in params else params["W_dec"].T
    centred = x - params["b_dec"] if apply_b_dec_to_input else x
    return matmul(centred, W_enc) + params["b_enc"]


def decode(
    params: Params,
    f: Float[Array | np.ndarray, "*batch d_sae"],
    x: Float[Array | np.ndarray, "*batch d_in"] | None = None,
) -> Float[Array, "*batch d_out"]:
    """`x_hat = f W_dec + b_dec`, plus `x W_skip` where there is a skip connection and `x` is given.

    Args:
      params: `W_dec`, `b_dec`, and of a skip transcoder `W_skip` [d_in, d_out].
      f: features.
      x: the input that `f` was encoded from; without it the skip connection is left out.

    Returns:
      Reconstructions.
    """
    x_hat = matmul(f, params["W_dec"]) + params["b_dec"]
    return x_hat if x is None or "W_skip" not in params else x_hat + matmul(x, params["W_skip"])


def to_decoder_units(params: Params, pre: Float[Array, "*batch d_sae"]) -> Float[Array, "*batch d_sae"]:
    """`pre_i |W_dec_i|`: pre-activations by what they would add to the reconstruction."""
    return pre * safe_norm(params["W_dec"], 0.0, axis=-1)


def from_decoder_units(params: Params, f: Float[Array, "*batch d_sae"]) -> Float[Array, "*batch d_sae"]:
    """`f_i / |W_dec_i|`: what the decoder takes, back from decoder units; 0 for a row of zeros."""
    norm = safe_norm(params["W_dec"], 0.0, axis=-1)
    return f * jnp.where(norm > 0, 1 / jnp.where(norm > 0, norm, 1), 0)
