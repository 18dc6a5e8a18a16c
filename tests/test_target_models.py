"""Target models: trained side by side as alone, right against torch and by hand, and read as circuits."""

import importlib.util
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import sae_jax
from sae_jax.metrics import superposition as geometry
from sae_jax.report.circuit import circuit_graph
from sae_jax.synthetic import find, forty_in_five, toy_superposition
from sae_jax.target_models import (
    Features,
    Perceptron,
    Superposition,
    agreement,
    circuit,
    cross_entropy,
    fit,
    importance_weighted,
    mixed_factors,
    stacked,
    superposed,
)
from sae_jax.target_models.superposition import identity

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name.split("_", 1)[1], EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def features(count, *densities, batch_size=64):
    return [Features(toy_superposition(count, p, batch_size=batch_size)) for p in densities]


def test_a_level_and_restart_follow_the_run_of_it_alone(x64):
    loss = importance_weighted(0.7 ** jnp.arange(6))
    train = partial(fit, partial(Superposition, 6, 2), loss, optimizer=optax.adamw(1e-2), steps=200)
    together = train(sources=features(6, 0.9, 0.3, 0.1), seeds=[3, 4, 5])
    alone = train(sources=features(6, 0.3), seeds=[5])
    for name, leaf in alone.params.items():
        np.testing.assert_allclose(together.params[name][1, 2], leaf[0, 0], atol=1e-9)
    np.testing.assert_allclose(together.losses[1, 2], alone.losses[0, 0], rtol=1e-9)
    np.testing.assert_allclose(together.history["loss"][:, 1, 2], alone.history["loss"][:, 0, 0], rtol=1e-9)


def test_levels_see_the_batches_of_their_own_worlds_from_shared_draws():
    sources = features(8, 0.1, 0.5)
    source = stacked(sources)
    batch = source.batch(jnp.int32(3))
    for level, own in enumerate(sources):
        np.testing.assert_array_equal(batch.x[level], own.batch(jnp.int32(3)).x)
        np.testing.assert_array_equal(source.at(level).batch(jnp.int32(3)).x, own.batch(jnp.int32(3)).x)
    sparse, dense = np.asarray(batch.x)
    assert (dense[sparse > 0] == sparse[sparse > 0]).all()
    held = [jax.eval_shape(lambda leaf: leaf, leaf).shape for leaf in source.leaves]
    assert held.count((8, 8)) == 1  # directions are the same in both, and held once
    assert held.count((2, 8)) == 2


def test_features_are_the_amounts_behind_a_world():
    world = find("sharkey_uncorrelated")(batch_size=16)
    source = Features(world)
    x = source.batch(jnp.int32(5)).x
    np.testing.assert_allclose(world.rows_of(x), world.batch(jnp.int32(5)).x, rtol=1e-6)
    plain = toy_superposition(7, 0.4, batch_size=16)
    np.testing.assert_array_equal(Features(plain).batch(jnp.int32(2)).x, plain.batch(jnp.int32(2)).x)
    [(batch, amounts)] = world.labelled(16)
    np.testing.assert_array_equal(next(source.evaluation(16)).x, amounts)
    assert batch.x.shape == (16, 256)


