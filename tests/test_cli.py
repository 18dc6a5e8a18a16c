"""The command line, through the console script: what it writes, what it says, how it ends."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import sae_jax
from sae_jax.cli import doctor, main, verification

SCRIPT = Path(sys.executable).with_name("sae-jax")
FILES = {
    "sweep.json",
    "metrics.csv",
    "metrics.jsonl",
    "history.npz",
    "stability.npz",
    "members",
    "frontier.png",
    "report.html",
}


def sae(*words, cwd, **options):
    return subprocess.run(
        [SCRIPT, *map(str, words)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        **options,
    )


def rows_of(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a user's array in it."""
    place = tmp_path_factory.mktemp("cli")
    rng = np.random.default_rng(0)
    np.save(place / "acts.npy", rng.normal(size=(2000, 32)).astype(np.float32))
    return place


@pytest.fixture(scope="module")
def swept(place):
    """The sweep of a user's own array, as the documentation shows it."""
    words = "sweep acts.npy --d-sae 64 --l1 1e-4:1e-1:8 --seeds 2 --batch-size 256 --steps 500 --out runs/x"
    done = sae(*words.split(), cwd=place)
    assert done.returncode == 0, done.stderr
    return done, place / "runs" / "x"


def test_the_default_sweep(tmp_path):
    done = sae("sweep", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "runs" / "tokens-1"
    assert {path.name for path in out.iterdir()} == FILES
    assert len(rows_of(out)) == 256
    assert "256 members" in done.stderr
    assert "wrote runs/tokens-1/" in done.stderr
    assert "mean over 16 seeds" in done.stdout
    # a second one takes the next free folder
    again = sae("sweep", "--steps", 5, "--seeds", 1, "--quiet", cwd=tmp_path)
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert (tmp_path / "runs" / "tokens-2" / "sweep.json").exists()


def test_the_folder_of_a_sweep(swept):
    done, out = swept
    assert {path.name for path in out.iterdir()} == FILES
    assert {path.name for path in (out / "members").iterdir()} == {f"{i:03d}" for i in range(16)}
    rows = rows_of(out)
    assert list(rows[0]) == (
        "member,l1,lr,seed,loss,mse,l0,explained_variance,dead_fraction,consistency,status".split(",")
    )
    assert len(rows) == 16
    assert {row["status"] for row in rows} == {"ok"}
    with np.load(out / "history.npz") as history:
        assert history["loss"].shape == (16, 100)
        assert history["step"].tolist() == list(range(5, 501, 5))
    about = json.loads((out / "sweep.json").read_text())
    assert about["command"].startswith("sae-jax sweep acts.npy --d-sae 64")
    assert about["members"] == 16
    assert about["environment"]["jax"]
    assert about["members_per_second"] > 0
    assert (out / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert "mean over 2 seeds" in done.stdout


def test_every_member_opens_in_saelens(swept, place, torch, sae_lens):
    x = np.load(place / "acts.npy")[:100]
    for folder in sorted((swept[1] / "members").iterdir()):
        theirs = sae_lens.SAE.load_from_disk(folder, device="cpu")
        ours = sae_jax.load(folder)
        with torch.no_grad():
            f = theirs.encode(torch.from_numpy(x))
            x_hat = theirs.decode(f).numpy()
        np.testing.assert_allclose(ours.encode(x), f.numpy(), atol=1e-5)
        np.testing.assert_allclose(ours(x), x_hat, atol=1e-5)


def test_eval_gives_the_figures_of_the_table(swept, place):
    done = sae("eval", swept[1] / "members" / "003", "acts.npy", "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    row = rows_of(swept[1])[3]
    for name in ("mse", "l0", "explained_variance", "dead_fraction"):
        assert found[name] == pytest.approx(float(row[name]), rel=1e-5)
    assert len(found["density"]) == 64
    shown = sae("eval", swept[1] / "members" / "003", "acts.npy", cwd=place)
    assert "explained_variance" in shown.stdout


def test_train_makes_one_member(place, tmp_path):
    done = sae(
        "train", place / "acts.npy", "--d-sae", 16, "--steps", 20, "--out", "one", "--json", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["table"][0]["l1"] == 0.1
    assert {path.name for path in (tmp_path / "one" / "members").iterdir()} == {"000"}
    several = sae("train", "--l1", "0.1,0.2", cwd=tmp_path)
    assert several.returncode == 2
    assert "2 members" in several.stderr


def test_other_arguments_axes_and_architecture_options(tmp_path):
    done = sae(
        *"sweep --arg b1=0,0.9 --arg tied=True --l1 0.1,0.2 --lr 0.01,0.02 --zip l1,lr --seeds 1".split(),
        *"--unit-norm-decoder --steps 5 --out r --save none --json".split(),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    members = json.loads(done.stdout)["table"]
    assert [(m["l1"], m["lr"], m["b1"]) for m in members] == [
        (0.1, 0.01, 0),
        (0.1, 0.01, 0.9),
        (0.2, 0.02, 0),
        (0.2, 0.02, 0.9),
    ]
    assert not (tmp_path / "r" / "members").exists()


def test_a_diverging_member_is_told(tmp_path):
    done = sae(*"sweep --lr 0.01,1e30 --l1 0.1 --seeds 2 --steps 20 --out r".split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    status = [row["status"] for row in rows_of(tmp_path / "r")]
    assert status[:2] == ["ok", "ok"]
    assert all(text.startswith("diverged at step") for text in status[2:])
    assert "2 diverged" in done.stdout


def bad_arrays(place):
    """File name -> what the sentence must tell."""
    np.save(place / "flat.npy", np.zeros(5, np.float32))
    np.save(place / "empty.npy", np.zeros((0, 4), np.float32))
    holed = np.zeros((10, 4), np.float32)
    holed[3, 2], holed[7, 1] = np.nan, np.inf
    np.save(place / "holed.npy", holed)
    np.save(place / "whole.npy", np.zeros((5, 4), np.int64))
    np.save(place / "complex.npy", np.zeros((5, 4), np.complex64))
    np.save(place / "objects.npy", np.array([[object()]]), allow_pickle=True)
    np.save(place / "large.npy", np.full((5, 4), 1e300))
    (place / "text.npy").write_text("1.0 2.0")
    (place / "short.npy").write_bytes((place / "acts.npy").read_bytes()[:500])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("missing.npy", "missing.npy does not exist"),
        ("flat.npy", "must be [rows, d_in]"),
        ("empty.npy", "no rows"),
        ("holed.npy", "2 values that are NaN or infinite, the first at row, column (3, 2)"),
        ("whole.npy", "int64"),
        ("complex.npy", "complex64"),
        ("objects.npy", "pickled"),
        ("large.npy", "float32"),
        ("short.npy", "short.npy cannot be read"),
        ("acts.npy --d-sae 0", "d_sae must be at least 1, got 0"),
        ("acts.npy --l1 1:0.1:4", "reversed"),
        ("acts.npy --l1 0:1:4", "above 0"),
        ("acts.npy --l1=-0.1,0.1", "negative"),
        ("acts.npy --l1 much", "'much'"),
        ("acts.npy --arch rleu", "there are: relu"),
        ("acts.npy --steps 0", "steps must be at least 1"),
        ("acts.npy --seeds 0", "--seeds must be at least 1"),
        ("acts.npy --batch-size 0", "batch_size must be at least 1"),
        ("acts.npy --arg depth=1,2", "nothing takes the argument 'depth'"),
        ("acts.npy --arg learning_rate=0.5", "two names"),
        ("acts.npy --arg nesterov=1", "nothing takes the argument 'nesterov'"),
        ("acts.npy --lr=-1", "--lr must be above 0"),
        ("acts.npy --l1=", "not a number"),
        ("acts.npy --members-at-once 0", "--members-at-once must be at least 1"),
        ("acts.npy --d-sae 99999999999", "d_sae must be below 2^31"),
        ("acts.npy --steps 99999999999", "below 2^31"),
        ("acts.npy --zip l1,l1", "twice"),
        ("acts.npy --array x", "no name"),
        ("text.npy", "no .npy file"),
        ("acts.npy --arg tied=maybe", "True or False"),
        ("acts.npy --arg tied", "NAME=VALUES"),
        ("acts.npy --zip l1,l2", "l2"),
        ("acts.npy --zip l1,seed", "one length"),
        ("acts.npy --resume --overwrite", "exclude each other"),
        ("acts.npy --resume", "holds no run to resume"),
        ("acts.npy --out acts.npy", "is a file"),
        ("--world nowhere", "there is no world 'nowhere'; there are: toy_superposition"),
        ("acts.npy --world hedging", "leave out DATA"),
        ("--world hedging --world-args depth=2", "takes no argument 'depth'; there are: d_in"),
        ("--world hedging --world-args first", "NAME=VALUE"),
        ("--world hedging --world-args first=1.5", "must lie from 0 to 1, got"),
        ("--world matryoshka_tree --world-args child=0.5", "at most 1 is possible"),
        ("--world hedging --arch transcoder", "no rows that a transcoder"),
        ("--world-args first=0.1", "--world-args is for --world"),
        ("--world toy_superposition --world-args features=3,4", "takes one value"),
        ("--world toy_superposition --world-args features=99999999999", "must be below 10,000,000"),
        ("--world toy_superposition --world-args seed=99999999999", "from 0 to 2^32 - 1"),
        ("--world hedging --world-args first=0.3 --world-args first=0.4", "given twice"),
        ("--world hedging --world-args data_seed=1", "has an option of its own: --data-seed"),
    ],
)
def test_bad_input_is_one_sentence(place, words, says, capsys, monkeypatch):
    monkeypatch.chdir(place)
    bad_arrays(place)
    out = [] if "--out" in words else ["--out", "nowhere/r"]
    with pytest.raises(SystemExit) as stop:
        main(["sweep", *words.split(), *out])
    said = capsys.readouterr()
    assert stop.value.code == 2
    assert says in said.err
    assert said.err.startswith("sae-jax: ")
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert not (place / "nowhere").exists()


def test_bad_input_in_a_process_of_its_own(place):
    done = sae("sweep", "missing.npy", cwd=place)
    assert done.returncode == 2
    assert done.stderr == "sae-jax: missing.npy does not exist\n"
    assert done.stdout == ""


def test_eval_says_what_does_not_fit(swept, place, tmp_path, capsys):
    np.save(tmp_path / "narrow.npy", np.zeros((4, 3), np.float32))
    member = swept[1] / "members" / "000"
    for words, says in [
        ([member, tmp_path / "narrow.npy"], "reads 32 columns"),
        ([tmp_path, place / "acts.npy"], "no format known here"),
        ([tmp_path / "none", place / "acts.npy"], "does not exist"),
    ]:
        with pytest.raises(SystemExit) as stop:
            main(["eval", *map(str, words)])
        assert stop.value.code == 2
        assert says in capsys.readouterr().err


def test_a_folder_in_use_is_refused_and_can_be_replaced(tmp_path):
    short = "sweep --steps 5 --seeds 1 --out r".split()
    (tmp_path / "r").mkdir()  # an empty one is taken
    assert sae(*short, cwd=tmp_path).returncode == 0
    (tmp_path / "r" / "notes.txt").write_text("mine")
    before = (tmp_path / "r" / "metrics.csv").read_bytes()
    refused = sae(*short, cwd=tmp_path)
    assert refused.returncode == 2
    assert "exists and is not empty" in refused.stderr
    assert "--overwrite" in refused.stderr
    assert "--resume" in refused.stderr
    assert (tmp_path / "r" / "metrics.csv").read_bytes() == before
    replaced = sae(*short[:-2], "--l1", 0.5, "--out", "r", "--overwrite", cwd=tmp_path)
    assert replaced.returncode == 0, replaced.stderr
    assert len(rows_of(tmp_path / "r")) == 1
    assert {path.name for path in (tmp_path / "r" / "members").iterdir()} == {"000"}
    assert (tmp_path / "r" / "notes.txt").read_text() == "mine"


LONG = "sweep acts.npy --d-sae 64 --l1 0.01,0.1 --seeds 2 --batch-size 512 --steps 6000 --out".split()


def weights(out):
    paths = sorted((out / "members").rglob("*.safetensors"))
    return [path.read_bytes() for path in paths]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_stopped_and_resumed_is_never_stopped(place, number, status):
    whole, halved = place / "whole", place / f"halved-{number}"
    if not whole.exists():
        assert sae(*LONG, whole, cwd=place).returncode == 0
    running = subprocess.Popen([SCRIPT, *LONG, halved], cwd=place, stderr=subprocess.PIPE, text=True)
    first = running.stderr.readline(), running.stderr.readline()
    assert "0%" in first[1], first
    time.sleep(0.3)
    running.send_signal(number)
    told = running.communicate(timeout=60)[1]
    assert running.returncode == status
    assert "go on with: sae-jax sweep acts.npy" in told
    assert "--resume" in told
    assert {path.name for path in halved.iterdir()} == {"checkpoints"}
    for change in (
        (["--lr", "0.5"], ["--l1", "0.1,0.01"], ["--steps", "7000"]) if number == signal.SIGTERM else ()
    ):
        other = sae(*LONG, halved, *change, "--resume", cwd=place)
        assert other.returncode == 2
        assert "other options" in other.stderr, "the last of an option given twice counts"
    resumed = sae(*LONG, halved, "--resume", cwd=place)
    assert resumed.returncode == 0, resumed.stderr
    assert weights(halved) == weights(whole)
    with np.load(whole / "history.npz") as a, np.load(halved / "history.npz") as b:
        assert {name: log.tobytes() for name, log in a.items()} == {
            name: log.tobytes() for name, log in b.items()
        }
    assert {path.name for path in halved.iterdir()} == FILES
    finished = sae(*LONG, halved, "--resume", cwd=place)
    assert finished.returncode == 0
    assert "finished already" in finished.stderr


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.0, 1.0])
def test_stopped_before_the_first_point_of_history(place, seconds):
    """A point is taken every 10,000 steps here: the checkpoint has no history yet."""
    out, words = place / f"early-{seconds}", [*LONG[:-3], "--steps", 1_000_000, "--out"]
    running = subprocess.Popen([SCRIPT, *map(str, words), out], cwd=place, stderr=subprocess.PIPE, text=True)
    assert "training" in running.stderr.readline()  # it compiles now
    time.sleep(seconds)
    running.send_signal(signal.SIGTERM)
    told = running.communicate(timeout=60)[1]
    assert running.returncode == 0, told
    assert "go on with" in told
    assert "Traceback" not in told
    assert not list(out.rglob("*tmp*"))
    # it goes on: the second stop is of the same run
    running = subprocess.Popen(
        [SCRIPT, *map(str, words), out, "--resume"], cwd=place, stderr=subprocess.PIPE, text=True
    )
    assert "training" in running.stderr.readline()
    running.send_signal(signal.SIGTERM)
    assert "go on with" in running.communicate(timeout=60)[1]
    assert running.returncode == 0


@pytest.mark.slow
def test_a_run_stopped_while_it_replaces_another_goes_on(place):
    out = place / "replaced"
    assert sae(*LONG[:-3], "--steps", 5, "--out", out, cwd=place).returncode == 0
    running = subprocess.Popen(
        [SCRIPT, *LONG, out, "--overwrite"], cwd=place, stderr=subprocess.PIPE, text=True
    )
    assert "training" in running.stderr.readline()
    running.send_signal(signal.SIGTERM)
    assert "go on with" in running.communicate(timeout=60)[1]
    resumed = sae(*LONG, out, "--resume", cwd=place)
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads((out / "sweep.json").read_text())["steps"] == 6000
    assert {path.name for path in out.iterdir()} == FILES


def test_a_signal_while_the_folder_is_written_waits(tmp_path):
    running = subprocess.Popen(
        [SCRIPT, "sweep", "--out", "r"], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    while not (tmp_path / "r" / ".writing").exists():
        time.sleep(0.005)
    running.send_signal(signal.SIGTERM)
    told = running.communicate(timeout=60)[1]
    assert running.returncode == 0, told
    assert {path.name for path in (tmp_path / "r").iterdir()} == FILES


def test_a_full_disk_leaves_nothing_half_written(small_disk):
    done = sae("sweep", "--steps", 5, "--seeds", 1, "--out", small_disk / "r", cwd=small_disk)
    assert done.returncode == 2
    assert "the disk is full" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert os.listdir(small_disk) == []


def test_a_disk_that_fills_during_a_checkpoint(small_disk, place):
    (small_disk / "filler").write_bytes(bytes(150_000))
    running = subprocess.Popen(
        [SCRIPT, *LONG, small_disk / "r"], cwd=place, stderr=subprocess.PIPE, text=True
    )
    assert "training" in running.stderr.readline()
    assert "0%" in running.stderr.readline()
    running.send_signal(signal.SIGTERM)
    told = running.communicate(timeout=60)[1]
    assert running.returncode == 2
    assert "the disk is full" in told
    assert "could not be saved" in told.splitlines()[-1]
    assert "Traceback" not in told
    assert os.listdir(small_disk) == ["filler"]


def test_verify_exits_1_on_a_breach(monkeypatch, capsys):
    monkeypatch.setattr(verification, "verify", lambda steps, all_cases: iter([("case", report)]))
    for bound, status in [(1e-3, 0), (1e-5, 1)]:
        report = sae_jax_report(bound)
        with pytest.raises(SystemExit) as stop:
            main(["verify"])
        assert stop.value.code == status
        assert "1.0e-04" in capsys.readouterr().out


def sae_jax_report(bound):
    stages = verification.STAGES
    return verification.Report(
        "float64", 1, {stage: {"loss": 1e-4} for stage in stages}, dict.fromkeys(stages, bound)
    )


@pytest.mark.slow
def test_verify_runs(place):
    done = sae("verify", "--steps", 2, "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ok"]
    assert {report["case"].split(",")[0] for report in found["reports"]} == {"relu"}
    assert len(found["reports"]) == 16


def test_a_sweep_in_a_world(tmp_path):
    words = "sweep --world matryoshka_tree --world-args d_in=24 --arch topk --l0 1,2 --lr 0.003".split()
    done = sae(*words, "--seeds", 3, "--steps", 200, "--json", "--out", "r", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["data"] == "the world matryoshka_tree d_in=24"
    assert [setting["k"] for setting in told["settings"]] == [1, 2]
    mean, half_width = told["settings"][1]["mcc"]
    rows = rows_of(tmp_path / "r")
    assert mean == pytest.approx(np.mean([float(row["mcc"]) for row in rows[3:]]))
    assert half_width > 0
    assert all(0 < float(row["consistency"]) <= 1 for row in rows)
    found = sae(
        "eval",
        "r/members/004",
        "--world",
        "matryoshka_tree",
        "--world-args",
        "d_in=24",
        "--json",
        cwd=tmp_path,
    )
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["mcc"] == pytest.approx(float(rows[4]["mcc"]), abs=1e-6)


def test_the_doctor(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--json"])
    assert stop.value.code == 0
    found = {check["name"]: check for check in json.loads(capsys.readouterr().out)}
    assert found["numeric probe"]["found"] == "exact"
    monkeypatch.setitem(doctor.KNOWN_BAD, doctor.version_of("jaxlib"), "is broken")
    with pytest.raises(SystemExit) as stop:
        main(["doctor"])
    assert stop.value.code == 1
    assert "is broken" in capsys.readouterr().out


def test_version_and_help(place):
    assert sae("--version", cwd=place).stdout.strip() == sae_jax.__version__
    shown = sae("--help", cwd=place).stdout
    assert all(command in shown for command in ("sweep", "train", "eval", "verify", "doctor"))
    module = subprocess.run(
        [sys.executable, "-m", "sae_jax", "--version"], capture_output=True, text=True, check=True
    )
    assert module.stdout.strip() == sae_jax.__version__


def test_architectures_side_by_side_and_what_eval_needs_of_a_transcoder(place):
    few = ["--steps", 5, "--d-sae", 8, "--quiet", "--batch-size", 16]
    both = ["--arch", "relu,topk", "--l0", "2,3", "--arg", "auxk_loss=auxk.normalised"]
    done = sae("sweep", "acts.npy", *both, *few, "--out", "both", cwd=place)
    assert done.returncode == 0, done.stderr
    rows = (place / "both" / "metrics.csv").read_text().splitlines()
    assert rows[0].startswith("member,architecture,d_sae,target_l0,lr,seed,k,")
    assert len(rows) == 5
    rows = np.load(place / "acts.npy")
    np.save(place / "after.npy", np.tanh(rows[:, :3]))
    across = ["--arch", "transcoder", "--target", "after.npy", "--l1", 0.1, "--arg", "skip=True"]
    done = sae("sweep", "acts.npy", *across, *few, "--out", "across", cwd=place)
    assert done.returncode == 0, done.stderr
    member = "across/members/000"
    wrong = sae("eval", member, "acts.npy", cwd=place)
    assert wrong.returncode == 2
    said = f"{member} is a transcoder: give --target FILE, or of a store --target-site NAME"
    assert wrong.stderr.strip() == f"sae-jax: {said}"
    right = sae("eval", member, "acts.npy", "--target", "after.npy", "--json", cwd=place)
    table = (place / "across" / "metrics.csv").read_text().splitlines()
    mse = float(table[1].split(",")[table[0].split(",").index("mse")])
    assert json.loads(right.stdout)["mse"] == pytest.approx(mse, rel=1e-5)
