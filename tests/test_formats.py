"""Weights in other people's layouts, there and back, with the real libraries."""

import json
import os
import shutil
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import sae_jax
from sae_jax import InputError, TrainedSAE, auxk, formats, losses
from sae_jax.architectures import find
from sae_jax.formats import saelens, seed_module
from sae_jax.normalise import layer_normed


@pytest.fixture
def x():
    return jnp.asarray(np.random.default_rng(5).normal(size=(32, 5)), jnp.float32)


@pytest.fixture
def folder(tmp_path):
    """A good SAE on disk, to be damaged."""
    sae = sae_jax.relu(5, 7, l1=0.2)
    TrainedSAE(sae, sae.init(jax.random.key(0))).save(tmp_path / "sae")
    return tmp_path / "sae"


def one_line(error):
    assert "\n" not in str(error)


def refused(path, *words) -> str:
    with pytest.raises(InputError) as caught:
        sae_jax.load(path)
    message = str(caught.value)
    assert "\n" not in message, message
    for word in words:
        assert word in message, message
    return message


# SAELens

relu, topk, batch_topk = (
    partial(factory, 5, 7) for factory in (sae_jax.relu, sae_jax.topk, sae_jax.batch_topk)
)
jumprelu, gated, matryoshka, transcoder = (
    partial(find(name), 5, 7) for name in ("jumprelu", "gated", "matryoshka", "transcoder")
)
onto = partial(transcoder, d_out=4)

WRITTEN = {
    "relu": ("standard", relu),
    "relu-b-dec": ("standard", partial(relu, apply_b_dec_to_input=True)),
    "relu-tied": ("standard", partial(relu, tied=True, apply_b_dec_to_input=True)),
    "relu-steered": ("standard", partial(relu, target_l0=2)),
    "relu-annealed": ("standard", partial(relu, p_end=0.5, p_anneal=(10, 20))),
    "topk": ("topk", partial(topk, k=3)),
    "topk-float-k": ("topk", partial(topk, k=2.0, k_max=4, auxk_loss=auxk.fvu)),
    "topk-no-b-dec": ("topk", partial(topk, k=3, apply_b_dec_to_input=False)),
    "batch-topk": ("jumprelu", partial(batch_topk, k=2.5)),
    "jumprelu": ("jumprelu", jumprelu),
    "jumprelu-b-dec": ("jumprelu", partial(jumprelu, target_l0=2, apply_b_dec_to_input=True)),
    "jumprelu-log": ("jumprelu", partial(jumprelu, log_threshold=True, penalty=losses.tanh_l0)),
    "gated": ("gated", gated),
    "gated-no-b-dec": ("gated", partial(gated, apply_b_dec_to_input=False, target_l0=3)),
    "matryoshka": ("jumprelu", partial(matryoshka, prefixes=(2, 7), k=3)),
    "matryoshka-relu": ("standard", partial(matryoshka, prefixes=(2, 7), of=sae_jax.relu)),
    "transcoder": ("transcoder", onto),
    "skip": ("skip_transcoder", partial(onto, skip=True)),
    "skip-square": ("skip_transcoder", partial(transcoder, d_out=5, skip=True)),
    "transcoder-jumprelu": ("jumprelu_transcoder", partial(onto, of=find("jumprelu"))),
    "skip-jumprelu": (
        "jumprelu_skip_transcoder", partial(onto, of=find("jumprelu"), skip=True, log_threshold=True)
    ),
    "transcoder-batch-topk": ("jumprelu_transcoder", partial(onto, of=find("batch_topk"), k=2)),
    "transcoder-matryoshka": (
        "jumprelu_transcoder", partial(onto, of=find("matryoshka"), prefixes=(3, 7), k=2)
    ),
}  # fmt: skip
"""SAELens's architecture, and a factory of ours, by name."""


def with_layer_norm(factory):
    return lambda: layer_normed(factory())


