"""What a person sees while a run goes on, and how they stop it."""

import math
import signal
import time
from types import FrameType

import numpy as np
from rich import box
from rich.console import Console, Group
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from sae_jax.cli import throughput
from sae_jax.cli.throughput import Meter
from sae_jax.result import SweepResult
from sae_jax.sweep import Look

SECONDS_BETWEEN_LINES = 10.0
SECONDS_TO_AN_ENDING = 1.0
ROWS_IN_SUMMARY = 24
FOUND = ("f1", "mcc", "mmcs", "uniqueness", "recovered")
"""Columns of the table on true features."""
ONLY_IN_FILES = ("loss", "mmcs_learned", "precision", "recall", "hedging", "absorption")
"""Columns that a screen has no room for."""


class Ticker:
    """A progress bar on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console, members: int, steps: int, batch_size: int):
        self.console, self.members, self.steps = console, members, steps
        self.meter = Meter(members, batch_size)
        self.share = 0.0
        self.ended = ""
        self.first: tuple[float, int] | None = None
        self.line_at = -math.inf
        self.bar = Progress(
            BarColumn(bar_width=20),
            TaskProgressColumn(),
            TextColumn("{task.fields[rates]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[ended]}", table_column=Column()),  # may fold, as the others may not
            console=console,
            disable=console.quiet or not console.is_terminal,
        )

    def __enter__(self) -> "Ticker":
        self.say(f"training {counted(self.members)} for {self.steps} steps")
        self.bar.start()
        self.task = self.bar.add_task("training", total=1.0, rates="compiling", ended="")
        return self

    def __exit__(self, *_) -> None:
        self.bar.stop()

    def say(self, text: str) -> None:
        """One line, above the bar."""
        self.bar.console.print(text, highlight=False, soft_wrap=True)

    def show(self, look: Look) -> None:
        """Bring the display up to date."""
        now = time.monotonic()
        self.share = look.member_steps / look.total
        if self.first is None:
            self.first = now, look.member_steps  # what came before was compilation
        began, before = self.first
        self.meter.show(look, now)
        speed = (look.member_steps - before) / max(now - began, 1e-9)
        rates = throughput.told(speed / self.steps, self.meter.rows_per_second) if speed else "compiled"
        ended = ", ".join(f"{count:,} {how}" for how, count in look.ended.items() if count)
        self.bar.update(self.task, completed=self.share, rates=rates, ended=ended)
        # that a member ended is told soon, but of a thousand that end one by one there are no thousand lines
        pause = SECONDS_BETWEEN_LINES if ended == self.ended else SECONDS_TO_AN_ENDING
        if not self.console.is_terminal and now - self.line_at >= pause:
            left = f"{(look.total - look.member_steps) / speed:,.0f} s left" if speed else ""
            self.say("  ".join(filter(None, [f"{self.share:.0%}", rates, left, ended])))
            self.line_at, self.ended = now, ended


class StopSignals:
    """Turns the first SIGTERM or Ctrl-C into a wish to stop at the next chance; a second Ctrl-C insists."""

    def __init__(self):
        self.received: int | None = None

    def __enter__(self) -> "StopSignals":
        self.before = {
            number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.received = number

    @property
    def exit_status(self) -> int:
        """0 after SIGTERM, whose sender asked for just this; 130 after Ctrl-C."""
        return 130 if self.received == signal.SIGINT else 0


def counted(members: int) -> str:
    """ "1 member", "16 members"."""
    return f"{members:,} member" if members == 1 else f"{members:,} members"


def summary(result: SweepResult) -> Group:
    """The members, or where they are many the frontier; where seeds vary, the settings with intervals.

    What they found of features that are known is a table of its own, since one would be too wide.
    """
    columns, title = _by_setting(result) if result.settings.repeated else _by_member(result)
    for name in result.grid:
        if len(columns.get(name, ())) > 1 and len(np.unique(result.grid[name])) == 1:
            title += f", {name} {columns.pop(name)[0]}"
    for how, count in result.endings.items():
        title += f", {count:,} {how}"
    found = {name: columns.pop(name) for name in FOUND if name in columns}
    tables = [_drawn(title, columns)]
    if found:
        rows = {name: column for name, column in columns.items() if name in ("member", *result.grid)}
        tables.append(_drawn("the true features, found", {**rows, **found}))
    return Group(*tables)


def _drawn(title: str, columns: dict[str, list[str]]) -> Table:
    view = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), title=title)
    for name in columns:
        # folded, since half of a figure reads like another
        view.add_column(name.replace("_", " "), justify="right", no_wrap=name == "status", overflow="fold")
    for row in zip(*columns.values(), strict=True):
        view.add_row(*row)
    return view


def _by_member(result: SweepResult) -> tuple[dict[str, list[str]], str]:
    table = {name: column for name, column in result.table.items() if name not in ONLY_IN_FILES}
    count = len(table["member"])
    shown = _spread(np.arange(count) if count <= ROWS_IN_SUMMARY else result.frontier())
    title = "all members" if len(shown) == count else f"{len(shown)} on the frontier of {count} members"
    return {name: [_cell(column[index]) for index in shown] for name, column in table.items()}, title


def _by_setting(result: SweepResult) -> tuple[dict[str, list[str]], str]:
    among, told = result.settings, result.intervals()
    count = len(among.members)
    shown = _spread(np.arange(count))
    axes = {name: [_cell(column[index]) for index in shown] for name, column in among.grid.items()}
    measured = {
        name: [_with_interval(each.mean[index].item(), each.half_width[index].item()) for index in shown]
        for name, each in told.items()
        if name not in (*ONLY_IN_FILES, "mse")  # no room for what explained_variance tells
    }
    seeds = max(map(len, among.members))
    which = "" if len(shown) == count else f", {len(shown)} of {count} settings"
    return {**axes, **measured}, f"mean over {seeds} seeds and half its 95 % interval{which}"


def _spread(rows: np.ndarray) -> np.ndarray:
    if len(rows) <= ROWS_IN_SUMMARY:
        return rows
    return rows[np.unique(np.linspace(0, len(rows) - 1, ROWS_IN_SUMMARY).astype(int))]


def _with_interval(mean: float, half_width: float) -> str:
    if not np.isfinite(half_width):
        return _cell(mean)
    # as many places as the interval's first digit tells apart
    places = max(0, min(6, 1 - int(np.floor(np.log10(half_width))))) if half_width > 0 else 3
    return f"{mean:.{places}f} ±{half_width:.{places}f}"


def _cell(value) -> str:
    if isinstance(value, float | np.floating):
        return "" if np.isnan(value) else f"{value:.3g}"
    return str(value)
