"""What is told of features is what an exhaustive look finds; the pass holds nothing but what it keeps."""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sae_jax
from sae_jax import features
from sae_jax.features import NONE, Options

D_IN, D_SAE = 8, 24


@pytest.fixture(scope="module")
def trained():
    """Weights that make some features rare, and one dead."""
    sae = sae_jax.relu(D_IN, D_SAE)
    params = sae.init(jax.random.key(0))
    bias = jnp.linspace(0.2, -0.6, D_SAE).at[-1].set(-100.0)
    return sae_jax.TrainedSAE(sae, {**params, "b_enc": bias})


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Contexts of 12 tokens, of which the first is not kept; the last batch is short."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(50, D_IN)).astype(np.float32)
    tokens = rng.integers(0, 50, (37, 12))
    tokens[:, 0] = 0

    def activations(batch):
        return {"site": table[batch] + 0.1 * np.sin(np.arange(12))[:, None]}

    contexts = sae_jax.language_models.from_tokens(tokens, 5, special=[0])
    return sae_jax.harvest(activations, contexts, tmp_path_factory.mktemp("acts") / "store", dtype="float32")


@pytest.fixture(scope="module")
def reading(store):
    return features.of_store(store)


@pytest.fixture(scope="module")
def encoded(trained, store):
    return np.asarray(trained.encode(store.site().read(0, store.rows)))


@pytest.fixture(scope="module", params=["one stretch", "many"])
def seen(request, trained, reading):
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "many":
            patch.setattr(
                sys.modules[features.look.__module__], "STRETCH_BYTES", 4 * D_SAE * reading.length * 4
            )
        return features.look(*trained, reading, Options(strongest=5, by_chance=7, before=3, after=2))


def contexts_of(reading):
    return list(zip(reading.begins.tolist(), reading.ends.tolist(), strict=True))


def test_contexts_begin_where_positions_fall(store, reading):
    positions = store.positions.read(0, store.rows)
    assert reading.length == 11
    for begin, end in contexts_of(reading):
        assert (np.diff(positions[begin:end]) > 0).all()
    assert positions[reading.begins[1:]].max() <= positions[reading.begins[1:] - 1].max()
    assert reading.begins[0] == 0
    assert reading.ends[-1] == store.rows


def test_counts_and_histogram_are_of_every_token(seen, encoded):
    np.testing.assert_array_equal(seen.fired, (encoded > 0).sum(axis=0))
    np.testing.assert_array_equal(seen.histogram.sum(axis=1), seen.fired)
    where = np.where(encoded > 0, encoded, np.nan)
    np.testing.assert_allclose(seen.mean[:-1], np.nanmean(where[:, :-1], axis=0), rtol=1e-5)
    assert seen.mean[-1] == 0
    for feature in range(D_SAE):
        # an edge is the largest activation of the first stretch, which another encoding rounds otherwise
        above = np.cumsum(seen.histogram[feature][::-1])[::-1]
        low, high = ((encoded[:, feature, None] > seen.edges * (1 + by)).sum(axis=0) for by in (1e-5, -1e-5))
        assert (low <= above).all()
        assert (above <= high).all()


def test_the_strongest_contexts_are_those(seen, reading, encoded):
    for feature in range(D_SAE):
        peaks = np.array([encoded[begin:end, feature].max() for begin, end in contexts_of(reading)])
        largest = np.sort(peaks[peaks > 0])[::-1][:5]
        shown = seen.strongest.peaks[feature]
        np.testing.assert_allclose(shown[: len(largest)], largest, rtol=1e-6)
        assert (seen.strongest.rows[feature, len(largest) :] == NONE).all()
        for row, peak in zip(seen.strongest.rows[feature], shown, strict=True):
            assert row == NONE or encoded[row, feature] == pytest.approx(peak, rel=1e-6)


def test_windows_hold_the_tokens_around_and_end_with_the_context(seen, reading, store, encoded):
    tokens = store.tokens.read(0, store.rows)
    for kept in (seen.strongest, seen.by_chance):
        for feature in range(D_SAE):
            for place, row in enumerate(kept.rows[feature].tolist()):
                begin, end = next(((b, e) for b, e in contexts_of(reading) if b <= row < e), (0, 0))
                for offset in range(-3, 3):
                    value = kept.values[feature, place, offset + 3]
                    token = kept.tokens[feature, place, offset + 3]
                    if row != NONE and begin <= row + offset < end:
                        assert value == pytest.approx(encoded[row + offset, feature], rel=1e-5, abs=1e-6)
                        assert token == tokens[row + offset]
                    else:
                        assert np.isnan(value)
                        assert token == NONE


def test_the_sample_is_of_all_contexts_in_which_a_feature_is_active(seen, reading, encoded):
    for feature in range(D_SAE):
        active = [b for b, e in contexts_of(reading) if (encoded[b:e, feature] > 0).any()]
        rows = seen.by_chance.rows[feature]
        kept = np.searchsorted(reading.begins, rows[rows != NONE], side="right") - 1
        assert len(kept) == min(7, len(active))
        assert len(set(kept.tolist())) == len(kept)
        assert set(reading.begins[kept].tolist()) <= set(active)
        assert (np.diff(seen.by_chance.peaks[feature]) <= 0).all()


