"""SynthSAEBench: five SAEs, five seeds each, held against features that are known.

    python examples/07_synthsaebench.py [--beside sae_lens] [--out examples/figures]
    python examples/07_synthsaebench.py --full

The first line trains SAELens's own set-ups of L1, TopK, BatchTopK, Matryoshka and JumpReLU on
`synthsaebench_1k` (1,024 features in 128 dimensions), the five seeds of each side by side. It prints what
they find with 95 % intervals, and draws it in `synthsaebench.png`. About a quarter of an hour on two
CPU cores.

`--beside sae_lens` trains the same with SAELens on the very same batches, measures both sides by the same
functions, and tells of each figure whether our mean lies within the spread of their seeds.

`--full` is SynthSAEBench-16k by its protocol: 16,384 features, 200 M samples, a width of 4,096. Where JAX has
no accelerator it prints what that would take there, and trains nothing.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import sae_jax
from sae_jax import recipes, synthetic
from sae_jax.seeds import half_width

BATCH, SEEDS = 1024, 5
NAMES = ("L1", "TopK", "BatchTopK", "Matryoshka", "JumpReLU")
FIGURES = ("f1", "mcc", "uniqueness", "explained_variance")
PUBLISHED = {
    "L1": (0.5562, 0.6039, 0.8976, 0.7654),
    "BatchTopK": (0.7316, 0.7574, 0.9837, 0.7923),
    "Matryoshka": (0.8793, 0.7927, 0.9987, 0.7792),
    "JumpReLU": (0.7317, 0.7527, 0.9885, 0.7951),
}
"""`FIGURES` of SynthSAEBench-16k at an L0 of 25: arXiv 2602.14687, SAELens's `docs/synth_sae_bench.md`."""

Found = dict[str, np.ndarray]
"""Figures by name, [seeds]."""


class Size(NamedTuple):
    """What is trained, on which world, for how long."""

    world: Callable[..., synthetic.World]
    features: int
    d_in: int
    d_sae: int
    l0: float
    prefixes: tuple[int, ...]
    steps: int
    lr: float
    l1: float = 1.0
    """Weights of the penalties of L1 and JumpReLU that land on `l0`; see `tuned`."""
    l0_coefficient: float = 1.0
    rows: int = 65_536
    """That each is measured on."""


SMALL = Size(synthetic.synthsaebench_1k, 1024, 128, 256, 4, (8, 32, 128, 256), 2000, 3e-3, 2.05, 1.0)
FULL = Size(synthetic.synthsaebench_16k, 16_384, 768, 4096, 25, (128, 512, 2048, 4096), 195_312, 3e-4)


class Architecture(NamedTuple):
    """A row of the benchmark."""

    recipe: Callable[..., recipes.Recipe]
    options: dict[str, Any]
    in_saelens: str


def architectures(size: Size) -> dict[str, Architecture]:
    """The five rows."""
    shape = {"d_in": size.d_in, "d_sae": size.d_sae}
    k = shape | {"k": size.l0}
    nested = k | {"matryoshka_widths": size.prefixes}
    jumps = shape | {"l0_coefficient": size.l0_coefficient}
    return {
        "L1": Architecture(recipes.saelens_standard, shape | {"l1": size.l1}, "standard"),
        "TopK": Architecture(recipes.saelens_topk, k, "topk"),
        "BatchTopK": Architecture(recipes.saelens_batchtopk, k, "batchtopk"),
        "Matryoshka": Architecture(recipes.saelens_matryoshka, nested, "matryoshka_batchtopk"),
        "JumpReLU": Architecture(recipes.saelens_jumprelu, jumps, "jumprelu"),
    }


def train_here(world: synthetic.World, size: Size, names: Sequence[str] = NAMES) -> dict[str, Found]:
    """Each architecture as one sweep over seeds."""
    found = {}
    for name in names:
        recipe, options, _ = architectures(size)[name]
        began = time.perf_counter()
        result = sae_jax.sweep(
            *recipe(lr=size.lr, **options),
            grid=sae_jax.grid(seed=range(SEEDS)),
            source=world,
            steps=size.steps,
            evaluate_rows=size.rows,
        )
        found[name] = result.metrics
        seconds = time.perf_counter() - began
        speed = SEEDS * size.steps * BATCH / seconds
        print(f"  {SEEDS} x {name} in {seconds:.0f} s: {speed:,.0f} samples/s over all seeds", flush=True)
    return found


def train_there(world: synthetic.World, size: Size) -> dict[str, Found]:
    """The same by SAELens; see tests/benchmarks/synthsaebench_saelens.py."""
    sys.path.append(str(Path(__file__).parents[1] / "tests" / "benchmarks"))
    import synthsaebench_saelens as saelens

    configs = {
        name: (there, {"l1_coefficient" if key == "l1" else key: value for key, value in options.items()})
        for name, (_, options, there) in architectures(size).items()
    }
    trained = saelens.train(world, configs, SEEDS, size.steps, size.lr)
    found = {}
    for name, seeds in trained.items():
        apart = saelens.difference(seeds[0], world, size.rows)
        worst = max(apart, key=lambda figure: abs(apart[figure]))
        print(f"  {name}: our figures are within {abs(apart[worst]):.0e} of SAELens's own ({worst})")
        each = [saelens.measured(sae, world, size.rows) for sae in seeds]
        found[name] = {figure: np.array([one[figure] for one in each]) for figure in each[0]}
    return found


