"""What a sweep leaves: a table, its members, the frontier, and the folder that holds them."""

import csv
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import jax.numpy as jnp
import numpy as np

from sae_jax import formats
from sae_jax.base import SAE, InputError, Params, require
from sae_jax.endings import DIVERGED, DROPPED, counted
from sae_jax.grid import Grid, members
from sae_jax.metrics.stability import Stability, stability
from sae_jax.seeds import Interval, Settings, interval, of_pairs, settings
from sae_jax.trained import About, TrainedSAE

COLUMNS = ("loss", "mse", "l0", "explained_variance", "dead_fraction")
"""Metrics in the table, in order, between the hyper-parameters and the status."""
WHERE_KNOWN = (
    "mmcs", "mmcs_learned", "mcc", "uniqueness", "precision", "recall", "f1", "recovered", "hedging",
    "absorption", "consistency",
)  # fmt: skip
"""More of them, where the features of the data are known or seeds were held against each other."""
MORE_IS_BETTER = {"explained_variance", *WHERE_KNOWN} - {"hedging", "absorption"}
MOST_MATCHING = 1e12
"""Of `SweepResult.matching`; five seeds of 4,096 latents are .7e12 and took 20 s on two cores."""


class Part(NamedTuple):
    """Members whose weights have the same names and shapes."""

    sae: Callable[[int], SAE]
    """Makes the SAE of the i-th of them."""
    params: Params
    """Weights, stacked along a leading axis."""
    members: np.ndarray
    """Which rows of the table they are."""
    finish: Callable[[TrainedSAE], TrainedSAE] | None = None
    """What a member goes through as it is taken, such as the folding of a normalisation; None for nothing."""
    density: np.ndarray | None = None
    """How often each latent fires, [members, d_sae], where it was measured."""
    labels: Sequence[Mapping[int, str]] = ()
    """What features are called, of each of them; empty where there are no labels."""

    def trained(self, place: int) -> TrainedSAE:
        """The member at that place of this part."""
        params = {name: leaf[place] for name, leaf in self.params.items()}
        trained = TrainedSAE(self.sae(place), params)
        trained = trained if self.finish is None else self.finish(trained)
        about = trained.about
        if self.density is not None:
            about = about._replace(log_sparsity=log_sparsity(self.density[place]))
        if self.labels:
            about = about._replace(labels=self.labels[place])
        return replace(trained, about=about)


