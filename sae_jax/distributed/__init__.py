"""Many hosts: JAX's processes, found by their launcher, that agree with one another and end together."""

import atexit
import importlib.util
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from sae_jax.base import InputError, require
from sae_jax.distributed import launchers, line

ROOM = 256
"""Bytes that one exchange carries; what is longer takes a second."""
SECONDS_TO_GATHER = 300.0
HEARTBEAT_SECONDS = 60
"""JAX itself gives up a process that hangs, after half to all of it: later than the line one that is gone."""


class Here(NamedTuple):
    """Which process of how many this is."""

    process: int
    processes: int


def init(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    seconds: float = SECONDS_TO_GATHER,
    then: str = "start all of them again to go on from the last checkpoint",
) -> Here:
    """Join the other processes of a run, as the launcher or the arguments tell; alone where neither does.

    Must come before anything touches a device. Slurm, Open MPI, SkyPilot, TPU slices on Kubernetes and the
    variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID are known here, other Cloud TPU
    machines by JAX itself. From then on a process that dies ends the others, each with one sentence and exit
    status 3, and a program that is over waits for the others.

    Args:
      coordinator: HOST:PORT of process 0; what is None is the launcher's.
      processes: how many there are; 1 for this one alone, whatever the launcher tells.
      process: which one this is, from 0.
      seconds: how long to wait for the others.
      then: what a reader is told to do when a process is gone.

    Returns:
      `Here(process, processes)`.

    Raises:
      InputError: a process cannot be reached or does not come, or has other versions.

    Example:
      >>> here = init("10.0.0.4:8476", processes=2, process=1)  # doctest: +SKIP
    """
    block = ExitStack()
    here = block.enter_context(together(coordinator, processes, process, seconds=seconds, then=then))
    atexit.register(block.close)
    told_before = sys.excepthook

    def told(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        block.__exit__(kind, error, trace)  # where another process is gone, this does not return
        told_before(kind, error, trace)

    sys.excepthook = told
    return here


@contextmanager
def together(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    seconds: float = SECONDS_TO_GATHER,
    then: str = "start all of them again to go on from the last checkpoint",
) -> Iterator[Here]:
    """`init` for a block, at the end of which the processes wait for one another.

    An `InputError` in any of them ends all with exit status 2, and only the first process tells it.
    """
    place = _place(coordinator, processes, process)
    if place is None:
        yield _by_jax(seconds)
        return
    if place.processes == 1:
        yield Here(0, 1)
        return
    lines = _met(place, seconds, then)
    lines.watch()
    try:
        _start(
            seconds,
            coordinator_address=f"127.0.0.1:{lines.jax_port}",
            num_processes=place.processes,
            process_id=place.process,
            local_device_ids=place.local,
            cluster_detection_method="deactivate",
        )
        yield Here(place.process, place.processes)
    except InputError as error:
        lines.refuse(str(error))
        _leave(line.REFUSED)
        raise
    except Exception:
        lines.wait()
        _leave(1)
        raise
    except BaseException as error:
        _leave(130 if isinstance(error, KeyboardInterrupt) else 1)
        raise
    lines.goodbye()
    jax.distributed.shutdown()


def several() -> bool:
    """Whether this process has others beside it. Touches no device where it has none."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def first() -> bool:
    """Whether this process is the one that writes and talks."""
    return not several() or jax.process_index() == 0


def leader(value: Any) -> Any:
    """A plain value as the first process has it. All processes must call it, in the same order.

    Example:
      >>> leader(12)
      12
    """
    return _everyone(value)[0]


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any process. All processes must call it, in the same order."""
    return any(_everyone(bool(flag)))


def agree(what: dict[str, Any]) -> None:
    """See that all processes have equal values. All processes must call it, in the same order.

    Args:
      what: plain values by name.

    Raises:
      InputError: one has another; raised by all.

    Example:
      >>> agree({"sae_jax": "0.1.0", "data": "sha256:..."})
    """
    all_have = _everyone([socket.gethostname(), json.loads(json.dumps(what))])
    for process, (host, has) in enumerate(all_have):
        name = f"process {process} of {len(all_have)} on {host}"
        different = line.difference(all_have[0][1], has, name)
        require(different is None, str(different))


def all_well(error: str | None) -> None:
    """Go on only if no process has an error. All processes must call it, in the same order.

    Args:
      error: a sentence, or None if all is well here.

    Raises:
      InputError: with the sentence of the first process that has one; raised by all.
    """
    sentence = next((each for each in _everyone(error) if each is not None), None)
    require(sentence is None, str(sentence))


def versions() -> dict[str, str]:
    """What must be the same wherever one program runs."""
    found = {name: version(name) for name in ("sae-jax", "jax", "jaxlib")}
    return {"python": f"{sys.version_info.major}.{sys.version_info.minor}", **found}


def _everyone(value: Any) -> list[Any]:
    """Every process's value, by its number."""
    if not several():
        return [value]
    text = json.dumps(value).encode()
    size = np.frombuffer(np.uint32(len(text)).tobytes(), np.uint8)
    start = _padded(text, ROOM)
    told = multihost_utils.process_allgather(np.concatenate([size, start]))
    sizes = np.ascontiguousarray(told[:, :4]).view(np.uint32)[:, 0]
    rows = told[:, 4:]
    if sizes.max() > ROOM:
        # a power of two, so that few programs are compiled
        rows = multihost_utils.process_allgather(_padded(text, 1 << int(sizes.max()).bit_length()))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def _padded(text: bytes, room: int) -> np.ndarray:
    return np.frombuffer(text[:room].ljust(room, b"\0"), np.uint8)


def _place(coordinator: str | None, processes: int | None, process: int | None) -> launchers.Place | None:
    """What was asked for, and for the rest what the launcher tells."""
    if processes == 1:
        return launchers.Place(None, 1, 0)
    asked = {"coordinator": coordinator, "processes": processes, "process": process}
    given = {name: value for name, value in asked.items() if value is not None}
    place = launchers.find(os.environ)
    if place is None and not given:
        return None
    if place is None:
        missing = ", ".join(name for name in asked if name not in given)
        require(not missing, f"no launcher tells the other processes here: give {missing} as well")
        place = launchers.Place(**given)
    place = place._replace(**given)
    index, count = place.process, place.processes
    require(0 <= index < count, f"{count} processes are numbered from 0 to {count - 1}, got process {index}")
    return place


def _met(place: launchers.Place, seconds: float, then: str) -> line.Line:
    """The line to the others, once all are there."""
    require(place.coordinator is not None, "the launcher does not tell the coordinator: give its HOST:PORT")
    host, _, port = str(place.coordinator).rpartition(":")
    good = bool(host) and port.isdecimal() and 0 < int(port) < 2**16
    require(good, f"a coordinator is given as HOST:PORT, got {place.coordinator}")
    how = (place.processes, versions(), then, seconds)
    if place.process == 0:
        return line.gather(int(port), *how)
    return line.join(host.strip("[]"), int(port), place.process, *how)


def _by_jax(seconds: float) -> Here:
    """What JAX itself finds on a Cloud TPU machine; alone anywhere else."""
    if importlib.util.find_spec("libtpu") is None:
        return Here(0, 1)
    try:
        _start(seconds)
    except ValueError:  # no machine with TPUs after all
        return Here(0, 1)
    return Here(jax.process_index(), jax.process_count())


def _start(seconds: float, **where: Any) -> None:
    # JAX's own service would take every SIGTERM for itself, and nobody here asks it
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        **where, initialization_timeout=int(seconds), heartbeat_timeout_seconds=HEARTBEAT_SECONDS
    )


def _leave(status: int) -> None:
    """Have this process end without waiting for the others, as JAX's own farewell would."""

    def end() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    atexit.register(end)
