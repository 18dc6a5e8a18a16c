"""Sparsity against fidelity, and against latents that are never active."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure

from sae_jax.report.figures.canvas import CATEGORIES, HUES, LABELS, figure_of, new_axes, shade
from sae_jax.report.numbers import lowest_shown, swept
from sae_jax.result import SweepResult


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
    ax = ax or new_axes(7.0, 4.6)
    if color is None and result.groups:
        best = _frontiers(result, x, y, ax)
    else:
        _dots(result, x, y, color, ax)
        columns, best = {**result.metrics, **result.table}, result.frontier(x, y)
        # below the points, so that theirs are the colours seen
        ax.plot(columns[x][best], columns[y][best], color="#555", lw=1.2, zorder=0.9, label="frontier")
    _means(result, x, y, ax)
    return _labelled(ax, result, x, y, best)


def dead(result: SweepResult, color: str | None = None, ax: Axes | None = None) -> Axes:
    """Latents that are never active on the evaluated rows: their share of each member, against its L0.

    Args:
      result: the sweep.
      color: the hyper-parameter that colours the points; None for the first that is swept, seeds aside.
      ax: where to draw; None for a new figure.

    Returns:
      The axes: one collection of points, of the members that did not diverge; of several architectures or
      widths one for each.

    Example:
      >>> save(dead(result), "dead.png")
    """
    ax = ax or new_axes(7.0, 4.6)
    if color is None and result.groups:
        for label, group, hue in _coloured(result):
            _scattered(result, "l0", "dead_fraction", group, ax, color=hue, label=label)
        ax.legend(frameon=False)
    else:
        _dots(result, "l0", "dead_fraction", color, ax)
    ax.set_ylim(-0.03, 1.03)
    return _worded(ax, result, "l0", "dead_fraction")


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


def _dots(result: SweepResult, x: str, y: str, color: str | None, ax: Axes) -> None:
    """A point per member that did not diverge, and the bar that explains its colour."""
    color = color or next((name for name in swept(result) if result.grid[name].dtype.kind != "U"), None)
    ok = np.flatnonzero(result.sound)
    shaded = {"color": HUES[0]} if color is None else shade(result.grid[color][ok])
    points = _scattered(result, x, y, ok, ax, **shaded)
    if color is not None:
        figure_of(ax).colorbar(points, ax=ax).set_label(color, parse_math=False)


def _scattered(
    result: SweepResult, x: str, y: str, members: np.ndarray, ax: Axes, **style: Any
) -> PathCollection:
    columns = {**result.metrics, **result.table}
    return ax.scatter(columns[x][members], columns[y][members], s=16, alpha=0.8, linewidths=0, **style)


def _coloured(result: SweepResult) -> Iterator[tuple[str, np.ndarray, str]]:
    """Each group's name, its members that did not diverge, and its colour."""
    for (label, group), hue in zip(result.groups.items(), itertools.cycle(CATEGORIES), strict=False):
        yield label, group[result.sound[group]], hue


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
    for label, group, hue in _coloured(result):
        _scattered(result, x, y, group, ax, color=hue)
        best = result.frontier(x, y, group)
        ax.plot(columns[x][best], columns[y][best], color=hue, lw=1.4, label=label)
        fronts.append(best)
    return np.concatenate(fronts)


def _labelled(ax: Axes, result: SweepResult, x: str, y: str, best: np.ndarray) -> Axes:
    """The words around a frontier, and its limits."""
    values = {**result.metrics, **result.table}[y]
    floor = lowest_shown(values[result.sound], values[best]) if y == "explained_variance" else None
    if floor is not None:
        ax.set_ylim(bottom=floor)
    if best.size:
        ax.legend(frameon=False, loc="lower right")
    return _worded(ax, result, x, y)


def _worded(ax: Axes, result: SweepResult, x: str, y: str) -> Axes:
    """What the axes are called, and of how many members it is."""
    total, diverged = len(result.sound), int((~result.sound).sum())
    ax.set_title(f"{total:,} members" + (f", {diverged:,} diverged" if diverged else ""))
    ax.set_xlabel(LABELS.get(x, x), parse_math=False)
    ax.set_ylabel(LABELS.get(y, y), parse_math=False)
    ax.grid(alpha=0.25)
    return ax
