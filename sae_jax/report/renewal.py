"""The report of a finished run, written anew from its folder."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sae_jax.grid import members
from sae_jax.metrics import stability_file
from sae_jax.metrics.stability import Stability
from sae_jax.report.figures import frontier_png
from sae_jax.report.page import sweep_page
from sae_jax.result import MOST_MATCHING, SweepResult
from sae_jax.synthetic import World, seed_tokens
from sae_jax.synthetic.tokens import SEED_TOKENS

STAGE = ".renewing"
OF_THE_TABLE = ("axes", "saved")
"""What `sweep.json` tells for `SweepResult.load`."""


def renew(folder: str | Path, truth: World | None = None) -> None:
    """Write `report.html` and `frontier.png` of a finished run anew, with what has come since.

    The page leads to the dashboards in `members/*/features/` and shows the labels beside the members. How
    far seeds agree is in the run's `stability.npz`; without it, it is worked out where all weights were saved
    and it takes no minutes.

    Args:
      folder: of a run, written by `sae-jax sweep` or `SweepResult.save`.
      truth: the world that its data come from, where it is known.

    Raises:
      InputError: no finished run, or a damaged one.

    Example:
      >>> renew("runs/first")
    """
    folder = Path(folder)
    result = SweepResult.load(folder)
    about = json.loads((folder / "sweep.json").read_text())
    tokens = seed_tokens() if about.get("data") == SEED_TOKENS else None
    told = {name: value for name, value in about.items() if name not in OF_THE_TABLE}
    # whether what comes back is true is asked of all members' weights
    truth = truth if len(result.kept) == members(result.grid) else None
    found = stability_file.read(folder) or _between_seeds(result)
    page = sweep_page(result, told, tokens, found, truth, dashboards(folder, result))
    with _staged(folder) as stage:
        (stage / "report.html").write_text(page, encoding="utf-8")
        frontier_png(result, stage / "frontier.png")


def dashboards(folder: Path, result: SweepResult) -> dict[int, str]:
    """Where the dashboards of a run's members lie, as seen from its folder."""
    found = {path.parts[-3]: path for path in (folder / "members").glob("*/features/index.html")}
    return {
        int(name): path.relative_to(folder).as_posix()
        for name, path in sorted(found.items())
        if name.isdecimal() and int(name) < members(result.grid)
    }


def _between_seeds(result: SweepResult) -> Stability | None:
    whole = len(result.kept) == members(result.grid)
    quick = whole and result.settings.repeated and result.matching <= MOST_MATCHING
    return result.stability() if quick else None


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """A folder whose files take the place of those in `folder` once all of them are whole."""
    stage = folder / STAGE
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir()
    try:
        yield stage
        for path in stage.iterdir():
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
