"""Layer norm, each row by its own mean and spread, and an SAE around it."""

from dataclasses import replace
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sae_jax.base import SAE, Batch, require

LAYER_NORM_EPS = 1e-5
"""Added to the standard deviation, not to the variance: SAELens's."""


class LayerNorm(NamedTuple):
    """`z = (x - mean) / (std + 1e-5)`, each row by its own mean and unbiased standard deviation.

    Not affine, so it cannot be folded into weights; `layer_normed` carries it along instead.

    Source: SAELens's `normalize_activations="layer_norm"`; Gao et al. 2024, appendix A.1, in another form.
    """

    def __call__(self, x: Float[Array | np.ndarray, "*batch d"]) -> Float[Array, "*batch d"]:
        """Rows normalised."""
        x = jnp.asarray(x)
        mean, std = mean_and_std(x)
        return (x - mean) / (std + LAYER_NORM_EPS)


layer_norm = LayerNorm()


def layer_normed(sae: SAE) -> SAE:
    """The same SAE around a layer norm: raw rows in, raw reconstructions out.

        f     = encode((x - mean) / (std + 1e-5))
        x_hat = decode(f) std + mean                 mean and std of each row of x

    Args:
      sae: one that was trained on `normalised(source, layer_norm)`, or is to be trained on raw rows.

    Returns:
      An `SAE`. `decode(params, f)`, without `x`, stays normalised; a transcoder's output, which is no row of
      x, always does. The loss is taken between normalised rows, and of a transcoder against the target as
      it is. `config` has the entry `normalize_activations`.

    Raises:
      InputError: an SAE that has a layer norm already, or of one column.

    Source: SAELens's `normalize_activations="layer_norm"`; there too, 1e-5 is not added on the way back.
    """
    require(not is_layer_normed(sae), "this SAE normalises its input by layer norm already")
    require(sae.config.get("d_in", 2) >= 2, "a layer norm needs at least two columns: one has no spread")
    transcodes = "d_out" in sae.config

    def encode(params, x):
        return sae.encode(params, layer_norm(x))

    def decode(params, f, x=None):
        x_hat = sae.decode(params, f, None if x is None else layer_norm(x))
        if x is None or transcodes:
            return x_hat
        mean, std = mean_and_std(jnp.asarray(x))
        return x_hat * std + mean

    def loss(params, batch, progress):
        y = batch.y if transcodes else layer_norm(batch.y)
        return sae.loss(params, Batch(layer_norm(batch.x), y), progress)

    config = {**sae.config, "normalize_activations": "layer_norm"}
    return replace(sae, encode=encode, decode=decode, loss=loss, config=config)


def is_layer_normed(sae: SAE) -> bool:
    """Whether `layer_normed` made it."""
    return sae.config.get("normalize_activations", "none") == "layer_norm"


def mean_and_std(x: Float[Array, "*batch d"]) -> tuple[Float[Array, "*batch 1"], Float[Array, "*batch 1"]]:
    """Mean and unbiased standard deviation of each row."""
    return x.mean(axis=-1, keepdims=True), x.std(axis=-1, ddof=1, keepdims=True)
