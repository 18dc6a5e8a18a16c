"""circuit-tracer's transcoders: a `layer_i.safetensors` each, and one `config.yaml` for all.

Tensors: W_enc [d_sae, d_in] (transposed), b_enc [d_sae], W_dec [d_sae, d_in], b_dec [d_in]; of a JumpReLU
activation_function.threshold [d_sae] or []; of a skip connection W_skip [d_in, d_in], with which y_hat = ...
+ x W_skip^T. Nothing is subtracted from the input. The config's `activation: topk` and `k` make it a TopK
(some files hold k as a tensor); else without thresholds it is a ReLU.

There, neither JumpReLU nor TopK rectifies. Thresholds below 0 are therefore refused, and written as the 0
that they amount to here; a TopK is read as ours, the same wherever the k largest pre-activations are above 0.

Each file is one transcoder: `load_all` reads a folder of them. What no tensor tells rides in its header.
"""

import json
import re
from functools import partial
from typing import Any

import numpy as np

from sae_jax.base import InputError, require
from sae_jax.folds import as_jumprelu, fold_b_dec, inner, kind, plain_sae
from sae_jax.formats import files
from sae_jax.formats.described import DESCRIPTION
from sae_jax.formats.files import Place
from sae_jax.formats.format import UNKNOWN, Form, Format, Loaded, fitted
from sae_jax.layer_norm import is_layer_normed

CONFIG, WEIGHTS = "config.yaml", "layer_{}.safetensors"
THRESHOLD, K = "activation_function.threshold", "k"
OURS, CARRIED = "circuit_tracer", "sae_jax_metadata"
REQUIRED = ("W_enc", "b_enc", "W_dec", "b_dec")
HOOKS = {
    "feature_input_hook": "hook_name",
    "feature_output_hook": "hook_name_out",
    "model_name": "model_name",
}
"""The config's words, and SAELens's."""


def recognise(place: Place) -> bool:
    """Whether this is such a file: its encoder lies as its decoder does."""
    if not place.is_file or place.path.suffix != ".safetensors":
        return False
    try:
        shapes, _ = place.header(place.path.name)
    except InputError:
        return re.fullmatch(r"layer_\d+\.safetensors", place.path.name) is not None
    named = set(REQUIRED) <= shapes.keys()
    return named and shapes["W_enc"][0:1] == shapes["W_dec"][0:1] == shapes["b_enc"]


def read(place: Place) -> Loaded:
    """A transcoder of ReLU, JumpReLU or TopK."""
    name = place.path.name
    tensors, where = dict(place.safetensors(name)), str(place.path)
    for key in ("W_enc", "W_dec"):
        require(key in tensors and tensors[key].ndim == 2, f"{where} must have a matrix {key}")
    extra = tensors.keys() - {*REQUIRED, THRESHOLD, K, "W_skip"}
    require(not extra, f"{where} has tensors that are not known here: {', '.join(sorted(extra))}")
    d_sae, d_in = tensors["W_enc"].shape
    tensors["W_enc"] = tensors["W_enc"].T
    arguments: dict[str, Any] = {"d_out": tensors["W_dec"].shape[1], "skip": "W_skip" in tensors}
    if "W_skip" in tensors:
        tensors["W_skip"] = tensors["W_skip"].T
    require(min(d_sae, d_in) > 0, f"{where}: W_enc is empty")
    metadata = _metadata(place, name)
    activation = metadata[OURS].get("activation")
    known = activation in (None, "relu", "jumprelu", "jump_relu", "topk")
    require(
        known, f"{CONFIG}: activation {str(activation)[:50]!r} is not read here, only relu, jumprelu, topk"
    )
    encoder = "relu"
    if activation == "topk" or K in tensors:
        encoder, arguments["k"] = "topk", _k(tensors.pop(K, metadata[OURS].get("k")), where)
    elif THRESHOLD in tensors and activation != "relu":
        threshold = tensors.pop(THRESHOLD)
        one = threshold.size == 1
        tensors["threshold"] = np.full(d_sae, threshold.reshape(-1)[0]) if one else threshold.reshape(-1)
        below = int((tensors["threshold"] < 0).sum())
        require(below == 0, f"{where}: {below} thresholds are below 0, with which features would be too")
        encoder = "jumprelu"
    require(THRESHOLD not in tensors, f"{where} has thresholds, but {CONFIG} says activation {activation}")
    described = metadata.get(DESCRIPTION)
    if isinstance(described, dict) and "d_out" not in described and arguments["d_out"] == d_in:
        # written here, of an SAE
        arguments = {"k": arguments["k"]} if "k" in arguments else {}
        arguments["apply_b_dec_to_input"] = False
    sae = plain_sae(encoder, d_in, d_sae, **arguments)
    return Loaded(sae, fitted(sae, tensors, where), metadata)


