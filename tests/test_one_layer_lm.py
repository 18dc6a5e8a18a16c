"""The one-layer language model's example: its parts against plain counts, the whole at a small size."""

import importlib.util
import json
import sys
from collections import Counter, defaultdict
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import sae_jax
from sae_jax.features import Context
from sae_jax.language_models import nnx_capture

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.append(str(EXAMPLES))

from lm import byte_pairs, corpus, ngram, page, training  # noqa: E402
from lm.model import OneLayer  # noqa: E402

TEXTS = st.lists(st.text(st.sampled_from("abc \n_1.=é\t") | st.characters(codec="utf-8"), max_size=40))


# --- tokens


@pytest.fixture(scope="module")
def merges():
    return byte_pairs.learn(
        ["def f(aaaa):\n    return aaaa + bbb\n", "ab abab aaa a\n    return ab"] * 3, 280
    )


@settings(max_examples=80, deadline=None)
@given(texts=TEXTS)
def test_every_text_is_its_tokens_spelled(merges, texts):
    spelling = byte_pairs.spelled(merges)
    for text, tokens in zip(texts, byte_pairs.encode(texts, merges), strict=True):
        assert b"".join(spelling[token] for token in tokens) == text.encode()


def joined(symbols, pair, token):
    """One merge, from left to right."""
    done, at = [], 0
    while at < len(symbols):
        both = tuple(symbols[at : at + 2]) == tuple(pair)
        done.append(token if both else symbols[at])
        at += 2 if both else 1
    return done


@settings(max_examples=40, deadline=None)
@given(text=st.text("ab a", max_size=60))
def test_pairs_are_joined_in_the_order_they_were_learnt(text):
    merges = byte_pairs.learn([text] * 2, 260)
    expected = []
    for piece in byte_pairs.PIECE.findall(text):
        symbols = list(piece.encode())
        for number, pair in enumerate(merges.tolist()):
            symbols = joined(symbols, pair, 256 + number)
        expected += symbols
    assert byte_pairs.encode([text], merges)[0].tolist() == expected


def test_the_commonest_pair_comes_first():
    assert byte_pairs.learn(["xyxyxy ab", "xyxyxy ab"], 258).tolist() == [[*b"xy"], [256, 256]]


