"""dictionary_learning's own classes and `load_dictionary`, and its files read and written here."""

import ast
import contextlib
import importlib
import importlib.util
import inspect
import io
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sae_jax
from sae_jax import InputError, TrainedSAE, formats
from sae_jax.architectures import find
from sae_jax.formats.dictionary_learning import CLASSES
from sae_jax.normalise import layer_normed
from sae_jax.verify import against_dictionary_learning as against
from sae_jax.verify.harness import relative_error

D_IN, D_SAE, K = 8, 20, 3
BOUNDS = {"float32": 1e-6, "float64": 1e-12}
TRAINERS = {
    "AutoEncoder": ("standard.StandardTrainer", {}),
    "AutoEncoder, April": ("standard.StandardTrainerAprilUpdate", {}),
    "AutoEncoder, PAnneal": ("p_anneal.PAnnealTrainer", {}),
    "AutoEncoderNew": ("standard.StandardTrainer", {}),
    "GatedAutoEncoder": ("gdm.GatedSAETrainer", {}),
    "JumpReluAutoEncoder": ("jumprelu.JumpReluTrainer", {}),
    "AutoEncoderTopK": ("top_k.TopKTrainer", {"k": K}),
    "BatchTopKSAE": ("batch_top_k.BatchTopKTrainer", {"k": K}),
    "BatchTopKSAE, no threshold yet": ("batch_top_k.BatchTopKTrainer", {"k": K}),
    "MatryoshkaBatchTopKSAE": (
        "matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer", {"k": K, "group_fractions": [0.25, 0.25, 0.5]}
    ),
}  # fmt: skip
"""By the class and what is special about it: the trainer that makes it."""

LIKE_ANOTHER = ("AutoEncoderTopK", "BatchTopKSAE")
"""Classes whose tensors go by the same names."""


@pytest.fixture(scope="module")
def library():
    """The classes, trainers and `load_dictionary`; of its dependencies they need torch and einops alone."""
    spec = importlib.util.find_spec("dictionary_learning")
    if spec is None:
        pytest.skip("not installed: pip install --no-deps dictionary-learning einops")
    trainers = {path.split(".")[0] for path, _ in TRAINERS.values()}
    with against._without_its_face("dictionary_learning"):
        modules = {name: importlib.import_module(f"dictionary_learning.trainers.{name}") for name in trainers}
        dictionary = importlib.import_module("dictionary_learning.dictionary")
    held = {name: one for module in (dictionary, *modules.values()) for name, one in vars(module).items()}
    # its file cannot be imported without nnsight; the one function that is wanted needs nothing of it
    path = Path(spec.submodule_search_locations[0]) / "utils.py"
    named = [one for one in ast.parse(path.read_text()).body if getattr(one, "name", "") == "load_dictionary"]
    namespace = {**held, "json": json}
    exec(compile(ast.Module(named, []), path, "exec"), namespace)
    return SimpleNamespace(trainers=modules, load_dictionary=namespace["load_dictionary"], **{
        name: held[name] for name in CLASSES
    })  # fmt: skip


@pytest.fixture
def rows():
    return np.random.default_rng(5).normal(size=(48, D_IN))


def made(library, torch, case, dtype="float32"):
    """A trainer, with a dictionary of which nothing is 0."""
    (module, name), arguments = TRAINERS[case][0].split("."), TRAINERS[case][1]
    trainer = getattr(library.trainers[module], name)
    given = {
        "steps": 9, "activation_dim": D_IN, "dict_size": D_SAE, "device": "cpu",
        "lm_name": "a/model", "layer": 4, "submodule_name": "resid_post_layer_4", **arguments,
    }  # fmt: skip
    # what only some of them take
    optional = {"warmup_steps": 1, "sparsity_warmup_steps": 1, "anneal_start": 1, "n_sparsity_updates": 1}
    taken = inspect.signature(trainer).parameters
    given |= {name: value for name, value in optional.items() if name in taken}
    dict_class = getattr(library, case.split(",")[0])
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = trainer(dict_class=dict_class, **given)
    rng = np.random.default_rng(1)
    with torch.no_grad():
        for leaf in trainer.ae.parameters():
            leaf.copy_(torch.tensor(0.5 * rng.normal(size=leaf.shape)))
        if hasattr(trainer.ae, "threshold"):
            drawn = torch.tensor(rng.uniform(0.1, 0.6, trainer.ae.threshold.shape))
            trainer.ae.threshold.copy_(-1.0 if "yet" in case else drawn)
    trainer.ae.to(getattr(torch, dtype))
    return trainer


