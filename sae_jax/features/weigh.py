"""What the weights of an SAE tell of its features."""

import importlib
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sae_jax.base import InputError, Params, require
from sae_jax.features.observed import Near, Weighed

AT_A_TIME = 512
"""Features that are held against all others, or all tokens, at once."""
NEIGHBOURS = 15
"""That UMAP looks at, its own default."""


def weigh(
    params: Params,
    *,
    near: int = 10,
    tokens: int = 10,
    unembedding: Float[Array | np.ndarray, "d_out vocabulary"] | None = None,
    others: Sequence[Params] = (),
    projection: Literal["pca", "umap"] = "pca",
) -> Weighed:
    """What the weights tell of every feature: its neighbours, its place among all, what it writes.

        near        cos(W_dec_i, W_dec_j)
        cosine      cos(W_enc_i, W_dec_i)
        again       mean over other seeds s of  max_j cos(W_dec_i, W_dec^s_j)
        promoted    largest of  W_dec_i unembedding;  suppressed: the smallest

    Args:
      params: of an SAE with decoder rows `W_dec` [d_sae, d_out].
      near: how many neighbours to name.
      tokens: how many tokens to name at either end.
      unembedding: what a decoder row adds to the logits, with the scale of the last norm in it; None for no
        tokens.
      others: SAEs that differ from this one by their seed.
      projection: of unit decoder rows to the plane: their first two principal components, or UMAP (of the
        package umap-learn) by cosine.

    Returns:
      `Weighed`. Rows of norm 0 have cosine 0 with everything.

    Raises:
      InputError: no `W_dec`, another width of the unembedding or of an other SAE, umap-learn not installed.

    Example:
      >>> weigh(trained.params).near.places[123]
    """
    require("W_dec" in params, "there are no decoder rows W_dec to look at")
    require(projection in PROJECTIONS, f"projection is one of {', '.join(PROJECTIONS)}, got {projection!r}")
    W_dec = _flat(params["W_dec"])
    norm = jnp.linalg.norm(W_dec, axis=1)
    rows = _unit(W_dec)
    promoted, suppressed = (None, None) if unembedding is None else _written(W_dec, unembedding, tokens)
    return Weighed(
        np.asarray(norm),
        _alignment(params, rows),
        _neighbours(rows, min(near, len(rows) - 1)),
        PROJECTIONS[projection](np.asarray(rows)),
        None if len(others) == 0 else np.mean([_again(rows, _flat(one["W_dec"])) for one in others], axis=0),
        promoted,
        suppressed,
    )


def _flat(W_dec) -> Float[Array, "d_sae width"]:
    """A crosscoder's rows of all its sources one after another."""
    W_dec = jnp.asarray(W_dec, jnp.float32)
    return W_dec.reshape(len(W_dec), -1)


def _product(a: Array, b: Array) -> Array:
    """In float32 on every device: figures are shown to three digits and more."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _unit(rows: Float[Array, "d_sae width"]) -> Float[Array, "d_sae width"]:
    norm = jnp.linalg.norm(rows, axis=1, keepdims=True)
    return jnp.where(norm > 0, rows / jnp.where(norm > 0, norm, 1), 0)


def _alignment(params: Params, rows: Float[Array, "d_sae width"]) -> Float[np.ndarray, "d_sae"] | None:
    """None without an encoder of the decoder's shape, as of most transcoders."""
    if "W_enc" not in params:
        return None
    W_enc = jnp.asarray(params["W_enc"], jnp.float32)
    W_enc = jnp.moveaxis(W_enc, -1, 0).reshape(W_enc.shape[-1], -1)
    return np.asarray((_unit(W_enc) * rows).sum(axis=1)) if W_enc.shape == rows.shape else None


def _neighbours(rows: Float[Array, "d_sae width"], near: int) -> Near:
    found = []
    for start in range(0, len(rows), AT_A_TIME):
        own = np.arange(start, min(start + AT_A_TIME, len(rows)))
        found.append(jax.tree.map(np.asarray, _nearest(rows[own], rows, own, near)))
    values, places = (np.concatenate(each) for each in zip(*found, strict=True))
    return Near(places, values)


@jax.jit(static_argnames=("near",))
def _nearest(some, rows, own, near):
    cosines = _product(some, rows.T)
    return jax.lax.top_k(jnp.where(own[:, None] == jnp.arange(len(rows)), -2, cosines), near)


def _again(rows: Float[Array, "d_sae width"], other: Float[Array, "_ width"]) -> Float[np.ndarray, "d_sae"]:
    require(
        rows.shape[1] == other.shape[1],
        f"decoder rows are {rows.shape[1]} wide, those of another seed {other.shape[1]}",
    )
    theirs = _unit(other)
    parts = [rows[start : start + AT_A_TIME] for start in range(0, len(rows), AT_A_TIME)]
    return np.concatenate([np.asarray(_product(part, theirs.T).max(axis=1)) for part in parts])


def _written(W_dec: Array, unembedding, tokens: int) -> tuple[Near, Near]:
    unembedding = jnp.asarray(unembedding, jnp.float32)
    fits = unembedding.ndim == 2 and unembedding.shape[0] == W_dec.shape[1]
    require(
        fits,
        f"an unembedding is [{W_dec.shape[1]}, vocabulary] for these rows, got {list(unembedding.shape)}",
    )
    tokens = min(tokens, unembedding.shape[1])
    ends = []
    for start in range(0, len(W_dec), AT_A_TIME):
        logits = _product(W_dec[start : start + AT_A_TIME], unembedding)
        ends.append([jax.tree.map(np.asarray, jax.lax.top_k(each, tokens)) for each in (logits, -logits)])
    (most, which), (least, others) = (
        tuple(np.concatenate(each) for each in zip(*end, strict=True)) for end in zip(*ends, strict=True)
    )
    return Near(which, most), Near(others, -least)


def _pca(rows: Float[np.ndarray, "d_sae width"]) -> Float[np.ndarray, "d_sae 2"]:
    centred = rows - rows.mean(axis=0)
    _, directions = np.linalg.eigh(centred.T @ centred)
    place = centred @ directions[:, :-3:-1]
    # a direction's sign is arbitrary: its largest entry is made positive, so that the map is always the same
    if place.shape[1] < 2:
        place = np.pad(place, [(0, 0), (0, 2 - place.shape[1])])
    signs = np.sign(place[np.abs(place).argmax(axis=0), [0, 1]])
    return place * np.where(signs == 0, 1, signs)


def _umap(rows: Float[np.ndarray, "d_sae width"]) -> Float[np.ndarray, "d_sae 2"]:
    try:
        umap = importlib.import_module("umap")
    except ImportError:
        raise InputError("UMAP is of the package umap-learn: pip install umap-learn") from None
    neighbours = min(NEIGHBOURS, len(rows) - 1)
    require(neighbours >= 2, f"UMAP needs at least 3 features, got {len(rows)}")
    return umap.UMAP(n_neighbors=neighbours, metric="cosine", random_state=0).fit_transform(rows)


PROJECTIONS = {"pca": _pca, "umap": _umap}
