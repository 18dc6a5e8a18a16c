"""The folder of a run: claimed before training, filled all at once, never half-written."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from sae_jax import checkpoint, distributed
from sae_jax.base import InputError, require
from sae_jax.cli.lock import LOCK, locked
from sae_jax.metrics import stability_file as stability

FINISHED = "sweep.json"
"""Put in place last: a folder that has it has everything."""
CHECKPOINTS, KEPT, STAGE = "checkpoints", "checkpoints-kept", ".writing"
METRICS = "metrics.jsonl"
"""Grows beside the checkpoints while the run trains."""
OURS = (
    "metrics.csv",
    METRICS,
    "history.npz",
    stability.NAME,
    "members",
    "frontier.png",
    "report.html",
    KEPT,
    FINISHED,
)


class Run:
    """A claimed folder."""

    def __init__(self, out: Path, finished: bool):
        self.out, self.finished = out, finished
        self.checkpoints = out / CHECKPOINTS

    def about(self) -> dict[str, Any]:
        """What a finished run tells of itself."""
        return json.loads((self.out / FINISHED).read_text())

    def publish(self, write: Callable[[Path], None], keep_checkpoints: bool = False) -> None:
        """Have `write` fill a folder beside, then move what it wrote into place and drop the checkpoints.

        Of several processes the first does all of this.

        Args:
          write: fills the folder that it is given.
          keep_checkpoints: as `checkpoints-kept`.
        """
        if not distributed.first():
            return
        stage = self.out / STAGE
        _remove(stage)
        write(stage)
        if (self.checkpoints / METRICS).exists():
            shutil.copyfile(self.checkpoints / METRICS, stage / METRICS)
        _remove(self.out / FINISHED)
        for name in OURS:
            _remove(self.out / name)
            if (stage / name).exists():
                (stage / name).replace(self.out / name)
        _remove(stage)
        # in one move: half of the checkpoints would look like a run to go on with
        if self.checkpoints.exists():
            self.checkpoints.replace(self.out / KEPT if keep_checkpoints else stage)
        _remove(stage)


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
      out: the folder, locked until the run ends. Of several processes the first takes it for all.
      request: what decides the run's numbers; a finished run is resumed only by an equal one.
      overwrite: replace the run that is there. Files that are not a run's stay.
      resume: go on with the run that is there.

    Raises:
      InputError: something is in the way, another process writes there, or the run there was asked for
        otherwise.
    """
    require(not (overwrite and resume), "--overwrite and --resume exclude each other")
    with ExitStack() as held:
        run, problem = None, None
        if distributed.first():
            try:
                run = held.enter_context(_taken(out, request, overwrite, resume))
            except InputError as error:
                problem = str(error)
        distributed.all_well(problem)
        yield Run(out, distributed.leader(run is not None and run.finished))


@contextmanager
def _taken(out: Path, request: dict[str, Any], overwrite: bool, resume: bool) -> Iterator[Run]:
    require(out.is_dir() or not out.exists(), f"{out} is a file, not a folder")
    new = [path for path in (out, *out.parents) if not path.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with locked(out):
            run = _found(out, request, overwrite, resume)
            try:
                yield run
            finally:
                _tidied(run)
    finally:
        for path in new:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def _found(out: Path, request: dict[str, Any], overwrite: bool, resume: bool) -> Run:
    """The run that is there or begins, its folder of checkpoints made."""
    checkpoints = out / CHECKPOINTS
    # a run that was stopped while it replaced a finished one is not finished
    run = Run(out, finished=resume and (out / FINISHED).exists() and not checkpoints.exists())
    if run.finished:
        checkpoint.require_same(run.about().get("request", {}), request, out)
        return run
    if resume:
        require(checkpoints.is_dir(), f"{out} holds no run to resume")
    else:
        occupied = any(path.name != LOCK for path in out.iterdir())
        require(
            overwrite or not occupied,
            f"{out} exists and is not empty: --overwrite replaces the run in it, --resume goes on with it",
        )
        _remove(checkpoints)
    checkpoints.mkdir(exist_ok=resume)
    return run


def _tidied(run: Run) -> None:
    """Nothing half-written stays, and no folder for checkpoints that holds none."""
    _remove(run.out / STAGE)
    # checkpoints are folders named after their step, in folders of chunks, of groups, of rounds
    if not any(path.name.isdecimal() and path.is_dir() for path in run.checkpoints.rglob("*")):
        _remove(run.checkpoints)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
