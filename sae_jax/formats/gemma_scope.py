"""Gemma Scope: one `params.npz`.

Tensors: W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_out], b_dec [d_out], threshold [d_sae]. JumpReLU
without `b_dec` subtracted from the input: f = ReLU(pi) H(pi - threshold). No config. Its transcoders have the
same tensors; where they are as wide at both ends nothing tells them from SAEs, and both compute the same.

Source: Lieberum et al. 2024 (arXiv 2408.05147).
"""

from functools import partial

import ml_dtypes
import numpy as np

from sae_jax.base import InputError, require
from sae_jax.folds import as_jumprelu, fold_b_dec, plain_sae
from sae_jax.formats import files
from sae_jax.formats.files import Place
from sae_jax.formats.format import Form, Format, Loaded, fitted
from sae_jax.layer_norm import is_layer_normed

WEIGHTS = "params.npz"
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")


def recognise(place: Place) -> bool:
    """Whether this is such a file, or a folder with one."""
    names = place.ending(".npz")
    if len(names) != 1:
        return False
    try:
        return {"W_enc", "W_dec"} <= place.npz(names[0]).keys()
    except InputError:
        return names == [WEIGHTS]


def read(place: Place) -> Loaded:
    """A JumpReLU, or a transcoder of one where input and output differ in width."""
    name = place.ending(".npz")[0]
    tensors, where = place.npz(name), str(place.folder / name)
    d_in, d_sae, d_out = sizes(tensors["W_enc"], tensors["W_dec"], where)
    sae = plain_sae("jumprelu", d_in, d_sae, d_out=None if d_in == d_out else d_out)
    extra = tensors.keys() - set(NAMES)
    require(not extra, f"{where} has arrays that a Gemma Scope SAE has not: {', '.join(sorted(extra))}")
    return Loaded(sae, fitted(sae, tensors, where), {})


def form(loaded: Loaded) -> Form:
    """Whatever is a JumpReLU, as Gemma Scope's."""
    sae, params = as_jumprelu(loaded.sae, loaded.params)
    if "d_out" not in sae.config:
        sae, params = fold_b_dec(sae, params, False)
    lost = [phrase for phrase, there in (
        ("its layer norm", is_layer_normed(sae)), ("its skip connection", "W_skip" in params)
    ) if there]  # fmt: skip
    tensors = {name: _wide(params[name]) for name in NAMES}
    return Form({WEIGHTS: partial(files.write_npz, tensors)}, tuple(lost))


def sizes(W_enc: np.ndarray, W_dec: np.ndarray, where: str) -> tuple[int, int, int]:
    """d_in, d_sae and d_out of an encoder [d_in, d_sae] and a decoder [d_sae, d_out]."""
    both = W_enc.ndim == W_dec.ndim == 2 and W_enc.shape[1] == W_dec.shape[0] and min(W_enc.shape) > 0
    told = f"encoder {W_enc.shape} and decoder {W_dec.shape}"
    require(both, f"{where}: {told} must be [d_in, d_sae] and [d_sae, d_out]")
    return W_enc.shape[0], W_enc.shape[1], W_dec.shape[1]


def _wide(leaf: np.ndarray) -> np.ndarray:
    """numpy's files have no bfloat16; float32 holds each of its values."""
    return leaf.astype(np.float32) if leaf.dtype == ml_dtypes.bfloat16 else leaf


FORMAT = Format(f"Gemma Scope ({WEIGHTS})", recognise, read, form, keeps_metadata=False)
