"""Where the features of a world point."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from sae_jax.base import require


def gaussian(key: Key[Array, ""], features: int, d_in: int) -> Float[Array, "features d_in"]:
    """Unit vectors in directions that are uniform on the sphere.

    Raises:
      InputError: fewer than one feature or dimension.
    """
    require(features >= 1, f"features must be at least 1, got {features}")
    require(d_in >= 1, f"d_in must be at least 1, got {d_in}")
    return unit(jax.random.normal(key, (features, d_in)))


def orthonormal(key: Key[Array, ""], features: int, d_in: int) -> Float[Array, "features d_in"]:
    """Unit vectors at right angles to each other.

    Raises:
      InputError: none, or more of them than there are dimensions.
    """
    require(features >= 1, f"features must be at least 1, got {features}")
    require(features <= d_in, f"{d_in} dimensions hold at most {d_in} orthogonal features, got {features}")
    return jnp.linalg.qr(jax.random.normal(key, (d_in, d_in)))[0].T[:features]


def orthogonalised(
    directions: Float[Array, "features d_in"], steps: int, learning_rate: float
) -> Float[Array, "features d_in"]:
    """Directions pushed apart by Adam.

        sum over i != j of (d_i . d_j)^2  +  n * sum over i of (|d_i|^2 - 1)^2

    Args:
      directions: unit vectors.
      steps: of Adam.
      learning_rate: of Adam.

    Returns:
      Unit vectors.

    Raises:
      InputError: a number of steps below 0.

    Source: `sae_lens.synthetic`, `orthogonalize_embeddings`.
    """
    require(steps >= 0, f"steps must not be negative, got {steps}")
    return _pushed(unit(directions), steps, learning_rate)


@jax.jit
def _pushed(directions: Float[Array, "features d_in"], steps, learning_rate) -> Float[Array, "features d_in"]:
    adam = optax.adam(learning_rate)

    def gradient(d: Array) -> Array:
        # by hand: what is differentiated through the products of all pairs would be kept in memory
        products = d @ d.T
        own = jnp.diagonal(products)
        return 4 * (products @ d + (len(d) * (own - 1) - own)[:, None] * d)

    def step(_, carry):
        d, state = carry
        updates, state = adam.update(gradient(d), state)
        return optax.apply_updates(d, updates), state

    return unit(jax.lax.fori_loop(0, steps, step, (directions, adam.init(directions)))[0])


def unit(vectors: Float[Array, "*rows d_in"]) -> Float[Array, "*rows d_in"]:
    """Each divided by its length; a zero stays one."""
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
