"""Files in the layouts of libraries that do not install, against SAELens's own loaders of them.

Where SAELens has none (openai, ckkissane's crosscoder) a module is written out here from the definition.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from cases import weights
from safetensors.numpy import load_file, save_file

import sae_jax
from sae_jax import InputError, TrainedSAE, formats
from sae_jax.layer_norm import layer_normed

D_IN, D_SAE = 6, 11
TIGHT = {"float32": 1e-6, "float64": 1e-12}
PRECISIONS = pytest.mark.parametrize("dtype", list(TIGHT))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def drawn(rng, dtype, **shapes):
    return {name: (0.5 * rng.normal(size=shape)).astype(dtype) for name, shape in shapes.items()}


def rows(dtype, *shape):
    return np.random.default_rng(7).normal(size=shape or (64, D_IN)).astype(dtype)


def assert_close(ours, theirs, dtype):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.dtype == theirs.dtype == dtype
    assert np.abs(ours - theirs).max() <= TIGHT[dtype] * np.abs(theirs).max()


def assert_same(trained, f, x_hat, x, dtype):
    """Features and reconstructions, neither trivial."""
    assert 0.05 < float((np.asarray(f) > 0).mean()) < 0.95
    assert_close(trained.encode(x), f, dtype)
    assert_close(trained.decode(trained.encode(x), x), x_hat, dtype)


@pytest.fixture
def saelens_loader(sae_lens, torch, monkeypatch):
    """SAELens's loader of that name over a local folder: only where the files lie is told otherwise."""
    from huggingface_hub.utils import EntryNotFoundError
    from sae_lens.loading import pretrained_sae_loaders as loaders

    def load(name, repo, folder_name, dtype, repo_id="google/gemma-scope-2-1b-pt", **overrides):
        def fetched(repo_id, filename, subfolder=None, **rest):
            path = Path(repo) / (subfolder or "") / filename
            if not path.exists():
                response = type("R", (), {"headers": {}, "request": None, "status_code": 404})()
                raise EntryNotFoundError(filename, response=response)
            return str(path)

        def shapes(repo_id, filename):
            return {key: list(leaf.shape) for key, leaf in load_file(Path(repo) / filename).items()}

        monkeypatch.setattr(loaders, "hf_hub_download", fetched)
        monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", shapes)
        cfg, state, _ = getattr(loaders, name)(
            repo_id=repo_id, folder_name=folder_name, device="cpu",
            cfg_overrides={"dtype": dtype, **overrides},
        )  # fmt: skip
        state = {key: leaf.to(getattr(torch, dtype)) for key, leaf in state.items()}
        model = sae_lens.SAE.from_dict({**cfg, "dtype": dtype})
        model.load_state_dict(state)
        return model

    return load


def there(model, x, torch):
    with torch.no_grad():
        rows = torch.tensor(x)
        return model.encode(rows).numpy(), model(rows).numpy()


def jumprelu_tensors(rng, dtype, d_out=D_IN):
    tensors = drawn(rng, dtype, W_enc=(D_IN, D_SAE), W_dec=(D_SAE, d_out), b_enc=(D_SAE,), b_dec=(d_out,))
    return {**tensors, "threshold": rng.uniform(0.1, 0.8, D_SAE).astype(dtype)}


# Gemma Scope


@PRECISIONS
def test_gemma_scope(dtype, rng, tmp_path, saelens_loader, torch, x64):
    tensors = jumprelu_tensors(rng, dtype)
    folder = tmp_path / "layer_3/width_1k/average_l0_9"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **tensors)
    loaded = sae_jax.load(folder)
    assert loaded.about.format == "gemma_scope"
    place = "layer_3/width_1k/average_l0_9"
    repo, told = "google/gemma-scope-2b-pt-res", {"d_in": D_IN, "d_sae": D_SAE}
    told["normalize_activations"] = "none"
    model = saelens_loader("gemma_2_sae_huggingface_loader", tmp_path, place, dtype, repo, **told)
    # the loader rounds to float32
    model.load_state_dict({name: torch.tensor(leaf) for name, leaf in tensors.items()})
    x = rows(dtype)
    assert_same(loaded, *there(model, x, torch), x, dtype)
    np.savez_compressed(tmp_path / "one.npz", **tensors)
    assert_same(sae_jax.load(tmp_path / "one.npz"), *there(model, x, torch), x, dtype)


