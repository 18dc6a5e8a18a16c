"""What differs between seeds: what is found, and what comes back."""

import numpy as np
from jaxtyping import Bool
from matplotlib.axes import Axes

from sae_jax.metrics.stability import Stability
from sae_jax.report.figures.canvas import HUES, LABELS, new_axes
from sae_jax.result import SweepResult


def found_distribution(found: Bool[np.ndarray, "members truths"], ax: Axes | None = None) -> Axes:
    """How many of the true features a run finds: the share of runs that find none, one, two and so on.

    Args:
      found: from `synthetic.features_found` over seeds.
      ax: where to draw; None for a new figure.

    Returns:
      The axes: a bar per count with its 95 % interval (Wilson).

    Example:
      >>> found_distribution(features_found(f, tokens))
    """
    ax = ax or new_axes(5.4, 3.8)
    runs, truths = np.shape(found)
    share = np.bincount(np.sum(found, axis=-1), minlength=truths + 1) / runs
    low, high = wilson(share, runs)
    # rounding can put an end of the interval a hair inside the bar's own end
    reach = np.maximum([share - low, high - share], 0)
    bars = ax.bar(range(truths + 1), share, yerr=reach, color=HUES[0], capsize=4, ecolor="#444")
    texts = [f"{each:.1%}" for each in share]
    for bar, text, top in zip(bars, texts, high, strict=True):
        ax.text(bar.get_x() + bar.get_width() / 2, top + 0.015, text, ha="center", fontsize=9)
    ax.set_ylim(0, min(1.1, high.max() + 0.1))
    ax.set_xticks(range(truths + 1))
    ax.set_xlabel(f"of the {truths} true features, found by one run")
    ax.set_ylabel("share of seeds")
    ax.set_title(f"{runs:,} seeds")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def stability(result: SweepResult, found: Stability | None = None, ax: Axes | None = None) -> Axes:
    """How far seeds agree: the consistency of each setting, against its mean L0.

    Args:
      result: the sweep, with several seeds.
      found: `result.stability()`, where it is known already; it may take minutes.
      ax: where to draw; None for a new figure.

    Returns:
      The axes: a point per setting with the 95 % interval of its consistency.

    Raises:
      InputError: as `result.stability` where `found` is left out.

    Example:
      >>> save(stability(result), "stability.png")
    """
    found = result.stability() if found is None else found
    ax = ax or new_axes(6.4, 4.2)
    l0 = result.intervals()["l0"].mean
    several = np.array([len(group) > 1 for group in result.settings.members])
    ax.errorbar(
        l0[several],
        found.consistency[several],
        yerr=found.error[several],
        fmt="o",
        color=HUES[0],
        ms=5,
        elinewidth=1,
        capsize=3,
    )
    ax.set_ylim(-0.03, 1.03)
    ax.set_xlabel(LABELS["l0"])
    ax.set_ylabel(LABELS["consistency"])
    ax.set_title("Each setting, with its 95 % interval over seeds")
    ax.grid(alpha=0.25)
    return ax


def wilson(share: np.ndarray, runs: int, z: float = 1.96) -> tuple[np.ndarray, np.ndarray]:
    """The interval of a share out of `runs` that holds at shares of 0 and 1 too (Wilson 1927)."""
    middle = (share + z**2 / (2 * runs)) / (1 + z**2 / runs)
    half = z / (1 + z**2 / runs) * np.sqrt(share * (1 - share) / runs + z**2 / (4 * runs**2))
    return middle - half, middle + half