class SweepResult(NamedTuple):
    """The members of a sweep and what became of them."""

    parts: tuple[Part, ...]
    """The weights: of all members, unless read from a folder that holds fewer."""
    grid: Grid
    """One row per member; NaN where a member has no such hyper-parameter."""
    metrics: dict[str, np.ndarray]
    """Final metrics by name, [members, ...]; see `metrics.stream` for their definitions."""
    history: dict[str, np.ndarray]
    """Logs by name, [points, members], and `step` [points]; NaN where a member had ended."""
    status: np.ndarray
    """Per member "ok", or how it ended before its time: "diverged at step N", "stopped early at step N",
    "dropped at step N"."""

    @property
    def params(self) -> Params:
        """The weights of all members (those in `kept`), stacked along a leading axis.

        Raises:
          InputError: the members are of several shapes.
        """
        require(len(self.parts) < 2, "these members are of several shapes: take member(i).params")
        return self.parts[0].params if self.parts else {}

    @property
    def kept(self) -> np.ndarray:
        """The members whose weights are here, in order."""
        return np.sort(np.concatenate([np.array([], int), *(part.members for part in self.parts)]))

    @property
    def sound(self) -> np.ndarray:
        """Which members did not diverge."""
        return ~np.char.startswith(self.status, DIVERGED)

    @property
    def _trained(self) -> np.ndarray:
        """Which members trained for as long as they needed."""
        return self.sound & ~np.char.startswith(self.status, DROPPED)

    @property
    def endings(self) -> dict[str, int]:
        """How many members ended before their time, by how: {"diverged": 1, "dropped": 12}."""
        return counted(self.status.tolist())

    @property
    def loss(self) -> np.ndarray:
        """Each member's loss at the last point before it ended; NaN of one that diverged."""
        log = self.history["loss"]
        last = len(log) - 1 - np.isfinite(log[::-1]).argmax(axis=0)
        return np.where(self.sound, log[last, np.arange(log.shape[1])], np.nan)

    @property
    def groups(self) -> dict[str, np.ndarray]:
        """The members by architecture, and by width where there are several; none of a single sweep."""
        if "architecture" not in self.grid:
            return {}
        names, widths = self.grid["architecture"].tolist(), self.grid["d_sae"].tolist()
        several = len(set(widths)) > 1
        labels = [f"{name} {width}" if several else name for name, width in zip(names, widths, strict=True)]
        return {label: np.flatnonzero(np.array(labels) == label) for label in dict.fromkeys(labels)}

    @property
    def table(self) -> dict[str, np.ndarray]:
        """Columns by name, one row per member: hyper-parameters, final loss and metrics, status.

        Example:
          >>> pandas.DataFrame(result.table)
        """
        measured = {"loss": self.loss, **self.metrics}
        return {
            "member": np.arange(members(self.grid)),
            **self.grid,
            **{name: measured[name] for name in COLUMNS},
            **{name: self.metrics[name] for name in WHERE_KNOWN if name in self.metrics},
            "status": self.status,
        }

    @property
    def settings(self) -> Settings:
        """The members grouped by all but their seed."""
        return settings(self.grid)

    def intervals(self) -> dict[str, Interval]:
        """Every measured column of the table as a mean over seeds with its 95 % interval.

        Members that diverged, or were dropped before they had trained, are left out.

        Returns:
          By column an `Interval`, one entry per row of `settings.grid`.

        Example:
          >>> among, told = result.settings, result.intervals()
          >>> among.grid["l1"], told["l0"].mean, told["l0"].half_width
        """
        among, ok = self.settings, self._trained
        columns = {name: column for name, column in self.table.items() if name in (*COLUMNS, *WHERE_KNOWN)}
        told = {name: interval(np.where(ok, column, np.nan), among) for name, column in columns.items()}
        if "consistency" in told:
            told["consistency"] = of_pairs(told["consistency"], among)
        return told

    def stability(self, threshold: float = 0.9, others: int = 16) -> Stability:
        """Which features come back when nothing but the seed changes, and how consistent each setting is.

        Latents of two members are matched one to one by the cosine of their decoder rows; latents that never
        fire are left out, where it is known that they do not.

        Args:
          threshold: the cosine above which a feature has come back.
          others: how many other seeds a member is held against, at most.

        Returns:
          `Stability`: per latent, per member, and per row of `settings.grid`.

        Raises:
          InputError: no setting has several seeds, or members' weights were not saved.

        Example:
          >>> result.stability().consistency
        """
        among = self.settings
        require(
            among.repeated, "no setting has several seeds to hold against each other: sweep seed=range(5)"
        )
        rows = self.dictionaries()
        live = [np.ones(len(each), bool) for each in rows]
        for part in self.parts:
            for place, index in enumerate(part.members.tolist()):
                live[index] = live[index] if part.density is None else part.density[place] > 0
        return stability(rows, among.members, live, threshold, others)

    @property
    def matching(self) -> float:
        """The work of `stability`: the cube of d_sae for each pair of members."""
        partners = {
            index: min(len(rows) - 1, 16) / 2 for rows in self.settings.members for index in rows.tolist()
        }
        return sum(
            partners[index] * part.params["W_dec"].shape[1] ** 3
            for part in self.parts
            for index in part.members.tolist()
        )

    def dictionaries(self) -> list[np.ndarray]:
        """Each member's decoder rows [d_sae, d_in], a crosscoder's sources side by side; NaN if it diverged.

        Raises:
          InputError: members' weights were not saved.
        """
        total = members(self.grid)
        require(len(self.kept) == total, "this needs the weights of all members, and some were not saved")
        ok = self.sound
        rows: list[np.ndarray] = [np.empty(0)] * total
        for part in self.parts:
            stacked = np.asarray(part.params["W_dec"])
            for place, index in enumerate(part.members.tolist()):
                raw = part.finish is None
                decoder = stacked[place] if raw else np.asarray(part.trained(place).params["W_dec"])
                decoder = decoder.reshape(len(decoder), -1)
                rows[index] = decoder if ok[index] else np.full_like(decoder, np.nan)
        return rows

    def with_consistency(self, found: Stability) -> "SweepResult":
        """The same result with a column `consistency`: how far each member agrees with its other seeds."""
        return self._replace(metrics={**self.metrics, "consistency": found.of_member})

    def member(self, index: int) -> TrainedSAE:
        """One member with its weights.

        Args:
          index: row of the table.

        Raises:
          InputError: no such member, or one whose weights were not saved.
        """
        total = members(self.grid)
        require(0 <= index < total, f"there is no member {index}: this sweep has members 0 to {total - 1}")
        for part in self.parts:
            for place in np.flatnonzero(part.members == index).tolist():
                return part.trained(place)
        raise InputError(f"the weights of member {index} were not saved")

    def finished(self, finish: Callable[[TrainedSAE], TrainedSAE]) -> "SweepResult":
        """The same result, each member going through `finish` as it is taken or saved.

        Example:
          >>> result.finished(lambda one: TrainedSAE(*normalise.fold(*one, whitening(x))))
        """
        return self._replace(parts=tuple(part._replace(finish=finish) for part in self.parts))

    def missed(self, tolerance: float = 0.02) -> list[str]:
        """The members that have a target L0 and did not arrive at it, each as a sentence.

        Args:
          tolerance: how far off is still there, as a share of the target.

        Returns:
          Sentences that name the member, the target, what was reached, and why that may be.
        """
        told = []
        for part in self.parts:
            for place, index in enumerate(part.members.tolist()):
                target, l0 = part.sae(place).config.get("target_l0"), float(self.metrics["l0"][index])
                if target is None or not self._trained[index] or abs(l0 - target) <= tolerance * target:
                    continue
                why = (
                    "the penalty had no time to work, or the learning rate is too small for its threshold"
                    if l0 > target
                    else "latents died under the penalty, or the bandwidth of a JumpReLU is too small"
                )
                told.append(
                    f"member {index} reached an L0 of {l0:.3g}, not its target {target:.3g}: {why}; "
                    "train longer, or start from another weight"
                )
        return told

    def best(self, by: str = "mse", at_most: dict[str, float] | None = None) -> int:
        """The member best in one column, among those that keep to bounds and did not diverge.

        Args:
          by: the column to minimise, or to maximise where more is better, as of `f1`; `mse` and `fvu` rank by
            fidelity.
          at_most: upper bounds by column, such as `{"l0": 3}`.

        Returns:
          The member's index.

        Raises:
          InputError: an unknown column, or bounds that no member keeps to.

        Example:
          >>> result.member(result.best(at_most={"l0": 3}))
        """
        bounds = at_most or {}
        cost = self._cost(by)
        allowed = np.isfinite(cost) & self.sound
        for name, bound in bounds.items():
            allowed &= self._column(name) <= bound
        if not allowed.any():
            ok = self.sound
            least = {name: self._column(name)[ok].min() for name in bounds if ok.any()}
            reached = "; ".join(f"the least {name} reached is {value:.4g}" for name, value in least.items())
            raise InputError(f"no member keeps to {bounds or 'a finite value'}: {reached or 'all diverged'}")
        return int(np.where(allowed, cost, np.inf).argmin())

    def frontier(self, x: str = "l0", y: str = "fvu", among: np.ndarray | None = None) -> np.ndarray:
        """The Pareto frontier: members that no other beats in both columns.

        Args:
          x: one column, sparsity, to be made small.
          y: the other, to be made small too, unless more of it is better, as of `explained_variance` or `f1`.
          among: the members to look at; None for all.

        Returns:
          Member indices in order of `x`. Members that diverged are not among them; of equals the first is.

        Example:
          >>> [result.table["l1"][i] for i in result.frontier()]
        """
        xs, ys = self._cost(x), self._cost(y)
        fit = np.flatnonzero(self.sound & np.isfinite(xs) & np.isfinite(ys))
        fit = fit if among is None else np.intersect1d(fit, among)
        order = fit[np.lexsort((ys[fit], xs[fit]))]
        least_before = np.minimum.accumulate(np.concatenate([[np.inf], ys[order]]))[:-1]
        return order[ys[order] < least_before]

    def _cost(self, name: str) -> np.ndarray:
        """A column as something to be made small."""
        return -self._column(name) if name in MORE_IS_BETTER else self._column(name)

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
            grid = {name: _read_column([row[name] for row in rows], kind) for name, kind in axes.items()}
            names = (set(COLUMNS) | set(WHERE_KNOWN) & set(rows[0] if rows else ())) - {"loss"}
            metrics = {name: np.array([float(row[name]) for row in rows]) for name in names}
            status = np.array([row["status"] for row in rows])
        except (OSError, EOFError, ValueError, KeyError, TypeError, BadZipFile) as error:
            raise InputError(f"{folder} does not hold a whole sweep: {error!r}") from None
        require(bool(rows), f"{folder} does not hold a whole sweep: metrics.csv has no rows")
        metrics["fvu"] = 1 - metrics["explained_variance"]
        found = [path for path in (folder / "members").glob("*") if path.name.isdecimal()]
        found.sort(key=lambda path: int(path.name))
        return SweepResult(
            _parts({int(path.name): _member(path) for path in found}),
            grid,
            metrics,
            history,
            status,
        )

    def __repr__(self) -> str:
        told = f"{members(self.grid)} members over {', '.join(self.grid)}"
        return f"SweepResult({told}; {int(self.sound.sum())} ok)"