def config_of(trainer):
    # the one class that no trainer names
    told = {**trainer.config, "dict_class": type(trainer.ae).__name__}
    return {"trainer": told, "buffer": {"ctx_len": 128, "io": "out"}}


def saved(trainer, folder, torch):
    """As `trainSAE` does."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_of(trainer), indent=4))
    torch.save({name: leaf.cpu() for name, leaf in trainer.ae.state_dict().items()}, folder / "ae.pt")
    return folder


def assert_same(ours, theirs, rows, torch, dtype="float32", units=None):
    """Features and reconstructions; `units`: what their features are multiplied by."""
    x = rows.astype(dtype)
    with torch.no_grad():
        f = theirs.encode(torch.tensor(x))
        x_hat = theirs.decode(f).numpy()
    f = f.numpy() if units is None else f.numpy() / units
    assert 0 < (f > 0).mean() < 1
    assert ours.encode(x).dtype == dtype
    assert relative_error(np.asarray(ours.encode(x)), f) <= BOUNDS[dtype]
    assert relative_error(np.asarray(ours(x)), x_hat) <= BOUNDS[dtype]


def norms_of(ae):
    """What `load_dictionary` multiplies an `AutoEncoder`'s features by: it normalises the decoder."""
    return ae.decoder.weight.detach().norm(dim=0).numpy() if type(ae).__name__ == "AutoEncoder" else None


def refused(call, *words):
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message, message
    for word in words:
        assert word in message, message


# Read


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("case", TRAINERS)
def test_every_class_is_read(case, dtype, library, torch, rows, tmp_path, x64):
    trainer = made(library, torch, case, dtype)
    ours = sae_jax.load(saved(trainer, tmp_path / "trainer_0", torch))
    assert ours.about.format == "dictionary_learning"
    assert ours.about.metadata["model_name"] == "a/model"
    assert ours.about.metadata["hook_name"] == "resid_post_layer_4"
    assert ours.about.metadata["context_size"] == 128
    assert ours.about.metadata["dictionary_learning"] == config_of(trainer)
    assert_same(ours, trainer.ae, rows, torch, dtype)


def test_what_trainers_judge_by_is_read(library, torch, tmp_path):
    def read(case):
        return sae_jax.load(saved(made(library, torch, case), tmp_path / case, torch)).sae.config

    assert not read("AutoEncoder")["decoder_norm_l1"]
    assert read("AutoEncoder, April")["decoder_norm_l1"]
    assert read("AutoEncoderTopK")["auxk"] == 1 / 32
    matryoshka = read("MatryoshkaBatchTopKSAE")
    assert matryoshka["architecture"] == "matryoshka"
    assert matryoshka["prefixes"] == (5, 10, 20)
    assert matryoshka["prefix_weights"] == (1 / 9, 1 / 9, 1 / 9)


@pytest.mark.parametrize("case", TRAINERS)
def test_bare_weights_are_read_where_their_names_tell_the_class(case, library, torch, rows, tmp_path):
    trainer = made(library, torch, case)
    folder = saved(trainer, tmp_path / "trainer_0", torch)
    ours = sae_jax.load(folder / "ae.pt")
    assert_same(ours, trainer.ae, rows, torch)
    (folder / "config.json").unlink()
    for path in (folder, folder / "ae.pt"):
        if case.split(",")[0] in LIKE_ANOTHER:
            refused(
                partial(sae_jax.load, path),
                "dict_class, which could not be inferred",
                " and ".join(LIKE_ANOTHER),
            )
        else:
            alone = sae_jax.load(path)
            assert alone.about.format == "dictionary_learning"
            assert_same(alone, trainer.ae, rows, torch)


