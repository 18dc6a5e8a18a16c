"""What a person sees while a run goes on, and how they stop it."""

import signal
import time
from types import FrameType

import numpy as np
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from sae_jax.result import SweepResult
from sae_jax.sweep import Look

SECONDS_BETWEEN_LINES = 10.0
ROWS_IN_SUMMARY = 24


class Ticker:
    """A progress bar on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console, members: int, steps: int):
        self.console, self.members, self.steps = console, members, steps
        self.share = 0.0
        self.first: tuple[float, int] | None = None
        self.line_due = 0.0
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rates]}"),
            TimeRemainingColumn(),
            console=console,
            disable=console.quiet or not console.is_terminal,
        )

    def __enter__(self) -> "Ticker":
        self.say(f"training {counted(self.members)} for {self.steps} steps")
        self.bar.start()
        self.task = self.bar.add_task(counted(self.members), total=1.0, rates="compiling")
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
        speed = (look.member_steps - before) / max(now - began, 1e-9)
        rates = (
            f"{speed / self.steps:,.3g} members/s  {speed / self.members:,.0f} steps/s"
            if speed
            else "compiled"
        )
        self.bar.update(self.task, completed=self.share, rates=rates)
        if not self.console.is_terminal and now >= self.line_due:
            left = f"  {(look.total - look.member_steps) / speed:,.0f} s left" if speed else ""
            self.say(f"{self.share:.0%}  {rates}{left}")
            self.line_due = now + SECONDS_BETWEEN_LINES


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


def summary(result: SweepResult) -> Table:
    """The members, or where they are many the frontier, as a table."""
    table = result.table
    count = len(table["member"])
    shown = np.arange(count) if count <= ROWS_IN_SUMMARY else result.frontier()
    if len(shown) > ROWS_IN_SUMMARY:
        shown = shown[np.unique(np.linspace(0, len(shown) - 1, ROWS_IN_SUMMARY).astype(int))]
    diverged = int((result.status != "ok").sum())
    title = "all members" if len(shown) == count else f"{len(shown)} on the frontier of {count} members"
    constant = [name for name in result.grid if count > 1 and len(np.unique(table[name])) == 1]
    for name in constant:
        title += f", {name} {_cell(table.pop(name)[0])}"
    view = Table(
        box=box.SIMPLE, padding=(0, 1, 0, 0), title=f"{title}, {diverged} diverged" if diverged else title
    )
    for name in table:
        view.add_column(name.replace("_", " "), justify="right", no_wrap=name == "status")
    for index in shown:
        view.add_row(*(_cell(column[index]) for column in table.values()))
    return view


def _cell(value) -> str:
    if isinstance(value, float | np.floating):
        return "" if np.isnan(value) else f"{value:.3g}"
    return str(value)
