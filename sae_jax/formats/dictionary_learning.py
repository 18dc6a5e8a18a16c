"""dictionary_learning: a folder `trainer_i` of `ae.pt`, a PyTorch state dict, and `config.json`.

Weights of `nn.Linear` layers lie [out, in], bare parameters as ours. `JumpReluAutoEncoder` and
`AutoEncoderNew` take x as it is, the others subtract their bias. `k` is an int32 and `threshold` a float32
scalar. A BatchTopK encodes by its threshold; a TopK by its k, and by its threshold only where asked to.
"""

from functools import partial
from typing import Any, NamedTuple

import numpy as np

from sae_jax import auxk
from sae_jax.architectures.matryoshka import matryoshka
from sae_jax.base import SAE, InputError, require
from sae_jax.folds import fold_b_dec, inner, kind, plain_sae
from sae_jax.formats import files
from sae_jax.formats.described import DESCRIPTION, LEAVES
from sae_jax.formats.files import Place
from sae_jax.formats.format import Form, Format, Loaded, fitted, keys
from sae_jax.layer_norm import is_layer_normed

WEIGHTS, CONFIG, CHECKPOINTS = "ae.pt", "config.json", "checkpoints"
OURS, TOPK_THRESHOLD = "dictionary_learning", "topk_threshold"
"""Keys of our metadata."""
CARRIED = (DESCRIPTION, LEAVES, "metadata")
"""Keys of the config that the library passes over."""


class DictClass(NamedTuple):
    """A class of the library."""

    kind: str
    """What it is here, a key of `folds.WITHOUT_PENALTY`."""
    names: dict[str, str]
    """Our leaves to its tensors; `.T` says that the tensor is transposed there."""
    arguments: dict[str, Any]
    """What its trainers judge by, or how its features are made."""
    buffers: tuple[str, ...] = ()
    """Tensors that it has beside those; `group_sizes` always, the others since some version."""

    @property
    def tensors(self) -> set[str]:
        """Those that it never goes without."""
        return {_tensor(name) for name in self.names.values()} | {"group_sizes"} & {*self.buffers}


LINEAR = {"W_enc": "encoder.weight.T", "W_dec": "decoder.weight.T"}
BIASED = {**LINEAR, "b_enc": "encoder.bias"}
THRESHOLDED = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
L1 = {"mean_features": False, "apply_b_dec_to_input": True}
AUXK = {"auxk": 1 / 32, "auxk_loss": auxk.normalised}

CLASSES = {
    "AutoEncoder": DictClass("relu", {**BIASED, "b_dec": "bias"}, L1),
    "AutoEncoderNew": DictClass(
        "relu",
        {**BIASED, "b_dec": "decoder.bias"},
        {**L1, "apply_b_dec_to_input": False, "decoder_norm_l1": True},
    ),
    "GatedAutoEncoder": DictClass(
        "gated",
        {**LINEAR, "b_gate": "gate_bias", "b_mag": "mag_bias", "r_mag": "r_mag", "b_dec": "decoder_bias"},
        {},
    ),
    "JumpReluAutoEncoder": DictClass("jumprelu", THRESHOLDED, {"apply_b_dec_to_input": False}),
    "AutoEncoderTopK": DictClass("topk", {**BIASED, "b_dec": "b_dec"}, AUXK, ("k", "threshold")),
    "BatchTopKSAE": DictClass(
        "batch_topk", {**BIASED, "b_dec": "b_dec", "threshold": "threshold"}, AUXK, ("k",)
    ),
    "MatryoshkaBatchTopKSAE": DictClass("batch_topk", THRESHOLDED, AUXK, ("k", "group_sizes")),
}
"""The classes that `load_dictionary` knows."""

WORDS = {
    "model_name": ("trainer", "lm_name"),
    "hook_name": ("trainer", "submodule_name"),
    "context_size": ("buffer", "ctx_len"),
}
"""SAELens's words, and where the config has them."""


def recognise(place: Place) -> bool:
    """Whether this is such a folder, or a PyTorch file of one of the classes."""
    name = _weights(place)
    return place.has(WEIGHTS, CONFIG) or (name is not None and bool(_classes_of(keys(place, name))))


