"""What a sweep writes down while it trains: every point once, whatever became of the run before."""

import gzip
import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import optax
import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import sae_jax
from sae_jax import recording, train
from sae_jax.cli import progress, throughput
from sae_jax.cli.profiling import Profile
from sae_jax.cli.progress import Ticker
from sae_jax.cli.throughput import Meter
from sae_jax.recording import Point, Recorder, json_lines, tensorboard

RELU = partial(sae_jax.relu, 5, 6)
TOPK = partial(sae_jax.topk, 5, 6)


def sweep_two(x, look):
    """Five members, two at once, and two of another architecture."""
    groups = [
        sae_jax.Group(RELU, optax.adam, sae_jax.grid(l1=[0.0, 0.01, 0.02, 0.1, 0.2], lr=[1e-2])),
        sae_jax.Group(TOPK, optax.adam, sae_jax.grid(k=[2], lr=[1e-2, 3e-3])),
    ]
    return sae_jax.sweep_all(
        groups, source=sae_jax.in_memory(x, batch_size=20), steps=12, members_at_once=2, look=look, points=4
    )


def sweep_one(x, look, checkpoints=None, lr=1e-2):
    """Three members, two at once; the last has a learning rate of its own."""
    return sae_jax.sweep(
        RELU, grid=sae_jax.zipped(l1=[0.0, 0.01, 0.1], lr=[1e-2, 1e-2, lr]),
        source=sae_jax.in_memory(x, batch_size=20), steps=6, members_at_once=2, points=3, look=look,
        checkpoints=checkpoints,
    )  # fmt: skip


def recorded(path, x, stop=None, checkpoints=None):
    """`sweep_one` recorded in a file; `stop` ends it by an error, as a kill would, at that look."""
    looks = []

    def look(seen):
        recorder.show(seen)
        looks.append(seen)
        if len(looks) == stop:
            raise InterruptedError

    with Recorder([json_lines(path)]) as recorder:
        return sweep_one(x, look, checkpoints)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# JSON lines


def test_every_point_of_every_member_is_in_the_file_to_the_bit(small, tmp_path):
    path = tmp_path / "metrics.jsonl"
    with Recorder([json_lines(path)]) as recorder:
        result = sweep_two(small, recorder.show)
    told = lines(path)
    chunks = [[0, 2], [2, 4], [4, 5], [5, 7]]
    assert [line["members"] for line in told] == [chunk for chunk in chunks for _ in range(4)]
    assert [line["step"] for line in told] == [3, 6, 9, 12] * 4
    for line in told:
        point = result.history["step"].tolist().index(line["step"])
        first, stop = line["members"]
        logs = set(line) - {"step", "members"}
        assert {"loss", "l0"} <= logs
        for name in logs:
            kept = result.history[name][point, first:stop].astype(np.float32)  # joined, they are float64
            assert np.float32(line[name]).tobytes() == kept.tobytes(), (line["step"], name)


def test_a_line_is_there_as_soon_as_its_point_is(small, tmp_path):
    path = tmp_path / "metrics.jsonl"

    def look(seen):
        recorder.show(seen)
        assert path.exists() == (len(seen.history["step"]) > 0 or seen.first > 0)
        assert not path.exists() or path.read_text().endswith("}\n")

    with Recorder([json_lines(path)]) as recorder:
        sweep_one(small, look)


def test_what_is_not_finite_is_null(small, tmp_path):
    path = tmp_path / "metrics.jsonl"
    with Recorder([json_lines(path)]) as recorder:
        sweep_one(small, recorder.show, lr=1e30)
    assert [line["loss"] for line in lines(path) if line["members"] == [2, 3]][-1] == [None]
    assert not re.search("nan|inf", path.read_text(), re.IGNORECASE)