def test_a_topk_of_an_earlier_version_has_its_k_in_the_config(library, torch, rows, tmp_path):
    trainer = made(library, torch, "AutoEncoderTopK")
    folder = saved(trainer, tmp_path / "trainer_0", torch)
    state = torch.load(folder / "ae.pt")
    del state["k"], state["threshold"]
    torch.save(state, folder / "ae.pt")
    assert_same(sae_jax.load(folder), trainer.ae, rows, torch)
    (folder / "config.json").unlink()
    refused(partial(sae_jax.load, folder), "k could not be inferred")


def test_a_run_is_read_whole(library, torch, rows, tmp_path):
    trainers = {f"trainer_{i}": made(library, torch, case) for i, case in enumerate(TRAINERS)}
    run = tmp_path / "run"
    for name, trainer in trainers.items():
        folder = saved(trainer, run / name, torch)
        (folder / "checkpoints").mkdir()
        for step in (0, 5):
            torch.save(trainer.ae.state_dict(), folder / "checkpoints" / f"ae_{step}.pt")
    found = sae_jax.load_all(run)
    assert found.keys() == trainers.keys()
    for name, trainer in trainers.items():
        assert_same(found[name], trainer.ae, rows, torch)
        assert_same(sae_jax.load(run / name / "checkpoints" / "ae_5.pt"), trainer.ae, rows, torch)
    refused(partial(sae_jax.load, run), f"{len(TRAINERS)} SAEs", "trainer_0")


# There and back


@pytest.mark.parametrize("case", TRAINERS)
def test_the_way_back_changes_no_bit(case, library, torch, rows, tmp_path):
    trainer = made(library, torch, case)
    folder = saved(trainer, tmp_path / "trainer_0", torch)
    ours = sae_jax.load(folder)
    # by way of another format too
    ours.save(tmp_path / "saelens")
    ways = {"direct": ours, "by saelens": sae_jax.load(tmp_path / "saelens")}
    for name, trained in ways.items():
        assert trained.save(tmp_path / name, format="dictionary_learning") == []
        state, again = torch.load(folder / "ae.pt"), torch.load(tmp_path / name / "ae.pt")
        assert state.keys() == again.keys()
        for key, leaf in state.items():
            assert again[key].dtype == leaf.dtype, key
            assert torch.equal(again[key], leaf), key
        theirs, config = library.load_dictionary(str(tmp_path / name), "cpu")
        assert type(theirs) is type(trainer.ae)
        assert config["trainer"].items() >= config_of(trainer)["trainer"].items()
        assert config["buffer"] == config_of(trainer)["buffer"]
        assert_same(ours, theirs, rows, torch, units=norms_of(trainer.ae))


factory = {
    name: partial(find(name), D_IN, D_SAE) for name in ("relu", "topk", "batch_topk", "jumprelu", "gated")
}
matryoshka = partial(find("matryoshka"), D_IN, D_SAE)
WRITTEN = {
    "relu": ("AutoEncoderNew", partial(factory["relu"], l1=0.2)),
    "relu-b-dec": ("AutoEncoder", partial(factory["relu"], apply_b_dec_to_input=True)),
    "relu-tied": ("AutoEncoder", partial(factory["relu"], tied=True, apply_b_dec_to_input=True)),
    "topk": ("AutoEncoderTopK", partial(factory["topk"], k=K)),
    "topk-no-b-dec": ("AutoEncoderTopK", partial(factory["topk"], k=K, apply_b_dec_to_input=False)),
    "batch-topk": ("BatchTopKSAE", partial(factory["batch_topk"], k=2.5)),
    "batch-topk-no-b-dec": (
        "BatchTopKSAE",
        partial(factory["batch_topk"], k=0.2, apply_b_dec_to_input=False),
    ),
    "jumprelu": ("JumpReluAutoEncoder", factory["jumprelu"]),
    "jumprelu-b-dec": ("JumpReluAutoEncoder", partial(factory["jumprelu"], apply_b_dec_to_input=True)),
    "jumprelu-log": ("JumpReluAutoEncoder", partial(factory["jumprelu"], log_threshold=True, target_l0=2)),
    "gated": ("GatedAutoEncoder", factory["gated"]),
    "gated-no-b-dec": ("GatedAutoEncoder", partial(factory["gated"], apply_b_dec_to_input=False)),
    "matryoshka": ("MatryoshkaBatchTopKSAE", partial(matryoshka, prefixes=(4, 20), k=K)),
    "matryoshka-relu": ("AutoEncoderNew", partial(matryoshka, prefixes=(4, 20), of=find("relu"))),
}
"""The class there, and a factory of ours, by name."""


