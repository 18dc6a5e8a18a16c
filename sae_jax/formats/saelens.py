"""The SAELens layout: a folder of `cfg.json` and `sae_weights.safetensors`.

Tensors: W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_in], b_dec [d_in]. Our own `config` rides in
the metadata, so that what was written here comes back as it was, penalty and all.
"""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from sae_jax.architectures import find
from sae_jax.base import SAE, InputError, Params, require

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
LAYOUT_VERSION = "6.54.12"
"""The SAELens whose layout this is. A version under 6.0 would have the config upgraded as an old one."""


def write(folder: str | Path, sae: SAE, params: Params) -> None:
    """Write an SAE that SAELens reads as its own.

    Args:
      folder: made if missing; files of the same names in it are replaced.
      sae: the model; its architecture must be one that SAELens has.
      params: its weights.

    Raises:
      InputError: an architecture that SAELens cannot express, or arguments that JSON cannot.
    """
    config = sae.config
    require(config.get("architecture") == "relu", f"SAELens has no form for {config.get('architecture')!r}")
    weights = {name: np.asarray(leaf) for name, leaf in params.items()}
    if config["tied"]:
        weights["W_enc"] = weights["W_dec"].T
    cfg = {
        "architecture": "standard",
        "d_in": config["d_in"],
        "d_sae": config["d_sae"],
        "dtype": str(weights["W_dec"].dtype),
        "device": "cpu",
        "apply_b_dec_to_input": config["apply_b_dec_to_input"],
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": LAYOUT_VERSION,
            "sae_lens_training_version": None,
            "sae_jax": {name: _plain(name, value) for name, value in config.items()},
        },
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(leaf) for name, leaf in weights.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(cfg, indent=2) + "\n")


def recognise(path: Path) -> bool:
    """Whether this is such a folder."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def read(folder: str | Path) -> tuple[SAE, Params]:
    """Read an SAE in the SAELens layout, written here or by SAELens.

    Args:
      folder: holds the two files.

    Returns:
      The SAE and its weights. One that SAELens trained is given SAELens's loss (sums over features, L1
      weighted by decoder norm), with the penalty's weight at 0 where the file does not tell it.

    Raises:
      InputError: files missing or damaged, an architecture not known here, or tensors that do not fit.
    """
    folder = Path(folder)
    try:
        cfg = json.loads((folder / CONFIG).read_text())
        weights = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{folder} cannot be read in the SAELens layout: {error}") from None
    require(isinstance(cfg, dict), f"{folder / CONFIG} must hold a JSON object")
    sae = _rebuild(folder, cfg)
    if sae.config["tied"]:
        weights.pop("W_enc", None)
    d_in, d_sae = sae.config["d_in"], sae.config["d_sae"]
    shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    if sae.config["tied"]:
        del shapes["W_enc"]
    for name, shape in shapes.items():
        require(name in weights, f"{folder / WEIGHTS} has no tensor {name}")
        found = weights[name].shape
        require(found == shape, f"{folder / WEIGHTS}: {name} must be {shape}, got {found}")
        kind = weights[name].dtype
        require(
            jnp.issubdtype(kind, jnp.floating),
            f"{folder / WEIGHTS}: {name} must be floating point, got {kind}",
        )
    return sae, {name: jnp.asarray(weights[name]) for name in shapes}


def _rebuild(folder: Path, cfg: dict[str, Any]) -> SAE:
    metadata = cfg.get("metadata")
    ours = metadata.get("sae_jax") if isinstance(metadata, dict) else None
    if isinstance(ours, dict):
        arguments = dict(ours)
        factory = find(str(arguments.pop("architecture", None)))
    else:
        foreign = cfg.get("architecture")
        require(
            foreign == "standard",
            f"{folder}: SAELens architecture {foreign!r} is not read here, only 'standard'",
        )
        normalise = cfg.get("normalize_activations", "none")
        require(
            normalise == "none", f"{folder}: inputs are normalised by {normalise!r}, which is not read here"
        )
        factory = find("relu")
        arguments = {
            **{name: cfg.get(name) for name in ("d_in", "d_sae")},
            "l1": 0.0,
            "mean_features": False,
            "decoder_norm_l1": True,
            "apply_b_dec_to_input": cfg.get("apply_b_dec_to_input", True),
        }
    for name in ("d_in", "d_sae"):
        require(type(arguments.get(name)) is int, f"{folder / CONFIG} must give {name} as a whole number")
    try:
        return factory(**arguments)
    except TypeError as error:
        raise InputError(f"{folder / CONFIG} does not describe an SAE known here: {error}") from None


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, str | bool | int | float | None):
        return value
    require(np.ndim(value) == 0, f"{name} = {value!r} cannot be written as JSON")
    return np.asarray(value).item()
