"""What is in a file of weights, before anything is done with it."""

from pathlib import Path
from typing import Any

import numpy as np

from sae_jax import formats
from sae_jax.architectures import describe
from sae_jax.folds import kind

FIRST_LABELS = 5


def inspect(path: str | Path) -> dict[str, Any]:
    """What a file says of its SAE, and what its weights are like; NaN weights are counted, not refused.

    Args:
      path: a file or folder in any known format.

    Returns:
      Plain values: `format`, `architecture`, `kind` (what makes the features), `config`, `parameters` (how
      many numbers), `tensors` by name (shape, dtype, mean, standard deviation, least and largest value, how
      many are 0, NaN or infinite), `norms` of encoder columns and decoder rows (quartiles, and how many are
      0: dead rows), `encoder_decoder_cosine` (quartiles), `log_sparsity` (quartiles, and latents under
      1e-5), `labels` (how many features have one, and the first), `metadata`.

    Raises:
      InputError: as `sae_jax.load`, NaN weights apart.

    Example:
      >>> inspect("sae/")["norms"]["W_dec"]["zero"]
    """
    name, loaded = formats.read(path)
    sae, params = loaded.sae, loaded.params
    wide = {leaf: np.asarray(values, np.float64) for leaf, values in params.items()}
    latents = {
        leaf: np.moveaxis(wide[leaf], axis, 0).reshape(sae.config["d_sae"], -1)
        for leaf, axis in (("W_enc", -1), ("W_dec", 0))
        if leaf in wide
    }
    lengths = {leaf: np.linalg.norm(rows, axis=1) for leaf, rows in latents.items()}
    return {
        "path": str(path),
        "format": name,
        "architecture": sae.config["architecture"],
        "kind": kind(sae),
        "config": describe(sae.config),
        "parameters": sum(values.size for values in params.values()),
        "tensors": {leaf: _tensor(values, wide[leaf]) for leaf, values in params.items()},
        "norms": {
            leaf: {**_quartiles(norms), "zero": int((norms == 0).sum())} for leaf, norms in lengths.items()
        },
        "encoder_decoder_cosine": _cosine(latents, lengths),
        "log_sparsity": _sparsity(loaded.log_sparsity),
        "labels": {
            "count": len(loaded.labels),
            "first": {str(feature): label for feature, label in [*loaded.labels.items()][:FIRST_LABELS]},
        },
        "metadata": loaded.metadata,
    }


def _tensor(values: np.ndarray, wide: np.ndarray) -> dict[str, Any]:
    finite = wide[np.isfinite(wide)]
    spread = {"mean": finite.mean(), "std": finite.std(), "min": finite.min(), "max": finite.max()}
    return {
        "shape": list(values.shape),
        "dtype": str(values.dtype),
        **({key: float(value) for key, value in spread.items()} if finite.size else dict.fromkeys(spread)),
        "zero": int((wide == 0).sum()),
        "nan": int(np.isnan(wide).sum()),
        "infinite": int(np.isinf(wide).sum()),
    }


def _cosine(latents: dict[str, np.ndarray], lengths: dict[str, np.ndarray]) -> dict[str, float] | None:
    """Quartiles of each latent's cosine between encoder and decoder, where they are of one space."""
    if len(latents) < 2 or latents["W_enc"].shape != latents["W_dec"].shape:
        return None
    product = lengths["W_enc"] * lengths["W_dec"]
    cosine = (latents["W_enc"] * latents["W_dec"]).sum(axis=1)[product > 0] / product[product > 0]
    return _quartiles(cosine)


def _sparsity(log_sparsity: np.ndarray | None) -> dict[str, Any] | None:
    if log_sparsity is None:
        return None
    return {**_quartiles(log_sparsity), "under_1e-5": int((log_sparsity < -5).sum())}


def _quartiles(values: np.ndarray) -> dict[str, float]:
    names = ("min", "lower", "median", "upper", "max")
    finite = values[np.isfinite(values)]
    if not finite.size:
        return dict.fromkeys(names, float("nan"))
    return dict(zip(names, map(float, np.quantile(finite, (0, 0.25, 0.5, 0.75, 1))), strict=True))
