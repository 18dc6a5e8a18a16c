"""From every format to every other and back; what is refused; what `inspect` tells."""

import itertools
import json
from functools import partial

import jax
import numpy as np
import optax
import pytest
from cases import weights
from safetensors.numpy import load_file

import sae_jax
from sae_jax import InputError, TrainedSAE, folds, formats
from sae_jax.architectures import find
from sae_jax.cli import main
from sae_jax.convert import convert, difference
from sae_jax.folds import plain
from sae_jax.layer_norm import layer_normed

relu, topk, batch_topk, jumprelu, gated = (
    partial(find(name), 5, 7) for name in ("relu", "topk", "batch_topk", "jumprelu", "gated")
)
onto = partial(sae_jax.transcoder, 5, 7, d_out=5)

MODELS = {
    "relu": relu(target_l0=2.0),
    "relu-b-dec": relu(apply_b_dec_to_input=True),
    "topk": topk(k=3),
    "topk-layer-normed": layer_normed(topk(k=3)),
    "batch-topk": batch_topk(k=2),
    "jumprelu": jumprelu(log_threshold=True),
    "jumprelu-b-dec": jumprelu(apply_b_dec_to_input=True),
    "gated": gated(),
    "matryoshka": sae_jax.matryoshka(5, 7, prefixes=(2, 7), k=3),
    "transcoder": onto(),
    "skip": onto(skip=True),
    "skip-topk": onto(skip=True, of=sae_jax.topk, k=3),
    "transcoder-jumprelu": onto(of=sae_jax.jumprelu),
    "crosscoder": sae_jax.crosscoder(5, 7, sources=2),
}


def one(path):
    """The one SAE there, whatever a format's unit is."""
    return next(iter(formats.several(path).values()), path)


def holds(name, sae):
    """Whether the format holds the SAE whole."""
    try:
        form = formats.FORMATS[name].form(formats.Loaded(*plain(sae, weights(sae)), {}))
    except InputError:
        return False
    return not form.lost


PAIRS = [
    pytest.param(model, first, second, id=f"{model}-{first}-{second}")
    for model, sae in MODELS.items()
    for first, second in itertools.permutations([name for name in formats.FORMATS if holds(name, sae)], 2)
]


def computed(path):
    """What the SAE there computes, in one convention: a JumpReLU or TopK that does not subtract b_dec."""
    sae, params = plain(*formats.read(one(path))[1][:2])
    convention = folds.kind(sae), folds.inner(sae.config).get("apply_b_dec_to_input")
    to_jumprelu = {
        "relu": folds.relu_as_jumprelu,
        "gated": folds.gated_as_jumprelu,
        "batch_topk": folds.batch_topk_as_jumprelu,
    }
    sae, params = to_jumprelu.get(folds.kind(sae), lambda *same: same)(sae, params)
    params = dict(folds.fold_b_dec(sae, params, False)[1])
    if "threshold" in params:  # one below 0 is needless
        params["threshold"] = np.maximum(params["threshold"], 0)
    return convention, params


@pytest.mark.parametrize(("model", "first", "second"), PAIRS)
def test_there_and_back_by_way_of_every_other_format(model, first, second, tmp_path):
    sae = MODELS[model]
    formats.write(tmp_path / "a", sae, weights(sae), first)
    for source, target, to in (("a", "b", second), ("b", "c", first)):
        done = convert(one(tmp_path / source), tmp_path / target, to)
        assert done[0].difference.ok
    ways, (before, _, after) = zip(*(computed(tmp_path / place) for place in "abc"), strict=True)
    assert before.keys() == after.keys()
    for name, leaf in before.items():
        assert leaf.dtype == after[name].dtype
        by_its_logarithm = name == "threshold" and "llama_scope" in (first, second)
        if len(set(ways)) == 1 and not by_its_logarithm:
            np.testing.assert_array_equal(after[name], leaf, name)
        else:
            np.testing.assert_allclose(after[name], leaf, rtol=1e-6, atol=1e-6, err_msg=name)


def test_every_format_holds_something_and_is_the_end_of_a_pair():
    ends = {pair.values[2] for pair in PAIRS} | {pair.values[1] for pair in PAIRS}
    assert ends == set(formats.FORMATS)


