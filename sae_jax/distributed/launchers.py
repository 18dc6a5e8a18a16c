"""Where a process stands among the others, as the launcher that started it tells in its environment."""

import re
import zlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

from sae_jax.base import require

Environment = Mapping[str, str]

PORT = 8476
"""Of the first process, where a launcher gives each job hosts of its own."""
PORTS = range(61_440, 65_536)
"""Of the first process, where jobs share hosts: one is picked by the job's number."""
VISIBLE = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


class Place(NamedTuple):
    """One of several processes."""

    coordinator: str | None
    """HOST:PORT of the first process; None where the launcher does not tell it."""
    processes: int
    process: int
    local: int | None = None
    """Which of its host's accelerators is this process's; None for all."""


def find(environment: Environment) -> Place | None:
    """What the first launcher in the table tells, or None where there is none.

    Args:
      environment: variables by name, such as `os.environ`.

    Raises:
      InputError: a launcher's variable that should be a number is none.

    Example:
      >>> find({"SKYPILOT_NODE_IPS": "10.0.0.4\\n10.0.0.5", "SKYPILOT_NUM_NODES": "2",
      ...       "SKYPILOT_NODE_RANK": "1"})
      Place(coordinator='10.0.0.4:8476', processes=2, process=1, local=None)
    """
    places = (launcher(environment) for launcher in LAUNCHERS)
    return next((place for place in places if place is not None), None)


def variables(environment: Environment) -> Place | None:
    """JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, which a JobSet's manifest sets.

    The pods of an indexed Kubernetes Job have their number in JOB_COMPLETION_INDEX already.
    """
    if "JAX_NUM_PROCESSES" not in environment:
        return None
    process = "JAX_PROCESS_ID" if "JAX_PROCESS_ID" in environment else "JOB_COMPLETION_INDEX"
    return Place(
        environment.get("JAX_COORDINATOR_ADDRESS"),
        _number(environment, "JAX_NUM_PROCESSES"),
        _number(environment, process),
    )


def open_mpi(environment: Environment) -> Place | None:
    """`mpirun`. Open MPI 4 tells the host on which it runs; 5 tells none, unless all processes share one."""
    if "OMPI_COMM_WORLD_SIZE" not in environment:
        return None
    processes, here = (_number(environment, f"OMPI_COMM_WORLD_{size}") for size in ("SIZE", "LOCAL_SIZE"))
    # 1531576320.0;tcp://10.96.0.1,10.148.0.1:34911, or tcp6://[fe80::1,fe80::2]:34911
    told = re.search(r"tcp6?://\[?([^],]+?)(?=[],]|:\d+$)", environment.get("OMPI_MCA_orte_hnp_uri", ""))
    host = "127.0.0.1" if here == processes else told and told[1]
    job = environment.get("PMIX_NAMESPACE", environment.get("OMPI_MCA_ess_base_jobid", ""))
    return Place(
        f"{host}:{_port(job)}" if host else None,
        processes,
        _number(environment, "OMPI_COMM_WORLD_RANK"),
        _own_device(environment, "OMPI_COMM_WORLD_LOCAL_RANK", alone=here == 1),
    )


def skypilot(environment: Environment) -> Place | None:
    """SkyPilot: one process a node."""
    if "SKYPILOT_NODE_IPS" not in environment:
        return None
    return Place(
        f"{environment['SKYPILOT_NODE_IPS'].split()[0]}:{PORT}",
        _number(environment, "SKYPILOT_NUM_NODES"),
        _number(environment, "SKYPILOT_NODE_RANK"),
    )


def slurm(environment: Environment) -> Place | None:
    """The tasks of one `srun`; a batch script's own shell is not among them."""
    if "SLURM_STEP_NODELIST" not in environment or "SLURM_PROCID" not in environment:
        return None
    job, step = environment.get("SLURM_JOB_ID", ""), environment.get("SLURM_STEP_ID", "")
    processes = _number(environment, "SLURM_STEP_NUM_TASKS")
    alone = processes == _number(environment, "SLURM_STEP_NUM_NODES")
    return Place(
        f"{_first_host(environment['SLURM_STEP_NODELIST'])}:{_port(f'{job}.{step}')}",
        processes,
        _number(environment, "SLURM_PROCID"),
        _own_device(environment, "SLURM_LOCALID", alone),
    )


def cloud_tpu(environment: Environment) -> Place | None:
    """The hosts of TPU slices on Google Kubernetes Engine: one process a host, slice after slice."""
    hosts = environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES"))
    if hosts is None or "TPU_WORKER_ID" not in environment:
        return None
    names = [host.partition(":")[0] for host in hosts.split(",")]
    slices = {"MEGASCALE_NUM_SLICES": "1", "MEGASCALE_SLICE_ID": "0", **environment}
    first = environment.get("MEGASCALE_COORDINATOR_ADDRESS", names[0]).partition(":")[0]
    before = len(names) * _number(slices, "MEGASCALE_SLICE_ID")
    return Place(
        f"{first}:{PORT}",
        len(names) * _number(slices, "MEGASCALE_NUM_SLICES"),
        before + _number(environment, "TPU_WORKER_ID"),
    )


LAUNCHERS: tuple[Callable[[Environment], Place | None], ...] = (
    variables,
    # before slurm: what mpirun starts within a job bears the variables of both, and only its own are right
    open_mpi,
    skypilot,
    slurm,
    cloud_tpu,
)


def _number(environment: Environment, name: str) -> int:
    value = environment.get(name, "")
    require(value.isdecimal(), f"the launcher's {name} should be a number, got {value!r}")
    return int(value)


def _own_device(environment: Environment, name: str, alone: bool) -> int | None:
    """Processes that share a host take one accelerator each, unless the launcher showed them one only."""
    shown = next((environment[each] for each in VISIBLE if environment.get(each)), None)
    return None if alone or (shown is not None and "," not in shown) else _number(environment, name)


def _first_host(hosts: str) -> str:
    """Of Slurm's list: "node7", "node7,other", "node[007-015,21],other"."""
    name, bracket, numbers = hosts.partition("[")
    if not bracket or "," in name:
        return hosts.partition(",")[0]
    return name + numbers.replace("-", ",").replace("]", ",").partition(",")[0]


def _port(job: str) -> int:
    return PORTS[zlib.crc32(job.encode()) % len(PORTS)]
