"""`--live`: a page that shows a run while it trains, served by the run itself."""

import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from sae_jax import distributed
from sae_jax.base import InputError, require
from sae_jax.cli.jobs import Job
from sae_jax.cli.options import Training
from sae_jax.cli.progress import StopSignals
from sae_jax.cli.serving import Answer, Server
from sae_jax.grid import Grid
from sae_jax.sweep import Look

HOST, PORT = "127.0.0.1", 8765
SECONDS_FRESH = 0.5
"""A state is not made again sooner, however many pages ask."""
SHARE_OF_A_CORE = 0.05
"""What making states may take of one, so that a sweep of many members does not wait for its page."""
SECONDS_WATCHED = 3.0
"""A page that asked so lately is still open."""
SECONDS_TO_FINISH, SECONDS_TO_STOP = 5.0, 2.0
"""How long a run that has ended waits for the pages that are open."""
LONGEST_NAME = 64  # of a page


class Told(NamedTuple):
    """A state as it is sent."""

    version: int
    tag: str
    body: bytes
    stopped: bool
    """Whether a page that has it waits for nothing more."""


class Live:
    """What a run tells its pages: `show` only keeps what it is given, and all else is done when a page asks.

    Args:
      table: the hyper-parameters of all members.
      steps: of each.
      where: a sentence on where the pages are; empty where nothing is served.
    """

    def __init__(self, table: Grid, steps: int, where: str):
        self.table, self.steps, self.where = table, steps, where
        self.run = secrets.token_hex(8)
        self.version, self.phase, self.words = 0, "training", ""
        self.report: bytes | None = None
        self.began: tuple[float, int] | None = None
        self.last: tuple[float, Look] | None = None
        self.looks: dict[tuple[int, int, int], Look] = {}
        self.pages: dict[str, float] = {}
        """When each page that is open asked last, by the name that it gives itself."""
        self.making, self.next_at = threading.Lock(), 0.0
        self.told = Told(-1, "", b"", stopped=False)

    @property
    def serves(self) -> bool:
        """Whether anybody can see the run."""
        return bool(self.where)

    def show(self, look: Look) -> None:
        """Keep what was logged; of the same members in the same round the latest is all."""
        now, points = time.monotonic(), look.history["step"]
        if self.began is None:
            self.began = now, look.member_steps  # what came before was compilation
        if len(points):
            self.looks[look.first, look.stop, int(points[0])] = look
        self.last = now, look
        self.version += 1

    def end(self, phase: str, words: str = "", report: Path | None = None) -> None:
        """Nothing more will come: "finished" with its report, or "stopped" with words on how to go on."""
        if self.serves and report is not None:
            self.report = report.read_bytes()
        self.words, self.phase = words, phase
        self.version += 1

    def state(self) -> Told:
        """What is known, as JSON; made at most as often as its making allows."""
        with self.making:
            version, phase, began = self.version, self.phase, time.monotonic()
            if version != self.told.version and (phase != "training" or began >= self.next_at):
                state = {"run": self.run, "phase": phase, "words": self.words, **self._state()}
                body = json.dumps(state, separators=(",", ":"), allow_nan=False)
                tag = f'"{self.run}-{version}"'
                self.told = Told(version, tag, body.encode(), stopped=phase == "stopped")
                now = time.monotonic()
                self.next_at = now + max(SECONDS_FRESH, (now - began) / SHARE_OF_A_CORE)
            return self.told

    def asked(self, page: str) -> None:
        """Note that a page is open."""
        now = time.monotonic()
        for name, at in list(self.pages.items()):
            if now - at >= SECONDS_WATCHED:
                self.left(name)
        self.pages[page[:LONGEST_NAME]] = now

    def left(self, page: str) -> None:
        """Note that a page has what it waited for."""
        self.pages.pop(page[:LONGEST_NAME], None)

    def farewell(self, hurry: Callable[[], bool]) -> None:
        """Wait until pages that are open have been told the end, for some seconds at most."""
        finished = self.report is not None
        until = time.monotonic() + (SECONDS_TO_FINISH if finished else SECONDS_TO_STOP)
        while self._watched() and time.monotonic() < until and not (finished and hurry()):
            time.sleep(0.05)

    def answer(self, page: bytes, path: str, asker: str) -> Answer | None:
        """What is at a path; None for nothing."""
        if path == "/":
            return Answer("text/html; charset=utf-8", page)
        if path == "/state.json":
            if asker:
                self.asked(asker)
            told = self.state()
            sent = partial(self.left, asker) if told.stopped else None
            return Answer("application/json", told.body, told.tag, sent)
        if path == "/report.html" and self.report is not None:
            return Answer("text/html; charset=utf-8", self.report, sent=partial(self.left, asker))
        return None

    def _watched(self) -> bool:
        now = time.monotonic()
        return any(now - at < SECONDS_WATCHED for at in list(self.pages.values()))

    def _state(self) -> dict[str, Any]:
        from sae_jax.report import live

        result = live.so_far(list(self.looks.values()), self.table)
        return {**self._progress(), "plots": {} if result is None else live.drawn(result)}

    def _progress(self) -> dict[str, Any]:
        """How far the run is: a share, and figures as the page shows them."""
        if self.last is None or self.began is None:
            return {"share": 0.0, "figures": {"done": "0%"}}
        (began, before), (now, look) = self.began, self.last
        share, speed = look.member_steps / look.total, (look.member_steps - before) / max(now - began, 1e-9)
        figures = {"done": f"{share:.0%}"}
        if speed and self.phase == "training":
            figures["time left"] = _duration((look.total - look.member_steps) / speed)
        if speed:
            figures["members/s"] = f"{speed / self.steps:,.3g}"
        figures |= {how: f"{number:,}" for how, number in look.ended.items() if number}
        return {"share": share, "figures": figures}


