"""What a sweep tells while it trains, written down: JSON lines, TensorBoard, Weights & Biases."""

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from sae_jax.base import InputError
from sae_jax.sweep import Look

APART_UP_TO = 32
"""Members that a viewer shows one by one; of more it is given quantiles, which can still be told apart."""
QUANTILES = {"minimum": 0.0, "quartile-1": 0.25, "median": 0.5, "quartile-3": 0.75, "maximum": 1.0}
SECONDS_TO_A_VIEWER = 5
"""How late TensorBoard may be told; a flush per point takes 50 ms with 16 curves."""
HEAD = re.compile(rb'\{"step": (\d+), "members": \[(\d+), (\d+)\], ')
"""How a line of metrics.jsonl begins."""


class Point(NamedTuple):
    """Logs of the members that train side by side, after one step."""

    step: int
    members: tuple[int, int]
    """Rows `members[0]` to `members[1] - 1` of the table."""
    logs: dict[str, Float[np.ndarray, "members"]]


@runtime_checkable
class Writer(Protocol):
    """Where points go."""

    def write(self, point: Point) -> None:
        """Keep one point; of the same members the next has a later step."""
        ...

    def close(self) -> None:
        """Nothing more will come."""
        ...


class Recorder:
    """Hands each point of a sweep's history to writers, once: `sweep(..., look=recorder.show)`.

    Example:
      >>> with Recorder([json_lines(Path("metrics.jsonl"))]) as recorder:
      ...     sweep(factory, grid=grid, source=source, steps=500, look=recorder.show)
    """

    def __init__(self, writers: Sequence[Writer]):
        self.writers, self.members, self.step = writers, (0, 0), 0

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_) -> None:
        for writer in self.writers:
            writer.close()

    def show(self, look: Look) -> None:
        """Write the points of the history that were not there at the look before."""
        members = look.first, look.stop
        if members != self.members:
            self.members, self.step = members, 0
        for index, step in enumerate(map(int, look.history["step"])):
            if step > self.step:
                logs = {name: log[index] for name, log in look.history.items() if name != "step"}
                for writer in self.writers:
                    writer.write(Point(step, members, logs))
                self.step = step


class JsonLines:
    """A file of one line per point, for scripts."""

    def __init__(self, path: Path):
        self.path, self.members = path, (0, 0)

    def write(self, point: Point) -> None:
        """One line more, whole in the file when this returns."""
        if point.members != self.members:
            self.members = point.members
            _drop(self.path, point)
        logs = ", ".join(f"{json.dumps(name)}: {_numbers(log)}" for name, log in point.logs.items())
        line = f'{{"step": {point.step}, "members": {list(point.members)}, {logs}}}\n'
        _put(self.path, "ab", line.encode())

    def close(self) -> None:
        """Every line is in the file already."""


def json_lines(path: Path) -> Writer:
    """A line per point: `{"step": 100, "members": [0, 64], "loss": [...], "l0": [...]}`.

    Args:
      path: of the file. If it is there, the run goes on in it: whole lines stay until their point comes
        again, so that no point is there twice and none is missing, wherever the run before was killed.

    Returns:
      A writer; a line is with the operating system when `write` returns. What is not finite is null.
    """
    return JsonLines(path)


class TensorBoard:
    """Event files, a folder per curve."""

    def __init__(self, folder: Path, members: int, open_events: Callable[..., Any]):
        self.folder, self.in_all, self.open_events = folder, members, open_events
        self.members, self.files = (0, 0), {}

    def write(self, point: Point) -> None:
        """A scalar per curve and log."""
        if point.members != self.members:
            self.close()
            self.members = point.members
        for curve, logs in curves(point, self.in_all).items():
            if curve not in self.files:
                self.files[curve] = self._begun(self.folder / curve, point.step)
            for name, value in logs.items():
                self.files[curve].add_scalar(name, value, point.step)

    def close(self) -> None:
        """Close the event files; the same curves may still go on, in further ones."""
        for file in self.files.values():
            file.close()
        self.files = {}

    def _begun(self, folder: Path, step: int) -> Any:
        # files are named by the second, and one more of the same second would take the other's place
        number = len(list(folder.glob("events.*")))
        # what an earlier run wrote from this step on is hidden: it comes again
        return self.open_events(
            str(folder), purge_step=step, filename_suffix=f".{number}", flush_secs=SECONDS_TO_A_VIEWER
        )


