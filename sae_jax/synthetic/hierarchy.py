"""Features that fire only where their parent does, and children of one parent that exclude each other."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from sae_jax.base import require

ROUNDS = 10_000
"""At most, of the fixed point that finds candidates' probabilities for given rates."""


class Level(NamedTuple):
    """The families whose parents are equally deep; short ones are filled up with an index past the last."""

    parents: Int[Array, "families"]
    children: Int[Array, "families most"]
    exclusive: Bool[Array, "families"]


@struct.dataclass
class Forest:
    """Trees of features; see `forest`."""

    parents: Int[Array, "*worlds features"]
    """The parent of each feature, -1 of a root."""
    levels: tuple[Level, ...]
    """From the roots down."""
    scale: Float[Array, "*worlds features"] | None
    """What a parent's amount is divided by to give the factor of its children's; None for no such factor."""

    def __call__(
        self, key: Key[Array, ""], amounts: Float[Array, "rows features"]
    ) -> Float[Array, "rows features"]:
        """What is left of candidates' amounts.

        Of exclusive candidates one stays, each as likely as another; a child whose parent is silent goes.
        """
        padded = jnp.pad(amounts, ((0, 0), (0, 1)))
        for level, of_level in zip(self.levels, jax.random.split(key, len(self.levels)), strict=True):
            children, parent = padded[:, level.children], padded[:, level.parents]
            order = jnp.cumsum(children > 0, axis=-1)
            drawn = 1 + jnp.floor(jax.random.uniform(of_level, parent.shape) * order[..., -1])
            stays = (order == drawn[..., None]) | ~level.exclusive[:, None]
            children = jnp.where(stays, children, 0)
            factor = parent > 0 if self.scale is None else parent / self.scale[level.parents]
            padded = padded.at[:, level.children].set(children * factor[..., None])
        return padded[:, :-1]

    def rates(self, candidates: Float[np.ndarray, "*draws features"]) -> Float[np.ndarray, "*draws features"]:
        """How often each feature fires, from how often each is an independent candidate: exact."""
        rates = np.concatenate([candidates, np.zeros((*candidates.shape[:-1], 1))], axis=-1)
        for level in self.levels:
            children = rates[..., np.asarray(level.children)]
            stays = np.where(np.asarray(level.exclusive)[:, None], chosen(children), 1)
            parent = rates[..., np.asarray(level.parents)]
            rates[..., np.asarray(level.children)] = children * stays * parent[..., None]
            rates[..., -1] = 0
        return rates[..., :-1]


def forest(
    parents: Sequence[int] | Int[np.ndarray, "features"],
    exclusive: bool | Sequence[bool] | Bool[np.ndarray, "features"] = False,
    scale: Float[np.ndarray, "features"] | None = None,
) -> Forest:
    """Trees of features from the parent of each.

    Args:
      parents: the index of each feature's parent, -1 of a root and of a feature outside any tree.
      exclusive: whether at most one child of a feature fires at a time, of all or of each.
      scale: mean amounts; children are then multiplied by their parent's amount over its mean.

    Returns:
      A `Forest`.

    Raises:
      InputError: a parent that does not exist, a feature that is its own ancestor, `exclusive` or `scale` of
        another length, or a mean that is not above 0.

    Example:
      >>> forest([-1, 0, 0, 1], exclusive=True)
    """
    parents = np.asarray(parents)
    whole = parents.ndim == 1 and parents.dtype.kind in "iu"
    require(
        whole, f"a hierarchy is one whole number per feature, got {parents.dtype} of {list(parents.shape)}"
    )
    parents, features = parents.astype(np.int64), len(parents)
    wrong = parents[(parents < -1) | (parents >= features)]
    require(
        wrong.size == 0,
        f"a hierarchy of {features} features has parents from -1 (none) to {features - 1}, "
        f"got {wrong[:1].tolist()}",
    )
    require(
        np.shape(exclusive) in ((), (features,)),
        f"exclusive is one flag or one for each of {features} features, got {list(np.shape(exclusive))}",
    )
    require(
        scale is None or (np.shape(scale) == (features,) and bool((np.asarray(scale) > 0).all())),
        f"children are scaled by {features} means above 0, got {scale}",
    )
    depths = _depths(parents)
    excludes = np.broadcast_to(np.asarray(exclusive, bool), (features,))
    levels = []
    for depth in range(int(depths.max(initial=0))):
        inner = [i for i in np.flatnonzero(depths == depth) if (parents == i).any()]
        families = [np.flatnonzero(parents == i) for i in inner]
        most = max(map(len, families))
        children = np.array([[*family, *[features] * (most - len(family))] for family in families])
        levels.append(Level(jnp.asarray(inner), jnp.asarray(children), jnp.asarray(excludes[inner])))
    return Forest(jnp.asarray(parents), tuple(levels), None if scale is None else jnp.asarray(scale, float))


