"""SAELens's files: every architecture of its registry, trainers' checkpoints, sparsities; there and back."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import sae_jax
from sae_jax import InputError, TrainedSAE, losses
from sae_jax.formats import saelens

D_IN, D_SAE, D_OUT = 5, 7, 4

FINISHED = {
    "standard": {},
    "topk": {"k": 3},
    "jumprelu": {},
    "gated": {},
    "transcoder": {"d_out": D_OUT, "apply_b_dec_to_input": False},
    "skip_transcoder": {"d_out": D_OUT, "apply_b_dec_to_input": False},
    "jumprelu_transcoder": {"d_out": D_OUT, "apply_b_dec_to_input": False},
    "jumprelu_skip_transcoder": {"d_out": D_OUT, "apply_b_dec_to_input": False},
}
"""Architectures of SAELens's registry that are read, each with what its config needs."""
TRAINED = {
    "standard": {"l1_coefficient": 2.5, "l1_warm_up_steps": 20},
    "topk": {"k": 3, "aux_loss_coefficient": 0.5},
    "batchtopk": {"k": 1.5, "topk_threshold_lr": 0.25},
    "matryoshka_batchtopk": {"k": 2, "matryoshka_widths": [3, 5]},
    "jumprelu": {"l0_coefficient": 0.5, "jumprelu_bandwidth": 0.1},
    "gated": {"l1_coefficient": 0.3},
}
"""The same of those that its trainer knows."""
REFUSED = ("abstopk", "matching_pursuit", "temporal")

NORMALISATIONS = ("none", "expected_average_only_in", "covariance_whitening")


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield request.param


def rows_of(dtype, scale=1.0):
    return (scale * np.random.default_rng(5).normal(size=(48, D_IN))).astype(dtype)


def assert_close(actual, expected, dtype):
    actual, expected = (np.asarray(array) for array in (actual, expected))
    rtol = 1e-12 if dtype == "float64" else 1e-6
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


def made(registry, name, torch, dtype, **arguments):
    """One of SAELens's SAEs with weights of which nothing is 0."""
    of, config = registry[name]
    theirs = of(config(d_in=D_IN, d_sae=D_SAE, dtype=dtype, **arguments))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, dtype=torch.float64))
        if hasattr(theirs, "threshold"):
            theirs.threshold.abs_()
        if hasattr(theirs, "topk_threshold"):
            theirs.topk_threshold.fill_(0.3)
    return theirs


def numbers_of(theirs, x, torch):
    with torch.no_grad():
        f = theirs.encode(torch.tensor(x))
        return f.numpy(), theirs.decode(f).numpy() if not hasattr(theirs, "W_skip") else theirs(
            torch.tensor(x)
        ).numpy()


def assert_same(trained, f, x_hat, x, dtype):
    assert 0 < (f > 0).mean() < 1
    assert trained.params["W_enc"].dtype == dtype
    assert_close(trained.encode(x), f, dtype)
    assert_close(trained(x), x_hat, dtype)


def test_the_registry_is_known(sae_lens):
    """What a newer SAELens adds shows here."""
    from sae_lens import registry

    assert set(registry.SAE_CLASS_REGISTRY) == {*FINISHED, *REFUSED}
    trains = set(registry.SAE_TRAINING_CLASS_REGISTRY)
    assert trains == {*TRAINED, *(name for name in REFUSED if name != "temporal")}
    assert set(saelens.ITS_OWN) == {*FINISHED, *TRAINED}