def tensorboard(folder: Path, members: int) -> Writer:
    """Event files that `tensorboard --logdir FOLDER` shows: a curve per member, or quantiles over many.

    Args:
      folder: made if missing. A run that goes on hides what comes again.
      members: of the whole sweep. Up to 32 have a curve each, `member-007`; more are told by the quantiles of
        those that train side by side, `members-0-63/median`, because a viewer cannot show a thousand lines.

    Returns:
      A writer.

    Raises:
      InputError: tensorboardX is not installed.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise InputError(
            "TensorBoard's files need tensorboardX: pip install 'sae-jax[tensorboard]'"
        ) from None
    return TensorBoard(folder, members, SummaryWriter)


class WandB:
    """A run of Weights & Biases."""

    def __init__(self, run: Any, members: int):
        self.run, self.in_all = run, members

    def write(self, point: Point) -> None:
        """A row of `LOG/CURVE` columns."""
        told = {
            f"{name}/{curve}": value
            for curve, logs in curves(point, self.in_all).items()
            for name, value in logs.items()
        }
        self.run.log({"step": point.step, **told})

    def close(self) -> None:
        """Wait until everything is sent, or on disk."""
        self.run.finish()


def wandb(project: str, folder: Path, members: int, about: dict[str, Any]) -> Writer:
    """A run of Weights & Biases with the curves of `tensorboard`; WANDB_MODE=offline keeps it in the folder.

    A run that goes on is a further run there with the history from its beginning, in the same group: rows
    that were sent cannot be taken back.

    Args:
      project: its name.
      folder: of the run; `wandb/` in it holds what Weights & Biases writes, and its name is the group's.
      members: of the whole sweep.
      about: what was asked for, as plain values; the run's config.

    Returns:
      A writer.

    Raises:
      InputError: wandb is not installed, or does not start, for want of a key or of the network.
    """
    try:
        import wandb as client
    except ImportError:
        raise InputError("Weights & Biases needs its package: pip install 'sae-jax[wandb]'") from None
    try:
        run = client.init(
            project=project,
            dir=str(folder),
            group=folder.name,
            config=about,
            settings=client.Settings(silent=True, console="off"),
        )
    except client.Error as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"Weights & Biases did not start: {reason} WANDB_MODE=offline keeps the run in the folder"
        ) from None
    run.define_metric("*", step_metric="step")
    return WandB(run, members)


def curves(point: Point, members: int) -> dict[str, dict[str, float]]:
    """A point as the curves that a viewer shows: {curve: {log: value}}.

    Args:
      point: of some members.
      members: of the whole sweep; up to `APART_UP_TO` have a curve each, more are told by quantiles over
        those of the point whose value is finite.
    """
    first, stop = point.members
    if members <= APART_UP_TO:
        each = (
            {name: log[place].item() for name, log in point.logs.items()} for place in range(stop - first)
        )
        # of a member that was dropped there are no logs any longer
        return {
            f"member-{first + place:03d}": logs
            for place, logs in enumerate(each)
            if not all(map(math.isnan, logs.values()))
        }
    told = {name: _quantiles(log) for name, log in point.logs.items()}
    return {
        f"members-{first}-{stop - 1}/{curve}": {name: values[place] for name, values in told.items()}
        for place, curve in enumerate(QUANTILES)
    }


def _quantiles(log: np.ndarray) -> list[float]:
    finite = log[np.isfinite(log)]
    levels = list(QUANTILES.values())
    return np.quantile(finite, levels).tolist() if finite.size else [math.nan] * len(levels)


def _numbers(log: np.ndarray) -> str:
    """As JSON, with as many digits as it takes to read the same numbers back."""
    digits = "%.9g" if log.dtype.itemsize <= 4 else "%.17g"
    told = (digits % value if math.isfinite(value) else "null" for value in log.tolist())
    return f"[{', '.join(told)}]"


def _drop(path: Path, point: Point) -> None:
    """Drop what comes again: of these members, from this step on; and a line that a kill cut short."""
    text = path.read_bytes() if path.exists() else b""
    kept = b"".join(line for line in text.splitlines(keepends=True) if _stays(line, point))
    if kept != text:
        stage = path.with_name(f".{path.name}.writing")
        try:
            _put(stage, "wb", kept)
            stage.replace(path)
        finally:
            stage.unlink(missing_ok=True)


def _stays(line: bytes, point: Point) -> bool:
    head = HEAD.match(line)
    if head is None or not line.endswith(b"}\n"):
        return False
    step, first, stop = map(int, head.groups())
    return step < point.step or stop <= point.members[0] or point.members[1] <= first


def _put(path: Path, mode: str, data: bytes) -> None:
    try:
        with path.open(mode) as file:
            file.write(data)
    except OSError as error:  # a write that fails does not say where
        raise OSError(error.errno, error.strerror, str(path)) from error
