"""What happens over training."""

import numpy as np
from matplotlib.axes import Axes

from sae_jax.base import require
from sae_jax.report import numbers
from sae_jax.report.figures.canvas import LABELS, colormap, hues, new_axes
from sae_jax.report.numbers import quartiles
from sae_jax.result import SweepResult

MOST_NAMED = 8
"""Curves in a legend."""


def curves(result: SweepResult, name: str = "loss", ax: Axes | None = None) -> Axes:
    """A log over training, coloured by the first swept hyper-parameter.

    Of up to 32 members without seeds each has its curve. Else there is one for each value, at most six,
    evenly picked: the median of the members that share it, and the band between their quartiles.

    Args:
      result: the sweep.
      name: a log of `result.history`: "loss", "l0", ...
      ax: where to draw; None for a new figure.

    Returns:
      The axes: a line per curve, and a band where it is a median.

    Raises:
      InputError: no such log.

    Example:
      >>> save(curves(result, "l0"), "l0.png")
    """
    logs = [each for each in result.history if each != "step"]
    require(name in logs, f"there is no log {name!r}; there are: {', '.join(logs)}")
    ax = ax or new_axes(6.4, 4.2)
    steps, drawn = result.history["step"], numbers.curves(result, name)
    for curve, hue in zip(drawn, hues(np.array([curve.value for curve in drawn])), strict=True):
        ax.plot(steps, curve.middle, color=hue, lw=1.5, label=curve.label)
        if curve.low is not None and curve.high is not None:
            ax.fill_between(steps, curve.low, curve.high, color=hue, alpha=0.15, linewidth=0)
    if numbers.log_scaled(name, result.history[name]):
        ax.set_yscale("log")
    ax.set_xlabel("training steps")
    ax.set_ylabel(LABELS.get(name, name), parse_math=False)
    ax.grid(alpha=0.25)
    if len(drawn) <= MOST_NAMED:
        _legend(ax)
    return ax


def shrinkage(results: dict[str, SweepResult], ax: Axes | None = None) -> Axes:
    """Mean |f| over training, a curve per sweep: the median over its members and the band of quartiles.

    A decoder that is free lets the encoder shrink to escape the penalty; one of unit norm does not.

    Args:
      results: sweeps by the name to show, each with a log `sparsity`.
      ax: where to draw; None for a new figure.

    Returns:
      The axes: one line and one band per sweep.

    Example:
      >>> shrinkage({"free decoder": faithful, "unit-norm decoder": constrained})
    """
    ax = ax or new_axes(6.4, 4.2)
    colours = colormap()(np.linspace(0, 1, max(2, len(results))))
    for (name, result), hue in zip(results.items(), colours, strict=False):
        steps = result.history["step"]
        low, median, high = quartiles(result.history["sparsity"])
        ax.plot(steps, median, color=hue, label=name)
        ax.fill_between(steps, low, high, color=hue, alpha=0.2, linewidth=0)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("training steps")
    ax.set_ylabel("mean |f|")
    ax.set_title("Median over seeds, and quartiles")
    ax.grid(alpha=0.25)
    _legend(ax)
    return ax


def _legend(ax: Axes) -> None:
    for text in ax.legend(frameon=False).get_texts():
        text.set_parse_math(False)