@pytest.mark.parametrize("name", FINISHED)
def test_every_finished_architecture_there_and_back(name, dtype, tmp_path, sae_lens, torch):
    from sae_lens.registry import SAE_CLASS_REGISTRY

    theirs, x = made(SAE_CLASS_REGISTRY, name, torch, dtype, **FINISHED[name]), rows_of(dtype)
    theirs.save_model(tmp_path / "theirs")
    f, x_hat = numbers_of(theirs, x, torch)
    ours = sae_jax.load(tmp_path / "theirs")
    assert ours.about.format == "saelens"
    assert_same(ours, f, x_hat, x, dtype)
    ours.save(tmp_path / "ours")
    again = sae_lens.SAE.load_from_disk(tmp_path / "ours")
    assert (again.cfg.architecture(), again.cfg.dtype) == (name, dtype)
    for which, found in zip(("f", "x_hat"), numbers_of(again, x, torch), strict=True):
        assert_close(found, {"f": f, "x_hat": x_hat}[which], dtype)
    before, after = (load_file(tmp_path / at / saelens.WEIGHTS) for at in ("theirs", "ours"))
    assert before.keys() == after.keys()
    for leaf, values in before.items():
        np.testing.assert_array_equal(after[leaf], values, leaf)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_ours_is_refused_by_name(name, tmp_path, sae_lens, torch):
    from sae_lens.registry import SAE_CLASS_REGISTRY

    if name == "temporal":
        (tmp_path / "cfg.json").write_text(json.dumps({"architecture": name, "d_in": D_IN, "d_sae": D_SAE}))
        save_file({"W": np.ones(2)}, tmp_path / saelens.WEIGHTS)
    else:
        arguments = {"k": 2} if name == "abstopk" else {}
        made(SAE_CLASS_REGISTRY, name, torch, "float32", **arguments).save_model(tmp_path)
    with pytest.raises(InputError, match=f"SAELens architecture '{name}' is not read here, only standard"):
        sae_jax.load(tmp_path)


# Checkpoints of the trainer


def trained_by_saelens(name, folder, torch, dtype="float32", normalised="none", **arguments) -> list[Path]:
    """Checkpoints of SAELens's trainer on rows of norm about 20: from amid its run, and its last one.

    Amid the run the SAE is of normalised rows; at its end the trainer folds that into the weights.
    """
    from sae_lens import LoggingConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
    from sae_lens.training.sae_trainer import SAETrainer

    theirs = made(
        SAE_TRAINING_CLASS_REGISTRY, name, torch, dtype, normalize_activations=normalised,
        **{**TRAINED[name], **arguments},
    )  # fmt: skip
    draw = torch.Generator().manual_seed(1)
    mixing = torch.randn(D_IN, D_IN, generator=draw, dtype=torch.float64)

    def batches():
        while True:
            rows = torch.randn(32, D_IN, generator=draw, dtype=torch.float64)
            yield (8 * rows @ mixing + 3).to(theirs.dtype)

    config = SAETrainerConfig(
        n_checkpoints=1, checkpoint_path=str(folder), save_final_checkpoint=True,
        total_training_samples=32 * 4, device="cpu", autocast=False, lr=1e-3, lr_end=1e-3,
        lr_scheduler_name="constant", lr_warm_up_steps=0, adam_beta1=0.9, adam_beta2=0.999, lr_decay_steps=0,
        n_restart_cycles=1, train_batch_size_samples=32, dead_feature_window=1000, feature_sampling_window=5,
        n_batches_for_norm_estimate=8,
        logger=LoggingConfig(log_to_wandb=False, eval_every_n_wandb_logs=2**31 - 1),
    )  # fmt: skip
    SAETrainer(cfg=config, sae=theirs, data_provider=batches()).fit()
    checkpoints = [folder / "96", folder / "final_128"]
    for checkpoint in checkpoints:
        assert {"cfg.json", "sae_weights.safetensors", "sparsity.safetensors", "trainer_state.pt",
                "activation_scaler.json"} <= {path.name for path in checkpoint.iterdir()}  # fmt: skip
    return checkpoints


def numbers_of_checkpoint(checkpoint, x, scratch, torch):
    """What SAELens makes of raw rows: its scaler, the SAE as it would be saved when done, its scaler back."""
    from sae_lens import SAE, TrainingSAE
    from sae_lens.training.activation_scaler import ActivationScaler

    training = TrainingSAE.load_from_disk(checkpoint)
    training.save_inference_model(scratch)
    theirs, scaler = SAE.load_from_disk(scratch), ActivationScaler()
    scaler.load(checkpoint / "activation_scaler.json")
    with torch.no_grad():
        f = theirs.encode(scaler.scale(torch.tensor(x)))
        return f.numpy(), scaler.unscale(theirs.decode(f)).numpy()


