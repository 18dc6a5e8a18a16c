"""Checkpoints are gone on with only by the request that they were made for."""

import json
from os import PathLike
from typing import Any

from sae_jax import distributed
from sae_jax.base import require
from sae_jax.checkpoint.places import place

REQUEST = "request.json"


def claim(folder: str | PathLike[str], request: dict[str, Any]) -> None:
    """Note what is asked for beside the checkpoints, or see that it is what they were made for.

    Args:
      folder: of all of a sweep's checkpoints, made if missing; a URL too.
      request: plain values.

    Raises:
      InputError: the folder holds checkpoints of another request; the message tells the differences.
    """
    path = place(folder) / REQUEST
    if path.exists():
        require_same(json.loads(path.read_text()), request, folder)
    elif distributed.first():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.parent / f".{REQUEST}"
        unfinished.write_text(json.dumps(request))
        unfinished.replace(path)


def require_same(before: dict[str, Any], now: dict[str, Any], folder: str | PathLike[str]) -> None:
    """Raise `InputError` with what differs, unless two requests are equal."""
    now = json.loads(json.dumps(now))
    changed = [name for name in now if before.get(name) != now[name]]
    differences = "; ".join(f"{name} was {before.get(name)}, now {now[name]}" for name in changed)
    require(
        not changed, f"{folder} is a run with other options, so these cannot go on with it: {differences}"
    )