@PRECISIONS
@pytest.mark.parametrize(
    ("folder_name", "transcodes", "skip"),
    [("resid_post/layer_3_width_1k", False, False), ("transcoder/layer_3_width_1k", True, False),
     ("transcoder/layer_3_width_1k_affine", True, True)],
)  # fmt: skip
def test_gemma_scope_2(dtype, folder_name, transcodes, skip, rng, tmp_path, saelens_loader, torch, x64):
    tensors = {name.lower(): leaf for name, leaf in jumprelu_tensors(rng, dtype).items()}
    if skip:
        tensors |= drawn(rng, dtype, affine_skip_connection=(D_IN, D_IN))
    folder = tmp_path / folder_name
    folder.mkdir(parents=True)
    save_file(tensors, folder / "params.safetensors")
    cfg = {
        "architecture": "jump_relu",
        "model_name": "gemma-v3-1b-pt",
        "hf_hook_point_in": "model.layers.3.output",
    }
    if transcodes:
        cfg |= {"hf_hook_point_out": "model.layers.3.mlp.output", "affine_connection": skip}
    (folder / "config.json").write_text(json.dumps(cfg))
    loaded = sae_jax.load(folder)
    assert loaded.about.format == "gemma_scope_2"
    assert loaded.about.metadata["model_name"] == "gemma-v3-1b-pt"
    assert ("d_out" in loaded.sae.config) == transcodes
    model = saelens_loader("gemma_3_sae_huggingface_loader", tmp_path, folder_name, dtype)
    x = rows(dtype)
    assert_same(loaded, *there(model, x, torch), x, dtype)
    # and what is written here is read there
    again = tmp_path / "again" / folder_name
    loaded.save(again, "gemma_scope_2")
    model = saelens_loader("gemma_3_sae_huggingface_loader", tmp_path / "again", folder_name, dtype)
    assert_same(loaded, *there(model, x, torch), x, dtype)


# Llama Scope


def llama_tensors(rng, dtype, d_sae=D_SAE):
    shapes = {
        "encoder.weight": (d_sae, D_IN),
        "encoder.bias": (d_sae,),
        "decoder.weight": (D_IN, d_sae),
        "decoder.bias": (D_IN,),
    }
    return drawn(rng, dtype, **shapes)


NORM = 3.7


@PRECISIONS
def test_llama_scope(dtype, rng, tmp_path, saelens_loader, torch, x64):
    folder = tmp_path / "L3R"
    (folder / "checkpoints").mkdir(parents=True)
    save_file(llama_tensors(rng, dtype), folder / "checkpoints/final.safetensors")
    cfg = {
        "d_model": D_IN,
        "d_sae": D_SAE,
        "jump_relu_threshold": 0.5,
        "hook_point_in": "blocks.3.hook_resid_post",
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": NORM, "out": NORM},
    }
    (folder / "hyperparams.json").write_text(json.dumps(cfg))
    loaded = sae_jax.load(folder)
    assert loaded.about.format == "llama_scope"
    assert loaded.about.metadata["hook_name"] == "blocks.3.hook_resid_post"
    model = saelens_loader("llama_scope_sae_huggingface_loader", tmp_path, "L3R", dtype)
    model.fold_activation_norm_scaling_factor(D_IN**0.5 / NORM)
    x = rows(dtype)
    f, x_hat = there(model, x, torch)
    assert_same(loaded, f, x_hat, x, dtype)


@PRECISIONS
def test_llama_scope_of_r1_distill(dtype, rng, tmp_path, saelens_loader, torch, x64):
    folder = tmp_path / "L3R"
    folder.mkdir()
    threshold = rng.uniform(0.1, 0.8, 2 * D_IN)
    tensors = {
        **llama_tensors(rng, dtype, 2 * D_IN),
        "log_jumprelu_threshold": np.log(threshold).astype(dtype),
    }
    save_file(tensors, folder / "sae_weights.safetensors")
    cfg = {"d_model": D_IN, "expansion_factor": 2, "hook_point_in": "blocks.3.hook_resid_post",
           "norm_activation": "dataset-wise", "dataset_average_activation_norm": {"in": NORM}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(cfg))
    loaded = sae_jax.load(folder)
    assert loaded.about.format == "llama_scope"
    model = saelens_loader("llama_scope_r1_distill_sae_huggingface_loader", tmp_path, "L3R", dtype)
    model.fold_activation_norm_scaling_factor(D_IN**0.5 / NORM)
    x = rows(dtype)
    assert_same(loaded, *there(model, x, torch), x, dtype)


# circuit-tracer


