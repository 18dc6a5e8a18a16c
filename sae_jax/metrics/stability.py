"""Which features come back in another seed: dictionaries that are alike but for their seed, held together."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sae_jax.base import require
from sae_jax.metrics.matching import Rows, assignment, cosines, unit
from sae_jax.seeds import student


class Stability(NamedTuple):
    """How far members that differ only by their seed agree; see `stability`."""

    comes_back: tuple[Float[np.ndarray, "_"], ...]
    """Per member and latent, the share of the other seeds in which it comes back."""
    mean_cosine: tuple[Float[np.ndarray, "_"], ...]
    """Per member and latent, the mean cosine with its partner, 0 where a seed has none for it."""
    of_member: Float[np.ndarray, "members"]
    """How well each member agrees with the other seeds, from 0 to 1."""
    consistency: Float[np.ndarray, "groups"]
    """Mean over the pairs of a group."""
    error: Float[np.ndarray, "groups"]
    """Half the width of its 95 % interval; NaN below three seeds."""
    groups: tuple[Int[np.ndarray, "_"], ...]
    """The members of each group."""


class StableAndTrue(NamedTuple):
    """Whether the features that come back are the true ones; see `stable_and_true`."""

    true_cosine: tuple[Float[np.ndarray, "_"], ...]
    """Per member and latent, the largest cosine with a true feature; NaN where it was in no comparison."""
    in_all: Float[np.ndarray, "groups"]
    """Its mean over latents that come back in every other seed."""
    in_none: Float[np.ndarray, "groups"]
    """Its mean over latents that come back in none."""
    share_in_all: Float[np.ndarray, "groups"]
    """How many of the latents come back in every other seed."""
    share_in_none: Float[np.ndarray, "groups"]
    """How many come back in none."""
    rank_correlation: Float[np.ndarray, "groups"]
    """Spearman's, of `mean_cosine` and `true_cosine` over latents."""


def stability(
    dictionaries: Sequence[Rows],
    groups: Sequence[Int[np.ndarray, "_"]],
    live: Sequence[Bool[np.ndarray, "_"]] | None = None,
    threshold: float = 0.9,
    others: int = 16,
) -> Stability:
    """Which features come back in other seeds, and how well members that differ only by their seed agree.

    The live latents of two members a and b are matched one to one for the largest sum of cosines:

        s_ab = max over matchings P of  sum over (i, j) in P of max(0, cos(a_i, b_j)) / max(live_a, live_b)
        of_member[a] = mean over b of s_ab;   consistency = mean over pairs of s_ab

    A latent without a partner counts as 0, and so does one whose partner points away from it: with its sign
    turned a row is another feature. Where all latents are live, s_ab is PW-MCC but for that. Dictionaries of
    random rows do not have 0. The interval is Student's, with the standard error by jackknife over seeds,
    since pairs share members and are not independent; it is too wide where pairs differ by chance alone.

    Args:
      dictionaries: of each member, decoder rows [d_sae, d_in]; the widths d_sae may differ.
      groups: the members that are alike but for their seed, each member in one group at most.
      live: of each member, which latents take part; None for all.
      threshold: the cosine above which a latent comes back.
      others: with how many of its group, at most, a member is compared: its neighbours in a cycle, as many
        on either side. The work is one matching for each member and half of them.

    Returns:
      `Stability`. NaN for members without another seed, and for latents that are not live; a member that
      is not finite is left out.

    Raises:
      InputError: a group that names no member, a member in two groups, widths d_in that differ within a
        group, or fewer than two `others`.

    Example:
      >>> stability(list(result.params["W_dec"]), [np.arange(16)]).consistency

    Source: Song et al. 2025, "Mechanistic interpretability should prioritize feature consistency in SAEs",
    arXiv 2505.20254, for PW-MCC; Arvesen 1969, "Jackknifing U-statistics".
    """
    require(others >= 2, f"others must be at least 2, got {others}")
    groups = tuple(np.asarray(group, int) for group in groups)
    _require_groups(groups, dictionaries)
    rows = [unit(dictionary) for dictionary in dictionaries]
    alive = [np.arange(len(each)) if live is None else np.flatnonzero(live[i]) for i, each in enumerate(rows)]
    hits = [np.zeros(len(each)) for each in rows]
    sums = [np.zeros(len(each)) for each in rows]
    partners = np.zeros(len(rows))
    agreed = np.zeros(len(rows))
    consistency, error = np.full((2, len(groups)), np.nan)
    for number, group in enumerate(groups):
        members = [i for i in group.tolist() if np.isfinite(rows[i]).all()]
        pairs = _neighbours(len(members), others)
        scores = np.zeros(len(pairs))
        for place, (first, second) in enumerate(pairs.tolist()):
            a, b = members[first], members[second]
            # a row that points the other way is no partner: at 0 it costs no better pair its place
            cosine = np.maximum(rows[a][alive[a]] @ rows[b][alive[b]].T, 0)
            left, right = assignment(cosine)
            matched = cosine[left, right]
            scores[place] = matched.sum() / max(1, *cosine.shape)
            for member, latents in ((a, alive[a][left]), (b, alive[b][right])):
                hits[member][latents] += matched > threshold
                sums[member][latents] += matched
                partners[member] += 1
                agreed[member] += scores[place]
        if len(pairs):
            consistency[number], error[number] = scores.mean(), _error(scores, pairs, len(members))
    seen = np.where(partners > 0, partners, np.nan)
    dead = [~np.isin(np.arange(len(each)), alive[i]) for i, each in enumerate(rows)]
    return Stability(
        tuple(np.where(dead[i], np.nan, hits[i] / seen[i]) for i in range(len(rows))),
        tuple(np.where(dead[i], np.nan, sums[i] / seen[i]) for i in range(len(rows))),
        agreed / seen,
        consistency,
        error,
        groups,
    )


