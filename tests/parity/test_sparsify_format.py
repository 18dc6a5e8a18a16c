"""sparsify's own `SparseCoder`, and its files read and written here."""

import importlib.util
import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import sae_jax
from sae_jax import InputError, TrainedSAE, formats
from sae_jax.architectures import find
from sae_jax.normalise import layer_normed
from sae_jax.verify.harness import relative_error

D_IN, D_SAE, K = 8, 20, 3
BOUNDS = {"float32": 1e-6, "float64": 1e-12}
CODERS = {
    "sae": {"num_latents": D_SAE},
    "sae-expanded": {"num_latents": 0, "expansion_factor": 3, "multi_topk": True},
    "sae-skip": {"num_latents": D_SAE, "skip_connection": True},
    "transcoder": {"num_latents": D_SAE, "transcode": True},
    "transcoder-skip": {"num_latents": D_SAE, "transcode": True, "skip_connection": True},
}
"""The arguments of the library's config, by name."""


@pytest.fixture(scope="module")
def library():
    """Its coders; where there is no triton it decodes in plain PyTorch by itself."""
    if importlib.util.find_spec("sparsify") is None:
        pytest.skip("not installed: pip install --no-deps eai-sparsify natsort schedulefree")
    import sparsify

    return SimpleNamespace(SparseCoder=sparsify.SparseCoder, Config=sparsify.SparseCoderConfig)


@pytest.fixture
def rows():
    return np.random.default_rng(5).normal(size=(48, D_IN))


def made(library, torch, name, dtype="float32", seed=1):
    """A coder of which no weight is 0."""
    coder = library.SparseCoder(D_IN, library.Config(k=K, **CODERS[name]), dtype=getattr(torch, dtype))
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for leaf in coder.parameters():
            leaf.copy_(torch.tensor(0.5 * rng.normal(size=leaf.shape)))
        # low enough that some rows have fewer than k latents above 0
        coder.encoder.bias -= 2
    return coder


def assert_same(ours, theirs, rows, torch, dtype="float32"):
    x = rows.astype(dtype)
    with torch.no_grad():
        values, indices, _ = theirs.encode(torch.tensor(x))
        f = torch.zeros(len(x), theirs.num_latents, dtype=values.dtype).scatter(1, indices, values).numpy()
        decoded = theirs.decode(values, indices).numpy()
        # with multi_topk its forward gives back the reconstruction from the 4 k largest in place of the k
        cfg, theirs.cfg = theirs.cfg, replace(theirs.cfg, multi_topk=False)
        x_hat = theirs(torch.tensor(x)).sae_out.numpy()
        theirs.cfg = cfg
    assert 0 < (f > 0).sum() <= theirs.cfg.k * len(x)
    assert ours.encode(x).dtype == dtype
    assert relative_error(np.asarray(ours.encode(x)), f) <= BOUNDS[dtype]
    assert relative_error(np.asarray(ours.decode(f)), decoded) <= BOUNDS[dtype]
    assert relative_error(np.asarray(ours(x)), x_hat) <= BOUNDS[dtype]


def refused(call, *words):
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message, message
    for word in words:
        assert word in message, message


# Read


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("name", CODERS)
def test_every_coder_is_read(name, dtype, library, torch, rows, tmp_path, x64):
    coder = made(library, torch, name, dtype)
    coder.save_to_disk(tmp_path / "layers.3")
    for path in (tmp_path / "layers.3", tmp_path / "layers.3" / "sae.safetensors"):
        ours = sae_jax.load(path)
        assert ours.about.format == "sparsify"
        assert ours.about.metadata["sparsify"] == {**coder.cfg.to_dict(), "d_in": D_IN}
        assert_same(ours, coder, rows, torch, dtype)
        # the ReLU comes before the k largest
        assert (np.asarray(ours.encode(rows)) > 0).sum(axis=1).min() < K


def test_every_hookpoint_is_read(library, torch, rows, tmp_path):
    coders = {
        f"layers.{i}": made(library, torch, name, seed=seed)
        for i, (name, seed) in enumerate([("sae", 1), ("sae", 2), ("transcoder-skip", 3)])
    }
    for hookpoint, coder in coders.items():
        coder.save_to_disk(tmp_path / "run" / hookpoint)
    # what the trainer leaves beside them
    (tmp_path / "run" / "config.json").write_text(json.dumps({"hookpoints": list(coders)}))
    found = sae_jax.load_all(tmp_path / "run")
    assert found.keys() == coders.keys()
    for hookpoint, coder in coders.items():
        assert_same(found[hookpoint], coder, rows, torch)
    refused(partial(sae_jax.load, tmp_path / "run"), "3 SAEs", "layers.0")


