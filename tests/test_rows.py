"""Files larger than memory: read where they lie, equal to their arrays, and refused in one sentence."""

import json
import os
import struct
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from sae_jax import InputError
from sae_jax.data import open_rows, side_by_side, stages, stored

CONTEXT = 4
"""Tokens of a row of the Arrow files made here."""
bfloat16 = ml_dtypes.bfloat16


def write_npy(path, x):
    np.save(path, x)


def write_safetensors(path, x):
    save_file({"x": x}, path)


def write_pt(path, x):
    import torch

    half = x.dtype == bfloat16
    torch.save(torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) if half else torch.from_numpy(x), path)


def write_arrow(path, x, column="blocks.0.mlp", **others):
    """As SAELens saves its cached activations."""
    from datasets import Array2D, Dataset, Features, Sequence, Value

    contexts = x.reshape(-1, CONTEXT, x.shape[-1])
    features = {
        column: Array2D(shape=contexts.shape[1:], dtype=x.dtype.name),
        "token_ids": Sequence(Value("int32"), length=CONTEXT),
        **{name: Array2D(shape=contexts.shape[1:], dtype=x.dtype.name) for name in others},
    }
    told = {column: contexts, "token_ids": np.zeros(contexts.shape[:2], np.int32),
            **{name: other.reshape(contexts.shape) for name, other in others.items()}}  # fmt: skip
    Dataset.from_dict(told, features=Features(features)).save_to_disk(path, num_shards=min(2, len(contexts)))


class Format(NamedTuple):
    name: str
    write: Callable
    dtypes: tuple[str, ...]


FORMATS = {
    "a.npy": Format("a.npy", write_npy, ("<f2", "<f4", "<f8", ">f2", ">f4", ">f8")),
    "a.safetensors": Format("a.safetensors", write_safetensors, ("<f2", "<f4", "<f8", "bfloat16")),
    "a.pt": Format("a.pt", write_pt, ("<f2", "<f4", "<f8", "bfloat16")),
    "arrow": Format("arrow", write_arrow, ("<f2", "<f4", "<f8")),
}
every_format = pytest.mark.parametrize("kind", FORMATS.values(), ids=FORMATS)


@pytest.fixture(autouse=True, scope="module")
def _quiet():
    import datasets

    datasets.disable_progress_bars()


def drawn(rows=40, width=5, dtype="<f4", seed=0):
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.dtype(dtype))


def refused(path, *words, name=None):
    """Opening `path` raises InputError with one line that names it and has these words."""
    with pytest.raises(InputError) as caught:
        open_rows(path, name)
    message = str(caught.value)
    assert "\n" not in message
    for word in (str(path), *words):
        assert word in message, message


# What is read


@settings(max_examples=25, deadline=None)
@given(st.data(), st.sampled_from(list(FORMATS.values())))
def test_any_stretch_is_that_of_the_array(data, kind):
    rows, width = CONTEXT * data.draw(st.integers(1, 8)), data.draw(st.integers(1, 6))
    x = drawn(rows, width, data.draw(st.sampled_from(kind.dtypes)))
    with tempfile.TemporaryDirectory() as folder:
        kind.write(Path(folder) / kind.name, x)
        found = open_rows(Path(folder) / kind.name)
        assert found.shape == (len(found), width) == x.shape
        assert found.dtype == x.dtype.newbyteorder("=")
        for _ in range(5):
            start = data.draw(st.integers(0, rows - 1))
            stop = data.draw(st.integers(start + 1, rows))
            part = found.read(start, stop)
            assert part.dtype == found.dtype
            np.testing.assert_array_equal(part, x[start:stop])