@pytest.mark.parametrize(("stop", "seconds"), [(1, 0.0), (5, 60.0), (9, 60.0), (10, 0.0)])
def test_a_run_that_was_killed_and_resumed_leaves_the_file_of_one_that_was_not(
    small, tmp_path, monkeypatch, stop, seconds
):
    monkeypatch.setattr(train, "SECONDS_PER_CHUNK", 0.0)  # a look at each step
    monkeypatch.setattr(train, "SECONDS_BETWEEN_CHECKPOINTS", seconds)
    recorded(tmp_path / "whole.jsonl", small)
    whole = (tmp_path / "whole.jsonl").read_bytes()
    assert len(whole.splitlines()) == 6
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(InterruptedError):
        recorded(path, small, stop, tmp_path / "checkpoints")
    before = path.read_bytes() if path.exists() else b""
    assert len(before) == len(b"".join(whole.splitlines(keepends=True)[: stop // 2]))
    path.write_bytes(before + b'{"step": 4, "members": [0, 2], "loss": [0.')  # what it was writing
    recorded(path, small, checkpoints=tmp_path / "checkpoints")
    assert path.read_bytes() == whole


def test_lines_beyond_the_step_that_a_run_goes_on_from_are_cut(tmp_path):
    path, logs = tmp_path / "metrics.jsonl", {"loss": np.array([1.5, 2.5], np.float32)}
    before = json_lines(path)
    for step in (10, 20, 30):
        before.write(Point(step, (0, 2), logs))
    before.write(Point(10, (2, 4), logs))
    after = json_lines(path)
    after.write(Point(20, (0, 2), logs))
    assert [(line["step"], line["members"]) for line in lines(path)] == [
        (10, [0, 2]),
        (10, [2, 4]),
        (20, [0, 2]),
    ]


@pytest.mark.parametrize("small_disk", [64], indirect=True)
def test_a_full_disk_is_told_with_the_file_and_its_whole_lines_go_on_once_there_is_room(small_disk):
    path, logs = small_disk / "metrics.jsonl", {"loss": np.linspace(0, 1, 997, dtype=np.float32)}
    writer = json_lines(path)

    def fill(steps):
        for step in steps:
            writer.write(Point(step, (0, 997), logs))

    with pytest.raises(OSError, match=re.escape(str(path))):
        fill(range(100))
    assert not path.read_text().endswith("}\n")
    subprocess.run(["mount", "-o", "remount,size=9m", small_disk], check=True)
    writer = json_lines(path)
    fill(range(2, 100))
    assert [line["step"] for line in lines(path)] == list(range(100))


# TensorBoard


def curve(folder: Path, name: str) -> list[tuple[int, float]]:
    """What TensorBoard itself reads."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_reads_a_curve_per_member(small, tmp_path):
    with Recorder([tensorboard(tmp_path, members=3)]) as recorder:
        result = sweep_one(small, recorder.show)
    assert {path.name for path in tmp_path.iterdir()} == {"member-000", "member-001", "member-002"}
    for index in range(3):
        steps, values = zip(*curve(tmp_path / f"member-{index:03d}", "loss"), strict=True)
        assert steps == (2, 4, 6)
        np.testing.assert_array_equal(np.float32(values), result.history["loss"][:, index])


def test_tensorboard_reads_quantiles_of_many_members(tmp_path):
    loss = np.random.default_rng(0).normal(size=(3, 40)).astype(np.float32)
    writer = tensorboard(tmp_path, members=80)
    for index in range(3):
        writer.write(Point(10 * index, (40, 80), {"loss": loss[index]}))
    writer.close()
    assert len(list(tmp_path.glob("*/*"))) == 5
    for name, level in recording.QUANTILES.items():
        values = [value for _, value in curve(tmp_path / "members-40-79" / name, "loss")]
        np.testing.assert_allclose(values, np.quantile(loss, level, axis=1), rtol=1e-6)


def test_quantiles_leave_out_members_that_diverged():
    logs = {"loss": np.array([*range(40), np.nan]), "l0": np.full(41, np.inf)}
    told = recording.curves(Point(1, (0, 41), logs), 41)
    assert told["members-0-40/median"]["loss"] == 19.5
    assert np.isnan(told["members-0-40/maximum"]["l0"])


def test_tensorboard_shows_the_points_of_a_resumed_run_once(tmp_path):
    def write(steps, value):
        writer = tensorboard(tmp_path, members=1)
        for step in steps:
            writer.write(Point(step, (0, 1), {"loss": np.array([value])}))
        writer.close()

    write([10, 20, 30, 40], 1.0)
    write([30, 40, 50], 2.0)
    assert curve(tmp_path / "member-000", "loss") == [(10, 1), (20, 1), (30, 2), (40, 2), (50, 2)]


# Weights & Biases


def test_weights_and_biases_keeps_a_run_in_its_folder_when_it_is_offline(small, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    with Recorder([recording.wandb("a-project", tmp_path, 3, {"steps": 6})]) as recorder:
        result = sweep_one(small, recorder.show)
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    rows = rows_of(path)
    assert len(rows) == 6
    found = {row["step"]: row["loss/member-002"] for row in rows if "loss/member-002" in row}
    assert found == dict(zip([2, 4, 6], result.history["loss"][:, 2].tolist(), strict=True))


def rows_of(path):
    """The history in a file of Weights & Biases, once its own process has written the end of it."""
    for _ in range(300):
        records = list(records_of(path.read_bytes()))
        if records and records[-1].WhichOneof("record_type") == "exit":
            break
        time.sleep(0.1)
    histories = [record.history for record in records if record.WhichOneof("record_type") == "history"]
    return [
        {item.nested_key[0]: json.loads(item.value_json) for item in history.item} for history in histories
    ]


def records_of(data):
    """Messages in LevelDB's log format, read by hand: the package has no reader."""
    from wandb.proto.wandb_internal_pb2 import Record

    place, message = 7, b""
    while place + 7 <= len(data):
        if 2**15 - place % 2**15 < 7:  # no header is split over two blocks
            place += 2**15 - place % 2**15
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        message += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4) and place <= len(data):  # whole, or the last part
            yield Record.FromString(message)
            message = b""


def test_weights_and_biases_without_a_key_is_a_sentence(tmp_path):
    code = "import pathlib; from sae_jax import recording; recording.wandb('p', pathlib.Path(), 1, {})"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**environment, "HOME": str(tmp_path)},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    last = done.stderr.splitlines()[-1]
    assert "InputError: Weights & Biases did not start: " in last
    assert last.endswith("WANDB_MODE=offline keeps the run in the folder")


@pytest.mark.parametrize(
    ("package", "extra", "start"),
    [
        ("tensorboardX", "tensorboard", lambda folder: tensorboard(folder, 1)),
        ("wandb", "wandb", lambda folder: recording.wandb("p", folder, 1, {})),
    ],
)
def test_a_missing_extra_is_named_with_the_command_that_brings_it(
    tmp_path, monkeypatch, package, extra, start
):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(sae_jax.InputError, match=re.escape(f"pip install 'sae-jax[{extra}]'")):
        start(tmp_path)


# Traces


def test_a_trace_holds_the_compiled_step(small, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SECONDS_PER_CHUNK", 0.0)
    said = []
    with Profile(tmp_path, said.append) as profile:
        sweep_one(small, profile.show)
    (trace,) = tmp_path.rglob("*.trace.json.gz")
    names = {event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert "PjitFunction(_advance)" in names
    (planes,) = tmp_path.rglob("*.xplane.pb")
    assert b"jit__advance" in planes.read_bytes()
    assert len(said) == 1
    assert re.match(rf"traced \d\.\d s of training into {re.escape(str(tmp_path))}: ", said[0])


def test_a_run_with_nothing_to_trace_says_so(tmp_path):
    said = []
    with Profile(tmp_path / "profile", said.append) as profile:
        # at the first look of a run of one chunk of steps it is over
        profile.show(sae_jax.Look(80, 80, {"step": np.array([10])}, 0, 8, {}, 10))
    assert [sentence.split(":")[0] for sentence in said] == ["nothing was traced"]
    assert not (tmp_path / "profile").exists()


# What is on screen


def looks_of(*seen):
    """Looks at (first, stop, member_steps, done); of 8 members and 80 member-steps."""
    return [
        sae_jax.Look(member_steps, 80, {"step": np.array([])}, first, stop, {}, done)
        for first, stop, member_steps, done in seen
    ]


def test_throughput_counts_rows_once_for_members_side_by_side_and_leaves_compilation_out():
    meter = Meter(members=8, batch_size=100)
    assert meter.rows_per_second == 0
    seen = looks_of((0, 6, 6, 1), (0, 6, 30, 5), (0, 6, 60, 10), (6, 8, 62, 1), (6, 8, 80, 10))
    for look, now in zip(seen, [5.0, 6.0, 7.0, 100.0, 101.0], strict=True):
        meter.show(look, now)
    assert meter.seconds == 3.0
    assert meter.steps.tolist() == [9] * 8
    assert meter.rows_per_second == 18 * 100 / 3  # 9 steps of six members, and 9 of two
    per_step = np.array([1e6] * 6 + [5e6] * 2)
    assert meter.flops_per_second(per_step) == pytest.approx((6 * 9 * 1e6 + 2 * 9 * 5e6) / 3)


def test_throughput_of_a_round_with_dropped_members_is_of_those_that_train():
    meter = Meter(members=8, batch_size=100)
    for look, now in zip(looks_of((0, 8, 50, 11), (0, 8, 62, 14)), [0.0, 1.0], strict=True):
        meter.show(look, now)
    assert meter.rows_per_second == 300
    assert meter.flops_per_second(np.full(8, 1e6)) == pytest.approx(12e6)


def test_a_share_of_the_peak_is_of_the_products_of_every_member_and_measured_after_a_longer_run(
    small, monkeypatch
):
    meter = Meter(members=7, batch_size=20)
    result = sweep_two(small, lambda look: meter.show(look, time.monotonic()))
    assert throughput.flops_per_step(result, 20).tolist() == [10 * 20 * 5 * 6] * 7
    assert throughput.share_of_peak(meter, result, devices=1) is None
    monkeypatch.setattr(throughput, "SECONDS_WORTH_A_PEAK", 0.0)
    share = throughput.share_of_peak(meter, result, devices=1)
    assert 0 < share < 0.1
    assert throughput.share_of_peak(meter, result, devices=2) == pytest.approx(share / 2)


def test_the_line_of_throughput_leaves_out_what_was_not_measured():
    assert throughput.told(12.34, 1_234_567.8, 0.0031) == (
        "12.3 members/s, 1,234,568 rows/s, 0.31 % of this machine's peak"
    )
    assert throughput.told(1234.5, 0.0) == "1,234 members/s"


def test_members_that_end_are_counted_where_there_is_no_terminal_as_they_end(monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_TO_AN_ENDING", 0.0)
    file = io.StringIO()
    with Ticker(Console(file=file, width=200), members=8, steps=10, batch_size=100) as ticker:
        for look, ended in zip(
            looks_of(*((0, 8, 8 * done, done) for done in (1, 2, 4, 8, 10))),
            [{}, {"diverged": 1}, {"diverged": 1}, {"diverged": 1, "stopped early": 3}, {}],
            strict=True,
        ):
            ticker.show(look._replace(ended=ended))
    told = [line.split("  ") for line in file.getvalue().splitlines()]
    assert told[1] == ["10%", "compiled"]
    assert [line[-1] for line in told[2:4]] == ["1 diverged", "1 diverged, 3 stopped early"]
    assert "members/s" in told[2][1]
    assert told[2][2].endswith(" s left")


def test_a_terminal_shows_the_rates_and_who_ended():
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80, color_system=None)
    with Ticker(console, members=8, steps=10, batch_size=100) as ticker:
        for look in looks_of((0, 8, 8, 1), (0, 8, 16, 2)):
            ticker.show(look._replace(ended={"diverged": 2}))
    assert re.search(r" 20% [\d.,]+ members/s, [\d,]+ rows/s \d:\d\d:\d\d 2 diverged", file.getvalue())


def test_the_table_counts_members_by_how_they_ended(small):
    result = sweep_one(small, None, lr=1e30)
    file = io.StringIO()
    Console(file=file, width=200).print(progress.summary(result))
    assert "all members, 1 diverged" in file.getvalue()


# The command line


def sae(*words, cwd):
    environment = {**os.environ, "WANDB_MODE": "offline"}
    script = Path(sys.executable).with_name("sae-jax")
    return subprocess.Popen(
        [script, *words], cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_a_stopped_and_resumed_sweep_has_every_point_once_in_all_of_them(tmp_path):
    words = "sweep --steps 300000 --l1 0.01,0.1 --seeds 1 --out r --tensorboard --wandb p --profile".split()
    growing = tmp_path / "r" / "checkpoints" / "metrics.jsonl"
    stopped = sae(*words, cwd=tmp_path)
    while stopped.poll() is None and not (growing.exists() and len(lines(growing)) >= 3):
        time.sleep(0.05)
    stopped.send_signal(signal.SIGTERM)
    _, told = stopped.communicate(timeout=100)
    assert stopped.returncode == 0, told
    assert "--resume" in told
    recorded = growing.read_bytes()
    assert 0 < len(recorded.splitlines()) < 100

    resumed = sae(*words, "--resume", cwd=tmp_path)
    _, told = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, told
    assert re.search(r"members/s, [\d,]+ rows/s.*\); wrote r/: .*metrics.jsonl", told)
    assert re.search(r"traced \d\.\d s of training into r/profile: .*xprof", told)
    out = tmp_path / "r"
    assert (out / "metrics.jsonl").read_bytes().startswith(recorded)
    assert [line["step"] for line in lines(out / "metrics.jsonl")] == list(range(3000, 300_001, 3000))
    assert [step for step, _ in curve(out / "tensorboard" / "member-001", "loss")] == [
        line["step"] for line in lines(out / "metrics.jsonl")
    ]
    assert len(list(out.glob("wandb/offline-run-*"))) == 2
    assert list(out.glob("profile/**/*.xplane.pb"))


def test_a_missing_extra_leaves_no_folder(tmp_path):
    (tmp_path / "tensorboardX.py").write_text("raise ImportError")
    code = "import sys; sys.path.insert(0, '.'); from sae_jax.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *"sweep --steps 5 --seeds 1 --out r --tensorboard".split()],
        cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "sae-jax: TensorBoard's files need tensorboardX: pip install 'sae-jax[tensorboard]'"
    )
    assert not (tmp_path / "r").exists()
