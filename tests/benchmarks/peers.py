"""This package and others side by side: the same work, on the same rows, in turn.

    python tests/benchmarks/peers.py [--works seed,small,mid,big,topk,topk16k,batch_topk16k,members,gpu]
                                     [--rounds N] [--json PATH] [--docs [PAGE]]

Every figure comes from fresh processes that hold one contender at one work, in rounds A B C A B C, so that
what else the machine does falls on all. The first call of a process, compilation with it, is told apart from
those after it; imports are in neither. A call is a whole training from rows in memory. Where a library builds
its models within the call (`trainSAE`, `sae_jax.sweep`) that is in it, and so are `sweep`'s history and final
metrics; "steps alone" leaves these out. All run with their default threads, nothing is logged or saved.

Before anything is timed, what is written by hand in PyTorch and `sweep` must come to the same losses from
equal weights on equal batches. Every call must lower its losses, over all steps, with the work's number of
parameters. Exit status 1 if one did not, or did not run; a goal that is missed is only told: machines differ.
Run it on an idle machine: where other programs want the same cores, torch's threads wait for one another.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from summary import Peaks, placed, summarise, told, verdicts
from timing import answer, environment
from works import BY_HAND, PACKAGES, SWEEP, WORKS, Work

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"
GUARD_TOLERANCE = 1e-3
DISTRIBUTIONS = ("sae-jax", "jax", "torch", "dictionary-learning", "sae-lens", "eai-sparsify", "numpy")


class NotRun(Exception):  # noqa: N818, it is told and the run goes on
    """A process did not do what it was started for."""


def ask(asked: str, gpu: bool = False, **task: Any) -> Any:
    """What `timing.answer` says in a fresh process.

    Raises:
      NotRun: it ended otherwise; the last line of what it said.
    """
    command = [sys.executable, __file__, "--task", json.dumps({"asked": asked, **task})]
    done = subprocess.run(command, env=environment(gpu), capture_output=True, text=True)
    if done.returncode:
        raise NotRun((done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


def machine() -> dict[str, Any]:
    """What the figures are taken on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        "date": str(datetime.datetime.now(datetime.UTC).date()),
        "processor": model or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load_at_start": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: found for name in DISTRIBUTIONS if (found := _version(name))},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def runnable(works: Sequence[Work]) -> list[tuple[Work, str]]:
    """Works and contenders for which there is the library, and the device."""
    gpu = any(work.gpu for work in works) and ask("gpu", gpu=True)
    return [
        (work, contender)
        for work in works
        for contender in work.contenders
        if find_spec(PACKAGES[contender]) and (gpu or not work.gpu)
    ]


def rows_of(work: Work, folder: Path) -> str:
    """The file that holds the work's batches, written when it is first asked for."""
    name = f"{work.rows}-{work.batches}-{work.batch}-{work.d_in}.npy"
    if not (folder / name).exists():
        ask("rows", gpu=work.gpu, work=work._asdict(), data=str(folder / name))
    return str(folder / name)


def guarded(works: Iterable[Work], folder: Path) -> dict[str, float]:
    """How far final losses lie apart from equal weights, at most and relative, by work."""
    apart = {}
    for work in works:
        losses = ask("agreement", work=work._asdict(), data=rows_of(work, folder))
        ours = losses.pop(SWEEP)
        pairs = [pair for each in losses.values() for pair in zip(each, ours, strict=True)]
        apart[str(work)] = max(abs(theirs / our - 1) for theirs, our in pairs)
    return apart


def timed(
    pairs: Sequence[tuple[Work, str]], rounds: int, folder: Path
) -> tuple[list[list[dict[str, Any]]], list[str]]:
    """The timings of each round, and what did not run: it is not tried again."""
    found: list[list[dict[str, Any]]] = [[] for _ in range(rounds)]
    faults: dict[tuple[Work, str], str] = {}
    order = [(number, pair) for number in range(rounds) for pair in pairs]
    for number, pair in track(order, "timing", console=Console(stderr=True), transient=True):
        work, contender = pair
        if pair not in faults:
            task = {"contender": contender, "work": work._asdict(), "data": rows_of(work, folder)}
            try:
                found[number].append(ask("measure", gpu=work.gpu, **task))
            except NotRun as reason:
                faults[pair] = f"{contender} at {work}: {reason}"
    return found, list(faults.values())


def peaks_of(rounds: Sequence[Sequence[dict[str, Any]]]) -> Peaks:
    """The best matrix products of the run, by arithmetic."""
    peaks: Peaks = {}
    for timing in (each for timings in rounds for each in timings):
        work = Work.of(timing["work"])
        known = peaks.setdefault(work.arithmetic, {})
        if "PyTorch" not in known and find_spec("torch"):
            known["PyTorch"] = ask("torch_peak", gpu=work.gpu, work=work._asdict())
        if timing["peak"]:
            known["XLA"] = max(known.get("XLA", 0.0), timing["peak"])
    return peaks


def main() -> int:
    """Guard, time, and tell."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--works", default=",".join(WORKS), help="names with commas between (default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="at least 1 (default 3)")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--docs", type=Path, nargs="?", const=PAGE, help="write the table into this page")
    parser.add_argument("--task", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        print(json.dumps(answer(args.task)))
        return 0
    names = args.works.split(",")
    unknown = [name for name in names if name not in WORKS]
    if unknown:
        parser.error(f"there is no work {unknown[0]!r}; there are: {', '.join(WORKS)}")
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    # what cannot be written is said now, not an hour later
    if args.docs:
        placed(args.docs.read_text(), "")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
    return run([work for name in names for work in WORKS[name]], args.rounds, args.json, args.docs)


def run(works: Sequence[Work], rounds: int, to: Path | None, page: Path | None) -> int:
    """Time these works and write what came of it; the exit status."""
    on = machine()
    if on["load_at_start"] > on["cores"] / 2:
        print("this machine is busy: the figures, torch's above all, are not to be relied on")
    pairs = runnable(works)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        comparable = [
            work for work in works if {*BY_HAND, SWEEP} <= {name for one, name in pairs if one == work}
        ]
        apart = guarded((work for work in comparable if not work.gpu), folder)
        for work, difference in apart.items():
            print(f"{work}: from equal weights, final losses differ by at most {difference:.1e} (relative)")
        if not all(difference <= GUARD_TOLERANCE for difference in apart.values()):
            print(f"the contenders do not do the same work: {GUARD_TOLERANCE:.0e} is allowed")
            return 1
        found, faults = timed(pairs, rounds, folder)
    peaks = peaks_of(found)
    rows = summarise(found, peaks)
    missing = [
        (work, name)
        for work in works
        for name in work.contenders
        if (work, name) not in {(row.work, row.contender) for row in rows}
    ]
    text = told(on, peaks, rounds, rows, missing)
    print(text)
    for fault in faults:
        print(f"did not run: {fault}")
    if to:
        held = [{"goal": str(each), "reached": each.reached, "met": each.met} for each in verdicts(rows)]
        everything = {"machine": on, "peaks": peaks, "guard": apart, "goals": held, "markdown": text}
        everything["rows"] = [{**row._asdict(), "work": row.work._asdict()} for row in rows]
        to.write_text(json.dumps({**everything, "rounds": found, "faults": faults}, indent=2) + "\n")
    if page:
        page.write_text(placed(page.read_text(), text))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
