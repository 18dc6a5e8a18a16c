"""Arrays by name to a folder and back, by orbax."""

import logging
import math
import sys
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

TEMPORARY = ".orbax-checkpoint-tmp"
"""What orbax appends to a folder's name until all of it is written."""


def copied(leaf: Any) -> Any:
    """What stays as it is when `leaf` is donated: on a CPU the host's view of an array is the array itself.

    From other devices orbax copies before it returns.
    """
    if not isinstance(leaf, jax.Array):
        return np.array(leaf)
    return jnp.copy(leaf) if next(iter(leaf.sharding.device_set)).platform == "cpu" else leaf


def write(folder: epath.Path, arrays: dict[str, Any], last: Callable[[epath.Path], None]) -> Any:
    """Start to write a folder, in place of one that is there. Every process of a run takes part.

    Args:
      folder: put in place in one rename, or in a bucket by a mark, once it is all written.
      arrays: JAX's, which may be spread over processes, and numpy's, which the first process writes.
      last: called in the first process with the unfinished folder, when all have written.

    Returns:
      What writes: `wait_until_finished()` raises what failed, `close()` lets go of it.
    """
    ocp = _orbax()
    unfinished = folder if "://" in str(folder) else folder.parent / f"{folder.name}{TEMPORARY}"
    options = ocp.AsyncOptions(post_finalization_callback=lambda: last(unfinished))
    writer = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler(), async_options=options)
    try:
        # orbax writes no array of size zero
        filled = {name: leaf for name, leaf in arrays.items() if leaf.size}
        writer.save(folder, args=ocp.args.StandardSave(filled), force=True)
    except BaseException:
        writer.close()
        raise
    return writer


def read(folder: epath.Path, like: dict[str, Any]) -> dict[str, Any]:
    """Arrays of a written folder.

    Args:
      folder: as given to `write`.
      like: the same names, shapes and dtypes: numpy arrays for those of the host; for those of devices
        JAX's, or a `jax.ShapeDtypeStruct` each, whose shardings they get, or else the default device.
    """
    targets = {name: leaf if isinstance(leaf, np.ndarray) else _spread(leaf) for name, leaf in like.items()}
    filled = {name: leaf for name, leaf in targets.items() if math.prod(leaf.shape)}
    with _orbax().StandardCheckpointer() as reader:
        found = reader.restore(folder, filled)
    return {name: found[name] if name in found else _empty(leaf) for name, leaf in targets.items()}


def _spread(leaf: Any) -> jax.ShapeDtypeStruct:
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or device)


def _empty(leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray):
        return leaf
    return jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)


@cache
def _orbax():
    # a second of import that only a run with checkpoints should pay
    import orbax.checkpoint as ocp

    # its threads log what fails with pages of traceback; who waits for them tells it in a sentence
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    sys.unraisablehook = partial(_unless_late, sys.unraisablehook)
    return ocp


def _unless_late(tell: Callable[[Any], Any], unraisable: Any) -> None:
    """Of a write that failed, the parts that end after it report to a loop that is gone."""
    if str(unraisable.exc_value) != "Event loop is closed":
        tell(unraisable)
