"""The SAELens layout: a folder of `cfg.json` and `sae_weights.safetensors`.

Tensors: W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_out], b_dec [d_out]; JumpReLU also threshold
[d_sae]; gated b_gate, b_mag, r_mag [d_sae] in place of b_enc; a skip transcoder W_skip [d_out, d_in].

Our own `config`, and leaves that SAELens has no tensor for, ride in the metadata, so that what was written
here comes back as it was, penalty and all. A crosscoder, a transcoder of `topk` or `gated`, and a layer norm
before a skip connection have no form in SAELens: they are written into the same two files under an
architecture `sae_jax_...`, which only `sae_jax.load` opens.

A checkpoint of SAELens's trainer is read too: see `saelens_checkpoint`.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from sae_jax.architectures import build
from sae_jax.base import SAE, require
from sae_jax.folds import batch_topk_as_jumprelu, inner, kind, plain_of
from sae_jax.formats import files, saelens_checkpoint
from sae_jax.formats.described import DESCRIPTION, LEAVES, built
from sae_jax.formats.files import Place
from sae_jax.formats.format import Form, Format, Loaded, fitted
from sae_jax.layer_norm import is_layer_normed

CONFIG, WEIGHTS, SPARSITY = "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"
OURS = "sae_jax_"
RESHAPED = "reshape_activations"
LAYOUT_VERSION = "6.54.12"
"""The SAELens whose layout this is. A version under 6.0 would have the config upgraded as an old one."""

NAMES = {
    "relu": "standard",
    "topk": "topk",
    "batch_topk": "jumprelu",
    "jumprelu": "jumprelu",
    "gated": "gated",
}
"""Our architectures to SAELens's."""

TRANSCODERS = {
    ("standard", False): "transcoder",
    ("standard", True): "skip_transcoder",
    ("jumprelu", False): "jumprelu_transcoder",
    ("jumprelu", True): "jumprelu_skip_transcoder",
}
"""(what the transcoder is of, whether it has a skip connection) to SAELens's name."""

HAS_NO_FORM = "it has none for crosscoders, transcoders of topk or gated, and a layer norm before a skip"

OLD_NAMES = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index"}
OF_THE_SITE = (
    "model_name", "hook_name", "hook_head_index", "context_size", "prepend_bos", "dataset_path",
    "model_from_pretrained_kwargs", "model_class_name", "neuronpedia_id", "seqpos_slice",
)  # fmt: skip
"""What a config of before 6.0 tells at its top, and one of today in its metadata."""

AUXK = {"auxk": 1.0, "auxk_loss": "auxk.saelens"}
L1 = {"architecture": "relu", "l1": 0.0, "mean_features": False, "decoder_norm_l1": True}
L0 = {"architecture": "jumprelu", "l0_coefficient": 0.0}
ITS_OWN = {
    "standard": L1,
    "topk": {"architecture": "topk", **AUXK},
    "jumprelu": L0,
    "gated": {"architecture": "gated", "l1": 0.0, "decoder_norm_l1": True, "detach_auxiliary": False},
    **{
        name: {**of, "architecture": "transcoder", "of": of["architecture"], "skip": skip}
        for (kind, skip), name in TRANSCODERS.items()
        for of in ({"standard": L1, "jumprelu": L0}[kind],)
    },
    "batchtopk": {"architecture": "batch_topk", **AUXK, "threshold_init": 0.0},
    "matryoshka_batchtopk": {
        "architecture": "matryoshka", "of": "batch_topk", **AUXK, "threshold_init": 0.0
    },
}  # fmt: skip
"""What SAELens's architectures are called by here: its conventions, and a penalty of weight 0, which only
its trainer's files tell. The last two only a trainer writes; when it is done, they are jumprelu."""


def recognise(place: Place) -> bool:
    """Whether this is such a folder."""
    return not place.is_file and place.has(WEIGHTS)


def form(loaded: Loaded) -> Form:
    """An SAE in the terms of the layout; a BatchTopK becomes a JumpReLU whose thresholds are all the same."""
    described = {name: loaded.metadata[name] for name in (DESCRIPTION, LEAVES) if name in loaded.metadata}
    sae, params = loaded.sae, dict(loaded.params)
    name = name_there(sae)
    if name is not None:
        sae, params = batch_topk_as_jumprelu(sae, params)
    config, core = sae.config, inner(sae.config)
    cfg = {
        "architecture": name or f"{OURS}{config['architecture']}",
        "d_in": config["d_in"],
        "d_sae": config["d_sae"],
        "dtype": str(params["W_dec"].dtype),
        "device": "cpu",
        "apply_b_dec_to_input": core.get("apply_b_dec_to_input", False),
        "normalize_activations": "layer_norm" if is_layer_normed(sae) else "none",
        "reshape_activations": loaded.metadata.get(RESHAPED, "none"),
    }
    if "d_out" in config:
        cfg["d_out"] = config["d_out"]
    if name == "topk":
        cfg |= {"k": int(core["k"]), "rescale_acts_by_decoder_norm": False}
    if name is not None and "W_skip" in params:
        params["W_skip"] = params["W_skip"].T
    rest = {key: value for key, value in loaded.metadata.items() if key not in (*described, RESHAPED)}
    cfg["metadata"] = {
        **rest,
        "sae_lens_version": LAYOUT_VERSION,
        "sae_lens_training_version": None,
        **described,
    }
    written = {WEIGHTS: partial(files.write_safetensors, params), CONFIG: partial(files.write_json, cfg)}
    rates = loaded.log_sparsity
    sparsity = None if rates is None else partial(files.write_safetensors, {"sparsity": rates})
    return Form({**written, SPARSITY: sparsity})


