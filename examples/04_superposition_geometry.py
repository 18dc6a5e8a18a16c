"""The geometry of superposition: how many dimensions a feature gets as features become sparse.

    python examples/04_superposition_geometry.py [--out figures] [--steps 10000]

Ten minutes of processor time. Two hundred features in twenty dimensions, at twenty densities p from 1 to
1/20, all trained in one vmapped run. Prints D* = m / |W|^2 beside the figures published with "Toy Models of
Superposition" (Elhage et al. 2022), from which it stays within .023, and .009 away from the steep steps;
draws `geometry.png`: D* over 1/p, flat at 1/2 where features lie in pairs of opposites, and every D_i.
"""

import argparse
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from sae_jax import synthetic
from sae_jax.metrics.superposition import dimensions_per_feature, feature_dimensionality
from sae_jax.report import figures
from sae_jax.target_models import Features, Superposition, fit, importance_weighted

# D* as published, by level
PUBLISHED = (
    *(1.003, 0.998, 0.951, 0.830, 0.584, 0.526, 0.510, 0.505, 0.503, 0.433),
    *(0.369, 0.341, 0.289, 0.261, 0.228, 0.208, 0.188, 0.170, 0.151, 0.136),
)
DENSITIES = 20.0 ** (-np.arange(20) / 19)


def steep(one_over_p):
    """Where the curve falls so fast that a small shift is a large difference."""
    return np.logical_or(
        *((low < one_over_p) & (one_over_p < high) for low, high in ((1.6, 2.25), (3.5, 4.9)))
    )


def trained(densities, features=200, hidden=20, steps=10_000, batch_size=1024, learning_rate=1e-3):
    """W at each density, [densities, features, hidden]."""
    worlds = [synthetic.toy_superposition(features, float(p), batch_size=batch_size) for p in densities]
    fitted = fit(
        partial(Superposition, features, hidden, std=0.0213),
        importance_weighted(jnp.ones(features)),
        [Features(world) for world in worlds],
        optax.adamw(learning_rate, weight_decay=0.01),
        steps=steps,
    )
    return np.asarray(fitted.params["W"][:, 0])


def drawn(one_over_p, curve, shares):
    """D* over 1/p, and each feature's D_i, spread sideways within its level."""
    ax = Figure(figsize=(7.2, 4.4), layout="constrained").add_subplot()
    aside = np.exp(np.random.default_rng(0).uniform(-0.05, 0.05, shares.shape))
    ax.scatter(one_over_p[:, None] * aside, shares, s=3, alpha=0.25, linewidths=0, color=figures.HUES[2])
    ax.plot(one_over_p, curve, "o-", color=figures.HUES[0], ms=4, label="D*, here")
    ax.plot(one_over_p, PUBLISHED, "x", color="#777", label="D*, published")
    for level, name in (
        (1, "1"),
        (3 / 4, "3/4"),
        (2 / 3, "2/3"),
        (1 / 2, "1/2"),
        (2 / 5, "2/5"),
        (3 / 8, "3/8"),
    ):
        ax.axhline(level, color="#999", lw=0.5, zorder=0)
        ax.text(20.9, level, name, fontsize=8, va="center", color="#777")
    ax.set_xscale("log")
    ax.set_xticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    ax.minorticks_off()
    ax.set_ylim(0, 1.08)
    ax.set_xlabel("1/p: one over the density of the features")
    ax.set_ylabel("dimensions per feature")
    ax.set_title("200 features in 20 dimensions; points are single features")
    ax.legend(frameon=False)
    return ax


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("figures"))
    parser.add_argument("--steps", type=int, default=10_000)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    W = trained(DENSITIES, steps=options.steps)
    curve, shares, one_over_p = dimensions_per_feature(W), feature_dimensionality(W), 1 / DENSITIES
    print("  1/p    D*   published   off   sum of D_i   features within .02 of 1/2")
    for row in zip(one_over_p, curve, PUBLISHED, shares, strict=True):
        at, ours, theirs, each = row
        halves = int((np.abs(each - 0.5) < 0.02).sum())
        mark = " (steep)" if steep(at) else ""
        print(
            f"{at:6.2f} {ours:6.3f} {theirs:7.3f} {ours - theirs:+9.3f} {each.sum():9.2f} {halves:8d}{mark}"
        )
    off = np.abs(curve - PUBLISHED)[~steep(one_over_p)]
    print(f"farthest from the published curve, away from its steep steps: {off.max():.3f}")
    print(f"levels within .03 of 1/2: {(np.abs(curve - 0.5) < 0.03).sum()}")
    print(f"sum of D_i: {shares.sum(axis=1).min():.2f} to {shares.sum(axis=1).max():.2f} of 20")
    figures.save(drawn(one_over_p, curve, shares), options.out / "geometry.png", dpi=110)


if __name__ == "__main__":
    main()