NEVER = 1e-10
"""What is added to a density before its logarithm, as SAELens does."""


def log_sparsity(density: np.ndarray) -> np.ndarray:
    """Densities as SAELens writes them, log10(density + 1e-10)."""
    return np.log10(density + NEVER).astype(np.float32)


def density_of(log_sparsity: np.ndarray) -> np.ndarray:
    """The densities that `log_sparsity` was made of; one of at most 1e-10 is 0."""
    density = np.power(10, np.asarray(log_sparsity, np.float64)) - NEVER
    return np.where(density > NEVER, density, 0)


def _member(path: Path) -> TrainedSAE:
    """As `load`, but a member that diverged may have NaN weights."""
    _, loaded = formats.read(path)
    params = {name: jnp.asarray(leaf) for name, leaf in loaded.params.items()}
    about = About(log_sparsity=loaded.log_sparsity, labels=loaded.labels)
    return TrainedSAE(loaded.sae, params, about)


def join(results: Sequence[SweepResult], labels: Sequence[dict[str, str | int]]) -> SweepResult:
    """Sweeps of several architectures or widths as one: one table, one frontier.

    Args:
      results: sweeps of the same number of steps and points.
      labels: what tells each from the others, such as `{"architecture": "topk", "d_sae": 256}`: the first
        columns of the table.

    Returns:
      All members, those of the first result first. A hyper-parameter or log that a member has not is NaN;
      metrics that are not of one shape (densities of several widths) are left out.

    Raises:
      InputError: no results, or histories of different steps.

    Example:
      >>> join([relu_sweep, topk_sweep], [{"architecture": "relu"}, {"architecture": "topk"}]).frontier()
    """
    require(len(results) > 0, "there is no result to join")
    steps = [result.history["step"] for result in results]
    same = all(np.array_equal(other, steps[0]) for other in steps)
    require(same, "sweeps are joined that have the same steps and points")
    counts = [members(result.grid) for result in results]
    tables = [
        {**{name: np.full(count, value) for name, value in label.items()}, **result.grid}
        for result, label, count in zip(results, labels, counts, strict=True)
    ]
    offsets = np.cumsum([0, *counts])
    parts = [
        part._replace(members=part.members + offset)
        for result, offset in zip(results, offsets, strict=False)
        for part in result.parts
    ]
    shapes = [{name: leaf.shape[1:] for name, leaf in result.metrics.items()} for result in results]
    common = [name for name in shapes[0] if all(other.get(name) == shapes[0][name] for other in shapes)]
    histories = [
        {name: log.T for name, log in result.history.items() if name != "step"} for result in results
    ]
    logs = {name: log.T for name, log in _together(histories, counts).items()}
    return SweepResult(
        tuple(parts),
        _together(tables, counts),
        {name: np.concatenate([result.metrics[name] for result in results]) for name in common},
        {"step": steps[0], **logs},
        np.concatenate([result.status for result in results]),
    )


