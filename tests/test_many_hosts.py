"""`sae-jax sweep` as several processes: one run, one log, and nothing lost when one of them dies."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from test_distributed import free_port

SECONDS_TO_END = 60
SMALL = "--d-sae 16 --l1 0.01,0.1 --batch-size 64".split()


def sae(place, *words):
    """One process of the command line."""
    return subprocess.Popen(
        [sys.executable, "-m", "sae_jax", "sweep", *map(str, words)],
        cwd=place,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def pair(place, *words, second=()):
    """Two of them on one mesh; the second may be given more words."""
    where = ("--coordinator", f"127.0.0.1:{free_port()}", "--processes", 2, "--process")
    return [sae(place, *words, *where, 0), sae(place, *words, *where, 1, *second)]


def ended(processes):
    """Exit status, what was printed and what was said, of each."""
    told = [process.communicate(timeout=300) for process in processes]
    return [(process.returncode, *said) for process, said in zip(processes, told, strict=True)]


@pytest.fixture
def place(tmp_path):
    """A folder with data."""
    np.save(tmp_path / "acts.npy", np.random.default_rng(0).normal(size=(512, 8)).astype(np.float32))
    return tmp_path


def checkpoints(out):
    """The steps of those that are there."""
    # not what lies deeper, which has another name as soon as it is whole
    return {int(path.name) for path in out.glob("checkpoints/*/*") if path.name.isdecimal()}


@pytest.mark.slow
def test_a_run_whose_first_process_dies_goes_on_with_two_and_with_one(place):
    out = place / "r"
    words = ["acts.npy", *SMALL, "--steps", 20_000, "--out", out, "--checkpoint-seconds", 0.5]
    running = pair(place, *words, "--mesh", "data=2")
    until = time.monotonic() + 120
    while not checkpoints(out) and time.monotonic() < until:
        time.sleep(0.05)
    running[0].send_signal(signal.SIGKILL)
    began = time.monotonic()
    _, said = running[1].communicate(timeout=SECONDS_TO_END)
    assert time.monotonic() - began < SECONDS_TO_END
    running[0].communicate()
    assert running[1].returncode == 3
    assert said.count("\n") == 1
    assert "process 0 of 2" in said
    assert "start all of them again with --resume" in said

    before = max(checkpoints(out))
    running = pair(place, *words, "--mesh", "data=2", "--resume")
    assert "training" in running[0].stderr.readline()
    running[1].send_signal(signal.SIGTERM)  # any of them is all of them
    (status, _, said), (other_status, other_printed, other_said) = ended(running)
    assert (status, other_status) == (0, 0)
    assert "go on with: sae-jax" in said
    assert other_printed == other_said == ""
    assert max(checkpoints(out)) > before

    [(status, _, said)] = ended([sae(place, *words, "--resume")])
    assert status == 0, said
    with np.load(out / "history.npz") as history:
        assert history["step"].tolist() == list(range(200, 20_001, 200))
        assert np.isfinite(history["loss"]).all()


def test_two_processes_are_one_run_with_one_log(place):
    (status, printed, said), (other_status, other_printed, other_said) = ended(
        pair(place, "acts.npy", *SMALL, "--steps", 20, "--json", "--mesh", "member=2")
    )
    assert (status, other_status) == (0, 0), said + other_said
    told = json.loads(printed)  # gloo's words are not among it
    assert [row["l1"] for row in told["table"]] == pytest.approx([0.01, 0.1])
    assert "wrote runs/acts-1/" in said
    assert other_printed == other_said == ""
    assert [path.name for path in (place / "runs").iterdir()] == ["acts-1"]


def test_auto_finds_a_mesh_of_all_devices_where_only_latents_can_be_cut(place):
    words = "--d-sae 16 --l1 0.1 --seeds 1 --batch-size 63 --steps 20 --mesh auto".split()
    (status, _, said), (other_status, _, _) = ended(pair(place, "acts.npy", *words))
    assert (status, other_status) == (0, 0), said  # a mesh without all of them would be refused


@pytest.mark.parametrize(
    ("words", "second", "says"),
    [
        (["--mesh", "data=3"], [], "the mesh member=1,data=3,latent=1 needs 3 devices, and there are 2"),
        (
            ["--mesh", "member=2"],
            ["--target", "none.npy"],
            "none.npy does not exist (process 1 of 2 on {host})",
        ),
        (["--mesh", "member=2"], ["--data-seed", 1], "process 1 of 2 on {host} has data "),
    ],
)
def test_bad_input_to_any_is_one_sentence_of_the_first(place, words, second, says):
    (status, printed, said), (other_status, other_printed, other_said) = ended(
        pair(place, "acts.npy", *SMALL, "--steps", 5, *words, second=second)
    )
    assert (status, other_status) == (2, 2)
    assert said.startswith("sae-jax: ")
    assert says.format(host=socket.gethostname()) in said
    assert said.count("\n") == 1
    assert printed == other_printed == other_said == ""
    assert not (place / "runs").exists()


def test_a_coordinator_that_cannot_be_reached_is_one_sentence(place):
    where = f"127.0.0.1:{free_port()}"
    [(status, printed, said)] = ended(
        [sae(place, "acts.npy", "--coordinator", where, "--processes", 2, "--process", 1, "--wait", 1)]
    )
    assert (status, printed) == (2, "")
    assert said.startswith(f"sae-jax: no process 0 at {where} within 1 s (Connection refused)")
    assert said.count("\n") == 1
