"""Kill a sweep of a store again and again, go on each time, and hold the end against a run never killed.

    python tests/kills.py --count 100                  SIGKILL, a third while a checkpoint is written
    python tests/kills.py --count 20 --signal TERM     SIGTERM: status 0, and a checkpoint at that step

Prints a line per kill and a table, and exits 1 unless every run ended with the same bits.
"""

import argparse
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sae_jax import harvest
from sae_jax.language_models import from_tokens

MEMBERS, AT_ONCE, STEPS = 4, 2, 3_000
SWEEP = (
    f"sweep acts --arch topk --d-sae 64 --l0 4,8 --seeds 2 --members-at-once {AT_ONCE} --steps {STEPS} "
    "--batch-size 64 --window-rows 2048 --checkpoint-seconds 0.1"
).split()
KILLS_PER_RUN = 8
TEMPORARY = ".orbax-checkpoint-tmp"


class Kill(NamedTuple):
    """One kill, and what it left."""

    wanted: str
    """A moment in a checkpoint, or any."""
    unfinished: bool
    """Whether a checkpoint was being written, as what is left on the disk tells."""
    held: str
    """The newest whole checkpoint then, "none" or "MEMBERS step STEP"."""
    ended: bool
    """Whether the run was over before the kill."""


class Place(NamedTuple):
    """A folder with a store, the command that sweeps it, and a run that nobody killed."""

    folder: Path

    @staticmethod
    def made(folder: Path) -> "Place":
        """A store of 16,384 rows of 32, and its sweep."""
        rng = np.random.default_rng(0)
        table = rng.normal(size=(512, 32)).astype(np.float32)
        tokens = rng.integers(0, 512, (256, 64)).astype(np.int32)
        harvest(lambda tokens: {"site": table[tokens]}, from_tokens(tokens), folder / "acts")
        place = Place(folder)
        place.finished(place.whole)
        return place

    @property
    def whole(self) -> Path:
        """Of the run that nobody killed."""
        return self.folder / "whole"

    def start(self, out: Path, *more: str) -> subprocess.Popen:
        """The command, in a process of its own."""
        script = Path(sys.executable).parent / "sae-jax"
        return subprocess.Popen(
            [script, *SWEEP, "--out", out, *more],
            cwd=self.folder, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        )  # fmt: skip

    def finished(self, out: Path, *more: str) -> None:
        """Run the command to its end."""
        process = self.start(out, *more)
        told = process.communicate()[1]
        assert process.returncode == 0, told


def result(out: Path) -> dict[str, bytes]:
    """All that the run found, to the bit."""
    weights = {
        str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("sae_weights.safetensors"))
    }
    with np.load(out / "history.npz") as history:
        logs = {name: log.tobytes() for name, log in history.items()}
    assert len(weights) == MEMBERS
    return {**weights, **logs, "metrics.csv": (out / "metrics.csv").read_bytes()}


def differing(out: Path, whole: Path) -> list[str]:
    """What is not as it is in the run that nobody killed, and files that one of them lacks."""
    ours, theirs = result(out), result(whole)
    files = {path.name for path in out.iterdir()} ^ {path.name for path in whole.iterdir()}
    return [name for name in theirs if ours.get(name) != theirs[name]] + sorted(files)


def held_by(out: Path) -> list[tuple[str, int]]:
    """(chunk of members, step) of every checkpoint in place, in the order of training."""
    # not what lies deeper, which has another name as soon as it is whole
    found = [path for path in out.glob("checkpoints/*/*") if path.name.isdecimal() and path.is_dir()]
    places = [(path.parent.name, int(path.name)) for path in found]
    return sorted(places, key=lambda place: (int(place[0].split("-")[0]), place[1]))


def unfinished(out: Path) -> list[Path]:
    """Checkpoints that are being written."""
    try:
        return list((out / "checkpoints").glob(f"*/*{TEMPORARY}*"))
    except FileNotFoundError:  # the run ends, and its checkpoints are removed
        return []


def begun(process: subprocess.Popen) -> str:
    """Wait until it trains; what it said until then."""
    said = ""
    while line := process.stderr.readline():
        said += line
        if "%" in line:
            break
    return said