def tuned(world: synthetic.World, size: Size) -> Size:
    """The same size with penalties that land on its L0, between those of a sweep over weights, one seed."""

    def weight(name: str, axis: str, values: np.ndarray) -> float:
        recipe, options, _ = architectures(size)[name]
        table = sae_jax.grid(**{axis: values})
        result = sae_jax.sweep(*recipe(lr=size.lr, **options), grid=table, source=world, steps=size.steps)
        l0 = result.metrics["l0"]
        print(f"  {name}: " + ", ".join(f"{a:.3g} -> {b:.3g}" for a, b in zip(values, l0, strict=True)))
        # L0 falls as the weight rises
        return float(np.exp(np.interp(-np.log(size.l0), -np.log(l0), np.log(values))))

    l1 = weight("L1", "l1", np.geomspace(1, 16, 7))
    return size._replace(l1=l1, l0_coefficient=weight("JumpReLU", "l0_coefficient", np.geomspace(0.5, 16, 7)))


def table(found: dict[str, Found]) -> str:
    """Means over seeds and their 95 % intervals."""
    lines = [f"{'':12}{'L0':>6}{'dead':>7}" + "".join(f"{figure:>21}" for figure in FIGURES)]
    for name, one in found.items():
        cells = [f"{one[figure].mean():.4f} +- {half_width(one[figure]):.4f}" for figure in FIGURES]
        begins = f"{name:12}{one['l0'].mean():6.2f}{one['dead_fraction'].mean():7.1%}"
        lines.append(begins + "".join(f"{cell:>21}" for cell in cells))
    return "\n".join(lines)


def verdicts(ours: dict[str, Found], theirs: dict[str, Found]) -> str:
    """Of each figure, whether our mean lies within the spread of their seeds."""
    lines = [f"{'':31}{'ours':>16}   {'SAELens, least to most':28}{'difference':>20}"]
    inside = []
    for name, figure in ((name, figure) for name in ours for figure in FIGURES):
        here, there = ours[name][figure], theirs[name][figure]
        difference = here.mean() - there.mean()
        error = np.sqrt((here.var(ddof=1) + there.var(ddof=1)) / SEEDS)
        inside.append(there.min() <= here.mean() <= there.max())
        lines.append(
            f"{name:12}{figure:19}{here.mean():6.4f} +- {half_width(here):.4f}   {there.mean():.4f}, "
            f"{there.min():.4f} to {there.max():.4f}  {difference:+.4f} ({difference / error:+.1f} SE)  "
            f"{'within' if inside[-1] else 'OUTSIDE'}"
        )
    lines.append(
        f"Within the spread of SAELens's {SEEDS} seeds: {sum(inside)} of {len(inside)} means of ours"
    )
    return "\n".join(lines)


def picture(sides: dict[str, dict[str, Found]]) -> Figure:
    """F1 and MCC per architecture with their intervals, a mark per side."""
    figure = Figure(figsize=(8.4, 3.6), layout="constrained")
    marks = dict(zip(sides, (("o", "#2c6fbb"), ("s", "#ef7d32")), strict=False))
    for ax, name in zip(figure.subplots(1, 2), ("f1", "mcc"), strict=True):
        for number, (side, found) in enumerate(sides.items()):
            at = np.arange(len(found)) + 0.2 * number - 0.1 * (len(sides) - 1)
            means = [one[name].mean() for one in found.values()]
            reach = [half_width(one[name]) for one in found.values()]
            mark, color = marks[side]
            ax.errorbar(at, means, yerr=reach, fmt=mark, color=color, capsize=4, label=side)
            ax.set_xticks(range(len(found)), list(found), rotation=20)
        ax.set_ylabel({"f1": "F1 of latents as detectors", "mcc": "MCC with the true directions"}[name])
        ax.grid(axis="y", alpha=0.25)
    ax.legend(frameon=False)
    figure.suptitle(f"Means over {SEEDS} seeds, 95 % intervals")
    return figure


class Cost(NamedTuple):
    """What a benchmark takes at the least: all architectures, all seeds."""

    per_sae: int
    """FLOP per sample."""
    per_row: int
    """FLOP per sample of the world, which the seeds of an architecture share."""
    flops: int
    draws: int
    """Random numbers."""
    memory: int
    """Bytes, the seeds of one architecture side by side."""


