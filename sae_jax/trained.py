"""An SAE together with its weights."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sae_jax import formats
from sae_jax.base import SAE, Params, require


class About(NamedTuple):
    """What a file told beside the SAE."""

    format: str | None = None
    """The format it was read in, a key of `formats.FORMATS`."""
    metadata: Mapping[str, Any] = MappingProxyType({})
    """Of the model, the site and the training, in SAELens's words: `model_name`, `hook_name`."""
    log_sparsity: np.ndarray | None = None
    """log10 of how often each latent was active, [d_sae]."""


@dataclass(frozen=True)
class TrainedSAE:
    """What a sweep's member or a file is: a model and its weights, and what was told of them.

    It unpacks into the first two: `sae, params = trained`.

    Example:
      >>> trained = sae_jax.load("runs/first/members/007")
      >>> f = trained.encode(x)
    """

    sae: SAE
    params: Params
    about: About = field(default_factory=About)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.sae, self.params))

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

    def save(self, path: str | Path, format: str = "saelens", *, lossy: bool = False) -> list[str]:
        """Write it in any of the known formats; see docs/formats.md for what each can hold.

        Args:
          path: a folder, or a file where the format is one file.
          format: a key of `formats.FORMATS`. The default, SAELens's layout, holds everything; of what SAELens
            itself has no form for (crosscoders, transcoders of `topk` and `gated`, a layer norm before a skip
            connection) only `sae_jax.load` opens it.
          lossy: write even what the format cannot hold whole.

        Returns:
          What the file does not tell, each a phrase.

        Raises:
          InputError: what the format cannot hold; the message says what would be lost.
        """
        return formats.write(
            path, self.sae, self.params, format,
            metadata=self.about.metadata, log_sparsity=self.about.log_sparsity, lossy=lossy,
        )  # fmt: skip


def load(path: str | Path) -> TrainedSAE:
    """Read an SAE from disk, in whichever of the known formats it is.

    Args:
      path: a folder or file. `load(path).about.format` says which format was seen.

    Returns:
      The SAE with its weights.

    Raises:
      InputError: nothing there, no known format, several SAEs, NaN weights, or a damaged file.

    Example:
      >>> sae_jax.load("sae/").encode(x)
    """
    name, loaded = formats.read(path)
    for leaf, values in loaded.params.items():
        bad = int(np.isnan(values.astype(np.float32)).sum())
        require(bad == 0, f"{path}: {leaf} has {bad} NaN of {values.size} values")
    params = {leaf: jnp.asarray(values) for leaf, values in loaded.params.items()}
    return TrainedSAE(loaded.sae, params, About(name, loaded.metadata, loaded.log_sparsity))


def load_all(folder: str | Path) -> dict[str, TrainedSAE]:
    """Read every SAE below a folder: a run of dictionary_learning, sparsify's hookpoints, a sweep's members.

    Args:
      folder: looked through four levels down.

    Returns:
      SAEs by their paths relative to the folder.

    Raises:
      InputError: no SAE there, or as `load`.
    """
    found = formats.inside(folder)
    require(bool(found), f"{folder} holds no SAE in a format known here")
    return {name: load(path) for name, path in found.items()}
