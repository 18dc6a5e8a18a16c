"""The interactive figures of a sweep's page, as plain plotly dictionaries ready for JSON.

What a user named goes through `_words`: plotly reads some HTML in labels, and so would a hostile name.
"""

import html
import itertools
import math
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, to_hex

from sae_jax.grid import Grid
from sae_jax.metrics import DENSITY_BINS
from sae_jax.metrics.stability import Stability, StableAndTrue
from sae_jax.report.figures import (
    CATEGORIES,
    HUES,
    LABELS,
    log_spaced,
    lowest_shown,
    quartiles,
    swept,
)
from sae_jax.result import COLUMNS, SweepResult
from sae_jax.seeds import Interval
from sae_jax.synthetic import Tokens

MOST_POINTS = 3000  # of the frontier
MOST_CURVES = 32  # one per member up to here
MOST_BANDS = 6
MOST_TICKS = 6
MOST_CELLS = 64  # tokens, and features, of a heat map
LONGEST_NAME = 32

Plot = dict[str, Any]
"""A plotly figure, `{"data": [...], "layout": {...}}`, or what the page's script draws one from."""


def frontier(result: SweepResult, y: str = "explained_variance") -> Plot | None:
    """Sparsity against one column: members, the frontier, and means over seeds with their intervals."""
    columns = result.table
    xs, ys = columns["l0"], columns[y]
    best = result.frontier(y=y)
    drawable = np.flatnonzero(result.sound & np.isfinite(xs) & np.isfinite(ys))
    if not drawable.size:
        return None
    points = drawable[thin(drawable.size, np.searchsorted(drawable, best), MOST_POINTS)]
    color = next(iter(swept(result)), None)
    floor = lowest_shown(ys[points], ys[best]) if y == "explained_variance" else None
    if result.groups:
        data = [
            trace
            for (label, group), hue in zip(result.groups.items(), itertools.cycle(CATEGORIES), strict=False)
            for trace in (
                _line(xs, ys, result.frontier(y=y, among=group), {"color": hue}, **_legend(label)),
                _dots(result, xs, ys, np.intersect1d(points, group), {"color": hue}),
            )
        ]
    else:
        marker = {"color": HUES[0]} if color is None else _shade(result.grid[color][points], color)
        data = [_line(xs, ys, best, {}, showlegend=False), _dots(result, xs, ys, points, marker)]
    data += _means(result, y)
    top = float(max(ys[points].max(), 0))
    limits = {} if floor is None else {"range": [floor, top + 0.05 * (top - floor)]}
    return _plot(
        data,
        xaxis={"title": {"text": LABELS["l0"]}},
        yaxis={"title": {"text": LABELS.get(y, y)}, **limits},
        hovermode="closest",
    )


def _means(result: SweepResult, y: str) -> list[Plot]:
    """Each setting's mean over seeds, with its interval both ways."""
    among = result.settings
    if not among.repeated:
        return []
    told = result.intervals()
    known = np.isfinite(told[y].mean) & np.isfinite(told["l0"].mean)
    across, up = (
        {"mean": _plain(told[name].mean[known]), "half": _plain(told[name].half_width[known])}
        for name in ("l0", y)
    )
    texts = [
        f"{_setting(among.grid, row)}\nL0 {_reach(told['l0'], row)}\n{y} {_reach(told[y], row)}"
        for row in np.flatnonzero(known).tolist()
    ]
    bars = {"type": "data", "thickness": 1, "width": 3, "color": "#888"}
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "x": across["mean"],
            "y": up["mean"],
            "error_x": {**bars, "array": across["half"]},
            "error_y": {**bars, "array": up["half"]},
            "marker": {"size": 6, "color": "#888", "symbol": "line-ew-open"},
            "hoverinfo": "text",
            "hovertext": [_words(text) for text in texts],
            "showlegend": False,
        }
    ]


def _setting(grid: Grid, row: int) -> str:
    """A setting in words."""
    has = {name: column[row] for name, column in grid.items() if short(column[row]) != "nan"}
    return ", ".join(f"{name} {short(value)}" for name, value in has.items()) or "all seeds"


