"""The Hugging Face hub: the real client, against a hub on loopback and against its cache alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hub_double import Hub, entry, serving

import sae_jax
from sae_jax import InputError, hub
from sae_jax.trained import About, TrainedSAE


@pytest.fixture
def server():
    with serving() as found:
        yield found


@pytest.fixture
def client(server, tmp_path, monkeypatch):
    """Gives huggingface_hub as a new process would have it, which reads its environment when imported."""

    def loaded() -> dict:
        return {name: one for name, one in sys.modules.items() if name.split(".")[0] == "huggingface_hub"}

    def renewed(**environment: str):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        for name in loaded():
            del sys.modules[name]
        import huggingface_hub

        return huggingface_hub

    for name in [name for name in os.environ if name.startswith("HF_")]:
        monkeypatch.delenv(name)
    before = loaded()
    renewed(**environment(server, tmp_path / "home"))
    yield renewed
    for name in loaded():
        del sys.modules[name]
    sys.modules.update(before)


@pytest.fixture
def remote(server, client):
    """The hub, with the client set to it."""
    return server


def environment(server: Hub, home: Path) -> dict[str, str]:
    """What a user sets to use another hub; the client must not leave loopback."""
    return {
        "HF_ENDPOINT": server.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1,localhost",
    }


def trained(seed: int = 0, **metadata) -> TrainedSAE:
    sae = sae_jax.jumprelu(5, 7, l0_coefficient=0.3)
    shapes = jax.eval_shape(lambda: sae.init(jax.random.key(0)))
    draws = np.random.default_rng(seed)
    params = {name: jnp.asarray(draws.normal(size=leaf.shape), leaf.dtype) for name, leaf in shapes.items()}
    return TrainedSAE(sae, params, About(metadata=metadata))


def folder_of(one: TrainedSAE, at: Path, format: str = "saelens") -> dict[str, bytes]:
    """The files of an SAE by name."""
    one.save(at, format)
    files = sorted(at.iterdir()) if at.is_dir() else [at]
    return {file.name: file.read_bytes() for file in files}


def below(folder: str, files: dict[str, bytes]) -> dict[str, bytes]:
    return {f"{folder}/{name}": data for name, data in files.items()}


def rows() -> np.ndarray:
    return np.random.default_rng(3).normal(size=(11, 5)).astype(np.float32)


def same(one: TrainedSAE, other: TrainedSAE) -> bool:
    """The same architecture and weights, to the last bit."""
    kind = one.sae.config["architecture"] == other.sae.config["architecture"]
    return kind and one.params.keys() == other.params.keys() and all(
        np.array_equal(one.params[name], other.params[name]) for name in one.params
    )  # fmt: skip


@pytest.fixture
def files(tmp_path):
    return folder_of(trained(model_name="gpt2"), tmp_path / "saved")


def refused(*arguments, **named) -> str:
    """The sentence that loading ends in."""
    with pytest.raises(InputError) as told:
        sae_jax.load(*arguments, **named)
    sentence = str(told.value)
    assert "\n" not in sentence
    return sentence


# --- what is an address ---


@pytest.mark.parametrize(
    ("address", "repo_id", "path", "revision"),
    [
        ("hf://user/repo", "user/repo", "", None),
        ("hf:/user/repo", "user/repo", "", None),
        ("hf://user/repo@v1", "user/repo", "", "v1"),
        ("hf://user/repo@feature%2Fa/layer/5", "user/repo", "layer/5", "feature/a"),
        ("hf://user/repo@refs/pr/3/sae.pt", "user/repo", "sae.pt", "refs/pr/3"),
        ("hf://user/re.po-1_x/a/b/", "user/re.po-1_x", "a/b", None),
        ("user/repo", "user/repo", "", None),
    ],
)
def test_addresses(address, repo_id, path, revision):
    told = hub.parsed(address)
    assert told == (repo_id, path, revision)
    assert hub.parsed(str(told)) == told


@pytest.mark.parametrize("name", ["nowhere", "/a/b", "./a/b", "../a/b", "a/b/c", "a/b@c", "~/a", "a//b"])
def test_what_is_no_address_is_a_path(remote, name):
    assert "does not exist" in refused(name)
    assert remote.requests == []


# --- loading ---


def test_a_repository_loads_by_its_name(remote, files):
    commit = remote.repo("user/repo", {**files, "README.md": b"hello", "figure.png": b"0"}).refs["main"]
    loaded = sae_jax.load("user/repo")
    assert same(loaded, trained())
    assert jnp.array_equal(loaded(rows()), trained()(rows()))
    assert loaded.about.format == "saelens"
    assert loaded.about.metadata["model_name"] == "gpt2"
    assert loaded.about.origin == f"hf://user/repo@{commit}"
    assert same(sae_jax.load(loaded.about.origin), trained())
    # the weights came over the storage host, and what no reader opens did not come
    assert [path for path in remote.files_got() if "README" in path or "png" in path] == []
    assert any(path.startswith("/storage/") for path in remote.files_got())


@pytest.mark.parametrize("address", ["user/repo", "hf://user/repo", Path("user/repo")])
def test_a_path_in_a_repository(remote, files, address):
    remote.repo("user/repo", {**below("layer/5", files), "readme.txt": b""})
    assert same(sae_jax.load(address, "layer/5"), trained())
    assert same(sae_jax.load(address, "/layer/5/"), trained())
    assert same(sae_jax.load("hf://user/repo/layer/5"), trained())
    assert same(sae_jax.load("hf://user/repo/layer", "5"), trained())


def test_what_is_on_disk_wins(remote, files, tmp_path, monkeypatch):
    remote.repo("user/repo", files)
    monkeypatch.chdir(tmp_path)
    trained(4).save("user/repo")
    assert same(sae_jax.load("user/repo"), trained(4))
    assert same(sae_jax.load("user", "repo"), trained(4))
    assert remote.requests == []
    assert "on this disk, without revisions" in refused("user/repo", revision="main")
    assert same(sae_jax.load("hf://user/repo"), trained())


def test_revisions(remote, files, tmp_path):
    repo = remote.repo("user/repo", files)
    first = repo.refs["main"]
    repo.refs["v1"] = first
    second = repo.commit(folder_of(trained(1), tmp_path / "second"))
    repo.refs["feature/a"] = second
    assert same(sae_jax.load("user/repo"), trained(1))
    assert sae_jax.load("user/repo").about.origin == f"hf://user/repo@{second}"
    for pinned in ("v1", first):
        loaded = sae_jax.load("user/repo", revision=pinned)
        assert same(loaded, trained())
        assert loaded.about.origin == f"hf://user/repo@{first}"
        assert same(sae_jax.load(f"hf://user/repo@{pinned}"), trained())
    assert same(sae_jax.load("user/repo", revision="feature/a"), trained(1))
    assert not same(trained(), trained(1))
    assert refused("user/repo", revision="v9") == "user/repo has no revision v9"
    assert "has a revision, and so has" in refused("hf://user/repo@v1", revision="v1")


def test_a_branch_that_moved_is_followed(remote, files, tmp_path):
    repo = remote.repo("user/repo", files)
    assert same(sae_jax.load("user/repo"), trained())
    repo.commit(folder_of(trained(1), tmp_path / "second"))
    assert same(sae_jax.load("user/repo"), trained(1))


def test_a_branch_that_moves_meanwhile_is_not_followed(remote, files, tmp_path):
    repo = remote.repo("user/repo", files)
    first, second = repo.refs["main"], folder_of(trained(1), tmp_path / "second")

    def moves(method: str, path: str) -> None:
        if "/resolve/" in path and repo.refs["main"] == first:
            repo.commit(second)

    remote.fails = moves
    loaded = sae_jax.load("user/repo")
    assert repo.refs["main"] != first
    assert same(loaded, trained())
    assert loaded.about.origin == f"hf://user/repo@{first}"


def test_the_cache_is_used(remote, files, tmp_path):
    remote.repo("user/repo", files)
    sae_jax.load("user/repo")
    assert len(remote.files_got()) >= 2
    remote.requests.clear()
    assert same(sae_jax.load("user/repo"), trained())
    assert remote.files_got() == []
    sae_jax.load("user/repo", cache_dir=tmp_path / "elsewhere")
    assert len(remote.files_got()) >= 2
    assert (tmp_path / "elsewhere" / "models--user--repo").is_dir()
    # the layout is that of huggingface_hub, whose own lookup finds it
    from huggingface_hub import try_to_load_from_cache

    assert isinstance(try_to_load_from_cache("user/repo", "cfg.json"), str)


def test_only_what_one_sae_needs_is_fetched(remote, files):
    many = {name: data for i in range(40) for name, data in below(f"layer_{i}/width_16k", files).items()}
    remote.repo("user/many", {**many, "config.json": b"{}"})
    assert same(sae_jax.load("user/many", "layer_7/width_16k"), trained())
    asked = [path for method, path in remote.requests if "/resolve/" in path]
    assert asked
    assert all("/layer_7/width_16k/" in path or path.endswith("/config.json") for path in asked)
    assert len([path for path in remote.files_got() if "/storage/" in path]) == 1


def test_a_folder_of_saes_lists_them_and_fetches_nothing(remote, files):
    many = {name: data for i in range(30) for name, data in below(f"layer_{i}", files).items()}
    remote.repo("user/many", many)
    sentence = refused("user/many")
    assert "layer_0, layer_1, layer_2" in sentence
    assert sentence.endswith(", ...")
    numbered = {f"layer_{i}.safetensors": files["sae_weights.safetensors"] for i in range(6)}
    remote.repo("user/files", {**numbered, "config.yaml": b"a: 1\n"})
    assert "holds 6 files of weights: name one of layer_0.safetensors, layer_1" in refused("user/files")
    remote.repo("user/none", {"README.md": b"", "notes.json": b"{}"})
    assert "has no weights" in refused("user/none")
    assert "notes.json" in refused("user/none")
    assert remote.files_got() == []


def test_load_all_of_a_repository(remote, files, tmp_path):
    repo = remote.repo("user/many", {
        **below("a/first", files), **below("a/second", folder_of(trained(1), tmp_path / "1")),
        **below("b/third", files), "training.log": b"",
    })  # fmt: skip
    found = sae_jax.load_all("user/many")
    assert list(found) == ["a/first", "a/second", "b/third"]
    assert same(found["a/second"], trained(1))
    assert found["a/second"].about.origin == f"hf://user/many@{repo.refs['main']}/a/second"
    assert list(sae_jax.load_all("user/many", "a", cache_dir=tmp_path / "new")) == ["first", "second"]
    assert len(list((tmp_path / "new").rglob("sae_weights.safetensors"))) == 2
    remote.repo("user/none", {"README.md": b""})
    with pytest.raises(InputError, match="has no weights"):
        sae_jax.load_all("user/none")


def test_one_file(remote, torch, tmp_path):
    relu = sae_jax.relu(5, 7, l1=0.1)
    one = TrainedSAE(relu, relu.init(jax.random.key(0)))
    one.save(tmp_path / "seed.pt", "seed")
    other = {"other.pt": b"0", "readme.md": b"", "config.json": b"{}"}
    remote.repo("user/repo", {"runs/sae.pt": (tmp_path / "seed.pt").read_bytes(), **below("runs", other)})
    loaded = sae_jax.load("user/repo", "runs/sae.pt")
    assert loaded.about.format == "seed"
    assert same(loaded, one)
    assert str(loaded.about.origin).endswith("/runs/sae.pt")
    assert not any("other.pt" in path for _, path in remote.requests)
    # what a reader of one file may look for lies beside it now
    assert any(path.endswith("/runs/config.json") for _, path in remote.requests)


def test_checkpoints_below_a_config_are_fetched(remote, tmp_path):
    remote.repo("user/scope", {
        "L1/hyperparams.json": b"{}", "L1/checkpoints/final.safetensors": b"weights",
        "L1/checkpoints/lm_config.json": b"{}", "L2/hyperparams.json": b"{}",
        "L2/checkpoints/final.safetensors": b"",
    })  # fmt: skip
    found = hub.fetch("user/scope", "L1").path
    names = sorted(file.relative_to(found).as_posix() for file in found.rglob("*") if file.is_file())
    assert names == ["checkpoints/final.safetensors", "checkpoints/lm_config.json", "hyperparams.json"]
    assert not (found.parent / "L2").exists()
    # and the other way: of the file, what lies two folders above its name
    alone = hub.fetch("user/scope", "L2/checkpoints/final.safetensors", cache_dir=tmp_path / "new").path
    assert (alone.parents[1] / "hyperparams.json").is_file()
    # dictionary_learning keeps its earlier weights there, which the last ones do without
    remote.repo("user/run", {"ae.pt": b"0", "config.json": b"{}", "checkpoints/ae_10.pt": b"1"})
    assert not (hub.fetch("user/run").path / "checkpoints").exists()


def test_names_with_odd_letters(remote, files):
    remote.repo("user/repo", below("layer 5 (a+b)/größe%20#1", files))
    assert same(sae_jax.load("user/repo", "layer 5 (a+b)/größe%20#1"), trained())


# --- the hub out of reach ---


def test_offline_the_cache_serves(remote, client, files, tmp_path):
    repo = remote.repo("user/repo", files)
    first = repo.refs["main"]
    repo.refs["v1"] = first
    sae_jax.load("user/repo")
    sae_jax.load("user/repo", revision="v1")
    remote.requests.clear()
    client(HF_HUB_OFFLINE="1")
    for revision in (None, "v1", first):
        loaded = sae_jax.load("user/repo", revision=revision)
        assert same(loaded, trained())
        assert loaded.about.origin == f"hf://user/repo@{first}"
    cache = tmp_path / "home" / "hub"
    wanted = f"is not in the cache {cache}, and HF_HUB_OFFLINE is set"
    assert refused("user/repo", revision="v2") == f"hf://user/repo@v2 {wanted}"
    assert refused("user/other") == f"hf://user/other {wanted}"
    assert refused("user/repo", "layer_5") == f"hf://user/repo/layer_5 {wanted}"
    assert remote.requests == []


def test_without_a_network_the_cache_serves(remote, client, files):
    remote.repo("user/repo", files)
    sae_jax.load("user/repo")
    client(HF_ENDPOINT="http://127.0.0.1:9")  # where nobody listens
    assert same(sae_jax.load("user/repo"), trained())
    assert "http://127.0.0.1:9 cannot be reached" in refused("user/other")


def test_a_hub_that_is_down(remote, files):
    remote.repo("user/repo", files)
    sae_jax.load("user/repo")
    remote.fails = lambda method, path: 503
    assert same(sae_jax.load("user/repo"), trained())
    assert f"{remote.endpoint} answers 503" in refused("user/other")


def test_files_that_are_not_served(remote, files):
    remote.repo("user/repo", files)
    remote.fails = lambda method, path: 500 if method == "GET" and path.endswith("/cfg.json") else None
    assert f"{remote.endpoint} answers 500" in refused("user/repo")


def test_a_download_that_ends_early_leaves_nothing(remote, files):
    remote.repo("user/repo", files)
    remote.cut = 10
    assert refused("user/repo").startswith("hf://user/repo: ")
    remote.cut = 0
    assert same(sae_jax.load("user/repo"), trained())


def test_a_download_that_breaks_off_goes_on_where_it_was(remote, files):
    remote.repo("user/repo", files)
    remote.breaks = 1
    assert same(sae_jax.load("user/repo"), trained())
    assert remote.breaks == 0
    assert len([path for path in remote.files_got() if "/storage/" in path]) == 2


# --- what the hub refuses ---


def test_no_such_repository(remote, client):
    assert "user/none is neither a path here nor a repository" in refused("user/none")
    assert "hf auth login" in refused("user/none")
    client(HF_TOKEN="writer")
    assert "user/none is neither a path here nor a repository" in refused("user/none")


def test_private_and_gated(remote, client, files):
    remote.repo("user/private", files, private=True)
    remote.repo("user/gated", files, gated=True)
    assert "log in if it is private (`hf auth login`)" in refused("user/private")
    assert f"user/gated is gated: ask for access at {remote.endpoint}/user/gated" in refused("user/gated")
    client(HF_TOKEN="writer")
    assert same(sae_jax.load("user/private"), trained())
    assert same(sae_jax.load("user/gated"), trained())


def test_a_token_that_is_not_accepted(remote, files):
    remote.repo("user/repo", files)
    remote.fails = lambda method, path: 403
    assert "log in with a token that may" in refused("user/repo")


def test_no_such_path(remote, files):
    remote.repo("user/repo", below("a", files))
    assert "user/repo has no b/c at " in refused("user/repo", "b/c")
    with pytest.raises(InputError, match="user/repo has no folder b/c"):
        sae_jax.load_all("user/repo", "b/c")


@pytest.mark.parametrize("path", ["../x", "a/../../x", "a//b", "a\\b", "./a"])
def test_paths_stay_in_the_repository(remote, path):
    assert "is not a path within a repository" in refused("user/repo", path)
    assert "is not a path within a repository" in refused("user/repo", revision=path)
    assert remote.requests == []


@pytest.mark.parametrize("name", ["../evil.json", "/tmp/evil.json", "a/../../evil.json", "..\\evil.json"])
@pytest.mark.parametrize("every", [False, True])
def test_names_that_would_leave_the_cache(remote, files, tmp_path, name, every):
    repo = remote.repo("user/repo", files)
    repo.commits[repo.refs["main"]][name] = b"{}"
    del repo.commits[repo.refs["main"]][name]
    repo.listed = [entry(name, b"{}")]
    with pytest.raises(InputError, match="is not a path within a repository"):
        (sae_jax.load_all if every else sae_jax.load)("user/repo")
    assert list(tmp_path.rglob("evil.json")) == []
    assert remote.files_got() == []


def test_a_file_listed_in_a_folder_that_it_is_not_in(remote, files):
    repo = remote.repo("user/repo", below("a", files))
    repo.listed = [entry("b/evil.json", b"{}")]
    assert "the hub lists 'b/evil.json' as a part of hf://user/repo@" in refused("user/repo", "a")


def test_a_commit_that_is_none(remote, files):
    repo = remote.repo("user/repo", files)
    repo.commits["../../x"] = repo.commits[repo.refs["main"]]
    repo.refs["main"] = "../../x"
    assert "the hub calls '../../x' a commit" in refused("user/repo")


# --- pushing ---


def card_of(remote: Hub, repo_id: str, path: str = "README.md") -> str:
    repo = remote.repos[repo_id]
    return repo.commits[repo.refs["main"]][path].decode()


def test_pushed_it_loads_back(remote, client):
    client(HF_TOKEN="writer")
    one = trained(2, model_name="gpt2", hook_name="blocks.5.hook_resid_pre")
    pushed = one.push_to_hub("user/new")
    loaded = sae_jax.load("user/new")
    assert same(loaded, one)
    assert loaded.sae.config == one.sae.config
    assert loaded.about.metadata["hook_name"] == "blocks.5.hook_resid_pre"
    assert pushed.origin == loaded.about.origin
    assert pushed.url == f"{remote.endpoint}/user/new/commit/{pushed.origin.partition('@')[2]}"
    names = set(remote.repos["user/new"].commits[remote.repos["user/new"].refs["main"]])
    assert names == {".gitattributes", "README.md", "cfg.json", "sae_weights.safetensors"}


def test_the_card(remote, client):
    client(HF_TOKEN="writer")
    yaml = pytest.importorskip("yaml")
    metrics = {
        "l0": np.float64(2.5), "mse": 0.125, "nothing": None, "density": [0.1, 0.2],
        "mse_by_source": [1.0, 2.0],
    }  # fmt: skip
    one = trained(2, model_name="a|b\n# x", hook_name="blocks.5", nested={"a": 1})
    one.push_to_hub("user/new", metrics=metrics)
    card = card_of(remote, "user/new")
    front = yaml.safe_load(card.split("---\n")[1])
    assert front == {"library_name": "sae_jax", "tags": ["sae_jax", "saelens", "sparse-autoencoder"]}
    lines = card.splitlines()
    for line in (
        "| architecture | jumprelu |", "| d_in | 5 |", "| d_sae | 7 |", "| W_enc | \\[5, 7\\], float32 |",
        "| model_name | a\\|b # x |", "| hook_name | blocks.5 |", "| l0 | 2.5 |", "| mse | 0.125 |",
        "| nothing | nan |", "| mse_by_source | 1, 2 |", 'trained = sae_jax.load("user/new")',
    ):  # fmt: skip
        assert line in lines, line
    assert "density" not in card
    assert "nested" not in card


def test_a_path_is_pushed_beside_others(remote, client):
    client(HF_TOKEN="writer")
    trained(1).push_to_hub("user/many", "layer_1")
    repo = remote.repos["user/many"]
    overview = card_of(remote, "user/many")
    assert 'sae_jax.load("user/many", "FOLDER")' in overview
    trained(2).push_to_hub("user/many", "layer_2/")
    assert same(sae_jax.load("user/many", "layer_1"), trained(1))
    assert same(sae_jax.load("user/many", "layer_2"), trained(2))
    assert card_of(remote, "user/many") == overview
    assert 'SAE.from_pretrained("user/many", "layer_2")' in card_of(remote, "user/many", "layer_2/README.md")
    assert len(repo.commits) == 3


def test_a_readme_of_others_stays(remote, client):
    client(HF_TOKEN="writer")
    repo = remote.repo("user/repo", {"README.md": b"mine", "layer_1/README.md": b"also mine"})
    trained(1).push_to_hub("user/repo", "layer_1")
    trained(1).push_to_hub("user/repo")
    now = repo.commits[repo.refs["main"]]
    assert now["README.md"] == b"mine"
    assert now["layer_1/README.md"] == b"also mine"
    assert {"cfg.json", "layer_1/cfg.json"} <= set(now)


def test_a_second_push_replaces_the_first(remote, client):
    client(HF_TOKEN="writer")
    first = trained(1)
    log_sparsity = np.full(7, -2.0, np.float32)
    TrainedSAE(*first, About(log_sparsity=log_sparsity)).push_to_hub("user/new", metrics={"l0": 1.0})
    assert np.array_equal(sae_jax.load("user/new").about.log_sparsity, log_sparsity)
    trained(2).push_to_hub("user/new", metrics={"l0": 2.0})
    loaded = sae_jax.load("user/new")
    assert same(loaded, trained(2))
    # that of the first would be told of the second
    assert loaded.about.log_sparsity is None
    assert "| l0 | 2 |" in card_of(remote, "user/new")
    assert trained(2).push_to_hub("user/new", metrics={"l0": 2.0}).origin


def test_labels_are_pushed_and_come_back(remote, client):
    client(HF_TOKEN="writer")
    trained(2).labelled({3: "animals"}).push_to_hub("user/new", "layer_1")
    assert sae_jax.load("user/new", "layer_1").about.labels == {3: "animals"}
    assert "1 of 7 features have a label" in card_of(remote, "user/new", "layer_1/README.md")
    trained(2).push_to_hub("user/new", "layer_1")
    assert sae_jax.load("user/new", "layer_1").about.labels == {}


def test_a_branch_is_made(remote, client):
    client(HF_TOKEN="writer")
    trained(1).push_to_hub("user/new")
    trained(2).push_to_hub("user/new", revision="better")
    trained(3).push_to_hub("user/new", revision="better")
    assert same(sae_jax.load("user/new"), trained(1))
    assert same(sae_jax.load("user/new", revision="better"), trained(3))


def test_private_is_kept(remote, client, files):
    client(HF_TOKEN="writer")
    trained(1).push_to_hub("user/secret", private=True)
    assert remote.repos["user/secret"].private
    trained(1).push_to_hub("user/secret", private=True)
    remote.repo("user/public", {"a.txt": b""})
    with pytest.raises(InputError, match="is there already and is public"):
        trained(1).push_to_hub("user/public", private=True)
    assert len(remote.repos["user/public"].commits) == 1


def test_no_right_to_write(remote, client):
    with pytest.raises(InputError, match="hf auth login"):
        trained(1).push_to_hub("user/new")
    client(HF_TOKEN="reader")
    with pytest.raises(InputError, match="log in with a token that may"):
        trained(1).push_to_hub("user/new")
    remote.repo("user/repo", {"a.txt": b""})
    with pytest.raises(InputError, match="log in with a token that may"):
        trained(1).push_to_hub("user/repo")
    client(HF_ENDPOINT="http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"hf://user/new: http://127.0.0.1:9 cannot be reached"):
        trained(1).push_to_hub("user/new")


def test_what_saelens_has_no_form_for(remote, client):
    client(HF_TOKEN="writer")
    sae = sae_jax.crosscoder(5, 7, sources=2, l1=0.1)
    TrainedSAE(sae, sae.init(jax.random.key(0))).push_to_hub("user/cross")
    assert sae_jax.load("user/cross").sae.config["sources"] == 2
    assert "SAELens has no form" in card_of(remote, "user/cross")
    assert "from sae_lens" not in card_of(remote, "user/cross")


def test_saelens_reads_what_was_pushed(remote, client, sae_lens, torch, monkeypatch):
    huggingface_hub = client(HF_TOKEN="writer")
    one = trained(2, model_name="gpt2", hook_name="blocks.5.hook_resid_pre")
    one.push_to_hub("user/new")
    one.push_to_hub("user/many", "layer_1")
    # SAELens took its names from the client before the client was told of this hub
    from sae_lens.loading import pretrained_sae_loaders

    monkeypatch.setattr(pretrained_sae_loaders, "hf_hub_download", huggingface_hub.hf_hub_download)
    monkeypatch.setattr(
        pretrained_sae_loaders, "EntryNotFoundError", huggingface_hub.errors.EntryNotFoundError
    )
    # as the cards say
    alone = sae_lens.SAE.load_from_disk(huggingface_hub.snapshot_download("user/new"))
    among = sae_lens.SAE.from_pretrained("user/many", "layer_1")
    f = one.encode(rows())
    for theirs in (alone, among):
        with torch.no_grad():
            found = theirs.encode(torch.from_numpy(rows()))
            decoded = theirs.decode(found)
        np.testing.assert_allclose(found.numpy(), f, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(decoded.numpy(), one.decode(f), rtol=1e-6, atol=1e-6)


# --- the command line, in processes of their own ---


def test_commands(server, tmp_path):
    trained(2, model_name="gpt2").save(tmp_path / "sae")
    np.save(tmp_path / "x.npy", rows())
    (tmp_path / "metrics.json").write_text(json.dumps({"l0": 2.5, "density": [0.1]}))
    given = {**os.environ, **environment(server, tmp_path / "home"), "HF_TOKEN": "writer"}

    def command(*arguments: str, **more: str):
        return subprocess.run(
            [sys.executable, "-m", "sae_jax", *arguments],
            capture_output=True, text=True, cwd=tmp_path, env={**given, **more}, check=False,
        )  # fmt: skip

    done = command("push", "sae", "user/repo", "--path", "layer_1", "--metrics", "metrics.json", "--private")
    assert done.returncode == 0, done.stderr
    url, origin = done.stdout.split()
    assert url.startswith(f"{server.endpoint}/user/repo/commit/")
    assert "| l0 | 2.5 |" in card_of(server, "user/repo", "layer_1/README.md")
    assert server.repos["user/repo"].private
    measured = command("eval", origin, "x.npy", "--json")
    assert measured.returncode == 0, measured.stderr
    assert "l0" in json.loads(measured.stdout)
    seen = command("inspect", origin, "--json")
    assert json.loads(seen.stdout)["metadata"]["model_name"] == "gpt2", seen.stderr
    asked = len(server.requests)
    done = command("convert", origin, "there", "--to", "saelens", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert same(sae_jax.load(tmp_path / "there"), trained(2))
    assert len(server.requests) == asked
    failed = command("push", "sae", "user/repo", HF_TOKEN="reader")
    assert failed.returncode == 2
    assert failed.stderr.count("\n") == 1