# There and back


@pytest.mark.parametrize("name", CODERS)
def test_the_way_back_changes_no_bit(name, library, torch, rows, tmp_path):
    coder = made(library, torch, name)
    coder.save_to_disk(tmp_path / "theirs")
    ours = sae_jax.load(tmp_path / "theirs")
    # by way of another format too
    ours.save(tmp_path / "saelens")
    for way, trained in {"direct": ours, "by saelens": sae_jax.load(tmp_path / "saelens")}.items():
        assert trained.save(tmp_path / way, format="sparsify") == []
        again = library.SparseCoder.load_from_disk(tmp_path / way)
        assert_same(ours, again, rows, torch)
        if name == "sae-skip":
            # there is none here: it has become a transcoder, its b_dec folded
            assert again.cfg.transcode
            continue
        assert {**again.cfg.to_dict(), "num_latents": 0} == {**coder.cfg.to_dict(), "num_latents": 0}
        before, after = (load_file(tmp_path / folder / "sae.safetensors") for folder in ("theirs", way))
        assert before.keys() == after.keys()
        for tensor, values in before.items():
            np.testing.assert_array_equal(after[tensor], values, tensor)


topk, transcoder = (partial(find(name), D_IN, D_SAE) for name in ("topk", "transcoder"))
onto = partial(transcoder, d_out=D_IN, of=find("topk"), k=K)
WRITTEN = {
    "topk": partial(topk, k=K, auxk=0.5),
    "topk-float-k": partial(topk, k=2.0, k_max=4),
    "topk-no-b-dec": partial(topk, k=K, apply_b_dec_to_input=False),
    "matryoshka": partial(find("matryoshka"), D_IN, D_SAE, of=find("topk"), k=K, prefixes=(4, 20)),
    "transcoder": onto,
    "skip": partial(onto, skip=True),
}


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("build", list(WRITTEN.values()), ids=list(WRITTEN))
def test_the_library_reads_what_is_written_here(build, dtype, library, torch, rows, tmp_path, x64):
    sae = build()
    ours = TrainedSAE(sae, random_params(sae, dtype))
    ours.save(tmp_path, format="sparsify")
    theirs = library.SparseCoder.load_from_disk(tmp_path)
    assert theirs.dtype == getattr(torch, dtype)
    assert_same(ours, theirs, rows, torch, dtype)
    again = sae_jax.load(tmp_path)
    assert again.sae.config == sae.config
    assert_same(again, theirs, rows, torch, dtype)


def test_a_rescaled_topk_is_folded(library, torch, rows, tmp_path):
    sae = topk(k=K, rescale_acts_by_decoder_norm=True)
    ours = TrainedSAE(sae, random_params(sae, "float32"))
    ours.save(tmp_path, format="sparsify")
    theirs = library.SparseCoder.load_from_disk(tmp_path)
    x = rows.astype(np.float32)
    with torch.no_grad():
        assert relative_error(np.asarray(ours(x)), theirs(torch.tensor(x)).sae_out.numpy()) <= 1e-6


def random_params(sae, dtype):
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: sae.init(jax.random.key(0), dtype))
    return {name: jnp.asarray(0.5 * rng.normal(size=leaf.shape), dtype) for name, leaf in shapes.items()}


def test_half_precision_stays_as_it_is(library, torch, tmp_path):
    sae = WRITTEN["skip"]()
    params = random_params(sae, jnp.bfloat16)
    TrainedSAE(sae, params).save(tmp_path, format="sparsify")
    again = sae_jax.load(tmp_path)
    for name, leaf in params.items():
        assert again.params[name].dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(again.params[name]), np.asarray(leaf), name)
    assert library.SparseCoder.load_from_disk(tmp_path).dtype == torch.bfloat16


