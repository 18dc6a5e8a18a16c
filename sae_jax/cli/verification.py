"""`sae-jax verify`."""

import json
from dataclasses import dataclass
from typing import Annotated

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from sae_jax.verify import BOUNDS, Report, verify

STAGES = ("forward", "loss", "gradients", "trained")
CAPTION = "largest max |a - b| / max |b| over tensors; bounds " + "; ".join(
    f"{dtype}: {', '.join(f'{bounds[stage]:.0e}' for stage in STAGES)}" for dtype, bounds in BOUNDS.items()
)


@dataclass
class Verify:
    """How long to train before comparing weights."""

    steps: int = 500
    """Adam steps."""
    as_json: Annotated[
        bool, tyro.conf.arg(name="json", help="print JSON, with the error of every tensor")
    ] = False


def run(options: Verify) -> int:
    """Compare every case, print the largest relative errors, exit 1 if one passes its bound."""
    reports: list[tuple[str, Report]] = []
    with Console(stderr=True).status("comparing with PyTorch") as status:
        for name, report in verify(options.steps):
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
    headers = ("case", "dtype", "forward", "loss", "gradients", f"after {options.steps} steps", "")
    table = Table(*headers, caption=CAPTION, box=box.SIMPLE, padding=(0, 1, 0, 0))
    for name, report in reports:
        cells = [_cell(report, stage) for stage in STAGES]
        table.add_row(name, report.dtype, *cells, "[green]ok[/]" if report.ok else "[bold red]breach[/]")
    Console().print(table)
    return 0 if ok else 1


def _cell(report: Report, stage: str) -> str:
    error, bound = report.worst[stage], report.bounds[stage]
    return f"{error:.1e}" if error <= bound else f"[bold red]{error:.1e}[/]"
