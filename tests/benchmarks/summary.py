"""What the timings come to: rows, a table for a page, and goals met or missed."""

import re
import statistics
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from works import (
    FASTEST,
    GOALS,
    MOST_RISE,
    PEAK,
    SAELENS,
    SAELENS_MANY,
    SWEEP,
    Goal,
    Work,
)

LIBRARY = {SAELENS_MANY: SAELENS}
"""Of contenders that are not the first of theirs."""
MARKS = ("<!-- peers -->", "<!-- /peers -->")
"""In a page, the lines that the table goes between."""


class Row(NamedTuple):
    """One contender at one work, over all rounds."""

    work: Work
    contender: str
    timed_members: int
    first: float
    """Median seconds of the first call of a process."""
    median: float
    """Seconds per step and member; and so the next two."""
    least: float
    most: float
    alone: float | None
    """Median of the same without a call's fixed costs, where the contender tells it."""
    memory: int
    """Bytes, the most of any round."""
    share: float
    """Of the machine's peak: 10 B d F FLOPs a step and member."""
    times: float | None
    """Sweep is so many times as fast, median over rounds; None where it was not measured beside."""

    @property
    def share_alone(self) -> float | None:
        """Of the peak, without a call's fixed costs."""
        return self.share * self.median / self.alone if self.alone else None

    @property
    def peers(self) -> bool:
        """Whether this is another's."""
        return self.contender != SWEEP


Timings = Sequence[dict[str, Any]]
"""As `timing.Timing` has them, as plain values."""
Peaks = dict[str, dict[str, float]]
"""FLOP/s of matrix products, by arithmetic and by library."""


def summarise(rounds: Sequence[Timings], peaks: Peaks) -> list[Row]:
    """One row per work and contender.

    Args:
      rounds: the timings of each.
      peaks: of every arithmetic of the works; the best library's counts.

    Returns:
      Rows in the order in which they were measured.
    """
    rows = []
    names = dict.fromkeys(
        (Work.of(each["work"]), each["contender"]) for timings in rounds for each in timings
    )
    for work, contender in names:
        mine = [timing for each in rounds for timing in each if _is(timing, work, contender)]
        each_call = [_per_step(timing, seconds) for timing in mine for seconds in timing["seconds"]]
        alone = [seconds / work.members for timing in mine for seconds in timing["step_seconds"]]
        median = statistics.median(each_call)
        rows.append(
            Row(
                work,
                contender,
                mine[0]["timed_members"],
                statistics.median(timing["first_seconds"] for timing in mine),
                median,
                min(each_call),
                max(each_call),
                statistics.median(alone) if alone else None,
                max(timing["memory"] for timing in mine),
                work.flops / work.members / median / max(peaks[work.arithmetic].values()),
                _times(rounds, work, contender),
            )
        )
    return rows


def _is(timing: dict[str, Any], work: Work, contender: str) -> bool:
    return timing["contender"] == contender and Work.of(timing["work"]) == work


def _per_step(timing: dict[str, Any], seconds: float) -> float:
    return seconds / timing["work"]["steps"] / timing["timed_members"]


def _times(rounds: Sequence[Timings], work: Work, contender: str) -> float | None:
    def median(timings: Timings, name: str) -> float | None:
        calls = [_per_step(each, s) for each in timings if _is(each, work, name) for s in each["seconds"]]
        return statistics.median(calls) if calls else None

    pairs = [(median(timings, contender), median(timings, SWEEP)) for timings in rounds]
    ratios = [theirs / ours for theirs, ours in pairs if theirs and ours]
    return statistics.median(ratios) if ratios else None


class Verdict(NamedTuple):
    """A goal, and the figure that it is held against."""

    sentence: str
    reached: float
    least: float

    @property
    def met(self) -> bool:
        """Whether it is reached."""
        return self.reached >= self.least

    def __str__(self) -> str:
        return f"{'met' if self.met else 'MISSED'}: {self.sentence}"


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """Of every goal whose work was measured."""
    held = [_held(goal, [row for row in rows if _at(row.work, goal)]) for goal in GOALS]
    return [verdict for verdict in held if verdict is not None] + _rises(rows)


def _at(work: Work, goal: Goal) -> bool:
    return (work.name, work.members) == (goal.work, goal.members)


def _held(goal: Goal, rows: Sequence[Row]) -> Verdict | None:
    ours = next((row for row in rows if row.contender == SWEEP), None)
    if goal.against == PEAK:
        if ours is None:
            return None
        alone = f" ({ours.share_alone:.1%} in its steps alone)" if ours.share_alone else ""
        said = f"{ours.work}: {ours.share:.1%} of {goal.against}{alone}, where {goal.least:.0%} is the goal"
        return Verdict(said, ours.share, goal.least)
    those = [
        row
        for row in rows
        if row.peers and row.times and (goal.against == FASTEST or _library(row) == goal.against)
    ]
    if not those:
        return None
    peer = min(those, key=lambda row: row.times or 0)
    who = f"{goal.against} ({peer.contender})" if peer.contender != goal.against else goal.against
    said = f"{peer.work}: {digits(peer.times or 0)} times as fast as {who}, where {goal.least:g} is the goal"
    return Verdict(said, peer.times or 0, goal.least)


