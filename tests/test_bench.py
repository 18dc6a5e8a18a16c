"""`sae-jax bench` times what it says that it times, and says so where the machine was busy."""

import json

import jax
import jax.numpy as jnp
import pytest

from sae_jax import benchmark
from sae_jax.base import InputError
from sae_jax.benchmark import Benchmark, Timing, measure, work
from sae_jax.cli import benchmarking, main

TINY = "--d-in 8 --d-sae 16 --batch-size 4 --members 2 --seconds 0.2"


def timing(*seconds: float, d_sae: int = 16) -> Timing:
    return Timing("relu", 8, d_sae, 4, 2, 200.0, 1000.0, 1.5, 7, seconds)


@pytest.fixture
def bench(capsys):
    """The command: its exit status, stdout and stderr."""

    def command(words: str):
        with pytest.raises(SystemExit) as ended:
            main(["bench", *words.split()])
        return ended.value.code, *capsys.readouterr()

    return command


def test_figures_of_known_repetitions():
    found = timing(4.0, 2.0, 1.0)
    assert found.median == 2.0
    assert found.spread == 1.5
    assert found.rows_per_second == 2.0
    assert found.member_steps_per_second == 1.0
    assert found.flops_per_second == 100.0


@pytest.mark.parametrize(
    ("seconds", "steady"), [((100.0, 100.0, 115.0), True), ((100.0, 100.0, 115.1), False)]
)
def test_the_machine_is_called_busy_just_above_15_percent(seconds, steady):
    told = benchmarking.busy(Benchmark(1e9, (timing(1.0, 1.0, 1.0), timing(*seconds, d_sae=32))))
    assert len(told) == (not steady)
    assert steady or told[0].endswith("more than 15% of their median, relu 8 -> 32 by 15%")


@pytest.mark.parametrize("seconds", [(1.0, 1.0, 1.1), (1.0, 1.0, 1.5)], ids=["steady", "busy"])
def test_a_busy_machine_is_told_and_is_no_failure(bench, monkeypatch, seconds):
    found = Benchmark(1000.0, (timing(*seconds),))
    monkeypatch.setattr(benchmarking, "measure", lambda works, **_: found)
    status, out, _ = bench("--d-in 8")
    assert status == 0
    assert out.count("this machine was busy") == (max(seconds) > 1.15)
    assert f"{found.timings[0].spread:.1%}" in out
    assert "member steps/s" in out
    assert "20.0%" in out  # 200 FLOPs in a second, of a peak of 1,000
    told = json.loads(bench("--d-in 8 --json")[1])
    assert told["busy"] == (max(seconds) > 1.15)


class Paced:
    """A loop and its clock: a first step takes a hundred seconds, and each other by its batch size."""

    def __init__(self, pace: dict[int, float]):
        self.pace, self.now, self.seen, self.program = pace, 0.0, [], ""

    def perf_counter(self) -> float:
        return self.now

    def run(self, step, state, source, steps, *, points, between):
        self.seen.append((source.batch_size, steps))
        if not self.program:
            batch = jax.eval_shape(lambda: source.batch(jnp.int32(0)))
            self.program = str(jax.make_jaxpr(step)(state, batch))
        done, chunk, self.now = 1, 1, self.now + 100.0
        while not between(done, state, {}) and done < steps:
            chunk = min(2 * chunk, steps - done)
            done, self.now = done + chunk, self.now + chunk * self.pace[source.batch_size]


@pytest.fixture
def paced(monkeypatch):
    paced = Paced({4: 0.001, 8: 2.0})
    monkeypatch.setattr(benchmark, "run", paced.run)
    monkeypatch.setattr(benchmark, "time", paced)
    monkeypatch.setattr(benchmark, "peak", lambda dtype, precision: 1e9)
    return paced


def test_works_are_timed_in_turn_without_their_first_step(paced):
    said = []
    works = [work("relu", 4, 6, 4, members=2), work("topk", 4, 6, 8, members=1)]
    quick, slow = measure(works, seconds=4.0, tell=said.append).timings
    assert quick.seconds == pytest.approx([0.001] * 4)
    assert slow.seconds == pytest.approx([2.0] * 4)
    assert (quick.first_step, slow.first_step) == pytest.approx((100.0, 100.0))
    # half a second of steps where that is more than one
    assert (quick.steps, slow.steps) == (500, 1)
    assert paced.seen[4:] == [(4, 501), (8, 2)] * 4
    assert said == ["compiling 1 of 2", "compiling 2 of 2", "measuring the peak"] + [
        f"round {number} of 4" for number in (1, 2, 3, 4)
    ]


