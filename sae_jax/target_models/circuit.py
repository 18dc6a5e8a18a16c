"""What passes from the inputs through neurons and SAE features to the outputs."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sae_jax.base import SAE, Params, require
from sae_jax.features.circuit import Circuit, Edge, Node
from sae_jax.target_models.perceptron import Perceptron

LAYERS = ("inputs", "neurons", "SAE features", "outputs")


def circuit(
    model: Perceptron,
    sae: SAE,
    params: Params,
    x: Float[Array, "rows inputs"],
    *,
    inputs: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
) -> Circuit:
    """The graph of a network with an SAE on its hidden layer, on the rows given.

        input i -> neuron j      mean(x_i) W_in[i, j]
        neuron j -> feature k    mean(h_j) W_enc[j, k]
        feature k -> output o    mean(f_k) (W_dec W_out)[k, o]

    So an edge is what passes along it: into a neuron, a feature or an output they add up, biases aside, to
    its mean before the activation. The outputs are those of the network that reads the SAE's reconstruction.

    Args:
      model: the network.
      sae: reads its hidden layer; with an encoder `W_enc` and no skip connection.
      params: of the SAE.
      x: the rows to look at: all, or those of one case.
      inputs: their names; None for x1, x2, ...
      outputs: their names; None for y1, y2, ...

    Returns:
      A `Circuit`: nodes layer by layer, and an edge for each pair in neighbouring layers, 0 or not.

    Raises:
      InputError: an SAE of another width, without `W_enc`, or too few names.

    Example:
      >>> graph = circuit(network, *result.member(0), task.x)
      >>> max(graph.edges, key=lambda edge: abs(edge.weight))
    """
    h = model.hidden(x)
    require("W_enc" in params, "a circuit needs an SAE whose encoder is a matrix W_enc")
    widths = (params["W_enc"].shape[0], params["W_dec"].shape[-1])
    require(widths == (h.shape[-1],) * 2, f"the hidden layer is {h.shape[-1]} wide, the SAE is for {widths}")
    f = sae.encode(params, h)
    logits = model.read(sae.decode(params, f, h))
    layers = [x, h, f, logits]
    weights = [model.W_in[...], params["W_enc"], params["W_dec"] @ model.W_out[...]]
    means = [np.asarray(layer.mean(axis=0), float) for layer in layers]
    names = [inputs, None, None, outputs]
    for given, mean, layer in zip(names, means, LAYERS, strict=True):
        fits = given is None or len(given) == len(mean)
        require(fits, f"there are {len(mean)} {layer} but {len(given or ())} names")
    nodes = tuple(
        Node(given[place] if given else f"{letter}{place + 1}", layer, activation)
        for layer, (given, letter, mean) in enumerate(zip(names, "xhfy", means, strict=True))
        for place, activation in enumerate(mean.tolist())
    )
    first = np.cumsum([0, *map(len, means)]).tolist()
    edges = tuple(
        Edge(first[layer] + i, first[layer + 1] + j, weight)
        for layer, matrix in enumerate(weights)
        for (i, j), weight in np.ndenumerate(means[layer][:, None] * np.asarray(jnp.asarray(matrix), float))
    )
    return Circuit(nodes, edges, LAYERS)
