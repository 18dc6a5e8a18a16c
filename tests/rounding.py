"""What bfloat16 costs: the same SAEs from the same seeds on the same batches, in three precisions.

    python tests/rounding.py [--steps 4000] [--seeds 4] [--only relu topk]

Prints the tables of docs/precision.md, one row per architecture: float32 against products in bfloat16 (what
`precision("bfloat16")` does) and against weights and moments in bfloat16 (`sweep(dtype=jnp.bfloat16)`).
Every SAE is measured in float32 on the same held-out rows, whatever it was trained in.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

import sae_jax
from sae_jax import linear, metrics, synthetic, transforms

ROWS = 32_768
FIGURES = ("l0", "explained_variance", "loss")


class Precision(NamedTuple):
    """Of the products, and of the weights."""

    products: str
    weights: Any


FLOAT32 = Precision("highest", jnp.float32)
BFLOAT16_PRODUCTS = Precision("bfloat16", jnp.float32)
BFLOAT16_WEIGHTS = Precision("highest", jnp.bfloat16)

Found = dict[str, np.ndarray]
"""`FIGURES` by name, [seeds], and `seconds`."""


class Setup(NamedTuple):
    """An architecture and how sparse it is to be."""

    factory: Callable[..., sae_jax.SAE]
    axis: str
    strength: float


SETUPS = {
    "relu": Setup(partial(sae_jax.relu, mean_features=False, decoder_norm_l1=True), "l1", 0.1),
    "topk": Setup(sae_jax.topk, "k", 4),
    "batch_topk": Setup(sae_jax.batch_topk, "k", 4),
    "jumprelu": Setup(partial(sae_jax.jumprelu, bandwidth=0.1), "l0_coefficient", 0.02),
    "gated": Setup(sae_jax.gated, "l1", 0.1),
    "matryoshka": Setup(sae_jax.matryoshka, "k", 4),
}


def world() -> synthetic.World:
    """256 independent features in 64 dimensions, some four active on a row."""
    return synthetic.sharkey_uncorrelated(features=256, d_in=64, active=8.0, decay=0.994, batch_size=256)


def adam(lr, steps: int) -> optax.GradientTransformation:
    """Adam whose learning rate falls to 0 over the last fifth, so that where a run ends is well defined."""
    rate = transforms.trapezoid(steps=steps, decay=steps // 5)
    return optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(rate), optax.scale(-lr))


def trained(setup: Setup, precision: Precision, source: synthetic.World, steps: int, seeds: int) -> Found:
    """What one architecture comes to in one precision."""
    d_in = source.directions.shape[-1]
    began = time.perf_counter()
    with linear.precision(precision.products):
        result = sae_jax.sweep(
            partial(setup.factory, d_in, 4 * d_in),
            partial(adam, steps=steps),
            grid=sae_jax.grid(**{setup.axis: [setup.strength]}, lr=[3e-3], seed=range(seeds)),
            source=source,
            steps=steps,
            dtype=precision.weights,
            evaluate_rows=1024,
        )
    seconds = time.perf_counter() - began
    each = [_measured(result.member(place), source) for place in range(seeds)]
    found = {name: np.array([one[name] for one in each]) for name in ("l0", "explained_variance")}
    last = len(result.history["step"]) // 10
    return found | {"loss": result.history["loss"][-last:].mean(axis=0), "seconds": np.array([seconds])}


def _measured(member: sae_jax.TrainedSAE, source: synthetic.World) -> dict[str, np.ndarray]:
    params = {name: jnp.asarray(leaf, jnp.float32) for name, leaf in member.params.items()}
    with linear.precision("highest"):
        return metrics.evaluate(member.sae, params, source.evaluation(ROWS))


def difference(exact: Found, rounded: Found) -> dict[str, float]:
    """Of the means over seeds: absolute for the explained variance, as a share for L0 and loss."""
    means = {name: (exact[name].mean(), rounded[name].mean()) for name in FIGURES}
    return {
        name: after - before if name == "explained_variance" else after / before - 1
        for name, (before, after) in means.items()
    }


def table(found: dict[str, tuple[Found, Found]]) -> str:
    """Markdown: what each figure is in float32, its spread over seeds, and what rounding adds."""
    lines = [
        "| | L0 | | explained variance | | loss | | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, (exact, rounded) in found.items():
        apart = difference(exact, rounded)
        cells = [
            f"{exact['l0'].mean():.3f} ± {exact['l0'].std(ddof=1):.3f}",
            f"{apart['l0']:+.2%}",
            f"{exact['explained_variance'].mean():.4f} ± {exact['explained_variance'].std(ddof=1):.4f}",
            f"{apart['explained_variance']:+.4f}",
            f"{exact['loss'].mean():.3f} ± {exact['loss'].std(ddof=1):.3f}",
            f"{apart['loss']:+.2%}",
            f"{exact['seconds'][0]:.0f}, {rounded['seconds'][0]:.0f}",
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--only", nargs="+", choices=SETUPS, default=list(SETUPS))
    asked = parser.parse_args()
    source = world()
    products, weights = {}, {}
    for name in asked.only:
        exact, of_products, of_weights = (
            trained(SETUPS[name], precision, source, asked.steps, asked.seeds)
            for precision in (FLOAT32, BFLOAT16_PRODUCTS, BFLOAT16_WEIGHTS)
        )
        products[name], weights[name] = (exact, of_products), (exact, of_weights)
        print(table({name: products[name]}), table({name: weights[name]}), sep="\n", flush=True)
    print(f"\n{asked.seeds} seeds, {asked.steps} steps of {source.batch_size} rows")
    print("\nproducts in bfloat16\n\n" + table(products))
    print("\nweights and moments in bfloat16\n\n" + table(weights))


if __name__ == "__main__":
    main()
