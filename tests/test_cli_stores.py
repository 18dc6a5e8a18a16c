"""The command line on real activations: harvest a model, train on the store, measure there."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

import sae_jax
from sae_jax import harvest
from sae_jax.cli import main
from sae_jax.data import store
from sae_jax.language_models import from_tokens

MODEL = """
import jax.numpy as jnp
import numpy as np
from flax import nnx

TABLE = np.random.default_rng(0).normal(size=(50, 16)).astype(np.float32)

def table(tokens):
    return {"embed": TABLE[tokens], "rectified": np.maximum(TABLE[tokens], 0)}

class Network(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(50, 16, rngs=rngs)
        self.up = nnx.Linear(16, 24, rngs=rngs)
        self.down = nnx.Linear(24, 50, rngs=rngs)
    def hidden(self, tokens):
        return nnx.relu(self.up(self.embed(tokens)))
    def __call__(self, tokens):
        return self.down(self.hidden(tokens))

network = Network(nnx.Rngs(0))
seven = 7
"""
TABLE = np.random.default_rng(0).normal(size=(50, 16)).astype(np.float32)
TOKENS = np.random.default_rng(1).integers(0, 50, (200, 32)).astype(np.int32)


def run(*words, capsys):
    """Exit status, and what was said."""
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    return stop.value.code, capsys.readouterr()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a store of two sites, a model, and its tokens."""
    place = tmp_path_factory.mktemp("stores")
    (place / "mine.py").write_text(MODEL)
    np.save(place / "tokens.npy", TOKENS)
    harvest(lambda tokens: {"in": TABLE[tokens], "out": np.tanh(TABLE[tokens][..., :8])},
            from_tokens(TOKENS), place / "acts")  # fmt: skip
    return place


@pytest.fixture(autouse=True)
def inside(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    monkeypatch.setattr(store, "RETRIES", 0)


FEW = ["--d-sae", 24, "--batch-size", 64, "--steps", 30, "--quiet"]


# Harvest


def test_a_function_of_python_is_harvested(place, tmp_path, capsys):
    status, said = run("harvest", "--model", "mine:table", "--tokens", "tokens.npy", "--dtype", "float32",
                       "--out", tmp_path / "s", "--json", "--quiet", capsys=capsys)  # fmt: skip
    assert status == 0
    told = json.loads(said.out)
    assert told["rows"] == TOKENS.size
    assert set(told["sites"]) == {"embed", "rectified"}
    store = sae_jax.open_store(tmp_path / "s")
    np.testing.assert_array_equal(store.site("embed").read(0, 100), TABLE[TOKENS.reshape(-1)[:100]])
    assert store.manifest.about["model"] == "mine:table"
    assert store.manifest.about["tokens"] == "tokens.npy"


def test_a_network_in_flax_is_harvested_at_its_sites(place, tmp_path, capsys):
    status, said = run("harvest", "--model", "mine:network", "--list-hooks", "--json", capsys=capsys)
    assert status == 0
    assert {"name": "hidden", "width": 24, "dtype": "float32", "kind": "Network"} in json.loads(said.out)
    words = ["--hook", "hidden", "--tokens", "tokens.npy", "--rows", 1000, "--out", tmp_path / "s"]
    status, said = run("harvest", "--model", "mine:network", *words, capsys=capsys)
    assert status == 0, said.err
    assert "1,000 rows" in said.err
    from mine import network

    expected = np.asarray(network.hidden(jnp.asarray(TOKENS[:32]))).reshape(-1, 24)[:1000]
    found = sae_jax.open_store(tmp_path / "s").site().read(0, 1000)
    np.testing.assert_allclose(found.astype(np.float32), expected, rtol=0.01, atol=1e-6)


def test_a_model_of_torch_from_text_to_a_sweep_to_its_loss(tmp_path, capsys):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {"<s>": 0, **{letter: i for i, letter in enumerate(sorted(alphabet), 1)}}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(tmp_path / "m")
    shape = {"n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(vocab_size=257, **shape)).save_pretrained(tmp_path / "m")
    (tmp_path / "t.txt").write_text("Of all the tokens, " * 400)
    capsys.readouterr()  # transformers' bars
    words = ["--text", tmp_path / "t.txt", "--context", 32]
    status, said = run("harvest", "--model", tmp_path / "m", "--hook", "transformer.h.0.mlp", *words,
                       "--out", tmp_path / "acts", capsys=capsys)  # fmt: skip
    assert status == 0, said.err
    store = sae_jax.open_store(tmp_path / "acts")
    assert store.rows == 7600 // 31 * 31  # BOS begins each context, and is left out
    assert store.manifest.about["begin"] == "context"
    status, said = run(
        "sweep", tmp_path / "acts", *FEW, "--l1", 0.001, "--out", tmp_path / "run", capsys=capsys
    )
    assert status == 0, said.err
    member = tmp_path / "run" / "members" / "000"
    status, said = run("eval", member, tmp_path / "acts", "--model", tmp_path / "m",
                       "--hook", "transformer.h.0.mlp", *words, "--json", capsys=capsys)  # fmt: skip
    assert status == 0, said.err
    told = json.loads(said.out)
    assert told["ce_clean"] == pytest.approx(np.log(257), rel=0.05)
    assert np.isfinite(told["loss_recovered"])
    assert told["l0"] > 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--model mine:table --tokens tokens.npy", "say where to: --out STORE"),
        ("--model mine:table --out s", "say what the model is to read"),
        ("--model mine:table --tokens tokens.npy --text mine.py --out s", "say what the model is to read"),
        ("--model mine:nothing --tokens tokens.npy --out s", "the Python module mine has no nothing"),
        ("--model nowhere:x --tokens tokens.npy --out s", "there is no Python module nowhere"),
        ("--model mine:seven --tokens tokens.npy --out s", "neither an nnx model nor a function"),
        (
            "--model mine:table --hook emebd --tokens tokens.npy --out s",
            "gives no site 'emebd'; it gives embed",
        ),
        ("--model mine:network --tokens tokens.npy --out s", "name a site: --hook NAME"),
        ("--model mine:network --hook hiden --tokens tokens.npy --out s", "has no site hiden"),
        ("--model mine:table --tokens none.npy --out s", "there is no file none.npy"),
        ("--model mine:table --tokens mine.py --out s", "mine.py cannot be read as .npy"),
        ("--model mine:table --tokens tokens.npy --out mine.py", "is a file, not a folder"),
        ("--model mine:table --tokens tokens.npy --out acts", "begun with other options"),
        ("--model mine:table --tokens tokens.npy --out s --rows 0", "rows must be at least 1"),
        ("--model mine:table --tokens tokens.npy --out s --batch-size 0", "--batch-size must be at least 1"),
        ("--model ./where --text mine.py --hook a --out s", "./where"),
    ],
)
def test_bad_input_to_a_harvest_is_one_sentence(words, says, place, capsys):
    before = sorted(os.listdir())
    status, said = run("harvest", *words.split(), "--quiet", capsys=capsys)
    assert status == 2
    assert says in said.err
    assert said.err.startswith("sae-jax: ")
    assert said.err.count("\n") == 1
    assert sorted(set(os.listdir()) - {"__pycache__"}) == [name for name in before if name != "__pycache__"]


def start(*words, place):
    return subprocess.Popen(
        [sys.executable, "-m", "sae_jax", *words], cwd=place, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_sigterm_ends_a_harvest_which_then_goes_on(place, tmp_path):
    """A function that takes its time, so that there is a middle to be stopped in."""
    (place / "slow.py").write_text(
        "import time\nimport mine\ndef model(tokens):\n    time.sleep(0.05)\n    return mine.table(tokens)\n"
    )
    np.save(place / "many.npy", np.random.default_rng(3).integers(0, 50, (4000, 64)).astype(np.int32))
    words = ["harvest", "--model", "slow:model", "--tokens", "many.npy", "--out", str(tmp_path / "s")]
    process = start(*words, place=place)
    manifest = tmp_path / "s" / "manifest.json"
    while not manifest.exists() or json.loads(manifest.read_text())["rows"] == 0:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 0
    assert "stopped; go on with: sae-jax harvest --model slow:model" in said
    again = start(*words, place=place)
    said = again.communicate(timeout=120)[1]
    assert again.returncode == 0, said
    assert sae_jax.open_store(tmp_path / "s").rows == 4000 * 64


# Training on a store


def metrics(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_each_site_is_swept_by_itself(tmp_path, capsys):
    status, said = run("sweep", "acts", "--site", "in,out", *FEW, "--l1", "0.01,0.1", "--out", tmp_path / "r",
                       capsys=capsys)  # fmt: skip
    assert status == 0, said.err
    for site, width in (("in", 16), ("out", 8)):
        assert len(metrics(tmp_path / "r" / site)) == 2
        trained = sae_jax.load(tmp_path / "r" / site / "members" / "000")
        assert trained.sae.config["d_in"] == width
        assert json.loads((tmp_path / "r" / site / "sweep.json").read_text())["data"].endswith(
            f"acts, {site}"
        )


@pytest.mark.slow
def test_a_stopped_sweep_of_sites_goes_on_as_it_says(place, tmp_path):
    words = "sweep acts --site in,out --d-sae 24 --l1 0.1 --seeds 1 --steps 20000".split()
    process = start(*words, place=place)
    while "%" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 0, said
    again = said.split("go on with: sae-jax ")[1].split()
    assert again == [*words, "--out", "runs/acts-1", "--resume"]
    assert [path.name for path in (place / "runs" / "acts-1").iterdir()] == ["in"]
    ended = start(*again, place=place)
    said = ended.communicate(timeout=120)[1]
    assert ended.returncode == 0, said
    for site in ("in", "out"):
        assert len(metrics(place / "runs" / "acts-1" / site)) == 1


def test_crosscoders_and_transcoders_read_two_sites(tmp_path, capsys):
    harvest(
        lambda tokens: {"a": TABLE[tokens], "b": TABLE[tokens] ** 2}, from_tokens(TOKENS), tmp_path / "two"
    )
    two = tmp_path / "two"
    status, said = run("sweep", two, "--site", "a,b", "--arch", "crosscoder", *FEW, "--l1", 0.01,
                       "--out", tmp_path / "c", capsys=capsys)  # fmt: skip
    assert status == 0, said.err
    status, said = run(
        "eval", tmp_path / "c" / "members" / "000", two, "--site", "a,b", "--json", capsys=capsys
    )
    assert len(json.loads(said.out)["explained_variance_by_source"]) == 2
    status, said = run("sweep", two, "--site", "a", "--target-site", "b", "--arch", "transcoder", *FEW,
                       "--l1", 0.01, "--out", tmp_path / "t", capsys=capsys)  # fmt: skip
    assert status == 0, said.err
    member = tmp_path / "t" / "members" / "000"
    status, said = run("eval", member, two, "--site", "a", capsys=capsys)
    assert status == 2
    assert "--target-site NAME" in said.err
    status, said = run("eval", member, two, "--site", "a", "--target-site", "b", "--json", capsys=capsys)
    assert json.loads(said.out)["mse"] > 0


@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".pt"])
def test_a_file_is_streamed_where_that_is_asked(suffix, tmp_path, capsys):
    rows = np.random.default_rng(0).normal(size=(3000, 16)).astype(np.float32)
    path = tmp_path / f"x{suffix}"
    if suffix == ".npy":
        np.save(path, rows)
    elif suffix == ".pt":
        import torch

        torch.save(torch.from_numpy(rows), path)
    else:
        from safetensors.numpy import save_file

        save_file({"x": rows}, path)
    status, said = run("sweep", path, "--stream", *FEW, "--l1", 0.01, "--normalise", "centring",
                       "--out", tmp_path / "r", capsys=capsys)  # fmt: skip
    assert status == 0, said.err
    status, said = run("eval", tmp_path / "r" / "members" / "000", path, "--json", capsys=capsys)
    if suffix != ".pt":  # eval reads a file at once, and .pt is only streamed
        assert status == 0, said.err
        assert json.loads(said.out)["explained_variance"] > 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("sweep acts", "holds several sites (in, out): name one of them (--site NAME"),
        ("sweep acts --site inn", "has no site 'inn'; it holds in, out"),
        ("sweep acts --site in --array x", "--site NAME in place of --array"),
        ("sweep acts --site in --target tokens.npy", "--target-site NAME"),
        ("sweep acts --site in --target-site out", "are for --arch transcoder"),
        ("sweep acts --site in,out --arch crosscoder", "a crosscoder's sources must be alike"),
        ("sweep tokens.npy --site in", "--site is for a store"),
        ("sweep tokens.npy --window-rows 5", "--window-rows is for rows that are streamed"),
        ("sweep tokens.npy --stream", "real floating-point numbers"),
        ("sweep --stream", "--stream is for rows that are streamed"),
        ("sweep --world hedging --site in", "leave out --site"),
        ("sweep --world hedging --stream", "leave out --stream"),
        ("sweep acts --site in --window-rows 0", "window_rows must be at least 1"),
        ("sweep acts --site in --batch-size 0", "batch_size must be at least 1"),
        ("sweep http://127.0.0.1:1/acts/", "http://127.0.0.1:1/acts/ cannot be read"),
        ("sweep nowhere/", "nowhere does not exist"),
    ],
)
def test_bad_input_about_stores_is_one_sentence(words, says, capsys):
    status, said = run(*words.split(), "--steps", "2", "--out", "nowhere/r", capsys=capsys)
    assert status == 2
    assert says in said.err
    assert said.err.startswith("sae-jax: ")
    assert said.err.count("\n") == 1
    assert not os.path.exists("nowhere")