def killed(place: Place, out: Path, rng: np.random.Generator, in_checkpoint: bool, more: list[str]) -> Kill:
    """Start it and kill it, at any moment or while it writes a checkpoint."""
    process = place.start(out, *more)
    if in_checkpoint:
        begun(process)
        time.sleep(rng.uniform(0, 0.8))
        while process.poll() is None and not unfinished(out):
            pass
        time.sleep(rng.uniform(0, 0.02))
    elif rng.random() < 0.2:
        time.sleep(rng.uniform(0, 3))  # before it trains
    else:
        begun(process)
        time.sleep(rng.choice([1, 1, 6]) * rng.uniform(0, 2))
    process.kill()
    process.stderr.close()
    ended = process.wait() != -signal.SIGKILL
    held = held_by(out)
    told = "none" if not held else f"{held[-1][0]} step {held[-1][1]}"
    return Kill("in a checkpoint" if in_checkpoint else "any moment", bool(unfinished(out)), told, ended)


def terminated(place: Place, out: Path, rng: np.random.Generator, more: list[str]) -> Kill:
    """Start it and ask it to stop: status 0, a line on how to go on, and a checkpoint of that very step."""
    process = place.start(out, *more)
    said = begun(process)
    time.sleep(rng.uniform(0, 2))
    process.send_signal(signal.SIGTERM)
    said += process.communicate(timeout=120)[1]
    # the signal may come while the interpreter of a run that is over is cleared away
    over = process.returncode == -signal.SIGTERM and "; wrote " in said
    assert process.returncode == 0 or over, said
    stopped = re.search(r"stopped at (\d+)%; go on with: (.*)", said)
    if stopped is None:
        assert (out / "sweep.json").exists(), said
        return Kill("SIGTERM", False, "finished", True)
    assert "--resume" in stopped[2], said
    assert not unfinished(out), said
    chunk, step = held_by(out)[-1]
    share = (int(chunk.split("-")[0]) + AT_ONCE * step / STEPS) / MEMBERS
    assert abs(share - int(stopped[1]) / 100) <= 0.0051, (share, said)
    return Kill("SIGTERM", False, f"{chunk} step {step}", False)


def runs(
    place: Place, number: signal.Signals, count: int, seed: int
) -> Iterator[tuple[list[Kill], list[str]]]:
    """Runs with a few kills each, until there were enough: the kills, and in what the end differs."""
    rng = np.random.default_rng(seed)
    # a third, in an order of chance
    kinds = rng.permutation(np.arange(count) % 3 == 0).tolist()
    while kinds:
        out, kills, more = place.folder / "killed", [], []
        while kinds and len(kills) < KILLS_PER_RUN:
            if number == signal.SIGTERM:
                kill = terminated(place, out, rng, more)
            else:
                kill = killed(place, out, rng, kinds[0], more)
            # of a run that had not begun there is nothing to go on with
            more = (
                ["--resume"] if any((out / name).exists() for name in ("checkpoints", "sweep.json")) else []
            )
            if kill.ended:
                break
            kinds.pop(0)
            kills.append(kill)
        place.finished(out, *more)
        yield kills, differing(out, place.whole)
        shutil.rmtree(out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--signal", choices=["KILL", "TERM"], default="KILL")
    options = parser.parse_args()
    number = signal.Signals[f"SIG{options.signal}"]
    began, tally = time.monotonic(), Counter()
    with tempfile.TemporaryDirectory() as folder:
        place = Place.made(Path(folder))
        for kills, different in runs(place, number, options.count, options.seed):
            for kill in kills:
                print(f"{kill.wanted}, {'unfinished, ' * kill.unfinished}left {kill.held}")
                tally["kills"] += 1
                tally[f"wanted: {kill.wanted}"] += 1
                tally["left a checkpoint unfinished"] += kill.unfinished
                tally["left no whole checkpoint"] += kill.held == "none"
                tally["of runs that ended with the same bits"] += not different
            print(f"resumed to the end: {f'OTHER {different}' if different else 'the same bits'}", flush=True)
            tally["runs"] += 1
    tally["seconds"] = round(time.monotonic() - began)
    for name, total in tally.items():
        print(f"{total:6} {name}")
    return int(tally["of runs that ended with the same bits"] != options.count)


if __name__ == "__main__":
    raise SystemExit(main())