def test_what_was_told_of_model_and_site_comes_back(library, tmp_path):
    sae = WRITTEN["topk"]()
    told = {"model_name": "a/model", "hook_name": "layers.3", "dataset_path": "a/text"}
    formats.write(tmp_path, sae, sae.init(jax.random.key(0)), "sparsify", metadata=told)
    assert sae_jax.load(tmp_path).about.metadata.items() >= told.items()
    assert library.SparseCoder.load_from_disk(tmp_path).cfg.k == K


@pytest.mark.parametrize(
    ("sae", "words"),
    [
        (find("relu")(D_IN, D_SAE), "not a relu"),
        (find("batch_topk")(D_IN, D_SAE, k=K), "not a batch_topk"),
        (find("crosscoder")(D_IN, D_SAE, sources=2), "not a crosscoder"),
        (transcoder(d_out=D_IN), "not a relu"),
        (transcoder(d_out=5, of=find("topk"), k=K), "this one 8 and 5"),
    ],
)
def test_what_a_coder_is_not_is_refused(sae, words, tmp_path):
    ours = TrainedSAE(sae, sae.init(jax.random.key(0)))
    refused(partial(ours.save, tmp_path / "sae", format="sparsify", lossy=True), words)
    assert not (tmp_path / "sae").exists()


def test_a_layer_norm_is_lost_only_where_wanted(tmp_path):
    sae = layer_normed(WRITTEN["topk"]())
    ours = TrainedSAE(sae, sae.init(jax.random.key(0)))
    refused(partial(ours.save, tmp_path, format="sparsify"), "its layer norm")
    assert ours.save(tmp_path, format="sparsify", lossy=True) == ["its layer norm"]
    assert "normalize_activations" not in sae_jax.load(tmp_path).sae.config


# Bad input


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"activation": "groupmax"}, ("'groupmax' is not read here",)),
        ({"activation": None}, ("None is not read here",)),
        ({"signed": True}, ("signed latents",)),
        ({"k": 3.0}, ("k as a whole number, got 3.0",)),
        ({"k": None}, ("k as a whole number, got None",)),
        ({"k": 0}, ("k as a whole number, got 0",)),
        ({"k": 10**30}, ("k",)),
        ({"d_in": "8"}, ("d_in as a whole number",)),
        ({"d_in": 9}, ("encoder.weight must be (20, 9), got (20, 8)",)),
        ({"num_latents": 10**30}, ("encoder.weight must be",)),
        ({"num_latents": 0, "expansion_factor": 4}, ("encoder.weight must be (32, 8), got (20, 8)",)),
        ({"transcode": 1}, ("transcode as true or false",)),
        ({"skip_connection": True}, ("has no tensor W_skip",)),
        ({"metadata": 3}, ("metadata must be an object",)),
    ],
)  # fmt: skip
def test_a_bad_config_is_told_of_in_one_sentence(changes, words, tmp_path):
    sae = WRITTEN["topk"]()
    TrainedSAE(sae, sae.init(jax.random.key(0))).save(tmp_path, format="sparsify")
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps({**cfg, **changes}))
    refused(partial(sae_jax.load, tmp_path), *words)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"W_dec": None}, "has no tensor W_dec"),
        ({"W_dec": (8, 20)}, "W_dec must be (20, 8), got (8, 20)"),
        ({"W_skip": (8, 8)}, "does not tell of: W_skip"),
        ({"more": (3,)}, "does not tell of: more"),
    ],
)
def test_bad_weights_are_told_of_in_one_sentence(tensors, words, tmp_path):
    sae = WRITTEN["topk"]()
    TrainedSAE(sae, sae.init(jax.random.key(0))).save(tmp_path, format="sparsify")
    held = load_file(tmp_path / "sae.safetensors")
    held |= {name: np.ones(shape, np.float32) for name, shape in tensors.items() if shape is not None}
    kept = {name: leaf for name, leaf in held.items() if tensors.get(name, ()) is not None}
    save_file(kept, tmp_path / "sae.safetensors")
    refused(partial(sae_jax.load, tmp_path), words)


def test_a_missing_config_says_what_it_would_have_told(tmp_path):
    sae = WRITTEN["topk"]()
    TrainedSAE(sae, sae.init(jax.random.key(0))).save(tmp_path, format="sparsify")
    (tmp_path / "cfg.json").unlink()
    refused(partial(sae_jax.load, tmp_path), "k, activation and transcode could not be inferred")