def _reach(told: Interval, row: int) -> str:
    half = told.half_width[row]
    return f"{short(told.mean[row])} ±{half:.2g}" if np.isfinite(half) else short(told.mean[row])


def _legend(label: str) -> Plot:
    return {"name": _words(label), "legendgroup": _words(label)}


def _line(xs: np.ndarray, ys: np.ndarray, best: np.ndarray, line: Plot, **more) -> Plot:
    place = {"x": _plain(xs[best]), "y": _plain(ys[best]), "line": {"width": 1.5, **line}}
    return {"type": "scatter", "mode": "lines", **place, "hoverinfo": "skip", **more}


def _dots(result: SweepResult, xs: np.ndarray, ys: np.ndarray, points: np.ndarray, marker: Plot) -> Plot:
    return {
        "type": "scatter",
        "mode": "markers",
        "x": _plain(xs[points]),
        "y": _plain(ys[points]),
        "marker": {"size": 8, "opacity": 0.85, **marker},
        "hoverinfo": "text",
        "hovertext": [_words(told(result, index, "\n", COLUMNS)) for index in points.tolist()],
        "showlegend": False,
    }


def curves(result: SweepResult, name: str) -> Plot:
    """A curve per member; where seeds vary or members are many, median and quartiles by the first axis."""
    steps, log = result.history["step"], result.history[name]
    axis = next(iter(swept(result)), None)
    column = np.zeros(log.shape[1]) if axis is None else result.grid[axis]
    if log.shape[1] <= MOST_CURVES and not result.settings.repeated:
        hues = _hues(column)
        data = [
            _curve(steps, log[:, index], hues[index], told(result, index, ", "), showlegend=False)
            for index in range(log.shape[1])
        ]
    else:
        values = spread(np.unique(column), MOST_BANDS)
        data = []
        for value, hue in zip(values, _hues(values), strict=True):
            low, median, high = quartiles(log[:, column == value])
            label = "all members" if axis is None else f"{axis} {short(value)}"
            edge = {
                "line": {"width": 0},
                "hoverinfo": "skip",
                "showlegend": False,
                "legendgroup": _words(label),
            }
            data += [
                _curve(steps, low, hue, label, **edge),
                _curve(steps, high, hue, label, **edge, fill="tonexty", fillcolor=f"{hue}1c"),
                _curve(steps, median, hue, label, legendgroup=_words(label)),
            ]
    shown = log[np.isfinite(log)]
    scale = {"type": "log"} if name == "loss" and shown.size and shown.min() > 0 else {}
    return _plot(
        data,
        xaxis={"title": {"text": "training steps"}},
        yaxis={"title": {"text": LABELS.get(name, name)}, **scale},
        hovermode="closest",
    )


def _curve(steps: np.ndarray, values: np.ndarray, hue: str, label: str, **more) -> Plot:
    points = {"x": _plain(steps), "y": _plain(values), "name": _words(label)}
    style = {"line": {"width": 1.5, "color": hue}, "hoverinfo": "x+y+name", "hoverlabel": {"namelength": -1}}
    return {"type": "scatter", "mode": "lines", **points, **style, **more}