LAYER_NORMED = {
    f"{name}-layer-normed": (WRITTEN[name][0], with_layer_norm(WRITTEN[name][1]))
    for name in ("relu", "topk", "batch-topk", "jumprelu-log", "gated", "transcoder", "transcoder-jumprelu")
}

FOLDED = {
    "topk-rescaled": ("topk", partial(topk, k=3, rescale_acts_by_decoder_norm=True)),
    "topk-rescaled-no-b-dec": (
        "topk", partial(topk, k=3, rescale_acts_by_decoder_norm=True, apply_b_dec_to_input=False)
    ),
    "topk-rescaled-layer-normed": (
        "topk", with_layer_norm(partial(topk, k=3, rescale_acts_by_decoder_norm=True))
    ),
    "batch-topk-rescaled": ("jumprelu", partial(batch_topk, k=2, rescale_acts_by_decoder_norm=True)),
    "matryoshka-rescaled": (
        "jumprelu", partial(matryoshka, prefixes=(2, 7), k=3, rescale_acts_by_decoder_norm=True)
    ),
    "skip-batch-topk-rescaled": (
        "jumprelu_skip_transcoder",
        partial(onto, skip=True, of=find("batch_topk"), k=2, rescale_acts_by_decoder_norm=True),
    ),
}  # fmt: skip

OWN = {
    "transcoder-topk": partial(onto, of=find("topk"), k=3),
    "skip-gated": partial(onto, of=find("gated"), skip=True, target_l0=2.0),
    "crosscoder": partial(find("crosscoder"), 5, 7, sources=3, target_l0=2.0),
    "skip-layer-normed": with_layer_norm(partial(onto, skip=True)),
    "crosscoder-layer-normed": with_layer_norm(partial(find("crosscoder"), 5, 7, sources=3)),
}


def table(cases):
    return pytest.mark.parametrize(("name", "factory"), list(cases.values()), ids=list(cases))


