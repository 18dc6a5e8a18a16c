"""What an SAE finds of features that are known: from its decoder, and from when its latents fire.

Firing is counted on the device, one batch at a time; counts over batches are summed on the host in float64.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sae_jax.base import SAE, Batch, InputError, Params, require
from sae_jax.metrics.matching import cosines, mcc_of, mmcs_learned_of, mmcs_of, uniqueness_of, unit

RECOVERED = 0.9
"""The cosine above which a true feature counts as recovered."""

REPRESENTED = 0.4
"""Absorption is asked about where child and parent each have a latent with a cosine above this.

A latent that holds a feature and the three above it in equal parts has cosine .5 with each.
"""

ROOM = 2**27
"""Bytes of flags, one for each row and each latent or pair, that members counted side by side may fill."""


@runtime_checkable  # the tests check annotations as they run
class Known(Protocol):
    """What is asked of a world: `synthetic.World` has it."""

    @property
    def directions(self) -> Float[Array, "features d_in"]:
        """Of the true features."""
        ...

    @property
    def forest(self) -> Any:
        """None, or what has `parents`: the parent of each feature, -1 for none."""
        ...

    def labelled(self, rows: int) -> Iterator[tuple[Batch, Float[Array, "rows features"]]]:
        """Held-out batches with the amounts that they are made of."""
        ...


class Matches(NamedTuple):
    """Which latent and which true feature belong together, of one dictionary."""

    feature: Int[np.ndarray, "d_sae"]
    """The true feature of largest |cosine| with each latent."""
    latent: Int[np.ndarray, "features"]
    """The latent of largest signed cosine with each true feature."""
    cosine: Float[np.ndarray, "features"]
    """That cosine."""
    hedged: Float[np.ndarray, "d_sae"]
    """See `hedged`."""


class Pairs(NamedTuple):
    """Each child of a hierarchy with its parent."""

    child: Int[np.ndarray, "pairs"] | Int[Array, "pairs"]
    parent: Int[np.ndarray, "pairs"] | Int[Array, "pairs"]
    inner: Int[np.ndarray, "parents"] | Int[Array, "parents"]
    """The parents, each once."""
    place: Int[np.ndarray, "pairs"] | Int[Array, "pairs"]
    """Where the pair's parent stands among them."""


class Counts(NamedTuple):
    """Numbers of rows."""

    present: Any  # [features]
    alone: Any  # [parents]: the parent is present and none of its children
    broken: Any  # [members]: values that are not finite
    fired: Any  # [members, d_sae]
    true: Any  # [members, d_sae]: the latent fires and its feature is present
    absorbed: Any  # [members, pairs]: the child is present, its latent fires, its parent's is silent
    silent: Any  # [members, parents]: the parent is alone and its latent silent


def recover(sae: SAE, params: Params, world: Known, rows: int = 65_536) -> dict[str, np.ndarray]:
    """What one SAE finds of a world's features; see `recovered_by` for the definitions.

    Args:
      sae: the model.
      params: its weights.
      world: whose features are known.
      rows: about how many held-out rows to look at.

    Returns:
      float64 values by name.

    Raises:
      InputError: an SAE of another width than the world's.

    Example:
      >>> recover(*result.member(0), synthetic.matryoshka_tree())["f1"]
    """
    encode = partial(_encode, sae, params)
    found = recovered_by(np.asarray(params["W_dec"])[None], encode, world, rows)
    return {name: value.reshape(()) for name, value in found.items()}


