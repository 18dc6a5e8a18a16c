"""Checkpoints by orbax: a save is whole or absent, and the newest whole one is what is restored."""

import errno
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sae_jax.base import require

REQUEST = "request.json"
ROOM_TO_WRITE = 2**20
"""Bytes that a checkpoint may need beyond its arrays: metadata, and the files' own blocks."""


def save(folder: Path, step: int, state: Any, history: dict[str, np.ndarray]) -> None:
    """Write a checkpoint and drop the one before it. Returns once it is on disk.

    Args:
      folder: of this run's checkpoints, made if missing.
      step: steps done.
      state: any pytree of arrays.
      history: logs so far.

    Raises:
      OSError: the disk is full; the checkpoint before is then still there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # asked first, because orbax's threads answer a full disk with pages of traceback
    size = sum(leaf.nbytes for leaf in jax.tree.leaves((state, history)))
    if shutil.disk_usage(folder).free < 2 * size + ROOM_TO_WRITE:
        raise OSError(errno.ENOSPC, "no space left for a checkpoint", str(folder))
    ocp = _orbax()
    try:
        with _manager(folder) as manager:
            items = {"state": ocp.args.StandardSave(state)}
            if any(log.size for log in history.values()):  # orbax writes no array of size zero
                items["history"] = ocp.args.StandardSave(history)
            manager.save(step, args=ocp.args.Composite(**items), force=True)
    except Exception as error:
        for unfinished in folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(unfinished, ignore_errors=True)
        # tensorstore tells a full disk in words only
        if "No space left" in str(error) or "RESOURCE_EXHAUSTED" in str(error):
            raise OSError(errno.ENOSPC, "no space left for a checkpoint", str(folder)) from error
        raise


def restore(folder: Path, like: Any) -> tuple[int, Any, dict[str, np.ndarray]] | None:
    """The newest checkpoint, or None where there is none.

    Args:
      folder: as given to `save`.
      like: a state of the same structure, shapes and dtypes, concrete or from `jax.eval_shape`.

    Returns:
      Steps done, state, history.
    """
    if not folder.is_dir():
        return None
    ocp = _orbax()
    with _manager(folder) as manager:
        step = manager.latest_step()
        if step is None:
            return None
        items = {"state": ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, like))}
        if (folder / str(step) / "history").exists():
            items["history"] = ocp.args.StandardRestore()
        restored = manager.restore(step, args=ocp.args.Composite(**items))
    history = restored["history"] if "history" in items else {}
    return step, restored["state"], {name: np.asarray(log) for name, log in history.items()}


def claim(folder: Path, request: dict[str, Any]) -> None:
    """Note what is asked for beside the checkpoints, or see that it is what they were made for.

    Args:
      folder: of all of a sweep's checkpoints, made if missing.
      request: plain values.

    Raises:
      InputError: the folder holds checkpoints of another request; the message tells the differences.
    """
    path = folder / REQUEST
    if path.exists():
        require_same(json.loads(path.read_text()), request, folder)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(request))


def require_same(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Raise `InputError` with what differs, unless two requests are equal."""
    now = json.loads(json.dumps(now))
    changed = [name for name in now if before.get(name) != now[name]]
    differences = "; ".join(f"{name} was {before.get(name)}, now {now[name]}" for name in changed)
    require(
        not changed, f"{folder} is a run with other options, so these cannot go on with it: {differences}"
    )


def _manager(folder: Path):
    ocp = _orbax()
    options = ocp.CheckpointManagerOptions(max_to_keep=1, create=True, enable_async_checkpointing=False)
    return ocp.CheckpointManager(folder.absolute(), options=options)


def _orbax():
    # a second of import that only a run with checkpoints should pay
    import orbax.checkpoint as ocp

    logging.getLogger("absl").setLevel(logging.ERROR)
    return ocp