def name_there(sae: SAE) -> str | None:
    """SAELens's name for the architecture, or None where it has none."""
    name = NAMES.get(kind(sae))
    if "d_out" not in sae.config:
        return name
    skip = sae.config.get("skip", False)
    # SAELens's skip connection takes x as it is
    return None if skip and is_layer_normed(sae) else TRANSCODERS.get((str(name), bool(skip)))


def read(place: Place) -> Loaded:
    """An SAE in the SAELens layout, given SAELens's loss; what normalised a trainer's rows is folded in."""
    require(place.has(CONFIG), _without_config(place))
    cfg, weights = _upgraded(place.json(CONFIG)), dict(place.safetensors(WEIGHTS))
    metadata = cfg.get("metadata", {})
    require(isinstance(metadata, dict), f"{CONFIG}: metadata must be an object")
    sae = _model_of(cfg, metadata)
    where, name = f"{place.path / WEIGHTS}", str(cfg["architecture"])
    normalised_by = None
    if not name.startswith(OURS):
        told = cfg.get("normalize_activations", "none")
        normalised_by = saelens_checkpoint.normalisation(sae, name, told, place)
        weights |= {leaf: weights[leaf].T for leaf in ("W_skip",) if leaf in weights}
    # a factor of 1 that SAELens wrote into every file for a while
    if "scaling_factor" in weights and bool((weights["scaling_factor"] == 1).all()):
        del weights["scaling_factor"]
    weights = saelens_checkpoint.with_threshold(weights)
    params = fitted(sae, weights, where)
    extra = weights.keys() - params.keys()
    require(not extra, f"{where} has tensors that a {name!r} does not have: {', '.join(sorted(extra))}")
    sae, params = saelens_checkpoint.on_raw_rows(sae, params, normalised_by)
    if cfg.get(RESHAPED) == "hook_z":
        metadata = {**metadata, RESHAPED: "hook_z"}
    return Loaded(sae, params, metadata, _log_sparsity(place, sae))


def _model_of(cfg: dict[str, Any], metadata: dict[str, Any]) -> SAE:
    name = cfg.get("architecture")
    if isinstance(name, str) and name.startswith(OURS):
        return plain_of(built(metadata.get(DESCRIPTION)))
    known = isinstance(name, str) and name in ITS_OWN
    require(known, f"SAELens architecture {name!r} is not read here, only {', '.join(ITS_OWN)}")
    whole, flags = ["d_in", "d_sae"], {}
    if name in TRANSCODERS.values():
        whole.append("d_out")
    else:
        flags["apply_b_dec_to_input"] = True
    if name == "topk":
        whole.append("k")
    if "topk" in str(name):
        flags["rescale_acts_by_decoder_norm"] = False
    for key in whole:
        require(type(cfg.get(key)) is int, f"{CONFIG} must give {key} as a whole number")
    taken = {key: cfg[key] for key in whole} | {key: cfg.get(key, value) for key, value in flags.items()}
    for key in flags:
        require(type(taken[key]) is bool, f"{CONFIG} must give {key} as true or false")
    return build({**ITS_OWN[str(name)], **taken, **saelens_checkpoint.training(cfg, CONFIG)})


def _log_sparsity(place: Place, sae: SAE) -> np.ndarray | None:
    """log10 of how often each latent was active."""
    if not place.has(SPARSITY):
        return None
    found, width = place.safetensors(SPARSITY).get("sparsity"), sae.config["d_sae"]
    told = found is not None and found.shape == (width,) and jnp.issubdtype(found.dtype, jnp.floating)
    require(told, f"{place.path / SPARSITY} must hold one tensor, sparsity [{width}], floating point")
    return found


def _without_config(place: Place) -> str:
    """What is missing, and what the tensors tell without it."""
    shapes, _ = place.header(WEIGHTS)
    told = ", ".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items())[:8])
    return (
        f"{place.path} has no {CONFIG}: the tensors ({told}) give d_in and d_sae, but cannot tell "
        "architecture, k, apply_b_dec_to_input and normalize_activations"
    )


def _upgraded(cfg: dict[str, Any]) -> dict[str, Any]:
    """A config of a SAELens before 6.0, in which a TopK could call itself "standard", in today's terms."""
    activation = cfg.get("activation_fn", cfg.get("activation_fn_str", "relu"))
    changes: dict[str, Any] = {} if "architecture" in cfg else {"architecture": "standard"}
    if activation == "topk":
        kwargs = cfg.get("activation_fn_kwargs")
        changes["architecture"] = "topk"
        changes["k"] = cfg.get("k", kwargs.get("k") if isinstance(kwargs, dict) else None)
    elif activation != "relu":
        changes["architecture"] = f"{cfg.get('architecture')} with {activation}"
    normalised = cfg.get("normalize_activations")
    if normalised is None or isinstance(normalised, bool):
        changes["normalize_activations"] = "expected_average_only_in" if normalised else "none"
    if "metadata" not in cfg:
        named = {OLD_NAMES.get(key, key): value for key, value in cfg.items()}
        changes["metadata"] = {key: named[key] for key in OF_THE_SITE if named.get(key) is not None}
    return {**cfg, **changes}


FORMAT = Format(f"SAELens ({CONFIG}, {WEIGHTS})", recognise, read, form, keeps_metadata=True)