@contextmanager
def served(
    options: Training,
    kind: str,
    job: Job,
    asked: dict[str, Any],
    about: Mapping[str, str],
    signals: StopSignals,
) -> Iterator[Live]:
    """Serve the page of a run for as long as it goes on; of several processes the first does.

    Args:
      options: whether, and where.
      kind: "sweep" or "train".
      job: what is trained.
      asked: the run's request.
      about: what the page tells of the run beside it.
      signals: one that came makes a finished run wait for no page.

    Yields:
      What is to be told as the run goes on.

    Raises:
      InputError: the port is in use, or the address is not this machine's; raised by all processes.
    """
    for name in ("live_port", "live_host"):
        unused = options.live or getattr(options, name) is None
        require(unused, f"--{name.replace('_', '-')} is for --live, which serves the run")
    if not options.live:
        yield Live({}, job.steps, where="")
        return
    server, problem = None, None
    if distributed.first():
        try:
            host = HOST if options.live_host is None else options.live_host
            server = Server(host, PORT if options.live_port is None else options.live_port)
        except InputError as error:
            problem = str(error)
    distributed.all_well(problem)
    if server is None:
        yield Live({}, job.steps, where="")
        return
    with server:
        from sae_jax.report import live  # the second of matplotlib that a finished run needs anyway

        models = [one["model"] for one in asked.get("groups", ())]
        labels = [{name: model[name] for name in ("architecture", "d_sae")} for model in models]
        table = live.whole_table([group.grid for group in job.groups], labels)
        told = Live(table, job.steps, where(server))
        page = live.live_page(told.run, kind, job.members, job.steps, about).encode()
        server.start(partial(told.answer, page))
        hurry = lambda: signals.received is not None  # noqa: E731
        try:
            yield told
        except Exception:
            told.end("stopped", "The run ended early; its terminal says why.")
            told.farewell(hurry)
            raise
        told.farewell(hurry)


def where(server: Server) -> str:
    """Where the page is, and who sees it."""
    seen = "" if server.local else "; whoever reaches this address can see the run"
    return f"live at {server.url}{seen}"


def _duration(seconds: float) -> str:
    """Seconds as a person says them: "40 s", "12 min", "3.4 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:,.1f} h"
