"""Our own description of an SAE, carried in another format's metadata: penalty, AuxK, prefixes and all.

What was written here so comes back as it was. A file whose weights were changed since is read by what it
says itself.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax.architectures import build, describe
from sae_jax.base import SAE, InputError, Params, require
from sae_jax.folds import batch_topk_as_jumprelu, fold_b_dec, inner, kind, plain
from sae_jax.formats.format import Loaded
from sae_jax.layer_norm import is_layer_normed, layer_normed

DESCRIPTION, LEAVES = "sae_jax", "sae_jax_leaves"
"""Keys of the metadata."""
NEVER_IN_FILES = ("log_penalty", "log_threshold")


def description(sae: SAE, params: Params) -> dict[str, Any]:
    """What `restored` needs beside the plain weights, in values that JSON can hold.

    Raises:
      InputError: arguments that JSON cannot hold.
    """
    leaves = {name: np.asarray(params[name]) for name in NEVER_IN_FILES if name in params}
    if kind(sae) == "batch_topk":
        leaves["threshold"] = np.asarray(params["threshold"])
    return {
        DESCRIPTION: describe(sae.config),
        LEAVES: {
            name: {"dtype": str(leaf.dtype), "values": _listed(leaf.astype(np.float64).tolist())}
            for name, leaf in leaves.items()
        },
    }


def restored(loaded: Loaded) -> Loaded:
    """The SAE as it was described, with the file's weights.

    Args:
      loaded: what a format read, `metadata` with what `description` gave.

    Returns:
      The SAE described, or `loaded` where nothing is described or the weights are of another SAE now; the
      description is gone from its metadata.

    Raises:
      InputError: a description that is none.
    """
    told = {name: loaded.metadata.get(name) for name in (DESCRIPTION, LEAVES)}
    rest = {name: value for name, value in loaded.metadata.items() if name not in told}
    plainly = loaded._replace(metadata=rest)
    if not isinstance(told[DESCRIPTION], dict):
        return plainly
    leaves = told[LEAVES] or {}
    require(isinstance(leaves, dict), f"{LEAVES} must be an object")
    sae = built(told[DESCRIPTION])
    with _understood():
        params = _params(sae, leaves, plainly)
        same = params is not None and _same(plain(sae, params), plainly)
    return plainly._replace(sae=sae, params=params) if same and params is not None else plainly


def built(description: Any) -> SAE:
    """The SAE that `description` described.

    Raises:
      InputError: a description that is none.
    """
    require(isinstance(description, dict), f"{DESCRIPTION} must be an object")
    arguments = dict(description)
    normalised = arguments.pop("normalize_activations", "none")
    with _understood():
        for name in ("d_in", "d_sae"):
            require(type(arguments.get(name)) is int, f"it must give {name} as a whole number")
        sae = build(arguments)
        return layer_normed(sae) if normalised == "layer_norm" else sae


@contextmanager
def _understood() -> Iterator[None]:
    """The metadata may say anything, and no factory is written to bear all of it."""
    try:
        yield
    except (InputError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{DESCRIPTION} does not describe an SAE known here: {reason}") from None


def _params(sae: SAE, leaves: dict[str, Any], loaded: Loaded) -> Params | None:
    """Its weights out of the file's and the description's; None where they do not fit."""
    weights = loaded.params
    subtracts = inner(sae.config).get("apply_b_dec_to_input")
    between = any("d_out" in one.config for one in (sae, loaded.sae))
    if subtracts is not None and not between and kind(loaded.sae) != "crosscoder":
        weights = fold_b_dec(loaded.sae, loaded.params, subtracts)[1]
    shapes = jax.eval_shape(lambda: sae.init(jax.random.key(0)))
    found = {name: _unlisted(name, leaves[name]) if name in leaves else weights.get(name) for name in shapes}
    fits = all(leaf is not None and leaf.shape == shapes[name].shape for name, leaf in found.items())
    return found if fits else None


def _same(described: tuple[SAE, Params], loaded: Loaded) -> bool:
    """Whether both compute the same, up to what another machine's exp and a fold of b_dec may round."""
    (ours, params), (theirs, weights) = (
        batch_topk_as_jumprelu(*pair) for pair in (described, (loaded.sae, loaded.params))
    )
    if kind(ours) != kind(theirs) or is_layer_normed(ours) != is_layer_normed(theirs):
        return False
    if any(ours.config.get(name) != theirs.config.get(name) for name in ("d_out", "skip", "sources")):
        return False
    if inner(ours.config).get("k") != inner(theirs.config).get("k"):
        return False
    subtracts = inner(ours.config).get("apply_b_dec_to_input")
    moved = subtracts != inner(theirs.config).get("apply_b_dec_to_input")
    if moved and subtracts is not None:
        theirs, weights = fold_b_dec(theirs, weights, subtracts)
    return params.keys() == weights.keys() and all(_close(params[name], weights[name]) for name in weights)


def _close(ours: np.ndarray, theirs: np.ndarray) -> bool:
    if ours is theirs:
        return True
    tolerance = 4 * float(jnp.finfo(theirs.dtype).eps)
    wide = ours.astype(np.float64), theirs.astype(np.float64)
    return ours.shape == theirs.shape and np.allclose(*wide, rtol=tolerance, atol=0, equal_nan=True)


def _listed(value: Any) -> Any:
    """As JSON: numbers, and names for those that JSON does not have."""
    if isinstance(value, list):
        return [_listed(entry) for entry in value]
    return value if math.isfinite(value) else str(value)


def _unlisted(name: str, listed: Any) -> np.ndarray:
    try:
        values = np.asarray(listed["values"]).astype(np.float64)
        dtype = jnp.dtype(listed["dtype"])
    except (TypeError, ValueError, KeyError):
        raise InputError(f"the leaf {name} must be a dtype and values, numbers or a list of them") from None
    require(jnp.issubdtype(dtype, jnp.floating), f"the leaf {name} must be floating point, got {dtype}")
    return values.astype(dtype)
