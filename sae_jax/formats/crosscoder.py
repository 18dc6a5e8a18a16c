"""ckkissane's crosscoder: `cfg.json` and `cc_weights.pt`, or `N_cfg.json` and `N.pt` of a run.

Tensors: W_enc [sources, d_in, d_sae], b_enc [d_sae], W_dec [d_sae, sources, d_in], b_dec [sources, d_in].
"""

from functools import partial

import numpy as np

from sae_jax.architectures import find
from sae_jax.base import require
from sae_jax.folds import kind
from sae_jax.formats import files
from sae_jax.formats.files import Place
from sae_jax.formats.format import CARRIED, Form, Format, Loaded, fitted, keys, told_by
from sae_jax.layer_norm import is_layer_normed

CONFIG, WEIGHTS = "cfg.json", "cc_weights.pt"
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")
OURS = "crosscoder"
WORDS = {"model_name": "model_name", "hook_point": "hook_name"}
"""The config's, and SAELens's."""
DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
DEFAULTS = {"seed": 0, "dec_init_norm": 0.08, "device": "cpu"}
"""What the module's constructor asks for."""


def recognise(place: Place) -> bool:
    """Whether this is such a file, or a folder with one."""
    names = place.ending(".pt")
    if len(names) != 1 or not {"W_enc", "W_dec"} <= keys(place, names[0]):
        return False
    return np.ndim(place.torch(names[0])["W_enc"]) == 3


def read(place: Place) -> Loaded:
    """A crosscoder; the tensors tell all that it computes."""
    name = place.ending(".pt")[0]
    where, state = str(place.folder / name), place.torch(name)
    tensors = {key: leaf for key, leaf in state.items() if isinstance(leaf, np.ndarray)}
    extra = state.keys() - set(NAMES)
    require(not extra, f"{where} has entries that a crosscoder has not: {', '.join(sorted(extra))}")
    require("W_enc" in tensors, f"{where} has no tensor W_enc")
    sources, d_in, d_sae = tensors["W_enc"].shape
    require(min(sources, d_in, d_sae) > 0, f"{where}: W_enc is empty, {tensors['W_enc'].shape}")
    sae = find("crosscoder")(d_in, d_sae, sources=sources, l1=0.0)
    beside = place.beside(CONFIG if name == WEIGHTS else f"{name.removesuffix('.pt')}_{CONFIG}")
    cfg = beside.json(beside.path.name) if beside.is_file else {}
    return Loaded(sae, fitted(sae, tensors, where), told_by(cfg, OURS, WORDS))


def form(loaded: Loaded) -> Form:
    """A crosscoder in ckkissane's layout."""
    sae, params = loaded.sae, loaded.params
    require(kind(sae) == "crosscoder", f"the crosscoder layout does not hold a {kind(sae)}")
    told, dtype = loaded.metadata.get(OURS), str(params["W_enc"].dtype)
    cfg = {
        **DEFAULTS,
        **(told if isinstance(told, dict) else {}),
        "d_in": sae.config["d_in"],
        "dict_size": sae.config["d_sae"],
        "n_models": sae.config["sources"],
        "enc_dtype": DTYPES.get(dtype, "fp32"),
        CARRIED: {name: value for name, value in loaded.metadata.items() if name != OURS},
    }
    written = {WEIGHTS: partial(files.write_torch, dict(params)), CONFIG: partial(files.write_json, cfg)}
    return Form(written, ("its layer norm",) if is_layer_normed(sae) else ())


FORMAT = Format(f"ckkissane's crosscoder ({CONFIG}, {WEIGHTS})", recognise, read, form, keeps_metadata=True)
