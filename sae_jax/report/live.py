"""The page of a sweep that still trains: what it logged so far, drawn as it comes.

What was logged is put in the shape of a `SweepResult`, so that curves are those of the report; only the
frontier is another, since nothing is measured on all rows before the end.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from sae_jax.endings import OK
from sae_jax.grid import Grid, members
from sae_jax.report import plots
from sae_jax.report.figures import CATEGORIES, HUES, LABELS
from sae_jax.report.numbers import swept, thin, told
from sae_jax.report.page import rendered
from sae_jax.report.plots.words import Plot, legend, plain, plot, shade, words
from sae_jax.result import COLUMNS, SweepResult, join
from sae_jax.sweep import Look

MOST_DOTS = 300  # of the frontier: it is drawn again every second
FIRST_SHOWN = ("loss", "reconstruction", "l0")
"""Logs in the order in which a reader looks; others follow."""
NAMES = {"reconstruction": "reconstruction error"}
"""How logs are called on an axis that no column of the table has."""


def whole_table(grids: Sequence[Grid], labels: Sequence[dict[str, str | int]]) -> Grid:
    """The hyper-parameters of all members of a sweep: one grid as it is, several as `result.join` puts them.

    Args:
      grids: one per group.
      labels: what tells each from the others, `{"architecture": "topk", "d_sae": 256}`; one needs none.

    Returns:
      One row per member, in the order in which `Look` counts them.
    """
    return grids[0] if len(grids) == 1 else join([_unlogged(grid) for grid in grids], labels).grid


def so_far(looks: Iterable[Look], table: Grid) -> SweepResult | None:
    """What was logged so far, as a result without weights.

    Args:
      looks: the latest of each chunk of members and each round, in any order.
      table: from `whole_table`.

    Returns:
      A `SweepResult` whose history is NaN where nothing was logged yet, and whose metrics are each member's
      latest logs; what is measured at the end only is NaN. None before the first point of any member.
    """
    seen = [look for look in looks if len(look.history["step"])]
    if not seen:
        return None
    steps = np.unique(np.concatenate([look.history["step"] for look in seen]))
    history = {"step": steps}
    for look in seen:
        points = np.searchsorted(steps, look.history["step"])
        for name, log in look.history.items():
            if name != "step":
                if name not in history:
                    history[name] = np.full((len(steps), members(table)), np.nan, np.float32)
                history[name][points, look.first : look.stop] = log
    empty = _unlogged(table)
    latest = {name: _latest(log) for name, log in history.items() if name != "step"}
    return empty._replace(metrics={**empty.metrics, **latest}, history=history)


def drawn(result: SweepResult) -> dict[str, Plot]:
    """The interim frontier, and a plot of curves per log.

    Args:
      result: from `so_far`.

    Returns:
      Plots by the name of the element that shows each: `frontier`, `curve-loss`, `curve-l0`, ...
    """
    names = sorted(
        (name for name in result.history if name != "step"),
        key=lambda name: FIRST_SHOWN.index(name) if name in FIRST_SHOWN else len(FIRST_SHOWN),
    )
    found = frontier(result)
    curves = {f"curve-{name}": _curves(result, name) for name in names}
    return curves if found is None else {"frontier": found, **curves}


def frontier(result: SweepResult) -> Plot | None:
    """Latest logged L0 against latest logged error, and a line through those that none beats in both.

    Args:
      result: from `so_far`. Where no reconstruction error is logged, the loss is drawn.

    Returns:
      The plot; None where no member has both.
    """
    y = "reconstruction" if "reconstruction" in result.metrics else "loss"
    if "l0" not in result.metrics:
        return None
    xs, ys = result.metrics["l0"], result.metrics[y]
    known = np.flatnonzero(np.isfinite(xs) & np.isfinite(ys))
    if not known.size:
        return None
    best = result.frontier(y=y)
    shown = known[thin(known.size, np.searchsorted(known, best), MOST_DOTS)]
    color = next(iter(swept(result)), None)
    if result.groups:
        hues = itertools.cycle(CATEGORIES)
        data = [
            trace
            for (label, group), hue in zip(result.groups.items(), hues, strict=False)
            for trace in (
                _line(result, y, group, {"color": hue}, **legend(label)),
                _dots(result, y, np.intersect1d(shown, group), {"color": hue}),
            )
        ]
    else:
        marker = {"color": HUES[0]} if color is None else shade(result.grid[color][shown], color)
        data = [_line(result, y, known, {}, showlegend=False), _dots(result, y, shown, marker)]
    scale = {"type": "log", "exponentformat": "power"} if ys[shown].min() > 0 else {}
    return plot(
        data,
        xaxis={"title": {"text": LABELS["l0"]}},
        yaxis={"title": {"text": NAMES.get(y, y)}, **scale},
        hovermode="closest",
    )


def live_page(run: str, kind: str, count: int, steps: int, about: Mapping[str, str]) -> str:
    """The page that asks for the state of a run once a second and shows it.

    It asks for `state.json` beside it, and for `report.html` when the run has finished; plotly is in it.

    Args:
      run: names this run and no other; a state of another makes the page begin anew.
      kind: "sweep" or "train".
      count: of members.
      steps: of each.
      about: what is known before the first step: the command, the data, the folder.

    Returns:
      The HTML text.
    """
    return rendered("live.html", {}, run=run, kind=kind, count=count, steps=steps, about=about)


def _unlogged(table: Grid) -> SweepResult:
    """Of members of which nothing is known."""
    nothing = np.full(members(table), np.nan)
    status = np.full(members(table), OK)
    return SweepResult((), table, dict.fromkeys(COLUMNS, nothing), {"step": np.array([], int)}, status)


def _latest(log: Float[np.ndarray, "points members"]) -> Float[np.ndarray, "members"]:
    """Each member's last finite value; NaN where there is none."""
    last = len(log) - 1 - np.isfinite(log[::-1]).argmax(axis=0)
    return log[last, np.arange(log.shape[1])]


