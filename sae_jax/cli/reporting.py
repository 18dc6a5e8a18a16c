"""`sae-jax report RUN`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from sae_jax.base import InputError, require
from sae_jax.cli.folder import CHECKPOINTS, FINISHED
from sae_jax.cli.jobs import world
from sae_jax.cli.lock import locked
from sae_jax.synthetic import World


@dataclass
class Report:
    """Which run."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """The folder of a finished run: runs/first."""
    quiet: bool = False
    """Say nothing."""


def run(options: Report) -> int:
    """Write the report of a finished run anew, and say where it is."""
    renewed(options.run)
    console = Console(stderr=True, quiet=options.quiet)
    console.print(f"wrote {options.run / 'report.html'} and frontier.png", highlight=False, soft_wrap=True)
    return 0


def renewed(folder: Path) -> None:
    """Write `report.html` and `frontier.png` of a finished run anew; see `report.renew`.

    Raises:
      InputError: no folder, one of no run, of a run that is not finished, or one in use.
    """
    require(folder.is_dir(), f"{folder} is no folder: give the one that a sweep wrote, such as runs/first")
    require(
        not (folder / CHECKPOINTS).exists(),
        f"the run in {folder} is not finished: its command with --resume goes on with it",
    )
    require((folder / FINISHED).is_file(), f"{folder} holds no run: it has no {FINISHED}")
    from sae_jax import report  # a second of matplotlib, of which bad input has no need

    with locked(folder):
        report.renew(folder, truth_of(folder))


def truth_of(folder: Path) -> World | None:
    """The world that the run's data came from, made again; None where there is none, or it is not told."""
    try:
        told: dict[str, Any] = json.loads((folder / FINISHED).read_text()).get("world") or {}
        return world(told["name"], told["arguments"], data_seed=told["data_seed"])
    except (InputError, ValueError, KeyError, TypeError, AttributeError):
        return None