def _together(tables: Sequence[dict[str, np.ndarray]], counts: Sequence[int]) -> dict[str, np.ndarray]:
    """Columns end to end; NaN, or an empty word, where a table lacks one."""
    names = dict.fromkeys(name for table in tables for name in table)
    whole = {}
    for name in names:
        like = next(table[name] for table in tables if name in table)
        lacking = "" if like.dtype.kind == "U" else np.nan
        whole[name] = np.concatenate(
            [
                table[name] if name in table else np.full((count, *like.shape[1:]), lacking)
                for table, count in zip(tables, counts, strict=True)
            ]
        )
    return whole


def _read_column(words: list[str], kind: str) -> np.ndarray:
    """A column of the table as it was before it was written."""
    if np.dtype(kind).kind == "U":
        return np.array(words)
    return np.array([float(word) for word in words]).astype(kind)


def _parts(trained: dict[int, TrainedSAE]) -> tuple[Part, ...]:
    """Members grouped by the names, shapes and dtypes of their weights."""
    groups: dict[Any, list[int]] = {}
    for index, (_, params) in trained.items():
        alike = tuple((name, leaf.shape, str(leaf.dtype)) for name, leaf in params.items())
        groups.setdefault(alike, []).append(index)
    return tuple(_part({index: trained[index] for index in group}) for group in groups.values())


def _part(trained: dict[int, TrainedSAE]) -> Part:
    """Members that are alike in names, shapes and dtypes."""
    each = list(trained.values())
    rates = [one.about.log_sparsity for one in each if one.about.log_sparsity is not None]
    return Part(
        lambda place: each[place].sae,
        {name: np.stack([one.params[name] for one in each]) for name in each[0].params},
        np.array(list(trained)),
        density=density_of(np.stack(rates)) if len(rates) == len(each) else None,
        labels=[one.about.labels for one in each] if any(one.about.labels for one in each) else (),
    )
