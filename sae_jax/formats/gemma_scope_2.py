"""Gemma Scope 2: `params.safetensors` and `config.json`.

Tensors: w_enc [d_in, d_sae], b_enc [d_sae], w_dec [d_sae, d_out], b_dec [d_out], threshold [d_sae], and of a
skip transcoder affine_skip_connection [d_in, d_out]. JumpReLU without `b_dec` subtracted from the input.
"""

from functools import partial

from sae_jax.base import require
from sae_jax.folds import as_jumprelu, fold_b_dec, plain_sae
from sae_jax.formats import files
from sae_jax.formats.files import Place
from sae_jax.formats.format import CARRIED, UNKNOWN, Form, Format, Loaded, fitted, told_by
from sae_jax.formats.gemma_scope import sizes
from sae_jax.layer_norm import is_layer_normed

CONFIG, WEIGHTS = "config.json", "params.safetensors"
OURS = "gemma_scope_2"
"""The key of our metadata."""
NAMES = {
    "W_enc": "w_enc",
    "b_enc": "b_enc",
    "W_dec": "w_dec",
    "b_dec": "b_dec",
    "threshold": "threshold",
    "W_skip": "affine_skip_connection",
}
WORDS = {"model_name": "model_name", "hf_hook_point_in": "hook_name", "hf_hook_point_out": "hook_name_out"}
"""The config's, and SAELens's."""


def recognise(place: Place) -> bool:
    """Whether this is such a folder, or its weights."""
    return place.has(WEIGHTS)


def read(place: Place) -> Loaded:
    """A JumpReLU SAE or transcoder; without a config the tensors tell all that it computes."""
    beside = place.beside(CONFIG)
    cfg = beside.json(CONFIG) if beside.is_file else {}
    kind = cfg.get("architecture", "jump_relu")
    require(
        kind == "jump_relu", f"{CONFIG}: architecture {str(kind)[:50]!r} is not read here, only 'jump_relu'"
    )
    tensors, where = place.safetensors(WEIGHTS), str(place.folder / WEIGHTS)
    for name in ("w_enc", "w_dec"):
        require(name in tensors, f"{where} has no tensor {name}; it has: {', '.join(tensors) or 'none'}")
    d_in, d_sae, d_out = sizes(tensors["w_enc"], tensors["w_dec"], where)
    skip = NAMES["W_skip"] in tensors
    transcodes = skip or d_in != d_out or cfg.get("hf_hook_point_out") is not None
    extra = tensors.keys() - set(NAMES.values())
    require(not extra, f"{where} has tensors that are not known here: {', '.join(sorted(extra))}")
    sae = plain_sae("jumprelu", d_in, d_sae, d_out=d_out if transcodes else None, skip=skip)
    leaves = {ours: tensors[theirs] for ours, theirs in NAMES.items() if theirs in tensors}
    return Loaded(sae, fitted(sae, leaves, where), told_by(cfg, OURS, WORDS))


def form(loaded: Loaded) -> Form:
    """Whatever is a JumpReLU, as Gemma Scope 2's."""
    sae, params = as_jumprelu(loaded.sae, loaded.params)
    transcodes = "d_out" in sae.config
    if not transcodes:
        sae, params = fold_b_dec(sae, params, False)
    told = loaded.metadata.get(OURS)
    cfg = {
        **(told if isinstance(told, dict) else {}),
        "architecture": "jump_relu",
        CARRIED: {name: value for name, value in loaded.metadata.items() if name != OURS},
    }
    cfg.setdefault("model_name", loaded.metadata.get("model_name", UNKNOWN))
    cfg.setdefault("hf_hook_point_in", loaded.metadata.get("hook_name"))
    if transcodes:
        cfg["hf_hook_point_out"] = cfg.get("hf_hook_point_out") or loaded.metadata.get("hook_name_out") or ""
        cfg["affine_connection"] = "W_skip" in params
    tensors = {NAMES[name]: leaf for name, leaf in params.items()}
    written = {WEIGHTS: partial(files.write_safetensors, tensors), CONFIG: partial(files.write_json, cfg)}
    return Form(written, ("its layer norm",) if is_layer_normed(sae) else ())


FORMAT = Format(f"Gemma Scope 2 ({WEIGHTS}, {CONFIG})", recognise, read, form, keeps_metadata=True)
