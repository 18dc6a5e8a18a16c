"""Tokens against features."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Array, Float
from matplotlib.axes import Axes

from sae_jax.base import require
from sae_jax.features.look import most_active
from sae_jax.labels import named
from sae_jax.report.figures.canvas import figure_of, new_axes
from sae_jax.report.numbers import on_one_line
from sae_jax.trained import TrainedSAE

MOST_WRITTEN = 400
"""Cells with their number in them."""


def heat_map(
    f: Float[Array | np.ndarray, "tokens d_sae"],
    tokens: Sequence[str],
    ax: Axes | None = None,
    title: str = "Encoded sparse features",
    *,
    names: Sequence[str] | None = None,
    top: float = 1.0,
) -> Axes:
    """Features as a table of colours: tokens down, features across, the value in each cell.

    Args:
      f: encoded tokens [tokens, d_sae]; colours span 0 to `top`.
      tokens: a name per row.
      ax: where to draw; None for a new figure.
      title: above the picture.
      names: a name per feature; None for F1, F2, ...
      top: the activation of the brightest colour.

    Returns:
      The axes. Where there are more than 400 cells, their values are left out.

    Example:
      >>> heat_map(result.member(0).encode(tokens.x), tokens.names)
    """
    f = np.asarray(f)
    rows, columns = f.shape
    fits = names is None or len(names) == columns
    require(fits, f"there are {columns} features but {len(names or ())} names")
    ax = ax or new_axes(min(16, 2.6 + 0.62 * columns), min(16, 1.4 + 0.38 * rows))
    image = ax.imshow(f, cmap="viridis", vmin=0, vmax=top, aspect="auto")
    if f.size <= MOST_WRITTEN:
        for (row, column), value in np.ndenumerate(f):
            ink = "black" if value > 0.6 * top else "white"
            ax.text(column, row, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=8)
    if names is None:
        ax.set_xticks(range(columns), [f"F{column + 1}" for column in range(columns)])
    else:
        slanted = {"rotation": 45, "ha": "right"} if max(map(len, names), default=0) > 6 else {}
        ax.set_xticks(range(columns), names, parse_math=False, **slanted)
    ax.set_yticks(range(rows), tokens, parse_math=False)
    ax.tick_params(length=0)
    ax.set_title(title)
    beyond = "max" if f.max(initial=0) > top else "neither"
    figure_of(ax).colorbar(image, ax=ax, label="activation", extend=beyond)
    return ax


def features_of(
    trained: TrainedSAE,
    x: Float[Array | np.ndarray, "tokens d_in"],
    tokens: Sequence[str],
    features: Sequence[int] | None = None,
    *,
    labels: Mapping[int, str] | None = None,
    most: int = 12,
    ax: Axes | None = None,
    title: str = "Encoded sparse features",
) -> Axes:
    """What any SAE makes of a text: the heat map of its tokens and of the features most active on them.

    Args:
      trained: an SAE with its weights.
      x: the model's activations, one row per token.
      tokens: how each token is written.
      features: which features to show; None for the `most` whose largest activation on these tokens is
        largest, in their own order.
      labels: what features are called, by number; None for the labels kept beside the SAE.
      most: how many.
      ax: where to draw; None for a new figure.
      title: above the picture.

    Returns:
      The axes; colours span 0 to the largest activation shown.

    Raises:
      InputError: rows of another width or number, or features that the SAE does not have.

    Example:
      >>> features_of(sae_jax.load("sae/"), x[row], [words[token] for token in tokens[row]])
    """
    require(x.ndim == 2, f"x must be [tokens, d_in], got {x.shape}")
    require(len(tokens) == len(x), f"there are {len(x)} rows but {len(tokens)} tokens")
    f = np.asarray(trained.encode(x))
    d_sae = f.shape[1]
    chosen = most_active(f, most) if features is None else np.asarray(features, int)
    strange = [int(number) for number in chosen if not 0 <= number < d_sae]
    require(not strange, f"this SAE has features 0 to {d_sae - 1}, not {', '.join(map(str, strange))}")
    known = trained.about.labels if labels is None else labels
    names = [on_one_line(named(number, known)) for number in chosen.tolist()]
    shown = f[:, chosen]
    written = [on_one_line(token) for token in tokens]
    return heat_map(shown, written, ax, title, names=names, top=float(shown.max(initial=0)) or 1.0)
