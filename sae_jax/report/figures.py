"""Pictures of an SAE and of a sweep, each drawn on axes of yours or on a figure of its own.

Figures are made directly rather than by pyplot: no display, no global state, and a second less to import.
"""

import itertools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
from jaxtyping import Array, Bool, Float
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure

from sae_jax.result import SweepResult

HUES = ("#2c6fbb", "#a8479e", "#ef7d32")
"""From low to high; none so pale or so dark that white or black paper swallows it."""

CATEGORIES = ("#2c6fbb", "#ef7d32", "#2a9d6f", "#a8479e", "#c23b3b", "#8a6d3b", "#3fa7bd", "#777777")
"""For architectures, which have no order; readable on white and on black."""

LABELS = {
    "l0": "L0: active latents per row",
    "l1_norm": "sum of |f| per row",
    "loss": "loss",
    "mse": "mean squared error",
    "explained_variance": "explained variance",
    "fvu": "fraction of variance unexplained",
    "dead_fraction": "share of latents never active",
    "mcc": "MCC with the true features",
    "mmcs": "MMCS with the true features",
    "f1": "F1 of latents as detectors",
    "uniqueness": "uniqueness of latents",
    "recovered": "share of true features found",
    "consistency": "consistency across seeds",
}
"""How columns are called on an axis."""

WORST_SHOWN = -0.2
"""Explained variance below which members off the frontier leave the picture, lest they flatten the rest."""


