"""The folder of a run: claimed before training, filled all at once, never half-written."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sae_jax import checkpoint
from sae_jax.base import require

FINISHED = "sweep.json"
"""Put in place last: a folder that has it has everything."""
OURS = ("metrics.csv", "history.npz", "members", "frontier.png", "report.html", FINISHED)
CHECKPOINTS, STAGE = "checkpoints", ".writing"


class Run:
    """A claimed folder."""

    def __init__(self, out: Path, finished: bool):
        self.out, self.finished = out, finished
        self.checkpoints = out / CHECKPOINTS

    def about(self) -> dict[str, Any]:
        """What a finished run tells of itself."""
        return json.loads((self.out / FINISHED).read_text())

    def publish(self, write: Callable[[Path], None]) -> None:
        """Have `write` fill a folder beside, then move what it wrote into place and drop the checkpoints."""
        stage = self.out / STAGE
        _remove(stage)
        write(stage)
        _remove(self.out / FINISHED)
        for name in OURS:
            _remove(self.out / name)
            if (stage / name).exists():
                (stage / name).replace(self.out / name)
        _remove(stage)
        _remove(self.checkpoints)


def choose(out: Path | None, name: str, resume: bool) -> Path:
    """The folder asked for, or the first free `runs/NAME-N`."""
    require(out is not None or not resume, "--resume needs --out: say which run to go on with")
    if out is not None:
        return out
    number = 1
    while (Path("runs") / f"{name}-{number}").exists():
        number += 1
    return Path("runs") / f"{name}-{number}"


@contextmanager
def claim(out: Path, request: dict[str, Any], *, overwrite: bool, resume: bool) -> Iterator[Run]:
    """Take a folder for a run. If it fails, what stays is what was there before, and whole checkpoints.

    Args:
      out: the folder.
      request: what decides the run's numbers; a finished run is resumed only by an equal one.
      overwrite: replace the run that is there. Files that are not a run's stay.
      resume: go on with the run that is there.

    Raises:
      InputError: something is in the way, or the run there was asked for otherwise.
    """
    require(not (overwrite and resume), "--overwrite and --resume exclude each other")
    require(out.is_dir() or not out.exists(), f"{out} is a file, not a folder")
    checkpoints = out / CHECKPOINTS
    # a run that was stopped while it replaced a finished one is not finished
    run = Run(out, finished=resume and (out / FINISHED).exists() and not checkpoints.exists())
    if run.finished:
        checkpoint.require_same(run.about().get("request", {}), request, out)
    elif resume:
        require(checkpoints.is_dir(), f"{out} holds no run to resume")
    else:
        occupied = out.exists() and any(out.iterdir())
        require(
            overwrite or not occupied,
            f"{out} exists and is not empty: --overwrite replaces the run in it, --resume goes on with it",
        )
        _remove(checkpoints)
    new = [path for path in (out, *out.parents) if not path.exists()]
    try:
        if not run.finished:
            checkpoints.mkdir(parents=True, exist_ok=resume)
        yield run
    finally:
        _remove(out / STAGE)
        # a sweep's chunks hold its checkpoints, and the groups of several sweeps their chunks
        steps = [*checkpoints.glob("*/*"), *checkpoints.glob("*/*/*")]
        if checkpoints.is_dir() and not any(path.name.isdecimal() for path in steps):
            _remove(checkpoints)
        for path in new:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