@pytest.mark.parametrize("name", list(MODELS))
def test_the_own_layout_keeps_how_it_was_trained_on_a_way_through_saelens(name, tmp_path):
    sae = MODELS[name]
    TrainedSAE(sae, weights(sae)).save(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", "saelens")
    loaded = sae_jax.load(tmp_path / "b")
    assert loaded.sae.config == sae.config
    for leaf, values in weights(sae).items():
        np.testing.assert_array_equal(loaded.params[leaf], values)


@pytest.fixture
def lossy(tmp_path):
    """A TopK, which the seed's module would take for a ReLU."""
    sae = layer_normed(relu())
    TrainedSAE(sae, weights(sae)).save(tmp_path / "a")
    return tmp_path


def test_what_would_be_lost_is_said_and_lossy_writes_it_down(lossy, capsys):
    with pytest.raises(InputError, match="seed cannot hold this SAE; it would lose its layer norm"):
        convert(lossy / "a", lossy / "b.pt", "seed")
    assert not (lossy / "b.pt").exists()
    done = convert(lossy / "a", lossy / "b.pt", "seed", lossy=True)
    assert "its layer norm" in done[0].left_out
    assert not done[0].difference.ok
    assert (lossy / "b.pt").exists()
    assert sorted(path.name for path in lossy.iterdir()) == ["a", "b.pt"]


def test_a_file_that_disagrees_is_not_left(tmp_path, monkeypatch):
    sae = relu()
    TrainedSAE(sae, weights(sae)).save(tmp_path / "a")
    honest = formats.FORMATS["seed"]

    def careless(loaded):
        return honest.form(loaded._replace(params={**loaded.params, "b_dec": loaded.params["b_dec"] + 1e-3}))

    monkeypatch.setitem(formats.FORMATS, "seed", honest._replace(form=careless))
    with pytest.raises(
        InputError, match=r"as seed is not the same SAE, so it was not written: .*e-0\d in recon"
    ):
        convert(tmp_path / "a", tmp_path / "b.pt", "seed")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert convert(tmp_path / "a", tmp_path / "b.pt", "seed", check=False)[0].difference is None


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec"])
def test_the_check_sees_one_wrong_number(name):
    sae = relu()
    params = weights(sae)
    wrong = {**params, name: params[name].copy()}
    wrong[name].flat[1] *= 1 + 1e-4
    before, after = (formats.Loaded(sae, leaves, {}) for leaves in (params, wrong))
    assert difference(before, before).ok
    assert difference(before, before).features == 0
    assert not difference(before, after).ok


def test_nan_is_no_agreement():
    sae = relu()
    params = weights(sae)
    wrong = {**params, "b_dec": np.full_like(params["b_dec"], np.nan)}
    assert not difference(*(formats.Loaded(sae, leaves, {}) for leaves in (params, wrong))).ok


@pytest.fixture
def run(tmp_path):
    """A sweep of two members on disk."""
    result = sae_jax.sweep(
        partial(sae_jax.relu, 4, 6), grid=sae_jax.grid(l1=[0.01, 0.1]),
        optimizer=partial(optax.adam, 1e-2),
        source=sae_jax.in_memory(np.eye(4, dtype=np.float32)), steps=3,
    )  # fmt: skip
    result.save(tmp_path / "run")
    return tmp_path / "run"


def test_a_folder_of_several_becomes_a_folder_of_several(run, tmp_path):
    told = []
    done = convert(run, tmp_path / "there", "seed", told=told.append)
    assert told == done
    assert [path.relative_to(tmp_path).as_posix() for path in (item.target for item in done)] == [
        "there/members/000", "there/members/001"
    ]  # fmt: skip
    found = sae_jax.load_all(tmp_path / "there")
    for name, trained in sae_jax.load_all(run).items():
        np.testing.assert_array_equal(found[name].params["W_enc"], trained.params["W_enc"])


def test_nothing_is_overwritten_unasked(run, tmp_path):
    source, target = run / "members/000", tmp_path / "there"
    target.mkdir()
    convert(source, target, "saelens")
    (target / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="there exists: choose another place, or --overwrite"):
        convert(source, target, "saelens")
    assert (target / "notes.txt").exists()
    convert(run / "members/001", target, "saelens", overwrite=True)
    np.testing.assert_array_equal(
        load_file(target / "sae_weights.safetensors")["W_enc"],
        load_file(run / "members/001/sae_weights.safetensors")["W_enc"],
    )


# The command line


def command(*arguments, status=0):
    with pytest.raises(SystemExit) as left:
        main(list(map(str, arguments)))
    assert left.value.code == status


def test_convert_tells_the_largest_difference(run, tmp_path, capsys):
    rows = tmp_path / "x.npy"
    np.save(rows, np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32))
    command("convert", run / "members/000", tmp_path / "a.pt", "--to", "seed", "--data", rows)
    told = capsys.readouterr().out
    assert "(saelens) ->" in told
    assert (
        "largest relative difference 0.0e+00 in features and 0.0e+00 in reconstructions over 114 rows" in told
    )
    assert "left out: how it was trained" in told
    command("convert", tmp_path / "a.pt", tmp_path / "b", "--to", "saelens", "--json")
    told = json.loads(capsys.readouterr().out)
    assert told[0]["difference"]["ok"] is True
    assert told[0]["from"] == "seed"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "b", "--to", "seed"], "nowhere does not exist"),
        (
            ["run/members/000", "b", "--to", "onnx"],
            "no format is called 'onnx'; there are: llama_scope, saelens",
        ),
        (["run", "run", "--to", "seed"], "run exists"),
        (["run/members/000", "b", "--to", "seed", "--data", "wide.npy"], "rows must be (4,), got (9,)"),
    ],
)
def test_bad_input_of_convert_is_one_sentence(run, tmp_path, arguments, words, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("wide.npy", np.ones((3, 9), np.float32))
    command("convert", *arguments, status=2)
    told = capsys.readouterr().err.strip()
    assert words in told
    assert "\n" not in told
    assert not (tmp_path / "b").exists()
    assert not list(tmp_path.glob(".*"))


def test_inspect_tells_what_is_there(tmp_path, capsys):
    sae = jumprelu()
    params = weights(sae)
    params["W_dec"][2] = 0
    params["W_enc"][0, :2] = np.nan
    formats.write(
        tmp_path / "a", sae, params, metadata={"model_name": "tiny", "hook_name": "blocks.0"},
        log_sparsity=np.array([-10, -6, -2, -2, -1, -1, -1], np.float32),
    )  # fmt: skip
    command("inspect", tmp_path / "a", "--json")
    told = json.loads(capsys.readouterr().out)
    assert (told["format"], told["architecture"], told["parameters"]) == ("saelens", "jumprelu", 89)
    assert told["tensors"]["W_enc"]["nan"] == 2
    assert told["tensors"]["W_dec"]["shape"] == [7, 5]
    assert told["norms"]["W_dec"]["zero"] == 1
    assert told["log_sparsity"]["under_1e-5"] == 2
    assert told["metadata"]["hook_name"] == "blocks.0"
    command("inspect", tmp_path / "a")
    shown = capsys.readouterr().out
    for words in ("saelens, jumprelu, 89 parameters", "7 x 5", "1 dead rows", "blocks.0", "2 under 1e-5"):
        assert words in shown


def test_inspect_of_a_run_tells_of_each_member(run, capsys):
    command("inspect", run, "--json")
    assert [entry["path"] for entry in json.loads(capsys.readouterr().out)] == [
        str(run / "members/000"), str(run / "members/001")
    ]  # fmt: skip


@pytest.mark.parametrize("to", ["saelens", "seed"])
def test_a_disk_that_fills_leaves_what_was_there(to, small_disk):
    sae, big = sae_jax.relu(16, 128), sae_jax.relu(64, 512)
    TrainedSAE(sae, sae.init(jax.random.key(0))).save(small_disk / "sae")
    before = {path.name: path.read_bytes() for path in (small_disk / "sae").iterdir()}
    TrainedSAE(big, big.init(jax.random.key(0))).save(small_disk.parent / "big")
    with pytest.raises(OSError, match="No space left"):
        convert(small_disk.parent / "big", small_disk / "sae", to, overwrite=True)
    assert {path.name: path.read_bytes() for path in (small_disk / "sae").iterdir()} == before
    assert [path.name for path in small_disk.iterdir()] == ["sae"]
