"""Two ways of being wrong that only known features show: hedging, and too small an L0.

    python examples/06_hedging.py [--out figures] [--seeds 3] [--steps 14650]

By estimate half an hour on two CPU cores (`--k 5 7 8 9 10 11 12 14` for a curve). First, one latent for two
independent features: it takes the likelier one, and the decoder's bias hedges the other by exactly how often
it fires (Chanin et al. 2025, "Feature hedging"). Then fifty correlated features and BatchTopK at several k,
all in one compiled program (Chanin and Garriga-Alonso 2025, "Sparse but wrong"), beside the true dictionary
cut to the same k. Prints both tables and draws `sparse_but_wrong.png`.
"""

import argparse
from pathlib import Path

import jax
import numpy as np
from matplotlib.figure import Figure

import sae_jax
from sae_jax import activations, initialisation, recipes, synthetic
from sae_jax.metrics import cosines
from sae_jax.report import figures
from sae_jax.seeds import half_width

FOUND = 0.95
"""The cosine above which a feature counts as found: the bound of the paper's claim, not the library's .9."""


def near_truth(world, noise=0.25):
    """Start at the true directions, each entry off by `noise`, as the paper does."""

    def change(params, key):
        off = noise * jax.random.normal(jax.random.fold_in(key, 1), params["W_dec"].shape)
        W_dec = world.directions[: len(off)] + off
        return {**params, "W_dec": W_dec, "W_enc": W_dec.T}

    return change


def hedged(world, seeds, steps=5000, noise: float | None = 0.25):
    """SAELens's standard SAE with one latent, over seeds; `noise` None for SAELens's own random start."""
    factory, optimizer = recipes.saelens_standard(
        d_in=50, d_sae=1, l1=1e-3, lr_decay_steps=steps // 5, steps=steps
    )
    if noise is not None:
        factory = initialisation.starting(factory, near_truth(world, noise))
    return sae_jax.sweep(
        factory, optimizer, grid=sae_jax.grid(seed=range(seeds), lr=[1e-3]), source=world, steps=steps
    )


def hedging(world, result):
    """Per member: the latent's cosine with feature 0, b_dec along feature 1, and |b_dec - p_1 d_1| / p_1."""
    truth, b_dec = np.asarray(world.directions), result.params["b_dec"]
    rate = world.probabilities[1].item()
    cosine = np.array([cosines(rows, truth)[0, 0] for rows in result.params["W_dec"]])
    return cosine, b_dec @ truth[1], np.linalg.norm(b_dec - rate * truth[1], axis=1) / rate


def by_k(world, ks, seeds, steps, lr=3e-4, decay=0):
    """SAELens's BatchTopK SAE over k and seeds, one program."""
    features, d_in = world.directions.shape
    factory, optimizer = recipes.saelens_batchtopk(
        d_in=d_in, d_sae=features, lr_decay_steps=decay, steps=steps
    )
    grid = sae_jax.grid(k=ks, seed=range(seeds), lr=[lr])
    return sae_jax.sweep(factory, optimizer, grid=grid, source=world, steps=steps)


def found(world, result):
    """Per member, how many true features have a latent with a cosine above `FOUND`."""
    best = [cosines(rows, world.directions).max(axis=0) for rows in result.params["W_dec"]]
    return (np.array(best) > FOUND).sum(axis=1)


def error_of_truth(world, k, rows=65_536):
    """The error of the true dictionary that is allowed the k largest of a row, over a batch."""

    def error(x):
        f = activations.batch_topk(x @ world.directions.T, float(k))
        return ((f @ world.directions - x) ** 2).mean()

    return np.mean([jax.jit(error)(batch.x) for batch in world.evaluation(rows)])


def drawn(table, l0, features):
    """Features found, and the errors of what was learned and of the truth, over k."""
    k, count, count_off, error, error_off, truth = table.T
    figure = Figure(figsize=(8.4, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.errorbar(k, count, count_off, fmt="o-", ms=4, capsize=3, color=figures.HUES[0])
    left.set_ylabel(f"of {features} features, found (cosine > {FOUND})")
    left.set_ylim(0, 1.05 * features)
    right.errorbar(k, error, error_off, fmt="o-", ms=4, capsize=3, color=figures.HUES[0], label="learned")
    right.plot(k, truth, "s--", ms=4, color=figures.HUES[2], label="the truth, cut to k")
    right.set_yscale("symlog", linthresh=1e-4)
    right.set_ylim(bottom=0)
    right.set_ylabel("mean squared error")
    right.legend(frameon=False)
    for ax in (left, right):
        ax.axvline(l0, color="#999", lw=1, zorder=0)
        ax.set_xlabel(f"k; the line is the true L0, {l0:.2f}")
        ax.grid(alpha=0.25)
    return left


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("figures"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=14_650)
    parser.add_argument("--k", type=float, nargs="+", default=[9, 11])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    world = synthetic.hedging()
    rate = world.probabilities[1].item()
    cosine, along, off = hedging(world, hedged(world, 16))
    share = along / rate
    print("Hedging: one latent, 16 seeds, from the truth with noise .25")
    print(f"  cosine of the latent with feature 0     {cosine.min():.6f} at least")
    print(f"  b_dec along feature 1, over its rate    {share.mean():.4f} +- {half_width(share):.4f}")
    print(f"  |b_dec - p_1 d_1| / p_1                 {off.max():.4f} at most")
    cosine, *_ = hedging(world, hedged(world, 16, noise=None))
    print(f"  from SAELens's random start             {(cosine > 0.999).sum()} of 16 seeds the same,")
    print(f"                                          {(cosine < -0.999).sum()} its mirror image")

    world = synthetic.sparse_but_wrong()
    result = by_k(world, options.k, options.seeds, options.steps)
    counts, errors, ks = found(world, result), result.metrics["mse"], result.grid["k"]
    l0 = world.expected_l0.item()
    print(f"Sparse but wrong: {options.seeds} seeds, {options.steps:,} steps; the true L0 is {l0:.2f}")
    print("     k   found of 50, by seed    mean squared error    of the truth at that k")
    rows = []
    for k in options.k:
        count, error, truth = counts[ks == k], errors[ks == k], error_of_truth(world, k)
        rows.append((k, count.mean(), half_width(count), error.mean(), half_width(error), truth))
        by_seed = " ".join(map(str, count))
        print(f"{k:6g}   {by_seed:<20} {error.mean():10.5f} +- {half_width(error):.5f} {truth:14.5f}")
    ax = drawn(np.array(rows), l0, len(world.directions))
    figures.save(ax, options.out / "sparse_but_wrong.png", dpi=110)


if __name__ == "__main__":
    main()