def random_params(sae, seed=1, dtype=jnp.float32):
    """Weights of which nothing is 0, as they are after training."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: sae.init(jax.random.key(0), dtype))
    params = {name: 0.5 * rng.normal(size=leaf.shape) for name, leaf in shapes.items()}
    if "threshold" in params:
        params["threshold"] = rng.uniform(0.1, 0.6, params["threshold"].shape)
    return {name: jnp.asarray(leaf, dtype) for name, leaf in params.items()}


def assert_close(actual, expected):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=1e-6, atol=1e-6)


def assert_same_as_saelens(folder, trained, x, sae_lens, torch):
    """SAELens makes of the folder what we make of `trained`; its SAE."""
    theirs = sae_lens.SAE.load_from_disk(folder, device="cpu")
    with torch.no_grad():
        rows = torch.tensor(np.asarray(x))
        f, x_hat = theirs.encode(rows), theirs(rows)
    ours = trained.encode(x)
    assert 0 < (np.asarray(ours) > 0).mean() < 1
    assert_close(ours, f.numpy())
    assert_close(trained(x), x_hat.numpy())
    return theirs


@table(WRITTEN | LAYER_NORMED | FOLDED)
def test_saelens_reads_what_is_written_here(name, factory, x, tmp_path, sae_lens, torch):
    sae = factory()
    trained = TrainedSAE(sae, random_params(sae))
    trained.save(tmp_path)
    theirs = assert_same_as_saelens(tmp_path, trained, x, sae_lens, torch)
    assert theirs.cfg.architecture() == name
    again = sae_jax.load(tmp_path)
    assert_close(again.encode(x), trained.encode(x))
    assert_close(again(x), trained(x))


@table(WRITTEN | LAYER_NORMED | {name: (None, factory) for name, factory in OWN.items()})
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_the_round_trip_changes_no_bit(name, factory, dtype, tmp_path):
    sae = factory()
    params = random_params(sae, dtype=dtype)
    TrainedSAE(sae, params).save(tmp_path)
    again = sae_jax.load(tmp_path)
    assert again.sae.config == sae.config
    assert again.params.keys() == params.keys()
    for leaf in params:
        assert again.params[leaf].dtype == dtype
        np.testing.assert_array_equal(np.asarray(again.params[leaf]), np.asarray(params[leaf]), leaf)


@table(FOLDED)
def test_a_rescaled_sae_comes_back_with_its_norms_folded(name, factory, tmp_path):
    sae = factory()
    params = random_params(sae)
    params["W_dec"] = params["W_dec"].at[3].set(0)
    TrainedSAE(sae, params).save(tmp_path)
    again = sae_jax.load(tmp_path)
    assert again.sae.config == {**sae.config, "rescale_acts_by_decoder_norm": False}
    norms = np.linalg.norm(again.params["W_dec"], axis=1)
    np.testing.assert_allclose(norms, [1, 1, 1, 0, 1, 1, 1], atol=1e-6)
    rows = np.random.default_rng(2).normal(size=(16, 5)).astype(np.float32)
    assert_close(again.encode(rows), TrainedSAE(sae, params).encode(rows))
    assert_close(again(rows), TrainedSAE(sae, params)(rows))


@pytest.mark.parametrize(("name", "factory"), list(OWN.items()), ids=list(OWN))
def test_what_saelens_has_no_form_for_is_written_under_our_name(name, factory, tmp_path, sae_lens):
    sae = factory()
    TrainedSAE(sae, random_params(sae)).save(tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    assert cfg["architecture"] == f"sae_jax_{sae.config['architecture']}"
    with pytest.raises(KeyError, match="sae_jax_"):
        sae_lens.SAE.load_from_disk(tmp_path)


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.4, np.nan, np.inf])
def test_batch_topks_threshold_is_the_same_for_every_latent_and_not_below_0(threshold, tmp_path):
    sae = batch_topk(k=3)
    params = {**random_params(sae), "threshold": np.float32(threshold)}
    TrainedSAE(sae, params).save(tmp_path)
    there = load_file(tmp_path / "sae_weights.safetensors")["threshold"]
    np.testing.assert_array_equal(there, np.full(7, np.maximum(np.float32(threshold), 0)))
    np.testing.assert_array_equal(formats.read(tmp_path)[1].params["threshold"], np.float32(threshold))
    json.loads((tmp_path / "cfg.json").read_text(), parse_constant=pytest.fail)


LIKE_SAELENS = {
    "standard": {"mean_features": False, "decoder_norm_l1": True, "l1": 0.0},
    "topk": {"k": 3, "auxk_loss": auxk.saelens},
    "jumprelu": {"l0_coefficient": 0.0},
    "gated": {"l1": 0.0, "detach_auxiliary": False},
    "transcoder": {"d_out": 4, "skip": False, "l1": 0.0},
    "skip_transcoder": {"d_out": 4, "skip": True},
    "jumprelu_transcoder": {"d_out": 4, "skip": False, "of": find("jumprelu")},
    "jumprelu_skip_transcoder": {"d_out": 4, "skip": True},
}

STATES = [
    *(("StandardSAE", "save_model", {"apply_b_dec_to_input": value}) for value in (True, False)),
    ("StandardTrainingSAE", "save_inference_model", {}),
    ("TopKSAE", "save_model", {"k": 3, "apply_b_dec_to_input": False}),
    ("TopKTrainingSAE", "save_inference_model", {"k": 3}),
    ("BatchTopKTrainingSAE", "save_inference_model", {"k": 2}),
    ("MatryoshkaBatchTopKTrainingSAE", "save_inference_model", {"k": 2, "matryoshka_widths": [3]}),
    *(("JumpReLUSAE", "save_model", {"apply_b_dec_to_input": value}) for value in (True, False)),
    ("JumpReLUTrainingSAE", "save_inference_model", {}),
    *(("GatedSAE", "save_model", {"apply_b_dec_to_input": value}) for value in (True, False)),
    ("GatedTrainingSAE", "save_inference_model", {}),
    *((name, "save_model", {"d_out": 4, "apply_b_dec_to_input": False})
      for name in ("Transcoder", "SkipTranscoder", "JumpReLUTranscoder", "JumpReLUSkipTranscoder")),
    *((name, "save_model", {"normalize_activations": "layer_norm", **more})
      for name, more in {"StandardSAE": {}, "TopKSAE": {"k": 3}, "JumpReLUSAE": {}, "GatedSAE": {},
                         "Transcoder": {"d_out": 4, "apply_b_dec_to_input": False}}.items()),
]  # fmt: skip


def written_by_saelens(name, save, arguments, folder, sae_lens, torch):
    made = getattr(sae_lens, name)(getattr(sae_lens, f"{name}Config")(d_in=5, d_sae=7, **arguments))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
        if hasattr(made, "threshold"):
            made.threshold.abs_()
        if hasattr(made, "topk_threshold"):
            made.topk_threshold.fill_(0.3)
        getattr(made, save)(str(folder))


@pytest.mark.parametrize(("name", "save", "arguments"), STATES, ids=str)
def test_what_saelens_wrote_is_read_here(name, save, arguments, x, tmp_path, sae_lens, torch):
    written_by_saelens(name, save, arguments, tmp_path, sae_lens, torch)
    ours = sae_jax.load(tmp_path)
    theirs = assert_same_as_saelens(tmp_path, ours, x, sae_lens, torch)
    told = LIKE_SAELENS[theirs.cfg.architecture()]
    assert {key: ours.sae.config[key] for key in told} == told
    if "d_out" not in arguments:
        assert ours.sae.config["apply_b_dec_to_input"] is arguments.get("apply_b_dec_to_input", True)
    assert ours.sae.config.get("normalize_activations") == arguments.get("normalize_activations")
    # and written again it is the same SAE
    ours.save(tmp_path / "again")
    assert_same_as_saelens(tmp_path / "again", ours, x, sae_lens, torch)


@table({"topk": ("TopKSAE", {"k": 3}), "topk-no-b-dec": ("TopKSAE", {"k": 3, "apply_b_dec_to_input": False})})
def test_a_rescaling_topk_of_saelens_is_read_as_it_is(name, factory, x, tmp_path, sae_lens, torch):
    arguments = {**factory, "rescale_acts_by_decoder_norm": True}
    written_by_saelens(name, "save_model", arguments, tmp_path, sae_lens, torch)
    ours = sae_jax.load(tmp_path)
    assert ours.sae.config["rescale_acts_by_decoder_norm"] is True
    assert_same_as_saelens(tmp_path, ours, x, sae_lens, torch)


CHANGED = (
    "relu-tied",
    "batch-topk",
    "jumprelu",
    "jumprelu-log",
    "gated",
    "matryoshka",
    "transcoder-batch-topk",
)


@table({name: WRITTEN[name] for name in CHANGED})
def test_what_saelens_changed_since_is_read_as_saelens_left_it(name, factory, x, tmp_path, sae_lens, torch):
    sae = factory()
    TrainedSAE(sae, random_params(sae)).save(tmp_path / "ours")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "ours")
    theirs.save_model(tmp_path / "kept")
    assert sae_jax.load(tmp_path / "kept").sae.config == sae.config
    theirs.fold_W_dec_norm()
    theirs.save_model(tmp_path / "changed")
    assert_same_as_saelens(tmp_path / "changed", sae_jax.load(tmp_path / "changed"), x, sae_lens, torch)


def test_an_old_topk_that_calls_itself_standard_is_a_topk(folder):
    edited(folder, activation_fn_str="topk", activation_fn_kwargs={"k": 2}, normalize_activations=False)
    loaded = sae_jax.load(folder)
    assert (loaded.sae.config["architecture"], loaded.sae.config["k"]) == ("topk", 2)
    edited(folder, activation_fn_str="tanh-relu", architecture="standard")
    refused(folder, "'standard with tanh-relu' is not read here")


def test_a_factor_of_1_that_saelens_used_to_write_is_passed_over(folder):
    edited(folder)
    path = folder / "sae_weights.safetensors"
    save_file({**load_file(path), "scaling_factor": np.ones(7, np.float32)}, path)
    assert set(sae_jax.load(folder).params) == {"W_enc", "b_enc", "W_dec", "b_dec"}
    save_file({**load_file(path), "scaling_factor": np.full(7, 2, np.float32)}, path)
    refused(folder, "tensors that a 'standard' does not have: scaling_factor")


def test_a_tied_sae_is_written_with_both_matrices_and_read_back_tied(tmp_path):
    sae = relu(tied=True)
    params = sae.init(jax.random.key(0))
    TrainedSAE(sae, params).save(tmp_path)
    on_disk = load_file(tmp_path / saelens.WEIGHTS)
    np.testing.assert_array_equal(on_disk["W_enc"], np.asarray(params["W_dec"]).T)
    assert "W_enc" not in sae_jax.load(tmp_path).params


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32], ids=lambda dtype: dtype.__name__)
def test_every_precision_comes_back_bit_for_bit(tmp_path, dtype):
    sae = sae_jax.relu(5, 7)
    params = sae.init(jax.random.key(0), dtype)
    TrainedSAE(sae, params).save(tmp_path)
    for name, leaf in sae_jax.load(tmp_path).params.items():
        assert leaf.dtype == dtype
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(params[name]))


def test_writing_twice_replaces(folder):
    sae = sae_jax.relu(3, 2)
    TrainedSAE(sae, sae.init(jax.random.key(1))).save(folder)
    assert sae_jax.load(folder).sae.config["d_in"] == 3


def test_traced_and_numpy_arguments_are_written_as_numbers(tmp_path):
    sae = sae_jax.relu(3, 2, l1=jnp.float32(0.25))
    TrainedSAE(sae, sae.init(jax.random.key(1))).save(tmp_path)
    assert sae_jax.load(tmp_path).sae.config["l1"] == 0.25


def test_an_architecture_that_no_reader_knows_is_refused(tmp_path):
    sae = replace(sae_jax.relu(3, 2), config={"architecture": "mystery"})
    with pytest.raises(InputError, match="'mystery' cannot be written: no reader knows it"):
        TrainedSAE(sae, {}).save(tmp_path / "sae")
    assert not (tmp_path / "sae").exists()


def edited(folder, **changes):
    """Its cfg.json with these entries, as SAELens would write it: without ours."""
    cfg = json.loads((folder / "cfg.json").read_text())
    cfg.pop("metadata", None)
    cfg |= changes
    (folder / "cfg.json").write_text(json.dumps(cfg))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "temporal"}, ["'temporal' is not read here, only standard, topk"]),
        ({"architecture": None}, ["None is not read here"]),
        ({"architecture": ["standard"]}, ["['standard'] is not read here"]),
        ({"architecture": "sae_jax_crosscoder"}, ["sae_jax must be an object"]),
        ({"architecture": "topk"}, ["k as a whole number"]),
        ({"architecture": "topk", "k": 2.5}, ["k as a whole number"]),
        ({"architecture": "topk", "k": 8}, ["k must be above 0 and at most d_sae = 7, got 8"]),
        ({"architecture": "topk", "k": 2, "rescale_acts_by_decoder_norm": "no"}, ["as true or false"]),
        ({"architecture": "jumprelu"}, ["has no tensor threshold"]),
        ({"architecture": "gated"}, ["has no tensor b_gate"]),
        ({"architecture": "transcoder"}, ["d_out as a whole number"]),
        ({"architecture": "transcoder", "d_out": 4}, ["W_dec must be (7, 4), got (7, 5)"]),
        ({"architecture": "skip_transcoder", "d_out": 5}, ["has no tensor W_skip"]),
        (
            {"architecture": "skip_transcoder", "d_out": 5, "normalize_activations": "layer_norm"},
            ["'skip_transcoder' are normalised by 'layer_norm'"],
        ),
        ({"normalize_activations": "expected_average_only_in"}, ["by 'expected_average_only_in'"]),
        ({"normalize_activations": "covariance_whitening"}, ["by 'covariance_whitening'"]),
        ({"normalize_activations": ["none"]}, ["by ['none']"]),
        ({"apply_b_dec_to_input": 1}, ["apply_b_dec_to_input as true or false"]),
        ({"d_in": "5"}, ["d_in as a whole number"]),
        ({"d_in": None}, ["d_in as a whole number"]),
        ({"d_in": 5.5}, ["d_in as a whole number"]),
        ({"d_in": [5]}, ["d_in as a whole number"]),
        ({"d_in": True}, ["d_in"]),
        ({"d_sae": {}}, ["d_sae as a whole number"]),
        ({"d_in": 0}, ["d_in must be at least 1"]),
        ({"d_in": -5}, ["d_in must be at least 1"]),
        ({"d_in": 10**30}, ["d_in must be below 2^31"]),
        ({"d_sae": 8}, ["sae_weights.safetensors: W_dec must be (8, 5), got (7, 5)"]),
        ({"metadata": []}, ["metadata must be an object"]),
        ({"metadata": {"sae_jax": {}}}, ["d_in as a whole number"]),
        ({"metadata": {"sae_jax": {"d_in": 5, "d_sae": 7}}}, ["no architecture is called"]),
        ({"metadata": {"sae_jax": {"architecture": "nope", "d_in": 5, "d_sae": 7}}}, ["'nope'", "relu"]),
        (
            {"metadata": {"sae_jax": {"architecture": "relu", "d_in": 5, "d_sae": 7, "k": 3}}},
            ["sae_jax does not"],
        ),
        (
            {"metadata": {"sae_jax": {"architecture": "relu", "d_in": 5, "d_sae": 7, "l1": "a"}}},
            ["sae_jax does not describe"],
        ),
        ({"metadata": {"sae_jax": {"architecture": "relu", "d_in": 5, "d_sae": 7, "l1": -1}}}, ["negative"]),
        (
            {"metadata": {"sae_jax": {"architecture": "relu", "d_in": 5, "d_sae": 7, "l1": None}}},
            ["sae_jax does not describe"],
        ),
        ({"metadata": {"sae_jax": {"architecture": "relu", "d_in": 5}}}, ["d_sae as a whole number"]),
    ],
    ids=str,
)
def test_a_config_that_lies_is_refused(folder, changes, words, unchecked):
    edited(folder, **changes)
    if words is None:
        assert sae_jax.load(folder).params["W_enc"].shape == (5, 7)
    else:
        refused(folder, *words)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
    | st.sampled_from(["relu", "crosscoder", "auxk.fvu", "losses.summed", "layer_norm"]),
    lambda value: st.lists(value, max_size=3) | st.dictionaries(st.text(max_size=3), value, max_size=2),
    max_leaves=4,
)  # fmt: skip


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_metadata_of_any_content_is_read_or_refused(data, tmp_path, unchecked):
    names = ("relu-steered", "topk", "batch-topk", "jumprelu-log", "matryoshka", "skip-jumprelu")
    sae = WRITTEN[data.draw(st.sampled_from(names))][1]()
    folder = tmp_path / "fuzzed"
    TrainedSAE(sae, random_params(sae)).save(folder)
    cfg = json.loads((folder / "cfg.json").read_text())
    about = data.draw(st.sampled_from([cfg, cfg["metadata"], cfg["metadata"]["sae_jax"],
                                       cfg["metadata"]["sae_jax_leaves"]]))  # fmt: skip
    key = data.draw(st.sampled_from([*about, "normalize_activations", "log_penalty"]))
    about[key] = data.draw(json_values)
    (folder / "cfg.json").write_text(json.dumps(cfg))
    try:
        sae_jax.load(folder)
    except InputError as error:
        one_line(error)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "3", "null", '"a"', "\xff"])
def test_a_config_that_is_no_json_object_is_refused(folder, text):
    (folder / "cfg.json").write_bytes(text.encode("latin-1"))
    refused(folder, str(folder))


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec"])
def test_a_missing_or_misshapen_tensor_is_named(folder, name):
    path = folder / "sae_weights.safetensors"
    good = load_file(path)
    save_file({key: leaf for key, leaf in good.items() if key != name}, path)
    refused(folder, f"has no tensor {name}")
    save_file({**good, name: np.ascontiguousarray(good[name].T[..., None])}, path)
    refused(folder, f"{name} must be ({', '.join(map(str, good[name].shape))}")


def test_weights_cut_short_anywhere_are_refused(folder):
    path = folder / "sae_weights.safetensors"
    whole = path.read_bytes()
    for length in [0, 4, 8, 50, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        refused(folder, str(folder))


def test_tensors_that_are_no_numbers_for_weights_are_refused(folder):
    path = folder / "sae_weights.safetensors"
    save_file({name: leaf.astype(np.int64) for name, leaf in load_file(path).items()}, path)
    refused(folder, "int64")


def test_paths_that_hold_no_sae(tmp_path, folder):
    refused(tmp_path / "none", "does not exist")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "is in no format known here", "SAELens", "PyTorch", "found: no files")
    assert sae_jax.load(tmp_path).about.format == "saelens", "the one SAE below a folder is meant"
    shutil.copytree(folder, tmp_path / "again")
    refused(tmp_path, "holds 2 SAEs: name one of again, sae, or use load_all")
    shutil.rmtree(tmp_path / "again")
    assert list(sae_jax.load_all(tmp_path)) == ["sae"]
    (tmp_path / "a.txt").write_text("hello")
    refused(tmp_path / "a.txt", "is in no format known here")
    (tmp_path / "other").mkdir()
    save_file({"a": np.ones(2), "b": np.ones(3)}, tmp_path / "other/x.safetensors")
    refused(tmp_path / "other", "is in no format known here", "found: x.safetensors (a, b)")


def test_a_folder_without_its_config_says_what_cannot_be_told(folder):
    (folder / "cfg.json").unlink()
    refused(folder, "has no cfg.json", "W_enc [5, 7]", "cannot tell architecture, k, apply_b_dec_to_input")


def test_nan_weights_are_named_and_counted(tmp_path):
    sae = sae_jax.relu(5, 7)
    params = random_params(sae)
    params["W_enc"] = params["W_enc"].at[0, :3].set(jnp.nan)
    TrainedSAE(sae, params).save(tmp_path)
    refused(tmp_path, "W_enc has 3 NaN of 35 values")


# The seed's module


@pytest.fixture
def module(torch):
    """The post's PyTorch module, with its default initial weights."""

    class SparseAutoencoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.ReLU())
            self.decoder = torch.nn.Sequential(torch.nn.Linear(7, 5))

        def forward(self, x):
            f = self.encoder(x)
            return f, self.decoder(f)

    torch.manual_seed(0)
    return SparseAutoencoder()


