"""The harness of tests/benchmarks: it does the work that it says, and tells what was measured."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

import sae_jax

BENCHMARKS = Path(__file__).parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

import contenders  # noqa: E402
import peers  # noqa: E402
import summary  # noqa: E402
import timing  # noqa: E402
import works  # noqa: E402
from works import DICTIONARY, FASTEST, LOOP, PEAK, SAELENS, SAELENS_MANY, STACKED, SWEEP  # noqa: E402

SMALL = works.WORKS["small"][0]._replace(d_in=6, d_sae=12, batch=16, steps=12, members=2, lr=1e-2)
SPARSE = works.WORKS["topk"][0]._replace(d_in=8, d_sae=16, batch=32, steps=12, k=3, lr=1e-2)
SHRUNK = {
    "relu": SMALL,
    "topk": SPARSE,
    "batch_topk": SPARSE._replace(architecture="batch_topk", contenders=works.BATCH_TOPK),
}
KNOWN = works.WORKS["mid"][0]._replace(contenders=(LOOP, STACKED, SWEEP))
PEAKS = {"float32 on the CPU": {"PyTorch": 1e11, "XLA": 2e11}}


@pytest.fixture(autouse=True)
def one_thread():
    """Of torch: where other tests want the same cores, its threads wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def forgotten():
    """What stands in for nnsight, and what was imported with it, is gone after a test."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("dictionary_learning", "nnsight"):
            del sys.modules[name]


@pytest.fixture
def rows(tmp_path):
    """Of a work, the file that holds them."""

    def written(work: works.Work) -> str:
        path = tmp_path / "rows.npy"
        timing.write_rows(work, str(path))
        return str(path)

    return written


def timings(work, contender, *seconds, alone=(), first=1.0, memory=10**9):
    """Of one process, as plain values."""
    return timing.Timing(
        contender, work._asdict(), work.members, 0.5, first, list(seconds), list(alone), memory, 0, 2e11
    )._asdict()


@pytest.mark.parametrize(
    ("architecture", "contender"),
    [(name, each) for name, work in SHRUNK.items() for each in work.contenders],
)
def test_every_contender_does_the_work(architecture, contender, rows, monkeypatch):
    work = SHRUNK[architecture]
    if find_spec(works.PACKAGES[contender]) is None:
        pytest.skip(f"{works.PACKAGES[contender]} is not installed")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    build = contenders.CONTENDERS[contender](work, np.load(rows(work)))
    outcome = build(range(work.members))()
    timing.require_work(outcome, work, work.members)
    with pytest.raises(RuntimeError, match="steps, not"):
        timing.require_work(outcome, work._replace(steps=work.steps + 1), work.members)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"last": [0.5, 1.0]}, "1 losses that did not fall"),
        ({"last": [0.5, np.nan]}, "a loss that is not finite"),
        ({"parameters": 5}, "5 parameters, not 162"),
        ({"first": [1.0], "last": [0.5]}, "1 losses of 2 members"),
    ],
)
def test_what_is_not_the_work_is_told(change, said):
    good = contenders.Outcome([1.0, 1.0], [0.5, 0.5], SMALL.parameters, SMALL.steps)
    timing.require_work(good, SMALL, 2)
    with pytest.raises(RuntimeError, match=said):
        timing.require_work(good._replace(**change), SMALL, 2)


def test_a_process_is_timed(rows, monkeypatch):
    monkeypatch.setattr(timing, "jax_peak", lambda bfloat16: 1e11)
    found = timing.measure(SWEEP, SMALL, rows(SMALL))
    assert len(found.seconds) == timing.REPEATS
    assert all(0 < alone * SMALL.steps < found.first_seconds for alone in found.step_seconds)
    assert len(found.step_seconds) == timing.REPEATS
    assert 0 < found.memory_before <= found.memory
    assert found.peak == 1e11


def test_the_loop_is_timed_on_a_sample(rows):
    found = timing.measure(LOOP, SMALL._replace(members=100), rows(SMALL))
    assert (found.timed_members, len(found.seconds), found.peak) == (timing.LOOP_SAMPLE, timing.REPEATS, 0.0)


def test_flops_and_parameters_are_those_of_the_package():
    for work in (each for group in works.WORKS.values() for each in group):
        sparsity = {"k": work.k} if work.k else {}
        sae = getattr(sae_jax, work.architecture)(work.d_in, work.d_sae, **sparsity)
        params = jax.eval_shape(sae.init, jax.random.key(0))
        assert work.flops == work.members * sae_jax.cost.training_flops(params, work.batch)
        assert work.parameters == sum(leaf.size for name, leaf in params.items() if name != "threshold")


def test_medians_shares_and_ratios_of_known_numbers():
    # 20 steps of 4 members: 80 of them in each call
    first = [timings(KNOWN, LOOP, 8, 16), timings(KNOWN, SWEEP, 4, 4, alone=[0.16], memory=3 * 10**9)]
    second = [timings(KNOWN, LOOP, 24, first=3.0), timings(KNOWN, SWEEP, 8, alone=[0.16])]
    loop, sweep = summary.summarise([first, second], PEAKS)
    assert (loop.contender, loop.first, loop.median, loop.least, loop.most) == (LOOP, 2.0, 0.2, 0.1, 0.3)
    # 12 / 4 in the first round, 24 / 8 in the second
    assert loop.times == 3.0
    assert (sweep.median, sweep.alone, sweep.memory, sweep.times) == (0.05, 0.04, 3 * 10**9, 1.0)
    assert sweep.share == pytest.approx(10 * 1024 * 512 * 2048 / 0.05 / 2e11)
    lines = summary.lines_of([loop._replace(timed_members=3), sweep], [(KNOWN, STACKED), (KNOWN, LOOP)])
    assert lines[2:] == [
        f"| {KNOWN} | PyTorch loop, on 3 members | 2 s | 200 ms (100 ms - 300 ms) | 1.00 GB | 26.8% | 3 x |",
        f"| {KNOWN} | sae_jax.sweep | 1 s | 50 ms (50 ms - 100 ms) | 3.00 GB | 107.4% | |".replace(
            "% | |", "% |  |"
        ),
        f"| {KNOWN} | sae_jax.sweep, steps alone | | 40 ms | | 134.2% | |",
        f"| {KNOWN} | PyTorch stacked by hand, PyTorch loop | not measured | | | | |",
    ]
    assert all(line.count("|") == lines[0].count("|") for line in lines)


def verdicts_of(*rows):
    return {verdict.sentence: verdict for verdict in summary.verdicts(summary.summarise([rows], PEAKS))}


def test_goals_are_met_or_missed_by_their_figures():
    one = KNOWN._replace(members=1)
    rows = [timings(KNOWN, LOOP, 9), timings(KNOWN, STACKED, 8), timings(KNOWN, SWEEP, 4, alone=[0.16])]
    rows += [timings(one, LOOP, 2), timings(one, SWEEP, 1)]
    found = verdicts_of(*rows)
    assert {sentence: verdict.met for sentence, verdict in found.items()} == {
        f"{KNOWN}: 2 times as fast as {FASTEST} ({STACKED}), where 2.5 is the goal": False,
        f"{KNOWN}: 107.4% of {PEAK} (134.2% in its steps alone), where 80% is the goal": True,
        f"{one}: 2 times as fast as {FASTEST} ({LOOP}), where 1 is the goal": True,
    }
    assert str(
        found[f"{KNOWN}: 107.4% of {PEAK} (134.2% in its steps alone), where 80% is the goal"]
    ).startswith("met: ")


def test_a_library_is_held_by_its_better_trainer():
    small = works.WORKS["small"][0]
    found = verdicts_of(
        *[timings(small, name, s) for name, s in ((SAELENS, 90), (SAELENS_MANY, 50), (SWEEP, 1))]
    )
    said = f"{small}: 50 times as fast as SAELens (SAELens MultiSAETrainer), where 60 is the goal"
    assert {sentence: verdict.met for sentence, verdict in found.items()} == {said: False}


@pytest.mark.parametrize(("last", "met"), [(4.1, True), (4.3, False)])
def test_the_cost_of_a_member_may_hardly_rise(last, met):
    sizes = works.WORKS["members"][:3]
    # of 1, 4 and 16 members: 2, 1 and a little over 1 a member
    found = verdicts_of(*(timings(work, SWEEP, s) for work, s in zip(sizes, (2, 4, last * 4), strict=True)))
    assert [verdict.met for verdict in found.values()] == [met]


def test_every_goal_is_of_a_work_and_a_contender_that_are_there():
    for goal in works.GOALS:
        assert any(goal.members == work.members for work in works.WORKS[goal.work])
        assert goal.against in {FASTEST, PEAK, DICTIONARY, SAELENS, LOOP, STACKED}


def test_the_table_goes_between_the_marks_of_a_page():
    page = "# Before\n\n<!-- peers -->\nold \\1\n<!-- /peers -->\n\nAfter\n"
    once = summary.placed(page, r"new \1 | a")
    assert once == "# Before\n\n<!-- peers -->\n\nnew \\1 | a\n<!-- /peers -->\n\nAfter\n"
    assert summary.placed(once, r"new \1 | a") == once
    with pytest.raises(ValueError, match="one line <!-- peers -->"):
        summary.placed("# Before\n", "new")


def test_what_cannot_run_here_is_told_so(monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: None if name == "sparsify" else name)
    monkeypatch.setattr(peers, "ask", lambda asked, gpu: False)
    ran = peers.runnable([*works.WORKS["topk"], *works.WORKS["gpu"]])
    assert ran == [(works.WORKS["topk"][0], name) for name in (DICTIONARY, SAELENS, SWEEP)]


def here(asked, gpu=False, **task):
    """`peers.ask` without a process of its own."""
    if asked == "torch_peak":
        return 1e11
    return json.loads(json.dumps(timing.answer(json.loads(json.dumps({"asked": asked, **task})))))


def test_a_run_from_its_guard_to_its_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peers, "ask", here)
    monkeypatch.setattr(timing, "jax_peak", lambda bfloat16: 2e11)
    monkeypatch.setattr(timing, "REPEATS", 1)
    page, to = tmp_path / "page.md", tmp_path / "measured.json"
    page.write_text("<!-- peers -->\n<!-- /peers -->\n")
    work = SMALL._replace(contenders=(*works.BY_HAND, SWEEP))
    assert peers.run([work], 2, to, page) == 0
    measured = json.loads(to.read_text())
    assert measured["markdown"] in page.read_text()
    assert measured["markdown"] in capsys.readouterr().out
    assert measured["peaks"] == PEAKS
    assert measured["guard"][str(work)] < 1e-4
    assert [[each["contender"] for each in timings] for timings in measured["rounds"]] == [
        [*work.contenders]
    ] * 2
    assert [row["contender"] for row in measured["rows"]] == [*work.contenders]
    assert page.read_text().count("\n|") == 2 + 5


@pytest.mark.slow
def test_a_run_in_fresh_processes(capsys):
    work = SMALL._replace(contenders=(STACKED, SWEEP))
    assert peers.run([work], 1, None, None) == 0
    assert f"| {work} | sae_jax.sweep, steps alone |" in capsys.readouterr().out
    with pytest.raises(peers.NotRun, match="nothing is known of 'the weather'"):
        peers.ask("the weather")


def test_contenders_that_disagree_end_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peers, "guarded", lambda works, folder: {"a work": 0.1})
    assert peers.run([SMALL], 1, None, None) == 1
    assert "the contenders do not do the same work" in capsys.readouterr().out


def test_what_did_not_run_is_told_and_the_rest_is_kept(tmp_path, monkeypatch):
    def ask(asked, gpu=False, **task):
        if asked == "measure" and task["contender"] == LOOP:
            raise peers.NotRun("no memory")
        return timings(SMALL, task["contender"], 1.0) if asked == "measure" else None

    monkeypatch.setattr(peers, "ask", ask)
    found, faults = peers.timed([(SMALL, LOOP), (SMALL, SWEEP)], 2, tmp_path)
    assert [[each["contender"] for each in timings] for timings in found] == [[SWEEP], [SWEEP]]
    assert faults == [f"{LOOP} at {SMALL}: no memory"]


@pytest.mark.parametrize("status", [0, 1])
def test_the_build_of_the_site_takes_the_table_and_the_exit_status(status, tmp_path, monkeypatch):
    def run(words, check, stdout):
        assert words[1].exists()
        assert words[2:4] == ["--works", "seed"]
        Path(words[-1]).write_text(json.dumps({"markdown": "| a | b |\n"}))
        return subprocess.CompletedProcess(words, status)

    monkeypatch.syspath_prepend(str(BENCHMARKS.parents[1] / "docs" / "_ext" / "makers"))
    monkeypatch.chdir(tmp_path)
    import benchmark_table

    monkeypatch.setattr(benchmark_table.subprocess, "run", run)
    assert benchmark_table.main() == status
    assert Path("benchmark.inc").read_text() == "| a | b |\n"


def test_a_work_that_is_not_there_is_an_error():
    script = BENCHMARKS / "peers.py"
    done = subprocess.run([sys.executable, script, "--works", "tiny"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "there is no work 'tiny'; there are: seed, small" in done.stderr
