"""Members that differ in nothing but their seed: what they have in common, and how far they spread."""

from typing import NamedTuple

import numpy as np
import scipy
from jaxtyping import Float, Int

from sae_jax.grid import Grid

CONFIDENCE = 0.95


class Settings(NamedTuple):
    """The rows of a grid without its seeds."""

    grid: Grid
    """One row per setting, in the order in which they come first."""
    members: tuple[Int[np.ndarray, "seeds"], ...]
    """The rows of the whole grid that share it."""

    @property
    def repeated(self) -> bool:
        """Whether some setting has several seeds."""
        return any(len(group) > 1 for group in self.members)


class Interval(NamedTuple):
    """A mean over seeds, and half the width of the interval that holds the true one."""

    mean: Float[np.ndarray, "settings"]
    half_width: Float[np.ndarray, "settings"]
    """NaN where there is one seed."""


def settings(grid: Grid) -> Settings:
    """Group the rows of a grid that are alike but for their seed.

    Args:
      grid: a table of hyper-parameters.

    Returns:
      `Settings`; a grid without seeds has a setting per row.

    Example:
      >>> settings(grid(l1=[0.1, 0.2], seed=range(3))).members
      (array([0, 1, 2]), array([3, 4, 5]))
    """
    axes = {name: column for name, column in grid.items() if name != "seed"}
    total = len(next(iter(grid.values())))
    groups: dict[tuple, list[int]] = {}
    for row in range(total):
        # what a member has not is NaN, which equals nothing, but its text does
        alike = tuple(str(column[row]) for column in axes.values()) if "seed" in grid else (row,)
        groups.setdefault(alike, []).append(row)
    firsts = [rows[0] for rows in groups.values()]
    return Settings(
        {name: column[firsts] for name, column in axes.items()}, tuple(map(np.array, groups.values()))
    )


def interval(values: Float[np.ndarray, "members"], among: Settings) -> Interval:
    """The mean over the seeds of each setting, and Student's 95 % interval around it.

        mean +- t * s / sqrt(n),   t = the 97.5 % point of n - 1 degrees of freedom

    Args:
      values: one per member; those that are not finite are left out.
      among: the settings.

    Returns:
      An `Interval`; NaN for a setting that has no finite value.
    """
    kept = [values[rows][np.isfinite(values[rows])] for rows in among.members]
    mean = [group.mean() if group.size else np.nan for group in kept]
    return Interval(np.array(mean), np.array([half_width(group) for group in kept]))


def of_pairs(told: Interval, among: Settings) -> Interval:
    """The interval of figures that are each a mean over pairs with the other seeds, as consistency is.

    Members share pairs, so that their figures spread too little for Student's interval by the factor

        2 (n - 1) / (n - 2)

    with which it is that of the jackknife over members; exactly so where all pairs of the n were taken.

    Args:
      told: of figures per member.
      among: the settings.

    Returns:
      The mean as it was, and NaN for the half-width below three seeds.
    """
    n = np.array([len(rows) for rows in among.members], float)
    factor = np.where(n > 2, 2 * (n - 1) / np.maximum(n - 2, 1), np.nan)
    return Interval(told.mean, told.half_width * factor)


def half_width(values: Float[np.ndarray, "n"]) -> float:
    """Half the width of Student's interval for the mean of values; NaN of fewer than two."""
    n = len(values)
    return float("nan") if n < 2 else student(values.std(ddof=1) / np.sqrt(n), n)


def student(standard_error: float, n: int) -> float:
    """Half the width of Student's interval from the standard error of n values' mean."""
    return float(scipy.special.stdtrit(n - 1, (1 + CONFIDENCE) / 2) * standard_error)