def regular(features: int, roots: int, branching: int, depth: int) -> Int[np.ndarray, "features"]:
    """Parents of trees whose every inner feature has the same number of children, numbered level by level.

    Args:
      features: how many in all; those that the trees leave over stand alone, and a tree that finds too few
        stays incomplete.
      roots: how many trees.
      branching: children of an inner feature.
      depth: levels below the roots.

    Raises:
      InputError: fewer than one feature, root or branch, or a depth below 0.

    Example:
      >>> regular(8, roots=2, branching=2, depth=1)
      array([-1, -1,  0,  0,  1,  1, -1, -1])

    Source: `sae_lens.synthetic`, `generate_hierarchy`.
    """
    sizes = {"features": features, "roots": roots, "branching": branching}
    for name, size in sizes.items():
        require(size >= 1, f"{name} must be at least 1, got {size}")
    require(depth >= 0, f"depth must not be negative, got {depth}")
    parents = np.full(features, -1)
    level, free = np.arange(min(roots, features)), min(roots, features)
    for _ in range(depth):
        children = np.arange(free, min(free + branching * len(level), features))
        if not children.size:
            break
        parents[children] = level[np.arange(len(children)) // branching]
        level, free = children, free + len(children)
    return parents


def chosen(candidates: Float[np.ndarray, "*families most"]) -> Float[np.ndarray, "*families most"]:
    """The probability that a candidate is the one that stays among its exclusive siblings.

        E[1 / (1 + K_i)] = integral from 0 to 1 of prod over j != i of (1 - q_j + q_j t) dt

    K_i is how many of the others are candidates. The integrand is a polynomial in t, for which so many points
    of Gauss and Legendre are exact.
    """
    points, weights = np.polynomial.legendre.leggauss(candidates.shape[-1] // 2 + 1)
    factors = 1 - candidates[..., None] * (1 - points) / 2
    return (factors.prod(axis=-2, keepdims=True) / factors) @ weights / 2


def exact(probabilities: Float[np.ndarray, "features"], tree: Forest) -> Float[np.ndarray, "features"]:
    """Candidates' probabilities under which features that are otherwise independent fire as often as asked.

        q_i = p_i / p_parent / chosen_i(q),   solved by iteration

    Args:
      probabilities: how often each feature is to fire.
      tree: where it stands.

    Raises:
      InputError: a child more often than its parent, or exclusive siblings together more often.
    """
    padded = _padded(probabilities, tree)
    candidates = padded.copy()
    for level in tree.levels:
        children, exclusive = np.asarray(level.children), np.asarray(level.exclusive)[:, None]
        wanted = _given_parent(padded, level)
        _require_possible(wanted, np.asarray(level.parents), exclusive[:, 0])
        found, before = wanted, -wanted
        for _ in range(ROUNDS):
            if np.abs(found - before).max() < 1e-15:
                break
            found, before = np.where(exclusive, np.minimum(wanted / chosen(found), 1), wanted), found
        candidates[children] = found
    return candidates[:-1]


def first_order(probabilities: Float[np.ndarray, "features"], tree: Forest) -> Float[np.ndarray, "features"]:
    """Candidates' probabilities by SAELens's compensation: rates come out near those asked for.

        q_i = min(1, p_i / p_parent * (1 + sum over exclusive siblings j of p_j / p_parent))

    Where that passes 1, or siblings ask for more than their parent, a feature fires less often than asked.

    Args:
      probabilities: how often each feature is to fire.
      tree: where it stands.

    Source: `sae_lens.synthetic`, `Hierarchy.compute_probability_correction_factors`.
    """
    padded = _padded(probabilities, tree)
    candidates = padded.copy()
    for level in tree.levels:
        shares = _given_parent(padded, level)
        others = np.where(np.asarray(level.exclusive)[:, None], shares.sum(axis=1, keepdims=True) - shares, 0)
        candidates[np.asarray(level.children)] = np.minimum(shares * (1 + others), 1)
    return candidates[:-1]


def as_given(probabilities: Float[np.ndarray, "features"], tree: Forest) -> Float[np.ndarray, "features"]:
    """Probabilities as they stand: of being a candidate where the parent fires, before siblings exclude."""
    return _padded(probabilities, tree)[:-1]


def _padded(probabilities: Float[np.ndarray, "features"], tree: Forest) -> Float[np.ndarray, "padded"]:
    """Probabilities and a 0, which is what the index past the last finds."""
    features, given = len(tree.parents), len(probabilities)
    require(features == given, f"the hierarchy has {features} features, but there are {given} probabilities")
    return np.append(np.asarray(probabilities, np.float64), 0)


def _given_parent(padded: Float[np.ndarray, "padded"], level: Level) -> Float[np.ndarray, "families most"]:
    """How often each child is to fire where its parent does."""
    children, parents = np.asarray(level.children), np.asarray(level.parents)
    return padded[children] / np.maximum(padded[parents], 1e-30)[:, None]


def _depths(parents: Int[np.ndarray, "features"]) -> Int[np.ndarray, "features"]:
    """How many ancestors each feature has."""
    depths, at = np.zeros(len(parents), np.int64), parents.copy()
    for _ in range(len(parents)):
        if (at < 0).all():
            return depths
        depths += at >= 0
        at = np.where(at >= 0, parents[at], -1)
    culprit = int(np.flatnonzero(at >= 0)[0])
    require(
        culprit < 0,
        f"a hierarchy must be a forest, but feature {culprit} is its own ancestor, or has one that is",
    )
    return depths


def _require_possible(
    wanted: Float[np.ndarray, "families most"],
    parents: Int[np.ndarray, "families"],
    exclusive: Bool[np.ndarray, "families"],
) -> None:
    """Children fire at most as often as their parent, exclusive ones together."""
    totals = np.where(exclusive, wanted.sum(axis=1), wanted.max(axis=1))
    worst = int(totals.argmax())
    what = "exclusive children" if exclusive[worst] else "a child"
    require(
        bool(totals[worst] <= 1 + 1e-9),
        f"{what} of feature {parents[worst]} would fire with probability {totals[worst]:.3g} where it does: "
        "at most 1 is possible",
    )
