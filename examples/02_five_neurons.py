"""Five neurons, twenty features: which of a task's factors does each unit know?

    python examples/02_five_neurons.py [--out figures] [--networks 8] [--steps 3000]

About half a minute on two CPU cores. Ten sparse factors lie behind a noisy mixture of twenty inputs, 5,000
rows; networks with five hidden neurons learn to tell which factors are there, and an SAE with twenty latents
is trained on the [5000, 5] hidden activations of each. For every factor the single unit is taken that knows
it best by the training rows, and judged on 5,000 others: by |correlation| with the factor's amount, and by
the area under the ROC curve (AUC) for its presence. Twenty ReLUs in random directions are the control: they
have as many units to choose from. Prints the means over factors with 95 % intervals over networks, and draws
`five_neurons.png`.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import optax
from matplotlib.figure import Figure
from scipy.stats import rankdata

import sae_jax
from sae_jax.report import figures
from sae_jax.seeds import half_width
from sae_jax.target_models import Perceptron, cross_entropy, fit, mixed_factors

PENALTIES = (0.1, 0.3, 0.5, 1.0)
SHOWN = 0.5

sae = partial(
    sae_jax.relu, 5, 20, mean_features=False, apply_b_dec_to_input=True, decoder_init_norm=1.0
)  # fmt: skip


def unit_norm(lr):
    return optax.chain(optax.adam(lr), sae_jax.transforms.unit_norm_decoder())


class Knowledge(NamedTuple):
    """How well the best single unit knows each factor."""

    correlation: np.ndarray
    auc: np.ndarray


def correlations(units, factors):
    """Of each factor with each unit, [factors, units]; 0 for a unit that never changes."""
    units, factors = (each - each.mean(axis=0) for each in (units, factors))
    lengths = np.linalg.norm(factors, axis=0)[:, None] * np.linalg.norm(units, axis=0)
    return np.divide(factors.T @ units, lengths, out=np.zeros_like(lengths), where=lengths > 0)


def aucs(units, factors):
    """The probability that a unit is higher on a row with the factor than on one without, ties half."""
    present = (factors > 0).astype(float)
    with_it, without = present.sum(axis=0)[:, None], (1 - present).sum(axis=0)[:, None]
    return (present.T @ rankdata(units, axis=0) - with_it * (with_it + 1) / 2) / (with_it * without)


def knowledge(chosen_on, judged_on) -> Knowledge:
    """Each pair is (units [rows, units], factors [rows, factors]): one chooses units, the other judges."""

    def best(measure):
        first, second = measure(*chosen_on), measure(*judged_on)
        unit = np.abs(first).argmax(axis=1)
        row = np.arange(len(unit))
        return np.sign(first[row, unit]) * second[row, unit]

    # of an AUC half is chance, and a unit that is low where the factor is there knows it as well
    return Knowledge(best(correlations), 0.5 + best(lambda *rows: aucs(*rows) - 0.5))


def measured(networks, steps, network_steps=4000, rows=5000):
    """Knowledge [networks, factors] by kind of unit, L0 by penalty, and of the network's own outputs."""
    task, held_out = mixed_factors(rows, density=0.05), mixed_factors(rows, density=0.05, data_seed=1)
    factors = [np.asarray(each.factors, float) for each in (task, held_out)]
    source = sae_jax.in_memory(task.x, 250, y=task.labels)
    fitted = fit(
        partial(Perceptron, task.x.shape[1], 5, task.labels.shape[1]), cross_entropy, [source],
        optax.adam(3e-3), seeds=range(networks), steps=network_steps,
    )  # fmt: skip
    known, l0 = {}, []
    for seed in range(networks):
        network = fitted.model(0, seed)
        hidden = [np.asarray(network.hidden(each.x)) for each in (task, held_out)]
        hidden = [each / np.sqrt(np.square(hidden[0]).mean()) for each in hidden]
        directions = np.random.default_rng(seed).normal(size=(5, 20))
        result = sae_jax.sweep(
            sae, unit_norm, grid=sae_jax.grid(l1=PENALTIES, lr=[3e-3], seed=[seed]),
            source=sae_jax.in_memory(hidden[0], 500), steps=steps,
        )  # fmt: skip
        kinds = {
            "the network's outputs": [np.asarray(network(each.x)) for each in (task, held_out)],
            "5 neurons": hidden,
            "20 random ReLUs": [
                np.maximum((each - hidden[0].mean(axis=0)) @ directions, 0) for each in hidden
            ],
        }
        for place, l1 in enumerate(PENALTIES):
            kinds[f"20 SAE features, l1 {l1}"] = [
                np.asarray(result.member(place).encode(each)) for each in hidden
            ]
        l0.append(result.metrics["l0"])
        for kind, units in kinds.items():
            known.setdefault(kind, []).append(knowledge(*zip(units, factors, strict=True)))
    return {kind: Knowledge(*map(np.array, zip(*each, strict=True))) for kind, each in known.items()}, l0


def interval(values):
    """Mean over networks and half of its 95 % interval (Student's t); values [networks, factors]."""
    means = values.mean(axis=1)
    return means.mean(), half_width(means)


def drawn(known):
    """Each factor of each network, sorted, by kind of unit."""
    ax = Figure(figsize=(6.4, 4.0), layout="constrained").add_subplot()
    kinds = ("5 neurons", "20 random ReLUs", f"20 SAE features, l1 {SHOWN}")
    for kind, hue in zip(kinds, ("#777777", figures.HUES[1], figures.HUES[0]), strict=True):
        values = np.sort(known[kind].correlation.ravel())
        ax.plot(values, np.linspace(0, 1, len(values)), color=hue, label=kind)
    ax.set_xlim(0, 1)
    ax.set_xlabel("|correlation| of the best single unit with a factor")
    ax.set_ylabel("share of factors below")
    ax.set_title(f"Ten factors, {len(known[kinds[0]].auc)} networks, held-out rows")
    ax.grid(alpha=0.25)
    ax.legend(frameon=False)
    return ax


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("figures"))
    parser.add_argument("--networks", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3000)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    known, l0 = measured(options.networks, options.steps)
    print(
        f"Best single unit per factor, mean over 10 factors; 95 % interval over {options.networks} networks"
    )
    print(f"  {'':<26} |correlation|     AUC")
    for kind, each in known.items():
        (correlation, one), (auc, other) = interval(each.correlation), interval(each.auc)
        print(f"  {kind:<26} {correlation:.3f} +-{one:.3f}   {auc:.3f} +-{other:.3f}")
    told = ", ".join(f"{value:.2f}" for value in np.mean(l0, axis=0))
    print(f"  L0 of the SAEs, by l1: {told}; factors there on a row: 0.50")
    figures.save(drawn(known), options.out / "five_neurons.png", dpi=110)


if __name__ == "__main__":
    main()