def cost(size: Size) -> Cost:
    """Products of matrices and random numbers only, and what must lie in memory at once.

    SAE     10 d_in d_sae: two products forward, three backward, none for the gradient of the input
    world   2 features d_in, and a random number per feature for firing, magnitude and siblings
    memory  weights, gradients and two moments; f, its pre-activation and their gradients; the world
    """
    sae, row = 10 * size.d_in * size.d_sae, 2 * size.features * size.d_in
    samples = len(NAMES) * size.steps * BATCH
    held = SEEDS * 4 * (2 * size.d_in * size.d_sae + BATCH * size.d_sae)
    world = size.features * (size.d_in + 4 * BATCH)
    return Cost(sae, row, samples * (SEEDS * sae + row), samples * 3 * size.features, 4 * (held + world))


def rates(n: int = 2048) -> tuple[float, float]:
    """This machine's FLOP/s in a float32 product of matrices, and its normal random numbers per second."""

    def seconds(work: Callable[..., jax.Array], *arguments: jax.Array) -> float:
        spent = []
        for _ in range(4):
            began = time.perf_counter()
            work(*arguments).block_until_ready()
            spent.append(time.perf_counter() - began)
        return min(spent)

    numbers = jax.jit(partial(jax.random.normal, shape=(n, n)))
    product = seconds(jax.jit(jnp.matmul), *jnp.ones((2, n, n)))
    return 2 * n**3 / product, n**2 / seconds(numbers, jax.random.key(0))


def plan(size: Size, flops: float, draws: float) -> str:
    """What the whole would take on a machine of such rates."""
    need = cost(size)
    products, numbers = need.flops / flops / 3600, need.draws / draws / 3600
    samples = size.steps * BATCH
    return f"""\
{size.world.__name__}: {samples / 1e6:.0f} M samples for each of {len(NAMES)} architectures x {SEEDS} seeds
  an SAE        {need.per_sae / 1e6:.1f} MFLOP per sample
  the world     {need.per_row / 1e6:.1f} MFLOP and {3 * size.features:,} random numbers per sample
  in all        {need.flops:.2e} FLOP and {need.draws:.2e} random numbers
  memory        {need.memory / 2**30:.1f} GiB, {SEEDS} seeds side by side
  this machine  {flops / 1e9:.0f} GFLOP/s in float32 products, {draws / 1e6:.0f} M normal numbers/s
  at the least  {products + numbers:,.0f} hours: products {products:,.0f}, random numbers {numbers:,.0f}
JAX has no accelerator here: nothing was trained, and nothing is claimed."""


def full(size: Size) -> None:
    """The benchmark at its own size, beside its published table."""
    world = size.world(batch_size=BATCH)
    # a tenth of the steps places a penalty, and leaves L0 somewhat off its target
    found = tuned(world, size._replace(steps=size.steps // 10))
    ours = train_here(world, size._replace(l1=found.l1, l0_coefficient=found.l0_coefficient))
    print(f"{table(ours)}\nPublished\n{'':25}" + "".join(f"{figure:>21}" for figure in FIGURES))
    for name, values in PUBLISHED.items():
        print(f"{name:25}" + "".join(f"{value:>21.4f}" for value in values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "figures")
    parser.add_argument("--steps", type=int, default=SMALL.steps, help=f"{SMALL.steps} by default")
    parser.add_argument("--rows", type=int, default=SMALL.rows, help="to measure on; 65,536 by default")
    parser.add_argument("--tune", action="store_true", help="look for the penalties' weights again first")
    parser.add_argument("--beside", choices=["sae_lens"], help="train the same there, and compare")
    parser.add_argument(
        "--full", action="store_true", help="SynthSAEBench-16k, where there is an accelerator"
    )
    args = parser.parse_args()
    if args.full:
        print(plan(FULL, *rates())) if jax.default_backend() == "cpu" else full(FULL)
        return

    args.out.mkdir(parents=True, exist_ok=True)
    size, world = SMALL._replace(steps=args.steps, rows=args.rows), SMALL.world(batch_size=BATCH)
    likeliest = np.sort(world.probabilities)[-size.d_sae :].sum()
    print(
        f"{size.features:,} features in {size.d_in} dimensions, {world.expected_l0:.2f} of them on a row, "
        f"{likeliest:.2f} of the {size.d_sae} likeliest\n"
        f"{size.d_sae} latents at an L0 of {size.l0}, {size.steps:,} steps of {BATCH}, Adam at {size.lr:g}"
    )
    if args.tune:
        size = tuned(world, size)
        print(f"  l1 {size.l1:.4g}, l0_coefficient {size.l0_coefficient:.4g}")
    sides = {"sae_jax": train_here(world, size)}
    print(table(sides["sae_jax"]))
    if args.beside:
        sides["SAELens"] = train_there(world, size)
        print(f"SAELens\n{table(sides['SAELens'])}\n{verdicts(*sides.values())}")
    picture(sides).savefig(args.out / "synthsaebench.png", dpi=150)
    per_seed = {
        side: {name: {key: one[key].tolist() for key in ("l0", *FIGURES)} for name, one in found.items()}
        for side, found in sides.items()
    }
    (args.out / "synthsaebench.json").write_text(json.dumps(per_seed, indent=1) + "\n")
    print(f"synthsaebench.png and synthsaebench.json are in {args.out}")


if __name__ == "__main__":
    main()