def recovered_by(
    dictionaries: Float[np.ndarray, "members d_sae d_in"] | Float[Array, "members d_sae d_in"],
    encode: Callable[[Float[Array, "rows d_in"]], Float[Array, "members rows d_sae"]],
    world: Known,
    rows: int = 65_536,
) -> dict[str, Float[np.ndarray, "members"]]:
    """What each of several SAEs finds of a world's features.

    With c_ij the cosine of latent i's decoder row and true feature j, and b(i) = argmax_j |c_ij|:

        mmcs          mean over j of max_i c_ij               (Sharkey et al. 2022)
        mmcs_learned  mean over i of max_j c_ij               (HoagyC/sparse_coding)
        mcc           mean |c_ij| over the best one-to-one matching                       (SAELens)
        uniqueness    #{b(i)} / d_sae                                                     (SAELens)
        recovered     share of j with max_i c_ij > .9
        precision     mean over i of P(b(i) present | i fires)                            (SAELens)
        recall        mean over i of P(i fires | b(i) present)                            (SAELens)
        f1            mean over i of 2 precision_i recall_i / (precision_i + recall_i)    (SAELens)
        hedging       mean over i that fire at all of max_j |r_i . d_j|,
                      r_i = w_i - (w_i . d_b(i)) d_b(i),  w_i, d_j of unit length
        absorption    mean over pairs (parent p, child c) of
                      max(0, P(c's latent fires, p's is silent | c) - P(p's latent is silent | p alone))

    Latent i fires where f_i > 0, feature j is present where its amount is above 0. Precision, recall and f1
    of a latent are 0 where they are undefined, so that dead latents lower the means. Of absorption, a
    feature's latent is the one of largest signed cosine, p is alone where none of its children is present,
    and pairs count whose latents are two, fire at all and have cosines above .4.

    Args:
      dictionaries: decoder rows of each member.
      encode: the features of all members, f, on rows x.
      world: whose features are known.
      rows: about how many held-out rows to look at.

    Returns:
      float64 arrays by name. A member whose decoder or features are not finite has NaN everywhere;
      absorption is NaN without a hierarchy or a pair that counts.

    Raises:
      InputError: dictionaries of another width than the world's.

    Example:
      >>> recovered_by(result.params["W_dec"], encode, world)["mcc"]

    Source: besides those named, Chanin et al. 2024, "A is for absorption", and 2025, "Feature hedging", both
    adapted to features that are known.
    """
    dictionaries, truth = np.asarray(dictionaries), unit(world.directions)
    require(
        dictionaries.shape[-1] == truth.shape[-1],
        f"the world's rows have {truth.shape[-1]} columns, but the decoder gives {dictionaries.shape[-1]}",
    )
    of_decoders, matches = zip(*(_match(dictionary, truth) for dictionary in dictionaries), strict=True)
    match = Matches(*(np.stack(leaves) for leaves in zip(*matches, strict=True)))
    pairs = _pairs(world)
    total = None
    for batch, amounts in world.labelled(rows):
        counts = _count(encode(batch.x), amounts, match.feature, match.latent, pairs)
        counts = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), counts)
        total = counts if total is None else jax.tree.map(np.add, total, counts)
    if total is None:
        raise InputError("the world has no held-out rows to measure on")
    found = {name: np.array([one[name] for one in of_decoders]) for name in of_decoders[0]}
    found |= _classification(match, total) | {
        "hedging": _mean(match.hedged, total.fired > 0),
        "absorption": _absorption(match, total, pairs),
    }
    broken = (total.broken > 0) | ~np.isfinite(dictionaries).all(axis=(1, 2))
    return {name: np.where(broken, np.nan, value) for name, value in found.items()}


