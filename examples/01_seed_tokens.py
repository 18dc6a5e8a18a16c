"""The post's eight tokens, with a thousand seeds where the post shows one.

    python examples/01_seed_tokens.py [--out examples/figures]

About 20 seconds on two CPU cores. It writes four pictures and prints their numbers:

- `heat_map.png`: the seed whose features come nearest the post's figure, RMS about 0.02;
- `found.png`: how many of the post's three features each seed finds; few show exactly those three;
- `frontier.png`: sparsity against fidelity over the weight of the L1 penalty;
- `shrinkage.png`: with a free decoder mean |f| keeps falling while training goes on, because the penalty
  is escaped by a small encoder and a large decoder; with a decoder of unit norm it settles.
"""

import argparse
import itertools
from functools import partial
from pathlib import Path

import jax
import numpy as np
import optax

import sae_jax
from sae_jax.report import figures

# read off the post's figure to about 0.05; features 5 and 6 are dead
FIGURE = {
    "cat": (0.22, 0, 0, 0.10, 0, 0),
    "happy cat": (0.25, 0, 0, 0.08, 0, 0),
    "dog": (0.14, 0, 0, 0.06, 0, 0),
    "energetic dog": (0.17, 0, 0, 0.02, 0, 0),
    "not cat": (0, 0, 0.47, 0, 0, 0),
    "not dog": (0, 0, 0.37, 0, 0, 0),
    "robot": (0, 0.47, 0.30, 0, 0, 0),
    "AI assistant": (0, 0.47, 0.25, 0, 0, 0),
}
STEPS_SHOWN = (500, 1000, 2000, 5000)

tokens = sae_jax.synthetic.seed_tokens()
faithful = partial(sae_jax.relu, d_in=4, d_sae=6)
sweep = partial(sae_jax.sweep, faithful, source=sae_jax.in_memory(tokens.x))


def unit_norm(lr):
    return optax.chain(optax.adam(lr), sae_jax.transforms.unit_norm_decoder())


def nearest(f, figure):
    """Per member the least RMS over orders of its features, and that order; f [members, tokens, d_sae]."""
    orders = np.array(list(itertools.permutations(range(f.shape[-1]))))
    # cost[m, i, j]: squared error when feature j of member m stands in column i of the figure
    cost = np.square(f[:, :, None, :] - figure[:, :, None]).sum(axis=1)
    totals = sum(cost[:, column, orders[:, column]] for column in range(f.shape[-1]))
    return np.sqrt(totals.min(axis=1) / figure.size), orders[totals.argmin(axis=1)]


def magnitudes(result):
    """Median over seeds of mean |f|, at the steps shown."""
    at = np.searchsorted(result.history["step"], STEPS_SHOWN)
    return np.median(result.history["sparsity"][at], axis=1)


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)

    seeds = sweep(grid=sae_jax.grid(l1=[0.1], lr=[1e-2], seed=range(1000)), steps=500)
    f = np.asarray(jax.vmap(faithful(l1=0.1).encode, in_axes=(0, None))(seeds.params, tokens.x))
    rms, orders = nearest(f, np.array([FIGURE[name] for name in tokens.names]))
    best = rms.argmin()
    figures.save(figures.heat_map(f[best][:, orders[best]], tokens.names), out / "heat_map.png")

    found = sae_jax.synthetic.features_found(f, tokens)
    live = (f > 0).any(axis=1).sum(axis=1)
    exactly = found.all(axis=1) & (live == 3)
    figures.save(figures.found_distribution(found), out / "found.png")

    weights = sweep(grid=sae_jax.grid(l1=np.logspace(-3, -0.5, 16), lr=[1e-2], seed=range(32)), steps=500)
    figures.save(figures.frontier(weights), out / "frontier.png")

    longer = sae_jax.grid(l1=[0.1], lr=[1e-2], seed=range(64))
    free = sweep(grid=longer, steps=5000)
    unit = sweep(optimizer=unit_norm, grid=longer, steps=5000)
    shown = {"free decoder (the post's)": free, "unit-norm decoder": unit}
    figures.save(figures.shrinkage(shown), out / "shrinkage.png")

    counts = np.bincount(found.sum(axis=1), minlength=4) / len(found)
    print("Eight tokens, six latents, Adam 1e-2, L1 weight 0.1, 500 steps, 1,000 seeds")
    print(
        f"  distance to the post's figure    RMS {rms[best]:.3f} (seed {best}), median {np.median(rms):.3f}"
    )
    print("  seeds that find 0, 1, 2, 3       " + ", ".join(f"{share:.1%}" for share in counts))
    print(f"  seeds that show exactly the 3    {exactly.mean():.1%}")
    print(f"  live latents per seed            {live.mean():.2f} on average, median {np.median(live):.0f}")
    print(f"Mean |f| after {', '.join(map(str, STEPS_SHOWN))} steps, median of 64 seeds")
    for name, result in shown.items():
        print(f"  {name:<32} " + ", ".join(f"{value:.3f}" for value in magnitudes(result)))
    print(f"Pictures in {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "figures")
    main(parser.parse_args().out)
