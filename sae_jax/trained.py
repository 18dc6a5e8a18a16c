"""An SAE together with its weights."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sae_jax import card, formats, hub
from sae_jax import labels as beside
from sae_jax.base import SAE, Params, require
from sae_jax.formats import saelens


class About(NamedTuple):
    """What a file told beside the SAE."""

    format: str | None = None
    """The format it was read in, a key of `formats.FORMATS`."""
    metadata: Mapping[str, Any] = MappingProxyType({})
    """Of the model, the site and the training, in SAELens's words: `model_name`, `hook_name`."""
    log_sparsity: np.ndarray | None = None
    """log10 of how often each latent was active, [d_sae]."""
    origin: str | None = None
    """Of what is from the Hugging Face hub, its address: `hf://user/repo@commit/path`, which `load` takes."""
    labels: Mapping[int, str] = MappingProxyType({})
    """What people call features, by number, from the `labels.json` of its folder."""


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

    def labelled(self, labels: Mapping[int, str] | Callable[[int], str | None]) -> "TrainedSAE":
        """The same SAE with these labels, in place of those that it had.

        Args:
          labels: by feature; or a function of a feature's number, which gives None for no label. From the
            contexts in which features are active, `features.labelling.from_function` makes them.

        Raises:
          InputError: a feature that does not exist, a label that is empty, no text or longer than 1,000
            characters, or whatever the function raises, with the feature's number.

        Example:
          >>> trained.labelled({**trained.about.labels, 12: "animals"}).save("sae/")
        """
        d_sae = self.sae.config["d_sae"]
        if isinstance(labels, Mapping):
            found = beside.checked(labels.items(), d_sae, "labels")
        else:
            found = beside.asked(range(d_sae), labels, d_sae)
        return replace(self, about=self.about._replace(labels=found))

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
            metadata=self.about.metadata, log_sparsity=self.about.log_sparsity, labels=self.about.labels,
            lossy=lossy,
        )  # fmt: skip

    def push_to_hub(
        self,
        repo_id: str,
        path_in_repo: str = "",
        *,
        metrics: Mapping[str, Any] | None = None,
        private: bool = False,
        revision: str | None = None,
        message: str = "Upload an SAE with sae_jax",
    ) -> hub.Pushed:
        """Put it on the Hugging Face hub: the SAELens layout, and a model card.

        Args:
          repo_id: "user/repo", made if it is not there.
          path_in_repo: a folder in it, where a repository holds several.
          metrics: for the card, as `evaluate` and `sae-jax eval --json` give them.
          private: make the repository private; one that is there and public is refused.
          revision: a branch, made if it is not there.
          message: of the commit.

        Returns:
          The commit: its URL, and the address that `load` takes. A README.md of someone else stays as it is.

        Raises:
          InputError: no right to write there, or a hub out of reach.

        Example:
          >>> trained.push_to_hub("me/saes", "layer_5", metrics=evaluate(*trained, batches)).origin
        """
        path = path_in_repo.strip("/")
        with TemporaryDirectory() as folder:
            self.save(folder)
            architecture = formats.Place(folder).json(saelens.CONFIG)["architecture"]
            cards = {
                path: card.of_sae(
                    repo_id, path, self.sae, self.params, self.about.metadata, self.about.labels, metrics,
                    opens_in_saelens=not architecture.startswith(saelens.OURS),
                )
            }  # fmt: skip
            if path:
                cards[""] = card.of_repository(repo_id)
            return hub.push(
                folder, repo_id, path, cards=cards, without=(saelens.SPARSITY, beside.NAME),
                private=private, revision=revision, message=message,
            )  # fmt: skip


def load(
    path_or_repo_id: str | Path,
    path_in_repo: str | None = None,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
) -> TrainedSAE:
    """Read an SAE from disk or from the Hugging Face hub, in whichever of the known formats it is.

    Args:
      path_or_repo_id: a folder or file, or, where there is none of that name, a repository on the hub:
        "user/repo" or "hf://user/repo@revision/path". `load(...).about.format` says which format was seen.
      path_in_repo: a folder or file in it.
      revision: of the repository: a branch, a tag or a commit.
      cache_dir: of the hub, in place of the standard one.

    Returns:
      The SAE with its weights; `about.origin` pins the commit that was read.

    Raises:
      InputError: nothing there, no known format, several SAEs, NaN weights, a damaged file, or a hub that
        does not give it.

    Example:
      >>> sae_jax.load("sae/").encode(x)
      >>> sae_jax.load("google/gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71")
    """
    return _read(*hub.locate(path_or_repo_id, path_in_repo, revision, cache_dir))


def load_all(
    folder_or_repo_id: str | Path,
    path_in_repo: str | None = None,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
) -> dict[str, TrainedSAE]:
    """Read every SAE below a folder: a run of dictionary_learning, sparsify's hookpoints, a sweep's members.

    Args:
      folder_or_repo_id: looked through four levels down; of a repository, as in `load`, all is fetched.
      path_in_repo: a folder in it.
      revision: of the repository: a branch, a tag or a commit.
      cache_dir: of the hub, in place of the standard one.

    Returns:
      SAEs by their paths relative to the folder.

    Raises:
      InputError: no SAE there, or as `load`.
    """
    folder, origin = hub.locate(folder_or_repo_id, path_in_repo, revision, cache_dir, every=True)
    found = formats.inside(folder)
    require(bool(found), f"{folder} holds no SAE in a format known here")
    return {name: _read(path, None if origin is None else f"{origin}/{name}") for name, path in found.items()}


def _read(path: Path, origin: str | None) -> TrainedSAE:
    name, loaded = formats.read(path)
    for leaf, values in loaded.params.items():
        bad = int(np.isnan(values.astype(np.float32)).sum())
        require(bad == 0, f"{path}: {leaf} has {bad} NaN of {values.size} values")
    params = {leaf: jnp.asarray(values) for leaf, values in loaded.params.items()}
    about = About(name, loaded.metadata, loaded.log_sparsity, origin, loaded.labels)
    return TrainedSAE(loaded.sae, params, about)