@pytest.mark.parametrize("normalised", NORMALISATIONS)
@pytest.mark.parametrize("name", TRAINED)
def test_a_trainers_checkpoints(name, normalised, dtype, tmp_path, sae_lens, torch):
    x = rows_of(dtype, scale=15)
    for checkpoint in trained_by_saelens(name, tmp_path, torch, dtype, normalised):
        f, x_hat = numbers_of_checkpoint(checkpoint, x, tmp_path / "scratch", torch)
        ours = sae_jax.load(checkpoint)
        assert 0 < (f > 0).mean() < 1
        assert ours.params["W_enc"].dtype == dtype
        if dtype == "float32" and normalised != "none":
            # folding rounds the weights themselves
            np.testing.assert_allclose(ours.encode(x), f, rtol=1e-5, atol=1e-5 * f.max())
            np.testing.assert_allclose(ours(x), x_hat, rtol=1e-5, atol=1e-5 * np.abs(x_hat).max())
        else:
            assert_close(ours.encode(x), f, dtype)
            assert_close(ours(x), x_hat, dtype)
        sparsity = load_file(checkpoint / "sparsity.safetensors")["sparsity"]
        np.testing.assert_array_equal(ours.about.log_sparsity, sparsity)
        # and written again it is an SAE that SAELens opens, of raw rows
        written = tmp_path / f"ours of {checkpoint.name}"
        ours.save(written)
        again = sae_lens.SAE.load_from_disk(written)
        for found, expected in zip(numbers_of(again, x, torch), (ours.encode(x), ours(x)), strict=True):
            assert_close(found, expected, dtype)
        np.testing.assert_array_equal(load_file(written / saelens.SPARSITY)["sparsity"], sparsity)
        assert again.cfg.metadata.training_architecture == name


def test_a_trainers_config_tells_the_loss(tmp_path, sae_lens, torch):
    told = {
        "standard": {"l1": 2.5, "l1_warmup": 20, "p": 1.0, "decoder_norm_l1": True, "mean_features": False},
        "topk": {"k": 3, "auxk": 0.5, "rescale_acts_by_decoder_norm": True},
        "batchtopk": {"k": 1.5, "threshold_decay": 0.75, "rescale_acts_by_decoder_norm": True},
        "matryoshka_batchtopk": {"k": 2, "prefixes": (3, 5, 7), "of": sae_jax.batch_topk},
        "jumprelu": {"l0_coefficient": 0.5, "bandwidth": 0.1, "penalty": losses.step_l0},
        "gated": {"l1": 0.3, "detach_auxiliary": False},
    }
    for name, expected in told.items():
        config = sae_jax.load(trained_by_saelens(name, tmp_path / name, torch)[0]).sae.config
        assert {key: config[key] for key in expected} == expected
    quadratic = {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 2.0}
    checkpoint, _ = trained_by_saelens("jumprelu", tmp_path / "quadratic", torch, **quadratic)
    config = sae_jax.load(checkpoint).sae.config
    assert (config["penalty"], config["target_l0"]) == (losses.quadratic_l0, 2.0)


def test_what_was_trained_there_trains_on_here(tmp_path, sae_lens, torch):
    sae, params = sae_jax.load(trained_by_saelens("standard", tmp_path, torch)[0])
    loss, _ = sae.loss(
        params,
        sae_jax.Batch(*2 * [jnp.asarray(rows_of("float32"))]),
        sae_jax.Progress(jnp.asarray(30), jnp.zeros(D_SAE, int)),
    )
    assert np.isfinite(loss)


@pytest.fixture(scope="module")
def scaled(tmp_path_factory, sae_lens, torch):
    """A checkpoint of normalised rows."""
    folder, of = tmp_path_factory.mktemp("scaled"), "expected_average_only_in"
    return trained_by_saelens("matryoshka_batchtopk", folder, torch, normalised=of)[0]


def changed(folder, file, **entries):
    document = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**document, **entries}))


@pytest.mark.parametrize(
    ("file", "entries", "message"),
    [
        (
            "activation_scaler.json",
            {"scaling_factor": None},
            "must give scaling_factor as a number, got None",
        ),
        ("activation_scaler.json", {"scaling_factor": "2"}, "must give scaling_factor as a number, got '2'"),
        ("activation_scaler.json", {"scaling_factor": float("nan")}, "scaling_factor as a number, got nan"),
        ("activation_scaler.json", {"scaling_factor": -1.0}, "must give a scaling_factor above 0"),
        ("cfg.json", {"k": "many"}, "must give k as a number, got 'many'"),
        ("cfg.json", {"matryoshka_widths": [1.5, 7]}, "must give matryoshka_widths as whole numbers"),
        ("cfg.json", {"matryoshka_widths": []}, "must give matryoshka_widths as whole numbers"),
        ("cfg.json", {"matryoshka_widths": [5, 3]}, "prefixes must be above 0 and increase"),
        ("cfg.json", {"architecture": "jumprelu", "jumprelu_sparsity_loss_mode": ["step"]}, "of the mode"),
        ("cfg.json", {"aux_loss_coefficient": 10**400}, "must give aux_loss_coefficient as a number"),
        (
            "cfg.json",
            {"normalize_activations": "covariance_whitening"},
            "without the trainer's activation_wh",
        ),
        ("cfg.json", {"normalize_activations": "constant_norm_rescale"}, "'constant_norm_rescale', which is"),
    ],
    ids=str,
)
def test_a_damaged_checkpoint_is_refused(file, entries, message, scaled, tmp_path):
    checkpoint = tmp_path / "damaged"
    shutil.copytree(scaled, checkpoint)
    sae_jax.load(checkpoint)
    changed(checkpoint, file, **entries)
    with pytest.raises(InputError, match=message) as caught:
        sae_jax.load(checkpoint)
    assert "\n" not in str(caught.value)


