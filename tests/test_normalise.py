"""Normalised inputs: what is measured, and that folding gives the same SAE on raw ones."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import sae_jax
from sae_jax import Batch, InputError, TrainedSAE, TrainState, folds
from sae_jax.architectures import find
from sae_jax.base import Progress
from sae_jax.data import Source
from sae_jax.folds import fold_decoder_norms
from sae_jax.normalise import (
    Affine,
    centring,
    fold,
    identity,
    layer_norm,
    layer_normed,
    mean_norm,
    normalised,
    unit_mean_square,
    whitening,
)  # fmt: skip

MEASURED = {
    "mean_norm": mean_norm,
    "unit_mean_square": unit_mean_square,
    "centring": centring,
    "whitening": whitening,
}
every_affine = pytest.mark.parametrize("measure", list(MEASURED.values()), ids=list(MEASURED))

D_IN, D_SAE, D_OUT = 5, 7, 4
names = ("relu", "topk", "batch_topk", "jumprelu", "gated", "matryoshka", "transcoder")
relu, topk, batch_topk, jumprelu, gated, matryoshka, transcoder = (
    partial(find(name), D_IN, D_SAE) for name in names
)
rescaled = {"k": 3, "rescale_acts_by_decoder_norm": True}
onto = partial(transcoder, d_out=D_OUT)

AUTOENCODERS = {
    "relu": relu,
    "relu-b-dec": partial(relu, apply_b_dec_to_input=True),
    "relu-tied": partial(relu, tied=True),
    "relu-tied-b-dec": partial(relu, tied=True, apply_b_dec_to_input=True),
    "relu-steered": partial(relu, target_l0=2),
    "topk": partial(topk, k=3),
    "topk-rescaled": partial(topk, **rescaled),
    "topk-rescaled-no-b-dec": partial(topk, **rescaled, apply_b_dec_to_input=False),
    "batch-topk": partial(batch_topk, k=3),
    "batch-topk-rescaled": partial(batch_topk, **rescaled),
    "jumprelu": jumprelu,
    "jumprelu-log": partial(jumprelu, log_threshold=True, apply_b_dec_to_input=True),
    "gated": gated,
    "gated-no-b-dec": partial(gated, apply_b_dec_to_input=False),
    "matryoshka": partial(matryoshka, prefixes=(2, 7), **rescaled),
    "matryoshka-tied": partial(matryoshka, prefixes=(2, 7), of=sae_jax.relu, tied=True),
}
TRANSCODERS = {
    "transcoder": onto,
    "skip": partial(onto, skip=True),
    "skip-topk-rescaled": partial(onto, skip=True, of=find("topk"), **rescaled),
    "skip-gated": partial(onto, skip=True, of=find("gated")),
    "skip-batch-topk": partial(onto, skip=True, of=find("batch_topk"), k=2),
    "transcoder-jumprelu": partial(onto, of=find("jumprelu")),
    "transcoder-matryoshka": partial(onto, skip=True, of=find("matryoshka"), prefixes=(3, 7), **rescaled),
}
every_autoencoder = pytest.mark.parametrize("factory", list(AUTOENCODERS.values()), ids=list(AUTOENCODERS))
every_transcoder = pytest.mark.parametrize("factory", list(TRANSCODERS.values()), ids=list(TRANSCODERS))


def rows(n=64, d=D_IN, seed=0):
    """Rows whose directions are of unlike size, away from 0."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) * 3 + 5 * rng.normal(size=d)


