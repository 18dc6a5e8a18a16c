"""A circuit as a picture."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from sae_jax.features.circuit import Circuit, Node
from sae_jax.report.figures.canvas import CATEGORIES
from sae_jax.report.numbers import on_one_line


def circuit_graph(circuit: Circuit, ax: Axes | None = None, *, least: float = 0.05) -> Axes:
    """Layers from left to right; the wider a line, the more passes along it, blue adding and red taking away.

    A filled circle is a node that is active.

    Args:
      circuit: from `target_models.circuit`, or from `features.circuit` of any SAE.
      ax: where to draw; None for a new figure.
      least: edges weaker than this share of the strongest between the same two layers are left out.

    Returns:
      The axes: one line per edge shown, one text per node.

    Example:
      >>> figures.save(circuit_graph(circuit(network, *result.member(0), task.x)), "circuit.png")
    """
    last = len(circuit.layers) - 1
    tallest = max(len(circuit.layer(layer)) for layer in range(last + 1))
    ax = (
        ax
        or Figure(figsize=(0.4 + 1.8 * (last + 1), 1.2 + 0.5 * tallest), layout="constrained").add_subplot()
    )
    at = {}
    for layer in range(last + 1):
        places = circuit.layer(layer)
        at |= {place: (layer, (len(places) - 1) / 2 - row) for row, place in enumerate(places)}
    _draw_edges(circuit, at, least, ax)
    for place, node in enumerate(circuit.nodes):
        _draw_node(node, at[place], last, ax)
    ax.set_xticks(range(last + 1), circuit.layers)
    ax.set_yticks([])
    ax.set_xlim(-0.75, last + 0.65)
    ax.set_ylim(-tallest / 2, tallest / 2 + 0.1)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return ax


def _draw_edges(circuit: Circuit, at: dict[int, tuple[int, float]], least: float, ax: Axes) -> None:
    """A line for each edge that counts among those between its two layers."""
    strongest = [0.0] * len(circuit.layers)
    for edge in circuit.edges:
        layer = circuit.nodes[edge.source].layer
        strongest[layer] = max(strongest[layer], abs(edge.weight))
    for edge in circuit.edges:
        most = strongest[circuit.nodes[edge.source].layer]
        share = abs(edge.weight) / most if most else 0.0
        if share > least:
            (left, low), (right, high) = at[edge.source], at[edge.target]
            hue = CATEGORIES[0] if edge.weight > 0 else CATEGORIES[4]
            ax.plot(
                [left, right],
                [low, high],
                color=hue,
                lw=0.4 + 3.6 * share,
                alpha=0.25 + 0.6 * share,
                zorder=1,
            )


def _draw_node(node: Node, at: tuple[int, float], last: int, ax: Axes) -> None:
    """A circle, and its name and activation beside it, or above it where lines go both ways."""
    across, up = at
    fill = "#555" if node.activation > 1e-6 else "white"
    ax.scatter([across], [up], s=60, facecolor=fill, edgecolor="#555", zorder=2)
    beside = {0: ("right", -0.06), last: ("left", 0.06)}
    side, shift = beside.get(node.layer, ("center", 0.0))
    ax.text(
        across + shift,
        up if shift else up + 0.24,
        f"{on_one_line(node.name)} {node.activation:.2f}",
        ha=side,
        va="center",
        fontsize=8,
        zorder=3,
        parse_math=False,
        path_effects=[withStroke(linewidth=2, foreground="white")],
    )
