"""An SAE outside of this package: same numbers in Flax, PyTorch and SAELens, and served without us."""

import json
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import sae_jax
from sae_jax import InputError, TrainedSAE
from sae_jax.adapters import SAEModule, export_functions, export_saelens, to_torch
from sae_jax.architectures import find
from sae_jax.layer_norm import layer_normed

relu, topk, batch_topk, jumprelu, gated, matryoshka, crosscoder, transcoder = (
    partial(find(name), 5, 7)
    for name in ("relu", "topk", "batch_topk", "jumprelu", "gated", "matryoshka", "crosscoder", "transcoder")
)
onto = partial(transcoder, d_out=4)

ARCHITECTURES = {
    "relu": relu,
    "relu-tied": partial(relu, tied=True, apply_b_dec_to_input=True),
    "topk": partial(topk, k=3),
    "topk-rescaled": partial(topk, k=2.0, rescale_acts_by_decoder_norm=True, apply_b_dec_to_input=False),
    "batch-topk": partial(batch_topk, k=2.5),
    "jumprelu": jumprelu,
    "jumprelu-log": partial(jumprelu, log_threshold=True, apply_b_dec_to_input=True),
    "gated": gated,
    "gated-no-b-dec": partial(gated, apply_b_dec_to_input=False, target_l0=3),
    "matryoshka": partial(matryoshka, prefixes=(2, 7), k=3),
    "transcoder": onto,
    "transcoder-topk-skip": partial(onto, of=find("topk"), k=3, skip=True),
    "transcoder-jumprelu-skip": partial(onto, of=find("jumprelu"), skip=True),
    "crosscoder": partial(crosscoder, sources=3),
    "relu-layer-normed": lambda: layer_normed(relu(apply_b_dec_to_input=True)),
    "topk-layer-normed": lambda: layer_normed(topk(k=3)),
    "transcoder-layer-normed": lambda: layer_normed(onto(skip=True)),
    "crosscoder-layer-normed": lambda: layer_normed(crosscoder(sources=2)),
}
NOT_IN_SAELENS = ("transcoder-topk-skip", "crosscoder", "transcoder-layer-normed", "crosscoder-layer-normed")

everything = pytest.mark.parametrize("name", ARCHITECTURES)


def trained_and_rows(name, dtype=np.float32, rows=32):
    """An SAE whose weights are as after training, nothing of them 0; and rows for it."""
    rng = np.random.default_rng(1)
    sae = ARCHITECTURES[name]()
    params = {
        leaf: 0.5 * rng.normal(size=made.shape)
        for leaf, made in jax.eval_shape(lambda: sae.init(jax.random.key(0))).items()
    }
    if "threshold" in params:
        params["threshold"] = rng.uniform(0.1, 0.6, params["threshold"].shape)
    sources = [sae.config["sources"]] if "sources" in sae.config else []
    x = rng.normal(size=(rows, *sources, 5))
    return TrainedSAE(sae, {leaf: jnp.asarray(w.astype(dtype)) for leaf, w in params.items()}), x.astype(
        dtype
    )


def assert_close(actual, expected, rtol=1e-6):
    actual, expected = (np.asarray(array, np.float64) for array in (actual, expected))
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


def some_are_active(f):
    assert 0 < (np.asarray(f) > 0).mean() < 1


# Flax


@everything
def test_a_flax_module_gives_the_same_numbers(name):
    trained, x = trained_and_rows(name)
    module, x = SAEModule(trained), jnp.asarray(x)
    # compiled and not, the same sums are taken in two orders
    assert_close(module.encode(x), trained.encode(x), 1e-5)
    assert_close(nnx.jit(lambda m, x: m(x))(module, x), trained(x), 1e-5)


