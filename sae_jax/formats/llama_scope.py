"""Llama Scope, in two kinds: with `checkpoints/final.safetensors`, and with `sae_weights.safetensors`.

Tensors: encoder.weight [d_sae, d_in], encoder.bias [d_sae], decoder.weight [d_in, d_sae] and decoder.bias
[d_in]. In the first kind `hyperparams.json` gives one jump_relu_threshold for all latents; in the second (R1
Distill, with `config.json`) each has its own, log_jumprelu_threshold [d_sae]. With norm_activation
"dataset-wise" the input is to be scaled by s = sqrt(d_in) / dataset_average_activation_norm["in"], which is
folded here as SAELens folds it, the threshold of the first kind too:

    W_enc <- s W_enc;   W_dec <- W_dec / s;   b_dec <- b_dec / s;   threshold <- s jump_relu_threshold

Source: He et al. 2024 (arXiv 2410.20526).
"""

import math
from functools import partial
from typing import Any

import numpy as np

from sae_jax.base import require
from sae_jax.folds import as_jumprelu, fold_b_dec, plain_sae
from sae_jax.formats import files
from sae_jax.formats.files import Place
from sae_jax.formats.format import CARRIED, Form, Format, Loaded, fitted, told_by
from sae_jax.layer_norm import is_layer_normed

CONFIG, FOLDER, WEIGHTS = "hyperparams.json", "checkpoints", "final.safetensors"
CONFIG_2, WEIGHTS_2, LOG_THRESHOLD = "config.json", "sae_weights.safetensors", "log_jumprelu_threshold"
NAMES = {
    "W_enc": "encoder.weight",
    "b_enc": "encoder.bias",
    "W_dec": "decoder.weight",
    "b_dec": "decoder.bias",
}
TRANSPOSED = ("W_enc", "W_dec")
OURS = "llama_scope"
WORDS = {"hook_point_in": "hook_name"}
"""The config's, and SAELens's."""


def recognise(place: Place) -> bool:
    """Whether this is a folder of either kind."""
    if place.is_file:
        return False
    return place.has(CONFIG) or (place.has(CONFIG_2, WEIGHTS_2) and not place.has("cfg.json"))


def read(place: Place) -> Loaded:
    """A JumpReLU on raw activations."""
    first = place.has(CONFIG)
    cfg = place.json(CONFIG if first else CONFIG_2)
    name = WEIGHTS if first else WEIGHTS_2
    holder = Place(place.folder / FOLDER) if first else place
    require(holder.has(name), f"{place.path} has {CONFIG}, but no {FOLDER}/{WEIGHTS}")
    tensors, where = holder.safetensors(name), str(holder.folder / name)
    for key in NAMES.values():
        require(key in tensors, f"{where} has no tensor {key}; it has: {', '.join(tensors) or 'none'}")
    leaves = {ours: tensors[key].T if ours in TRANSPOSED else tensors[key] for ours, key in NAMES.items()}
    require(leaves["W_enc"].ndim == 2, f"{where}: encoder.weight must be [d_sae, d_in]")
    d_in, d_sae = leaves["W_enc"].shape
    _require_known(cfg)
    scale = _scale(cfg, d_in)
    if first:
        threshold = _number(
            cfg.get("jump_relu_threshold"), f"{CONFIG} must give jump_relu_threshold as a number"
        )
        leaves["threshold"] = np.full(d_sae, threshold * scale, np.float32)
    else:
        require(LOG_THRESHOLD in tensors, f"{where} has no tensor {LOG_THRESHOLD}")
        leaves["threshold"] = np.exp(tensors[LOG_THRESHOLD])
    if scale != 1:
        # half precision would round the product
        wide = {name: leaf.astype(np.result_type(leaf.dtype, np.float32)) for name, leaf in leaves.items()}
        leaves = {**wide, "W_enc": wide["W_enc"] * scale}
        leaves |= {name: (wide[name] / scale).astype(wide[name].dtype) for name in ("W_dec", "b_dec")}
        leaves["W_enc"] = leaves["W_enc"].astype(wide["W_enc"].dtype)
    sae = plain_sae("jumprelu", d_in, d_sae, apply_b_dec_to_input=False)
    return Loaded(sae, fitted(sae, leaves, where), told_by(cfg, OURS, WORDS))


