"""What test_distributed.py starts several of: python fellows.py HOST:PORT PROCESSES PROCESS HOW PART."""

import os
import sys
import time
from contextlib import nullcontext

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sae_jax import distributed
from sae_jax.base import InputError


def agreement(here):
    """What each makes of values that differ."""
    third = 1 / 3
    long = "long" * 100 * (here.process + 1)
    print(distributed.first(), distributed.leader(third + here.process) == third)
    print(distributed.leader(2**53 + 1 + here.process) == 2**53 + 1, len(distributed.leader(long)))
    print(distributed.any_of(here.process == 1), distributed.any_of(False))
    distributed.agree({"same": [1, 2.5, None], "long": "x" * 1000})
    distributed.all_well(None)


def trained(here):
    """All-reduce after all-reduce, as steps are."""
    mesh = jax.make_mesh((here.processes,), ("data",))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    x = jax.make_array_from_callback((8, 4), rows, lambda where: np.ones((8, 4), np.float32)[where])
    step = jax.jit(lambda x: x / x.sum(), out_shardings=rows)
    x = step(x).block_until_ready()
    print("going", flush=True)
    while True:
        x = step(x).block_until_ready()


def idle(here):
    """Nothing to wait for but each other."""
    print("going", flush=True)
    time.sleep(600)


def refused(here):
    """The second is given what cannot be used, while the first is at work."""
    if here.process == 1:
        raise InputError("acts.npy does not exist")
    trained(here)


def broken(here):
    """A mistake of ours in the second."""
    if here.process == 1:
        raise KeyError("a mistake")
    idle(here)


def other_data(here):
    """Hosts with different files."""
    distributed.agree({"steps": 5, "data": f"digest {here.process}"})


def not_well(here):
    """One of them cannot."""
    distributed.all_well("no room on the disk" if here.process == 1 else None)


def late(here):
    """The first is done sooner."""
    time.sleep(here.process)
    print("done", flush=True)


def other_version(here):
    """Never comes to run."""
    print("ran")


HOW = {"together": distributed.together, "init": lambda *a, **b: nullcontext(distributed.init(*a, **b))}

if __name__ == "__main__":
    coordinator, processes, process, how, part = sys.argv[1:]
    if part == "other_version":
        ours = distributed.versions()
        distributed.versions = lambda: {**ours, "jaxlib": ours["jaxlib"] + ".post" * int(process)}
    try:
        with HOW[how](
            coordinator,
            int(processes),
            int(process),
            seconds=float(os.environ.get("SECONDS_TO_GATHER", 60)),
        ) as here:
            globals()[part](here)
    except InputError as error:
        print(f"told: {error}", file=sys.stderr)
        sys.exit(2)
