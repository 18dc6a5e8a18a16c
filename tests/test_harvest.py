"""From a model to a store: the rows that were kept, in one pass, whatever happens on the way."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sae_jax
from sae_jax import InputError, Stopped, harvest
from sae_jax.data import open_store
from sae_jax.data import writer as writers
from sae_jax.language_models import Contexts, from_tokens, nnx_capture

VOCABULARY, WIDTH = 50, 8
TABLE = np.random.default_rng(0).normal(size=(VOCABULARY, WIDTH)).astype(np.float32)
TOKENS = np.random.default_rng(1).integers(0, VOCABULARY, (300, 16)).astype(np.int32)


def activations(tokens):
    return {"embed": TABLE[tokens], "sums": np.cumsum(TABLE[tokens], axis=1)[..., :4]}


def batches(special=(0, 1)):
    return from_tokens(TOKENS, 32, special=special)


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of 1,024 rows, the least."""
    monkeypatch.setattr(writers, "MOST_ROWS_OF_A_SHARD", 1024)
    monkeypatch.setattr(writers, "chunk_rows_for", lambda row_bytes: 512)


def files(folder):
    """The bytes of every file below."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# What is stored


def test_every_kept_row_of_every_site_is_stored_in_order(tmp_path):
    found = harvest(activations, batches(), tmp_path / "s", dtype="float32", about={"model": "a table"})
    kept = TOKENS > 1
    assert found.rows == kept.sum()
    assert found.sites == ("embed", "sums")
    np.testing.assert_array_equal(found.site("embed").read(0, found.rows), TABLE[TOKENS[kept]])
    np.testing.assert_array_equal(found.site("sums").read(0, found.rows), activations(TOKENS)["sums"][kept])
    np.testing.assert_array_equal(found.tokens.read(0, found.rows), TOKENS[kept])
    np.testing.assert_array_equal(found.positions.read(0, found.rows), np.nonzero(kept)[1])
    assert found.manifest.about == {"model": "a table", "context": 16}
    assert open_store(tmp_path / "s").manifest.complete


def test_as_many_rows_as_were_asked_for(tmp_path):
    found = harvest(activations, batches(), tmp_path / "s", rows=1000)
    assert found.rows == 1000
    whole = harvest(activations, batches(), tmp_path / "w")
    np.testing.assert_array_equal(found.tokens.read(0, 1000), whole.tokens.read(0, 1000))


def test_a_model_in_flax_to_a_store_to_a_sweep(tmp_path):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
            self.up = nnx.Linear(WIDTH, 12, rngs=rngs)

        def hidden(self, tokens):
            return nnx.relu(self.up(self.embed(tokens)))

        def __call__(self, tokens):
            return self.hidden(tokens).sum(axis=-1)

    model = Model(nnx.Rngs(0))
    store = harvest(nnx_capture.capture(model, ["hidden"]), batches(), tmp_path / "s", dtype="float32")
    expected = np.asarray(model.hidden(jnp.asarray(TOKENS)))[TOKENS > 1]
    np.testing.assert_allclose(store.site().read(0, store.rows), expected, rtol=1e-6)
    result = sae_jax.sweep(lambda l1: sae_jax.relu(12, 24, l1=l1), grid=sae_jax.grid(l1=[0.01], lr=[1e-2]),
                           source=sae_jax.stored(store.site(), 64), steps=200)  # fmt: skip
    assert result.table["explained_variance"][0] > 0.9


def test_an_epoch_of_the_source_is_the_store(tmp_path):
    store = harvest(activations, batches(), tmp_path / "s", dtype="float32")
    source = sae_jax.stored(store.site("embed"), 64, 3)
    n = store.rows
    assert sorted(source.order.rows_of(0, n).tolist()) == list(range(n))
    expected = store.site("embed").read(0, n)[source.order.rows_of(5 * 64, 6 * 64)]
    np.testing.assert_array_equal(source.batch(jnp.int32(5)).x, expected)


# Interrupted


@pytest.mark.usefixtures("small_shards")
def test_a_stopped_harvest_goes_on_to_the_same_bytes(tmp_path):
    whole = harvest(activations, batches(), tmp_path / "whole")
    assert len(list((tmp_path / "whole" / "embed").rglob("0"))) > 3
    for after in (3, 4, 6, 2, 8):
        calls = iter(range(100))
        try:
            harvest(activations, batches(), tmp_path / "s", look=lambda _: next(calls) >= after)  # noqa: B023
        except Stopped:
            with pytest.raises(InputError, match="still being written"):
                open_store(tmp_path / "s")
        else:
            break
    else:
        harvest(activations, batches(), tmp_path / "s")
    assert files(tmp_path / "s") == files(tmp_path / "whole")
    assert whole.rows == open_store(tmp_path / "s").rows


@pytest.mark.usefixtures("small_shards")
def test_a_model_that_fails_midway_leaves_what_is_stored(tmp_path):
    calls = []

    def failing(tokens):
        calls.append(1)
        if len(calls) == 7:
            raise RuntimeError("out of luck")
        return activations(tokens)

    with pytest.raises(RuntimeError):
        harvest(failing, batches(), tmp_path / "s")
    stored = open_store(tmp_path / "s", unfinished=True)
    assert 0 < stored.rows < 6 * 32 * 16
    np.testing.assert_array_equal(stored.tokens.read(0, stored.rows), TOKENS[TOKENS > 1][: stored.rows])
    harvest(activations, batches(), tmp_path / "s")
    harvest(activations, batches(), tmp_path / "whole")
    assert files(tmp_path / "s") == files(tmp_path / "whole")


@pytest.mark.usefixtures("small_shards")
def test_other_tokens_do_not_go_on(tmp_path):
    calls = iter(range(100))
    with pytest.raises(Stopped):
        harvest(activations, batches(), tmp_path / "s", look=lambda _: next(calls) > 4)
    other = from_tokens(np.roll(TOKENS, 1, axis=0), 32, special=(0, 1))
    with pytest.raises(InputError, match="begun on other tokens"):
        harvest(activations, other, tmp_path / "s")
    with pytest.raises(InputError, match="model was None, now another"):
        harvest(activations, batches(), tmp_path / "s", about={"model": "another"})
    with pytest.raises(InputError, match="dtype was bfloat16, now float32"):
        harvest(activations, batches(), tmp_path / "s", dtype="float32")


MODEL = """
import time
import numpy as np
TABLE = np.random.default_rng(0).normal(size=(1000, 16)).astype(np.float32)
MIX = np.random.default_rng(1).normal(size=(16, 16)).astype(np.float32)
def model(tokens):
    time.sleep(0.02)
    return {"a": TABLE[tokens], "b": np.maximum(TABLE[tokens] @ MIX, 0)}