def stable_and_true(
    found: Stability,
    dictionaries: Sequence[Rows],
    directions: Float[np.ndarray, "features d_in"] | Float[Array, "features d_in"],
) -> StableAndTrue:
    """Whether the features that come back in other seeds are the true ones, setting by setting.

    A feature that comes back may still be one that every seed gets wrong in the same way; this says how
    often. Figures are by group, since over settings of different quality pooled latents would show a
    relation that no setting has.

    Args:
      found: what `stability` returned.
      dictionaries: the same that it was given.
      directions: of the true features.

    Returns:
      `StableAndTrue`; NaN where there is no such latent.

    Example:
      >>> stable_and_true(result.stability(), list(result.params["W_dec"]), world.directions).in_all
    """
    true = tuple(
        np.where(np.isnan(shares), np.nan, cosines(dictionary, directions).max(axis=1))
        for shares, dictionary in zip(found.comes_back, dictionaries, strict=True)
    )
    figures = np.full((5, len(found.groups)), np.nan)
    for number, group in enumerate(found.groups):
        shares, agreed, cosine = (
            np.concatenate([leaves[i] for i in group] or [np.zeros(0)])
            for leaves in (found.comes_back, found.mean_cosine, true)
        )
        shares, agreed, cosine = (each[~np.isnan(shares)] for each in (shares, agreed, cosine))
        if len(shares):
            both = [_mean(cosine[shares == 1]), _mean(cosine[shares == 0])]
            figures[:, number] = [
                *both,
                (shares == 1).mean(),
                (shares == 0).mean(),
                _correlation(_ranks(agreed), _ranks(cosine)),
            ]
    return StableAndTrue(true, *figures)


def _require_groups(groups: Sequence[np.ndarray], dictionaries: Sequence[Rows]) -> None:
    """Groups are of members that exist, disjoint, and of one width."""
    total, seen = len(dictionaries), set()
    for member in (member for group in groups for member in group.tolist()):
        require(0 <= member < total, f"there is no member {member}: members are 0 to {total - 1}")
        require(member not in seen, f"a member may be in one group once, but member {member} is named twice")
        seen.add(member)
    for group in groups:
        for a, b in pairwise(group.tolist()):
            one, other = dictionaries[a].shape[1], dictionaries[b].shape[1]
            require(one == other, f"members {a} and {b} of a group have rows of widths {one} and {other}")


def _neighbours(members: int, others: int) -> Int[np.ndarray, "pairs two=2"]:
    """The pairs to compare: all, or each member with its neighbours in a cycle."""
    if members - 1 <= others:
        return np.stack(np.triu_indices(members, 1), axis=1)
    first = np.arange(members)
    return np.concatenate(
        [np.stack([first, (first + step) % members], axis=1) for step in range(1, others // 2 + 1)]
    )


def _error(scores: Float[np.ndarray, "pairs"], pairs: Int[np.ndarray, "pairs two"], members: int) -> float:
    """Half the width of the 95 % interval of the mean score, by leaving out one member at a time."""
    if members < 3:
        return np.nan
    own = np.bincount(pairs.ravel(), np.repeat(scores, 2), minlength=members)
    number = np.bincount(pairs.ravel(), minlength=members)
    without = (scores.sum() - own) / (len(scores) - number)
    variance = (members - 1) / members * np.square(without - without.mean()).sum()
    return student(np.sqrt(variance), members)


def _ranks(values: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """From 0, equal ones sharing the mean of theirs."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[which]


def _correlation(a: Float[np.ndarray, "n"], b: Float[np.ndarray, "n"]) -> float:
    """Pearson's; NaN where either does not vary."""
    a, b = a - a.mean(), b - b.mean()
    size = np.sqrt(np.square(a).sum() * np.square(b).sum())
    return (a * b).sum() / size if size > 0 else np.nan


def _mean(values: Float[np.ndarray, "_"]) -> float:
    return values.mean() if len(values) else np.nan