def form(loaded: Loaded) -> Form:
    """An SAE or transcoder as one layer of a transcoder set; a `topk` stays one, the rest are JumpReLUs."""
    sae, params = loaded.sae, dict(loaded.params)
    require(kind(sae) != "crosscoder", "circuit-tracer's transcoders read one site, a crosscoder several")
    if kind(sae) not in ("relu", "topk"):
        sae, params = as_jumprelu(sae, params)
    d_out = sae.config.get("d_out", sae.config["d_in"])
    square = d_out == sae.config["d_in"]
    require(
        square,
        f"circuit-tracer's transcoders are as wide at both ends, this one {sae.config['d_in']} and {d_out}",
    )
    if "d_out" not in sae.config:
        sae, params = fold_b_dec(sae, params, False)
    for name in ("W_enc", "W_skip"):
        if name in params:
            params[name] = params[name].T
    if "threshold" in params:
        params[THRESHOLD] = np.maximum(params.pop("threshold"), 0)
    told = loaded.metadata.get(OURS)
    told = told if isinstance(told, dict) else {}
    rest = {name: value for name, value in loaded.metadata.items() if name != OURS}
    cfg = {
        "model_kind": "transcoder_set",
        **{theirs: rest[ours] for theirs, ours in HOOKS.items() if isinstance(rest.get(ours), str)},
        **{name: value for name, value in told.items() if name not in ("layer", "activation", K)},
    }
    # its loader asks for both
    cfg = {"feature_input_hook": UNKNOWN, "feature_output_hook": UNKNOWN, **cfg}
    lost = ("its layer norm",) if is_layer_normed(sae) else ()
    if kind(sae) == "topk":
        cfg |= {"activation": "topk", K: int(inner(sae.config)["k"])}
        lost = (*lost, "that no feature is below 0 where fewer than k pre-activations are above it")
    layer = told.get("layer", 0)
    header = {CARRIED: json.dumps(rest)}
    weights = WEIGHTS.format(layer if type(layer) is int else 0)
    written = {
        weights: partial(files.write_safetensors, params, metadata=header),
        CONFIG: partial(files.write_yaml, cfg),
    }
    return Form(written, lost)


def _k(k: Any, where: str) -> int:
    """What a tensor or the config tells."""
    whole = type(k) is int or (isinstance(k, np.ndarray) and k.ndim == 0 and k.dtype.kind in "iu")
    require(whole, f"{where}: a TopK needs k as a whole number, in {CONFIG} or as a tensor")
    return int(k)


def _metadata(place: Place, name: str) -> dict[str, Any]:
    beside = place.beside(CONFIG)
    cfg = beside.yaml(CONFIG) if beside.is_file else {}
    named = {theirs: cfg[theirs] for theirs in HOOKS if isinstance(cfg.get(theirs), str)}
    told = {HOOKS[theirs]: name for theirs, name in named.items() if name != UNKNOWN}
    try:
        carried = json.loads(place.header(name)[1].get(CARRIED, "{}"))
    except (ValueError, RecursionError):
        carried = None
    if not isinstance(carried, dict):
        raise InputError(f"{place.path}: the header's {CARRIED} must be a JSON object")
    number = re.search(r"(\d+)\.safetensors$", name)
    layer = {} if number is None else {"layer": int(number[1])}
    return {**told, **carried, OURS: {**cfg, **layer}}


FORMAT = Format(
    "circuit-tracer (layer_i.safetensors, config.yaml)",
    recognise,
    read,
    form,
    keeps_metadata=True,
    several=True,
)
