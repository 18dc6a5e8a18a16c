"""Weights in other people's layouts, there and back, with the real libraries."""

import json
import os
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES
from safetensors.numpy import load_file, save_file

import sae_jax
from sae_jax import InputError, TrainedSAE
from sae_jax.formats import saelens, seed_module

every_case = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


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


@every_case
def test_saelens_reads_what_is_written_here(case, x, tmp_path, sae_lens, torch):
    sae = case.factory(l1=0.1)
    trained = TrainedSAE(sae, sae.init(jax.random.key(1)))
    trained.save(tmp_path)
    theirs = sae_lens.SAE.load_from_disk(tmp_path, device="cpu")
    assert theirs.cfg.architecture() == "standard"
    assert theirs.cfg.apply_b_dec_to_input == sae.config["apply_b_dec_to_input"]
    with torch.no_grad():
        f = theirs.encode(torch.tensor(np.asarray(x)))
        x_hat = theirs.decode(f)
    ours = trained.encode(x)
    assert 0 < (np.asarray(ours) > 0).mean() < 1
    np.testing.assert_allclose(f.numpy(), ours, atol=1e-6)
    np.testing.assert_allclose(x_hat.numpy(), trained.decode(ours), atol=1e-6)


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("save", ["save_model", "save_inference_model"])
def test_what_saelens_wrote_is_read_here(x, tmp_path, sae_lens, torch, apply_b_dec_to_input, save):
    if save == "save_model":
        cfg = sae_lens.StandardSAEConfig(d_in=5, d_sae=7, apply_b_dec_to_input=apply_b_dec_to_input)
        theirs = sae_lens.StandardSAE(cfg)
    else:
        cfg = sae_lens.StandardTrainingSAEConfig(d_in=5, d_sae=7, apply_b_dec_to_input=apply_b_dec_to_input)
        theirs = sae_lens.StandardTrainingSAE(cfg)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
        getattr(theirs, save)(str(tmp_path))
        f = theirs.encode(torch.tensor(np.asarray(x)))
        x_hat = theirs.decode(f)
    ours = sae_jax.load(tmp_path)
    assert ours.sae.config["apply_b_dec_to_input"] is apply_b_dec_to_input
    assert ours.sae.config["decoder_norm_l1"] is True
    assert ours.sae.config["mean_features"] is False
    np.testing.assert_allclose(ours.encode(x), f.numpy(), atol=1e-6)
    np.testing.assert_allclose(ours(x), x_hat.numpy(), atol=1e-6)


def test_a_tied_sae_is_written_with_both_matrices_and_read_back_tied(tmp_path):
    sae = sae_jax.relu(5, 7, tied=True)
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


def test_what_saelens_cannot_express_is_refused(tmp_path):
    sae = replace(sae_jax.relu(3, 2), config={"architecture": "mystery"})
    with pytest.raises(InputError, match="SAELens has no form for 'mystery'"):
        saelens.write(tmp_path / "sae", sae, {})
    assert not (tmp_path / "sae").exists()


def edited(folder, **changes):
    """Its cfg.json with these entries, as SAELens would write it: without ours."""
    cfg = json.loads((folder / "cfg.json").read_text())
    del cfg["metadata"]
    cfg |= changes
    (folder / "cfg.json").write_text(json.dumps(cfg))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "topk"}, ["'topk'", "only 'standard'"]),
        ({"architecture": None}, ["None", "only 'standard'"]),
        ({"architecture": ["standard"]}, ["only 'standard'"]),
        ({"normalize_activations": "layer_norm"}, ["'layer_norm'"]),
        ({"d_in": "5"}, ["d_in as a whole number"]),
        ({"d_in": None}, ["d_in as a whole number"]),
        ({"d_in": 5.5}, ["d_in as a whole number"]),
        ({"d_in": [5]}, ["d_in as a whole number"]),
        ({"d_in": True}, ["d_in"]),
        ({"d_sae": {}}, ["d_sae as a whole number"]),
        ({"d_in": 0}, ["d_in must be at least 1"]),
        ({"d_in": -5}, ["d_in must be at least 1"]),
        ({"d_in": 10**30}, ["d_in must be below 2^31"]),
        ({"d_sae": 8}, ["W_enc must be (5, 8), got (5, 7)"]),
        ({"metadata": []}, None),
        ({"metadata": {"sae_jax": {}}}, ["no architecture is called"]),
        ({"metadata": {"sae_jax": {"architecture": "nope", "d_in": 5, "d_sae": 7}}}, ["'nope'", "relu"]),
        ({"metadata": {"sae_jax": {"architecture": "relu", "d_in": 5, "d_sae": 7, "k": 3}}}, ["cfg.json"]),
        ({"metadata": {"sae_jax": {"architecture": "relu", "d_in": 5, "d_sae": 7, "l1": "a"}}}, ["cfg.json"]),
        ({"metadata": {"sae_jax": {"architecture": "relu", "d_in": 5, "d_sae": 7, "l1": -1}}}, ["negative"]),
        (
            {"metadata": {"sae_jax": {"architecture": "relu", "d_in": 5, "d_sae": 7, "l1": None}}},
            ["cfg.json"],
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
    refused(tmp_path, "is in no format known here", "SAELens", "PyTorch")
    (tmp_path / "a.txt").write_text("hello")
    refused(tmp_path / "a.txt", "is in no format known here")
    (folder / "cfg.json").unlink()
    refused(folder, "is in no format known here")


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
    seed_module.write(tmp_path / "b.pt", trained.params)
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
        refused(path, "a.pt cannot be read as a PyTorch state dict")


def test_a_pt_file_of_something_else_is_refused(module, torch, tmp_path):
    state = module.state_dict()
    others = [
        ([1, 2], "must hold a state dict of tensors"),
        ({"epoch": 3, "model": state}, "must hold a state dict of tensors"),
        ({}, "has no encoder.0.weight; it has: nothing"),
        ({"encoder.weight": torch.ones(2)}, "has no encoder.0.weight; it has: encoder.weight"),
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