def axes(result: SweepResult) -> Plot | None:
    """Explained variance over the first two swept axes, averaged over all else."""
    if len(swept(result)) < 2:
        return None
    across, down = swept(result)[:2]
    xs, column = np.unique(result.grid[across], return_inverse=True)
    ys, row = np.unique(result.grid[down], return_inverse=True)
    value = result.metrics["explained_variance"]
    ok = result.sound & np.isfinite(value)
    total, count = np.zeros((2, len(ys), len(xs)))
    np.add.at(total, (row[ok], column[ok]), value[ok])
    np.add.at(count, (row[ok], column[ok]), 1)
    mean = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
    # a spread over other axes is none over seeds
    reach = np.full_like(mean, np.nan)
    if set(swept(result)) == {across, down}:
        places = [(row[rows[0]], column[rows[0]]) for rows in result.settings.members]
        reach[tuple(np.transpose(places))] = result.intervals()["explained_variance"].half_width
    if not count.any():
        return None
    lowest = {"zmin": 0, "zmax": max(float(np.nanmax(mean)), 0.01)} if np.nanmin(mean) < 0 else {}
    names = _words(across), _words(down)
    cells = {
        "type": "heatmap",
        "z": _plain(mean),
        "colorscale": _scale(),
        "colorbar": {"title": {"text": "explained<br>variance"}, "thickness": 12},
        "hoverinfo": "text",
        "hovertext": [
            [
                f"{names[0]} {short(x)}<br>{names[1]} {short(y)}<br>"
                f"explained variance {_reach(Interval(mean[i], reach[i]), j)}"
                for j, x in enumerate(xs)
            ]
            for i, y in enumerate(ys)
        ],
        **lowest,
    }
    return _plot([cells], xaxis=_ticks(xs, across), yaxis=_ticks(ys, down))


def stability(result: SweepResult, found: Stability, told: StableAndTrue | None) -> dict[str, Plot]:
    """How far seeds agree: by setting, by feature, and, where true features are known, whether rightly."""
    among = result.settings
    several = np.array([len(group) > 1 for group in among.members]) & np.isfinite(found.consistency)
    rows = np.flatnonzero(several)
    if not rows.size:
        return {}
    drawn = {
        "stability-consistency": _consistency(result, found, rows),
        "stability-features": _back(result, found, rows),
    }
    return drawn if told is None else {**drawn, "stability-truth": _truth(result, found, told, rows)}


def _consistency(result: SweepResult, found: Stability, rows: np.ndarray) -> Plot:
    among, l0 = result.settings, result.intervals()["l0"]
    told = Interval(found.consistency, found.error)
    texts = [f"{_setting(among.grid, row)}\nconsistency {_reach(told, row)}" for row in rows.tolist()]
    reach = {"type": "data", "array": _plain(found.error[rows]), "thickness": 1, "width": 3}
    points = {
        "type": "scatter",
        "mode": "markers",
        "x": _plain(l0.mean[rows]),
        "y": _plain(found.consistency[rows]),
        "error_y": reach,
        "marker": {"size": 8, "color": HUES[0]},
        "hoverinfo": "text",
        "hovertext": [_words(text) for text in texts],
    }
    titles = {"xaxis": {"title": {"text": LABELS["l0"]}}, "yaxis": {"title": {"text": "consistency"}}}
    return _plot([points], **titles, hovermode="closest")


def _back(result: SweepResult, found: Stability, rows: np.ndarray) -> Plot:
    """Per setting, at most six, the share of features that come back in so many other seeds or more."""
    shown = spread(rows, MOST_BANDS)
    levels = np.linspace(0, 1, 21)
    data = []
    for row, hue in zip(shown.tolist(), _hues(np.arange(len(shown))), strict=True):
        shares = np.concatenate([found.comes_back[i] for i in result.settings.members[row]])
        shares = shares[np.isfinite(shares)]
        reached = np.array([(shares >= level - 1e-9).mean() if shares.size else np.nan for level in levels])
        label = _setting(result.settings.grid, row)
        data.append(_curve(levels, reached, hue, label, legendgroup=_words(label)))
    return _plot(
        data,
        xaxis={"title": {"text": "comes back in at least this share of the other seeds"}},
        yaxis={"title": {"text": "share of features"}},
        hovermode="closest",
    )


def _truth(result: SweepResult, found: Stability, told: StableAndTrue, rows: np.ndarray) -> Plot:
    """Per feature, how stable it is against how true it is."""
    data = []
    shown = spread(rows, MOST_BANDS)
    for row, hue in zip(shown.tolist(), _hues(np.arange(len(shown))), strict=True):
        group = result.settings.members[row]
        stable, true = (
            np.concatenate([leaves[i] for i in group]) for leaves in (found.mean_cosine, told.true_cosine)
        )
        known = np.flatnonzero(np.isfinite(stable) & np.isfinite(true))
        picked = spread(known, MOST_POINTS // len(shown))
        label = _setting(result.settings.grid, row)
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": _plain(stable[picked]),
                "y": _plain(true[picked]),
                "marker": {"size": 5, "opacity": 0.5, "color": hue},
                "name": _words(label),
                "legendgroup": _words(label),
                "hoverinfo": "x+y+name",
            }
        )
    return _plot(
        data,
        xaxis={"title": {"text": "stable: mean cosine with its partners"}},
        yaxis={"title": {"text": "true: largest true cosine"}},
        hovermode="closest",
    )


