"""One run's checkpoints: written in the background, whole or passed over, the last and the best kept."""

import errno
import math
import os
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from os import PathLike
from typing import Any

import jax
import numpy as np
from etils import epath

from sae_jax import distributed
from sae_jax.base import InputError, require
from sae_jax.checkpoint import arrays, seals
from sae_jax.checkpoint.places import has_room, place, remove

LAYOUT = 1
"""Of what is written here; a higher number in a checkpoint is a newer version's."""
ROOM_TO_WRITE = 2**20
"""Bytes that a checkpoint may need beyond its arrays: metadata, and the files' own blocks."""
DAMAGED = ".damaged"


class Checkpoints:
    """The checkpoints of one run.

    A checkpoint is a folder named after its step. It is put in place once it is all on disk, and is believed
    only if every byte of it is what was written. Where several processes train together, all make the same
    calls in the same order.

    Args:
      folder: of this run alone: on a disk that all of its processes see, or a URL gs://BUCKET/FOLDER.
      last: how many of the newest to keep.
      best: how many to keep beside them, those of the lowest score.
      tell: takes a sentence: a checkpoint could not be written, or is damaged.

    Raises:
      InputError: a count out of range, or a URL that orbax cannot write to.

    Example:
      >>> with Checkpoints("run/checkpoints") as checkpoints:
      ...     step, state, history = checkpoints.restore(state) or (0, state, {})
      ...     checkpoints.save(step + 100, state, history)
    """

    def __init__(
        self,
        folder: str | PathLike[str],
        last: int = 2,
        best: int = 0,
        tell: Callable[[str], None] = warnings.warn,
    ):
        require(last >= 1, f"last must be at least 1, got {last}")
        require(best >= 0, f"best must not be negative, got {best}")
        self.folder = place(folder)
        self._last, self._best, self._tell = last, best, tell
        self._writing: tuple[int, Any] | None = None
        """The step that is being written, and what writes it."""
        self._held: int | None = None
        """The step of the newest that is known to be whole."""
        self._well = True

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def save(self, step: int, state: Any, history: dict[str, np.ndarray], score: float | None = None) -> None:
        """Copy the state to the host and write it in the background, after what is still being written.

        A write that fails is told in a sentence and raises nothing; the checkpoints before stay.

        Args:
          step: steps done.
          state: any pytree of arrays; it may be donated as soon as this returns.
          history: logs so far.
          score: the lower, the better; None or NaN is never among the best.
        """
        self.wait()
        if step == self._held:
            return
        named = {name: arrays.copied(leaf) for name, leaf in _named({"state": state, "history": history})}
        about = {
            "layout": LAYOUT,
            "step": step,
            "score": None if score is None or math.isnan(score) else float(score),
            "arrays": {name: _kind(leaf) for name, leaf in named.items()},
        }
        size = sum(leaf.nbytes for leaf in named.values())
        # asked first, since other processes wait long for one that fails midway
        if not distributed.leader(has_room(self.folder, size + ROOM_TO_WRITE)):
            self._failed(step, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
            return
        try:
            writer = arrays.write(self.folder / str(step), named, partial(seals.seal, about=about))
        except Exception as error:
            self._failed(step, error)
        else:
            self._writing = step, writer

    def wait(self) -> bool:
        """Return once all is on disk: whether the newest `save` is whole."""
        if self._writing is None:
            return self._well
        (step, writer), self._writing = self._writing, None
        try:
            writer.wait_until_finished()
        except Exception as error:
            self._failed(step, error)
        else:
            self._held, self._well = step, True
            self._tidy()
        finally:
            writer.close()
        return self._well

    def restore(self, like: Any) -> tuple[int, Any, dict[str, np.ndarray]] | None:
        """The newest whole checkpoint, or None where there is none. A damaged one is told of and set aside.

        Args:
          like: a state of the same structure, shapes and dtypes: of arrays, or of `jax.ShapeDtypeStruct` with
            the shardings that the restored ones are to have, which need not be those that were saved.

        Returns:
          Steps done, state, history.

        Raises:
          InputError: the checkpoint is of another model, or was written by a newer version.
        """
        self.wait()
        step = distributed.leader(self._newest_whole() if distributed.first() else None)
        if step is None:
            return None
        checkpoint = self.folder / str(step)
        about = seals.about(checkpoint)
        require(
            about["layout"] <= LAYOUT,
            f"{checkpoint} was written by a newer version of sae_jax, in layout {about['layout']}, and this "
            f"one reads up to {LAYOUT}: go on with the version that wrote it",
        )
        wanted = dict(_named({"state": like}))
        history = {name: kind for name, kind in about["arrays"].items() if name.startswith("history.")}
        model = {name: kind for name, kind in about["arrays"].items() if name not in history}
        _require_alike(model, {name: _kind(leaf) for name, leaf in wanted.items()}, checkpoint)
        found = arrays.read(
            checkpoint, {**wanted, **{name: np.empty(*kind) for name, kind in history.items()}}
        )
        self._held = step
        state = jax.tree.unflatten(jax.tree.structure(like), [found[name] for name in wanted])
        return step, state, {name.removeprefix("history."): found[name] for name in history}

    def close(self) -> None:
        """Wait for what is being written."""
        self.wait()

    def _newest_whole(self) -> int | None:
        """Called in the first process. What lies above the newest whole checkpoint is set aside."""
        damaged: dict[int, Exception] = {}
        for step in reversed(_steps(self.folder)):
            try:
                # what a newer version wrote is to be refused, not passed over
                if seals.about(self.folder / str(step))["layout"] <= LAYOUT:
                    seals.require_whole(self.folder / str(step))
                break
            except (OSError, seals.Damaged) as error:
                damaged[step] = error
        else:
            step = None
        instead = "and there is none before it" if step is None else f"so the one at step {step} is used"
        for number, error in damaged.items():
            self._tell(f"the checkpoint at step {number} in {self.folder} is damaged, {instead}: {error}")
            aside = self.folder / f"{number}{DAMAGED}"
            remove(aside)
            (self.folder / str(number)).rename(aside)
        self._tidy()
        return step

    def _failed(self, step: int, error: Exception) -> None:
        self._well = False
        steps = _steps(self.folder)
        rest = f"; the one at step {steps[-1]} stays" if steps else ""
        self._tell(f"the checkpoint at step {step} could not be written, {self.folder}: {_why(error)}{rest}")
        self._tidy()

    def _tidy(self) -> None:
        """Remove what was left unfinished, and what is neither among the last nor among the best."""
        if not distributed.first() or not self.folder.is_dir():
            return
        for path in self.folder.iterdir():
            if arrays.TEMPORARY in path.name:
                remove(path)
        steps = _steps(self.folder)
        scores = {step: score for step in steps if (score := _score(self.folder / str(step))) is not None}
        best = sorted(scores, key=scores.__getitem__)[: self._best]
        for step in {*steps} - {*steps[-self._last :], *best}:
            remove(self.folder / str(step))


def _named(tree: Any) -> Iterable[tuple[str, Any]]:
    """Every array with the way to it: `state.params.W_dec`, `history.loss`."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield jax.tree_util.keystr(path, simple=True, separator="."), leaf


def _kind(leaf: Any) -> list[Any]:
    return [list(leaf.shape), str(leaf.dtype)]


def _steps(folder: epath.Path) -> list[int]:
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def _score(checkpoint: epath.Path) -> float | None:
    try:
        return seals.about(checkpoint)["score"]
    except (OSError, seals.Damaged):
        return None


def _require_alike(held: dict[str, Any], wanted: dict[str, Any], checkpoint: epath.Path) -> None:
    """Raise `InputError` with the first array in which a checkpoint is not what is wanted."""
    differing = [name for name in {**held, **wanted} if held.get(name) != wanted.get(name)]
    if not differing:
        return
    there, here = (
        "missing" if name not in kinds else f"{kinds[name][1]} {kinds[name][0]}"
        for name, kinds in ((differing[0], held), (differing[0], wanted))
    )
    raise InputError(
        f"{checkpoint} is of another model or optimizer: {differing[0]} is {there} in it and {here} here; "
        "go on with what it was made with, or give another folder"
    )


def _why(error: Exception) -> str:
    # tensorstore tells a full disk in words only
    full = "No space left on device" in str(error)
    return "the disk is full" if full else " ".join(str(error).split())[:300] or type(error).__name__