def form(loaded: Loaded) -> Form:
    """Whatever is a JumpReLU: of the first kind where all thresholds are the same, else of the second."""
    require("d_out" not in loaded.sae.config, "Llama Scope's transcoders are not written here, only its SAEs")
    sae, params = fold_b_dec(*as_jumprelu(loaded.sae, loaded.params), False)
    d_in, d_sae = sae.config["d_in"], sae.config["d_sae"]
    threshold = np.maximum(params["threshold"], 0)
    told = loaded.metadata.get(OURS)
    told = told if isinstance(told, dict) else {}
    norms = {name: math.sqrt(d_in) for name in ("in", "out")}
    cfg = {
        "hook_point_in": loaded.metadata.get("hook_name"),
        **told,
        "act_fn": "jumprelu",
        "d_model": d_in,
        "d_sae": d_sae,
        "expansion_factor": d_sae // d_in if d_sae % d_in == 0 else d_sae / d_in,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": norms,
        CARRIED: {name: value for name, value in loaded.metadata.items() if name != OURS},
    }
    tensors = {key: params[ours].T if ours in TRANSPOSED else params[ours] for ours, key in NAMES.items()}
    lost = ("its layer norm",) if is_layer_normed(sae) else ()
    same = np.unique(threshold)
    if same.size == 1 and threshold.dtype == np.float32:
        cfg["jump_relu_threshold"] = float(same[0])
        weights = partial(files.write_safetensors, tensors)
        return Form({f"{FOLDER}/{WEIGHTS}": weights, CONFIG: partial(files.write_json, cfg)}, lost)
    with np.errstate(divide="ignore"):
        tensors[LOG_THRESHOLD] = np.log(threshold)
    weights = partial(files.write_safetensors, tensors)
    return Form({WEIGHTS_2: weights, CONFIG_2: partial(files.write_json, cfg)}, lost)


def _require_known(cfg: dict[str, Any]) -> None:
    """Refuse what this reader would take for something else."""
    activation = cfg.get("act_fn", "jumprelu")
    known = isinstance(activation, str) and activation.lower() == "jumprelu"
    require(known, f"act_fn {str(activation)[:50]!r} is not read here, only 'jumprelu'")
    subtracts = cfg.get("apply_decoder_bias_to_pre_encoder", False)
    require(subtracts is False, "apply_decoder_bias_to_pre_encoder is not read here, only as false")
    before, after = cfg.get("hook_point_in"), cfg.get("hook_point_out")
    one = after is None or before == after
    require(
        one,
        f"a transcoder from {str(before)[:80]} to {str(after)[:80]} is not read here, only SAEs of one site",
    )


def _scale(cfg: dict[str, Any], d_in: int) -> float:
    """s, 1 where the config asks for no normalisation by the data set."""
    if cfg.get("norm_activation", "dataset-wise") != "dataset-wise":
        how = cfg["norm_activation"]
        fixed = how in (None, "none", "inference")
        require(fixed, f"norm_activation {str(how)[:50]!r} is not read here, only 'dataset-wise'")
        return 1.0
    norms = cfg.get("dataset_average_activation_norm")
    told = 'the config must give dataset_average_activation_norm as {"in": number above 0}'
    norm = _number(norms.get("in") if isinstance(norms, dict) else None, told)
    require(norm > 0, told)
    return math.sqrt(d_in) / norm


def _number(value: Any, told: str) -> float:
    require(type(value) in (int, float) and math.isfinite(value) and abs(value) < 1e30, told)
    return float(value)


FORMAT = Format(
    f"Llama Scope ({CONFIG} and {FOLDER}/{WEIGHTS}, or {CONFIG_2} and {WEIGHTS_2})",
    recognise, read, form, keeps_metadata=True,
)  # fmt: skip
