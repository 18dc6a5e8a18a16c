"""A checkpoint of SAELens's trainer: how the SAE is trained, and what normalises its rows.

`cfg.json` is the training config, with the penalty's weight, and batchtopk and matryoshka_batchtopk under
their own names. `sae_weights.safetensors` has a BatchTopK's topk_threshold [], and an old JumpReLU's
log_threshold [d_sae]. Rows that the SAE sees are normalised by what lies beside it:

    activation_scaler.json             scaling_factor:                            x scaling_factor
    activation_whitening.safetensors   mean [d_in], matrix, inverse_matrix:       (x - mean) matrix

`trainer_state.pt`, the optimizer's, is not read.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from sae_jax.base import SAE, Params, require
from sae_jax.folds import Folded
from sae_jax.formats.files import Place, Tensors
from sae_jax.layer_norm import LayerNorm, layer_norm, layer_normed
from sae_jax.normalise import Affine, Normalisation, fold, identity

SCALER, WHITENING = "activation_scaler.json", "activation_whitening.safetensors"

L1 = {"l1_coefficient": "l1", "l1_warm_up_steps": "l1_warmup"}
L0 = {
    "l0_coefficient": "l0_coefficient",
    "l0_warm_up_steps": "l0_warmup",
    "pre_act_loss_coefficient": "pre_act",
    "jumprelu_bandwidth": "bandwidth",
    "jumprelu_tanh_scale": "tanh_scale",
}
AUXK = {"aux_loss_coefficient": "auxk"}
TOLD = {
    "standard": L1,
    "gated": L1,
    "jumprelu": L0,
    "topk": AUXK,
    "batchtopk": AUXK,
    "matryoshka_batchtopk": AUXK,
}
"""Numbers of a training config by our names of them. Old configs tell more, of no use to the architecture."""

LARGEST = 1e30
"""Of a number that a config may tell."""

PENALTIES = {"step": "losses.step_l0", "tanh": "losses.tanh_l0", "quadratic": "losses.quadratic_l0"}


def training(cfg: dict[str, Any], where: str) -> dict[str, Any]:
    """What a training config tells of the loss, as arguments of ours; nothing of a finished SAE's config.

    Raises:
      InputError: a number that is none, an unknown mode of the penalty, widths that are no whole numbers.
    """
    name = cfg["architecture"]
    told = {theirs: ours for theirs, ours in TOLD.get(name, {}).items() if cfg.get(theirs) is not None}
    found: dict[str, Any] = {ours: _number(cfg, theirs, where) for theirs, ours in told.items()}
    if name == "standard" and "lp_norm" in cfg:
        found |= {"p": _number(cfg, "lp_norm", where), "lp_root": True}
    if name == "jumprelu" and "jumprelu_sparsity_loss_mode" in cfg:
        mode = cfg["jumprelu_sparsity_loss_mode"]
        known = isinstance(mode, str) and mode in PENALTIES
        require(known, f"{where}: a penalty of the mode {mode!r} is not known, only {', '.join(PENALTIES)}")
        found["penalty"] = PENALTIES[mode]
        found["ste_to_input"] = cfg.get("jumprelu_ste_to_input", False) is True
        if mode == "quadratic":
            found["target_l0"] = _number(cfg, "target_l0", where)
    if name in ("batchtopk", "matryoshka_batchtopk"):
        found["k"] = _number(cfg, "k", where)
        if "topk_threshold_lr" in cfg:
            found["threshold_decay"] = 1 - _number(cfg, "topk_threshold_lr", where)
    if name == "matryoshka_batchtopk":
        widths: Any = cfg.get("matryoshka_widths")
        whole = isinstance(widths, list) and len(widths) > 0 and all(type(width) is int for width in widths)
        require(whole, f"{where} must give matryoshka_widths as whole numbers")
        found["prefixes"] = tuple(widths) if widths[-1] == cfg["d_sae"] else (*widths, cfg["d_sae"])
    return found


def with_threshold(weights: Tensors) -> Tensors:
    """The threshold under its name of today, and not in double precision, in which a trainer averages it."""
    weights = dict(weights)
    if "log_threshold" in weights:
        weights["threshold"] = np.exp(weights.pop("log_threshold"))
    if "topk_threshold" in weights and "W_dec" in weights:
        exact = jnp.promote_types(weights["W_dec"].dtype, jnp.float32)
        weights["threshold"] = weights.pop("topk_threshold").astype(exact)
    return weights


def normalisation(sae: SAE, name: str, normalised: Any, place: Place) -> Normalisation | None:
    """What rows of that SAE are normalised by.

    Args:
      sae: without it.
      name: SAELens's name of its architecture.
      normalised: SAELens's `normalize_activations`.
      place: the folder, with what the trainer wrote of its scaler.

    Returns:
      None for nothing, a layer norm, or an affine map.

    Raises:
      InputError: a normalisation that is not read here, a scaler that is missing or damaged.
    """
    refused = f"inputs of a {name!r} are normalised by {normalised!r}, which is not read here"
    if normalised == "none":
        return None
    if normalised == "layer_norm":
        # SAELens's skip connection takes x as it is
        require(not sae.config.get("skip", False), refused)
        return layer_norm
    affine = normalised in ("expected_average_only_in", "covariance_whitening")
    require(affine and "d_out" not in sae.config, refused)
    scales = normalised == "expected_average_only_in"
    file = SCALER if scales else WHITENING
    require(place.has(file), f"{refused} without the trainer's {file}")
    return (_scale if scales else _whitening)(place, sae.config["d_in"])


def on_raw_rows(sae: SAE, params: Params, normalisation: Normalisation | None) -> Folded:
    """The SAE of rows that nothing has normalised: with the features that it has of normalised ones."""
    if normalisation is None:
        return sae, params
    if isinstance(normalisation, LayerNorm):
        return layer_normed(sae), params
    return fold(sae, params, normalisation)


def _scale(place: Place, d_in: int) -> Affine:
    factor = _number(place.json(SCALER), "scaling_factor", SCALER)
    require(factor > 0, f"{SCALER} must give a scaling_factor above 0, got {factor}")
    return identity(d_in)._replace(matrix=np.asarray(factor), inverse=np.asarray(1 / factor))


def _whitening(place: Place, d_in: int) -> Affine:
    found = place.safetensors(WHITENING)
    for name, shape in {"mean": (d_in,), "matrix": (d_in, d_in), "inverse_matrix": (d_in, d_in)}.items():
        fits = (
            name in found and found[name].shape == shape and jnp.issubdtype(found[name].dtype, jnp.floating)
        )
        require(fits, f"{WHITENING} must hold {name} {list(shape)}, floating point")
    return Affine(found["mean"], found["matrix"], found["inverse_matrix"])


def _number(document: dict[str, Any], key: str, where: str) -> float:
    value: Any = document.get(key)
    finite = type(value) in (int, float) and abs(value) < LARGEST
    require(finite, f"{where} must give {key} as a number, got {value!r}")
    return value
