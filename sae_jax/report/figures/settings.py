"""A metric over two hyper-parameters."""

import numpy as np
from matplotlib.axes import Axes

from sae_jax.base import require
from sae_jax.report import numbers
from sae_jax.report.figures.canvas import LABELS, colormap, figure_of, new_axes
from sae_jax.report.numbers import short, spread
from sae_jax.result import SweepResult

MOST_TICKS = 8
MOST_WRITTEN = 100
"""Cells with their number in them."""


def by_setting(
    result: SweepResult,
    metric: str = "explained_variance",
    x_axis: str | None = None,
    y_axis: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """A heat map over two swept hyper-parameters: the mean over seeds and other axes.

    Args:
      result: the sweep. Members that diverged are left out.
      metric: a column of the table.
      x_axis: across; None for the first that is swept.
      y_axis: down; None for the next.
      ax: where to draw; None for a new figure.

    Returns:
      The axes: one image, with a number in each cell where there are at most 100.

    Raises:
      InputError: fewer than two axes, one that is not swept, no such column, nothing finite, or more than
        10,000 cells.

    Example:
      >>> save(by_setting(result, "l0", "l1", "lr"), "l0.png")
    """
    table = numbers.by_setting(result, metric, x_axis, y_axis)
    require(
        table is not None,
        "a heat map needs two swept axes, at most 10,000 cells, and a member with a finite value",
    )
    assert table is not None
    rows, columns = table.mean.shape
    ax = ax or new_axes(min(10, 2.6 + 0.7 * columns), min(8, 1.6 + 0.45 * rows))
    image = ax.imshow(table.mean, cmap=colormap(), aspect="auto", origin="lower")
    if table.mean.size <= MOST_WRITTEN:
        for (row, column), value in np.ndenumerate(table.mean):
            if np.isfinite(value):
                ax.text(column, row, f"{value:.3g}", ha="center", va="center", color="white", fontsize=8)
    across, down = (spread(np.arange(len(values)), MOST_TICKS) for values in (table.xs, table.ys))
    ax.set_xticks(across, [short(table.xs[place]) for place in across], parse_math=False)
    ax.set_yticks(down, [short(table.ys[place]) for place in down], parse_math=False)
    ax.tick_params(length=0)
    ax.set_xlabel(table.across, parse_math=False)
    ax.set_ylabel(table.down, parse_math=False)
    figure_of(ax).colorbar(image, ax=ax).set_label(LABELS.get(metric, metric), parse_math=False)
    return ax
