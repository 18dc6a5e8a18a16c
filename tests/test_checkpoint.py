"""What a checkpoint promises: whole or passed over, whatever happens to the process, the disk or a byte."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import kills
import numpy as np
import pytest

from sae_jax import InputError
from sae_jax.checkpoint import Checkpoints, claim, place, seals
from sae_jax.cli import folder
from sae_jax.cli.lock import LOCK, locked

HISTORY = {"step": np.arange(3), "loss": np.linspace(0, 1, 3, dtype=np.float32)}


def state_of(number: int):
    """A state with arrays of several kinds."""
    weights = jnp.arange(12, dtype=jnp.float32).reshape(3, 4) + number
    return {
        "W_dec": weights,
        "moments": (weights.astype(jnp.bfloat16), jnp.zeros((0, 3))),
        "step": jnp.int32(number),
    }


LIKE = jax.eval_shape(partial(state_of, 0))


def bits(tree):
    return [(np.asarray(leaf).dtype, np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


def saved(place, *steps, **options):
    """Checkpoints after these steps."""
    with Checkpoints(place, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, state_of(step), HISTORY)


def names(place):
    return sorted(path.name for path in place.iterdir())


def files(place):
    return sorted(path for path in place.rglob("*") if path.is_file())


# Whole


def test_what_is_restored_is_what_was_saved(tmp_path):
    saved(tmp_path / "c", 7)
    step, state, history = Checkpoints(tmp_path / "c").restore(LIKE)
    assert step == 7
    assert bits(state) == bits(state_of(7))
    assert jax.tree.structure(state) == jax.tree.structure(state_of(7))
    assert bits(history) == bits(HISTORY)


def test_a_history_without_points_yet_is_restored(tmp_path):
    empty = {"step": np.zeros(0, np.int64), "loss": np.zeros((0, 5), np.float32)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state_of(1), empty)
    history = Checkpoints(tmp_path).restore(LIKE)[2]
    assert {name: log.shape for name, log in history.items()} == {"step": (0,), "loss": (0, 5)}


def test_a_state_that_is_donated_while_it_is_written_is_written_as_it_was(tmp_path):
    onwards = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    state = {name: jnp.full((512, 512), float(number)) for number, name in enumerate("abcdefgh")}
    with Checkpoints(tmp_path, last=3) as checkpoints:
        for step in range(3):
            before = {name: np.array(leaf) for name, leaf in state.items()}
            checkpoints.save(step, state, HISTORY)
            for _ in range(50):
                state = onwards(state)
            assert checkpoints.wait()
            assert bits(checkpoints.restore(state)[1]) == bits(before)


def test_saving_goes_on_in_the_background(tmp_path):
    state = {"W": jax.random.normal(jax.random.key(0), (16, 1024, 1024))}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, HISTORY)
        assert "1" not in names(tmp_path)
        assert checkpoints.wait()
        assert names(tmp_path) == ["1"]


def test_two_processes_go_on_from_one_and_one_from_two(tmp_path):
    def state(number):
        return {"rows": jnp.arange(16.0) + number, "number": jnp.int32(number)}

    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(5, state(5), HISTORY)
    worker = Path(__file__).parent / "saving_together.py"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen([sys.executable, worker, f"127.0.0.1:{port}", str(number), tmp_path / "c"])
        for number in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert names(tmp_path / "c") == ["8", "9"]
    step, found, _ = Checkpoints(tmp_path / "c").restore(state(0))
    assert step == 9
    assert bits(found) == bits(state(9))


# Kept


def test_the_last_and_the_best_are_kept(tmp_path):
    with Checkpoints(tmp_path, last=2, best=2) as checkpoints:
        for step, score in enumerate([3.0, 1.0, 2.0, None, float("nan"), 4.0, 5.0]):
            checkpoints.save(step, state_of(step), HISTORY, score)
    assert names(tmp_path) == ["1", "2", "5", "6"]


def test_a_step_that_is_held_is_not_written_again(tmp_path):
    saved(tmp_path, 1, 2)
    written = {path: path.stat().st_mtime_ns for path in files(tmp_path)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.restore(LIKE)
        checkpoints.save(2, state_of(2), HISTORY)
        assert checkpoints.wait()
    assert {path: path.stat().st_mtime_ns for path in files(tmp_path)} == written


def test_what_a_killed_process_left_unfinished_is_removed(tmp_path):
    saved(tmp_path, 1)
    shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp")
    assert Checkpoints(tmp_path).restore(LIKE)[0] == 1
    assert names(tmp_path) == ["1"]


@pytest.mark.parametrize("options", [{"last": 0}, {"best": -1}])
def test_counts_out_of_range_are_refused(options, tmp_path):
    with pytest.raises(InputError, match="must"):
        Checkpoints(tmp_path, **options)


# Damaged


def flipped(path, at, bit):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1 << bit
    path.write_bytes(bytes(raw))


def test_any_flipped_bit_is_found_or_changes_nothing(tmp_path):
    saved(tmp_path / "whole", 1)
    rng = np.random.default_rng(0)
    found = 0
    for path in files(tmp_path / "whole"):
        for at in rng.choice(path.stat().st_size, min(path.stat().st_size, 6), replace=False):
            shutil.rmtree(tmp_path / "c", ignore_errors=True)
            shutil.copytree(tmp_path / "whole", tmp_path / "c")
            flipped(tmp_path / "c" / path.relative_to(tmp_path / "whole"), at, rng.integers(8))
            told = []
            restored = Checkpoints(tmp_path / "c", tell=told.append).restore(LIKE)
            if told:
                found += 1
                assert restored is None
            else:
                assert bits(restored[1:]) == bits((state_of(1), HISTORY))
    assert found >= 60


@pytest.mark.parametrize("harm", ["flip", "cut", "remove", "seal"])
def test_the_one_before_a_damaged_one_is_used_and_the_run_says_so(harm, tmp_path):
    saved(tmp_path, 1, 2)
    victim = max((tmp_path / "2" / "d").iterdir(), key=lambda path: path.stat().st_size)
    if harm == "flip":
        flipped(victim, victim.stat().st_size // 2, 0)
    elif harm == "cut":
        os.truncate(victim, victim.stat().st_size - 1)
    elif harm == "remove":
        victim.unlink()
    else:
        (tmp_path / "2" / seals.ABOUT).write_text("")
    told = []
    with Checkpoints(tmp_path, tell=told.append) as checkpoints:
        step, state, _ = checkpoints.restore(LIKE)
        assert step == 1
        assert bits(state) == bits(state_of(1))
        [sentence] = told
        assert sentence.startswith(
            f"the checkpoint at step 2 in {tmp_path} is damaged, so the one at step 1 is used: "
        )
        assert (seals.ABOUT if harm == "seal" else victim.name) in sentence
        # it goes on, and the step that was lost is written anew
        checkpoints.save(2, state_of(2), HISTORY)
    assert names(tmp_path) == ["1", "2", "2.damaged"]
    assert bits(Checkpoints(tmp_path).restore(LIKE)[1]) == bits(state_of(2))


def test_a_run_whose_checkpoints_are_all_damaged_begins_anew(tmp_path):
    saved(tmp_path, 1, 2)
    for step in ("1", "2"):
        (tmp_path / step / seals.ABOUT).unlink()
    told = []
    assert Checkpoints(tmp_path, tell=told.append).restore(LIKE) is None
    assert len(told) == 2
    assert all("and there is none before it" in sentence for sentence in told)


# Another's


def test_a_checkpoint_of_another_architecture_is_refused_in_a_sentence(tmp_path):
    saved(tmp_path, 1)
    wider = {**LIKE, "W_dec": jax.ShapeDtypeStruct((3, 5), jnp.float32)}
    with pytest.raises(InputError, match=r"state.W_dec is float32 \[3, 4\] in it and float32 \[3, 5\] here"):
        Checkpoints(tmp_path).restore(wider)
    with pytest.raises(InputError, match=r"state.threshold is missing in it and float32 \[4\] here"):
        Checkpoints(tmp_path).restore({**LIKE, "threshold": jnp.ones(4)})
    with pytest.raises(InputError, match=r"state.step is int32 \[\] in it and missing here"):
        Checkpoints(tmp_path).restore({name: leaf for name, leaf in LIKE.items() if name != "step"})
    with pytest.raises(InputError, match="bfloat16"):
        Checkpoints(tmp_path).restore({**LIKE, "W_dec": jax.ShapeDtypeStruct((3, 4), jnp.bfloat16)})
    assert names(tmp_path) == ["1"]


def test_a_checkpoint_of_a_newer_version_is_refused_in_a_sentence(tmp_path):
    saved(tmp_path, 1, 2)
    about = seals.about(place(tmp_path / "2"))
    seals.seal(place(tmp_path / "2"), {**about, "layout": 9, "arrays": "elsewhere"})
    with pytest.raises(InputError, match="written by a newer version of sae_jax, in layout 9"):
        Checkpoints(tmp_path).restore(LIKE)
    assert names(tmp_path) == ["1", "2"]


def test_a_request_is_noted_in_one_move(tmp_path):
    claim(tmp_path / "c", {"steps": 5})
    assert names(tmp_path / "c") == ["request.json"]
    claim(tmp_path / "c", {"steps": 5})
    with pytest.raises(InputError, match="steps was 5, now 6"):
        claim(tmp_path / "c", {"steps": 6})


# A full disk


@pytest.mark.parametrize("small_disk", [4096], indirect=True)
def test_a_full_disk_keeps_the_checkpoint_before(small_disk):
    told = []
    with Checkpoints(small_disk / "c", tell=told.append) as checkpoints:
        checkpoints.save(1, state_of(1), HISTORY)
        assert checkpoints.wait()
        (small_disk / "filler").write_bytes(bytes(3_200_000))
        checkpoints.save(2, state_of(2), HISTORY)
        assert not checkpoints.wait()
        assert told == [
            f"the checkpoint at step 2 could not be written, {small_disk / 'c'}: the disk is full; "
            "the one at step 1 stays"
        ]
        assert checkpoints.restore(LIKE)[0] == 1
        (small_disk / "filler").unlink()
        checkpoints.save(3, state_of(3), HISTORY)
        assert checkpoints.wait()
    assert names(small_disk / "c") == ["1", "3"]


@pytest.mark.parametrize("small_disk", ["8192k,nr_inodes=40,size=8192"], indirect=True)
def test_a_disk_that_fills_while_a_checkpoint_is_written(small_disk, capfd):
    """It has bytes to spare but no room for as many files, so it is found out only by writing."""
    told = []
    with Checkpoints(small_disk / "c", tell=told.append) as checkpoints:
        checkpoints.save(1, state_of(1), HISTORY)
        assert checkpoints.wait()
        for step in (2, 3):
            checkpoints.save(step, state_of(step), HISTORY)
            assert not checkpoints.wait(), os.statvfs(small_disk)
    assert len(told) == 2
    assert told[0].endswith("the disk is full; the one at step 1 stays")
    assert names(small_disk / "c") == ["1"]
    assert bits(Checkpoints(small_disk / "c").restore(LIKE)[1]) == bits(state_of(1))
    assert capfd.readouterr() == ("", ""), "orbax's own account is not for the reader"


# Elsewhere


def test_a_url_of_this_machine_is_a_folder(tmp_path):
    saved(f"file://{tmp_path}/c", 1)
    assert Checkpoints(tmp_path / "c").restore(LIKE)[0] == 1


def test_a_url_that_orbax_cannot_write_to_is_refused():
    with pytest.raises(InputError, match=r"gs://BUCKET/FOLDER.*not to s3://bucket/run"):
        Checkpoints("s3://bucket/run")


def test_a_bucket_without_its_packages_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(InputError, match="needs packages that are not here: pip install gcsfs"):
        Checkpoints("gs://bucket/run")


# A folder that one run at a time writes to

HOLD = """
import sys, time
from pathlib import Path
from sae_jax.cli.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(folder):
    process = subprocess.Popen([sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def claimed(out, **options):
    return folder.claim(out, {"steps": 5}, **{"overwrite": False, "resume": False, **options})


def test_a_folder_in_use_is_refused_until_its_process_is_gone(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    process = holder(tmp_path)
    said = f"{tmp_path} is in use by process {process.pid} on {os.uname().nodename}"
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(InputError, match=said), claimed(tmp_path, **options):
            pass
    assert process.poll() is None
    process.kill()
    process.wait()
    assert names(tmp_path) == [LOCK, "checkpoints"]
    with claimed(tmp_path, resume=True):
        assert str(os.getpid()) in (tmp_path / LOCK).read_text()
    assert names(tmp_path) == []


def test_a_folder_with_nothing_but_the_lock_of_a_killed_process_is_empty(tmp_path):
    (tmp_path / LOCK).write_text("process 1 on elsewhere")
    with claimed(tmp_path) as run:
        assert not run.finished


def test_a_lock_is_let_go_of_when_the_run_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), claimed(tmp_path / "r"):
        raise ZeroDivisionError
    assert names(tmp_path) == []


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.warns(UserWarning, match="without locks"), locked(tmp_path):
        pass
    assert names(tmp_path) == []


def test_the_best_checkpoints_are_kept_when_a_run_ends(tmp_path):
    def write(stage):
        stage.mkdir()
        (stage / folder.FINISHED).write_text("{}")

    with claimed(tmp_path / "r") as run:
        saved(run.checkpoints / "0-4", 1, 2)
        run.publish(write, keep_checkpoints=True)
    assert names(tmp_path / "r") == [folder.KEPT, folder.FINISHED]
    assert names(tmp_path / "r" / folder.KEPT / "0-4") == ["1", "2"]
    with claimed(tmp_path / "r", overwrite=True) as run:
        run.publish(write)
    assert names(tmp_path / "r") == [folder.FINISHED]


def test_whole_checkpoints_stay_when_a_run_ends_early(tmp_path):
    def stopped():
        with claimed(tmp_path / "r") as run:
            saved(run.checkpoints / "group-0" / "0-4", 1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert names(tmp_path / "r" / "checkpoints" / "group-0" / "0-4") == ["1"]
    with claimed(tmp_path / "r", resume=True) as run:
        assert not run.finished


# The command line, killed


@pytest.fixture(scope="module")
def sweep_to_kill(tmp_path_factory):
    return kills.Place.made(tmp_path_factory.mktemp("kills"))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "count"), [(signal.SIGKILL, 3), (signal.SIGTERM, 1)])
def test_a_killed_run_ends_with_the_bits_of_one_never_killed(number, count, sweep_to_kill):
    for killed, different in kills.runs(sweep_to_kill, number, count, seed=3):
        assert not different, killed
