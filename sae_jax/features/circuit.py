"""What passes from a model through the features of an SAE to what the model says, as a graph."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sae_jax.base import SAE, Params, require
from sae_jax.folds import fold_decoder_norms, inner, untied
from sae_jax.labels import named
from sae_jax.layer_norm import is_layer_normed, layer_norm

AROUND_AN_SAE = ("inputs", "SAE features", "outputs")
"""The layers of `circuit`."""

Names = Sequence[str] | Mapping[int, str]


class Node(NamedTuple):
    """An input, a neuron, an SAE feature or an output."""

    name: str
    layer: int
    """Its place in `Circuit.layers`."""
    activation: float
    """Its mean over the rows; an output's is its mean logit."""


class Edge(NamedTuple):
    """What one node adds to another, on average over the rows."""

    source: int
    """A place in `Circuit.nodes`."""
    target: int
    weight: float


class Circuit(NamedTuple):
    """A graph in layers; see `circuit`, and `target_models.circuit` for that of a whole small network."""

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    layers: tuple[str, ...]
    """What the layers are called, from the inputs on."""

    def layer(self, layer: int) -> list[int]:
        """The places of the nodes of one layer."""
        return [place for place, node in enumerate(self.nodes) if node.layer == layer]


def circuit(
    sae: SAE,
    params: Params,
    x: Float[Array | np.ndarray, "*rows d_in"],
    unembedding: Float[Array | np.ndarray, "d_out vocabulary"],
    *,
    most: int = 8,
    inputs: Names | None = None,
    outputs: Names | None = None,
    labels: Mapping[int, str] | None = None,
) -> Circuit:
    """The strongest inputs, SAE features and outputs on some rows, and what passes between them.

        input i -> feature k     mean(r_i) W_enc[i, k]         r = x, or x - b_dec as the encoder reads it
        feature k -> output o    mean(f_k) (W_dec U)[k, o]

    Edges into a feature add up, over all inputs and with its bias, to its mean before the activation; edges
    into an output, over all features and with b_dec U, to its mean logit: what the SAE writes straight to the
    logits, without a skip connection, a layer norm or what later layers make of it. r and what is written are
    normalised rows where the SAE is one around a layer norm.

    Args:
      sae: any SAE with one encoder matrix; a transcoder too.
      params: of the SAE.
      x: the row to look at, or several.
      unembedding: from what the SAE gives to logits.
      most: nodes per layer: the features that write most, mean(f_k) |W_dec[k]|; the outputs to which those
        add most; the inputs that pass most to them, either way.
      inputs: their names, all of them or by number; None, or of one that is not there, x0, x1, ...
      outputs: their names, such as the words of a vocabulary; else #0, #1, ...
      labels: what features are called, by number; shown behind the number.

    Returns:
      A `Circuit`: nodes layer by layer, the strongest first; an edge for each pair in neighbouring layers.

    Raises:
      InputError: an SAE without such a matrix, rows or an unembedding of another width, fewer than 1 node.

    Example:
      >>> graph = circuit(*trained, x[row], unembedding, outputs=words, labels=trained.about.labels)
      >>> report.figures.save(report.circuit.circuit_graph(graph), "circuit.png")
    """
    require(most >= 1, f"a circuit has at least 1 node per layer, got {most}")
    sae, params = untied(*fold_decoder_norms(sae, params))
    encodes = "W_enc" in params and params["W_enc"].ndim == 2
    require(encodes, "a circuit needs an SAE whose encoder is a matrix W_enc")
    W_enc, W_dec = jnp.asarray(params["W_enc"]), jnp.asarray(params["W_dec"])
    d_in, d_out = len(W_enc), W_dec.shape[-1]
    require(x.shape[-1] == d_in, f"this SAE reads {d_in} columns, got {x.shape[-1]}")
    require(
        len(unembedding) == d_out,
        f"this SAE gives {d_out} columns, the unembedding is for {len(unembedding)}",
    )
    rows, U = jnp.asarray(x).reshape(-1, d_in), jnp.asarray(unembedding)
    require(len(rows) > 0, "a circuit needs at least one row")
    f = sae.encode(params, rows)
    # without the rows: no skip connection's part, nor a layer norm undone
    means = rows.mean(axis=0), f.mean(axis=0), sae.decode(params, f).mean(axis=0) @ U

    features = _first(means[1] * jnp.linalg.norm(W_dec, axis=-1), most)
    to_outputs = (means[1][features, None] * W_dec[features]) @ U
    chosen = _first(to_outputs.sum(axis=0), most)
    to_features = _read(sae, params, rows).mean(axis=0)[:, None] * W_enc[:, features]
    strongest = _first(jnp.abs(to_features).sum(axis=1), most)

    called = (
        lambda i: _named(inputs, i, f"x{i}"),
        lambda k: named(k, labels or {}),
        lambda o: _named(outputs, o, f"#{o}"),
    )
    places = strongest, features, chosen
    nodes = tuple(
        Node(name(place), layer, float(mean[place]))
        for layer, (name, mean, kept) in enumerate(zip(called, means, places, strict=True))
        for place in kept.tolist()
    )
    first = np.cumsum([0, *map(len, places)]).tolist()
    edges = tuple(
        Edge(first[layer] + i, first[layer + 1] + j, float(weight))
        for layer, matrix in enumerate((to_features[strongest], to_outputs[:, chosen]))
        for (i, j), weight in np.ndenumerate(np.asarray(matrix))
    )
    return Circuit(nodes, edges, AROUND_AN_SAE)


def _read(sae: SAE, params: Params, x: Float[Array, "rows d_in"]) -> Float[Array, "rows d_in"]:
    """What the encoder's matrix is multiplied with."""
    x = layer_norm(x) if is_layer_normed(sae) else x
    return x - params["b_dec"] if inner(sae.config).get("apply_b_dec_to_input") else x


def _first(strength: Float[Array, "nodes"], most: int) -> np.ndarray:
    """The places of the largest, the largest first."""
    return np.argsort(-np.asarray(strength), kind="stable")[:most]


def _named(names: Names | None, place: int, otherwise: str) -> str:
    """The name of a node, where it has one."""
    if names is None:
        return otherwise
    if isinstance(names, Mapping):
        return names.get(place, otherwise)
    return names[place] if place < len(names) else otherwise
