"""`sae-jax verify`."""

import json
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sae_jax.base import require
from sae_jax.data import read_array
from sae_jax.formats.files import write_json
from sae_jax.trained import load
from sae_jax.verify import AGAINST, Report, ports, verify

STAGES = ("forward", "loss", "gradients", "trained", "float32 there")
EXPLAINED = {"float32 there": "what the library keeps in float32 though the rest is float64"}


OF_A_PORT = ("torch", "map", "data", "target", "out", "lr", "batch_size", "l1")
"""Options that ask for `--sae`."""
STEPS, STEPS_AGAINST, STEPS_OF_A_PORT = 500, 100, 100


@dataclass
class Verify:
    """Against what, and how long to train before comparing weights."""

    all: bool = False
    """Every architecture, not only relu."""
    against: Literal["sae_lens", "dictionary_learning"] | None = None
    """Hold the recipes against the trainers of an installed library, not the models against our modules."""
    sae: Annotated[str | None, tyro.conf.arg(metavar="SAE", help_behavior_hint="")] = None
    """Hold this SAE, a file or folder in any known format or a Hugging Face repository, against a class."""
    torch: Annotated[str | None, tyro.conf.arg(metavar="MODULE:CLASS", help_behavior_hint="")] = None
    """The class: MODULE is importable from here, or the path of a .py file."""
    map: Annotated[Path | None, tyro.conf.arg(metavar="MAP.json", help_behavior_hint="")] = None
    """Our parameter names to the class's, {"W_enc": "encoder.weight.T", ...}, .T of what is transposed there;
    or {"parameters": {...}, "arguments": {...}} where its constructor takes arguments."""
    data: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """Rows to compare on, .npy, .npz or .safetensors. Default: random ones."""
    target: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """Of a transcoder: the rows that it is to give."""
    steps: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="")] = None
    """Training steps. Default: 500, against a library and of a class 100."""
    lr: Annotated[float | None, tyro.conf.arg(metavar="RATE", help_behavior_hint="")] = None
    """Adam's learning rate for --sae. Default: 0.001."""
    batch_size: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="")] = None
    """Rows of a step for --sae. Default: 64."""
    l1: Annotated[float | None, tyro.conf.arg(metavar="WEIGHT", help_behavior_hint="")] = None
    """Weight of the L1 penalty where the class has no loss of its own. Default: 0."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")] = None
    """Write report.json and report.html there, with the error of every tensor at every step."""
    as_json: Annotated[
        bool, tyro.conf.arg(name="json", help="print JSON, with the error of every tensor")
    ] = False


def run(options: Verify) -> int:
    """Compare every case, print the largest relative errors, exit 1 if one passes its bound."""
    require(options.steps is None or options.steps >= 1, f"--steps must be at least 1, got {options.steps}")
    if options.sae is not None:
        return _run_port(options)
    for name in OF_A_PORT:
        require(getattr(options, name) is None, f"--{name.replace('_', '-')} is for --sae SAE")
    require(
        not (options.all and options.against), "--all is of our PyTorch modules: leave it out with --against"
    )
    steps = options.steps or (STEPS_AGAINST if options.against else STEPS)
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
    else:
        _print_table(reports, steps)
    return 0 if ok else 1


def _run_port(options: Verify) -> int:
    """A user's SAE and class: the table, where to look, and the report."""
    require(
        not options.all and options.against is None,
        "--sae is held against the class of --torch: leave out --all and --against",
    )
    require(
        options.torch is not None and options.map is not None,
        "--sae needs --torch MODULE:CLASS and --map MAP.json",
    )
    require(
        options.target is None or options.data is not None, "--target has the targets of --data: give both"
    )
    require(
        options.out is None or options.out.is_dir() or not options.out.exists(),
        f"{options.out} is a file, not a folder",
    )
    label, map_file = str(options.torch), Path(str(options.map))
    sae, params = load(str(options.sae))
    names, arguments = ports.read_map(map_file)
    steps = STEPS_OF_A_PORT if options.steps is None else options.steps
    size = 64 if options.batch_size is None else options.batch_size
    if options.data is None:
        x, y = ports.random_rows(sae, ports.DISTINCT_BATCHES * max(size, 1))
    else:
        x = read_array(options.data)
        y = None if options.target is None else read_array(options.target)
    # what a user's code prints is none of our report
    with Console(stderr=True).status(f"comparing with {label}"), redirect_stdout(sys.stderr):
        comparison = ports.compare_port(
            sae, params, ports.Port(label, ports.find(label), names, arguments), x, y, steps=steps,
            learning_rate=1e-3 if options.lr is None else options.lr, batch_size=size, l1=options.l1 or 0.0,
        )  # fmt: skip
    report: dict[str, Any] = {
        "sae": str(options.sae),
        "data": "random rows, standard normal, seed 0" if options.data is None else str(options.data),
        "batch_size": min(size, len(x)),
        "map": str(map_file),
        **ports.told(comparison),
    }
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        _put(options.out, report)
    if options.as_json:
        print(json.dumps(report, indent=2, allow_nan=False))
    else:
        _print_table([(label.rpartition(":")[2], each) for each in comparison.reports], steps)
        for line in [*comparison.findings, f"loss: {comparison.loss}; {comparison.optimizer}"]:
            Console().print(line, highlight=False, markup=False, soft_wrap=True)
        if options.out is not None:
            print(options.out / "report.html")
    return 0 if comparison.ok else 1


def _put(out: Path, report: dict[str, Any]) -> None:
    """Both files written beside their places first, so that a full disk leaves what was there."""
    from sae_jax.report import port_page  # a second of matplotlib, which only a report that is written needs

    stages = {out / name: out / f".{name}.writing" for name in ("report.json", "report.html")}
    try:
        write_json(report, stages[out / "report.json"])
        stages[out / "report.html"].write_text(port_page(report), encoding="utf-8")
        for place, stage in stages.items():
            stage.replace(place)
    finally:
        for stage in stages.values():
            stage.unlink(missing_ok=True)


def _print_table(reports: list[tuple[str, Report]], steps: int) -> None:
    stages = [stage for stage in STAGES if any(stage in report.worst for _, report in reports)]
    headers = [f"after {steps} steps" if stage == "trained" else stage for stage in stages]
    followed = any(report.trajectory for _, report in reports)
    headers += ["parted"] if followed else []
    table = Table(
        "case", "dtype", *headers, "", caption=_caption(reports, stages), box=box.SIMPLE, padding=(0, 1, 0, 0)
    )
    for name, report in reports:
        cells = [_cell(report, stage) for stage in stages]
        if followed:
            cells.append("never" if report.parted is None else f"[bold red]step {report.parted[0]}[/]")
        table.add_row(
            escape(name), report.dtype, *cells, "[green]ok[/]" if report.ok else "[bold red]breach[/]"
        )
    Console().print(table)


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
