"""The matrix product, in the form that is fastest for its size."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

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
    if math.prod(a.shape[:-1]) * b.size <= TINY:
        return (jnp.asarray(a)[..., None] * b).sum(axis=-2)
    return jnp.matmul(a, b)
