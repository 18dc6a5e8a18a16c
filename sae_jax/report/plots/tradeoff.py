"""Sparsity against fidelity, and against latents that are never active: a point per member."""

import itertools

import numpy as np

from sae_jax.report.figures.canvas import CATEGORIES, HUES, LABELS
from sae_jax.report.numbers import lowest_shown, setting_told, swept, thin, told
from sae_jax.report.plots.words import Plot, legend, plain, plot, reach, shade, words
from sae_jax.result import COLUMNS, SweepResult

MOST_POINTS = 3000


def frontier(result: SweepResult, y: str = "explained_variance") -> Plot | None:
    """Sparsity against one column: members, the frontier, and means over seeds with their intervals."""
    xs, ys = result.table["l0"], result.table[y]
    best = result.frontier(y=y)
    points = _drawable(result, y, best)
    if not points.size:
        return None
    floor = lowest_shown(ys[points], ys[best]) if y == "explained_variance" else None
    data = []
    for label, group, marker in _coloured(result, points):
        if label is None:
            data.append(_line(xs, ys, best, {}, showlegend=False))
        else:
            front = result.frontier(y=y, among=result.groups[label])
            data.append(_line(xs, ys, front, marker, **legend(label)))
        data.append(_dots(result, y, group, marker))
    top = float(max(ys[points].max(), 0))
    limits = {} if floor is None else {"range": [floor, top + 0.05 * (top - floor)]}
    drawn = _against_l0([*data, *_means(result, y)], y, **limits)
    # intervals over few seeds may be as wide as they like: the picture is of the members
    drawn["layout"]["xaxis"]["range"] = _around(xs[points])
    return drawn


def dead(result: SweepResult) -> Plot | None:
    """The share of latents that are never active, of each member."""
    points = _drawable(result, "dead_fraction", result.frontier())
    if not points.size:
        return None
    data = [
        _dots(result, "dead_fraction", group, marker)
        | ({} if label is None else {**legend(label), "showlegend": True})
        for label, group, marker in _coloured(result, points)
    ]
    return _against_l0(data, "dead_fraction", range=[-0.03, 1.03])


def _drawable(result: SweepResult, y: str, best: np.ndarray) -> np.ndarray:
    """The members to be drawn: those of the frontier, and as many others as a page bears."""
    known = np.flatnonzero(result.sound & np.isfinite(result.table["l0"]) & np.isfinite(result.table[y]))
    return known[thin(known.size, np.flatnonzero(np.isin(known, best)), MOST_POINTS)]


def _coloured(result: SweepResult, points: np.ndarray) -> list[tuple[str | None, np.ndarray, Plot]]:
    """The points by architecture or width; where there is one, all of them by the first axis."""
    if result.groups:
        hues = itertools.cycle(CATEGORIES)
        return [
            (label, np.intersect1d(points, group), {"color": hue})
            for (label, group), hue in zip(result.groups.items(), hues, strict=False)
        ]
    color = next(iter(swept(result)), None)
    marker = {"color": HUES[0]} if color is None else shade(result.grid[color][points], color)
    return [(None, points, marker)]


def _line(xs: np.ndarray, ys: np.ndarray, best: np.ndarray, line: Plot, **more) -> Plot:
    place = {"x": plain(xs[best]), "y": plain(ys[best]), "line": {"width": 1.5, **line}}
    return {"type": "scatter", "mode": "lines", **place, "hoverinfo": "skip", **more}


def _dots(result: SweepResult, y: str, points: np.ndarray, marker: Plot) -> Plot:
    """A point per member, which knows its member."""
    return {
        "type": "scatter",
        "mode": "markers",
        "x": plain(result.table["l0"][points]),
        "y": plain(result.table[y][points]),
        "customdata": points.tolist(),
        "marker": {"size": 8, "opacity": 0.85, **marker},
        "hoverinfo": "text",
        "hovertext": [words(told(result, index, "\n", COLUMNS)) for index in points.tolist()],
        "showlegend": False,
    }


def _means(result: SweepResult, y: str) -> list[Plot]:
    """Each setting's mean over seeds, with its interval both ways."""
    among = result.settings
    if not among.repeated:
        return []
    told = result.intervals()
    known = np.isfinite(told[y].mean) & np.isfinite(told["l0"].mean)
    across, up = (
        {"mean": plain(told[name].mean[known]), "half": plain(told[name].half_width[known])}
        for name in ("l0", y)
    )
    texts = [
        f"{setting_told(among.grid, row)}\nL0 {reach(told['l0'], row)}\n{y} {reach(told[y], row)}"
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
            "hovertext": [words(text) for text in texts],
            "showlegend": False,
        }
    ]


def _around(values: np.ndarray) -> list[float]:
    """A range that shows all values with some room."""
    room = 0.05 * np.ptp(values) or 1.0
    return plain(np.array([values.min() - room, values.max() + room]))


def _against_l0(data: list[Plot], y: str, **limits) -> Plot:
    return plot(
        data,
        xaxis={"title": {"text": LABELS["l0"]}},
        yaxis={"title": {"text": LABELS.get(y, y)}, **limits},
        hovermode="closest",
    )
