"""Which features fire on the same tokens."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sae_jax.features.observed import NONE, Near

AT_A_TIME = 512
"""Features that are held against all others at once."""
LEAST_FIRINGS = 3
"""Below it a correlation is chance."""


def fires_with(active: Bool[np.ndarray, "n d_sae"], near: int) -> Near:
    """Of every feature the others whose activity is most correlated with its own.

        phi_ij = (p_ij - p_i p_j) / sqrt(p_i (1 - p_i) p_j (1 - p_j))

    where p_i is the share of tokens on which i is active, p_ij that on which both are.

    Args:
      active: on which of n tokens each feature is active.
      near: how many others to name.

    Returns:
      `Near`, of positive correlations only; none for a feature, and with one, that is active on fewer than
      three of the tokens.
    """
    tokens, d_sae = active.shape
    near = min(near, d_sae)
    fired = active.sum(axis=0)
    parts = [active[:, start : start + AT_A_TIME] for start in range(0, d_sae, AT_A_TIME)]
    found = []
    for number, part in enumerate(parts):
        both = np.concatenate([np.asarray(_both(part, other)) for other in parts], axis=1)
        own = np.arange(number * AT_A_TIME, number * AT_A_TIME + part.shape[1])
        found.append(tuple(map(np.asarray, _nearest(both, fired, fired[own], own, tokens, near))))
    values, places = (np.concatenate(each) for each in zip(*found, strict=True))
    return Near(np.where(values > 0, places, NONE), np.where(values > 0, values, 0))


@jax.jit
def _both(
    one: Bool[Array | np.ndarray, "n a"], other: Bool[Array | np.ndarray, "n b"]
) -> Float[Array, "a b"]:
    return jnp.asarray(one, jnp.float32).T @ jnp.asarray(other, jnp.float32)


@jax.jit(static_argnames=("near",))
def _nearest(both, fired, own_fired, own, tokens, near):
    enough = (own_fired[:, None] >= LEAST_FIRINGS) & (fired >= LEAST_FIRINGS)
    enough &= own[:, None] != jnp.arange(len(fired))
    p, q = own_fired[:, None] / tokens, fired / tokens
    spread = jnp.sqrt(p * (1 - p) * q * (1 - q))
    phi = (both / tokens - p * q) / jnp.maximum(spread, 1e-30)
    return jax.lax.top_k(jnp.where(enough & (spread > 0), phi, 0), near)
