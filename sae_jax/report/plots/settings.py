"""Metrics over two hyper-parameters."""

import itertools

import numpy as np

from sae_jax.report.numbers import Table, by_setting, short, swept
from sae_jax.report.plots.words import Plot, plain, plot, reach, scale, ticks, words
from sae_jax.result import SweepResult
from sae_jax.seeds import Interval

METRICS = ("explained_variance", "l0", "dead_fraction", "f1", "mcc", "consistency")
"""To choose from, where they are known."""
MOST_AXES = 4
"""Of which any two may be chosen."""


def axes(
    result: SweepResult,
    metric: str = "explained_variance",
    across: str | None = None,
    down: str | None = None,
) -> Plot | None:
    """A metric over two swept axes, the first two where none are named, averaged over all else."""
    table = by_setting(result, metric, across, down)
    return None if table is None else _drawn(table, metric)


def settings(result: SweepResult) -> dict[tuple[str, str], dict[str, Plot]]:
    """By pair of axes, and by metric, what can be drawn: for a reader to choose from."""
    pairs = itertools.combinations(swept(result)[:MOST_AXES], 2)
    metrics = [name for name in METRICS if name in result.table]
    drawn = {pair: {metric: axes(result, metric, *pair) for metric in metrics} for pair in pairs}
    some = {pair: {name: plot for name, plot in views.items() if plot} for pair, views in drawn.items()}
    return {pair: views for pair, views in some.items() if views}


def _drawn(table: Table, metric: str) -> Plot:
    name = metric.replace("_", " ")
    below = metric == "explained_variance" and np.nanmin(table.mean) < 0
    lowest = {"zmin": 0, "zmax": max(float(np.nanmax(table.mean)), 0.01)} if below else {}
    cells = {
        "type": "heatmap",
        "z": plain(table.mean),
        "colorscale": scale(),
        "colorbar": {"title": {"text": name.replace(" ", "<br>")}, "thickness": 12},
        "hoverinfo": "text",
        "hovertext": [
            [
                words(f"{table.across} {short(x)}\n{table.down} {short(y)}\n{name} {reach(row, place)}")
                for place, x in enumerate(table.xs)
            ]
            for y, row in zip(table.ys, map(Interval, table.mean, table.half_width), strict=True)
        ],
        **lowest,
    }
    return plot([cells], xaxis=ticks(table.xs, table.across), yaxis=ticks(table.ys, table.down))