def test_the_sample_is_even(trained, reading, encoded):
    """Of many features that are alike, each context in which they are active is drawn equally often."""
    feature, draws = int(np.argmin(np.abs((encoded > 0).sum(axis=0) - 100))), 400
    sae = sae_jax.relu(D_IN, draws)
    alike = {
        name: jnp.repeat(trained.params[name][..., feature, None], draws, -1) for name in ("W_enc", "b_enc")
    }
    params = {**alike, "W_dec": jnp.zeros((draws, D_IN)), "b_dec": trained.params["b_dec"]}
    rows = features.look(sae, params, reading, Options(by_chance=5)).by_chance.rows
    counts = np.zeros(len(reading.begins))
    np.add.at(counts, np.searchsorted(reading.begins, rows.ravel(), side="right") - 1, 1)
    active = np.array([(encoded[b:e, feature] > 0).any() for b, e in contexts_of(reading)])
    share = 5 / active.sum()
    assert (counts[~active] == 0).all()
    assert np.abs(counts[active] - draws * share).max() < 4.5 * np.sqrt(draws * share * (1 - share))


def test_passages_are_whole_contexts_with_their_strongest_features(seen, reading, encoded):
    for rows, chosen, values in zip(
        seen.passages.rows, seen.passages.features, seen.passages.values, strict=True
    ):
        inside = rows != NONE
        f = encoded[rows[inside]]
        np.testing.assert_allclose(
            values[inside][:, chosen != NONE], f[:, chosen[chosen != NONE]], rtol=1e-5, atol=1e-6
        )
        left = np.setdiff1d(np.arange(D_SAE), chosen)
        assert f[:, left].max(initial=0) <= f[:, chosen[chosen != NONE]].max(axis=0).min()


def test_rows_that_are_contexts_of_their_own_are_one_passage(trained):
    x = np.random.default_rng(0).normal(size=(100, D_IN)).astype(np.float32)
    found = features.look(*trained, features.of_rows(features.in_memory(x))).passages
    assert found.rows.tolist() == [list(range(64))]
    f = np.asarray(trained.encode(x[:64]))
    np.testing.assert_allclose(found.values[0], f[:, found.features[0]], rtol=1e-5, atol=1e-6)


def test_what_fires_together(seen, encoded):
    active = encoded > 0
    expected = features.fires_with(active, 10)
    np.testing.assert_array_equal(seen.fires_with.places, expected.places)
    with np.errstate(invalid="ignore"):
        phi = np.corrcoef(active.T)
    for feature in range(D_SAE - 1):
        shown = expected.places[feature]
        shown = shown[shown != NONE]
        np.testing.assert_allclose(
            expected.values[feature, : len(shown)], phi[feature, shown], rtol=1e-4, atol=1e-5
        )
        others = np.sort(np.delete(phi[feature], [feature, D_SAE - 1]))[::-1][: len(shown)]
        np.testing.assert_allclose(phi[feature, shown], others, rtol=1e-4, atol=1e-5)
    assert (expected.places[-1] == NONE).all()


