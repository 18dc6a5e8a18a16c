"""The folder of a run: claimed before training, filled all at once, never half-written."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sae_jax.base import InputError, require

FINISHED = "sweep.json"
"""Put in place last: a folder that has it has everything."""
OURS = ("metrics.csv", "history.npz", "members", "frontier.png", "report.html", FINISHED)
CHECKPOINTS, STAGE, REQUEST = "checkpoints", ".writing", "request.json"


class Run:
    """A claimed folder."""

    def __init__(self, out: Path, finished: bool):
        self.out, self.finished = out, finished
        self.checkpoints = out / CHECKPOINTS

    def publish(self, write: Callable[[Path], None]) -> None:
        """Have `write` fill a folder beside, then move what it wrote into place and drop the checkpoints."""
        stage = self.out / STAGE
        shutil.rmtree(stage, ignore_errors=True)
        write(stage)
        for name in OURS:
            _remove(self.out / name)
            if (stage / name).exists():
                (stage / name).replace(self.out / name)
        _remove(stage)
        _remove(self.checkpoints)


def choose(out: Path | None, data: Path | None, resume: bool) -> Path:
    """The folder asked for, or the first free `runs/NAME-N`."""
    require(out is not None or not resume, "--resume needs --out: say which run to go on with")
    if out is not None:
        return out
    name = "tokens" if data is None else data.stem
    number = 1
    while (Path("runs") / f"{name}-{number}").exists():
        number += 1
    return Path("runs") / f"{name}-{number}"


@contextmanager
def claim(out: Path, request: dict[str, Any], *, overwrite: bool, resume: bool) -> Iterator[Run]:
    """Take a folder for a run. If it fails, what stays is what was there before, and whole checkpoints.

    Args:
      out: the folder.
      request: what decides the run's numbers; kept beside the checkpoints, and compared on resume.
      overwrite: replace the run that is there. Files that are not a run's stay.
      resume: go on with the run that is there.

    Raises:
      InputError: something is in the way, or the run there was asked for otherwise.
    """
    require(not (overwrite and resume), "--overwrite and --resume exclude each other")
    require(out.is_dir() or not out.exists(), f"{out} is a file, not a folder")
    checkpoints = out / CHECKPOINTS
    new = not out.exists()
    occupied = not new and any(out.iterdir())
    if resume:
        require(occupied, f"{out} holds no run to resume")
        _require_same(out, request)
    else:
        require(
            overwrite or not occupied,
            f"{out} exists and is not empty: --overwrite replaces the run in it, --resume goes on",
        )
        _remove(checkpoints)
    run = Run(out, finished=resume and (out / FINISHED).exists())
    try:
        if not run.finished:
            checkpoints.mkdir(parents=True, exist_ok=True)
            (checkpoints / REQUEST).write_text(json.dumps(request))
        yield run
    finally:
        _remove(out / STAGE)
        if checkpoints.is_dir() and not any(path.name.isdecimal() for path in checkpoints.glob("*/*")):
            _remove(checkpoints)
        if new and out.is_dir() and not any(out.iterdir()):
            out.rmdir()


def _require_same(out: Path, request: dict[str, Any]) -> None:
    try:
        if (out / FINISHED).exists():
            before = json.loads((out / FINISHED).read_text())["request"]
        else:
            before = json.loads((out / CHECKPOINTS / REQUEST).read_text())
        changed = [name for name, value in request.items() if before.get(name) != value]
    except (OSError, ValueError, KeyError, AttributeError):
        raise InputError(f"{out} holds no run that can be resumed") from None
    differences = "; ".join(f"{name} was {before.get(name)}, now {request[name]}" for name in changed)
    require(
        not changed,
        f"{out} was started with other options, so it cannot be resumed with these: {differences}",
    )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