def _library(row: Row) -> str:
    return LIBRARY.get(row.contender, row.contender)


def _rises(rows: Sequence[Row]) -> list[Verdict]:
    """Of the cost of a member as there are more of them, one per shape."""
    grown = [row for row in rows if row.work.name == "members"]
    found = []
    for shape in dict.fromkeys((row.work.d_in, row.work.d_sae) for row in grown):
        costs = [row.median for row in grown if (row.work.d_in, row.work.d_sae) == shape]
        steps = [after / before for before, after in pairwise(costs)]
        if steps:
            said = (
                f"{shape[0]} -> {shape[1]}: with more members the cost of one is at most {max(steps):.3f} "
                f"times what it was with fewer, where {MOST_RISE:g} is the goal"
            )
            found.append(Verdict(said, -max(steps), -MOST_RISE))
    return found


COLUMNS = (
    "work", "contender", "first call", "per step and member", "peak memory", "share of peak",
    "sae_jax is so many times as fast",
)  # fmt: skip
HEAD = (f"| {' | '.join(COLUMNS)} |", f"| {' | '.join(['---'] * len(COLUMNS))} |")


def lines_of(rows: Sequence[Row], missing: Iterable[tuple[Work, str]] = ()) -> list[str]:
    """The table in Markdown: a line per row, then what was not measured."""
    named: dict[Work, list[str]] = {}
    for work, contender in missing:
        named.setdefault(work, []).append(contender)
    without = [f"| {work} | {', '.join(names)} | not measured | | | | |" for work, names in named.items()]
    return [*HEAD, *(line for row in rows for line in _lines(row)), *without]


def _lines(row: Row) -> list[str]:
    figures = [
        time_of(row.first),
        f"{time_of(row.median)} ({time_of(row.least)} - {time_of(row.most)})",
        f"{row.memory / 1e9:.2f} GB",
        f"{row.share:.1%}",
        f"{digits(row.times)} x" if row.times and row.peers else "",
    ]
    sample = f", on {row.timed_members} members" if row.timed_members < row.work.members else ""
    lines = [f"| {row.work} | {row.contender}{sample} | {' | '.join(figures)} |"]
    if row.alone and row.share_alone and row.work.name not in ("seed", "members"):
        alone = f"{time_of(row.alone)} | | {row.share_alone:.1%}"
        lines.append(f"| {row.work} | {row.contender}, steps alone | | {alone} | |")
    return lines


UNITS = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))


def time_of(seconds: float) -> str:
    """In the unit that leaves a few digits before the point."""
    unit, size = next((each for each in UNITS if seconds >= each[1]), UNITS[-1])
    return f"{digits(seconds / size)} {unit}"


def digits(value: float) -> str:
    """Three of them that count."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def about(machine: dict[str, Any], peaks: Peaks, rounds: int) -> str:
    """On what, when and how it was measured, in a paragraph."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    matmul = "; ".join(
        f"{arithmetic}, "
        + ", ".join(f"{peak / 1e9:,.0f} GFLOP/s through {name}" for name, peak in each.items())
        for arithmetic, each in peaks.items()
    )
    return (
        f"Measured {machine['date']} on {machine['processor']}, {machine['cores']} cores with a load of "
        f"{machine['load_at_start']:.1f} at the start; Python {machine['python']}, {versions}. "
        f"Rounds of fresh processes: {rounds}. Matrix products in the same run: {matmul}."
    )


def told(
    machine: dict[str, Any],
    peaks: Peaks,
    rounds: int,
    rows: Sequence[Row],
    missing: Iterable[tuple[Work, str]],
) -> str:
    """All of it for a page, goals with it."""
    goals = [f"- {verdict}" for verdict in verdicts(rows)]
    parts = [about(machine, peaks, rounds), "", *lines_of(rows, missing), *(["", *goals] if goals else [])]
    return "\n".join(parts) + "\n"


def placed(page: str, text: str) -> str:
    """The page with the text between its marks.

    Raises:
      ValueError: it has no such marks, or several.
    """
    begin, end = MARKS
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"the page must have one line {begin} and one {end}")
    between = re.compile(f"{re.escape(begin)}.*{re.escape(end)}", re.DOTALL)
    return between.sub(lambda _: f"{begin}\n\n{text}\n{end}", page)
