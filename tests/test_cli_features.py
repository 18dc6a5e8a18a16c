"""`sae-jax features` writes a whole dashboard or nothing, and says in a sentence what is wrong."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

import sae_jax
from sae_jax.cli import main

WORDS = ["a", " b", " c", " d", "</script>", "é"]


def run(capsys, *arguments):
    """Exit status, stdout, stderr."""
    with pytest.raises(SystemExit) as ended:
        main([str(each) for each in arguments])
    told = capsys.readouterr()
    return ended.value.code, told.out, told.err


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    table = np.random.default_rng(0).normal(size=(len(WORDS), 6)).astype(np.float32)
    tokens = np.random.default_rng(1).integers(0, len(WORDS), (20, 8))
    contexts = sae_jax.language_models.from_tokens(tokens)
    return sae_jax.harvest(
        lambda batch: {"site": table[batch]}, contexts, tmp_path_factory.mktemp("s") / "acts"
    )


@pytest.fixture
def trained(tmp_path):
    sae = sae_jax.topk(6, 16, k=2)
    sae_jax.TrainedSAE(sae, sae.init(jax.random.key(0))).save(tmp_path / "sae")
    return tmp_path / "sae"


def test_a_store_with_words_and_an_unembedding(trained, store, tmp_path, capsys):
    (tmp_path / "words.json").write_text(json.dumps(WORDS))
    np.save(tmp_path / "unembedding.npy", np.eye(6, dtype=np.float32))
    status, out, err = run(
        capsys, "features", trained, store.location, "--tokenizer", tmp_path / "words.json",
        "--unembedding", tmp_path / "unembedding.npy", "--json",
    )  # fmt: skip
    told = json.loads(out)
    assert status == 0
    assert told["rows"] == 160
    assert told["features"] == 16
    assert told["left_out"] == [
        "How stable features are across seeds is not shown: there are no SAEs of other seeds."
    ]
    assert "GB of the device's memory" in err
    page = trained / "features" / "index.html"
    assert page.is_file()
    assert "sae-jax" in page.read_text()
    assert not (trained / "features" / ".writing").exists()
    # an SAE with a dashboard beside it is still an SAE
    sae_jax.load(trained)


def test_without_tokens_the_page_says_what_it_leaves_out(trained, tmp_path, capsys):
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32))
    status, _, err = run(capsys, "features", trained, tmp_path / "rows.npy", "--out", tmp_path / "page")
    assert status == 0
    assert "The rows come without tokens" in err
    assert "without tokens" in (tmp_path / "page" / "index.html").read_text()


def test_a_member_of_a_sweep_brings_its_seeds_and_its_report(tmp_path, capsys):
    run(capsys, "sweep", "--steps", "5", "--l1", "0.1", "--seeds", "3", "--out", tmp_path / "run", "--quiet")
    status, out, _ = run(capsys, "features", tmp_path / "run/members/001", "--json", "--quiet")
    assert status == 0
    assert not [sentence for sentence in json.loads(out)["left_out"] if "seeds" in sentence]
    assert "members/001/features/index.html" in (tmp_path / "run/report.html").read_text()


def test_the_folder_in_use_is_left_alone(trained, store, tmp_path, capsys):
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "mine.txt").write_text("mine")
    for extra in ([], ["--overwrite"]):
        status, _, err = run(capsys, "features", trained, store.location, "--out", tmp_path / "page", *extra)
        assert status == 2
        assert str(tmp_path / "page") in err
        assert [path.name for path in (tmp_path / "page").iterdir()] == ["mine.txt"]


def test_a_page_of_somebody_else_is_left_alone(trained, store, tmp_path, capsys):
    (tmp_path / "site" / "photos").mkdir(parents=True)
    (tmp_path / "site" / "index.html").write_text("mine")
    status, _, err = run(
        capsys, "features", trained, store.location, "--out", tmp_path / "site", "--overwrite", "--quiet"
    )
    assert status == 2
    assert "give another folder" in err
    assert (tmp_path / "site" / "index.html").read_text() == "mine"
    assert (tmp_path / "site" / "photos").is_dir()


def test_the_report_keeps_the_comparison_of_seeds(tmp_path, capsys):
    out = tmp_path / "run"
    run(capsys, "sweep", "--steps", "20", "--l1", "0.01,0.1", "--seeds", "3", "--save", "frontier",
        "--out", out, "--quiet")  # fmt: skip
    before = (out / "report.html").read_text()
    kept = sorted((out / "members").iterdir())[0]
    assert run(capsys, "features", kept, "--quiet")[0] == 0
    after = (out / "report.html").read_text()
    assert after != before
    for part in ('id="stability-consistency"', 'id="stability-features"'):
        assert part in before
        assert part in after


def test_a_seed_that_diverged_is_no_other_seed(tmp_path, capsys):
    out = tmp_path / "run"
    run(capsys, "sweep", "--steps", "20", "--l1", "0.1", "--seeds", "2", "--out", out, "--quiet")
    table = (out / "metrics.csv").read_text()
    assert run(capsys, "features", out / "members/000", "--json", "--quiet")[1].count("seeds") == 0
    (out / "metrics.csv").write_text(table[::-1].replace("ok"[::-1], "diverged"[::-1], 1)[::-1])
    told = run(capsys, "features", out / "members/000", "--json", "--quiet", "--overwrite")[1]
    assert "there are no SAEs of other seeds" in told


def test_overwrite_replaces_a_dashboard(trained, store, tmp_path, capsys):
    out = ("--out", tmp_path / "page", "--quiet")
    assert run(capsys, "features", trained, store.location, *out)[0] == 0
    status, _, err = run(capsys, "features", trained, store.location, *out)
    assert status == 2
    assert "--overwrite" in err
    (tmp_path / "page" / "index.html").write_text("old")
    assert run(capsys, "features", trained, store.location, "--overwrite", *out)[0] == 0
    assert (tmp_path / "page" / "index.html").read_text() != "old"


def test_other_forms_beside_it(trained, store, tmp_path, capsys):
    status, _, _ = run(
        capsys, "features", trained, store.location, "--out", tmp_path / "page", "--quiet",
        "--also", "circuit-tracer", "--also", "neuronpedia",
    )  # fmt: skip
    assert status == 0
    assert any((tmp_path / "page" / "circuit-tracer").iterdir())
    assert any((tmp_path / "page" / "neuronpedia").iterdir())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{sae}", "{rows}"], "reads rows of [6], but"),
        (["{sae}", "{store}", "--rows", "0"], "rows must be at least 1"),
        (["{sae}", "{store}", "--site", "other"], "has no site 'other'"),
        (["{sae}", "{store}", "--tokenizer", "{none}.json"], "there is no file"),
        (["{sae}", "{store}", "--tokenizer", "{short}"], "there are 2 words, but a token has the id 5"),
        (["{sae}", "{store}", "--labels", "{labels}"], "feature 99 does not exist"),
        (["{sae}", "{store}", "--unembedding", "{rows}"], "an unembedding is [6, vocabulary]"),
        (["{sae}", "{store}", "--unembedding", "{rows}", "--model", "m"], "give one of them"),
        (["{sae}", "{store}", "--strongest", "0"], "strongest must be at least 1"),
        (["{sae}", "{store}", "--tokenizer", "{deep}"], "cannot be read as JSON"),
        (["{sae}", "{store}", "--layer", "-1"], "--layer must be at least 0"),
        (["{sae}", "{none}"], "does not exist"),
        (["{none}", "{store}"], ""),
        (["{sae}", "{store}", "--seeds", "{none}"], ""),
        (["{sae}", "{store}", "--out", "{short}"], "is a file, not a folder"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(arguments, sentence, trained, store, tmp_path, capsys):
    np.save(tmp_path / "rows.npy", np.zeros((4, 3), np.float32))
    (tmp_path / "short.json").write_text('["a", "b"]')
    (tmp_path / "labels.json").write_text('{"99": "beyond"}')
    (tmp_path / "deep.json").write_text("[" * 100_000)
    made = {
        "rows": "rows.npy",
        "none": "none",
        "short": "short.json",
        "labels": "labels.json",
        "deep": "deep.json",
    }
    places = {"sae": trained, "store": store.location, **{key: tmp_path / name for key, name in made.items()}}
    before = sorted(tmp_path.rglob("*"))
    status, out, err = run(capsys, "features", *(each.format(**places) for each in arguments))
    assert status == 2
    assert out == ""
    last = err.strip().splitlines()[-1]
    assert last.startswith("sae-jax: ")
    assert sentence in last
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_leaves_nothing(trained, store, tmp_path):
    """A real one: the process may write no file above 4 kB."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); "
        "from sae_jax.cli import main; main(sys.argv[1:])"
    )
    command = ["features", trained, store.location, "--out", tmp_path / "page", "--quiet"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, command)], capture_output=True, text=True)
    assert done.returncode == 2
    assert "the disk is full" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "page").exists()
