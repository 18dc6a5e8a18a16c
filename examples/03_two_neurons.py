"""Two neurons, six features: superposition made, and undone by an SAE.

    python examples/03_two_neurons.py [--out figures]

About two minutes on two CPU cores. It prints its figures and writes four pictures:

- `two_neurons.png`: what 64 restarts make of six equal features in two dimensions, and of five, which settle
  as a regular pentagon;
- `forty_in_five.png`: the earlier post's linear and ReLU models, 40 features in 5 dimensions: the biases, and
  W W^T at sparsity .1 and .9;
- `undone.png`: the six features as two neurons hold them, and the decoder rows of SAEs trained on the two;
- `agreement.png`: the circuit of subject-verb agreement, a 2 -> 4 -> 2 network with an SAE on its neurons.
"""

import argparse
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import sae_jax
from sae_jax.report import figures
from sae_jax.report.circuit import circuit_graph
from sae_jax.synthetic import forty_in_five, toy_superposition
from sae_jax.target_models import (
    Features,
    Perceptron,
    Superposition,
    agreement,
    circuit,
    cross_entropy,
    fit,
    importance_weighted,
    superposed,
)
from sae_jax.target_models.superposition import identity
from sae_jax.target_models.tasks import AGREEMENT_CASES, AGREEMENT_INPUTS, AGREEMENT_OUTPUTS

DENSITIES = (0.1, 0.05, 0.02)
SPARSITIES = (0.1, 0.5, 0.9)


def squeezed(features, densities, restarts=64, steps=4000):
    """Equal features in two dimensions: networks [densities, restarts]."""
    return fit(
        partial(Superposition, features, 2), importance_weighted(jnp.ones(features)),
        [Features(toy_superposition(features, p)) for p in densities],
        optax.adam(3e-3), seeds=range(restarts), steps=steps,
    )  # fmt: skip


def shape(W, least=0.6):
    """How many features are longer than `least`, and how far their angles are from a regular polygon's."""
    shown = W[np.linalg.norm(W, axis=1) > least]
    angles = np.sort(np.degrees(np.arctan2(shown[:, 1], shown[:, 0])))
    gaps = np.diff(angles, append=angles[0] + 360)
    return len(shown), np.abs(gaps - 360 / len(shown)).max()


def earlier_post(outer, inner, steps=2000):
    """The post's models: W ~ randn * sqrt(1/n), importance from 1 to .1, one network per sparsity."""
    importance = jnp.linspace(1, 0.1, 40)
    return fit(
        partial(Superposition, 40, 5, inner=inner, outer=outer, std=(1 / 40) ** 0.5),
        importance_weighted(importance / 40),
        [Features(forty_in_five(S, None)) for S in SPARSITIES],
        optax.adam(3e-3), steps=steps,
    )  # fmt: skip


def unit_norm(lr):
    return optax.chain(optax.adam(lr), sae_jax.transforms.unit_norm_decoder())


def undone(world, seeds=32, steps=3000):
    """SAEs on the two neurons: one active latent at a time, and an L1 penalty."""
    sweep = partial(sae_jax.sweep, optimizer=unit_norm, source=world, steps=steps, evaluate_rows=16_384)
    penalised = partial(
        sae_jax.relu, 2, 6, mean_features=False, apply_b_dec_to_input=True, decoder_init_norm=1.0
    )  # fmt: skip
    return {
        "TopK, k 1": sweep(
            partial(sae_jax.topk, 2, 6), grid=sae_jax.grid(k=[1], lr=[1e-2], seed=range(seeds))
        ),
        "ReLU, l1 .1": sweep(penalised, grid=sae_jax.grid(l1=[0.1], lr=[1e-2], seed=range(seeds))),
    }


def least_loss(result):
    """The member with the least loss at the end: no truth is asked."""
    return int(result.history["loss"][-10:].mean(axis=0).argmin())


def agreement_network(steps=2000, restarts=16):
    """The best of some networks that tell whether subject and verb agree, and an SAE on its four neurons."""
    task = agreement()
    fitted = fit(
        partial(Perceptron, 2, 4, 2), cross_entropy, [sae_jax.in_memory(task.x, 256, y=task.labels)],
        optax.adam(1e-2), seeds=range(restarts), steps=steps,
    )  # fmt: skip
    network = fitted.model()
    result = sae_jax.sweep(
        partial(sae_jax.topk, 4, 8), unit_norm, grid=sae_jax.grid(k=[1], lr=[1e-2], seed=range(restarts)),
        source=sae_jax.in_memory(network.hidden(task.x), 256), steps=steps,
    )  # fmt: skip
    return task, network, result.member(least_loss(result))


