"""The SAELens layout: a folder of `cfg.json` and `sae_weights.safetensors`.

Tensors: W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_out], b_dec [d_out]; JumpReLU also threshold
[d_sae]; gated b_gate, b_mag, r_mag [d_sae] in place of b_enc; a skip transcoder W_skip [d_out, d_in].

Our own `config`, and leaves that SAELens has no tensor for, ride in the metadata, so that what was written
here comes back as it was, penalty and all. A crosscoder, a transcoder of `topk` or `gated`, and a layer norm
before a skip connection have no form in SAELens: they are written into the same two files under an
architecture `sae_jax_...`, which only `sae_jax.load` opens.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from sae_jax.architectures import TABLE, build, describe
from sae_jax.base import SAE, InputError, Params, require
from sae_jax.normalise import fold_decoder_norms, inner, is_layer_normed, layer_normed

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
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

L1 = {"architecture": "relu", "l1": 0.0, "mean_features": False, "decoder_norm_l1": True}
L0 = {"architecture": "jumprelu", "l0_coefficient": 0.0}
ITS_OWN = {
    "standard": L1,
    "topk": {"architecture": "topk", "auxk": 1.0, "auxk_loss": "auxk.saelens"},
    "jumprelu": L0,
    "gated": {"architecture": "gated", "l1": 0.0, "decoder_norm_l1": True, "detach_auxiliary": False},
    **{
        name: {**of, "architecture": "transcoder", "of": of["architecture"], "skip": skip}
        for (kind, skip), name in TRANSCODERS.items()
        for of in ({"standard": L1, "jumprelu": L0}[kind],)
    },
}
"""What SAELens's architectures are called by here: its conventions, and a penalty of weight 0, which its
files do not tell."""


class Form(NamedTuple):
    """An SAE in the terms of the layout."""

    cfg: dict[str, Any]
    tensors: dict[str, np.ndarray]
    leaves: Params
    """Ours that no tensor holds."""


def write(folder: str | Path, sae: SAE, params: Params) -> None:
    """Write an SAE that SAELens reads as its own, where SAELens has it.

    A rescaled TopK or BatchTopK is written as SAELens does: decoder norms folded into the encoder.
    BatchTopK becomes a JumpReLU whose thresholds are all the same.

    Args:
      folder: made if missing; files of the same names in it are replaced.
      sae: the model, of any architecture; the module's head says which ones SAELens cannot open.
      params: its weights.

    Raises:
      InputError: an architecture that is not in the package's table, or arguments that JSON cannot hold.
    """
    known = sae.config.get("architecture") in TABLE
    require(known, f"an SAE called {sae.config.get('architecture')!r} cannot be written: no reader knows it")
    sae, params = fold_decoder_norms(sae, params)
    cfg, tensors, leaves = _form(sae, params)
    cfg["metadata"] = {
        "sae_lens_version": LAYOUT_VERSION,
        "sae_lens_training_version": None,
        "sae_jax": describe(sae.config),
        "sae_jax_leaves": {
            name: _listed(np.asarray(leaf, np.float64).tolist()) for name, leaf in leaves.items()
        },
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: np.asarray(leaf, order="C") for name, leaf in tensors.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(cfg, indent=2) + "\n")


def recognise(path: Path) -> bool:
    """Whether this is such a folder."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def read(folder: str | Path) -> tuple[SAE, Params]:
    """Read an SAE in the SAELens layout, written here or by SAELens.

    Args:
      folder: holds the two files.

    Returns:
      The SAE and its weights. One that SAELens made, or changed since it was written here, is given
      SAELens's loss, with the penalty's weight at 0 because the file does not tell it.

    Raises:
      InputError: files missing or damaged, an architecture or a normalisation not known here, or tensors
        that do not fit.
    """
    folder = Path(folder)
    try:
        cfg = json.loads((folder / CONFIG).read_text())
        weights = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{folder} cannot be read in the SAELens layout: {error}") from None
    require(isinstance(cfg, dict), f"{folder / CONFIG} must hold a JSON object")
    try:
        sae, params = _ours(cfg, weights) or _theirs(cfg, weights)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        # the metadata may say anything, and no factory is written to bear all of it
        reason = " ".join(str(error).split())
        raise InputError(f"{folder}: {CONFIG} does not describe an SAE known here: {reason}") from None
    return sae, {name: jnp.asarray(leaf) for name, leaf in params.items()}


