"""A circuit as a picture."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sae_jax.report.figures import CATEGORIES
from sae_jax.target_models import Circuit
from sae_jax.target_models.circuit import LAYERS

HEADINGS = ("inputs", "neurons", "SAE features", "outputs")


def circuit_graph(circuit: Circuit, ax: Axes | None = None, *, least: float = 0.05) -> Axes:
    """Layers from left to right; the wider a line, the more passes along it, blue adding and red taking away.

    A filled circle is a node that is active.

    Args:
      circuit: from `target_models.circuit`.
      ax: where to draw; None for a new figure.
      least: edges weaker than this share of the strongest between the same two layers are left out.

    Returns:
      The axes: one line per edge shown, one text per node.

    Example:
      >>> figures.save(circuit_graph(circuit(network, *result.member(0), task.x)), "circuit.png")
    """
    tallest = max(len(circuit.layer(layer)) for layer in range(len(LAYERS)))
    ax = ax or Figure(figsize=(7.6, 1.2 + 0.5 * tallest), layout="constrained").add_subplot()
    at = {}
    for layer in range(len(LAYERS)):
        places = circuit.layer(layer)
        at |= {place: (layer, (len(places) - 1) / 2 - row) for row, place in enumerate(places)}
    strongest = [0.0] * len(LAYERS)
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
    for place, node in enumerate(circuit.nodes):
        across, up = at[place]
        fill = "#555" if node.activation > 1e-6 else "white"
        ax.scatter([across], [up], s=60, facecolor=fill, edgecolor="#555", zorder=2)
        last = node.layer == len(LAYERS) - 1
        side, shift = ("right", -0.06) if node.layer == 0 else ("left", 0.06) if last else ("center", 0.0)
        ax.text(
            across + shift,
            up if shift else up + 0.24,
            f"{node.name} {node.activation:.2f}",
            ha=side,
            va="center",
            fontsize=8,
            zorder=3,
            parse_math=False,
        )
    ax.set_xticks(range(len(LAYERS)), HEADINGS)
    ax.set_yticks([])
    ax.set_xlim(-0.75, len(LAYERS) - 0.35)
    ax.set_ylim(-tallest / 2, tallest / 2 + 0.1)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return ax
