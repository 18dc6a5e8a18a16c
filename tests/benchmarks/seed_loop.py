"""The seed's work timed side by side: its PyTorch loop, PyTorch stacked by hand, and `sae_jax.sweep`.

    python tests/benchmarks/seed_loop.py [--rounds N] [--json PATH]

Just under three minutes on two idle cores. The work: eight tokens, 4 -> 6, full batch, 500 epochs, Adam
at 1e-2, l1 0.1, float32, for 1, 64 and 1,024 members that differ by seed. A timed call is whole: initial
weights, training, final loss; `sweep` also keeps its history and measures its metrics within it. The table
shows the time of a first call (compilation included) and, of the calls after it, milliseconds per member.
Exit status 1 if at 1,024 members `sweep` is not at least 200 times as fast per member as the loop.

All contenders run on the CPU, with each library's default threads. Every figure comes from fresh processes
that hold one contender at one size, in rounds A B C A B C, so that what else the machine does falls on all.
Run it on an idle machine: where other programs want the same cores, torch's threads wait for one another and
the stacked contender slows tens of times.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

D_IN, D_SAE, EPOCHS, LR, L1 = 4, 6, 500, 1e-2, 0.1
SIZES = (1, 64, 1024)
REPEATS = 3
"""Timed calls per process, after the first."""
LOOP_SAMPLE = 10
"""How many members the loop is timed on at most: it trains one after another, and 1,024 take minutes."""
GOAL = 200
GUARD_MEMBERS = 3
GUARD_TOLERANCE = 1e-3

Weights = list[dict[str, np.ndarray]]
"""One state dict of the seed's module per member."""
Train = Callable[..., np.ndarray]
"""`(seeds) -> losses [members]`, each that of the last epoch before its update; the torch ones also take
`weights` to start from."""


def seed_loop() -> Train:
    """The seed's way, as a post would write it: a module per member, a Python loop over epochs."""
    import torch
    from torch import nn

    from sae_jax.synthetic import seed_tokens

    class SparseAutoencoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(D_IN, D_SAE), nn.ReLU())
            self.decoder = nn.Sequential(nn.Linear(D_SAE, D_IN))

        def forward(self, x):
            f = self.encoder(x)
            return self.decoder(f), f

    x = torch.from_numpy(seed_tokens().x)

    def train_one(seed: int, weights: dict[str, np.ndarray] | None) -> float:
        torch.manual_seed(seed)
        model = SparseAutoencoder()
        if weights is not None:
            model.load_state_dict({name: torch.tensor(array) for name, array in weights.items()})
        optimizer = torch.optim.Adam(model.parameters(), lr=LR)
        for _ in range(EPOCHS):
            optimizer.zero_grad()
            x_hat, f = model(x)
            loss = nn.functional.mse_loss(x_hat, x) + L1 * f.abs().mean()
            loss.backward()
            optimizer.step()
        return loss.item()

    def train(seeds: range, weights: Weights | None = None) -> np.ndarray:
        return np.array([train_one(seed, weights[i] if weights else None) for i, seed in enumerate(seeds)])

    return train


