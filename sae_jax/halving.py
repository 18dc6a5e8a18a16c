"""Successive halving: a large grid trains a little, the better half of it twice as long, and so on."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from sae_jax.base import require


class Round(NamedTuple):
    """A stretch of training."""

    start: int
    """Steps done before it."""
    until: int
    """Steps done at its end."""
    members: int
    keep: int
    """How many of them go on after it."""

    @property
    def work(self) -> int:
        """Steps, summed over members."""
        return self.members * (self.until - self.start)


def rounds(members: int, steps: int, left: int | None = None) -> tuple[Round, ...]:
    """The rounds of a sweep; a single one where nothing is halved.

    With r = ceil(log2(members / left)) halvings the first round ends after steps / 2^r, and each further one
    has twice as many steps behind it as the one before; the last ends with all steps done.

    Args:
      members: of the grid.
      steps: of the whole run.
      left: how many members the last round has; None for all.

    Raises:
      InputError: more are to be left than there are, or there are fewer steps than rounds.

    Example:
      >>> [(round.until, round.members) for round in rounds(64, 8000, left=16)]
      [(2000, 64), (4000, 32), (8000, 16)]

    Source: Jamieson and Talwalkar 2016 (arXiv 1502.07943), algorithm 1.
    """
    if left is None:
        return (Round(0, steps, members, members),)
    require(1 <= left <= members, f"of {members} members 1 to {members} can be left, got {left}")
    halvings = math.ceil(math.log2(members / left))
    require(steps >= 2**halvings, f"{halvings} halvings need {2**halvings} steps at least, got {steps}")
    ends = [0, *(steps // 2 ** (halvings - number) for number in range(halvings + 1))]
    sizes = [max(left, math.ceil(members / 2**number)) for number in range(halvings + 1)]
    return tuple(map(Round, ends, ends[1:], sizes, [*sizes[1:], left]))


def best(
    l0: Float[np.ndarray, "members"], fvu: Float[np.ndarray, "members"], count: int
) -> Int[np.ndarray, "count"]:
    """The members to go on with: the frontier of sparsity against fidelity, then the frontier of the rest...

    A grid over a penalty has no one best member. The last frontier of which not all fit is thinned evenly
    along L0, its ends kept. Members whose figures are not finite come last.

    Args:
      l0: mean number of active latents.
      fvu: share of variance unexplained.
      count: how many, at most as many as there are.

    Returns:
      Places, ascending.

    Source: the fronts of Deb et al. 2002, "A fast and elitist multiobjective genetic algorithm: NSGA-II".
    """
    x, y = (np.where(np.isfinite(l0) & np.isfinite(fvu), column, np.inf) for column in (l0, fvu))
    rest, chosen = np.lexsort((y, x)), np.empty(0, int)
    while len(chosen) < count:
        least_before = np.minimum.accumulate(np.concatenate([[np.inf], y[rest]]))[:-1]
        # what is not finite beats nothing, and is taken when nothing else is left
        front = rest[y[rest] < least_before] if np.isfinite(y[rest]).any() else rest
        room = count - len(chosen)
        if len(front) > room:
            front = front[np.round(np.linspace(0, len(front) - 1, room)).astype(int)]
        chosen, rest = np.concatenate([chosen, front]), rest[~np.isin(rest, front)]
    return np.sort(chosen)