def random_params(sae, dtype):
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: sae.init(jax.random.key(0), dtype))
    params = {name: jnp.asarray(0.5 * rng.normal(size=leaf.shape), dtype) for name, leaf in shapes.items()}
    if "threshold" in params:
        # as the library keeps it, so that nothing is rounded
        drawn = rng.uniform(0.1, 0.6, params["threshold"].shape).astype(np.float32)
        params["threshold"] = jnp.asarray(drawn, dtype)
    return params


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(("dict_class", "build"), list(WRITTEN.values()), ids=list(WRITTEN))
def test_the_library_reads_what_is_written_here(
    dict_class, build, dtype, library, torch, rows, tmp_path, x64
):
    sae = build()
    ours = TrainedSAE(sae, random_params(sae, dtype))
    ours.save(tmp_path, format="dictionary_learning")
    if dtype == "float32":
        theirs, config = library.load_dictionary(str(tmp_path), "cpu")
    else:
        # its loaders make float32 of everything
        theirs, config = library.load_dictionary(str(tmp_path), "cpu")
        theirs.double().load_state_dict(torch.load(tmp_path / "ae.pt"))
    assert type(theirs).__name__ == config["trainer"]["dict_class"] == dict_class
    norms = np.linalg.norm(ours.params["W_dec"], axis=1)
    normalised = dict_class == "AutoEncoder" and dtype == "float32"
    assert_same(ours, theirs, rows, torch, dtype, units=norms if normalised else None)
    again = sae_jax.load(tmp_path)
    assert again.sae.config == sae.config
    assert_same(again, theirs, rows, torch, dtype, units=norms if normalised else None)


def test_half_precision_stays_as_it_is(tmp_path, torch):
    sae = WRITTEN["batch-topk"][1]()
    params = sae.init(jax.random.key(0), jnp.bfloat16)
    TrainedSAE(sae, params).save(tmp_path, format="dictionary_learning")
    again = sae_jax.load(tmp_path)
    for name, leaf in params.items():
        assert again.params[name].dtype == leaf.dtype
        np.testing.assert_array_equal(np.asarray(again.params[name]), np.asarray(leaf), name)


def test_what_was_told_of_model_and_site_is_written(tmp_path, library):
    sae = WRITTEN["topk"][1]()
    told = {"model_name": "a/model", "hook_name": "blocks.3", "context_size": 64, "dataset_path": "a/text"}
    formats.write(tmp_path, sae, sae.init(jax.random.key(0)), "dictionary_learning", metadata=told)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["trainer"] | {"lm_name": "a/model", "submodule_name": "blocks.3"} == config["trainer"]
    assert config["buffer"] == {"ctx_len": 64}
    assert sae_jax.load(tmp_path).about.metadata.items() >= told.items()


@pytest.mark.parametrize(
    "build", [partial(find("transcoder"), d_out=D_IN), partial(find("crosscoder"), sources=2)]
)
def test_what_has_no_class_there_is_refused(build, tmp_path):
    sae = build(D_IN, D_SAE)
    ours = TrainedSAE(sae, sae.init(jax.random.key(0)))
    refused(
        partial(ours.save, tmp_path / "sae", format="dictionary_learning", lossy=True),
        sae.config["architecture"],
    )
    assert not (tmp_path / "sae").exists()


