"""What a weight format is: a way to recognise it, to read it, and to put an SAE in its terms."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax.base import SAE, InputError, Params, require
from sae_jax.formats.files import Place, Tensors


class Loaded(NamedTuple):
    """What a file holds."""

    sae: SAE
    params: Params
    """numpy arrays, in the file's dtypes."""
    metadata: dict[str, Any]
    """What the file tells of the model, the site and the training. In SAELens's words where it has them
    (`model_name`, `hook_name`, `context_size`, `prepend_bos`, `dataset_path`); a format's own config whole,
    under the format's name, so that it can be written back."""
    log_sparsity: np.ndarray | None = None
    """log10 of how often each latent was active, [d_sae], where the file tells it."""
    labels: Mapping[int, str] = MappingProxyType({})
    """What features are called, by number; `formats.read` puts them in."""


class Form(NamedTuple):
    """An SAE in the terms of a format, not yet on disk."""

    files: Mapping[str, Callable[[Path], None] | None]
    """File names, and what writes each; None of one that must not stay where an earlier SAE had it."""
    lost: tuple[str, ...] = ()
    """What the format cannot hold though features or reconstructions depend on it, each a phrase."""


class Format(NamedTuple):
    """A weight format, a row of `formats.FORMATS`."""

    told: str
    """Whose it is and what is looked for, in a phrase."""
    recognise: Callable[[Place], bool]
    """Whether this is it, by names and headers; never raises for a file that is only damaged."""
    read: Callable[[Place], Loaded]
    form: Callable[[Loaded], Form]
    """Takes what `folds.plain` made: untied, nothing rescaled, no leaf that only training needs."""
    keeps_metadata: bool
    """Whether it has a place for `metadata`."""
    several: bool = False
    """Whether a folder holds several SAEs, each a file."""


def fitted(sae: SAE, tensors: Tensors, where: str) -> Params:
    """The params of that SAE out of tensors that go by our names and lie as ours.

    Raises:
      InputError: a tensor missing, of another shape, or not floating point.
    """
    shapes = jax.eval_shape(lambda: sae.init(jax.random.key(0)))
    for name, expected in shapes.items():
        require(name in tensors, f"{where} has no tensor {name}; it has: {', '.join(tensors) or 'none'}")
        leaf = tensors[name]
        require(leaf.shape == expected.shape, f"{where}: {name} must be {expected.shape}, got {leaf.shape}")
        floats = jnp.issubdtype(leaf.dtype, jnp.floating)
        require(floats, f"{where}: {name} must be floating point, got {leaf.dtype}")
    return {name: tensors[name] for name in shapes}


CARRIED = "metadata"
"""The entry of a config for what other formats tell."""
UNKNOWN = "unknown"
"""The model or site of an SAE that does not tell it, where a library's loader wants a name."""


def told_by(cfg: dict[str, Any], own: str, words: Mapping[str, str]) -> dict[str, Any]:
    """The metadata of a config: its words in SAELens's, what rode along, and itself whole.

    Args:
      cfg: the config.
      own: the format's name, under which the config is kept.
      words: the config's words for what SAELens has one for.

    Raises:
      InputError: what rode along is no object.
    """
    carried = cfg.get(CARRIED, {})
    require(isinstance(carried, dict), f"the config's {CARRIED} must be an object")
    rest = {name: value for name, value in cfg.items() if name != CARRIED}
    said = {theirs: rest[theirs] for theirs in words if isinstance(rest.get(theirs), str)}
    named = {words[theirs]: name for theirs, name in said.items() if name not in ("", UNKNOWN)}
    return {**named, **carried, **({own: rest} if rest else {})}


def keys(place: Place, name: str) -> set[str]:
    """What a `.pt` file holds, by name; nothing where it cannot be read."""
    try:
        return set(place.torch(name))
    except InputError:
        return set()