def random_params(sae, seed=1):
    """Weights of which nothing is 0, in float64."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: sae.init(jax.random.key(0)))
    params = {name: 0.5 * rng.normal(size=leaf.shape) for name, leaf in shapes.items()}
    if "threshold" in params:
        params["threshold"] = rng.uniform(0.1, 0.6, params["threshold"].shape)
    return params


def assert_exact(actual, expected):
    scale = np.abs(np.asarray(expected)).max()
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=1e-12, atol=1e-12 * scale)


# What is measured


def test_mean_norm_brings_the_mean_norm_to_the_root_of_the_width(x64):
    x = rows()
    z = np.asarray(mean_norm(x)(x))
    assert np.linalg.norm(z, axis=1).mean() == pytest.approx(5**0.5, rel=1e-12)


def test_unit_mean_square_brings_the_mean_square_to_one(x64):
    x = rows()
    z = np.asarray(unit_mean_square(x)(x))
    assert np.square(z).sum(axis=1).mean() == pytest.approx(1, rel=1e-12)


def test_centring_leaves_no_mean_and_all_else(x64):
    x = rows()
    z = np.asarray(centring(x)(x))
    np.testing.assert_allclose(z.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(z - z[0], x - x[0], atol=1e-12)


def test_whitened_rows_have_no_mean_and_unit_covariance(x64):
    x = rows()
    z = np.asarray(whitening(x, eps=0.0)(x))
    np.testing.assert_allclose(z.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(np.cov(z.T), np.eye(5), atol=1e-10)


def test_whitening_holds_back_where_there_is_no_spread(x64):
    x = rows()
    x[:, 2] = x[:, 1]
    affine = whitening(x)
    variance = np.linalg.eigvalsh(np.cov(np.asarray(affine(x)).T))
    np.testing.assert_allclose(variance[0], 0, atol=1e-9)
    assert (variance[1:] <= 1 + 1e-9).all()
    np.testing.assert_allclose(affine.undo(affine(x)), x, atol=1e-10)


def test_a_large_mean_costs_whitening_no_digits(x64):
    x = rows()
    near, far = (whitening(x + shift) for shift in (0.0, 1e6))
    np.testing.assert_allclose(np.abs(far.matrix), np.abs(near.matrix), rtol=1e-6, atol=1e-9)


@every_affine
def test_parts_of_the_rows_add_up_to_the_whole(measure, monkeypatch):
    x = rows(101)
    whole = measure(x)
    monkeypatch.setattr("sae_jax.normalise.ROWS_AT_A_TIME", 7)
    for one, other in zip(whole, measure(x), strict=True):
        np.testing.assert_allclose(np.abs(one), np.abs(other), rtol=1e-9, atol=1e-12)


def test_float32_rows_are_measured_in_float64():
    x = rows(4096).astype(np.float32)
    assert mean_norm(x).matrix == mean_norm(x.astype(np.float64)).matrix
    assert mean_norm(jnp.asarray(x)).matrix == mean_norm(x).matrix


shapes = st.sampled_from([(2, 1), (2, 5), (3, 2), (12, 4)])
entries = hnp.arrays(np.float64, shapes, elements=st.floats(-100, 100, width=32))


@every_affine
@settings(max_examples=60, deadline=None)
@given(x=entries)
def test_whatever_the_rows_undoing_gives_them_back(measure, x):
    with jax.enable_x64(True):
        if np.square(x).sum() == 0 and measure in (mean_norm, unit_mean_square):
            with pytest.raises(InputError, match="all 0"):
                measure(x)
            return
        affine = measure(x)
        z = np.asarray(affine(x))
        assert np.isfinite(z).all()
        np.testing.assert_allclose(affine.undo(z), x, atol=1e-8 * (1 + np.abs(x).max()))


@settings(max_examples=60, deadline=None)
@given(x=entries.filter(lambda x: x.shape[1] > 1), scale=st.floats(0.5, 100), shift=st.floats(-100, 100))
def test_layer_norm_sees_neither_the_scale_nor_the_shift_of_a_row(x, scale, shift):
    with jax.enable_x64(True):
        spread = x.std(axis=1) > 1
        z, moved = (np.asarray(layer_norm(one))[spread] for one in (x, x * scale + shift))
        np.testing.assert_allclose(moved, z, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(z.mean(axis=1), 0, atol=1e-9)
        np.testing.assert_allclose(z.std(axis=1, ddof=1), 1, atol=1e-4)


@pytest.mark.parametrize(
    ("measure", "x", "words"),
    [
        (mean_norm, np.zeros((3, 2)), "nothing|all 0"),
        (unit_mean_square, np.zeros((3, 2)), "all 0"),
        (centring, np.zeros((0, 2)), "measured on .rows, d., got .0, 2."),
        (centring, np.zeros(3), "measured on .rows, d., got .3,."),
        (mean_norm, np.array([[1.0, np.nan]]), "NaN or infinite"),
        (whitening, np.array([[1.0, np.inf], [0, 0]]), "NaN or infinite"),
        (whitening, np.ones((1, 2)), "at least two rows, got 1"),
        (partial(whitening, eps=0.0), np.ones((4, 2)), "give an eps above 0"),
    ],
)
def test_rows_that_nothing_can_be_measured_on_are_refused(measure, x, words, unchecked):
    with pytest.raises(InputError, match=words) as caught:
        measure(x)
    assert "\n" not in str(caught.value)


def test_rows_of_another_width_are_refused():
    with pytest.raises(InputError, match="of 5 columns, got 3"):
        centring(rows())(np.ones((2, 3)))


# Folding


@every_affine
@every_autoencoder
def test_the_folded_sae_on_raw_rows_is_the_trained_one_on_normalised_rows(factory, measure, x64):
    x = rows()
    sae, affine = factory(), measure(x)
    params = random_params(sae)
    z = affine(x)
    f = sae.encode(params, z)
    assert 0 < (np.asarray(f) > 0).mean() < 1
    raw, folded = fold(sae, params, affine)
    assert_exact(raw.encode(folded, x), f)
    assert_exact(raw.decode(folded, f, x), affine.undo(sae.decode(params, f, z)))
    assert not raw.config.get("tied")
    assert not raw.config.get("rescale_acts_by_decoder_norm")
    assert set(folded) == set(params) | {"W_enc"}
    assert all(folded[name].dtype == np.float64 for name in folded)


@every_affine
def test_the_inverted_map_undoes_the_fold(measure, x64):
    x = rows()
    affine = measure(x)
    np.testing.assert_allclose(affine.inverted()(affine(x)), x, rtol=1e-10, atol=1e-10)
    for factory in AUTOENCODERS.values():
        sae, params = folds.plain(factory(), random_params(factory()))
        again, back = fold(*fold(sae, params, affine), affine.inverted())
        assert again.config == sae.config
        for name, leaf in params.items():
            np.testing.assert_allclose(back[name], leaf, rtol=1e-8, atol=1e-8, err_msg=name)


@every_affine
@every_transcoder
@pytest.mark.parametrize("of_target", [identity, "other"], ids=["raw-target", "whitened-target"])
def test_a_folded_transcoder_goes_from_raw_rows_to_raw_targets(factory, measure, of_target, x64):
    x, y = rows(), rows(d=D_OUT, seed=3)
    sae, affine = factory(), measure(x)
    target = identity(D_OUT) if of_target is identity else whitening(y)
    params = random_params(sae)
    z = affine(x)
    f = sae.encode(params, z)
    raw, folded = fold(sae, params, affine, target)
    assert_exact(raw.encode(folded, x), f)
    assert_exact(raw.decode(folded, f, x), target.undo(sae.decode(params, f, z)))
    assert raw.config["d_out"] == D_OUT


def test_a_transcoders_target_is_normalised_like_its_input_where_nothing_else_is_said(x64):
    x = rows()
    sae = transcoder(d_out=D_IN, skip=True)
    params, affine = random_params(sae), whitening(x)
    for name, leaf in fold(sae, params, affine)[1].items():
        np.testing.assert_array_equal(leaf, fold(sae, params, affine, affine)[1][name])


@settings(max_examples=40, deadline=None)
@given(
    factory=st.sampled_from([*AUTOENCODERS.values()]),
    matrix=hnp.arrays(np.float64, (5, 5), elements=st.floats(-1, 1)),
    shift=hnp.arrays(np.float64, 5, elements=st.floats(-10, 10)),
)
def test_any_affine_map_that_can_be_undone_can_be_folded(factory, matrix, shift):
    with jax.enable_x64(True):
        matrix = matrix + 6 * np.eye(5)  # diagonally dominant
        affine = Affine(shift, matrix, np.linalg.inv(matrix))
        sae, x = factory(), rows()
        params = random_params(sae)
        f = sae.encode(params, affine(x))
        raw, folded = fold(sae, params, affine)
        # where a pre-activation is at its threshold, rounding may decide
        same = np.isclose(raw.encode(folded, x), f, rtol=1e-9, atol=1e-9)
        assert same.mean() > 0.999
        assert_exact(raw.decode(folded, f, x), affine.undo(sae.decode(params, f, affine(x))))


def test_folding_keeps_dtypes_and_leaves_what_it_need_not_touch():
    sae = batch_topk(k=3)
    params = {name: leaf.astype(jnp.bfloat16) for name, leaf in random_params(sae).items()}
    _, folded = fold(sae, params, whitening(rows()))
    assert {leaf.dtype for leaf in folded.values()} == {jnp.dtype(jnp.bfloat16)}
    assert folded["threshold"] is params["threshold"]


def test_decoder_norms_are_folded_and_a_row_of_zeros_stays(x64):
    sae = topk(**rescaled)
    params = random_params(sae)
    params["W_dec"][2] = 0
    free, folded = fold_decoder_norms(sae, params)
    x = rows() / 5
    f = sae.encode(params, x)
    assert_exact(free.encode(folded, x), f)
    assert_exact(free.decode(folded, f), sae.decode(params, f))
    np.testing.assert_allclose(np.linalg.norm(folded["W_dec"], axis=1), [1, 1, 0, 1, 1, 1, 1], rtol=1e-12)
    assert fold_decoder_norms(free, folded) == (free, folded)


@pytest.mark.parametrize(
    ("factory", "affines", "words"),
    [
        (partial(find("crosscoder"), 5, 7), (identity(5),), "cannot be folded into 'crosscoder'"),
        (relu, (identity(4),), "of .4, 4. columns, but the SAE's widths are .5, 5."),
        (onto, (identity(5),), "of .5, 5. columns, but the SAE's widths are .5, 4."),
        (onto, (layer_norm,), "cannot be undone without the target itself"),
        (onto, (identity(5), layer_norm), "cannot be undone without the target itself"),
        (relu, (identity(5), identity(5)), "only a transcoder's target"),
        (lambda: layer_normed(relu()), (identity(5),), "by layer norm already"),
        (lambda: layer_normed(relu()), (layer_norm,), "by layer norm already"),
        (partial(relu, 1), (layer_norm,), None),
    ],
)
def test_what_cannot_be_folded_is_refused(factory, affines, words):
    if words is None:
        factory, words = partial(sae_jax.relu, 1, 7), "at least two columns"
    sae = factory()
    with pytest.raises(InputError, match=words) as caught:
        fold(sae, random_params(sae), *affines)
    assert "\n" not in str(caught.value)


# Layer norm


@every_autoencoder
def test_a_layer_normed_sae_reads_and_gives_raw_rows(factory, x64):
    sae, x = factory(), rows()
    params = random_params(sae)
    around, same = fold(sae, params, layer_norm)
    assert same is params
    z = layer_norm(x)
    f = sae.encode(params, z)
    np.testing.assert_array_equal(around.encode(params, x), f)
    std, mean = x.std(axis=1, ddof=1, keepdims=True), x.mean(axis=1, keepdims=True)
    assert_exact(around.decode(params, f, x), np.asarray(sae.decode(params, f)) * std + mean)
    np.testing.assert_array_equal(around.decode(params, f), sae.decode(params, f))
    params = jax.tree.map(jnp.asarray, params)
    progress = Progress(jnp.int32(3), jnp.zeros(7, jnp.int32))
    one, other = around.loss(params, Batch(x, x), progress), sae.loss(params, Batch(z, z), progress)
    assert one[0] == other[0]
    assert around.config == {**sae.config, "normalize_activations": "layer_norm"}


@every_transcoder
def test_a_layer_normed_transcoder_reads_normalised_rows_and_gives_its_target(factory, x64):
    sae, x, y = factory(), rows(), rows(d=D_OUT, seed=3)
    params, target = random_params(sae), whitening(y)
    z = layer_norm(x)
    f = sae.encode(params, z)
    around, folded = fold(sae, params, layer_norm, target)
    assert_exact(around.encode(folded, x), f)
    assert_exact(around.decode(folded, f, x), target.undo(sae.decode(params, f, z)))


# Training


@pytest.mark.parametrize("normalisation", [whitening(rows()), mean_norm(rows()), layer_norm], ids=type)
def test_a_normalised_source_draws_what_the_array_normalised_beforehand_would(normalisation):
    x = rows().astype(np.float32)
    plain = sae_jax.in_memory(np.asarray(normalisation(x)), batch_size=8)
    drawn = normalised(sae_jax.in_memory(x, batch_size=8), normalisation)
    assert isinstance(drawn, Source)
    assert drawn.batch_size == 8
    for i in map(jnp.int32, (0, 5, 9)):
        ours, theirs = jax.jit(lambda source, i: source.batch(i))(drawn, i), plain.batch(i)
        np.testing.assert_allclose(ours.x, theirs.x, atol=1e-5)
        np.testing.assert_allclose(ours.y, theirs.y, atol=1e-5)
        assert ours.x.dtype == jnp.float32
    measured, expected = (np.concatenate([b.x for b in source.evaluation(24)]) for source in (drawn, plain))
    np.testing.assert_allclose(measured, expected, atol=1e-5)


def test_a_target_may_be_normalised_in_its_own_way():
    x, y = rows().astype(np.float32), rows(d=D_OUT, seed=3).astype(np.float32)
    drawn = normalised(sae_jax.in_memory(x, y=y, batch_size=64), centring(x), mean_norm(y))
    batch = drawn.batch(jnp.int32(0))
    np.testing.assert_array_equal(batch.x, centring(x)(x))
    np.testing.assert_array_equal(batch.y, mean_norm(y)(y))


def test_it_trains_in_run_and_the_folded_sae_reconstructs_raw_rows():
    x = rows(256).astype(np.float32)
    source = normalised(sae_jax.in_memory(x, batch_size=32), whitening(x))
    sae, optimizer = relu(l1=0.01, apply_b_dec_to_input=True), optax.adam(1e-2)
    state, history = sae_jax.run(
        sae_jax.make_step(sae, optimizer), sae_jax.init(sae, optimizer, jax.random.key(0)), source, 400
    )
    assert isinstance(state, TrainState)
    assert history["loss"][-1] < 0.5 * history["loss"][0]
    raw = TrainedSAE(*fold(sae, state.params, source.normalisation, source.target))
    error = np.square(np.asarray(raw(x)) - x).sum() / np.square(x - x.mean(axis=0)).sum()
    assert error < 0.3
    affine = source.normalisation
    z = affine(x)
    np.testing.assert_allclose(
        raw(x), affine.undo(sae.decode(state.params, sae.encode(state.params, z))), atol=1e-3
    )


def test_training_a_layer_normed_sae_on_raw_rows_is_training_on_layer_normed_rows():
    x = rows(64).astype(np.float32)
    optimizer, sae = optax.adam(1e-2), relu(l1=0.01)
    ends = []
    for model, source in (
        (sae, normalised(sae_jax.in_memory(x, batch_size=16), layer_norm)),
        (layer_normed(sae), sae_jax.in_memory(x, batch_size=16)),
    ):
        state = sae_jax.init(model, optimizer, jax.random.key(0))
        ends.append(sae_jax.run(sae_jax.make_step(model, optimizer), state, source, 50)[0].params)
    for name, leaf in ends[0].items():
        np.testing.assert_allclose(ends[1][name], leaf, atol=1e-5)


@pytest.mark.parametrize("normalisation", [whitening, lambda x: layer_norm], ids=["whitening", "layer_norm"])
def test_a_sweep_over_a_normalised_source_saves_members_on_raw_rows(normalisation, tmp_path):
    x = rows(128).astype(np.float32)
    source = normalised(sae_jax.in_memory(x, batch_size=32), normalisation(x))
    result = sae_jax.sweep(
        partial(topk, **rescaled),
        optax.adam(1e-2),
        grid={"auxk": np.array([0.0, 0.1])},
        source=source,
        steps=60,
    )
    assert np.isfinite(result.history["loss"]).all()
    member = result.member(1)
    raw = TrainedSAE(*fold(member.sae, member.params, source.normalisation, source.target))
    z = source.normalisation(x)
    np.testing.assert_allclose(raw.encode(x), member.encode(z), atol=1e-4)
    raw.save(tmp_path)
    np.testing.assert_allclose(sae_jax.load(tmp_path)(x), raw(x), atol=1e-4)


# As SAELens does it


@pytest.fixture
def scaler(sae_lens):
    from sae_lens.training.activation_scaler import ActivationScaler

    return ActivationScaler()


def test_mean_norm_is_saelenss_scaling_factor(scaler, torch):
    x = rows(96)
    scaler.estimate_scaling_factor(5, iter(torch.tensor(x).split(32)), 3)
    assert scaler.scaling_factor == pytest.approx(mean_norm(x).matrix, rel=1e-6)


@pytest.mark.parametrize("eps", [1e-3, 0.5])
def test_whitening_is_saelenss(scaler, torch, eps, x64):
    x = rows(96)
    scaler.estimate_whitening(5, iter(torch.tensor(x).split(32)), 3, eps=eps)
    theirs, ours = scaler.whitening, whitening(x, eps)
    np.testing.assert_allclose(ours.shift, theirs.mean.numpy(), rtol=1e-12)
    # an eigenvector's sign is the library's choice
    sign = np.sign((ours.matrix * theirs.matrix.numpy()).sum(axis=0))
    np.testing.assert_allclose(ours.matrix * sign, theirs.matrix.numpy(), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(
        sign[:, None] * ours.inverse, theirs.inverse_matrix.numpy(), rtol=1e-9, atol=1e-12
    )
    rows_there = scaler.scale(torch.tensor(x)).numpy()
    np.testing.assert_allclose(np.asarray(ours(x)) * sign, rows_there, atol=1e-9)


THEIRS = [
    *((name, {"apply_b_dec_to_input": value}, measure)
      for name in ("StandardSAE", "TopKSAE", "JumpReLUSAE", "GatedSAE")
      for value in (False, True) for measure in (mean_norm, whitening)),
    # before a whitening, and only there, SAELens folds decoder norms
    *(("TopKSAE", {"apply_b_dec_to_input": value, "rescale_acts_by_decoder_norm": True}, whitening)
      for value in (False, True)),
]  # fmt: skip
OURS = {"StandardSAE": relu, "TopKSAE": partial(topk, k=3), "JumpReLUSAE": jumprelu, "GatedSAE": gated}


@pytest.mark.parametrize(("name", "arguments", "measure"), THEIRS)
def test_folded_weights_are_saelenss(name, arguments, measure, sae_lens, torch):
    sae = OURS[name](**arguments)
    params = random_params(sae)
    k = {"k": 3} if name == "TopKSAE" else {}
    cfg = getattr(sae_lens, f"{name}Config")(d_in=5, d_sae=7, dtype="float64", **k, **arguments)
    theirs = getattr(sae_lens, name)(cfg)
    theirs.load_state_dict({key: torch.tensor(leaf) for key, leaf in params.items()})
    affine = measure(rows())
    if measure is mean_norm:
        theirs.fold_activation_norm_scaling_factor(float(affine.matrix))
    else:
        theirs.fold_activation_whitening(*(torch.tensor(leaf) for leaf in affine))
    _, folded = fold(sae, params, affine)
    for key, leaf in theirs.state_dict().items():
        np.testing.assert_allclose(folded[key], leaf.numpy(), rtol=1e-9, atol=1e-10, err_msg=key)


def test_layer_norm_is_saelenss(sae_lens, torch, x64):
    x = rows()
    cfg = sae_lens.StandardSAEConfig(d_in=5, d_sae=7, dtype="float64", normalize_activations="layer_norm")
    theirs = sae_lens.StandardSAE(cfg)
    z = theirs.run_time_activation_norm_fn_in(torch.tensor(x))
    assert_exact(layer_norm(x), z.numpy())
    sae = layer_normed(relu(apply_b_dec_to_input=True))
    params = random_params(sae)
    theirs.load_state_dict({key: torch.tensor(leaf) for key, leaf in params.items()})
    with torch.no_grad():
        assert_exact(sae.decode(params, sae.encode(params, x), x), theirs(torch.tensor(x)).numpy())