def test_a_layer_norm_is_lost_only_where_wanted(tmp_path, torch):
    sae = layer_normed(WRITTEN["topk"][1]())
    ours = TrainedSAE(sae, sae.init(jax.random.key(0)))
    refused(partial(ours.save, tmp_path, format="dictionary_learning"), "its layer norm")
    assert ours.save(tmp_path, format="dictionary_learning", lossy=True) == ["its layer norm"]
    assert "normalize_activations" not in sae_jax.load(tmp_path).sae.config


# Bad input


@pytest.mark.parametrize(
    ("case", "config", "tensors", "words"),
    [
        ("AutoEncoder", {"dict_class": "CrossCoder"}, {}, ("'CrossCoder' is not read here",)),
        ("AutoEncoder", {"dict_class": 3}, {}, ("3 is not read here",)),
        ("AutoEncoder", {"dict_class": "AutoEncoderNew"}, {}, ("tensors that no AutoEncoderNew has: bias",)),
        ("AutoEncoder", {}, {"bias": None}, ("has no tensor bias",)),
        ("AutoEncoder", {}, {"bias": (3,)}, ("b_dec must be (8,), got (3,)",)),
        ("AutoEncoder", {}, {"encoder.weight": (3,)}, ("must be a matrix",)),
        ("AutoEncoder", {}, {"more": (3,)}, ("tensors that no AutoEncoder has: more",)),
        ("AutoEncoderTopK", {"k": 2.0}, {}, ("k as a whole number, got 2.0",)),
        ("AutoEncoderTopK", {"k": True}, {}, ("k as a whole number, got True",)),
        ("AutoEncoderTopK", {"k": 4}, {}, ("differ about k: 3 and 4",)),
        ("AutoEncoderTopK", {}, {"k": (2,)}, ("k as a whole number",)),
        ("AutoEncoderTopK", {"k": 10**30}, {"k": None}, ("k",)),
        ("MatryoshkaBatchTopKSAE", {}, {"group_sizes": (3,)}, ("group_sizes must be whole numbers",)),
        ("MatryoshkaBatchTopKSAE", {}, {"group_sizes": None}, ("group_sizes must be whole numbers",)),
    ],
)  # fmt: skip
def test_bad_files_are_told_of_in_one_sentence(case, config, tensors, words, library, torch, tmp_path):
    trainer = made(library, torch, case)
    folder = saved(trainer, tmp_path / "trainer_0", torch)
    whole = config_of(trainer)
    whole["trainer"] |= config
    (folder / "config.json").write_text(json.dumps(whole))
    state = torch.load(folder / "ae.pt") | {
        name: torch.ones(shape) for name, shape in tensors.items() if shape is not None
    }
    torch.save(
        {name: leaf for name, leaf in state.items() if tensors.get(name, ()) is not None}, folder / "ae.pt"
    )
    refused(partial(sae_jax.load, folder), *words)


@pytest.mark.parametrize("part", ["trainer", "buffer", "metadata"])
def test_parts_of_the_config_are_objects(part, library, torch, tmp_path):
    folder = saved(made(library, torch, "AutoEncoder"), tmp_path / "trainer_0", torch)
    (folder / "config.json").write_text(json.dumps({part: [1]}))
    refused(partial(sae_jax.load, folder), f"{part} must be an object")


def test_groups_that_do_not_cover_the_latents_are_refused(library, torch, tmp_path):
    folder = saved(made(library, torch, "MatryoshkaBatchTopKSAE"), tmp_path / "trainer_0", torch)
    state = torch.load(folder / "ae.pt")
    for sizes in ([5, 5], [5, -5, 20], [5, 0, 15], []):
        torch.save({**state, "group_sizes": torch.tensor(sizes, dtype=torch.int64)}, folder / "ae.pt")
        refused(partial(sae_jax.load, folder), "prefixes must" if sizes else "group_sizes must")


def test_a_damaged_file_is_named(library, torch, tmp_path):
    folder = saved(made(library, torch, "AutoEncoder"), tmp_path / "trainer_0", torch)
    whole = (folder / "ae.pt").read_bytes()
    (folder / "ae.pt").write_bytes(whole[: len(whole) // 2])
    refused(partial(sae_jax.load, folder), "ae.pt")
    (folder / "config.json").unlink()
    refused(partial(sae_jax.load, folder), "ae.pt")