def test_weights_are_params_of_the_network_around_it():
    trained, _ = trained_and_rows("relu")

    class Network(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.linear = nnx.Linear(3, 5, rngs=rngs)
            self.sae = SAEModule(trained)

        def __call__(self, x):
            return self.sae(self.linear(x))

    network = Network(nnx.Rngs(0))
    state = nnx.state(network, nnx.Param)
    assert set(state["sae"]) == set(trained.params)
    gradients = nnx.grad(lambda network, x: jnp.square(network(x)).sum())(network, jnp.ones((8, 3)))
    assert float(jnp.abs(gradients["sae"]["W_dec"][...]).max()) > 0
    assert float(jnp.abs(gradients["linear"]["kernel"][...]).max()) > 0


# PyTorch


def assert_same_in_torch(trained, x, torch, rtol):
    module, rows = to_torch(trained), as_tensor(x, torch)
    with torch.no_grad():
        f, x_hat, without_x = module.encode(rows), module(rows), module.decode(module.encode(rows))
    ours = trained.encode(x)
    some_are_active(ours)
    assert (f.dtype, x_hat.dtype) == (rows.dtype, rows.dtype)
    assert_close(f.double().numpy(), ours, rtol)
    assert_close(x_hat.double().numpy(), trained(x), rtol)
    assert_close(without_x.double().numpy(), trained.decode(ours), rtol)
    return module


def as_tensor(x, torch):
    if x.dtype == ml_dtypes.bfloat16:
        return torch.tensor(x.astype(np.float32)).bfloat16()
    return torch.tensor(x)


@everything
def test_a_torch_module_gives_the_same_numbers(name, torch):
    trained, x = trained_and_rows(name)
    module = assert_same_in_torch(trained, x, torch, 1e-6)
    assert {"W_enc", "W_dec", "b_dec"} <= dict(module.named_parameters()).keys()
    assert "log_threshold" not in dict(module.named_parameters())


@everything
def test_in_double_precision_to_12_digits(name, torch, x64):
    module = assert_same_in_torch(*trained_and_rows(name, np.float64), torch, 1e-12)
    assert all(parameter.dtype == torch.float64 for parameter in module.parameters())


@everything
def test_in_bfloat16_to_its_precision(name, torch):
    trained, x = trained_and_rows(name, ml_dtypes.bfloat16)
    module = to_torch(trained)
    assert module.W_enc.dtype == module.W_dec.dtype == torch.bfloat16
    with torch.no_grad():
        x_hat = module(as_tensor(x, torch))
    assert x_hat.dtype == torch.bfloat16
    # a latent at its threshold may fall on either side of it
    error = np.abs(np.asarray(trained(x), np.float64) - x_hat.double().numpy())
    assert np.median(error) < 0.02
    assert np.mean(error > 0.05) < 0.05


def test_rows_of_another_precision_than_the_weights(torch):
    trained, _ = trained_and_rows("jumprelu", ml_dtypes.bfloat16)
    _, x = trained_and_rows("jumprelu")
    assert_same_in_torch(trained, x, torch, 1e-6)


def test_of_equal_latents_the_earlier_is_kept(torch):
    trained, x = trained_and_rows("topk")
    params = {**trained.params, "W_enc": jnp.tile(trained.params["W_enc"][:, :1], 7), "b_enc": jnp.zeros(7)}
    assert_same_in_torch(TrainedSAE(trained.sae, params), x, torch, 1e-6)


@pytest.mark.parametrize("name", ["topk", "jumprelu", "transcoder-topk-skip", "relu-layer-normed"])
def test_it_is_a_module_like_any_other(name, torch, tmp_path):
    trained, x = trained_and_rows(name)
    module, rows = to_torch(trained), torch.tensor(x)
    module(rows).square().sum().backward()
    gradient = jax.grad(lambda p: jnp.square(trained.sae.decode(p, trained.sae.encode(p, x), x)).sum())
    for leaf, expected in gradient(trained.params).items():
        if leaf != "threshold":  # its gradient is estimated, and only in the loss
            assert_close(getattr(module, leaf).grad.numpy(), expected, 1e-5)
    torch.save(module.state_dict(), tmp_path / "sae.pt")
    other = to_torch(TrainedSAE(trained.sae, jax.tree.map(jnp.zeros_like, trained.params)))
    other.load_state_dict(torch.load(tmp_path / "sae.pt", weights_only=True))
    torch.testing.assert_close(other(rows), module(rows))
    exported = torch.export.export(module, (rows,), dynamic_shapes=({0: torch.export.Dim("n")},))
    torch.testing.assert_close(exported.module()(rows[:7]), module(rows[:7]))


# SAELens


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in NOT_IN_SAELENS])
def test_an_object_of_saelens_gives_the_same_numbers(name, dtype, sae_lens, torch):
    with jax.enable_x64(dtype == np.float64):
        trained, x = trained_and_rows(name, dtype)
        theirs = export_saelens(trained)
        assert isinstance(theirs, sae_lens.SAE)
        with torch.no_grad():
            f, x_hat = theirs.encode(torch.tensor(x)), theirs(torch.tensor(x))
        assert str(f.numpy().dtype) == np.dtype(dtype).name
        some_are_active(f)
        rtol = 1e-12 if dtype == np.float64 else 1e-6
        assert_close(f.numpy(), trained.encode(x), rtol)
        assert_close(x_hat.numpy(), trained(x), rtol)