class Transcoder:
    """circuit-tracer's transcoder, from its definition."""

    def __init__(self, path, torch):
        self.torch, self.config = torch, yaml.safe_load((path.parent / "config.yaml").read_text())
        assert {"feature_input_hook", "feature_output_hook", "model_kind"} <= self.config.keys()
        self.state = {name: torch.tensor(leaf) for name, leaf in load_file(path).items()}

    def encode(self, x):
        pre = x @ self.state["W_enc"].T + self.state["b_enc"]
        if self.config.get("activation") == "topk":
            # not rectified
            gate = self.torch.zeros_like(pre)
            return pre * gate.scatter_(-1, self.torch.topk(pre, self.config["k"]).indices, 1.0)
        if "activation_function.threshold" in self.state:
            return pre * (pre > self.state["activation_function.threshold"])
        return pre.relu()

    def __call__(self, x):
        y = self.encode(x) @ self.state["W_dec"] + self.state["b_dec"]
        return y + x @ self.state["W_skip"].T if "W_skip" in self.state else y


KINDS = {
    "relu": {},
    "jumprelu": {"activation_function.threshold": np.linspace(0.1, 0.8, D_SAE)},
    "one threshold": {"activation_function.threshold": np.full(1, 0.4)},
    "topk": {},
    "skip": {"W_skip": np.linspace(-1, 1, D_IN * D_IN).reshape(D_IN, D_IN)},
}


@PRECISIONS
@pytest.mark.parametrize("kind", list(KINDS))
def test_circuit_tracer(dtype, kind, rng, tmp_path, torch, x64):
    tensors = drawn(rng, dtype, W_enc=(D_SAE, D_IN), W_dec=(D_SAE, D_IN), b_enc=(D_SAE,), b_dec=(D_IN,))
    more = {name: leaf if name == "k" else leaf.astype(dtype) for name, leaf in KINDS[kind].items()}
    for layer in (0, 1):
        save_file({**tensors, **more}, tmp_path / f"layer_{layer}.safetensors")
    cfg = {"model_kind": "transcoder_set", "feature_input_hook": "mlp.hook_in", "scan": "mine",
           "feature_output_hook": "hook_mlp_out", "model_name": "tiny"}  # fmt: skip
    if kind == "topk":
        cfg |= {"activation": "topk", "k": 3}
        tensors["b_enc"] = np.abs(tensors["b_enc"]) + tensors["b_enc"].dtype.type(2)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(cfg))
    assert list(sae_jax.load_all(tmp_path)) == ["layer_0.safetensors", "layer_1.safetensors"]
    path = tmp_path / "layer_1.safetensors"
    loaded, x = sae_jax.load(path), rows(dtype)
    assert loaded.about.format == "circuit_tracer"
    assert loaded.about.metadata["hook_name_out"] == "hook_mlp_out"
    assert_same(loaded, *there(Transcoder(path, torch), x, torch), x, dtype)
    loaded.save(tmp_path / "again", "circuit_tracer", lossy=kind == "topk")
    again = tmp_path / "again/layer_1.safetensors"
    for name, leaf in load_file(path).items():
        expected = np.full(D_SAE, leaf) if kind == "one threshold" and leaf.shape == (1,) else leaf
        np.testing.assert_array_equal(load_file(again)[name], expected, name)
    told = yaml.safe_load((tmp_path / "again/config.yaml").read_text())
    assert told["scan"] == "mine"
    assert_same(loaded, *there(Transcoder(again, torch), x, torch), x, dtype)


@pytest.mark.parametrize("name", ["relu", "batch_topk", "jumprelu", "gated"])
def test_what_is_written_here_is_the_same_to_circuit_tracer(name, tmp_path, torch, x64):
    """Thresholds below 0 among them, which it would take for features below 0."""
    factory = getattr(sae_jax, name)
    sae = factory(D_IN, D_SAE, **({"k": 3} if name == "batch_topk" else {}))
    params = weights(sae, np.float64)
    if name == "jumprelu":
        params["threshold"] = params["threshold"] - 0.4
    trained = TrainedSAE(sae, {leaf: jnp.asarray(values) for leaf, values in params.items()})
    trained.save(tmp_path, "circuit_tracer")
    x = rows("float64")
    assert_same(trained, *there(Transcoder(tmp_path / "layer_0.safetensors", torch), x, torch), x, "float64")