def _form(sae: SAE, params: Params) -> Form:
    config, core = sae.config, inner(sae.config)
    tensors = {name: np.asarray(leaf) for name, leaf in params.items()}
    name = _name_there(sae)
    cfg = {
        "architecture": name or f"sae_jax_{config['architecture']}",
        "d_in": config["d_in"],
        "d_sae": config["d_sae"],
        "dtype": str(tensors["W_dec"].dtype),
        "device": "cpu",
        "apply_b_dec_to_input": core.get("apply_b_dec_to_input", False),
        "normalize_activations": "layer_norm" if is_layer_normed(sae) else "none",
        "reshape_activations": "none",
    }
    if "d_out" in config:
        cfg["d_out"] = config["d_out"]
    if name is None:
        return Form(cfg, tensors, {})
    if name == "topk":
        cfg |= {"k": int(core["k"]), "rescale_acts_by_decoder_norm": False}
    leaves = {leaf: tensors.pop(leaf) for leaf in ("log_penalty", "log_threshold") if leaf in tensors}
    if core["architecture"] == "batch_topk":
        leaves["threshold"] = tensors["threshold"]
        everywhere = np.ones(config["d_sae"], leaves["threshold"].dtype)
        tensors["threshold"] = everywhere * np.maximum(leaves["threshold"], 0)
    if "log_threshold" in leaves:
        tensors["threshold"] = np.exp(leaves["log_threshold"])
    if "W_skip" in tensors:
        tensors["W_skip"] = tensors["W_skip"].T
    if core.get("tied"):
        tensors["W_enc"] = tensors["W_dec"].T
    return Form(cfg, tensors, leaves)


def _name_there(sae: SAE) -> str | None:
    """SAELens's name for the architecture, or None where it has none."""
    name = NAMES.get(inner(sae.config)["architecture"])
    if "d_out" not in sae.config:
        return name
    skip = sae.config.get("skip", False)
    # SAELens's skip connection takes x as it is
    return None if skip and is_layer_normed(sae) else TRANSCODERS.get((str(name), bool(skip)))


def _ours(cfg: dict[str, Any], weights: dict[str, np.ndarray]) -> tuple[SAE, Params] | None:
    """What was written here; None where SAELens wrote, or has changed weights and kept our metadata."""
    metadata = cfg.get("metadata")
    description = metadata.get("sae_jax") if isinstance(metadata, dict) else None
    if not isinstance(metadata, dict) or not isinstance(description, dict):
        return None
    sae = _built(description)
    leaves = metadata.get("sae_jax_leaves", {})
    require(isinstance(leaves, dict), f"{CONFIG}: sae_jax_leaves must be an object")
    params = _fitted(sae, weights, leaves)
    form = _form(sae, params)
    told = ("dtype", "device", "reshape_activations")
    same = form.tensors.keys() == weights.keys() and all(
        cfg.get(name) == value for name, value in form.cfg.items() if name not in told
    )
    return (sae, params) if same and _close(form.tensors, weights) else None


