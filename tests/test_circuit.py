"""The graph around an SAE: its edges add up to what its nodes read, and the strongest nodes are kept."""

import jax
import numpy as np
import pytest
from cases import CASES

import sae_jax
from sae_jax.features.circuit import circuit
from sae_jax.report.circuit import circuit_graph

CODERS = [case for case in CASES if "crosscoder" not in case.name]


def by_hand():
    """Two inputs, three features of which the third never fires, four outputs."""
    params = {
        "W_enc": np.array([[1.0, 0, 0], [0, 1, 0]], np.float32),
        "b_enc": np.array([0, 0, -1], np.float32),
        "W_dec": np.array([[1.0, 0], [0, 2], [5, 5]], np.float32),
        "b_dec": np.array([0.25, 0], np.float32),
    }
    x = np.array([[3.0, 1], [1, 1]], np.float32)
    unembedding = np.array([[1.0, -1, 0, 0], [0, 0, 3, 1]], np.float32)
    return sae_jax.relu(2, 3), params, x, unembedding


def test_by_hand():
    graph = circuit(*by_hand(), most=2, inputs=["left", "right"], outputs={2: "cat"}, labels={1: "animals"})
    assert graph.layers == ("inputs", "SAE features", "outputs")
    # means: x (2, 1), f (2, 1, 0); f |W_dec| is 2, 2, 0; to the logits (2, -2, 0, 0) and (0, 0, 6, 2)
    assert [(node.name, node.layer) for node in graph.nodes] == [
        ("left", 0), ("right", 0), ("0", 1), ("1 animals", 1), ("cat", 2), ("#0", 2),
    ]  # fmt: skip
    np.testing.assert_allclose([node.activation for node in graph.nodes], [2, 1, 2, 1, 6, 2.25])
    weights = {(edge.source, edge.target): edge.weight for edge in graph.edges}
    assert weights == {(0, 2): 2, (0, 3): 0, (1, 2): 0, (1, 3): 1, (2, 4): 0, (2, 5): 2, (3, 4): 6, (3, 5): 0}


def test_one_row_is_a_row():
    sae, params, x, unembedding = by_hand()
    assert circuit(sae, params, x[0], unembedding) == circuit(sae, params, x[:1], unembedding)


@pytest.mark.parametrize("case", CODERS, ids=lambda case: case.name)
def test_edges_into_a_node_add_up_to_what_it_reads(case, small):
    sae, x = case.sae(), case.batch(small).x
    params = sae.init(jax.random.key(1))
    d_out = params["W_dec"].shape[-1]
    unembedding = np.random.default_rng(1).normal(size=(d_out, 9)).astype(np.float32)
    graph = circuit(sae, params, x, unembedding, most=100)
    into = np.zeros(len(graph.nodes))
    for edge in graph.edges:
        into[edge.target] += edge.weight
    bias = params["b_dec"] @ unembedding
    for place in graph.layer(2):
        node = graph.nodes[place]
        expected = node.activation - bias[int(node.name[1:])]
        assert into[place] == pytest.approx(float(expected), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("away", [False, True])
def test_what_the_encoder_takes_away_is_on_no_edge(away, small):
    sae = sae_jax.relu(5, 7, apply_b_dec_to_input=away)
    params = {**sae.init(jax.random.key(0)), "b_dec": np.arange(5, dtype=np.float32)}
    graph = circuit(sae, params, small, np.eye(5, dtype=np.float32), most=100)
    into = np.zeros(len(graph.nodes))
    for edge in graph.edges:
        into[edge.target] += edge.weight
    reads = small - params["b_dec"] if away else small
    for place in graph.layer(1):
        expected = (reads @ params["W_enc"]).mean(axis=0)[int(graph.nodes[place].name)]
        assert into[place] == pytest.approx(float(expected), rel=1e-3, abs=1e-5)


def test_the_drawing_names_the_layers_and_shows_hostile_words():
    graph = circuit(*by_hand(), outputs=["$\\frac$", "</script>", "a\nb", "x" * 1000])
    ax = circuit_graph(graph, least=0)
    assert [tick.get_text() for tick in ax.get_xticklabels()] == list(graph.layers)
    assert len(ax.lines) == 2 + 4
    texts = [text.get_text() for text in ax.texts]
    assert any(text.startswith("a\\nb ") for text in texts)
    assert max(map(len, texts)) < 50
    ax.figure.canvas.draw()  # where "$...$" is read as maths, this raises


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"most": 0}, "a circuit has at least 1 node per layer, got 0"),
        ({"x": np.ones((2, 3), np.float32)}, "this SAE reads 2 columns, got 3"),
        ({"x": np.ones((0, 2), np.float32)}, "at least one row"),
        ({"unembedding": np.ones((3, 4), np.float32)}, "gives 2 columns, the unembedding is for 3"),
        ({"params": {"W_dec": np.ones((3, 2), np.float32)}}, "whose encoder is a matrix W_enc"),
    ],
)
def test_what_has_no_circuit(change, said):
    given = dict(zip(("sae", "params", "x", "unembedding"), by_hand(), strict=True))
    with pytest.raises(sae_jax.InputError, match=said):
        circuit(**{**given, **change})