def read(place: Place) -> Loaded:
    """A dictionary of any class, judged as its trainers do, its penalty's weight 0."""
    name = _weights(place)
    if name is None:
        raise InputError(f"{place.path} has no {WEIGHTS}")
    tensors, config, where = place.torch(name), _config(place), str(place.folder / name)
    trainer = _object(config, "trainer")
    dict_class = _class_told(trainer.get("dict_class"), set(tensors), where)
    one = CLASSES[dict_class]
    extra = tensors.keys() - one.tensors - {*one.buffers}
    require(not extra, f"{where} has tensors that no {dict_class} has: {', '.join(sorted(extra))}")
    leaves = {ours: _leaf(tensors, theirs, where) for ours, theirs in one.names.items()}
    require(
        leaves["W_enc"].ndim == 2, f"{where}: encoder weights must be a matrix, not {leaves['W_enc'].shape}"
    )
    arguments = dict(one.arguments)
    if "k" in one.buffers:
        arguments["k"] = _k(tensors, trainer, where)
    if one.kind == "relu" and trainer.get("trainer_class") == "StandardTrainerAprilUpdate":
        arguments["decoder_norm_l1"] = True
    d_in, d_sae = leaves["W_enc"].shape
    if "group_sizes" in one.buffers:
        prefixes = _prefixes(tensors.get("group_sizes"), where)
        weights = (len(prefixes) ** -2,) * len(prefixes)
        sae = matryoshka(d_in, d_sae, prefixes=prefixes, prefix_weights=weights, **arguments)
    else:
        sae = plain_sae(one.kind, d_in, d_sae, **arguments)
    params = fitted(sae, leaves, where)
    return Loaded(sae, params, _metadata(config) | _topk_threshold(one, tensors))


def form(loaded: Loaded) -> Form:
    """An SAE as `ae.pt` and `config.json`, in the class that computes the same."""
    sae, params = loaded.sae, loaded.params
    dict_class, groups = _class_for(sae, loaded.metadata)
    one = CLASSES[dict_class]
    sae, params = fold_b_dec(sae, params, one.arguments.get("apply_b_dec_to_input", True))
    state = {_tensor(theirs): _turned(params[ours], theirs) for ours, theirs in one.names.items()}
    trainer: dict[str, Any] = {
        "dict_class": dict_class,
        "activation_dim": sae.config["d_in"],
        "dict_size": sae.config["d_sae"],
    }
    if "k" in one.buffers:
        # the library wants it whole; a BatchTopK's features do not depend on it
        trainer["k"] = max(1, round(float(inner(sae.config)["k"])))
        state["k"] = np.asarray(trainer["k"], np.int32)
    if "threshold" in one.buffers:
        told = loaded.metadata.get(TOPK_THRESHOLD)
        state["threshold"] = np.asarray(told if type(told) is float else -1.0, np.float32)
    if "group_sizes" in one.buffers:
        state["group_sizes"] = np.asarray(groups, np.int64)
    config = _config_of(loaded.metadata, trainer)
    written = {WEIGHTS: partial(files.write_torch, state), CONFIG: partial(files.write_json, config)}
    return Form(written, ("its layer norm",) if is_layer_normed(sae) else ())


def _class_for(sae: SAE, metadata: dict[str, Any]) -> tuple[str, list[int]]:
    """The class that an SAE is there, and the group sizes of a Matryoshka."""
    held = "d_out" not in sae.config and kind(sae) != "crosscoder"
    require(held, f"dictionary_learning has no class for a {sae.config['architecture']}")
    if kind(sae) == "relu":
        return ("AutoEncoder" if inner(sae.config)["apply_b_dec_to_input"] else "AutoEncoderNew"), []
    described = metadata.get(DESCRIPTION)
    prefixes = described.get("prefixes") if isinstance(described, dict) else None
    if kind(sae) == "batch_topk" and prefixes:
        return "MatryoshkaBatchTopKSAE", np.diff([0, *prefixes]).tolist()
    return next(name for name, one in CLASSES.items() if one.kind == kind(sae)), []


def _weights(place: Place) -> str | None:
    names = place.ending(".pt")
    return WEIGHTS if WEIGHTS in names else names[0] if len(names) == 1 else None


def _config(place: Place) -> dict[str, Any]:
    """The config beside the weights, or of the run whose checkpoint they are; empty where there is none."""
    beside = place.beside(CONFIG)
    if not beside.is_file and place.folder.name == CHECKPOINTS:
        beside = Place(place.folder.parent / CONFIG)
    return beside.json(CONFIG) if beside.is_file else {}


def _classes_of(names: set[str]) -> list[str]:
    """The classes that have just these tensors."""
    return [name for name, one in CLASSES.items() if one.tensors <= names <= one.tensors | {*one.buffers}]


