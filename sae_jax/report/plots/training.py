"""What happens over training."""

import numpy as np

from sae_jax.report import numbers
from sae_jax.report.figures.canvas import LABELS, hues
from sae_jax.report.plots.words import Plot, plain, plot, words
from sae_jax.result import SweepResult


def curves(result: SweepResult, name: str) -> Plot:
    """A curve per member; where seeds vary or members are many, median and quartiles by the first axis."""
    steps, drawn = result.history["step"], numbers.curves(result, name)
    data = []
    for one, hue in zip(drawn, hues(np.array([one.value for one in drawn])), strict=True):
        if one.low is None or one.high is None:
            data.append(curve(steps, one.middle, hue, one.label, showlegend=False))
            continue
        group = {"legendgroup": words(one.label)}
        edge = {"line": {"width": 0}, "hoverinfo": "skip", "showlegend": False, **group}
        data += [
            curve(steps, one.low, hue, one.label, **edge),
            curve(steps, one.high, hue, one.label, **edge, fill="tonexty", fillcolor=f"{hue}1c"),
            curve(steps, one.middle, hue, one.label, **group),
        ]
    scale = {"type": "log"} if numbers.log_scaled(name, result.history[name]) else {}
    return plot(
        data,
        xaxis={"title": {"text": "training steps"}},
        yaxis={"title": {"text": LABELS.get(name, name)}, **scale},
        hovermode="closest",
    )


def curve(xs: np.ndarray, ys: np.ndarray, hue: str, label: str, **more) -> Plot:
    """A line with a name."""
    points = {"x": plain(xs), "y": plain(ys), "name": words(label)}
    style = {"line": {"width": 1.5, "color": hue}, "hoverinfo": "x+y+name", "hoverlabel": {"namelength": -1}}
    return {"type": "scatter", "mode": "lines", **points, **style, **more}