def hedged(
    dictionary: Float[np.ndarray, "d_sae d_in"],
    directions: Float[np.ndarray, "features d_in"],
    feature: Int[np.ndarray, "d_sae"],
) -> Float[np.ndarray, "d_sae"]:
    """How much of a second true feature each latent holds.

        max_j |r_i . d_j|,   r_i = w_i - (w_i . d_b(i)) d_b(i)

    What a latent holds beyond its own feature is measured after that feature's direction is taken out, so
    that a latent along a true feature has 0 whatever the angles between features; what it then holds of
    feature j counts by its part at right angles to its own.

    Args:
      dictionary: unit rows w.
      directions: unit vectors d.
      feature: b(i), of each latent.

    Returns:
      From 0 to 1; .707 of a latent that is two orthogonal features in equal parts. A row of noise has about
      sqrt(2 ln(features) / d_in).
    """
    own = directions[feature]
    rest = dictionary - (dictionary * own).sum(axis=1, keepdims=True) * own
    # by blocks of latents: all products at once would be as large again as the cosines
    blocks = np.array_split(rest, max(1, len(rest) // 512))
    return np.concatenate([np.abs(block @ directions.T).max(axis=1) for block in blocks])


def _match(dictionary: np.ndarray, truth: np.ndarray) -> tuple[dict[str, float], Matches]:
    """What the decoder alone says, and which latent belongs to which feature."""
    cosine = cosines(dictionary, truth)
    largest, feature = cosine.max(axis=0), np.abs(cosine).argmax(axis=1)
    alone = {
        "mmcs": mmcs_of(cosine),
        "mmcs_learned": mmcs_learned_of(cosine),
        "mcc": mcc_of(cosine),
        "uniqueness": uniqueness_of(cosine),
        "recovered": (largest > RECOVERED).mean(),
    }
    return alone, Matches(feature, cosine.argmax(axis=0), largest, hedged(unit(dictionary), truth, feature))


def _pairs(world: Known) -> Pairs:
    """Of a world without a hierarchy one feature with itself, which counts nowhere."""
    # at least one pair: lax.map in batches fails on leaves without elements (jax 0.10.1)
    parents = np.full(1, -1) if world.forest is None else np.asarray(world.forest.parents)
    parents = parents if (parents >= 0).any() else np.zeros(1, int)
    child = np.flatnonzero(parents >= 0)
    inner, place = np.unique(parents[child], return_inverse=True)
    return Pairs(child, parents[child], inner, place)


@jax.jit
def _count(f, amounts, feature, latent, pairs: Pairs) -> Counts:
    """The counts of one batch."""
    present = amounts > 0
    children = present.T[pairs.child].astype(jnp.int8)
    accompanied = jax.ops.segment_max(children, pairs.place, len(pairs.inner)).T > 0
    alone = present[:, pairs.inner] & ~accompanied

    def of_member(one):
        f, feature, latent = one
        fires = f > 0
        absorbed = (
            present[:, pairs.child]
            & fires[:, latent[pairs.child]]
            & ~fires[:, latent[pairs.parent]]
        )  # fmt: skip
        return (
            (~jnp.isfinite(f)).sum(),
            fires.sum(axis=0),
            (fires & present[:, feature]).sum(axis=0),
            absorbed.sum(axis=0),
            (alone & ~fires[:, latent[pairs.inner]]).sum(axis=0),
        )

    members, rows, d_sae = f.shape
    at_once = ROOM // (rows * max(d_sae, len(pairs.child)))
    of_members = jax.lax.map(of_member, (f, feature, latent), batch_size=max(1, min(at_once, members)))
    return Counts(present.sum(axis=0), alone.sum(axis=0), *of_members)


def _classification(match: Matches, total: Counts) -> dict[str, np.ndarray]:
    """Each latent as a detector of its feature, on average."""
    precision = total.true / np.maximum(total.fired, 1)
    recall = total.true / np.maximum(total.present[match.feature], 1)
    both = precision + recall
    f1 = 2 * precision * recall / np.where(both > 0, both, 1)
    latents = {"precision": precision, "recall": recall, "f1": f1}
    return {name: value.mean(axis=1) for name, value in latents.items()}


def _absorption(match: Matches, total: Counts, pairs: Pairs) -> np.ndarray:
    """The mean over the pairs that count of what the child's latent takes from its parent's."""
    child, alone = total.present[pairs.child], total.alone[pairs.place]
    usual = total.silent[:, pairs.place] / np.maximum(alone, 1)
    taken = total.absorbed / np.maximum(child, 1) - usual
    fires = np.take_along_axis(total.fired, match.latent, axis=1) > 0
    has = fires & (match.cosine > REPRESENTED)
    two = match.latent[:, pairs.child] != match.latent[:, pairs.parent]
    counts = has[:, pairs.child] & has[:, pairs.parent] & two & (child > 0) & (alone > 0)
    return _mean(np.maximum(taken, 0), counts)


def _mean(values: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Along the last axis over some of it; NaN over none."""
    number = where.sum(axis=-1)
    return np.where(where, values, 0).sum(axis=-1) / np.where(number > 0, number, np.nan)


@partial(jax.jit, static_argnums=0)
def _encode(sae: SAE, params: Params, x: Array) -> Array:
    return sae.encode(params, x)[None]
