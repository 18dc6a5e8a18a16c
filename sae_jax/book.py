"""What is known so far of a sweep's members: a row for each, filled as they are trained."""

from typing import Any

import numpy as np
from jaxtyping import Int

from sae_jax import endings
from sae_jax.base import Params
from sae_jax.endings import DIVERGED, DROPPED, OK, STOPPED, Ending
from sae_jax.train import History


class Book:
    """Weights, metrics, history and status of all members.

    Args:
      total: how many members there are.
      stops: the steps after which points of history are taken.
    """

    def __init__(self, total: int, stops: list[int]):
        self.params: Params = {}
        self.metrics: dict[str, np.ndarray] = {}
        self.history: History = {"step": np.asarray(stops)}
        self.status = np.full(total, OK, "<U32")

    def note(
        self,
        rows: Int[np.ndarray, "members"],
        params: Params,
        measured: dict[str, np.ndarray],
        history: History,
        ending: Ending,
        done: int,
    ) -> None:
        """Keep what became of some members; entries beyond as many as there are rows are left out.

        Args:
          rows: which they are.
          params, measured: with a leading axis over them.
          history: [points, members] of those points that were taken since it was last noted.
          ending: as numpy.
          done: steps that they have behind them.
        """
        count = len(rows)
        for kept, found in ((self.params, params), (self.metrics, measured)):
            for name, leaf in found.items():
                self._column(kept, name, leaf.shape[1:], leaf.dtype)[rows] = leaf[:count]
        points = np.searchsorted(self.history["step"], history["step"])
        for name, log in history.items():
            if name != "step":
                whole = self._column(self.history, name, (len(self.history["step"]),), log.dtype)
                whole[rows[:, None], points] = log.T[:count]
        # a last update can break the weights after the last loss was taken
        broken = ~np.isfinite(measured["mse"])
        columns = (column[:count].tolist() for column in (rows, ending.diverged, ending.stopped, broken))
        for row, diverged, stopped, wrong in zip(*columns, strict=True):
            if diverged or wrong:
                self.status[row] = endings.status(DIVERGED, diverged or done)
            elif stopped:
                self.status[row] = endings.status(STOPPED, stopped)

    def ended(self, rows: Int[np.ndarray, "members"], ending: Ending) -> dict[str, int]:
        """How many members have ended, by how: those noted, and of `rows`, which still train, by `ending`."""
        noted, count = endings.counted(np.delete(self.status, rows).tolist()), len(rows)
        for how, steps in ((DIVERGED, ending.diverged), (STOPPED, ending.stopped)):
            noted[how] = noted.get(how, 0) + int((steps[:count] > 0).sum())
        return {how: number for how, number in noted.items() if number}

    def ranked(self, rows: Int[np.ndarray, "members"]) -> tuple[np.ndarray, np.ndarray]:
        """L0 and unexplained variance of members; NaN of those that diverged."""
        sound = ~np.char.startswith(self.status[rows], DIVERGED)
        l0, fvu = (np.where(sound, self.metrics[name][rows], np.nan) for name in ("l0", "fvu"))
        return l0, fvu

    def drop(self, rows: Int[np.ndarray, "members"], step: int) -> None:
        """Note that members do not go on after a step; one that has ended already stays as it is."""
        before = self.status[rows]
        self.status[rows] = np.where(before == OK, endings.status(DROPPED, step), before)

    def _column(self, kept: dict[str, Any], name: str, shape: tuple[int, ...], dtype) -> np.ndarray:
        if name not in kept:
            kept[name] = np.full((len(self.status), *shape), np.nan if dtype.kind == "f" else 0, dtype)
        return kept[name]
