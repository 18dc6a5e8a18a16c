"""EleutherAI's sparsify: a folder of its hookpoint's name with `cfg.json` and `sae.safetensors`.

Tensors: encoder.weight [d_sae, d_in], encoder.bias [d_sae], W_dec [d_sae, d_in], b_dec [d_in], and of a skip
connection W_skip [d_in, d_in], with which y_hat = ... + x W_skip^T. Input and output are of the same width.
An SAE subtracts `b_dec` from its input, a transcoder does not. Features are the k largest of ReLU(pi).
"""

from functools import partial
from typing import Any

import numpy as np

from sae_jax import auxk, losses
from sae_jax.base import require
from sae_jax.folds import fold_b_dec, inner, kind, plain_sae
from sae_jax.formats import files
from sae_jax.formats.described import DESCRIPTION, LEAVES
from sae_jax.formats.files import Place
from sae_jax.formats.format import Form, Format, Loaded, fitted
from sae_jax.layer_norm import is_layer_normed

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
OURS = "sparsify"
"""The key of our metadata."""
CARRIED = (DESCRIPTION, LEAVES, "metadata")
"""Keys of the config that the library passes over."""

NAMES = {
    "W_enc": "encoder.weight",
    "b_enc": "encoder.bias",
    "W_dec": "W_dec",
    "b_dec": "b_dec",
    "W_skip": "W_skip",
}
TRANSPOSED = ("W_enc", "W_skip")
LOSS = {"auxk": 0.0, "auxk_loss": auxk.fvu, "reconstruction": losses.unexplained}

DEFAULTS: dict[str, Any] = {
    "activation": "topk",
    "expansion_factor": 32,
    "num_latents": 0,
    "skip_connection": False,
    "transcode": False,
}
"""The library's, for what a config of an earlier version does not say."""


def recognise(place: Place) -> bool:
    """Whether this is such a folder, or the weights in one."""
    return place.has(WEIGHTS)


def read(place: Place) -> Loaded:
    """A TopK SAE or transcoder, judged as there; an SAE with a skip connection becomes a transcoder."""
    beside = place.beside(CONFIG)
    require(
        beside.is_file,
        f"{place.folder} has no {CONFIG}: k, activation and transcode could not be inferred from the tensors",
    )
    told = beside.json(CONFIG)
    cfg, where = _checked({**DEFAULTS, **told}), str(place.folder / WEIGHTS)
    tensors = place.safetensors(WEIGHTS)
    expected = {name for name in NAMES.values() if name != "W_skip" or cfg["skip_connection"]}
    extra = tensors.keys() - expected
    require(not extra, f"{where} has tensors that {CONFIG} does not tell of: {', '.join(sorted(extra))}")
    missing = expected - tensors.keys()
    require(not missing, f"{where} has no tensor {', '.join(sorted(missing))}; it has: {', '.join(tensors)}")
    leaves = {ours: _turned(ours, tensors[name]) for ours, name in NAMES.items() if name in tensors}
    d_in, d_sae = cfg["d_in"], cfg["num_latents"] or cfg["expansion_factor"] * cfg["d_in"]
    # before anything is built of that size
    shape = leaves["W_enc"].shape
    require(shape == (d_in, d_sae), f"{where}: encoder.weight must be ({d_sae}, {d_in}), got {shape[::-1]}")
    build = partial(plain_sae, "topk", d_in, d_sae, k=cfg["k"], **LOSS)
    transcoder = build(d_out=d_in, skip=cfg["skip_connection"])
    if cfg["transcode"]:
        sae, params = transcoder, fitted(transcoder, leaves, where)
    else:
        sae = build()
        params = fitted(sae, leaves, where)
        if cfg["skip_connection"]:
            _, params = fold_b_dec(sae, params, False)
            sae, params = transcoder, fitted(transcoder, {**params, "W_skip": leaves["W_skip"]}, where)
    return Loaded(sae, params, _metadata(told))


def form(loaded: Loaded) -> Form:
    """A TopK SAE, or a transcoder of TopK between sites of the same width, in the terms of sparsify."""
    sae, params = loaded.sae, loaded.params
    require(kind(sae) == "topk", f"sparsify holds TopK SAEs and transcoders, not a {kind(sae)}")
    d_in, d_sae = sae.config["d_in"], sae.config["d_sae"]
    d_out = sae.config.get("d_out")
    square = d_out in (None, d_in)
    require(square, f"sparsify's transcoders are as wide at both ends, this one {d_in} and {d_out}")
    if d_out is None:
        sae, params = fold_b_dec(sae, params, True)
    metadata = loaded.metadata
    told = metadata.get(OURS)
    cfg = {
        "expansion_factor": max(1, d_sae // d_in),
        "normalize_decoder": False,
        "multi_topk": False,
        **(told if isinstance(told, dict) else {}),
        "activation": "topk",
        "num_latents": d_sae,
        "k": int(inner(sae.config)["k"]),
        "skip_connection": "W_skip" in params,
        "transcode": d_out is not None,
        "d_in": d_in,
        "metadata": {name: value for name, value in metadata.items() if name not in (*CARRIED, OURS)},
        **{name: metadata[name] for name in (DESCRIPTION, LEAVES) if name in metadata},
    }
    tensors = {NAMES[name]: _turned(name, leaf) for name, leaf in params.items()}
    written = {WEIGHTS: partial(files.write_safetensors, tensors), CONFIG: partial(files.write_json, cfg)}
    return Form(written, ("its layer norm",) if is_layer_normed(sae) else ())


def _checked(cfg: dict[str, Any]) -> dict[str, Any]:
    """A config whose values are of the types that they must be, and of a coder that is known here."""
    for name in ("k", "d_in", "num_latents", "expansion_factor"):
        whole = type(cfg.get(name)) is int and cfg[name] >= (0 if name == "num_latents" else 1)
        require(whole, f"{CONFIG} must give {name} as a whole number, got {str(cfg.get(name))[:50]}")
    for name in ("transcode", "skip_connection"):
        require(type(cfg[name]) is bool, f"{CONFIG} must give {name} as true or false")
    activation = cfg["activation"]
    require(
        activation == "topk",
        f"{CONFIG}: activation {activation!r} is not read here, only 'topk', which chooses among all latents",
    )
    require(not cfg.get("signed"), f"{CONFIG}: signed latents are not read here, features are at least 0")
    return cfg


def _turned(name: str, leaf: np.ndarray) -> np.ndarray:
    return leaf.T if name in TRANSPOSED else leaf


def _metadata(cfg: dict[str, Any]) -> dict[str, Any]:
    carried = cfg.get("metadata", {})
    require(isinstance(carried, dict), f"{CONFIG}: metadata must be an object")
    return {
        **carried,
        **{name: cfg[name] for name in (DESCRIPTION, LEAVES) if name in cfg},
        OURS: {name: value for name, value in cfg.items() if name not in CARRIED},
    }


FORMAT = Format(f"sparsify ({CONFIG}, {WEIGHTS})", recognise, read, form, keeps_metadata=True)
