"""What a person waits for at the start: an import, and the first progress of a sweep.

    python tests/benchmarks/start.py [--rounds N] [--json PATH]

About a minute on two idle cores. `sae-jax sweep` without arguments trains 256 members on eight tokens. Its
first progress is the first line that tells a share of the steps; "nothing kept" is a user's first command,
"programs kept" any after it, by what `cli/compilation_cache.py` keeps. Every figure is of fresh processes, in
rounds A B C A B C, so that what else the machine does falls on all; the first round is not counted, because
it brings the files into memory. The table shows medians and ranges. Exit status 1 if a median passes its
goal.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

GOALS = {"import sae_jax": 1.2, "first progress, programs kept": 2.5}
"""Seconds."""
SHARE = re.compile(r"\d+%  ")


def importing(module: str) -> dict[str, float]:
    """Seconds from the start of Python to the end of an import."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    return {f"import {module}": time.perf_counter() - began}


def sweeping(caches: Path, kept: str) -> dict[str, float]:
    """Seconds from a command to the first share of its steps, and to its end."""
    with tempfile.TemporaryDirectory() as folder:
        began, first = time.perf_counter(), None
        words, env = [sys.executable, "-m", "sae_jax", "sweep"], {**os.environ, "XDG_CACHE_HOME": str(caches)}
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(words, cwd=folder, env=env, **silent)
        for line in process.stderr:
            if first is None and SHARE.match(line):
                first = time.perf_counter() - began
        assert process.wait() == 0
        assert first is not None
        return {f"first progress, {kept}": first, f"finished, {kept}": time.perf_counter() - began}


def once(caches: Path) -> dict[str, float]:
    """One round of all."""
    with tempfile.TemporaryDirectory() as empty:
        cold = sweeping(Path(empty), "nothing kept")
    return {**importing("jax"), **importing("sae_jax"), **cold, **sweeping(caches, "programs kept")}


def measured(rounds: int, follow: Callable) -> dict[str, list[float]]:
    """Seconds by what was waited for, one per round."""
    with tempfile.TemporaryDirectory() as caches:
        once(Path(caches))
        found = [once(Path(caches)) for _ in follow(range(rounds))]
    return {name: [each[name] for each in found] for name in found[0]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console = Console(stderr=True)
    found = measured(options.rounds, lambda rounds: track(rounds, "rounds", console=console))
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    table = Table("waiting for", "s", "from", "to", "goal", box=box.SIMPLE)
    for name, seconds in found.items():
        goal = GOALS.get(name)
        figures = [f"{figure:.2f}" for figure in (medians[name], min(seconds), max(seconds))]
        table.add_row(name, *figures, "" if goal is None else f"{goal:.1f}")
    Console().print(table)
    if options.json:
        machine = {"cores": os.cpu_count(), "system": platform.platform(), "load": os.getloadavg()}
        versions = {name: version(name) for name in ("sae-jax", "jax", "jaxlib")}
        told = {"machine": machine, "python": platform.python_version(), **versions, "seconds": found}
        options.json.write_text(json.dumps(told, indent=2))
    return int(any(medians[name] > goal for name, goal in GOALS.items()))


if __name__ == "__main__":
    sys.exit(main())