def test_a_damaged_whitening_or_sparsity_is_refused(tmp_path, sae_lens, torch):
    checkpoint, _ = trained_by_saelens("standard", tmp_path, torch, normalised="covariance_whitening")
    whitening = load_file(checkpoint / "activation_whitening.safetensors")
    save_file({**whitening, "mean": np.zeros(3)}, checkpoint / "activation_whitening.safetensors")
    with pytest.raises(InputError, match=r"must hold mean \[5\], floating point"):
        sae_jax.load(checkpoint)
    save_file(whitening, checkpoint / "activation_whitening.safetensors")
    for wrong in ({"sparsity": np.zeros(3)}, {"other": np.zeros(7)}, {"sparsity": np.zeros(7, np.int32)}):
        save_file(wrong, checkpoint / saelens.SPARSITY)
        with pytest.raises(InputError, match=r"must hold one tensor, sparsity \[7\]"):
            sae_jax.load(checkpoint)


def test_log_thresholds_of_an_old_trainer(tmp_path, sae_lens, torch):
    from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

    theirs, x = made(SAE_TRAINING_CLASS_REGISTRY, "jumprelu", torch, "float32"), rows_of("float32")
    theirs.save_model(tmp_path)
    weights = load_file(tmp_path / saelens.WEIGHTS)
    weights["log_threshold"] = np.log(weights.pop("threshold"))
    save_file(weights, tmp_path / saelens.WEIGHTS)
    again = sae_lens.TrainingSAE.load_from_disk(tmp_path)
    assert_same(sae_jax.load(tmp_path), *numbers_of(again, x, torch), x, "float32")


# What a file tells beside the weights


def test_metadata_and_heads_survive_the_round_trip(tmp_path, sae_lens, torch):
    from sae_lens.registry import SAE_CLASS_REGISTRY

    theirs = made(SAE_CLASS_REGISTRY, "standard", torch, "float32", reshape_activations="hook_z")
    theirs.cfg.metadata.hook_name = "blocks.0.attn.hook_z"
    theirs.cfg.metadata.model_name = "tiny"
    theirs.save_model(tmp_path / "theirs")
    ours = sae_jax.load(tmp_path / "theirs")
    assert ours.about.metadata["hook_name"] == "blocks.0.attn.hook_z"
    ours.save(tmp_path / "ours")
    again = sae_lens.SAE.load_from_disk(tmp_path / "ours")
    assert again.cfg.reshape_activations == "hook_z"
    assert (again.cfg.metadata.hook_name, again.cfg.metadata.model_name) == ("blocks.0.attn.hook_z", "tiny")
    heads = torch.randn(6, 1, D_IN)
    with torch.no_grad():
        torch.testing.assert_close(again(heads), theirs(heads))


def test_a_config_of_before_6_tells_the_site_at_its_top(tmp_path, sae_lens):
    sae = sae_jax.relu(D_IN, D_SAE)
    TrainedSAE(sae, sae.init(jax.random.key(0))).save(tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    del cfg["metadata"]
    old = {"hook_point": "blocks.3.hook_resid_pre", "model_name": "gpt2", "context_size": 128, "lr": 1e-3}
    old |= {"l0_coefficient": 3, "aux_loss_coefficient": "none"}  # of other architectures
    (tmp_path / "cfg.json").write_text(json.dumps({**cfg, **old}))
    theirs = sae_lens.SAE.load_from_disk(tmp_path).cfg.metadata
    told = sae_jax.load(tmp_path).about.metadata
    expected = {"hook_name": "blocks.3.hook_resid_pre", "model_name": "gpt2", "context_size": 128}
    assert told == expected
    assert {key: getattr(theirs, key) for key in expected} == expected