def torch_stacked() -> Train:
    """What a careful PyTorch user can do by hand: every parameter [members, ...], one fused Adam."""
    import torch

    from sae_jax.synthetic import seed_tokens

    tokens = torch.from_numpy(seed_tokens().x)
    names = ("encoder.0.weight", "encoder.0.bias", "decoder.0.weight", "decoder.0.bias")

    def drawn(members: int, seed: int) -> list[torch.Tensor]:
        # as nn.Linear draws them: U(+-1/sqrt(fan_in)), weights and biases
        torch.manual_seed(seed)
        shapes = {(D_IN, D_SAE): D_IN, (1, D_SAE): D_IN, (D_SAE, D_IN): D_SAE, (1, D_IN): D_SAE}
        return [
            torch.empty(members, *shape).uniform_(-(fan_in**-0.5), fan_in**-0.5)
            for shape, fan_in in shapes.items()
        ]

    def given(weights: Weights) -> list[torch.Tensor]:
        # the module's weights are [out, in], those here [in, out]; a bias becomes [members, 1, out]
        stacked = [torch.tensor(np.stack([one[name] for one in weights])) for name in names]
        return [leaf[:, None] if leaf.ndim == 2 else leaf.mT.contiguous() for leaf in stacked]

    def train(seeds: range, weights: Weights | None = None) -> np.ndarray:
        start = given(weights) if weights else drawn(len(seeds), seeds[0])
        W_enc, b_enc, W_dec, b_dec = params = [leaf.requires_grad_() for leaf in start]
        x = tokens.expand(len(seeds), -1, -1)
        optimizer = torch.optim.Adam(params, lr=LR, fused=True)
        for _ in range(EPOCHS):
            optimizer.zero_grad()
            f = torch.baddbmm(b_enc, x, W_enc).relu()
            x_hat = torch.baddbmm(b_dec, f, W_dec)
            losses = (x_hat - x).square().mean(dim=(1, 2)) + L1 * f.abs().mean(dim=(1, 2))
            # summed, not averaged: each member gets the gradient that it would have alone
            losses.sum().backward()
            optimizer.step()
        return losses.detach().numpy()

    return train


def jax_sweep() -> Train:
    """The public call of this package, as a user writes it."""
    import sae_jax

    factory = partial(sae_jax.relu, d_in=D_IN, d_sae=D_SAE)
    source = sae_jax.in_memory(sae_jax.synthetic.seed_tokens().x)

    def train(seeds: range) -> np.ndarray:
        table = sae_jax.grid(l1=[L1], lr=[LR], seed=seeds)
        return sae_jax.sweep(factory, grid=table, source=source, steps=EPOCHS).table["loss"]

    return train


LOOP, STACKED, SWEEP = "seed's PyTorch loop", "PyTorch stacked by hand", "sae_jax.sweep"
CONTENDERS: dict[str, Callable[[], Train]] = {LOOP: seed_loop, STACKED: torch_stacked, SWEEP: jax_sweep}


def guard() -> dict:
    """Final losses of the same members by all three contenders, from equal initial weights."""
    import jax
    import torch

    import sae_jax
    from sae_jax.formats.seed_module import to_state_dict

    seeds = range(GUARD_MEMBERS)
    init = sae_jax.relu(d_in=D_IN, d_sae=D_SAE).init
    weights = [to_state_dict(init(jax.random.key(seed))) for seed in seeds]
    ours = jax_sweep()(seeds)
    theirs = {name: CONTENDERS[name]()(seeds, weights) for name in (LOOP, STACKED)}
    return {
        "losses": {name: losses.tolist() for name, losses in {**theirs, SWEEP: ours}.items()},
        "difference": max(float(np.abs(losses / ours - 1).max()) for losses in theirs.values()),
        "torch_threads": torch.get_num_threads(),
    }


def measure(contender: str, members: int) -> dict:
    """Time one contender at one size: the first call, then the repeats."""
    train = CONTENDERS[contender]()
    timed = min(members, LOOP_SAMPLE) if contender == LOOP else members
    # a member of the loop costs what any other does, so one warms it up
    first = _seconds(train, range(1 if contender == LOOP else timed))
    repeats = [_seconds(train, range(i * timed, (i + 1) * timed)) for i in range(1, REPEATS + 1)]
    return {
        "contender": contender,
        "members": members,
        "timed_members": timed,
        "warm_up_s": first,
        "ms_per_member": [1e3 * seconds / timed for seconds in repeats],
    }


def _seconds(train: Train, seeds: range) -> float:
    began = time.perf_counter()
    losses = train(seeds)
    seconds = time.perf_counter() - began
    if not (len(losses) == len(seeds) and np.isfinite(losses).all()):
        raise RuntimeError(f"{len(losses)} losses of {len(seeds)} members, or some not finite: not the work")
    return seconds


