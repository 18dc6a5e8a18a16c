"""`sae-jax verify`."""

import json
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from sae_jax.base import require
from sae_jax.verify import AGAINST, Report, verify

STAGES = ("forward", "loss", "gradients", "trained", "float32 there")
EXPLAINED = {"float32 there": "what the library keeps in float32 though the rest is float64"}


@dataclass
class Verify:
    """Against what, and how long to train before comparing weights."""

    all: bool = False
    """Every architecture, not only relu."""
    against: Literal["sae_lens", "dictionary_learning"] | None = None
    """Hold the recipes against the trainers of an installed library, not the models against our modules."""
    steps: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="")] = None
    """Training steps. Default: 500, against a library 100."""
    as_json: Annotated[
        bool, tyro.conf.arg(name="json", help="print JSON, with the error of every tensor")
    ] = False


def run(options: Verify) -> int:
    """Compare every case, print the largest relative errors, exit 1 if one passes its bound."""
    require(
        not (options.all and options.against), "--all is of our PyTorch modules: leave it out with --against"
    )
    steps = options.steps or (100 if options.against else 500)
    require(options.steps is None or options.steps >= 1, f"--steps must be at least 1, got {options.steps}")
    pairs = AGAINST[options.against](steps) if options.against else verify(steps, all_cases=options.all)
    reports: list[tuple[str, Report]] = []
    with Console(stderr=True).status("comparing with PyTorch") as status:
        for name, report in pairs:
            reports.append((name, report))
            status.update(f"{name}, {report.dtype}")
    ok = all(report.ok for _, report in reports)
    if options.as_json:
        rows = [
            {"case": name, **report._asdict(), "worst": report.worst, "ok": report.ok}
            for name, report in reports
        ]
        print(json.dumps({"ok": ok, "reports": rows}, indent=2))
        return 0 if ok else 1
    stages = [stage for stage in STAGES if any(stage in report.worst for _, report in reports)]
    headers = [f"after {steps} steps" if stage == "trained" else stage for stage in stages]
    table = Table(
        "case", "dtype", *headers, "", caption=_caption(reports, stages), box=box.SIMPLE, padding=(0, 1, 0, 0)
    )
    for name, report in reports:
        cells = [_cell(report, stage) for stage in stages]
        table.add_row(name, report.dtype, *cells, "[green]ok[/]" if report.ok else "[bold red]breach[/]")
    Console().print(table)
    return 0 if ok else 1


def _caption(reports: list[tuple[str, Report]], stages: list[str]) -> str:
    """What the figures are, and what they may be at most."""
    loosest: dict[str, dict[str, float]] = {}
    for _, report in reports:
        for stage in report.worst:
            of_dtype = loosest.setdefault(report.dtype, {})
            of_dtype[stage] = max(of_dtype.get(stage, 0), report.bounds[stage])
    bounds = "; ".join(
        f"{dtype}: " + ", ".join(f"{stage} {found[stage]:.0e}" for stage in stages if stage in found)
        for dtype, found in loosest.items()
    )
    notes = "".join(f"; {stage}: {told}" for stage, told in EXPLAINED.items() if stage in stages)
    return f"largest max |a - b| / max |b| over tensors; bounds {bounds}{notes}"


def _cell(report: Report, stage: str) -> str:
    if stage not in report.worst:
        return ""
    error, bound = report.worst[stage], report.bounds[stage]
    return f"{error:.1e}" if error <= bound else f"[bold red]{error:.1e}[/]"
