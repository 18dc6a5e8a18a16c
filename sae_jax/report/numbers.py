"""What figures and pages draw, as numbers and as words."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from sae_jax.base import require
from sae_jax.result import SweepResult

WORST_SHOWN = -0.2
"""Explained variance below which members off the frontier leave the picture, lest they flatten the rest."""
MOST_CURVES = 32
"""One per member up to here."""
MOST_BANDS = 6
MOST_CELLS = 10_000
"""Of a table over two axes; a random search, where no two members share a value, has none."""


class Curve(NamedTuple):
    """A log over training: of one member, or of all that share a value."""

    label: str
    value: Any
    """Of the hyper-parameter that colours it."""
    middle: Float[np.ndarray, "points"]
    """The member's own, or the median."""
    low: Float[np.ndarray, "points"] | None
    """The lower quartile; None of one member."""
    high: Float[np.ndarray, "points"] | None


class Table(NamedTuple):
    """A metric over two hyper-parameters."""

    across: str
    down: str
    xs: np.ndarray
    """Values of the first, sorted."""
    ys: np.ndarray
    mean: Float[np.ndarray, "ys xs"]
    """Over seeds and other axes, of the members that did not diverge; NaN where there are none."""
    half_width: Float[np.ndarray, "ys xs"]
    """Half of the 95 % interval over seeds; NaN where it is a spread over other axes, or of one seed."""


def swept(result: SweepResult) -> list[str]:
    """Hyper-parameters that every member has and that take more than one value, `seed` aside."""
    shared = {
        name: column
        for name, column in result.grid.items()
        if column.dtype.kind == "U" or np.isfinite(column).all()
    }
    return [name for name, column in shared.items() if name != "seed" and np.unique(column).size > 1]


def curves(result: SweepResult, name: str) -> list[Curve]:
    """A curve per member; where seeds vary or members are many, one per value of the first axis."""
    log = result.history[name]
    axis = next(iter(swept(result)), None)
    column = np.zeros(log.shape[1]) if axis is None else result.grid[axis]
    if log.shape[1] <= MOST_CURVES and not result.settings.repeated:
        return [
            Curve(told(result, index, ", "), column[index], log[:, index], None, None)
            for index in range(log.shape[1])
        ]
    drawn = []
    for value in spread(np.unique(column), MOST_BANDS):
        low, median, high = quartiles(log[:, column == value])
        label = "all members" if axis is None else f"{axis} {short(value)}"
        drawn.append(Curve(label, value, median, low, high))
    return drawn


def log_scaled(name: str, log: np.ndarray) -> bool:
    """Whether a log is drawn on a logarithmic axis: a loss that is always above 0."""
    shown = log[np.isfinite(log)]
    return name == "loss" and shown.size > 0 and bool(shown.min() > 0)


def by_setting(
    result: SweepResult,
    metric: str = "explained_variance",
    across: str | None = None,
    down: str | None = None,
) -> Table | None:
    """A metric of the table over two swept axes, averaged over all else.

    Args:
      result: the sweep.
      metric: a column of the table.
      across: one axis; None for the first that is not `down`.
      down: the other.

    Returns:
      None where there are no two axes, no finite value, or more than 10,000 cells.
    """
    axes = swept(result)
    for name in (across, down):
        require(name is None or name in axes, f"{name!r} is not swept; the axes are: {', '.join(axes)}")
    across = across or next((name for name in axes if name != down), None)
    down = down or next((name for name in axes if name != across), None)
    if across is None or down is None:
        return None
    require(across != down, f"a table has two axes, and both are {across!r}")
    require(metric in result.table, f"there is no column {metric!r}; there are: {', '.join(result.table)}")
    xs, column = np.unique(result.grid[across], return_inverse=True)
    ys, row = np.unique(result.grid[down], return_inverse=True)
    value = result.table[metric]
    ok = result.sound & np.isfinite(value)
    if not ok.any() or len(xs) * len(ys) > MOST_CELLS:
        return None
    total, count = np.zeros((2, len(ys), len(xs)))
    np.add.at(total, (row[ok], column[ok]), value[ok])
    np.add.at(count, (row[ok], column[ok]), 1)
    mean = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
    # a spread over other axes is none over seeds
    half_width = np.full_like(mean, np.nan)
    if set(axes) == {across, down}:
        places = [(row[rows[0]], column[rows[0]]) for rows in result.settings.members]
        half_width[tuple(np.transpose(places))] = result.intervals()[metric].half_width
    return Table(across, down, xs, ys, mean, half_width)