def test_no_file_is_in_both_parts_and_tests_in_neither(tmp_path):
    for number in range(200):
        (tmp_path / f"m{number}.py").write_text(f"# {number}\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "t.py").write_text("# a test\n")
    found = corpus.read(tmp_path)
    assert sorted([*found.train, *found.validation]) == sorted(f"# {number}\n" for number in range(200))
    assert 8 <= len(found.validation) <= 35


# --- n-grams


def plain_kneser_ney(train, vocabulary, order):
    """p(history, token) by dictionaries, from the formulas of Chen and Goodman."""
    grams = [Counter(tuple(train[i : i + n]) for i in range(len(train) - n + 1)) for n in range(order + 2)]
    counts = {order: grams[order]}
    for n in range(1, order):
        counts[n] = Counter(longer[1:] for longer in grams[n + 1])
    discounts, by_history = {}, {}
    for n, count in counts.items():
        of = Counter(count.values())
        share = of[1] / max(of[1] + 2 * of[2], 1)
        discounts[n] = [min(max(i - (i + 1) * share * of[i + 1] / max(of[i], 1), 0), i) for i in (1, 2, 3)]
        by_history[n] = defaultdict(list)
        for gram, times in count.items():
            by_history[n][gram[:-1]].append(times)

    def p(history, token):
        n = len(history) + 1
        lower = p(history[1:], token) if n > 1 else 1 / vocabulary
        seen = by_history[n][history]
        if not seen:
            return lower
        taken = [discounts[n][min(times, 3) - 1] for times in seen]
        times = counts[n][(*history, token)]
        own = times - discounts[n][min(times, 3) - 1] if times else 0
        return (own + sum(taken) * lower) / sum(seen)

    return p


@pytest.mark.parametrize("order", [1, 3, 5])
def test_n_grams_are_kneser_neys(order):
    draw = np.random.default_rng(order)
    train, held_out = draw.integers(0, 6, 400) ** 2 % 11, draw.integers(0, 6, 60) ** 2 % 11
    p = plain_kneser_ney(train.tolist(), 11, order)
    both = [*train.tolist(), *held_out.tolist()]
    expected = [-np.log(p(tuple(both[at - order + 1 : at]), both[at])) for at in range(len(train), len(both))]
    np.testing.assert_allclose(ngram.losses(train, held_out, 11, order), expected, rtol=1e-12)


def test_an_n_gram_model_gives_one_in_all():
    train = np.random.default_rng(0).integers(0, 5, 300)
    for history in ([0, 1, 2, 3], [4, 4, 4, 4], [6, 0, 6, 1]):
        p = [np.exp(-ngram.losses(train, np.array([*history, token]), 7)[-1]) for token in range(7)]
        assert sum(p) == pytest.approx(1, abs=1e-12)


# --- the model


@pytest.fixture(scope="module")
def model():
    return OneLayer(50, rngs=nnx.Rngs(0))


def test_it_has_the_papers_sizes_and_its_mlp_is_a_site(model):
    found = {site.name: site for site in nnx_capture.sites(model)}
    assert found["mlp.hidden"].width == 512
    assert found["mlp"].width == 128


@pytest.fixture(scope="module")
def logits(model):
    """[batch, context, 50] as numpy."""
    run = nnx.jit(OneLayer.__call__)
    return lambda tokens: np.asarray(run(model, jnp.asarray(tokens)), np.float64)


def test_no_token_sees_those_after_it(logits):
    tokens = np.random.default_rng(0).integers(0, 50, (4, 16))
    changed = tokens.copy()
    changed[:, 9:] = (changed[:, 9:] + 1) % 50
    before, after = logits(tokens), logits(changed)
    np.testing.assert_allclose(before[:, :9], after[:, :9], atol=1e-5)
    assert not np.allclose(before[:, 9:], after[:, 9:], atol=1e-2)


def test_attention_tells_where_a_token_stands(logits):
    tokens = np.random.default_rng(0).integers(0, 50, (4, 16))
    turned = np.concatenate([tokens[:, :15][:, ::-1], tokens[:, 15:]], axis=1)
    assert not np.allclose(logits(tokens)[:, 15], logits(turned)[:, 15], atol=1e-3)


def test_held_out_predicts_each_token_from_those_before_it(model, logits):
    tokens = np.random.default_rng(1).integers(0, 50, 4 * 16 + 1)
    losses = training.held_out(model, tokens, 16, batch_size=3)
    given = logits(tokens[:-1].reshape(4, 16)).reshape(64, 50)
    expected = np.log(np.exp(given).sum(axis=1)) - given[np.arange(64), tokens[1:]]
    np.testing.assert_allclose(losses, expected, rtol=1e-4)


# --- features


def context(before, token, after, peak=1.0):
    """One of these tokens, the feature strongest on the middle one."""
    values = [0.0] * len(before) + [peak] + [0.0] * len(after)
    return Context(0, (*before, token, *after), tuple(values), len(before))


def test_a_context_that_reads_like_another_is_shown_once():
    first = context("abcd", "e", "fg", 3.0)
    alike = context("xbcd", "e", "fg", 2.0)
    other = context("abcx", "e", "fg", 1.0)
    assert page.read_differently([first, alike, other]) == [first, other]
    # one that begins later has other tokens before it, even where what is left is the same
    assert len(page.read_differently([context("b", "c", "d"), context("", "b", "cd")])) == 2


def test_what_contexts_share_is_found_by_the_rule_alone():
    other = [context(["a"], "b", ["c"]), context(["d"], "e", ["f"])]
    assert "on `self`" in page.evident([context([f"{i} "], " self", [f"{i}"]) for i in range(8)] + other)
    defined = [context(["x", " def"], f" {i}", [f"{i}"]) for i in range(8)]
    assert "after `def`" in page.evident(defined + other)
    assert page.evident([context([f"{i}"], " self", [f"{i}"]) for i in range(7)] + other + other[:1]) is None
    assert page.evident([context([], "self", [])] * 9) is None, "nine contexts are not ten"


# --- the whole


@pytest.fixture(scope="module")
def example():
    specification = importlib.util.spec_from_file_location("one_layer_lm", EXAMPLES / "08_one_layer_lm.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def finished(example, tmp_path_factory):
    out = tmp_path_factory.mktemp("lm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["08_one_layer_lm.py", "--quick", "--out", str(out)])
        example.main()
    return out


@pytest.mark.slow
def test_the_whole_leaves_its_model_store_saes_and_pages(example, finished):
    told = json.loads((finished / "figures.json").read_text())
    uniform = np.log(example.QUICK.vocabulary)
    assert told["loss"]["language model"] < 0.8 * uniform
    assert told["loss"]["5-grams"] < told["loss"]["3-grams"] < uniform
    saes = told["saes"]
    assert len(saes["name"]) == len(example.QUICK.k) + len(example.QUICK.l1)
    assert all(clean < zero for clean, zero in zip(saes["ce_clean"], saes["ce_zero"], strict=True))
    assert sae_jax.open_store(finished / "activations").site("mlp.hidden").shape == (8192, 512)
    assert (finished / "frontier.png").stat().st_size > 10_000
    for kind in ("features", "neurons"):
        assert "«" in (finished / f"{kind}.md").read_text()
    assert (finished / "dashboard" / "index.html").is_file()


@pytest.mark.slow
def test_a_second_call_trains_nothing_again(example, finished, monkeypatch):
    kept = ["tokens.npz", "language_model.safetensors", "saes/sweep.json", "activations/manifest.json"]
    before = {name: (finished / name).stat().st_mtime_ns for name in kept}
    first = json.loads((finished / "figures.json").read_text())
    monkeypatch.setattr(sys, "argv", ["08_one_layer_lm.py", "--quick", "--out", str(finished)])
    example.main()
    assert {name: (finished / name).stat().st_mtime_ns for name in kept} == before
    second = json.loads((finished / "figures.json").read_text())
    assert second["loss"] == pytest.approx(first["loss"])
    for name, values in first["saes"].items():
        assert second["saes"][name] == (values if name == "name" else pytest.approx(values))
