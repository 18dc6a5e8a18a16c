"""A Sphinx extension that runs what the site shows: every block of every page, and every example.

See `blocks` for what runs of a page. Beside them run the scripts of `_ext/makers`, which make pictures and
tables for the pages. What fails is a warning with its page and line, so that `sphinx-build -W` fails. Each
has a folder of its own; the pictures, and the fragments of pages (`*.inc`), that it leaves there are copied
to `generated/NAME/`, from where pages show them. The notebooks of the examples are copied to `generated/`,
where MyST-NB runs them.

Configuration:
  executed_examples: the arguments of each example by its file's name; an example without a row is a warning.
  executed_only: names of pages, examples and makers with commas between; "" for all, "none" for none.
"""

import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from blocks import blocks, commands, runs
from sphinx.application import Sphinx
from sphinx.util import logging

HERE = Path(__file__).parent
LONGEST = 900  # seconds of a page or an example
ALONE = ("benchmark_table",)
"""What measures time waits until all else has run, and has threads and compilation as they are by default."""
MOST = 8  # side by side: each takes about a gigabyte
SHOWN = ("*.png", "*.inc")
say = logging.getLogger(__name__)


class Job(NamedTuple):
    """A page, an example or a maker."""

    name: str
    path: Path
    words: tuple[str, ...]
    """Its command. A page leaves in `found.json` what came of it."""


def pages(app: Sphinx) -> list[Path]:
    """The pages of the site and the README beside it."""
    readme = app.srcdir.parent / "README.md"
    return [*([readme] if readme.exists() else []), *sorted(app.srcdir.glob("*.md"))]


def jobs(app: Sphinx) -> list[Job]:
    """What is to be run: examples first, since the longest is one of them."""
    arguments = app.config.executed_examples
    scripts = {path: arguments[path.name] for path in examples(app) if path.name in arguments}
    scripts |= dict.fromkeys(sorted((app.srcdir / "_ext" / "makers").glob("*.py")), "")
    found = [
        Job(path.stem, path, (sys.executable, str(path), *shlex.split(rest)))
        for path, rest in scripts.items()
    ]
    for path in pages(app):
        here = blocks(path.read_text(encoding="utf-8"))
        if any(block.language == "python" or any(map(runs, commands(block))) for block in here):
            found.append(
                Job(path.stem, path, (sys.executable, str(HERE / "page.py"), str(path), "found.json"))
            )
    only = app.config.executed_only.split(",")
    return [job for job in found if job.name in only or only == [""]]


def examples(app: Sphinx) -> list[Path]:
    """The examples of the package."""
    return sorted((app.srcdir.parent / "examples").glob("[0-9]*.py"))


def require_rows(app: Sphinx) -> None:
    """Warn of examples that nothing would run, and of commands on pages that name none."""
    there = {path.name for path in examples(app)}
    for name in there ^ set(app.config.executed_examples):
        say.warning("examples/%s and executed_examples of conf.py: only one of them knows it", name)
    for path in pages(app):
        for block in blocks(path.read_text(encoding="utf-8")):
            for command in commands(block):
                named = command.text.removeprefix("python examples/").split()[0]
                if command.text.startswith("python examples/") and named not in there:
                    say.warning("there is no examples/%s", named, location=f"{path}:{command.line}")


def environment(app: Sphinx) -> dict[str, str]:
    """Of what is run: this interpreter's programs first, what is compiled kept with the build, no network."""
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "MPLBACKEND": "Agg",
        "OMP_NUM_THREADS": "1",  # torch's threads wait for one another where other work wants the same cores
        "HF_HUB_OFFLINE": "1",
        "JAX_COMPILATION_CACHE_DIR": str(Path(app.doctreedir) / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def run(job: Job, folder: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Run one: how long it took, what it printed, and what failed of it, as a line and words."""
    began = time.perf_counter()
    try:
        done = subprocess.run(
            job.words, cwd=folder, env=environment, capture_output=True, text=True, timeout=LONGEST
        )
        printed, said, status = done.stdout.strip(), done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired:
        printed, said, status = "", f"not done after {LONGEST} seconds", 1
    found = {"printed": printed, "failed": (1, said.strip()[-2000:]) if status else None}
    if status == 0 and (folder / "found.json").exists():
        found |= json.loads((folder / "found.json").read_text(encoding="utf-8"))
    return found | {"seconds": time.perf_counter() - began}


def execute(app: Sphinx) -> None:
    """Run all of it, as many side by side as there are processors, and warn of what fails."""
    began = time.perf_counter()
    require_rows(app)
    wanted = jobs(app)
    with TemporaryDirectory() as scratch:
        folders = {job: Path(scratch) / job.name for job in wanted}
        if not lay_out(folders, Path(scratch) / "brought"):
            return
        with ThreadPoolExecutor(min(os.cpu_count() or 1, MOST)) as pool:
            together = [job for job in wanted if job.name not in ALONE]
            done = pool.map(lambda job: run(job, folders[job], environment(app)), together)
            for job, found in zip(together, done, strict=True):
                tell(job, found)
        for job in wanted:
            if job.name in ALONE:
                tell(job, run(job, folders[job], dict(os.environ)))
            keep(folders[job], app.srcdir / "generated" / job.name)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = time.perf_counter() - began
    say.info("ran it all in %.0f s, %.0f s of processors", spent, used.ru_utime + used.ru_stime)


def lay_out(folders: dict[Job, Path], inputs: Path) -> bool:
    """Make the folders in which all of it runs, pages' with what a reader brings; False if that failed."""
    if any(job.path.suffix == ".md" for job in folders):
        made = subprocess.run([sys.executable, HERE / "brought.py", inputs], capture_output=True, text=True)
        if made.returncode:
            say.warning("what the pages are run with could not be made: %s", made.stderr[-2000:])
            return False
    for job, folder in folders.items():
        shutil.copytree(inputs, folder) if job.path.suffix == ".md" else folder.mkdir()
    return True


def tell(job: Job, found: dict[str, Any]) -> None:
    """One line of what ran, and a warning if it failed."""
    blocks_ran = f", {found['blocks']} blocks" if "blocks" in found else ""
    say.info("ran %s: %.0f s%s", job.name, found["seconds"], blocks_ran)
    if found["failed"]:
        line, told = found["failed"]
        say.warning("does not run: %s", told, location=f"{job.path}:{line}")
    elif job.path.parent.name == "makers" and found["printed"]:
        say.info("%s", found["printed"])


def keep(folder: Path, place: Path) -> None:
    """Copy what a page or an example has to show."""
    shown = [path for pattern in SHOWN for path in folder.glob(pattern)]
    for path in shown:
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place / path.name)


def notebooks(app: Sphinx) -> None:
    """Copy the notebooks of the examples to where the site finds them."""
    generated = app.srcdir / "generated"
    generated.mkdir(exist_ok=True)
    for path in (app.srcdir.parent / "examples").glob("*.ipynb"):
        shutil.copy(path, generated / path.name)


def setup(app: Sphinx) -> dict[str, Any]:
    """Run before anything is read, so that pages find what was made for them."""
    app.add_config_value("executed_examples", {}, "", dict)
    app.add_config_value("executed_only", "", "", str)
    app.connect("builder-inited", execute)
    app.connect("builder-inited", notebooks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