"""


@pytest.mark.slow
def test_kill_9_changes_no_byte(tmp_path):
    """Real processes, killed outright at moments drawn by chance, as a user would start them."""
    (tmp_path / "mine.py").write_text(MODEL)
    rng = np.random.default_rng(int(time.time()))
    np.save(tmp_path / "tokens.npy", np.random.default_rng(2).integers(0, 1000, (5000, 64)).astype(np.int32))

    def start(out):
        command = "harvest --model mine:model --tokens tokens.npy --batch-size 40 --quiet --out"
        return subprocess.Popen([sys.executable, "-m", "sae_jax", *command.split(), out], cwd=tmp_path)

    assert start("whole").wait() == 0
    killed = 0
    for _ in range(12):
        process = start("s")
        manifest, before = tmp_path / "s" / "manifest.json", time.time()
        while process.poll() is None and not (manifest.exists() and manifest.stat().st_mtime > before):
            time.sleep(0.01)  # until it is at work
        try:
            process.wait(timeout=rng.uniform(0, 0.5))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
        if open_store(tmp_path / "s", unfinished=True).manifest.complete:
            break
    else:
        assert start("s").wait() == 0
    assert killed >= 3
    assert files(tmp_path / "s") == files(tmp_path / "whole")


# Bad input


def contexts_of(tokens, kept=None):
    return [Contexts(tokens, np.ones(tokens.shape, bool) if kept is None else kept)]


@pytest.mark.parametrize(
    ("model", "contexts", "options", "sentence"),
    [
        (activations, [], {}, "does not fill a context"),
        (activations, contexts_of(TOKENS, TOKENS < 0), {}, "no rows are left"),
        (lambda tokens: {}, contexts_of(TOKENS), {}, "no site"),
        (lambda tokens: {"a": np.ones(3)}, contexts_of(TOKENS), {}, r"must give \[batch, context, d_in\]"),
        (lambda tokens: {"tokens": TABLE[tokens]}, contexts_of(TOKENS), {}, "cannot be called 'tokens'"),
        (lambda tokens: {"a": TABLE[tokens] * np.nan}, contexts_of(TOKENS), {}, "first in row 0"),
        (lambda tokens: {"a": TABLE[tokens] * 1e6}, contexts_of(TOKENS), {"dtype": "float16"}, "as float16"),
        (activations, contexts_of(TOKENS), {"dtype": "int8"}, "not int8"),
        (activations, contexts_of(TOKENS), {"rows": 0}, "rows must be at least 1"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence_and_leaves_nothing(model, contexts, options, sentence, tmp_path):
    with pytest.raises(InputError, match=sentence):
        harvest(model, contexts, tmp_path / "s", **options)
    assert not (tmp_path / "s").exists()


def test_a_model_that_changes_its_width_is_told(tmp_path):
    widths = iter([8, 8, 4])
    with pytest.raises(InputError, match="now gives"):
        harvest(lambda tokens: {"a": TABLE[tokens][..., : next(widths)]}, batches(), tmp_path / "s")


def test_a_finished_store_is_not_written_again(tmp_path):
    harvest(activations, batches(), tmp_path / "s")
    before = files(tmp_path / "s")
    with pytest.raises(InputError, match="complete already"):
        harvest(activations, batches(), tmp_path / "s")
    assert files(tmp_path / "s") == before


def test_strangers_are_left_alone(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="not empty and holds no store"):
        harvest(activations, batches(), tmp_path)
    assert [path.name for path in Path(tmp_path).iterdir()] == ["letter.txt"]
