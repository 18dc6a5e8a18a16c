"""From pre-activations to features."""

import jax
from jaxtyping import Array, Float


def relu(pre: Float[Array, "*batch d_sae"]) -> Float[Array, "*batch d_sae"]:
    """Rectify: `f = max(pre, 0)`.

    The derivative at exactly 0 is 0, as in PyTorch, so that parity holds on latents that start there.

    Args:
      pre: pre-activations, any float dtype.

    Returns:
      Features of the same shape and dtype.

    Example:
      >>> relu(jnp.array([-1.0, 2.0]))
      Array([0., 2.], dtype=float32)
    """
    return jax.nn.relu(pre)