@every_format
def test_a_source_gives_the_rows_of_its_order(kind, tmp_path):
    x = drawn(200, 3)
    kind.write(tmp_path / kind.name, x)
    source = stored(open_rows(tmp_path / kind.name), 48, seed=2, window_rows=64)
    order = source.order.rows_of(0, 9 * 48).reshape(9, 48)
    assert sorted(order.reshape(-1)[:200].tolist()) == list(range(200))
    steps = 0
    for block, stop in stages(source, 0, 9):
        for i in range(int(block.first), stop):
            np.testing.assert_array_equal(block.batch(jnp.int32(i)).x, x[order[i]])
            steps += 1
    assert steps == 9
    np.testing.assert_array_equal(source.batch(jnp.int32(7)).x, x[order[7]])


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_a_file_larger_than_memory_is_not_loaded(suffix, tmp_path):
    """2 TB of which the disk holds a few bytes: reading it would take minutes, and room that is not there."""
    rows, width = 2**30, 512
    path = tmp_path / f"a{suffix}"
    if suffix == ".npy":
        head = np.lib.format.header_data_from_array_1_0(np.zeros((1, 1), np.float32))
        with path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, {**head, "shape": (rows, width)})
    else:
        size = 4 * rows * width
        head = json.dumps({"x": {"dtype": "F32", "shape": [rows, width], "data_offsets": [0, size]}}).encode()
        path.write_bytes(struct.pack("<Q", len(head)) + head)
    begin = path.stat().st_size
    try:
        os.truncate(path, begin + 4 * rows * width)
    except OSError:
        pytest.skip("this disk holds no files with holes of 2 TB")
    middle = drawn(2, width)
    with path.open("r+b") as file:
        file.seek(begin + 4 * width * (rows // 2))
        file.write(middle.tobytes())
    found = open_rows(path)
    assert len(found) == rows
    np.testing.assert_array_equal(found.read(rows // 2 - 1, rows // 2 + 3), np.pad(middle, ((1, 1), (0, 0))))
    assert len(found.read(rows - 10, rows)) == 10
    path.unlink()


@every_format
def test_a_file_is_read_where_it_lies(kind, tmp_path):
    """The kernel lists it among what is mapped into this process."""
    kind.write(tmp_path / kind.name, drawn())
    found = open_rows(tmp_path / kind.name)
    mapped = Path("/proc/self/maps")
    if not mapped.exists():
        pytest.skip("the kernel does not list what is mapped")
    assert str(tmp_path / kind.name) in mapped.read_text()
    assert len(found.read(0, 40)) == 40


def test_several_arrays_are_told_apart_by_name(tmp_path):
    import torch

    first, second = drawn(), drawn(20, 5, seed=1)
    save_file({"b": second, "a": first}, tmp_path / "s.safetensors")
    torch.save({"b": torch.from_numpy(second), "a": torch.from_numpy(first), "epoch": 3}, tmp_path / "s.pt")
    torch.save({3: torch.from_numpy(first), 4: torch.from_numpy(second)}, tmp_path / "layers.pt")
    for path in (tmp_path / "s.safetensors", tmp_path / "s.pt"):
        np.testing.assert_array_equal(open_rows(path, "a").read(0, 40), first)
        np.testing.assert_array_equal(open_rows(path, "b").read(3, 9), second[3:9])
        refused(path, "several arrays (a, b)", "--array NAME")
        refused(path, "no array 'c'; it holds a, b", name="c")
    np.testing.assert_array_equal(open_rows(tmp_path / "layers.pt", "4").read(0, 20), second)
    write_arrow(tmp_path / "arrow", first, "a", b=first[::-1])
    np.testing.assert_array_equal(open_rows(tmp_path / "arrow", "a").read(0, 40), first)
    np.testing.assert_array_equal(open_rows(tmp_path / "arrow", "b").read(5, 15), first[::-1][5:15])
    refused(tmp_path / "arrow", "several arrays (a, b)")
    refused(tmp_path / "arrow", "no array 'token_ids'; it holds a, b", name="token_ids")


def test_tensors_as_they_are_found_in_the_wild(tmp_path):
    import torch

    x = torch.from_numpy(drawn())
    for tensor in (
        x,
        {"x": x, "y": "a name"},
        torch.nn.Parameter(x),
        x.T.contiguous().T,
        torch.cat([x, x])[:40],
    ):
        torch.save(tensor, tmp_path / "a.pt")
        np.testing.assert_array_equal(open_rows(tmp_path / "a.pt").read(1, 39), x[1:39].numpy())


def test_rows_in_another_order_of_memory_or_bytes(tmp_path):
    x = drawn()
    np.save(tmp_path / "a.npy", np.asfortranarray(x.astype(">f4")))
    found = open_rows(tmp_path / "a.npy")
    np.testing.assert_array_equal(found.read(7, 19), x[7:19])
    source = stored(found, 8)
    np.testing.assert_array_equal(source.batch(jnp.int32(0)).x, x[source.order.rows_of(0, 8)])


def test_sources_of_a_crosscoder(tmp_path):
    x, y = drawn(), drawn(seed=1)
    np.save(tmp_path / "both.npy", np.stack([x, y], axis=1))
    np.save(tmp_path / "x.npy", x)
    save_file({"y": y}, tmp_path / "y.safetensors")
    both = open_rows(tmp_path / "both.npy")
    of_two = side_by_side([open_rows(tmp_path / "x.npy"), open_rows(tmp_path / "y.safetensors")])
    assert both.shape == of_two.shape == (40, 2, 5)
    np.testing.assert_array_equal(both.read(3, 8), of_two.read(3, 8))
    np.save(tmp_path / "z.npy", x[:30])
    with pytest.raises(InputError, match=r"must be alike, .* \[40, 5\] float32 .* \[30, 5\] float32"):
        side_by_side([open_rows(tmp_path / "x.npy"), open_rows(tmp_path / "z.npy")])


def test_what_saelens_caches_is_read(tmp_path, sae_lens):
    """Its own runner on a model from disk, and the same model's activations on the tokens it saved."""
    import datasets
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(["<s>", "<unk>", *"abcdefghijklmnop"])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "model"
    PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", unk_token="<unk>", eos_token="<s>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = GPT2Config(vocab_size=len(words), n_positions=16, n_embd=8, n_layer=1, n_head=2)
    model = AutoModelForCausalLM.from_config(sizes).eval()
    model.save_pretrained(folder)
    draw = np.random.default_rng(0)
    texts = datasets.Dataset.from_dict(
        {"text": [" ".join(draw.choice(list(words)[2:], 40)) for _ in range(20)]}
    )
    options = sae_lens.CacheActivationsRunnerConfig(
        dataset_path="none", model_name=str(folder), model_class_name="AutoModelForCausalLM",
        hook_name="transformer.h.0.mlp", d_in=8, context_size=8, training_tokens=96, model_batch_size=2,
        buffer_size_gb=1e-6, device="cpu", new_cached_activations_path=str(tmp_path / "cached"),
    )  # fmt: skip
    with warnings.catch_warnings(action="ignore"):
        saved = sae_lens.CacheActivationsRunner(options, override_dataset=texts).run()
    assert len(list((tmp_path / "cached").glob("*.arrow"))) > 1

    seen = []
    model.transformer.h[0].mlp.register_forward_hook(lambda module, inputs, output: seen.append(output))
    on_disk = datasets.load_from_disk(str(tmp_path / "cached"))
    with torch.no_grad():
        model(torch.tensor(np.array(on_disk["token_ids"])))
    expected = seen[0].numpy().reshape(-1, 8)
    found = open_rows(tmp_path / "cached")
    assert found.shape == (96, 8) == (8 * len(saved), 8)
    np.testing.assert_allclose(found.read(0, 96), expected, rtol=1e-6, atol=1e-7)
    whole = np.array(on_disk["transformer.h.0.mlp"], np.float32).reshape(-1, 8)
    np.testing.assert_array_equal(found.read(0, 96), whole)
    source = stored(found, 32, window_rows=64)
    np.testing.assert_array_equal(source.batch(jnp.int32(2)).x, whole[source.order.rows_of(64, 96)])


# What is refused


@every_format
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_told_with_its_row(kind, bad, tmp_path):
    for dtype in kind.dtypes:
        x = drawn(dtype=dtype)
        x[17, 3] = x[30, 0] = bad
        path = tmp_path / dtype.strip("<>") / dtype[:1] / kind.name
        path.parent.mkdir(parents=True)
        kind.write(path, x)
        found = open_rows(path)
        np.testing.assert_array_equal(found.read(0, 17), x[:17])
        for start, stop in ((0, 40), (17, 18), (12, 20)):
            with pytest.raises(InputError, match=f"{path} holds NaN or infinity, first in row 17"):
                found.read(start, stop)
        with pytest.raises(InputError, match="row 30"):
            found.read(18, 40)
        with pytest.raises(InputError, match="holds NaN or infinity"):
            for _ in stages(stored(found, 8), 0, 5):
                pass


X = drawn()


@every_format
@pytest.mark.parametrize(
    ("array", "words"),
    [
        (X.astype(np.int32), ["real floating-point numbers", "int32"]),
        (X[:, :0], ["no rows or no columns", "[40, 0]"]),
        (X[:0], ["no rows or no columns", "[0, 5]"]),
        (X[0, 0], ["must be [rows, d_in], got []"]),
        (X[0], ["must be [rows, d_in], got [5]"]),
        (X.reshape(2, 2, 2, 25), ["must be [rows, d_in], got [2, 2, 2, 25]"]),
    ],
)
def test_what_is_no_matrix_of_floats_is_refused(kind, array, words, tmp_path):
    if kind.name == "arrow" and (array.ndim != 2 or array.size == 0):
        return  # `datasets` does not write it, or has columns of arrays of one number of axes
    kind.write(tmp_path / kind.name, np.asarray(array))
    refused(tmp_path / kind.name, *words)


@every_format
def test_a_file_that_is_cut_off_is_refused(kind, tmp_path):
    kind.write(tmp_path / kind.name, drawn(400))
    path = tmp_path / kind.name
    path = sorted(path.glob("*.arrow"))[1] if path.is_dir() else path
    content = path.read_bytes()
    for size in (0, 5, 100, len(content) // 2, len(content) - 30):
        path.write_bytes(content[:size])
        refused(tmp_path / kind.name)
    path.unlink()
    refused(tmp_path / kind.name)
    path.write_bytes(content)
    open_rows(tmp_path / kind.name)


def test_a_pickle_with_code_does_not_run(tmp_path):
    import torch

    class Code:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save({"x": torch.from_numpy(X), "then": Code()}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "more than tensors", "could run code")
    np.save(tmp_path / "a.npy", np.array([Code()], dtype=object))
    refused(tmp_path / "a.npy")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert (tmp_path / "ran").exists()


def test_torch_files_without_a_matrix_are_refused(tmp_path):
    import torch

    x, path = torch.from_numpy(X), tmp_path / "a.pt"
    for value, words in (
        ([x], "holds a list, not a tensor"),
        ({"epoch": 3}, "holds no arrays"),
        (x.to_sparse(), "holds a sparse tensor"),
        (x.to(torch.complex64), "real floating-point numbers"),
        (x.to(torch.float8_e4m3fn), "Float8_e4m3fn"),
    ):
        torch.save(value, path)
        refused(path, words)
    torch.save(x, path)
    refused(path, "one tensor, which has no name", name="x")
    torch.save(x, path, _use_new_zipfile_serialization=False)
    refused(path, "torch older than 1.6")


def test_arrow_folders_without_a_matrix_are_refused(tmp_path):
    from datasets import Array2D, Dataset, DatasetDict, Features

    alike = Features({"a": Array2D(shape=(CONTEXT, 5), dtype="float32")})
    uneven = Features({"a": Array2D(shape=(None, 5), dtype="float32")})
    contexts = {"a": X.reshape(-1, CONTEXT, 5)}
    DatasetDict({"train": Dataset.from_dict(contexts, features=alike)}).save_to_disk(tmp_path / "splits")
    refused(tmp_path / "splits", "several splits")
    open_rows(tmp_path / "splits" / "train")
    Dataset.from_dict(contexts, features=uneven).save_to_disk(tmp_path / "uneven")
    refused(tmp_path / "uneven", "contexts of several lengths")
    Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "texts")
    refused(tmp_path / "texts", "holds no arrays")
    Dataset.from_dict({"a": []}, features=alike).save_to_disk(tmp_path / "none")
    refused(tmp_path / "none")
    (tmp_path / "splits" / "train" / "state.json").write_text("{")
    refused(tmp_path / "splits" / "train", "neither a store nor a folder saved by `datasets`")


def test_other_bad_input(tmp_path):
    refused(tmp_path / "none.npy", "does not exist")
    (tmp_path / "a.csv").write_text("1,2")
    refused(tmp_path / "a.csv", "must end in one of .npy, .safetensors, .pt")
    (tmp_path / "folder.npy").mkdir()
    refused(tmp_path / "folder.npy", "neither a store nor a folder saved by `datasets`")
    np.save(tmp_path / "a.npy", X)
    refused(tmp_path / "a.npy", "which has no name to ask for", name="x")
    np.save(tmp_path / "long.npy", X.astype(np.longdouble))
    refused(tmp_path / "long.npy", "at most 64 bits")
    np.savez(tmp_path / "b.npz", x=X)
    (tmp_path / "b.npz").rename(tmp_path / "b.npy")
    refused(tmp_path / "b.npy")
    save_file({}, tmp_path / "a.safetensors")
    refused(tmp_path / "a.safetensors", "holds no arrays")