def _theirs(cfg: dict[str, Any], weights: dict[str, np.ndarray]) -> tuple[SAE, Params]:
    """What SAELens wrote."""
    cfg = _upgraded(cfg)
    name = cfg.get("architecture")
    known = isinstance(name, str) and name in ITS_OWN
    require(known, f"SAELens architecture {name!r} is not read here, only {', '.join(ITS_OWN)}")
    whole, flags = ["d_in", "d_sae"], {}
    if name in TRANSCODERS.values():
        whole.append("d_out")
    else:
        flags["apply_b_dec_to_input"] = True
    if name == "topk":
        whole.append("k")
        flags["rescale_acts_by_decoder_norm"] = False
    for key in whole:
        require(type(cfg.get(key)) is int, f"{CONFIG} must give {key} as a whole number")
    taken = {key: cfg[key] for key in whole} | {key: cfg.get(key, value) for key, value in flags.items()}
    for key in flags:
        require(type(taken[key]) is bool, f"{CONFIG} must give {key} as true or false")
    normalised = cfg.get("normalize_activations", "none")
    layer_norm_before_skip = normalised == "layer_norm" and ITS_OWN[str(name)].get("skip", False)
    read_here = normalised in ("none", "layer_norm") and not layer_norm_before_skip
    require(read_here, f"inputs of a {name!r} are normalised by {normalised!r}, which is not read here")
    sae = _built({**ITS_OWN[str(name)], **taken, "normalize_activations": normalised})
    # a factor of 1 that SAELens wrote into every file for a while
    ones = "scaling_factor" in weights and bool((weights["scaling_factor"] == 1).all())
    params = _fitted(sae, weights, {})
    extra = weights.keys() - params.keys() - ({"scaling_factor"} if ones else set())
    require(not extra, f"{WEIGHTS} has tensors that a {name!r} does not have: {', '.join(sorted(extra))}")
    return sae, params


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
    if cfg.get("normalize_activations") in (False, None):
        changes["normalize_activations"] = "none"
    return {**cfg, **changes}


def _built(description: dict[str, Any]) -> SAE:
    arguments = dict(description)
    normalised = arguments.pop("normalize_activations", "none")
    for name in ("d_in", "d_sae"):
        whole = type(arguments.get(name)) is int or "architecture" not in arguments
        require(whole, f"{CONFIG} must give {name} as a whole number")
    try:
        sae = build(arguments)
    except InputError as error:
        raise InputError(f"{CONFIG} does not describe an SAE known here: {error}") from None
    return layer_normed(sae) if normalised == "layer_norm" else sae


def _fitted(sae: SAE, weights: dict[str, np.ndarray], leaves: dict[str, Any]) -> Params:
    """The params of that SAE out of a file's tensors and the metadata's leaves."""
    params = {}
    require("W_dec" in weights, f"{WEIGHTS} has no tensor W_dec")
    dtype = weights["W_dec"].dtype
    drawn = jax.eval_shape(lambda: sae.init(jax.random.key(0)))
    for name, shape in ((name, leaf.shape) for name, leaf in drawn.items()):
        where = CONFIG if name in leaves else WEIGHTS
        require(name in leaves or name in weights, f"{where} has no tensor {name}")
        leaf = _unlisted(name, leaves[name], dtype) if name in leaves else weights[name]
        transposed = name == "W_skip" and _name_there(sae) is not None
        expected = shape[::-1] if transposed else shape
        require(leaf.shape == expected, f"{where}: {name} must be {expected}, got {leaf.shape}")
        floats = jnp.issubdtype(leaf.dtype, jnp.floating)
        require(floats, f"{where}: {name} must be floating point, got {leaf.dtype}")
        params[name] = leaf.T if transposed else leaf
    return params


def _close(tensors: dict[str, np.ndarray], weights: dict[str, np.ndarray]) -> bool:
    """Whether they are the same up to what another machine's exp may round otherwise."""
    return all(
        tensors[name] is weights[name]
        or np.allclose(
            tensors[name].astype(np.float64),
            weights[name].astype(np.float64),
            rtol=4 * float(jnp.finfo(weights[name].dtype).eps),
            atol=0,
            equal_nan=True,
        )
        for name in tensors
    )


def _listed(value: Any) -> Any:
    """As JSON: numbers, and names for those that JSON does not have."""
    if isinstance(value, list):
        return [_listed(entry) for entry in value]
    return value if math.isfinite(value) else str(value)


def _unlisted(name: str, listed: Any, dtype: np.dtype) -> np.ndarray:
    try:
        return np.asarray(listed).astype(np.float64).astype(dtype)
    except (TypeError, ValueError):
        raise InputError(f"{CONFIG}: the leaf {name} must be a number or a list of numbers") from None
