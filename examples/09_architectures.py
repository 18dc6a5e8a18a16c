"""Six architectures on one world: which reconstructs best at the same number of active latents?

    python examples/09_architectures.py [--out figures] [--steps 2000]

Five minutes on two CPU cores. Activations of width 64 are made of 256 directions that fire in correlated
groups, eight at a time. Every architecture is swept over the same L0: TopK's family by its k, the others by
a target L0 that steers their penalty. Prints a table of explained variance by architecture and L0, and draws
`frontier.png`: TopK and its relatives, JumpReLU and Gated lie well above ReLU, whose penalty shrinks its
features.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import numpy as np
import optax

import sae_jax
from sae_jax.report import figures
from sae_jax.transforms import scale_by_adam, trapezoid, unit_norm_decoder

L0S = [2, 4, 8, 16, 32]
SIZES = {"d_in": 64, "d_sae": 256}


def chain(learning_rate, steps):
    """Adam, a short warm-up, a decay over the last fifth, unit decoder rows."""
    schedule = trapezoid(warmup=100, steps=steps, decay=steps // 5)
    return optax.chain(
        scale_by_adam(), optax.scale_by_schedule(schedule), optax.scale(-learning_rate), unit_norm_decoder()
    )


def progress(seen):
    """One line, kept up to date on a terminal."""
    if sys.stderr.isatty():
        end = "\n" if seen.member_steps == seen.total else "\r"
        print(f"{seen.member_steps / seen.total:.0%}", end=end, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("figures"))
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()

    world = sae_jax.synthetic.planted(40_000, d_in=64, features=256, active=8, correlation=0.5)
    source = sae_jax.in_memory(world.x, batch_size=256)
    optimizer = partial(chain, steps=options.steps)
    by_k = sae_jax.grid(k=L0S, lr=[1e-3])
    by_target = sae_jax.grid(target_l0=[float(l0) for l0 in L0S], lr=[1e-3])
    field = {"mean_features": False, "apply_b_dec_to_input": True, "decoder_init_norm": 1.0}
    groups = [
        sae_jax.Group(partial(sae_jax.relu, **SIZES, **field), optimizer, by_target),
        sae_jax.Group(partial(sae_jax.gated, **SIZES), optimizer, by_target),
        sae_jax.Group(partial(sae_jax.jumprelu, **SIZES, l0_coefficient=0.01), optimizer, by_target),
        sae_jax.Group(partial(sae_jax.topk, **SIZES), optimizer, by_k),
        sae_jax.Group(partial(sae_jax.batch_topk, **SIZES), optimizer, by_k),
        sae_jax.Group(partial(sae_jax.matryoshka, **SIZES, prefixes=(32, 64, 128, 256)), optimizer, by_k),
    ]

    result = sae_jax.sweep_all(groups, source=source, steps=options.steps, look=progress)
    print("explained variance at L0 =", *(f"{l0:>8}" for l0 in L0S))
    for name, members in result.groups.items():
        reached, fidelity = result.metrics["l0"][members], result.metrics["explained_variance"][members]
        at_l0 = np.interp(np.log(L0S), np.log(reached), fidelity)
        print(f"{name:>25}", *(f"{value:8.3f}" for value in at_l0))
    for sentence in result.missed():
        print(sentence)
    options.out.mkdir(parents=True, exist_ok=True)
    figures.frontier_png(result, options.out / "frontier.png")
    print(f"wrote {options.out / 'frontier.png'}")


if __name__ == "__main__":
    main()