def assert_same_module(module, trained, x, torch):
    with torch.no_grad():
        f, x_hat = module(torch.tensor(np.asarray(x)))
    assert 0 < (f.numpy() > 0).mean() < 1
    np.testing.assert_allclose(trained.encode(x), f.numpy(), atol=1e-6)
    np.testing.assert_allclose(trained(x), x_hat.numpy(), atol=1e-6)


def test_the_seeds_state_dict_is_read(module, x, torch, tmp_path):
    state = module.state_dict()
    loaded = TrainedSAE(*seed_module.from_state_dict({name: leaf.numpy() for name, leaf in state.items()}))
    assert_same_module(module, loaded, x, torch)
    for name in ("a.pt", "a.pth"):
        torch.save(state, tmp_path / name)
        assert_same_module(module, sae_jax.load(tmp_path / name), x, torch)


def test_the_seeds_module_loads_what_is_written_here(module, x, torch, tmp_path):
    sae = sae_jax.relu(5, 7)
    trained = TrainedSAE(sae, sae.init(jax.random.key(4)))
    arrays = seed_module.to_state_dict(trained.params)
    module.load_state_dict({name: torch.tensor(array) for name, array in arrays.items()}, strict=True)
    assert_same_module(module, trained, x, torch)
    assert trained.save(tmp_path / "b.pt", "seed") == ["how it was trained, and on what"]
    module.load_state_dict(torch.load(tmp_path / "b.pt", weights_only=True), strict=True)
    assert_same_module(module, trained, x, torch)
    again = sae_jax.load(tmp_path / "b.pt").params
    for name, leaf in trained.params.items():
        np.testing.assert_array_equal(again[name], leaf)