def heat_map(
    f: Float[Array | np.ndarray, "tokens d_sae"],
    tokens: Sequence[str],
    ax: Axes | None = None,
    title: str = "Encoded sparse features",
) -> Axes:
    """Features as a table of colours: tokens down, features across, the value in each cell.

    Args:
      f: encoded tokens [tokens, d_sae]; colours span 0 to 1.
      tokens: a name per row.
      ax: where to draw; None for a new figure.
      title: above the picture.

    Returns:
      The axes.

    Example:
      >>> heat_map(result.member(0).encode(tokens.x), tokens.names)
    """
    f = np.asarray(f)
    rows, columns = f.shape
    ax = ax or _new_axes(2.6 + 0.62 * columns, 1.4 + 0.38 * rows)
    image = ax.imshow(f, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(f):
        ink = "black" if value > 0.6 else "white"
        ax.text(column, row, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=8)
    ax.set_xticks(range(columns), [f"F{column + 1}" for column in range(columns)])
    ax.set_yticks(range(rows), tokens, parse_math=False)
    ax.tick_params(length=0)
    ax.set_title(title)
    _figure(ax).colorbar(
        image, ax=ax, label="activation", extend="max" if f.max(initial=0) > 1 else "neither"
    )
    return ax


def frontier(
    result: SweepResult,
    x: str = "l0",
    y: str = "explained_variance",
    color: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Sparsity against fidelity: every member that did not diverge, and the Pareto frontier.

    Args:
      result: the sweep.
      x: column across; less is better.
      y: column up; less is better, unless it is one of `result.MORE_IS_BETTER`.
      color: the hyper-parameter that colours the points; None for the first that is swept, seeds aside, and
        where there are several architectures or widths for these, each with a frontier of its own.
      ax: where to draw; None for a new figure.

    Returns:
      The axes: one collection of points, one line, and where seeds vary their means with intervals.

    Example:
      >>> save(frontier(result), "frontier.png")
    """
    ax = ax or _new_axes(7.0, 4.6)
    columns = {**result.metrics, **result.table}
    ok = result.sound
    if color is None and result.groups:
        best = _frontiers(result, x, y, ax)
        _means(result, x, y, ax)
        return _labelled(ax, x, y, ok, columns[y][ok], columns[y][best])
    color = color or next(iter(swept(result)), None)
    shade = {} if color is None else _shade(result.grid[color][ok])
    points = ax.scatter(
        columns[x][ok], columns[y][ok], s=16, alpha=0.8, linewidths=0, **(shade or {"color": HUES[0]})
    )
    if color is not None:
        _figure(ax).colorbar(points, ax=ax).set_label(color, parse_math=False)
    best = result.frontier(x, y)
    # below the points, so that theirs are the colours seen
    ax.plot(columns[x][best], columns[y][best], color="#555", lw=1.2, zorder=0.9, label="frontier")
    _means(result, x, y, ax)
    return _labelled(ax, x, y, ok, columns[y][ok], columns[y][best])


def _means(result: SweepResult, x: str, y: str, ax: Axes) -> None:
    """The mean over seeds of each setting, with its interval both ways."""
    told = result.intervals() if result.settings.repeated else {}
    if x not in told or y not in told:
        return
    across, up = told[x], told[y]
    ax.errorbar(
        across.mean,
        up.mean,
        xerr=across.half_width,
        yerr=up.half_width,
        fmt="none",
        ecolor="#555",
        elinewidth=1,
        capsize=2,
        label="mean over seeds, 95 % interval",
    )


def _frontiers(result: SweepResult, x: str, y: str, ax: Axes) -> np.ndarray:
    """Each group's members and frontier; the members on any of them."""
    columns = {**result.metrics, **result.table}
    fronts = []
    for (label, group), hue in zip(result.groups.items(), itertools.cycle(CATEGORIES), strict=False):
        shown = group[result.sound[group]]
        ax.scatter(columns[x][shown], columns[y][shown], s=16, alpha=0.8, linewidths=0, color=hue)
        best = result.frontier(x, y, group)
        ax.plot(columns[x][best], columns[y][best], color=hue, lw=1.4, label=label)
        fronts.append(best)
    return np.concatenate(fronts)


def _labelled(ax: Axes, x: str, y: str, ok: np.ndarray, values: np.ndarray, best: np.ndarray) -> Axes:
    """The words around a frontier, and its limits."""
    floor = lowest_shown(values, best) if y == "explained_variance" else None
    if floor is not None:
        ax.set_ylim(bottom=floor)
    diverged = int((~ok).sum())
    ax.set_title(f"{len(ok):,} members" + (f", {diverged:,} diverged" if diverged else ""))
    ax.set_xlabel(LABELS.get(x, x), parse_math=False)
    ax.set_ylabel(LABELS.get(y, y), parse_math=False)
    ax.grid(alpha=0.25)
    if best.size:
        ax.legend(frameon=False, loc="lower right")
    return ax


def frontier_png(result: SweepResult, path: str | Path) -> None:
    """Write the picture of the frontier; where true features are known, that of finding them beside it.

    Args:
      result: the sweep.
      path: ending in `.png`, or in what else matplotlib writes.
    """
    shown = ["explained_variance", *(name for name in ("f1", "mcc") if name in result.metrics)]
    figure = Figure(figsize=(7.0 * len(shown), 4.6), layout="constrained")
    for ax, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        frontier(result, y=name, ax=ax)
    figure.savefig(path, dpi=150)


def found_distribution(found: Bool[np.ndarray, "members truths"], ax: Axes | None = None) -> Axes:
    """How many of the true features a run finds: the share of runs that find none, one, two and so on.

    Args:
      found: from `synthetic.features_found` over seeds.
      ax: where to draw; None for a new figure.

    Returns:
      The axes: a bar per count with its 95 % interval (Wilson).

    Example:
      >>> found_distribution(features_found(f, tokens))
    """
    ax = ax or _new_axes(5.4, 3.8)
    runs, truths = np.shape(found)
    share = np.bincount(np.sum(found, axis=-1), minlength=truths + 1) / runs
    low, high = wilson(share, runs)
    # rounding can put an end of the interval a hair inside the bar's own end
    reach = np.maximum([share - low, high - share], 0)
    bars = ax.bar(range(truths + 1), share, yerr=reach, color=HUES[0], capsize=4, ecolor="#444")
    texts = [f"{each:.1%}" for each in share]
    for bar, text, top in zip(bars, texts, high, strict=True):
        ax.text(bar.get_x() + bar.get_width() / 2, top + 0.015, text, ha="center", fontsize=9)
    ax.set_ylim(0, min(1.1, high.max() + 0.1))
    ax.set_xticks(range(truths + 1))
    ax.set_xlabel(f"of the {truths} true features, found by one run")
    ax.set_ylabel("share of seeds")
    ax.set_title(f"{runs:,} seeds")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def shrinkage(results: dict[str, SweepResult], ax: Axes | None = None) -> Axes:
    """Mean |f| over training, a curve per sweep: the median over its members and the band of quartiles.

    A decoder that is free lets the encoder shrink to escape the penalty; one of unit norm does not.

    Args:
      results: sweeps by the name to show, each with a log `sparsity`.
      ax: where to draw; None for a new figure.

    Returns:
      The axes: one line and one band per sweep.

    Example:
      >>> shrinkage({"free decoder": faithful, "unit-norm decoder": constrained})
    """
    ax = ax or _new_axes(6.4, 4.2)
    hues = _colormap()(np.linspace(0, 1, max(2, len(results))))
    for (name, result), hue in zip(results.items(), hues, strict=False):
        steps = result.history["step"]
        low, median, high = quartiles(result.history["sparsity"])
        ax.plot(steps, median, color=hue, label=name)
        ax.fill_between(steps, low, high, color=hue, alpha=0.2, linewidth=0)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("training steps")
    ax.set_ylabel("mean |f|")
    ax.set_title("Median over seeds, and quartiles")
    ax.grid(alpha=0.25)
    for text in ax.legend(frameon=False).get_texts():
        text.set_parse_math(False)
    return ax


def save(ax: Axes, path: str | Path, dpi: int = 150) -> None:
    """Write the figure that holds `ax`.

    Args:
      ax: any axes of the figure.
      path: the ending says the format.
      dpi: pixels per inch.
    """
    _figure(ax).savefig(path, dpi=dpi)


def swept(result: SweepResult) -> list[str]:
    """Hyper-parameters that every member has and that take more than one value, `seed` aside."""
    shared = {
        name: column
        for name, column in result.grid.items()
        if column.dtype.kind == "U" or np.isfinite(column).all()
    }
    return [name for name, column in shared.items() if name != "seed" and np.unique(column).size > 1]


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
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN")  # a point where all diverged is a gap in the curve
        finite = np.where(np.isfinite(values), values, np.nan)
        return np.nanquantile(finite, [0.25, 0.5, 0.75], axis=1)


def lowest_shown(values: np.ndarray, kept: np.ndarray) -> float | None:
    """Where to cut an axis of explained variance from below; None for nowhere."""
    worst = min(values[np.isfinite(values)], default=0.0)
    floor = min([WORST_SHOWN, *(kept - 0.05)])
    return float(floor) if worst < floor else None


def wilson(share: np.ndarray, runs: int, z: float = 1.96) -> tuple[np.ndarray, np.ndarray]:
    """The interval of a share out of `runs` that holds at shares of 0 and 1 too (Wilson 1927)."""
    middle = (share + z**2 / (2 * runs)) / (1 + z**2 / runs)
    half = z / (1 + z**2 / runs) * np.sqrt(share * (1 - share) / runs + z**2 / (4 * runs**2))
    return middle - half, middle + half


def _new_axes(width: float, height: float) -> Axes:
    return Figure(figsize=(width, height), layout="constrained").add_subplot()


def _figure(ax: Axes) -> Figure:
    return cast(Figure, ax.get_figure(root=True))


def _colormap() -> LinearSegmentedColormap:
    return LinearSegmentedColormap.from_list("low to high", HUES)


def _shade(values: np.ndarray) -> dict:
    norm = (LogNorm if values.size and log_spaced(values) else Normalize)()
    return {"c": values, "cmap": _colormap(), "norm": norm}