def arrows(ax, W, hue, title):
    """Each feature as an arrow from the middle."""
    for x, y in W:
        ax.annotate("", (x, y), (0, 0), arrowprops={"arrowstyle": "->", "color": hue, "lw": 1.6})
    ax.set_xlim(-1.4, 1.4)
    ax.set_ylim(-1.4, 1.4)
    ax.set_aspect("equal")
    ax.set_title(title, fontsize=9)
    ax.tick_params(labelsize=7)
    ax.grid(alpha=0.25)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("figures"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    six, five = squeezed(6, DENSITIES), squeezed(5, [0.05])
    W = np.asarray(six.params["W"], float)
    print("Six equal features in two dimensions, 64 restarts: how many features are long, and the least loss")
    for level, p in enumerate(DENSITIES):
        long = np.array([shape(each)[0] for each in W[level]])
        told = [
            f"{n}: {(long == n).sum()} ({six.losses[level][long == n].min():.5f})" for n in np.unique(long)
        ]
        print(f"  density {p:<5} {',  '.join(told)}")
    pentagon = np.asarray(five.model().W[...], float)
    print(
        f"Five: the best restart has {shape(pentagon)[0]} long features, {shape(pentagon)[1]:.2f} degrees off"
    )
    long = np.array([shape(each)[0] for each in W[1]])
    usual = int(np.where(long == 5, six.losses[1], np.inf).argmin())
    shown = Figure(figsize=(9.0, 3.2), layout="constrained").subplots(1, 3)
    arrows(shown[0], pentagon, figures.HUES[0], "five features, best of 64")
    arrows(shown[1], W[1, usual], figures.HUES[2], f"six features: {(long == 5).sum()} of 64 restarts")
    arrows(shown[2], W[1, six.best(1)], figures.HUES[1], f"six, the least loss: {(long == 6).sum()} of 64")
    figures.save(shown[0], options.out / "two_neurons.png", dpi=110)

    axes = Figure(figsize=(9.0, 5.4), layout="constrained").subplots(2, 3)
    models = {"linear": earlier_post(identity, identity), "ReLU": earlier_post(jax.nn.relu, jax.nn.relu)}
    print("Forty features in five dimensions: features with |W_i| > 1/2, by sparsity")
    for row, (name, fitted) in zip(axes, models.items(), strict=True):
        weights, biases = (np.asarray(fitted.params[leaf][:, 0]) for leaf in ("W", "b"))
        counts = (np.linalg.norm(weights, axis=-1) > 0.5).sum(axis=1)
        print(f"  {name:<7} " + ", ".join(f"{S}: {n}" for S, n in zip(SPARSITIES, counts, strict=True)))
        for S, bias, hue in zip(SPARSITIES, biases, figures.HUES, strict=True):
            row[0].plot(bias, color=hue, label=f"S = {S}")
        row[0].set_title(f"{name} model: bias per feature", fontsize=9)
        row[0].legend(frameon=False, fontsize=8)
        for ax, level in ((row[1], 0), (row[2], 2)):
            ax.imshow(weights[level] @ weights[level].T, cmap="RdBu", vmin=-1.2, vmax=1.2)
            ax.set_title(f"{name} model: W W^T at S = {SPARSITIES[level]}", fontsize=9)
    figures.save(axes[0, 0], options.out / "forty_in_five.png", dpi=100)

    world = superposed(toy_superposition(6, 0.05), six.model(1).W[...])
    results = undone(world)
    print("SAEs with six latents on the two neurons, 32 seeds: mean, and the seed with the least loss")
    for name, result in results.items():
        told = (
            f"{label} {result.metrics[label].mean():.3f}, {result.metrics[label][least_loss(result)]:.3f}"
            for label in ("mmcs", "recovered", "f1", "explained_variance")
        )
        print(f"  {name:<12} " + ";  ".join(told))
    pair = Figure(figsize=(9.0, 3.2), layout="constrained").subplots(1, 3)
    directions = np.asarray(world.directions)
    arrows(pair[0], directions / np.linalg.norm(directions, axis=1, keepdims=True), "#777777", "the features")
    for ax, (name, result), hue in zip(pair[1:], results.items(), figures.HUES, strict=False):
        arrows(ax, result.params["W_dec"][least_loss(result)], hue, f"decoder rows: {name}")
    figures.save(pair[0], options.out / "undone.png", dpi=110)

    task, network, trained = agreement_network()
    right = (np.asarray(network(task.x)).argmax(axis=1) == np.asarray(task.labels).argmax(axis=1)).mean()
    through = network.read(trained(network.hidden(task.x)))
    spliced = (np.asarray(through).argmax(axis=1) == np.asarray(task.labels).argmax(axis=1)).mean()
    fires = np.asarray(trained.encode(network.hidden(task.x))) > 0
    print(f"Subject and verb: {right:.1%} right, {spliced:.1%} through the SAE; how often each feature fires")
    names = {"inputs": AGREEMENT_INPUTS, "outputs": AGREEMENT_OUTPUTS}
    shown = Figure(figsize=(13.0, 7.6), layout="constrained").subplots(2, 2).ravel()
    for case, (sentence, ax) in enumerate(zip(AGREEMENT_CASES, shown, strict=True)):
        rows = np.asarray(task.factors)[:, case] > 0
        print(f"  {sentence:<14} " + " ".join(f"{share:.2f}" for share in fires[rows].mean(axis=0)))
        circuit_graph(circuit(network, *trained, task.x[rows], **names), ax).set_title(f'"{sentence}"')
    figures.save(shown[0], options.out / "agreement.png", dpi=72)


if __name__ == "__main__":
    main()
