"""The processes of one command on many hosts: how they find one another and speak with one voice."""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Annotated

import tyro

from sae_jax import distributed
from sae_jax.base import InputError
from sae_jax.cli.errors import told


@dataclass(frozen=True)
class Processes:
    """Where this command stands among others like it; what is left out is what the launcher tells."""

    coordinator: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT", help_behavior_hint="")] = None
    """Where process 0 is reached. Slurm, Open MPI, SkyPilot and Cloud TPU tell it."""
    processes: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="")] = None
    """How many there are, on all hosts; 1 for this one alone, whatever the launcher tells."""
    process: Annotated[int | None, tyro.conf.arg(metavar="I", help_behavior_hint="")] = None
    """Which one this is, from 0."""
    wait: float = distributed.SECONDS_TO_GATHER
    """Seconds to wait for the others."""


@contextmanager
def joined(options: Processes) -> Iterator[distributed.Here]:
    """All processes together, for as long as the block lasts: only the first writes to the screen.

    An error that is told in a sentence, in any of them, is told by the first, and all exit with 2.

    Raises:
      InputError: as `distributed.together`, and for errors of the operating system.
    """
    with distributed.together(
        options.coordinator,
        options.processes,
        options.process,
        seconds=options.wait,
        then="start all of them again with --resume to go on from the last checkpoint",
    ) as here:
        try:
            with _voice(here):
                yield here
        except BrokenPipeError:
            raise
        except OSError as error:
            raise InputError(told(error)) from error


@contextmanager
def _voice(here: distributed.Here) -> Iterator[None]:
    """Silence all but the first, and what libraries write past Python: --json is read by programs."""
    if here.processes == 1:
        yield
        return
    with ExitStack() as stack:
        nowhere = stack.enter_context(open(os.devnull, "w"))
        sys.stdout.flush()
        screen = stack.enter_context(os.fdopen(os.dup(1), "w"))
        os.dup2(nowhere.fileno(), 1)
        stack.callback(os.dup2, screen.fileno(), 1)
        stack.enter_context(redirect_stdout(screen if here.process == 0 else nowhere))
        stack.enter_context(redirect_stderr(sys.stderr if here.process == 0 else nowhere))
        yield
