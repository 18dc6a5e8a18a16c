"""`sae-jax push SAE REPO_ID`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from sae_jax.formats.files import read_json
from sae_jax.trained import load


@dataclass
class Push:
    """Which SAE, and where to."""

    sae: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SAE")]
    """A file or folder in any known format, or another Hugging Face repository."""
    repo_id: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="REPO_ID")]
    """user/repo; made if it is not there."""
    path: Annotated[str, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")] = ""
    """A folder in it, where a repository holds several SAEs."""
    metrics: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """For the model card: what sae-jax eval --json printed."""
    private: bool = False
    """Make the repository private."""
    revision: Annotated[str | None, tyro.conf.arg(metavar="BRANCH", help_behavior_hint="")] = None
    """A branch in place of main; made if it is not there."""


def run(options: Push) -> int:
    """Push it, and tell the commit and what loads exactly that."""
    metrics = None if options.metrics is None else read_json(options.metrics)
    pushed = load(options.sae).push_to_hub(
        options.repo_id, options.path, metrics=metrics, private=options.private, revision=options.revision
    )
    print(pushed.url)
    print(pushed.origin)
    return 0