def test_short_on_time_there_are_three_shorter_rounds(paced):
    (only,) = measure([work("relu", 4, 6, 4, members=2)], seconds=0.3).timings
    assert (only.steps, len(only.seconds)) == (100, 3)


@pytest.mark.parametrize("precision", [None, "bfloat16"])
def test_the_precision_is_in_force(paced, precision):
    measure([work("relu", 4, 6, 4, members=1)], precision=precision)
    assert ("reduce_precision" in paced.program) == (precision == "bfloat16")


def test_nothing_compiles_once_the_rounds_have_begun(compilations, monkeypatch):
    monkeypatch.setattr(benchmark, "peak", lambda dtype, precision: 1e9)
    counts = []
    works = [work("relu", 8, 16, 4, members=2), work("relu", 8, 16, 2, members=1)]
    found = measure(works, seconds=0.2, tell=lambda sentence: counts.append((sentence, len(compilations))))
    began = next(count for sentence, count in counts if sentence.startswith("round"))
    assert 0 < began == len(compilations)
    assert all(min(timing.seconds) > 0 for timing in found.timings)


@pytest.mark.parametrize(("name", "weights"), [("crosscoder", 4 * 8 * 16), ("transcoder", 2 * 8 * 16)])
def test_architectures_that_want_other_rows_have_them(paced, name, weights):
    (found,) = measure([work(name, 8, 16, 4, members=2)]).timings
    assert found[:5] == (name, 8, 16, 4, 2)
    assert found.flops == 5 * 4 * 2 * weights


def test_the_command(bench):
    status, out, _ = bench(f"--arch topk {TINY} --k 3 --precision highest --json")
    told = json.loads(out)
    assert status == 0
    assert set(told) == {"environment", "precision", "peak", "busy", "works"}
    assert told["precision"] == "highest"
    assert [one["architecture"] for one in told["works"]] == ["topk"]
    (one,) = told["works"]
    assert one["flops_per_step"] == 2 * 10 * 4 * 8 * 16
    assert 0 < min(one["repetitions"]) <= one["seconds_per_step"] <= max(one["repetitions"])
    assert one["rows_per_second"] == pytest.approx(4 / one["seconds_per_step"])
    assert one["member_steps_per_second"] == pytest.approx(2 / one["seconds_per_step"])
    per_second = one["flops_per_step"] / one["seconds_per_step"]
    assert one["share_of_peak"] == pytest.approx(per_second / told["peak"])


def test_any_option_of_a_work_replaces_the_usual_ones(bench, monkeypatch):
    asked = []

    def note(works, **options):
        asked.append([(*source.x.shape, source.batch_size) for _, source in works])
        return Benchmark(1e9, (timing(1.0),))

    monkeypatch.setattr(benchmarking, "measure", note)
    for words in (
        "",
        "--seconds 3 --precision highest",
        "--members 2 --d-in 8",
        "--arch relu,crosscoder --d-in 8",
    ):
        assert bench(words)[0] == 0
    usual = [(8, 4, 8), (2048, 64, 256), (8192, 512, 1024), (8192, 512, 1024)]
    assert asked == [usual, usual, [(8192, 8, 1024)], [(8192, 8, 1024), (8192, 2, 8, 1024)]]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--d-sae 0", "d_sae must be at least 1, got 0"),
        ("--members 0", "members must be at least 1, got 0"),
        ("--members 1000001", "members must be at most 1,000,000"),
        ("--d-in 0", "d_in must be at least 1"),
        ("--batch-size 0", "batch_size must be at least 1"),
        ("--arch topk --d-in 4 --d-sae 8 --k 9", "at most d_sae = 8, got 9"),
        ("--arch topk --d-in 4 --k 0", "k must be above 0"),
        ("--k 4", "--k is for topk, batch_topk and matryoshka, not for relu"),
        ("--arch rleu", "no architecture is called 'rleu'; there are: relu"),
        ("--arch relu,relu", "twice"),
        ("--seconds 0", "seconds must be finite and above 0, got 0"),
        ("--seconds nan", "seconds must be finite and above 0, got nan"),
        ("--d-in 4 --d-sae 2000000000", "try fewer members, rows or latents"),
        ("--d-in 4 --batch-size 9999999999999", "the rows would take"),
    ],
)
def test_bad_input_is_one_sentence(bench, words, says):
    status, out, err = bench(words)
    assert status == 2
    assert says in err
    assert err.startswith("sae-jax: ")
    assert err.count("\n") == 1
    assert out == ""


def test_there_is_something_to_time():
    with pytest.raises(InputError, match="no works were given"):
        measure([])