@pytest.mark.parametrize("name", ["relu", "batch_topk", "jumprelu", "gated"])
@pytest.mark.parametrize("form", ["gemma_scope_2", "llama_scope"])
def test_what_is_written_here_is_the_same_to_saelens(name, form, tmp_path, saelens_loader, torch):
    factory = getattr(sae_jax, name)
    sae = factory(D_IN, 2 * D_IN, **({"k": 3} if name == "batch_topk" else {}))
    params = weights(sae)
    trained = TrainedSAE(sae, {leaf: jnp.asarray(values) for leaf, values in params.items()})
    folder = "resid_post/layer_3_width_1k"
    trained.save(tmp_path / folder, form)
    kinds = {"gemma_scope_2": "gemma_3_sae", "llama_scope": "llama_scope_r1_distill_sae"}
    one_threshold = name in ("relu", "batch_topk")
    loader = "llama_scope_sae" if form == "llama_scope" and one_threshold else kinds[form]
    model = saelens_loader(f"{loader}_huggingface_loader", tmp_path, folder, "float32", model_name="tiny")
    x = rows("float32")
    assert_same(trained, *there(model, x, torch), x, "float32")


def test_mwhannas_transcoders_are_read_as_saelens_reads_them(rng, tmp_path, saelens_loader, torch):
    tensors = drawn(rng, "float32", W_enc=(D_SAE, D_IN), W_dec=(D_SAE, D_IN), b_enc=(D_SAE,), b_dec=(D_IN,))
    save_file(tensors, tmp_path / "layer_2.safetensors")
    wandb = {"d_model": {"value": D_IN}, "d_feature": {"value": D_SAE}, "batch_size": {"value": 64}}
    (tmp_path / "wandb-config.yaml").write_text(yaml.safe_dump(wandb))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model_name": "Qwen/Qwen3-0.6B"}))
    model = saelens_loader(
        "mwhanna_transcoder_huggingface_loader", tmp_path, "layer_2.safetensors", "float32"
    )
    x = rows("float32")
    assert_same(sae_jax.load(tmp_path / "layer_2.safetensors"), *there(model, x, torch), x, "float32")


# openai


@pytest.fixture
def openais(torch):
    """openai's autoencoder, from its definition, with its strict loader."""

    class Autoencoder(torch.nn.Module):
        def __init__(self, state):
            super().__init__()
            state = dict(state)
            self.kind, self.how = state.pop("activation"), state.pop("activation_state_dict")
            d_sae, d_in = state["encoder.weight"].shape
            self.pre_bias = torch.nn.Parameter(torch.zeros(d_in))
            self.latent_bias = torch.nn.Parameter(torch.zeros(d_sae))
            self.encoder = torch.nn.Linear(d_in, d_sae, bias=False)
            self.decoder = torch.nn.Linear(d_sae, d_in, bias=False)
            self.register_buffer("stats_last_nonzero", torch.zeros(d_sae, dtype=torch.long))
            self.register_buffer("latents_activation_frequency", torch.ones(d_sae))
            self.register_buffer("latents_mean_square", torch.zeros(d_sae))
            self.to(state["pre_bias"].dtype)
            self.load_state_dict(state, strict=True)

        def normalised(self, x):
            if self.kind != "TopK":
                return x, 0.0, 1.0
            centred = x - x.mean(-1, keepdim=True)
            std = centred.std(-1, keepdim=True)
            return centred / (std + 1e-5), x.mean(-1, keepdim=True), std

        def encode(self, x):
            pre = self.encoder(self.normalised(x)[0] - self.pre_bias) + self.latent_bias
            if self.kind == "ReLU":
                return pre.relu()
            top = torch.topk(pre, self.how["k"], dim=-1)
            return torch.zeros_like(pre).scatter_(-1, top.indices, top.values.relu())

        def forward(self, x):
            _, mean, std = self.normalised(x)
            return (self.decoder(self.encode(x)) + self.pre_bias) * std + mean

    return Autoencoder


def openai_state(rng, dtype, torch, kind):
    shapes = {"pre_bias": (D_IN,), "latent_bias": (D_SAE,), "encoder.weight": (D_SAE, D_IN),
              "decoder.weight": (D_IN, D_SAE)}  # fmt: skip
    return {
        **{name: torch.tensor(leaf) for name, leaf in drawn(rng, dtype, **shapes).items()},
        "stats_last_nonzero": torch.ones(D_SAE, dtype=torch.long),
        "latents_activation_frequency": torch.ones(D_SAE),
        "latents_mean_square": torch.ones(D_SAE),
        "activation": kind,
        "activation_state_dict": {"k": 4, "postact_fn": "ReLU"} if kind == "TopK" else {},
    }


