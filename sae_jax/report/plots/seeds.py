"""How far seeds agree."""

import numpy as np

from sae_jax.metrics.stability import Stability, StableAndTrue
from sae_jax.report.figures.canvas import HUES, LABELS, hues
from sae_jax.report.numbers import MOST_BANDS, setting_told, spread
from sae_jax.report.plots.training import curve
from sae_jax.report.plots.words import Plot, legend, plain, plot, reach, words
from sae_jax.result import SweepResult
from sae_jax.seeds import Interval

MOST_POINTS = 3000


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
    texts = [f"{setting_told(among.grid, row)}\nconsistency {reach(told, row)}" for row in rows.tolist()]
    bars = {"type": "data", "array": plain(found.error[rows]), "thickness": 1, "width": 3}
    points = {
        "type": "scatter",
        "mode": "markers",
        "x": plain(l0.mean[rows]),
        "y": plain(found.consistency[rows]),
        "error_y": bars,
        "marker": {"size": 8, "color": HUES[0]},
        "hoverinfo": "text",
        "hovertext": [words(text) for text in texts],
    }
    titles = {
        "xaxis": {"title": {"text": LABELS["l0"]}},
        "yaxis": {"title": {"text": "consistency"}, "range": [-0.03, 1.03]},
    }
    return plot([points], **titles, hovermode="closest")


def _back(result: SweepResult, found: Stability, rows: np.ndarray) -> Plot:
    """Per setting, at most six, the share of features that come back in so many other seeds or more."""
    shown = spread(rows, MOST_BANDS)
    levels = np.linspace(0, 1, 21)
    data = []
    for row, hue in zip(shown.tolist(), hues(np.arange(len(shown))), strict=True):
        shares = np.concatenate([found.comes_back[i] for i in result.settings.members[row]])
        shares = shares[np.isfinite(shares)]
        reached = np.array([(shares >= level - 1e-9).mean() if shares.size else np.nan for level in levels])
        label = setting_told(result.settings.grid, row)
        data.append(curve(levels, reached, hue, label, legendgroup=words(label)))
    return plot(
        data,
        xaxis={"title": {"text": "comes back in at least this share of seeds"}},
        yaxis={"title": {"text": "share of features"}},
        hovermode="closest",
    )


def _truth(result: SweepResult, found: Stability, told: StableAndTrue, rows: np.ndarray) -> Plot:
    """Per feature, how stable it is against how true it is."""
    data = []
    shown = spread(rows, MOST_BANDS)
    for row, hue in zip(shown.tolist(), hues(np.arange(len(shown))), strict=True):
        group = result.settings.members[row]
        stable, true = (
            np.concatenate([leaves[i] for i in group]) for leaves in (found.mean_cosine, told.true_cosine)
        )
        known = np.flatnonzero(np.isfinite(stable) & np.isfinite(true))
        picked = spread(known, MOST_POINTS // len(shown))
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": plain(stable[picked]),
                "y": plain(true[picked]),
                "marker": {"size": 5, "opacity": 0.5, "color": hue},
                "hoverinfo": "x+y+name",
                **legend(setting_told(result.settings.grid, row)),
            }
        )
    return plot(
        data,
        xaxis={"title": {"text": "stable: mean cosine with its partners"}},
        yaxis={"title": {"text": "true: largest true cosine"}},
        hovermode="closest",
    )
