"""Several processes: they find one another, agree, speak with one voice, and end together."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from sae_jax import distributed
from sae_jax.base import InputError
from sae_jax.distributed.launchers import PORT, Place, find

FELLOWS = Path(__file__).parent / "fellows.py"
SECONDS_TO_END = 60
"""Of the issue; what is measured is under one."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def start(coordinator, processes, process, part, how="together", **environment):
    """One process, as a user's program is."""
    words = [sys.executable, FELLOWS, coordinator, processes, process, how, part]
    return subprocess.Popen(
        list(map(str, words)),
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def both(part, how="together"):
    """What two processes printed, said and exited with."""
    coordinator = f"127.0.0.1:{free_port()}"
    pair = [start(coordinator, 2, process, part, how) for process in (0, 1)]
    told = [process.communicate(timeout=120) for process in pair]
    return [(process.returncode, *said) for process, said in zip(pair, told, strict=True)]


def lines(printed):
    """What was printed by us: gloo counts its connections on stdout."""
    return [line for line in printed.splitlines() if not line.startswith("[Gloo]")]


def test_what_the_first_process_has_is_what_all_have():
    (status, printed, said), (other_status, other_printed, other_said) = both("agreement")
    assert (status, said) == (0, "")
    assert (other_status, other_said) == (0, "")
    assert lines(printed) == ["True True", "True 400", "True False"]
    assert lines(other_printed) == ["False True", "True 400", "True False"]


def test_alone_it_costs_nothing():
    code = """
from jax._src import xla_bridge
from sae_jax import distributed
here = distributed.init()
assert here == (0, 1), here
assert distributed.first() and distributed.leader([1.5]) == [1.5]
assert distributed.any_of(True) and not distributed.any_of(False)
distributed.agree({"steps": 5})
distributed.all_well(None)
assert not xla_bridge.backends_are_initialized()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(InputError, match="no room"):
        distributed.all_well("no room")


@pytest.mark.parametrize(
    ("part", "how", "by"),
    # JAX of itself would have a process outlive SIGTERM, and say nothing
    [("trained", "init", signal.SIGKILL), ("idle", "together", signal.SIGTERM)],
)
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_other_with_one_sentence(victim, part, how, by):
    coordinator = f"127.0.0.1:{free_port()}"
    pair = [start(coordinator, 2, process, part, how) for process in (0, 1)]
    for process in pair:
        while process.stdout.readline() not in ("going\n", ""):
            pass
    time.sleep(0.5)
    pair[victim].send_signal(by)
    began = time.monotonic()
    _, said = pair[1 - victim].communicate(timeout=SECONDS_TO_END)
    seconds = time.monotonic() - began
    pair[victim].communicate()
    assert pair[victim].returncode == -by
    name = f"process {victim} of 2 on {socket.gethostname()}"
    sentence = f"{name} is gone: start all of them again to go on from the last checkpoint"
    assert said == f"sae-jax: {sentence}\n"
    assert pair[1 - victim].returncode == 3
    assert seconds < SECONDS_TO_END


def test_a_mistake_in_one_is_seen_there_and_ends_the_other():
    (status, _, said), (other_status, _, other_said) = both("broken", "init")
    assert other_status == 1
    assert "KeyError: 'a mistake'" in other_said
    assert status == 3
    assert said.startswith("sae-jax: process 1 of 2 on ")
    assert said.count("\n") == 1


def test_bad_input_in_one_is_one_sentence_of_the_first():
    (status, _, said), (other_status, _, other_said) = both("refused")
    assert (status, other_status) == (2, 2)
    assert said == f"sae-jax: acts.npy does not exist (process 1 of 2 on {socket.gethostname()})\n"
    assert other_said == ""


@pytest.mark.parametrize(
    ("part", "sentence"),
    [
        ("other_data", "process 1 of 2 on {host} has data digest 1, the first process digest 0"),
        ("not_well", "no room on the disk"),
        ("other_version", "process 1 of 2 on {host} has jaxlib {jaxlib}.post, the first process {jaxlib}"),
    ],
)
def test_hosts_that_differ_are_one_sentence_of_the_first(part, sentence):
    (status, printed, said), (other_status, other_printed, other_said) = both(part)
    assert (status, other_status) == (2, 2)
    sentence = sentence.format(host=socket.gethostname(), jaxlib=distributed.versions()["jaxlib"])
    assert sentence in said
    assert said.count("\n") == 1
    assert other_said == ""
    assert lines(printed) == lines(other_printed) == []


def test_processes_that_are_done_wait_for_the_others():
    (status, printed, said), (other_status, other_printed, other_said) = both("late", "init")
    assert (status, said, other_status, other_said) == (0, "", 0, "")
    assert lines(printed) == lines(other_printed) == ["done"]


@pytest.mark.parametrize(
    ("coordinator", "process", "says"),
    [
        ("127.0.0.1:{port}", 1, "no process 0 at 127.0.0.1:{port} within 1 s (Connection refused)"),
        ("no.such.host:{port}", 1, "no process 0 at no.such.host:{port} within 1 s ("),
        ("127.0.0.1:{port}", 0, "process 1 of 2 did not come to {host}:{port} within 1 s"),
        ("127.0.0.1:99999", 1, "a coordinator is given as HOST:PORT, got 127.0.0.1:99999"),
        ("127.0.0.1", 1, "a coordinator is given as HOST:PORT, got 127.0.0.1"),
        ("127.0.0.1:{port}", 2, "2 processes are numbered from 0 to 1, got process 2"),
    ],
)
def test_who_cannot_be_reached_is_a_sentence_within_the_time_given(coordinator, process, says):
    port = free_port()
    coordinator, says = (text.format(port=port, host=socket.gethostname()) for text in (coordinator, says))
    with pytest.raises(InputError) as refused, distributed.together(coordinator, 2, process, seconds=1):
        pass
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_port_in_use_is_a_sentence():
    with (
        socket.create_server(("", 0)) as server,
        pytest.raises(InputError, match="cannot listen at port"),
        distributed.together(f"127.0.0.1:{server.getsockname()[1]}", 2, 0, seconds=1),
    ):
        pass


def test_a_stranger_at_the_port_is_not_counted():
    port = free_port()
    environment = {"SECONDS_TO_GATHER": "20"}
    first = start(f"127.0.0.1:{port}", 2, 0, "late", **environment)
    for _ in range(100):
        try:
            with socket.create_connection(("127.0.0.1", port)) as stranger:
                stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            break
        except OSError:
            time.sleep(0.2)
    second = start(f"127.0.0.1:{port}", 2, 1, "late", **environment)
    for process in (first, second):
        printed, said = process.communicate(timeout=60)
        assert (process.returncode, lines(printed), said) == (0, ["done"], "")


def test_what_is_missing_is_named():
    with pytest.raises(InputError, match="give process as well"), distributed.together("host:1", 2):
        pass


SLURM = {
    "SLURM_JOB_ID": "71",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "node[007-010,21],other",
    "SLURM_STEP_NUM_NODES": "5",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
SKYPILOT = {
    "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5",
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NODE_RANK": "1",
}
TPU = {"TPU_WORKER_HOSTNAMES": "t-0.svc,t-1.svc", "TPU_WORKER_ID": "1"}


@pytest.mark.parametrize(
    ("environment", "host", "rest"),
    [
        ({}, None, None),
        (SLURM, "node007", (5, 3, None)),
        ({**SLURM, "SLURM_STEP_NODELIST": "a7,b[1-2]", "SLURM_STEP_NUM_NODES": "3"}, "a7", (5, 3, 0)),
        ({**SLURM, "SLURM_STEP_NUM_NODES": "3", "CUDA_VISIBLE_DEVICES": "2"}, "node007", (5, 3, None)),
        ({**SLURM, "SLURM_STEP_NODELIST": "n[1,3]"}, "n1", (5, 3, None)),
        ({"SLURM_JOB_ID": "71", "SLURM_NTASKS": "5", "SLURM_PROCID": "0"}, None, None),  # a batch script
        (OPEN_MPI, "10.96.0.1", (4, 3, 1)),
        ({**OPEN_MPI, "OMPI_MCA_orte_hnp_uri": "1.0;tcp6://[fe80::1]:34911"}, "fe80::1", (4, 3, 1)),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, "127.0.0.1", (4, 3, 1)),
        ({**SLURM, **OPEN_MPI}, "10.96.0.1", (4, 3, 1)),
        (SKYPILOT, "10.0.0.4", (2, 1, None)),
        (TPU, "t-0.svc", (2, 1, None)),
        (
            {**TPU, "MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "2",
             "MEGASCALE_COORDINATOR_ADDRESS": "s-0.svc:8080"},
            "s-0.svc", (6, 5, None),
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "w-0-0.w:1", "JAX_NUM_PROCESSES": "2", "JOB_COMPLETION_INDEX": "1"},
            "w-0-0.w", (2, 1, None),
        ),
    ],
)  # fmt: skip
def test_a_launcher_tells_where_a_process_stands(environment, host, rest):
    found = find(environment)
    if host is None:
        assert found is None
        return
    assert found is not None
    where, _, port = str(found.coordinator).rpartition(":")
    assert where == host
    assert 0 < int(port) < 2**16
    assert found[1:] == rest


def test_all_processes_of_a_launcher_name_one_port():
    others = [find({**SLURM, "SLURM_PROCID": str(process)}) for process in range(5)]
    assert len({place.coordinator for place in others}) == 1
    assert find({**SLURM, "SLURM_STEP_ID": "1"}).coordinator != others[0].coordinator
    assert find(SKYPILOT) == Place(f"10.0.0.4:{PORT}", 2, 1)


def test_open_mpi_5_on_several_hosts_needs_the_coordinator(monkeypatch):
    for name, value in OPEN_MPI.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("OMPI_MCA_orte_hnp_uri")
    with pytest.raises(InputError, match="does not tell the coordinator"), distributed.together():
        pass


def test_arguments_win_over_the_launcher(monkeypatch):
    for name, value in SKYPILOT.items():
        monkeypatch.setenv(name, value)
    with distributed.together(processes=1) as here:
        assert here == (0, 1)
    says = "no process 0 at 127.0.0.1:1 within 0 s"
    with pytest.raises(InputError, match=says), distributed.together("127.0.0.1:1", seconds=0):
        pass
    monkeypatch.setenv("SKYPILOT_NODE_RANK", "first")
    with pytest.raises(InputError, match="SKYPILOT_NODE_RANK should be a number"), distributed.together():
        pass


def test_a_launcher_with_one_process_is_no_run_of_many(monkeypatch):
    place = {"SKYPILOT_NODE_IPS": "10.0.0.4", "SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    with distributed.together() as here:
        assert here == (0, 1)
    assert not jax.distributed.is_initialized()
