"""The AuxK loss: dead latents learn to reconstruct what the live ones leave over.

Each library has a convention of its own, and they differ by more than constants; so each is a function
with the same signature: `(pre, residual, y, decode, fired, progress, k_aux, dead_after) -> scalar`.
Common to all: of the latents that are dead, the `k_aux` with the largest pre-activations of each row give

    e_hat = decode(a),   a_i = pre_i if i is among them, else 0     (no bias)

and e = y - x_hat is what they should give.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Scalar

from sae_jax.activations import relu
from sae_jax.base import Progress
from sae_jax.selection import Number, entries, largest
from sae_jax.sparse import Encoded, Few

Decode = Callable[[Float[Array, "batch d_sae"] | Few], Float[Array, "batch d_out"]]
"""The decoder without its bias."""


Convention = Callable[..., Scalar]


def wanted(auxk: Number) -> bool:
    """Whether a weight asks for the loss at all: a Python 0 leaves it out of the program."""
    return not (isinstance(auxk, float | int) and auxk == 0)


def needed(hyper: Mapping[str, Number], progress: Progress) -> Bool[Array, ""]:
    """Whether any latent may be dead by one of the conventions below; where none is, the loss is 0 by each.

    Args:
      hyper: holds `dead_after`.
      progress: of the training so far.
    """
    return (progress.since_fired + 1 >= hyper["dead_after"]).any()


def saelens(
    pre: Float[Array, "batch d_sae"] | Encoded,
    residual: Float[Array, "batch d_out"],
    y: Float[Array, "batch d_out"],
    decode: Decode,
    fired: Bool[Array, "d_sae"],
    progress: Progress,
    k_aux: int,
    dead_after: Number,
) -> Scalar:
    """SAELens: `min(n_dead / k_aux, 1) mean_b sum_d (e_hat - e)^2`, pre-activations not rectified.

    A latent is dead that was silent for more than `dead_after` steps before this one.
    """
    dead = progress.since_fired > dead_after
    e_hat = decode(top_dead(pre, dead, k_aux))
    error = jnp.square(e_hat - jax.lax.stop_gradient(residual)).sum(axis=-1).mean()
    return scale(dead, k_aux, pre.dtype) * error


def normalised(
    pre: Float[Array, "batch d_sae"] | Encoded,
    residual: Float[Array, "batch d_out"],
    y: Float[Array, "batch d_out"],
    decode: Decode,
    fired: Bool[Array, "d_sae"],
    progress: Progress,
    k_aux: int,
    dead_after: Number,
) -> Scalar:
    """OpenAI and dictionary_learning: `sum (e_hat - e)^2 / sum (e - mean_b e)^2`, rectified; NaN counts as 0.

    A latent is dead that has been silent for `dead_after` steps or more, this one included.
    """
    dead = jnp.where(fired, 0, progress.since_fired + 1) >= dead_after
    e = jax.lax.stop_gradient(residual)
    spread = jnp.square(e - e.mean(axis=0)).sum()
    error = jnp.square(decode(relu(top_dead(pre, dead, k_aux))) - e).sum()
    # both branches of a where are differentiated: no division by 0 may stand in either
    whole = error / jnp.where(spread > 0, spread, 1)
    return jnp.where(dead.any() & (spread > 0) & jnp.isfinite(whole), whole, 0)


def fvu(
    pre: Float[Array, "batch d_sae"] | Encoded,
    residual: Float[Array, "batch d_out"],
    y: Float[Array, "batch d_out"],
    decode: Decode,
    fired: Bool[Array, "d_sae"],
    progress: Progress,
    k_aux: int,
    dead_after: Number,
) -> Scalar:
    """sparsify: `min(n_dead / k_aux, 1) sum (e_hat - e)^2 / sum (y - mean_b y)^2`, rectified.

    A latent is dead that was silent for more than `dead_after` steps before this one.
    """
    dead = progress.since_fired > dead_after
    error = jnp.square(decode(relu(top_dead(pre, dead, k_aux))) - jax.lax.stop_gradient(residual)).sum()
    spread = jnp.square(y - y.mean(axis=0)).sum()
    return scale(dead, k_aux, pre.dtype) * error / jnp.where(spread > 0, spread, 1)


def attached(
    pre: Float[Array, "batch d_sae"] | Encoded,
    residual: Float[Array, "batch d_out"],
    y: Float[Array, "batch d_out"],
    decode: Decode,
    fired: Bool[Array, "d_sae"],
    progress: Progress,
    k_aux: int,
    dead_after: Number,
) -> Scalar:
    """The BatchTopK repository: `mean_b mean_d (e_hat - e)^2`, rectified, with e attached.

    The live latents are so drawn towards what the dead ones can give. A latent is dead that has been
    silent for `dead_after` steps or more, this one included.
    """
    dead = jnp.where(fired, 0, progress.since_fired + 1) >= dead_after
    error = jnp.square(decode(relu(top_dead(pre, dead, k_aux))) - residual).mean()
    return jnp.where(dead.any(), error, 0)


def top_dead(
    pre: Float[Array, "batch d_sae"] | Encoded, dead: Bool[Array, "d_sae"], k_aux: int
) -> Float[Array, "batch d_sae"] | Few:
    """The `k_aux` largest pre-activations of each row among dead latents, the rest 0."""
    if isinstance(pre, Encoded):
        among = jnp.where(dead, pre.values, -jnp.inf)
        latents, chosen = entries(among, min(k_aux, dead.size))
        return pre.per_row(latents, chosen & dead[latents])
    chosen = largest(jnp.where(dead, pre, -jnp.inf), k_aux) & dead
    return jnp.where(chosen, pre, 0)


def scale(dead: Bool[Array, "d_sae"], k_aux: int, dtype) -> Scalar:
    """`min(n_dead / k_aux, 1)`: few dead latents are not asked to give the whole residual."""
    return jnp.minimum(dead.sum() / k_aux, 1).astype(dtype)
