"""Words, numbers and colours as plotly takes them.

What a user named goes through `words`: plotly reads some HTML in labels, and so would a hostile name.
"""

import html
import math
from typing import Any

import numpy as np

from sae_jax.report.figures.canvas import HUES, position
from sae_jax.report.numbers import short, spread
from sae_jax.seeds import Interval

MOST_TICKS = 6

Plot = dict[str, Any]
"""A plotly figure, `{"data": [...], "layout": {...}}`, or what the page's script draws one from."""


def plot(data: list[Plot], **layout: Any) -> Plot:
    """A figure of some traces."""
    return {"data": data, "layout": layout}


def words(text: str) -> str:
    """Text as plotly shows it letter by letter; a line's end stays one."""
    return html.escape(text, quote=False).replace("\n", "<br>")


def plain(values: np.ndarray) -> list:
    """Nested lists for JSON: five digits, and None for what is not finite."""
    if np.ndim(values) > 1:
        return [plain(row) for row in values]
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in np.asarray(values).tolist()]


def reach(told: Interval, row: int) -> str:
    """A mean with half of its interval."""
    half = told.half_width[row]
    return f"{short(told.mean[row])} ±{half:.2g}" if np.isfinite(half) else short(told.mean[row])


def legend(label: str) -> Plot:
    """What puts a trace under a name in the legend."""
    return {"name": words(label), "legendgroup": words(label)}


def ticks(values: np.ndarray, name: str) -> dict[str, Any]:
    """An axis with one evenly spaced place per value."""
    at = spread(np.arange(len(values)), MOST_TICKS)
    return {
        "title": {"text": words(name)},
        "tickvals": at.tolist(),
        "ticktext": [words(short(values[index])) for index in at],
        "showgrid": False,
        "zeroline": False,
    }


def shade(values: np.ndarray, name: str) -> dict[str, Any]:
    """Colours of markers by a hyper-parameter, and the bar that explains them."""
    marks = spread(np.unique(values), MOST_TICKS)
    # of both together, so that they share a scale
    places = position(np.concatenate([values, marks])).tolist()
    bar = {
        "title": {"text": words(name)},
        "tickvals": places[len(values) :],
        "ticktext": [words(short(value)) for value in marks],
        "thickness": 12,
    }
    return {"color": places[: len(values)], "colorscale": scale(), "colorbar": bar}


def scale() -> list[list]:
    """`HUES` as plotly's colour scale."""
    return [[index / (len(HUES) - 1), hue] for index, hue in enumerate(HUES)]
