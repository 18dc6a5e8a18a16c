"""An SAE together with its weights."""

from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from sae_jax import formats
from sae_jax.base import SAE, Params, require


class TrainedSAE(NamedTuple):
    """What a sweep's member or a file is: a model and its weights.

    Example:
      >>> trained = sae_jax.load("runs/first/members/007")
      >>> f = trained.encode(x)
    """

    sae: SAE
    params: Params

    def encode(self, x: Float[Array | np.ndarray, "*batch d_in"]) -> Float[Array, "*rows d_sae"]:
        """Features of `x`."""
        d_in = self.sae.config.get("d_in", x.shape[-1])
        require(x.shape[-1] == d_in, f"this SAE reads {d_in} columns, got {x.shape[-1]}")
        return jax.jit(self.sae.encode)(self.params, x)

    def decode(
        self,
        f: Float[Array | np.ndarray, "*batch d_sae"],
        x: Float[Array | np.ndarray, "*batch_and_d_in"] | None = None,
    ) -> Float[Array, "*batch_and_d_out"]:
        """Reconstruction from features; a skip connection adds its part where `x` is given."""
        return jax.jit(self.sae.decode)(self.params, f, x)

    def __call__(self, x: Float[Array | np.ndarray, "*batch d_in"]) -> Float[Array, "*batch_and_d_out"]:
        """Reconstruction of `x`."""
        return self.decode(self.encode(x), x)

    def save(self, folder: str | Path) -> None:
        """Write `cfg.json` and `sae_weights.safetensors`, the layout that SAELens reads.

        Crosscoders, transcoders of `topk` and `gated`, and a layer norm before a skip connection have no form
        in SAELens: only `sae_jax.load` opens those.
        """
        formats.saelens.write(folder, self.sae, self.params)


def load(path: str | Path) -> TrainedSAE:
    """Read an SAE from disk.

    Args:
      path: a folder in the SAELens layout, or a `.pt` file of the seed's module.

    Returns:
      The SAE with its weights.

    Raises:
      InputError: nothing there, no known format, or a damaged file.

    Example:
      >>> sae_jax.load("sae/").encode(x)
    """
    return TrainedSAE(*formats.read(path))