def _class_told(told: Any, names: set[str], where: str) -> str:
    """The class that the config tells, or else the one that has these tensors."""
    if told is not None:
        known = isinstance(told, str) and told in CLASSES
        require(known, f"{CONFIG}: dict_class {told!r} is not read here, only {', '.join(CLASSES)}")
        return told
    possible = _classes_of(names)
    require(bool(possible), f"{where} has the tensors of no class known here: {', '.join(sorted(names))}")
    require(
        len(possible) == 1,
        f"{where} has no {CONFIG} beside it that tells dict_class, which could not be inferred: "
        f"its tensors are those of {' and '.join(possible)} alike",
    )
    return possible[0]


def _k(tensors: dict[str, Any], trainer: dict[str, Any], where: str) -> int:
    """k of the weights, of the config, or of both."""
    found = {
        _whole(source["k"], place) for source, place in ((tensors, where), (trainer, CONFIG)) if "k" in source
    }
    require(bool(found), f"{where} has no k, and no {CONFIG} tells it: k could not be inferred")
    require(len(found) == 1, f"{where} and {CONFIG} differ about k: {' and '.join(map(str, sorted(found)))}")
    return found.pop()


def _whole(value: Any, where: str) -> int:
    scalar = isinstance(value, np.ndarray) and value.ndim == 0 and value.dtype.kind in "iu"
    require(scalar or type(value) is int, f"{where} must give k as a whole number, got {str(value)[:50]}")
    return int(value)


def _prefixes(sizes: Any, where: str) -> tuple[int, ...]:
    whole = isinstance(sizes, np.ndarray) and sizes.ndim == 1 and sizes.size > 0 and sizes.dtype.kind in "iu"
    if not whole:
        raise InputError(f"{where}: group_sizes must be whole numbers in a row")
    return tuple(np.cumsum(sizes).tolist())


def _tensor(name: str) -> str:
    return name.removesuffix(".T")


def _turned(leaf: np.ndarray, name: str) -> np.ndarray:
    return leaf.T if name.endswith(".T") else leaf


def _leaf(tensors: dict[str, Any], name: str, where: str) -> np.ndarray:
    leaf = tensors.get(_tensor(name))
    if not isinstance(leaf, np.ndarray):
        raise InputError(f"{where} has no tensor {_tensor(name)}; it has: {', '.join(tensors) or 'none'}")
    return _turned(leaf, name)


def _topk_threshold(one: DictClass, tensors: dict[str, Any]) -> dict[str, float]:
    """A TopK's threshold, which its `encode` takes only where told to, and we never."""
    threshold = tensors.get("threshold") if "threshold" in one.buffers else None
    return (
        {TOPK_THRESHOLD: float(threshold)}
        if isinstance(threshold, np.ndarray) and threshold.ndim == 0
        else {}
    )


def _object(config: dict[str, Any], name: str) -> dict[str, Any]:
    """A part of the config, which need not be there."""
    part = config.get(name, {})
    require(isinstance(part, dict), f"{CONFIG}: {name} must be an object")
    return part


def _metadata(config: dict[str, Any]) -> dict[str, Any]:
    """What a config tells, in our words."""
    parts = {part: _object(config, part) for part, _ in WORDS.values()}
    told = {word: parts[part].get(name) for word, (part, name) in WORDS.items()}
    return {
        **_object(config, "metadata"),
        **{name: config[name] for name in (DESCRIPTION, LEAVES) if name in config},
        **{word: value for word, value in told.items() if value is not None},
        OURS: {name: value for name, value in config.items() if name not in CARRIED},
    }


def _config_of(metadata: dict[str, Any], trainer: dict[str, Any]) -> dict[str, Any]:
    """The config that `_metadata` came from, of the SAE that is written now."""
    told = metadata.get(OURS)
    config = dict(told) if isinstance(told, dict) else {}
    for word, (part, name) in WORDS.items():
        if word in metadata:
            config[part] = {**_object(config, part), name: metadata[word]}
    apart = {*CARRIED, *WORDS, OURS, TOPK_THRESHOLD}
    return {
        **config,
        "trainer": {**_object(config, "trainer"), **trainer},
        "metadata": {name: value for name, value in metadata.items() if name not in apart},
        **{name: metadata[name] for name in (DESCRIPTION, LEAVES) if name in metadata},
    }


FORMAT = Format(f"dictionary_learning ({WEIGHTS}, {CONFIG})", recognise, read, form, keeps_metadata=True)