def log_spaced(values: np.ndarray) -> bool:
    """Whether the median lies nearer the geometric than the arithmetic middle of the ends."""
    if values.dtype.kind == "U":
        return False
    values = np.unique(values).astype(float)
    if values[0] <= 0 or values.size < 3:
        return False
    low, middle, high = values[0], np.median(values), values[-1]
    return bool(abs(np.log(middle / np.sqrt(low * high))) < abs(np.log(middle / ((low + high) / 2))))


def quartiles(values: Float[np.ndarray, "points members"]) -> Float[np.ndarray, "3 points"]:
    """Lower quartile, median and upper quartile over the members that are finite at each point."""
    # by hand: `nanquantile` goes from point to point in Python, a hundred times as long
    ranked = np.sort(np.where(np.isfinite(values), values, np.nan), axis=1)  # NaN last
    at = np.array([[0.25], [0.5], [0.75]]) * np.maximum(np.isfinite(ranked).sum(axis=1) - 1, 0)
    low, high, points = np.floor(at).astype(int), np.ceil(at).astype(int), np.arange(len(values))
    below, above = ranked[points, low], ranked[points, high]
    return below + (at - low) * (above - below)


def lowest_shown(values: np.ndarray, kept: np.ndarray) -> float | None:
    """Where to cut an axis of explained variance from below; None for nowhere."""
    worst = min(values[np.isfinite(values)], default=0.0)
    floor = min([WORST_SHOWN, *(kept - 0.05)])
    return float(floor) if worst < floor else None


def thin(total: int, always: np.ndarray, most: int) -> np.ndarray:
    """At most `most` of `total` indices, in order: those in `always`, and others evenly spaced."""
    if total <= most:
        return np.arange(total)
    always = np.unique(always)[:: math.ceil(len(always) / most) or 1]
    others = np.setdiff1d(np.arange(total), always)
    return np.union1d(always, spread(others, most - len(always)))


def spread(values: np.ndarray, most: int) -> np.ndarray:
    """At most `most` of the values, evenly spaced, the first and the last among them."""
    if len(values) <= most:
        return values
    return values[np.linspace(0, len(values) - 1, most).round().astype(int)]


def told(result: SweepResult, index: int, between: str, metrics: Iterable[str] = ()) -> str:
    """A member in words: its number, its hyper-parameters, and some of its metrics."""
    measured = {"loss": result.history["loss"][-1], **result.metrics}
    parts = {**result.grid, **{name: measured[name] for name in metrics}}
    has = {name: column[index] for name, column in parts.items() if short(column[index]) != "nan"}
    return between.join([f"member {index}", *(f"{name} {short(value)}" for name, value in has.items())])


def setting_told(grid: Mapping[str, np.ndarray], row: int) -> str:
    """A setting in words."""
    has = {name: column[row] for name, column in grid.items() if short(column[row]) != "nan"}
    return ", ".join(f"{name} {short(value)}" for name, value in has.items()) or "all seeds"


def short(value: Any) -> str:
    """A value as it stands in a table: numbers with four digits."""
    return f"{value:.4g}" if isinstance(value, float | np.floating) else str(value)


def on_one_line(text: str, longest: int = 32) -> str:
    """A text that a user gave, no longer than so many letters, its control characters spelled out."""
    line = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text[:longest])
    return line if len(text) <= longest and len(line) <= longest else f"{line[: longest - 1]}…"