@PRECISIONS
@pytest.mark.parametrize("kind", ["ReLU", "TopK"])
def test_openai(dtype, kind, rng, tmp_path, torch, openais, x64):
    state, x = openai_state(rng, dtype, torch, kind), rows(dtype)
    torch.save(state, tmp_path / "a.pt")
    loaded = sae_jax.load(tmp_path / "a.pt")
    assert loaded.about.format == "openai"
    assert_same(loaded, *there(openais(state), x, torch), x, dtype)
    loaded.save(tmp_path / "b.pt", "openai")
    again = torch.load(tmp_path / "b.pt", weights_only=True)
    assert again.keys() == state.keys()
    for name in ("pre_bias", "latent_bias", "encoder.weight", "decoder.weight"):
        assert torch.equal(again[name], state[name])
    assert_same(loaded, *there(openais(again), x, torch), x, dtype)


def test_openais_tied_decoder(rng, tmp_path, torch):
    state = openai_state(rng, "float32", torch, "ReLU")
    state["decoder.linear.weight"] = state["encoder.weight"]
    del state["decoder.weight"]
    torch.save(state, tmp_path / "a.pt")
    params = sae_jax.load(tmp_path / "a.pt").params
    np.testing.assert_array_equal(params["W_dec"], params["W_enc"].T)


# ckkissane's crosscoder


@PRECISIONS
@pytest.mark.parametrize("names", [("cc_weights.pt", "cfg.json"), ("3.pt", "3_cfg.json")], ids=str)
def test_crosscoder(dtype, names, rng, tmp_path, torch, x64):
    shapes = {"W_enc": (2, D_IN, D_SAE), "W_dec": (D_SAE, 2, D_IN), "b_enc": (D_SAE,), "b_dec": (2, D_IN)}
    state = {name: torch.tensor(leaf) for name, leaf in drawn(rng, dtype, **shapes).items()}
    torch.save(state, tmp_path / names[0])
    cfg = {
        "d_in": D_IN,
        "dict_size": D_SAE,
        "model_name": "gemma-2-2b",
        "hook_point": "blocks.14.hook_resid_pre",
    }
    (tmp_path / names[1]).write_text(json.dumps(cfg))
    loaded, x = sae_jax.load(tmp_path), rows(dtype, 64, 2, D_IN)
    assert loaded.about.format == "crosscoder"
    assert loaded.about.metadata["hook_name"] == "blocks.14.hook_resid_pre"
    there = torch.tensor(x)
    f = (torch.einsum("bsd,sdf->bf", there, state["W_enc"]) + state["b_enc"]).relu()
    x_hat = torch.einsum("bf,fsd->bsd", f, state["W_dec"]) + state["b_dec"]
    assert_same(loaded, f.numpy(), x_hat.numpy(), x, dtype)
    loaded.save(tmp_path / "again", "crosscoder")
    again = torch.load(tmp_path / "again/cc_weights.pt", weights_only=True)
    assert all(torch.equal(again[name], leaf) for name, leaf in state.items())
    told = json.loads((tmp_path / "again/cfg.json").read_text())
    assert (told["n_models"], told["hook_point"]) == (2, "blocks.14.hook_resid_pre")


# What is refused