def _curves(result: SweepResult, name: str) -> Plot:
    """The report's curves; an error on a log axis, as a loss is, and single members by architecture."""
    found = plots.curves(result, name)
    data, layout = found["data"], found["layout"]
    if name in NAMES:
        values = [value for trace in data for value in trace["y"] if value is not None]
        axis = {"title": {"text": NAMES[name]}, **({"type": "log"} if min(values, default=0) > 0 else {})}
        layout = {**layout, "yaxis": axis}
    if not result.groups or result.settings.repeated or len(data) != members(result.grid):
        return {"data": data, "layout": layout}
    keys = []
    for (label, group), hue in zip(result.groups.items(), itertools.cycle(CATEGORIES), strict=False):
        own = {"line": {"width": 1.5, "color": hue}, "legendgroup": words(label)}
        keys.append({"type": "scatter", "mode": "lines", "x": [None], "y": [None], **own, **legend(label)})
        for row in group.tolist():
            data[row] = {**data[row], **own}
    return {"data": [*data, *keys], "layout": layout}


def _line(result: SweepResult, y: str, among: np.ndarray, line: Plot, **more: Any) -> Plot:
    best = result.frontier(y=y, among=among)
    return {
        **_scatter("lines", result, y, best),
        "line": {"width": 1.5, **line},
        "hoverinfo": "skip",
        **more,
    }


def _dots(result: SweepResult, y: str, shown: np.ndarray, marker: Plot) -> Plot:
    texts = [told(result, index, "\n", ("l0", y)) for index in shown.tolist()]
    return {
        **_scatter("markers", result, y, shown),
        "marker": {"size": 8, "opacity": 0.85, **marker},
        "hoverinfo": "text",
        "hovertext": [words(text) for text in texts],
        "showlegend": False,
    }


def _scatter(mode: str, result: SweepResult, y: str, rows: np.ndarray) -> Plot:
    place = {"x": plain(result.metrics["l0"][rows]), "y": plain(result.metrics[y][rows])}
    return {"type": "scatter", "mode": mode, **place}