@pytest.mark.parametrize("context", [8, 16, 128])
def test_what_fires_together_is_judged_at_every_place_of_a_context(context):
    """Two features of the last token alone, however the rows divide into stretches and samples."""
    x = np.tile(np.eye(context, dtype=np.float32), (2048 // context, 1))
    sae = sae_jax.relu(context, 2)
    last = jnp.zeros((context, 2)).at[-1].set(1.0)
    params = {"W_enc": last, "b_enc": jnp.full(2, -0.5), "W_dec": last.T, "b_dec": jnp.zeros(context)}
    with pytest.MonkeyPatch.context() as patch:
        looking = sys.modules[features.look.__module__]
        patch.setattr(looking, "SAMPLED", 2048 // 2)
        patch.setattr(looking, "STRETCH_BYTES", 8 * 256)
        found = features.look(sae, params, features.of_rows(features.in_memory(x), context=context))
    assert found.sampled == 1024
    assert found.fires_with.places[:, 0].tolist() == [1, 0]
    np.testing.assert_allclose(found.fires_with.values[:, 0], 1, rtol=1e-5)


def test_a_tied_encoder_is_compared(reading):
    sae = sae_jax.relu(D_IN, D_SAE, tied=True)
    found = features.observe(sae_jax.TrainedSAE(sae, sae.init(jax.random.key(0))), reading)
    np.testing.assert_allclose(found.weighed.cosine, 1, rtol=1e-5)
    assert not [sentence for sentence in found.left_out if "Encoder" in sentence]


def test_rows_without_tokens(trained):
    rows = features.in_memory(np.random.default_rng(0).normal(size=(30, D_IN)).astype(np.float32))
    found = features.observe(trained, features.of_rows(rows))
    assert found.seen.strongest.tokens is None
    assert found.seen.strongest.values.shape[-1] == 25
    assert any("without tokens" in sentence for sentence in found.left_out)


def test_no_feature_is_ever_active(trained, reading):
    silent = sae_jax.TrainedSAE(trained.sae, {**trained.params, "b_enc": jnp.full(D_SAE, -100.0)})
    found = features.observe(silent, reading)
    assert found.seen.fired.sum() == 0
    assert (found.seen.strongest.rows == NONE).all()
    assert np.isfinite(found.seen.edges).all()


def test_the_first_rows_end_with_a_whole_context(reading):
    some = features.first(reading, 30)
    assert 30 <= len(some.x) < 30 + reading.length
    assert some.ends[-1] in reading.ends
    assert some.x.read(0, 5).tolist() == reading.x.read(0, 5).tolist()


def test_long_contexts_are_taken_in_pieces():
    rows = features.in_memory(np.zeros((1000, 2), np.float32))
    found = features.of_rows(rows, context=600)
    assert found.begins.tolist() == [0, 256, 512, 600, 856]
    assert found.length == 256


@pytest.mark.parametrize(
    "build",
    [
        partial(sae_jax.topk, k=3),
        partial(sae_jax.batch_topk, k=3),
        sae_jax.jumprelu,
        sae_jax.gated,
        partial(sae_jax.transcoder, d_out=5),
    ],
)
def test_every_architecture(build, reading):
    sae = build(D_IN, d_sae=D_SAE)
    params = sae.init(jax.random.key(1))
    found = features.observe(sae_jax.TrainedSAE(sae, params), reading)
    f = np.asarray(sae.encode(params, reading.x.read(0, len(reading.x))))
    np.testing.assert_array_equal(found.seen.fired, (f > 0).sum(axis=0))
    assert (found.weighed.cosine is None) == ("d_out" in sae.config)


def test_a_crosscoder(tmp_path):
    sae = sae_jax.crosscoder(4, D_SAE, sources=2)
    params = sae.init(jax.random.key(1))
    x = np.random.default_rng(0).normal(size=(50, 2, 4)).astype(np.float32)
    found = features.observe(
        sae_jax.TrainedSAE(sae, params), features.of_rows(features.in_memory(x), context=5)
    )
    np.testing.assert_array_equal(found.seen.fired, (np.asarray(sae.encode(params, x)) > 0).sum(axis=0))
    assert found.weighed.near.places.shape == (D_SAE, 10)


def test_neighbours_alignment_and_logits(trained):
    rng = np.random.default_rng(1)
    unembedding = rng.normal(size=(D_IN, 40)).astype(np.float32)
    other = sae_jax.relu(D_IN, D_SAE).init(jax.random.key(9))
    found = features.weigh(
        trained.params, unembedding=unembedding, others=[other, trained.params], near=3, tokens=4
    )
    W = np.asarray(trained.params["W_dec"], np.float64)
    unit = W / np.linalg.norm(W, axis=1, keepdims=True)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -2)
    np.testing.assert_array_equal(found.near.places, np.argsort(-cosines, axis=1)[:, :3])
    W_enc = np.asarray(trained.params["W_enc"], np.float64)
    np.testing.assert_allclose(
        found.cosine, (W_enc / np.linalg.norm(W_enc, axis=0) * unit.T).sum(axis=0), atol=1e-6
    )
    theirs = np.asarray(other["W_dec"], np.float64)
    theirs /= np.linalg.norm(theirs, axis=1, keepdims=True)
    np.testing.assert_allclose(found.again, ((unit @ theirs.T).max(axis=1) + 1) / 2, atol=1e-5)
    logits = W @ unembedding
    np.testing.assert_array_equal(found.promoted.places, np.argsort(-logits, axis=1)[:, :4])
    np.testing.assert_array_equal(found.suppressed.places, np.argsort(logits, axis=1)[:, :4])
    assert (found.suppressed.values[:, 0] <= found.suppressed.values[:, 1]).all()


def test_the_map_has_the_variance_of_two_principal_components(trained):
    W = np.asarray(trained.params["W_dec"], np.float64)
    unit = W / np.linalg.norm(W, axis=1, keepdims=True)
    singular = np.linalg.svd(unit - unit.mean(axis=0), compute_uv=False)
    place = features.weigh(trained.params).place
    np.testing.assert_allclose(np.sort((place**2).sum(axis=0))[::-1], singular[:2] ** 2, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {"unembedding": np.zeros((3, 9))}, "unembedding is"),
        (lambda t: {"labels": {D_SAE: "too far"}}, "there is no feature"),
        (lambda t: {"words": ["only", "three", "words"]}, "there are 3 words"),
        (lambda t: {"options": Options(strongest=0)}, "strongest must be at least 1"),
    ],
)
def test_bad_input_is_one_sentence(trained, reading, change, words):
    seen = []
    with pytest.raises(sae_jax.InputError, match=words):
        features.observe(trained, reading, **change(trained), told=seen.append)
    # what needs no pass is said before it
    assert seen == [] or "words" in change(trained)


def test_another_width(trained):
    rows = features.in_memory(np.zeros((5, 3), np.float32), "acts.npy")
    with pytest.raises(sae_jax.InputError, match=r"reads rows of \[8\], but acts.npy has rows of \[3\]"):
        features.look(*trained, features.of_rows(rows))
