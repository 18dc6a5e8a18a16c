"""What all figures share: axes, colours, and what columns are called.

Figures are made directly rather than by pyplot: no display, no global state, and a second less to import.
"""

from pathlib import Path
from typing import cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize, to_hex
from matplotlib.figure import Figure

from sae_jax.report.numbers import log_spaced

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


def save(ax: Axes, path: str | Path, dpi: int = 150) -> None:
    """Write the figure that holds `ax`.

    Args:
      ax: any axes of the figure.
      path: the ending says the format.
      dpi: pixels per inch.
    """
    figure_of(ax).savefig(path, dpi=dpi)


def new_axes(width: float, height: float) -> Axes:
    """Axes on a figure of their own, in inches."""
    return Figure(figsize=(width, height), layout="constrained").add_subplot()


def figure_of(ax: Axes) -> Figure:
    """The whole figure that the axes lie in."""
    return cast(Figure, ax.get_figure(root=True))


def colormap() -> LinearSegmentedColormap:
    """`HUES`, and what lies between."""
    return LinearSegmentedColormap.from_list("low to high", HUES)


def shade(values: np.ndarray) -> dict:
    """What `scatter` takes to colour points by a hyper-parameter."""
    norm = (LogNorm if values.size and log_spaced(values) else Normalize)()
    return {"c": values, "cmap": colormap(), "norm": norm}


def position(values: np.ndarray) -> np.ndarray:
    """Where values lie on an axis on which they are evenly spaced, if they are by a factor or are words."""
    if np.asarray(values).dtype.kind == "U":
        return np.unique(values, return_inverse=True)[1].astype(float)
    values = np.asarray(values, float)
    return np.log10(values) if log_spaced(values) else values


def hues(values: np.ndarray) -> list[str]:
    """A colour for each value, from low to high."""
    at = position(values) - position(values).min()
    return [to_hex(rgba) for rgba in colormap()(at / (at.max() or 1))]