def test_a_state_dict_of_parameters_is_read(module, x, torch, tmp_path):
    torch.save(dict(module.named_parameters()), tmp_path / "a.pt")
    assert_same_module(module, sae_jax.load(tmp_path / "a.pt"), x, torch)


def test_a_state_dict_in_bfloat16_is_read_or_refused(module, torch, tmp_path):
    torch.save({name: leaf.bfloat16() for name, leaf in module.state_dict().items()}, tmp_path / "a.pt")
    try:
        params = sae_jax.load(tmp_path / "a.pt").params
    except InputError as error:
        one_line(error)
    else:
        expected = module.state_dict()["encoder.0.bias"].bfloat16().float().numpy()
        np.testing.assert_array_equal(np.asarray(params["b_enc"], np.float32), expected)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pt_file_that_holds_code_is_refused_and_the_code_not_run(module, torch, tmp_path):
    torch.save({**module.state_dict(), "bomb": Bomb(tmp_path / "ran")}, tmp_path / "a.pt")
    message = refused(tmp_path / "a.pt", "a.pt cannot be read")
    assert "weights_only" not in message, "it must not advise the user to run the code"
    torch.save(Bomb(tmp_path / "ran"), tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    refused(tmp_path / "b.pt", "b.pt cannot be read")
    assert not (tmp_path / "ran").exists()
    # the bomb is live: unpickled without care it does run
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert (tmp_path / "ran").exists()


def test_a_damaged_pt_file_is_refused(module, torch, tmp_path):
    path = tmp_path / "a.pt"
    torch.save(module.state_dict(), path)
    whole = path.read_bytes()
    for data in (b"", b"garbage", whole[:100], whole[: len(whole) // 2], whole[:-10]):
        path.write_bytes(data)
        refused(path, "a.pt cannot be read as a PyTorch file")


def test_a_pt_file_of_something_else_is_refused(module, torch, tmp_path):
    state = module.state_dict()
    others = [
        ([1, 2], "must hold a dictionary, got list"),
        ({"epoch": 3, "model": state}, "no format known here"),
        ({}, "found: a.pt (nothing)"),
        ({"weights": torch.ones(2)}, "found: a.pt (weights)"),
        ({"encoder.0.weight": torch.ones(2)}, "has no encoder.0.bias; it has: encoder.0.weight"),
        ({**state, "encoder.0.bias": torch.ones(6)}, "do not fit one another"),
        ({**state, "decoder.0.weight": torch.ones(7, 5)}, "do not fit one another"),
        ({**state, "encoder.0.weight": torch.ones(7)}, "encoder.0.weight must be [d_sae, d_in], got (7,)"),
    ]
    for content, message in others:
        torch.save(content, tmp_path / "a.pt")
        refused(tmp_path / "a.pt", message)


def test_a_tied_sae_has_no_place_in_the_seeds_module():
    params = sae_jax.relu(5, 7, tied=True).init(jax.random.key(0))
    with pytest.raises(InputError, match="the seed's module has exactly W_enc, b_enc, W_dec, b_dec"):
        seed_module.to_state_dict(params)