def in_fresh_process(contender: str, members: int = 1) -> dict:
    """What this script prints with the hidden `--contender`, in a process of its own."""
    command = [sys.executable, __file__, "--contender", contender, "--members", str(members)]
    # torch runs on the CPU here, so JAX must not find a GPU; nor a program that an earlier run compiled
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def summarise(runs: list[dict]) -> list[dict]:
    """One row per size and contender: medians and spread over all rounds."""
    rows, loop = [], {}
    for members in SIZES:
        for contender in CONTENDERS:
            mine = [run for run in runs if (run["members"], run["contender"]) == (members, contender)]
            samples = [sample for run in mine for sample in run["ms_per_member"]]
            median = statistics.median(samples)
            if contender == LOOP:
                loop[members] = median
            rows.append(
                {
                    "members": members,
                    "contender": contender,
                    "timed_members": mine[0]["timed_members"],
                    "warm_up_s": statistics.median(run["warm_up_s"] for run in mine),
                    "ms_per_member": median,
                    "least": min(samples),
                    "most": max(samples),
                    "times_the_loop": loop[members] / median,
                }
            )
    return rows


def as_table(rows: list[dict], rounds: int) -> Table:
    """The rows for the screen."""
    table = Table(
        title=f"{EPOCHS} epochs of {D_IN} -> {D_SAE} on eight tokens",
        caption=f"Medians of {rounds} rounds of {REPEATS} calls. Warm-up: the first call of a process, with "
        "compilation (the loop's: one member).\n"
        f"The loop's ms per member is measured on {LOOP_SAMPLE} members where there are more: it trains one "
        "after another.",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for header in ("members", "contender", "timed on", "warm-up s", "ms per member", "min - max", "vs loop"):
        table.add_column(header, justify="left" if header == "contender" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            f"{row['members']:,}",
            row["contender"],
            f"{row['timed_members']:,}",
            f"{row['warm_up_s']:.2f}",
            _three_digits(row["ms_per_member"]),
            f"{_three_digits(row['least'])} - {_three_digits(row['most'])}",
            f"{_three_digits(row['times_the_loop'])}x",
            end_section=row["contender"] == SWEEP,
        )
    return table


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def machine() -> dict:
    """What the figures were taken on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        "processor": model or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load_at_start": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: version(name) for name in ("sae_jax", "jax", "jaxlib", "optax", "torch", "numpy")},
    }


def main() -> int:
    """Run the guard and the rounds; print and write what came of them."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--rounds", type=int, default=3, help="at least 1 (default 3)")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--contender", choices=[*CONTENDERS, "guard"], help=argparse.SUPPRESS)
    parser.add_argument("--members", type=int, default=1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    if args.contender:
        print(json.dumps(guard() if args.contender == "guard" else measure(args.contender, args.members)))
        return 0

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)  # a bad path fails now, not minutes later
    about = machine()
    console.print(", ".join(f"{name} {value}" for name, value in about.items()), soft_wrap=True)
    if about["load_at_start"] > about["cores"] / 2:
        console.print("this machine is busy: the figures, torch's above all, are not to be relied on")
    agreed = in_fresh_process("guard")
    console.print(
        f"threads, each library's default: torch {agreed['torch_threads']}, XLA one per core that it may use",
        soft_wrap=True,
    )
    console.print(
        f"same work: from equal weights, the final losses of {GUARD_MEMBERS} members differ by at most "
        f"{agreed['difference']:.1e} (relative; {GUARD_TOLERANCE:.0e} allowed)",
        soft_wrap=True,
    )
    if not agreed["difference"] <= GUARD_TOLERANCE:
        console.print(f"the contenders do not do the same work: {agreed['losses']}")
        return 1

    order = [(name, size) for _ in range(args.rounds) for size in SIZES for name in CONTENDERS]
    progress = track(order, "timing", console=Console(stderr=True), transient=True)
    runs = [in_fresh_process(*run) for run in progress]
    rows = summarise(runs)
    console.print(as_table(rows, args.rounds))
    if args.json:
        everything = {"machine": about, "guard": agreed, "rows": rows, "runs": runs}
        args.json.write_text(json.dumps(everything, indent=2) + "\n")

    reached = rows[-1]["times_the_loop"]
    met = reached >= GOAL
    console.print(
        f"{'met' if met else 'MISSED'}: at least {GOAL}x the loop per member at 1,024 members: {reached:.0f}x"
    )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