@pytest.mark.parametrize("name", NOT_IN_SAELENS)
def test_what_saelens_has_no_form_for_is_refused(name, sae_lens):
    with pytest.raises(InputError, match=r"SAELens has no form for this (transcoder|crosscoder)"):
        export_saelens(trained_and_rows(name)[0])


def test_metadata_goes_along(sae_lens):
    trained, _ = trained_and_rows("relu")
    about = trained.about._replace(metadata={"hook_name": "blocks.0.hook_resid_post", "model_name": "tiny"})
    theirs = export_saelens(TrainedSAE(*trained, about))
    assert theirs.cfg.metadata.hook_name == "blocks.0.hook_resid_post"


# Serving

SERVER = """
import json, sys
from pathlib import Path
import jax, numpy as np
from safetensors.numpy import load_file
jax.config.update("jax_enable_x64", sys.argv[2] == "float64")
for folder in sorted(Path(sys.argv[1]).iterdir()):
    weights, rows = load_file(folder / "weights.safetensors"), np.load(folder / "rows.npy")
    encode, decode = (
        jax.export.deserialize((folder / name).read_bytes()) for name in ("encode.jax", "decode.jax")
    )
    takes_x = len(decode.in_tree.children()[0].children()) == 3
    for n in (1, len(rows)):
        f = encode.call(weights, rows[:n])
        x_hat = decode.call(weights, f, rows[:n]) if takes_x else decode.call(weights, f)
        np.savez(folder / f"served{n}.npz", f=f, x_hat=x_hat)
assert "sae_jax" not in sys.modules and "torch" not in sys.modules
print(json.dumps(sorted(encode.platforms)))
"""


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_process_without_this_package_serves_the_same_numbers(dtype, tmp_path):
    with jax.enable_x64(dtype == "float64"):
        for name in ARCHITECTURES:
            trained, x = trained_and_rows(name, dtype)
            written = export_functions(trained, tmp_path / name)
            names = [path.name for path in written]
            assert names == ["encode.jax", "decode.jax", "weights.safetensors"]
            np.save(tmp_path / name / "rows.npy", x)
        done = subprocess.run(
            [sys.executable, "-c", SERVER, tmp_path, dtype], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert json.loads(done.stdout) == ["cpu", "cuda", "tpu"]
        rtol = 1e-12 if dtype == "float64" else 1e-6
        for name in ARCHITECTURES:
            trained, x = trained_and_rows(name, dtype)
            for n in (1, len(x)):
                served = np.load(tmp_path / name / f"served{n}.npz")
                assert_close(served["f"], trained.encode(x[:n]), rtol)
                assert_close(served["x_hat"], trained(x[:n]), rtol)


def test_programs_hold_no_weights(tmp_path):
    """So that they may be of any size, and be replaced."""
    sizes = []
    for d_sae in (8, 800):
        sae = sae_jax.relu(16, d_sae)
        export_functions(TrainedSAE(sae, sae.init(jax.random.key(0))), tmp_path)
        sizes.append((tmp_path / "encode.jax").stat().st_size)
    assert abs(sizes[1] - sizes[0]) < 200
    assert load_file(tmp_path / "weights.safetensors")["W_enc"].shape == (16, 800)


def test_bfloat16_is_served_as_it_is(tmp_path):
    trained, x = trained_and_rows("jumprelu", ml_dtypes.bfloat16)
    export_functions(trained, tmp_path)
    weights = load_file(tmp_path / "weights.safetensors")
    assert weights["W_enc"].dtype == ml_dtypes.bfloat16
    encode = jax.export.deserialize((tmp_path / "encode.jax").read_bytes())
    assert_close(encode.call(weights, x), trained.encode(x), 0.01)


def test_double_precision_that_jax_would_halve_is_refused(tmp_path):
    sae = sae_jax.relu(5, 7)
    params = {name: np.asarray(leaf, np.float64) for name, leaf in sae.init(jax.random.key(0)).items()}
    with pytest.raises(InputError, match="unless jax_enable_x64 is set"):
        export_functions(TrainedSAE(sae, params), tmp_path)