@pytest.mark.parametrize(
    ("inner", "outer"),
    [(identity, jax.nn.relu), (identity, identity), (jax.nn.relu, jax.nn.relu)],
    ids=["elhage", "linear", "relu_twice"],
)
def test_superposition_agrees_with_torch(torch, x64, inner, outer):
    model = Superposition(9, 4, inner=inner, outer=outer, rngs=nnx.Rngs(0))
    model.b[...] = jnp.linspace(-0.2, 0.3, 9)
    importance = 0.8 ** np.arange(9)
    x = np.random.default_rng(0).random((32, 9)) * (np.random.default_rng(1).random((32, 9)) < 0.4)
    batch = sae_jax.Batch(jnp.asarray(x), jnp.asarray(x))
    value, grads = nnx.value_and_grad(importance_weighted(jnp.asarray(importance)))(model, batch)

    there = {identity: lambda z: z, jax.nn.relu: torch.relu}
    W, b, inputs, weight = (
        torch.tensor(np.asarray(array, np.float64), requires_grad=True)
        for array in (model.W[...], model.b[...], x, importance)
    )
    hidden = there[inner](torch.einsum("bf,fh->bh", inputs, W))
    out = there[outer](torch.einsum("bh,fh->bf", hidden, W) + b)
    loss = (weight * (inputs - out) ** 2).sum() / len(x)
    loss.backward()
    np.testing.assert_allclose(value, loss.item(), rtol=1e-12)
    np.testing.assert_allclose(grads["W"][...], W.grad.numpy(), rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(grads["b"][...], b.grad.numpy(), rtol=1e-10, atol=1e-13)


def test_perceptron_agrees_with_torch(torch, x64):
    model = Perceptron(3, 5, 2, rngs=nnx.Rngs(1))
    x = np.random.default_rng(0).normal(size=(16, 3))
    y = (np.random.default_rng(1).random((16, 2)) < 0.5).astype(float)
    value, grads = nnx.value_and_grad(cross_entropy)(model, sae_jax.Batch(jnp.asarray(x), jnp.asarray(y)))

    first, second = torch.nn.Linear(3, 5).double(), torch.nn.Linear(5, 2).double()
    with torch.no_grad():
        for layer, W, b in ((first, model.W_in, model.b_in), (second, model.W_out, model.b_out)):
            layer.weight.copy_(torch.tensor(np.asarray(W[...], np.float64).T))
            layer.bias.copy_(torch.tensor(np.asarray(b[...], np.float64)))
    z = second(torch.relu(first(torch.tensor(x))))
    loss = torch.nn.functional.binary_cross_entropy_with_logits(z, torch.tensor(y))
    loss.backward()
    # nnx draws float32 under x64 as well; the values are the same on both sides
    np.testing.assert_allclose(value, loss.item(), rtol=1e-6)
    np.testing.assert_allclose(grads["W_in"][...], first.weight.grad.numpy().T, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(grads["b_out"][...], second.bias.grad.numpy(), rtol=1e-5, atol=1e-8)


def test_the_best_model_is_the_one_with_the_least_loss():
    fitted = fit(
        partial(Superposition, 6, 2), importance_weighted(jnp.ones(6)), features(6, 0.1, 0.5),
        optax.adam(1e-2), seeds=range(5), steps=50,
    )  # fmt: skip
    assert fitted.losses.shape == (2, 5)
    for level in range(2):
        best = fitted.best(level)
        assert fitted.losses[level, best] == fitted.losses[level].min()
        np.testing.assert_array_equal(fitted.model(level).W[...], fitted.params["W"][level, best])
    held_out = next(toy_superposition(6, 0.5, batch_size=16_384).evaluation(16_384)).x
    expected = np.square(np.asarray(fitted.model(1, 3)(held_out)) - held_out).sum(axis=1).mean()
    np.testing.assert_allclose(fitted.losses[1, 3], expected, rtol=0.05)


def test_five_features_in_two_dimensions_settle_as_a_regular_pentagon():
    two_neurons = example("03_two_neurons")
    W = np.asarray(two_neurons.squeezed(5, [0.05], restarts=8, steps=2500).model().W[...], float)
    corners, off = two_neurons.shape(W)
    assert corners == 5
    assert off < 5
    np.testing.assert_allclose(geometry.feature_dimensionality(W), 2 / 5, atol=0.02)


def test_sparser_features_share_dimensions():
    example_04 = example("04_superposition_geometry")
    W = example_04.trained(
        [1.0, 1 / 3, 1 / 12], features=40, hidden=4, steps=2000, batch_size=256, learning_rate=5e-3
    )
    curve = geometry.dimensions_per_feature(W)
    assert curve[0] == pytest.approx(1, abs=0.05)
    assert 0.45 < curve[1] < 0.62
    assert curve[2] < 0.35
    shares = geometry.feature_dimensionality(W)
    np.testing.assert_allclose(shares.sum(axis=-1), 4, rtol=0.02)
    assert (np.abs(shares[1] - 1 / 2) < 0.03).sum() >= 6  # pairs of opposites


def test_dimensionality_of_known_shapes():
    angles = 2 * np.pi * np.arange(5) / 5
    pentagon = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    np.testing.assert_allclose(geometry.feature_dimensionality(pentagon), 2 / 5)
    assert geometry.dimensions_per_feature(pentagon) == pytest.approx(2 / 5)
    # a pair of opposites in one dimension, one feature alone in another, one not represented
    W = np.array([[2.0, 0, 0], [-2, 0, 0], [0, 0.5, 0], [0, 0, 0]])
    np.testing.assert_allclose(geometry.feature_dimensionality(W), [1 / 2, 1 / 2, 1, 0])
    assert geometry.dimensions_per_feature(W) == pytest.approx(3 / 8.25)
    np.testing.assert_allclose(
        geometry.feature_dimensionality(np.stack([pentagon, 3 * pentagon])), np.full((2, 5), 2 / 5)
    )


def test_dimensionality_wants_a_matrix(unchecked):
    with pytest.raises(sae_jax.InputError, match=r"W must be \[features, hidden\]"):
        geometry.dimensions_per_feature(np.ones(3))


def test_a_world_seen_through_a_model_is_its_hidden_layer():
    world = toy_superposition(6, 0.3, batch_size=32)
    model = Superposition(6, 2, rngs=nnx.Rngs(0))
    seen = superposed(world, model.W[...])
    read = Features(world).batch(jnp.int32(4)).x
    np.testing.assert_allclose(seen.batch(jnp.int32(4)).x, model.hidden(read), rtol=1e-5, atol=1e-6)
    perfect = np.asarray(model.W[...]) / np.linalg.norm(model.W[...], axis=1, keepdims=True)
    np.testing.assert_allclose(sae_jax.metrics.mmcs(perfect, np.asarray(seen.directions)), 1, rtol=1e-6)


def hand_made():
    """Two inputs, two neurons, one output; an SAE with the identity as its dictionary, and a third latent."""
    network = Perceptron(2, 2, 1, rngs=nnx.Rngs(0))
    network.W_in[...] = jnp.array([[1.0, 0], [0, -1]])
    network.b_in[...] = jnp.array([0.0, 1])
    network.W_out[...] = jnp.array([[2.0], [3]])
    network.b_out[...] = jnp.array([0.5])
    sae = sae_jax.relu(2, 3)
    params = {
        "W_enc": jnp.array([[1.0, 0, 0], [0, 1, 0]]),
        "b_enc": jnp.array([0.0, 0, -1]),
        "W_dec": jnp.array([[1.0, 0], [0, 1], [5, 5]]),
        "b_dec": jnp.array([0.25, 0]),
    }
    return network, sae, params


def test_a_circuit_by_hand():
    # rows (2, .5) and (4, 1): hidden (2, .5) and (4, 0), mean (3, .25); the third latent never fires
    graph = circuit(*hand_made(), jnp.array([[2.0, 0.5], [4, 1]]), inputs=["left", "right"])
    assert [node.name for node in graph.nodes] == ["left", "right", "h1", "h2", "f1", "f2", "f3", "y1"]
    assert [node.layer for node in graph.nodes] == [0, 0, 1, 1, 2, 2, 2, 3]
    # logit = 2 (f1 + .25) + 3 f2 + .5 on average
    np.testing.assert_allclose([n.activation for n in graph.nodes], [3, 0.75, 3, 0.25, 3, 0.25, 0, 7.75])
    weights = {(edge.source, edge.target): edge.weight for edge in graph.edges if edge.weight}
    assert weights == {(0, 2): 3, (1, 3): -0.75, (2, 4): 3, (3, 5): 0.25, (4, 7): 6, (5, 7): 0.75}
    assert len(graph.edges) == 2 * 2 + 2 * 3 + 3 * 1


def test_edges_into_a_node_add_up_to_what_it_reads():
    network, sae = Perceptron(3, 4, 2, rngs=nnx.Rngs(3)), sae_jax.topk(4, 8, k=2)
    params = sae.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (50, 3))
    graph = circuit(network, sae, params, x)
    into = np.zeros(len(graph.nodes))
    for edge in graph.edges:
        into[edge.target] += edge.weight
    h = network.hidden(x)
    pre_activation = x @ network.W_in[...]
    logits = network.read(sae.decode(params, sae.encode(params, h), h)) - network.read(params["b_dec"])
    np.testing.assert_allclose(into[graph.layer(1)], pre_activation.mean(axis=0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(into[graph.layer(2)], (h @ params["W_enc"]).mean(axis=0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(into[graph.layer(3)], logits.mean(axis=0), rtol=1e-4, atol=1e-5)


def test_the_drawing_has_a_line_per_edge_that_counts_and_a_text_per_node():
    graph = circuit(*hand_made(), jnp.array([[2.0, 0.5], [4, 1]]))
    assert len(circuit_graph(graph, least=0.0).lines) == 6
    shown = circuit_graph(graph, least=0.5)  # within a layer: 3, 3 of (3, .25), 6 of (6, .75)
    assert len(shown.lines) == 3
    assert len(shown.texts) == 8
    assert shown.texts[0].get_text() == "x1 3.00"


def test_the_tasks_say_what_their_factors_say():
    task = mixed_factors(4000, factors=6, density=0.2)
    np.testing.assert_array_equal(task.labels, task.factors > 0)
    np.testing.assert_allclose(task.labels.mean(axis=0), 0.2, atol=0.03)
    amounts = np.asarray(task.factors)[np.asarray(task.factors) > 0]
    assert amounts.min() >= 0.5
    assert amounts.max() <= 1
    again = mixed_factors(4000, factors=6, density=0.2, data_seed=1)
    assert (task.factors != again.factors).any()
    mixture = np.linalg.lstsq(np.asarray(task.factors), np.asarray(task.x), rcond=None)[0]
    other = np.linalg.lstsq(np.asarray(again.factors), np.asarray(again.x), rcond=None)[0]
    np.testing.assert_allclose(mixture, other, atol=0.03)  # the same mixture, other rows
    verbs = agreement(noise=0.0)
    np.testing.assert_array_equal(verbs.labels[:, 0] == 1, verbs.x[:, 0] == verbs.x[:, 1])
    np.testing.assert_array_equal(verbs.factors[:, 3] == 1, (np.asarray(verbs.x) == 1).all(axis=1))


def test_the_twenty_features_know_the_factors_better_than_the_five_neurons():
    five = example("02_five_neurons")
    known, _ = five.measured(networks=2, steps=1000, network_steps=1500, rows=1500)
    neurons, control = known["5 neurons"].correlation, known["20 random ReLUs"].correlation
    features = known[f"20 SAE features, l1 {five.SHOWN}"].correlation
    assert neurons.shape == (2, 10)
    assert features.mean() > control.mean() + 0.05
    assert control.mean() > neurons.mean()


def test_the_measure_of_knowledge_by_hand():
    five = example("02_five_neurons")
    factors = np.array([[0, 1.0], [0, 0], [1, 0], [2, 0]])
    units = np.array([[5.0, 0], [5, 0], [2, 0], [1, 0]])  # the second never changes
    np.testing.assert_allclose(five.aucs(units, factors), [[0, 0.5], [5 / 6, 0.5]])
    found = five.knowledge((units, factors), (units, factors))
    np.testing.assert_allclose(found.auc, [1, 5 / 6])
    np.testing.assert_allclose(found.correlation[0], -np.corrcoef(units[:, 0], factors[:, 0])[0, 1])


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (lambda: stacked([]), "there are no sources"),
        (lambda: stacked([*features(3, 0.1), *features(4, 0.1)]), "alike in all but their values"),
        (lambda: stacked([*features(3, 0.1), *features(3, 0.1, batch_size=8)]), "alike in all but"),
        (lambda: Superposition(0, 2, rngs=nnx.Rngs(0)), "features must be at least 1, got 0"),
        (lambda: Superposition(3, 0, rngs=nnx.Rngs(0)), "hidden must be at least 1, got 0"),
        (lambda: Perceptron(3, 0, 1, rngs=nnx.Rngs(0)), "hidden must be at least 1, got 0"),
        (lambda: superposed(toy_superposition(5), jnp.ones((4, 2))), "W has 4 rows, but this world has 5"),
        (lambda: forty_in_five(1.5), "sparsity"),
        (lambda: mixed_factors(density=1.5), "density"),
        (lambda: mixed_factors(noise=-1.0), "noise must not be negative"),
        (lambda: agreement(0), "rows must be at least 1, got 0"),
        (lambda: circuit(*hand_made(), jnp.ones((1, 2)), inputs=["one"]), "there are 2 inputs but 1 names"),
        (lambda: circuit(hand_made()[0], sae_jax.relu(3, 4), sae_jax.relu(3, 4).init(jax.random.key(0)),
                         jnp.ones((1, 2))), "the hidden layer is 2 wide"),
        (lambda: circuit(hand_made()[0], sae_jax.relu(2, 4, tied=True),
                         sae_jax.relu(2, 4, tied=True).init(jax.random.key(0)), jnp.ones((1, 2))), "W_enc"),
        (lambda: fit(partial(Superposition, 3, 2), importance_weighted(jnp.ones(3)), features(3, 0.1),
                     optax.adam(1e-3), seeds=[], steps=1), "there are no seeds"),
    ],
    ids=["no-sources", "widths", "batch-sizes", "no-features", "no-hidden", "no-neurons", "another-world",
         "sparsity", "density", "noise", "no-rows", "names", "sae-width", "tied", "no-seeds"],
)  # fmt: skip
def test_bad_input_gets_one_sentence(wrong, sentence):
    with pytest.raises(sae_jax.InputError, match=sentence):
        wrong()