def refused(path, *words):
    with pytest.raises(InputError) as caught:
        sae_jax.load(path)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"W_enc": (D_IN, D_SAE + 1)}, "must be [d_in, d_sae] and [d_sae, d_out]"),
        ({"W_dec": (D_SAE + 1, D_IN)}, "must be [d_in, d_sae] and [d_sae, d_out]"),
        ({"b_enc": (D_SAE + 1,)}, "b_enc must be (11,), got (12,)"),
        ({"threshold": None}, "has no tensor threshold"),
        ({"W_enc": (D_SAE,)}, "must be [d_in, d_sae]"),
        ({"W_enc": (0, D_SAE)}, "must be [d_in, d_sae]"),
        ({"surprise": (2,)}, "has arrays that a Gemma Scope SAE has not: surprise"),
    ],
    ids=str,
)
def test_gemma_scope_of_wrong_shapes(change, words, rng, tmp_path):
    tensors = jumprelu_tensors(rng, "float32")
    for name, shape in change.items():
        tensors.pop(name, None)
        if shape is not None:
            tensors[name] = np.ones(shape, np.float32)
    np.savez(tmp_path / "params.npz", **tensors)
    refused(tmp_path, words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"activation": "Identity"}, "activation 'Identity' is not read here"),
        ({"activation": 3}, "activation '3' is not read here"),
        ({"activation_state_dict": {"k": 2.5}}, "k as a whole number"),
        ({"activation_state_dict": {"k": 99}}, "at most d_sae = 11"),
        ({"activation_state_dict": {"k": 2, "postact_fn": "Identity"}}, "postact_fn 'Identity'"),
        ({"activation_state_dict": None}, "must tell k and postact_fn"),
    ],
    ids=str,
)
def test_openai_of_what_is_not_known(change, words, rng, tmp_path, torch):
    torch.save({**openai_state(rng, "float32", torch, "TopK"), **change}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"jump_relu_threshold": "0.5"}, "jump_relu_threshold as a number"),
        ({"norm_activation": "token-wise"}, "norm_activation 'token-wise' is not read here"),
        ({"act_fn": "topk"}, "act_fn 'topk' is not read here"),
        ({"act_fn": 3}, "act_fn '3' is not read here"),
        ({"apply_decoder_bias_to_pre_encoder": True}, "only as false"),
        ({"hook_point_in": "a", "hook_point_out": "b"}, "a transcoder from a to b is not read here"),
        ({"dataset_average_activation_norm": {"in": 0}}, "number above 0"),
        ({"dataset_average_activation_norm": None}, "number above 0"),
    ],
    ids=str,
)
def test_llama_scope_whose_config_lies(change, words, rng, tmp_path):
    sae = sae_jax.batch_topk(D_IN, D_SAE, k=2)
    params = {**sae.init(jax.random.key(0)), "threshold": jnp.float32(0.3)}
    formats.write(tmp_path, sae, params, "llama_scope")
    path = tmp_path / "hyperparams.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    refused(tmp_path, words)


def thresholds(value):
    return {"activation_function.threshold": np.full(D_SAE, value, np.float32)}


@pytest.mark.parametrize(
    ("config", "more", "words"),
    [
        ({"activation": "gelu"}, {}, "activation 'gelu' is not read here"),
        ({"activation": "topk"}, {}, "a TopK needs k as a whole number"),
        ({"activation": "topk", "k": 2.5}, {}, "a TopK needs k as a whole number"),
        ({"activation": "topk", "k": 99}, {}, "at most d_sae = 11"),
        (
            {},
            {"activation_function.threshold": np.full(D_SAE, -0.1, np.float32)},
            "11 thresholds are below 0",
        ),
        (
            {"activation": "relu"},
            {"activation_function.threshold": np.ones(D_SAE, np.float32)},
            "has thresholds",
        ),
        ({}, {"surprise": np.ones(2, np.float32)}, "not known here: surprise"),
    ],
    ids=str,
)
def test_circuit_tracer_of_what_is_not_known(config, more, words, rng, tmp_path):
    tensors = drawn(rng, "float32", W_enc=(D_SAE, D_IN), W_dec=(D_SAE, D_IN), b_enc=(D_SAE,), b_dec=(D_IN,))
    save_file({**tensors, **more}, tmp_path / "layer_0.safetensors")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model_kind": "transcoder_set", **config}))
    refused(tmp_path / "layer_0.safetensors", words)


def test_openai_without_a_decoder_is_damaged(rng, tmp_path, torch):
    state = openai_state(rng, "float32", torch, "ReLU")
    del state["decoder.weight"]
    torch.save(state, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "has no tensor decoder.weight")


def test_what_a_format_has_no_form_for_is_refused_or_named(rng, tmp_path):
    topk = sae_jax.topk(D_IN, D_SAE, k=3)
    params = topk.init(jax.random.key(0))
    with pytest.raises(InputError, match="a topk is no JumpReLU"):
        formats.write(tmp_path / "a", topk, params, "gemma_scope")
    with pytest.raises(InputError, match="would lose that no layer norm stands before it"):
        formats.write(tmp_path / "a", topk, params, "openai")
    assert formats.write(tmp_path / "a", layer_normed(topk), params, "openai") == [
        "how it was trained, and on what"
    ]
    skip = sae_jax.transcoder(D_IN, D_SAE, d_out=D_IN, skip=True)
    with pytest.raises(InputError, match="would lose its skip connection"):
        formats.write(tmp_path / "b", skip, skip.init(jax.random.key(0)), "gemma_scope")
    assert not (tmp_path / "b").exists()
