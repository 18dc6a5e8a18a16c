"""openai's sparse_autoencoder: one `.pt` state dict.

Tensors: pre_bias [d_in], encoder.weight [d_sae, d_in], latent_bias [d_sae], decoder.weight [d_in, d_sae]
(where tied, decoder.linear.weight, the encoder's), three buffers of statistics, and beside them "activation"
("TopK" or "ReLU") and "activation_state_dict" (k, postact_fn). `pre_bias` is subtracted from the input and
added to the output. A TopK stands behind a layer norm of each row, a ReLU does not.

Source: Gao et al. 2024 (arXiv 2406.04093) and its code.
"""

from functools import partial
from typing import Any

import numpy as np

from sae_jax import auxk, losses
from sae_jax.base import require
from sae_jax.folds import fold_b_dec, inner, jumprelu_as_relu, kind, plain_sae
from sae_jax.formats import files
from sae_jax.formats.files import Place
from sae_jax.formats.format import Form, Format, Loaded, fitted, keys
from sae_jax.layer_norm import is_layer_normed

WEIGHTS = "autoencoder.pt"
NAMES = {"W_enc": "encoder.weight", "b_enc": "latent_bias", "W_dec": "decoder.weight", "b_dec": "pre_bias"}
TRANSPOSED = ("W_enc", "W_dec")
TIED = "decoder.linear.weight"
STATISTICS = {
    "stats_last_nonzero": (np.zeros, np.int64),
    "latents_activation_frequency": (np.ones, np.float32),
    "latents_mean_square": (np.zeros, np.float32),
}
"""Buffers of which a new module has these; its strict loader wants them."""
LOSSES: dict[str, dict[str, Any]] = {
    "TopK": {"auxk": 0.0, "auxk_loss": auxk.fvu, "reconstruction": losses.unexplained},
    "ReLU": {"mean_features": False},
}


def recognise(place: Place) -> bool:
    """Whether this is such a file, or a folder with one."""
    names = place.ending(".pt", ".pth")
    return len(names) == 1 and {"pre_bias", "latent_bias"} <= keys(place, names[0])


def read(place: Place) -> Loaded:
    """A ReLU SAE, or a TopK behind a layer norm."""
    name = place.ending(".pt", ".pth")[0]
    state, where = place.torch(name), str(place.folder / name)
    tensors = {key: leaf for key, leaf in state.items() if isinstance(leaf, np.ndarray)}
    if TIED in tensors:
        tensors["decoder.weight"] = tensors.pop(TIED).T
    extra = tensors.keys() - set(NAMES.values()) - STATISTICS.keys()
    require(not extra, f"{where} has tensors that are not known here: {', '.join(sorted(extra))}")
    for key in NAMES.values():
        require(key in tensors, f"{where} has no tensor {key}; it has: {', '.join(tensors) or 'none'}")
    leaves = {ours: _turned(ours, tensors[theirs]) for ours, theirs in NAMES.items()}
    require(leaves["W_enc"].ndim == 2, f"{where}: encoder.weight must be [d_sae, d_in]")
    activation = state.get("activation", "ReLU")
    known = isinstance(activation, str) and activation in LOSSES
    require(known, f"{where}: activation {str(activation)[:50]!r} is not read here, only TopK and ReLU")
    arguments: dict[str, Any] = {**LOSSES[activation], "apply_b_dec_to_input": True}
    if activation == "TopK":
        arguments |= {"k": _k(state.get("activation_state_dict"), where), "layer_norm": True}
    sae = plain_sae(activation.lower(), *leaves["W_enc"].shape, **arguments)
    return Loaded(sae, fitted(sae, leaves, where), {})


def form(loaded: Loaded) -> Form:
    """A ReLU SAE or a TopK as openai's state dict."""
    sae, params = loaded.sae, loaded.params
    if kind(sae) == "jumprelu":
        sae, params = jumprelu_as_relu(sae, params)
    fits = kind(sae) in ("relu", "topk") and "d_out" not in sae.config
    require(
        fits, f"openai's autoencoder is a ReLU or TopK SAE, not a {sae.config['architecture']} of {kind(sae)}"
    )
    sae, params = fold_b_dec(sae, params, True)
    state = {NAMES[name]: _turned(name, leaf) for name, leaf in params.items()}
    statistics = {name: fill(sae.config["d_sae"], dtype) for name, (fill, dtype) in STATISTICS.items()}
    if kind(sae) == "topk":
        activation = {"k": int(inner(sae.config)["k"]), "postact_fn": "ReLU"}
        lost = () if is_layer_normed(sae) else ("that no layer norm stands before it",)
        told = {"activation": "TopK", "activation_state_dict": activation}
    else:
        lost = ("its layer norm",) if is_layer_normed(sae) else ()
        told = {"activation": "ReLU", "activation_state_dict": {}}
    return Form({WEIGHTS: partial(files.write_torch, {**state, **statistics, **told})}, lost)


def _k(activation: Any, where: str) -> int:
    require(isinstance(activation, dict), f"{where}: activation_state_dict must tell k and postact_fn")
    after = activation.get("postact_fn", "ReLU")
    require(after == "ReLU", f"{where}: postact_fn {str(after)[:50]!r} is not read here, only ReLU")
    k = activation.get("k")
    require(type(k) is int, f"{where}: activation_state_dict must give k as a whole number")
    return k


def _turned(name: str, leaf: np.ndarray) -> np.ndarray:
    return leaf.T if name in TRANSPOSED else leaf


FORMAT = Format(
    "openai's state dict (.pt with pre_bias, latent_bias)", recognise, read, form, keeps_metadata=False
)
