"""What a sweep leaves: a table, its members, the frontier, and the folder that holds them."""

import csv
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np

from sae_jax import formats
from sae_jax.base import SAE, InputError, Params, require
from sae_jax.grid import Grid, members
from sae_jax.trained import TrainedSAE

COLUMNS = ("loss", "mse", "l0", "explained_variance", "dead_fraction")
"""Metrics in the table, in order, between the hyper-parameters and the status."""


class SweepResult(NamedTuple):
    """The members of a sweep and what became of them."""

    build: Callable[[dict[str, Any]], SAE]
    """Makes a member's SAE from its row of the table."""
    grid: Grid
    params: Params
    """Weights of the members in `kept`, stacked along a leading axis."""
    kept: np.ndarray
    """Which members' weights are here: all of them, unless read from a folder that holds fewer."""
    metrics: dict[str, np.ndarray]
    """Final metrics by name, [members, ...]; see `metrics.stream` for their definitions."""
    history: dict[str, np.ndarray]
    """Logs by name, [points, members], and `step` [points]."""

    @property
    def status(self) -> np.ndarray:
        """Per member "ok", or "diverged at step N" from the first point whose loss was not finite."""
        wrong = ~np.isfinite(self.history["loss"])
        first = self.history["step"][wrong.argmax(axis=0)]
        # a last update can break the weights after the last loss was taken
        broken = ~np.isfinite(self.metrics["mse"])
        last = self.history["step"][-1]
        return np.array(
            [
                f"diverged at step {first[i]}"
                if wrong[:, i].any()
                else f"diverged at step {last}"
                if broken[i]
                else "ok"
                for i in range(wrong.shape[1])
            ]
        )

    @property
    def table(self) -> dict[str, np.ndarray]:
        """Columns by name, one row per member: hyper-parameters, final loss and metrics, status.

        Example:
          >>> pandas.DataFrame(result.table)
        """
        measured = {"loss": self.history["loss"][-1], **self.metrics}
        return {
            "member": np.arange(members(self.grid)),
            **self.grid,
            **{name: measured[name] for name in COLUMNS},
            "status": self.status,
        }

    def member(self, index: int) -> TrainedSAE:
        """One member with its weights.

        Args:
          index: row of the table.

        Raises:
          InputError: no such member, or one whose weights were not saved.
        """
        total = members(self.grid)
        require(0 <= index < total, f"there is no member {index}: this sweep has members 0 to {total - 1}")
        place = np.flatnonzero(self.kept == index)
        require(place.size == 1, f"the weights of member {index} were not saved")
        row = {"member": index, **{name: column[index].item() for name, column in self.grid.items()}}
        return TrainedSAE(self.build(row), {name: leaf[place[0]] for name, leaf in self.params.items()})

    def best(self, by: str = "mse", at_most: dict[str, float] | None = None) -> int:
        """The member with the least of one column, among those that keep to bounds and did not diverge.

        Args:
          by: the column to minimise; `mse` and `fvu` rank by fidelity.
          at_most: upper bounds by column, such as `{"l0": 3}`.

        Returns:
          The member's index.

        Raises:
          InputError: an unknown column, or bounds that no member keeps to.

        Example:
          >>> result.member(result.best(at_most={"l0": 3}))
        """
        bounds = at_most or {}
        allowed = np.isfinite(self._column(by)) & (self.status == "ok")
        for name, bound in bounds.items():
            allowed &= self._column(name) <= bound
        if not allowed.any():
            ok = self.status == "ok"
            least = {name: self._column(name)[ok].min() for name in bounds if ok.any()}
            reached = "; ".join(f"the least {name} reached is {value:.4g}" for name, value in least.items())
            raise InputError(f"no member keeps to {bounds or 'a finite value'}: {reached or 'all diverged'}")
        return int(np.where(allowed, self._column(by), np.inf).argmin())

    def frontier(self, x: str = "l0", y: str = "fvu") -> np.ndarray:
        """The Pareto frontier: members that no other beats in both columns, each to be made small.

        Args:
          x: one column, sparsity.
          y: the other, infidelity.

        Returns:
          Member indices in order of `x`. Members that diverged are not among them; of equals the first is.

        Example:
          >>> [result.table["l1"][i] for i in result.frontier()]
        """
        xs, ys = self._column(x), self._column(y)
        fit = np.flatnonzero((self.status == "ok") & np.isfinite(xs) & np.isfinite(ys))
        order = fit[np.lexsort((ys[fit], xs[fit]))]
        least_before = np.minimum.accumulate(np.concatenate([[np.inf], ys[order]]))[:-1]
        return order[ys[order] < least_before]

    def _column(self, name: str) -> np.ndarray:
        columns = {**self.metrics, **self.table}
        known = {key: column for key, column in columns.items() if column.ndim == 1 and key != "status"}
        require(name in known, f"there is no column {name!r}; there are: {', '.join(sorted(known))}")
        return np.asarray(known[name], np.float64)

    def save(self, folder: str | Path, save: str = "all", about: dict[str, Any] | None = None) -> None:
        """Write `sweep.json`, `metrics.csv`, `history.npz` and `members/NNN/`.

        Args:
          folder: made if missing; the members of a sweep that was saved there before are removed.
          save: whose weights: "all", "frontier" or "none".
          about: what else `sweep.json` should tell.

        Raises:
          InputError: another word for `save`.
        """
        chosen = {"all": self.kept, "frontier": self.frontier(), "none": np.array([], int)}
        require(save in chosen, f"save must be one of {', '.join(chosen)}, got {save!r}")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder / "members", ignore_errors=True)
        digits = max(3, len(str(members(self.grid) - 1)))
        for index in chosen[save].tolist():
            self.member(index).save(folder / "members" / f"{index:0{digits}d}")
        logs = {name: log if name == "step" else log.T for name, log in self.history.items()}
        np.savez_compressed(folder / "history.npz", allow_pickle=False, **logs)
        with (folder / "metrics.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(self.table)
            writer.writerows(zip(*(column.tolist() for column in self.table.values()), strict=True))
        everything = {
            "axes": {name: str(column.dtype) for name, column in self.grid.items()},
            "saved": save,
            **(about or {}),
        }
        (folder / "sweep.json").write_text(json.dumps(everything, indent=2) + "\n")

    @staticmethod
    def load(folder: str | Path) -> "SweepResult":
        """Read a folder that `save` or `sae-jax sweep` wrote: what it holds, so of the metrics the table's.

        Args:
          folder: holds `sweep.json`.

        Returns:
          The result with the table's metrics and whichever weights were saved.

        Raises:
          InputError: no such folder, or files missing or damaged.
        """
        folder = Path(folder)
        require((folder / "sweep.json").is_file(), f"{folder} holds no finished sweep (no sweep.json)")
        try:
            about = json.loads((folder / "sweep.json").read_text())
            with np.load(folder / "history.npz", allow_pickle=False) as logs:
                history = {name: log if name == "step" else log.T for name, log in logs.items()}
            with (folder / "metrics.csv").open(newline="") as file:
                rows = list(csv.DictReader(file))
            axes = about["axes"]
            grid = {
                name: np.array([float(row[name]) for row in rows]).astype(kind) for name, kind in axes.items()
            }
            names = set(COLUMNS) - {"loss"}
            metrics = {name: np.array([float(row[name]) for row in rows]) for name in names}
        except (OSError, EOFError, ValueError, KeyError, TypeError, BadZipFile) as error:
            raise InputError(f"{folder} does not hold a whole sweep: {error!r}") from None
        require(bool(rows), f"{folder} does not hold a whole sweep: metrics.csv has no rows")
        metrics["fvu"] = 1 - metrics["explained_variance"]
        found = [path for path in (folder / "members").glob("*") if path.name.isdecimal()]
        found.sort(key=lambda path: int(path.name))
        trained = {int(path.name): TrainedSAE(*formats.read(path)) for path in found}
        return SweepResult(
            build=lambda row: trained[row["member"]].sae,
            grid=grid,
            params=_stack([one.params for one in trained.values()]),
            kept=np.array(list(trained), int),
            metrics=metrics,
            history=history,
        )

    def __repr__(self) -> str:
        told = f"{members(self.grid)} members over {', '.join(self.grid)}"
        return f"SweepResult({told}; {int((self.status == 'ok').sum())} ok)"


def _stack(trees: Iterable[Params]) -> Params:
    trees = list(trees)
    return {name: np.stack([tree[name] for tree in trees]) for name in trees[0]} if trees else {}