def features(result: SweepResult, shown: list[int], tokens: Tokens | None) -> Plot | None:
    """What each member shown makes of the tokens; the script draws the one that is chosen."""
    saved = [index for index in shown if index in result.kept]
    if tokens is None or not saved:
        return None
    x = jnp.asarray(tokens.x[:MOST_CELLS])
    views = {}
    for index in saved:
        sae, params = result.member(index)
        f = np.asarray(sae.encode(params, x))  # not jitted: each member's function would compile anew
        # the features most active on these tokens, in their own order
        chosen = np.sort(np.argsort(-f.max(axis=0), kind="stable")[:MOST_CELLS])
        views[str(index)] = {"features": chosen.tolist(), "z": _plain(f[:, chosen])}
    names = [name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…" for name in tokens.names]
    return {"tokens": [_words(name) for name in names[:MOST_CELLS]], "views": views}


def density(result: SweepResult, shown: list[int]) -> Plot | None:
    """How often latents fire, for each member shown; absent from a result read from a folder."""
    if "density_histogram" not in result.metrics or not shown:
        return None
    middles = (DENSITY_BINS[:-1] + DENSITY_BINS[1:]) / 2
    counts = result.metrics["density_histogram"][shown]
    return {
        "middles": middles.tolist(),
        "width": float(np.diff(DENSITY_BINS)[0]),
        "views": {str(index): _plain(row) for index, row in zip(shown, counts, strict=True)},
    }


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


def _words(text: str) -> str:
    """Text as plotly shows it letter by letter; a line's end stays one."""
    return html.escape(text, quote=False).replace("\n", "<br>")


def short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float | np.floating) else str(value)


def _plain(values: np.ndarray) -> list:
    """Nested lists for JSON: five digits, and None for what is not finite."""
    if np.ndim(values) > 1:
        return [_plain(row) for row in values]
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in np.asarray(values).tolist()]


def _plot(data: list[Plot], **layout) -> Plot:
    return {"data": data, "layout": layout}


def _position(values: np.ndarray) -> np.ndarray:
    if np.asarray(values).dtype.kind == "U":
        return np.unique(values, return_inverse=True)[1].astype(float)
    values = np.asarray(values, float)
    return np.log10(values) if log_spaced(values) else values


def _ticks(values: np.ndarray, name: str) -> dict[str, Any]:
    """An axis with one evenly spaced place per value."""
    at = spread(np.arange(len(values)), MOST_TICKS)
    text = [short(values[index]) for index in at]
    return {
        "title": {"text": _words(name)},
        "tickvals": at.tolist(),
        "ticktext": text,
        "showgrid": False,
        "zeroline": False,
    }


def _shade(values: np.ndarray, name: str) -> dict[str, Any]:
    """Colours of markers by a hyper-parameter, and the bar that explains them."""
    ticks = spread(np.unique(values), MOST_TICKS)
    position = _position(np.concatenate([values, ticks])).tolist()
    bar = {
        "title": {"text": _words(name)},
        "tickvals": position[len(values) :],
        "ticktext": [short(value) for value in ticks],
        "thickness": 12,
    }
    return {"color": position[: len(values)], "colorscale": _scale(), "colorbar": bar}


def _scale() -> list[list]:
    return [[index / (len(HUES) - 1), hue] for index, hue in enumerate(HUES)]


def _hues(values: np.ndarray) -> list[str]:
    at = _position(values) - _position(values).min()
    return [to_hex(rgba) for rgba in LinearSegmentedColormap.from_list("", HUES)(at / (at.max() or 1))]
