"""A store: what was written is read, what is damaged is told, what was not committed does not exist."""

import dataclasses
import errno
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import Crc32cCodec, ShardingCodec

from sae_jax import InputError
from sae_jax.data import manifest, open_store, stages, stored
from sae_jax.data import store as stores
from sae_jax.data.manifest import Reached
from sae_jax.data.writer import begun, writing

WIDTHS = {"blocks.0.mlp": 24, "embed/out": 5}
CHUNK, SHARD = 8, 32
ROWS = 3 * SHARD + 13
"""No multiple of a shard, nor of a chunk."""


def empty(dtype="float32", widths=None, about=None, chunk=CHUNK, shard=SHARD):
    """The manifest of a store of small shards."""
    made = begun(widths or WIDTHS, dtype=dtype, about=about)
    return dataclasses.replace(made, chunk_rows=chunk, shard_rows=shard)


def columns(n=ROWS, widths=None, seed=0):
    """Activations by site, tokens, positions."""
    draw = np.random.default_rng(seed)
    scales = {name: 1 + 3 * number for number, name in enumerate(widths or WIDTHS)}
    x = {
        name: (scales[name] * draw.normal(1, 1, (n, width))).astype(np.float32)
        for name, width in (widths or WIDTHS).items()
    }
    return x, draw.integers(0, 50_000, n).astype(np.int32), (np.arange(n) % 16).astype(np.int32)


def append(writer, data, stop=None, step=None):
    """Give the writer the rows from where it stands, `step` at a time."""
    x, tokens, positions = data
    stop = len(tokens) if stop is None else stop
    start = writer.rows
    while start < stop:
        end = min(stop, start + (step or stop))
        part = slice(start, end)
        own = {name: rows[part] for name, rows in x.items()}
        writer.append(own, tokens[part], positions[part], Reached(0, start, "of the tokens"))
        start = end


def write(location, data, begun_as=None, step=None):
    with writing(location, begun_as or empty()) as writer:
        append(writer, data, step=step)
        return writer.finish()


def files(folder):
    """The bytes of every file below."""
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for path in Path(folder).rglob("*") if path.is_file()}  # fmt: skip


def assert_holds(store, data, stop=None):
    x, tokens, positions = data
    stop = len(tokens) if stop is None else stop
    assert store.rows == stop
    for name, rows in x.items():
        site = store.site(name)
        assert site.shape == (stop, rows.shape[1])
        np.testing.assert_array_equal(site.read(0, stop), rows[:stop].astype(site.dtype))
    np.testing.assert_array_equal(store.tokens.read(0, stop), tokens[:stop])
    np.testing.assert_array_equal(store.positions.read(0, stop), positions[:stop])


def refused(call, *words):
    """`call` raises InputError with one line that has these words; the line."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


def interrupted(location, data, stop, begun_as=None, step=None):
    """Write the rows up to `stop`, and be told to end there."""
    with suppress(KeyboardInterrupt), writing(location, begun_as or empty()) as writer:
        append(writer, data, stop, step)
        raise KeyboardInterrupt


# Written and read


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_what_was_written_is_read(data):
    n, chunk, several = data.draw(st.tuples(st.integers(1, 60), st.integers(3, 9), st.integers(1, 4)))
    dtype = data.draw(st.sampled_from(["float32", "float16", "bfloat16"]))
    start, stop = sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n))))
    step = data.draw(st.integers(1, n))
    x, tokens, positions = found = columns(n)
    with tempfile.TemporaryDirectory() as folder:
        write(folder, found, empty(dtype, chunk=chunk, shard=chunk * several), step)
        store = open_store(folder)
        assert_holds(store, found)
        assert store.sites == tuple(WIDTHS)
        for name, rows in x.items():
            part = store.site(name).read(start, stop)
            assert part.dtype == store.site(name).dtype == jnp.dtype(dtype)
            np.testing.assert_array_equal(part, rows[start:stop].astype(part.dtype))
        np.testing.assert_array_equal(store.tokens.read(start, stop), tokens[start:stop])
        np.testing.assert_array_equal(store.positions.read(start, stop), positions[start:stop])
        assert store.tokens.dtype == store.positions.dtype == np.int32


def test_zeros_are_rows_like_others(tmp_path):
    """zarr leaves out chunks of zeros, and a chunk that is missing is an error here."""
    x, tokens, positions = columns()
    x["blocks.0.mlp"][CHUNK : 5 * CHUNK] = 0
    found = ({**x, "embed/out": 0 * x["embed/out"]}, 0 * tokens, 0 * positions)
    write(tmp_path / "s", found)
    assert_holds(open_store(tmp_path / "s"), found)


@pytest.mark.parametrize("name", ["c", "a b", "a/b.c", "a%2Fb", "a?b#c", "é", ".h", "x[0]:(y)", "tokens/"])
@pytest.mark.parametrize("url", [False, True])
def test_a_site_may_have_any_name(name, url, tmp_path):
    data = columns(20, {name: 3})
    write(f"file://{tmp_path}/s" if url else tmp_path / "s", data, empty(widths={name: 3}))
    assert_holds(open_store(tmp_path / "s"), data)
    assert_holds(open_store(f"file://{tmp_path}/s/"), data)
    [folder] = set(os.listdir(tmp_path / "s")) - {"tokens", "positions", "zarr.json", "manifest.json"}
    assert zarr.open_array(tmp_path / "s" / folder, mode="r").shape == (20, 3)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("mean", [0.0, 300.0])
def test_the_statistics_are_those_of_the_stored_values(dtype, mean, tmp_path):
    n, width = 10_000, 7
    x = np.random.default_rng(1).normal(mean, np.arange(1, width + 1), (n, width)).astype(np.float32)
    data = ({"a": x}, np.zeros(n, np.int32), np.zeros(n, np.int32))
    write(tmp_path / "s", data, empty(dtype, {"a": width}, chunk=1000, shard=6000), step=777)
    store = open_store(tmp_path / "s")
    found = store.manifest.sites["a"]
    exact = store.site("a").read(0, n).astype(np.float64)
    assert found.rows == n
    scale = np.sqrt((exact**2).mean(axis=0))
    np.testing.assert_allclose(found.mean, exact.mean(axis=0), rtol=0, atol=1e-6 * scale.min())
    np.testing.assert_allclose(found.variance, exact.var(axis=0), rtol=2e-6)
    assert found.mean_norm == pytest.approx(np.linalg.norm(exact, axis=1).mean(), rel=1e-6)


def test_the_manifest_says_where_the_rows_come_from(tmp_path):
    about = {"model": "gpt2", "context": 128, "begin": None, "nested": {"texts": ["a", "ü"]}}
    write(tmp_path / "s", columns(), empty(about=about))
    assert open_store(tmp_path / "s").manifest.about == about
    told = json.loads((tmp_path / "s" / "manifest.json").read_text())
    assert told["about"] == about
    assert (told["rows"], told["dtype"], told["sites"]["embed/out"]["d_in"]) == (ROWS, "float32", 5)
    assert zarr.open_group(tmp_path / "s", mode="r").attrs.asdict() == about


def test_what_a_full_size_store_is_made_of():
    made = begun({"a": 512, "b": 64}, dtype="bfloat16")
    assert (made.chunk_rows, made.shard_rows) == (2048, 65_536)
    wide = begun({"a": 16_384}, dtype="float32")
    assert (wide.chunk_rows, wide.shard_rows) == (1024, 1024)
    narrow = begun({"a": 1}, dtype="float16")
    assert (narrow.chunk_rows, narrow.shard_rows) == (4096, 65_536)


# Other readers


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_zarr_opens_it(dtype, tmp_path):
    x, tokens, positions = data = columns()
    write(tmp_path / "s", data, empty(dtype))
    group = zarr.open_group(tmp_path / "s", mode="r")
    assert sorted(group.array_keys()) == ["blocks.0.mlp", "embed%2Fout", "positions", "tokens"]
    for name, rows in {**x, "tokens": tokens, "positions": positions}.items():
        array = group[name.replace("/", "%2F")]
        assert isinstance(array, zarr.Array)
        assert array.shape == rows.shape
        of = dtype if name in x else "int32"
        assert array.attrs.asdict() == {"dtype": of}
        assert array.dtype == ("uint16" if of == "bfloat16" else of)
        np.testing.assert_array_equal(np.asarray(array[:]).view(jnp.dtype(of)), rows.astype(jnp.dtype(of)))
        [sharding] = array.metadata.codecs
        assert isinstance(sharding, ShardingCodec)
        assert sharding.chunk_shape[0] == CHUNK
        assert array.metadata.chunk_grid.chunk_shape[0] == SHARD
        for codecs in (sharding.codecs, sharding.index_codecs):
            assert any(isinstance(codec, Crc32cCodec) for codec in codecs)


def test_zarr_notices_a_flipped_byte_too(tmp_path):
    write(tmp_path / "s", columns())
    shard = tmp_path / "s" / "blocks.0.mlp" / "c" / "1" / "0"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    array = zarr.open_group(tmp_path / "s", mode="r")["blocks.0.mlp"]
    with pytest.raises(ValueError, match="checksum"):
        array[:]


# Damage


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """A store of 300 kB in 20 files."""
    folder = tmp_path_factory.mktemp("larger") / "s"
    widths = {"a": 48, "b": 20}
    write(folder, columns(2000, widths), empty("bfloat16", widths, chunk=128, shard=512))
    return folder


def read_directly(location) -> list[bytes]:
    """All that a store tells."""
    store = open_store(location)
    rows = [*map(store.site, store.sites), store.tokens, store.positions]
    return [store.manifest.write(), *(each.read(0, store.rows).tobytes() for each in rows)]


def streamed(location, site) -> list[bytes]:
    """The batches of an epoch."""
    source = stored(open_store(location).site(site), 500, 0, window_rows=600)
    blocks = [(np.asarray(block.columns[0]), stop - int(block.first)) for block, stop in stages(source, 0, 4)]
    return [x[:count].tobytes() for x, count in blocks]


READINGS = (read_directly, partial(streamed, site="a"), partial(streamed, site="b"))


def outcome(reading, location):
    """What is read, or the sentence that says why it cannot be."""
    try:
        return reading(location)
    except InputError as error:
        return str(error)


def test_a_damaged_byte_is_told_or_harmless(larger):
    """200 bytes at random, at least one in each file."""
    paths = sorted(path for path in larger.rglob("*") if path.is_file())
    sizes = np.array([path.stat().st_size for path in paths])
    draw = np.random.default_rng(0)
    hit = [*range(len(paths)), *draw.choice(len(paths), 200 - len(paths), p=sizes / sizes.sum())]
    good = [reading(larger) for reading in READINGS]
    told = harmless = 0
    for path in (paths[number] for number in hit):
        content = path.read_bytes()
        damaged = bytearray(content)
        damaged[draw.integers(len(content))] ^= int(draw.integers(1, 256))
        path.write_bytes(damaged)
        found = [outcome(reading, larger) for reading in READINGS]
        path.write_bytes(content)
        for each, right in zip(found, good, strict=True):
            names_it = isinstance(each, str) and each.startswith(f"{path} is ") and "\n" not in each
            assert names_it or each == right, (path, each)
        told += any(isinstance(each, str) for each in found)
        harmless += found == good
    assert told + harmless == 200
    assert told > 150
    # `zarr.json`, which is for other readers, and white space in the manifest
    assert harmless >= sum(path.name == "zarr.json" for path in paths) == 5


def test_a_file_that_is_cut_off_or_gone_is_named(larger):
    paths = sorted(path for path in larger.rglob("*") if path.is_file() and path.name != "zarr.json")
    assert len(paths) == 1 + 4 * 4
    for path in paths:
        content = path.read_bytes()
        for damaged in (content[: len(content) // 2], content[:-1], b"", content + b"x"):
            path.write_bytes(damaged)
            assert refused(lambda: read_directly(larger)).startswith(f"{path} is damaged")
        path.unlink()
        refused(lambda: read_directly(larger), *([str(path)] if path.name != "manifest.json" else []),
                path.name)  # fmt: skip
        path.write_bytes(content)
    read_directly(larger)


@settings(max_examples=100, deadline=None)
@given(st.one_of(st.binary(), st.recursive(
    st.none() | st.integers() | st.text() | st.sampled_from([manifest.FORMAT]),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["format", "version", "sha256"]), inner),
).map(lambda value: json.dumps(value).encode())))  # fmt: skip
def test_what_is_no_manifest_is_refused(text):
    with pytest.raises(InputError):
        manifest.read(text, "manifest.json")


@pytest.mark.parametrize("text", [b"", b"hello", b"null", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000,
                                  b'{"format": "sae_jax activation store"}'])  # fmt: skip
def test_a_folder_with_another_manifest_is_refused(text, tmp_path):
    (tmp_path / "manifest.json").write_bytes(text)
    refused(lambda: open_store(tmp_path), f"{tmp_path}/manifest.json is damaged")


def test_a_newer_version_is_refused(tmp_path):
    write(tmp_path / "s", columns())
    path = tmp_path / "s" / "manifest.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    refused(lambda: open_store(tmp_path / "s"), str(path), "version 2", "up to 1", "update it")
    refused(lambda: write(tmp_path / "s", columns()), "version 2")


def test_a_manifest_is_read_as_it_was_written_or_not_at_all(larger):
    text = (larger / "manifest.json").read_bytes()
    draw = np.random.default_rng(0)
    assert manifest.read(text, "it").write() == text
    same = 0
    for place in draw.choice(len(text), 500, replace=False):
        damaged = bytearray(text)
        damaged[place] ^= int(draw.integers(1, 256))
        with suppress(InputError):
            assert manifest.read(bytes(damaged), "it").write() == text, place
            same += 1
    assert same < 25  # white space


# Crashes


@settings(max_examples=10, deadline=None)
@given(
    n=st.integers(1, 40),
    cuts=st.lists(st.integers(0, 40), max_size=3),
    step=st.integers(1, 15),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_a_write_that_was_interrupted_goes_on_to_the_same_bytes(n, cuts, step, dtype):
    data, shard = columns(n), 8
    begun_as = empty(dtype, about={"model": "m"}, chunk=4, shard=shard)
    with tempfile.TemporaryDirectory() as folder:
        whole, parts = Path(folder) / "whole", Path(folder) / "parts"
        write(whole, data, begun_as)
        for cut in cuts:
            before = open_store(parts, unfinished=True).rows if parts.exists() else 0
            interrupted(parts, data, min(cut, n), begun_as, step)
            rows = max(before, min(cut, n) // shard * shard)
            assert parts.exists() == (rows > 0)
            if rows:
                refused(lambda: open_store(parts), "still being written", f"interrupted after {rows:,} rows")
                assert_holds(open_store(parts, unfinished=True), data, rows)
        write(parts, data, begun_as, step)
        assert files(parts) == files(whole)
        assert_holds(open_store(parts), data)


def test_what_the_manifest_does_not_count_does_not_exist(tmp_path):
    data = columns()
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    write(whole, data)
    interrupted(parts, data, 2 * SHARD + 5)
    manifest_of_then = (parts / "manifest.json").read_bytes()
    for folder in ("blocks.0.mlp", "embed%2Fout"):
        # a later shard that got on disk, or half of one, or the file it was to be renamed from
        (parts / folder / "c" / "2").mkdir()
        shutil.copy(whole / folder / "c" / "0" / "0", parts / folder / "c" / "2" / "0")
        (parts / folder / "c" / "3").mkdir()
        (parts / folder / "c" / "3" / "0.__lock").write_bytes(b"half a shard")
    (parts / "tokens" / "c" / "2").write_bytes(b"nothing of a shard")
    (parts / "manifest.json.__lock").write_bytes(manifest_of_then[:50])
    (parts / "positions" / "zarr.json").unlink()
    assert_holds(open_store(parts, unfinished=True), data, 2 * SHARD)
    write(parts, data)
    assert files(parts) == files(whole)


def test_a_kill_while_a_store_is_begun_is_no_stranger(tmp_path):
    (tmp_path / "manifest.json.__lock").write_bytes(b"{")
    write(tmp_path, columns())
    assert_holds(open_store(tmp_path), columns())


def test_who_reads_while_another_writes_has_the_rows_of_that_moment(tmp_path):
    data = columns()
    with writing(tmp_path / "s", empty()) as writer:
        append(writer, data, SHARD)
        then = open_store(tmp_path / "s", unfinished=True)
        append(writer, data)
        later = open_store(tmp_path / "s", unfinished=True)
        writer.finish()
    assert_holds(then, data, SHARD)
    assert_holds(later, data, 3 * SHARD)
    assert_holds(open_store(tmp_path / "s"), data)


def test_a_value_that_does_not_fit_is_told_with_its_row(tmp_path):
    x, tokens, positions = columns()
    x["embed/out"][SHARD + 3, 2] = 1e6
    message = refused(
        lambda: write(tmp_path / "s", (x, tokens, positions), empty("float16")), "embed/out", "float16"
    )
    assert message.endswith(f"row {SHARD + 3}")
    assert open_store(tmp_path / "s", unfinished=True).rows == SHARD


def test_an_empty_store_leaves_nothing(tmp_path):
    for folder in (tmp_path / "new", tmp_path / "there"):
        if folder.name == "there":
            folder.mkdir()
        interrupted(folder, columns(), SHARD - 1)
    with writing(f"file://{tmp_path}/url", empty()) as writer:
        writer.finish()
    assert not files(tmp_path)
    assert not (tmp_path / "new").exists()


# A full disk


@pytest.mark.parametrize("small_disk", [1024], indirect=True)
def test_a_full_disk_keeps_what_is_stored_and_goes_on(small_disk, tmp_path):
    data = columns(3000)
    begun_as = empty(chunk=64, shard=128)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(800_000))
    with pytest.raises(
        OSError, match=r"the disk is full; the first .* rows are stored and stay good"
    ) as full:
        write(small_disk / "s", data, begun_as)
    assert full.value.errno == errno.ENOSPC
    assert full.value.filename == str(small_disk / "s")
    rows = open_store(small_disk / "s", unfinished=True).rows
    assert 0 < rows < 3000
    assert f"the first {rows:,} rows" in str(full.value)
    assert_holds(open_store(small_disk / "s", unfinished=True), data, rows)
    filler.unlink()
    write(small_disk / "s", data, begun_as)
    write(tmp_path / "whole", data, begun_as)
    assert files(small_disk / "s") == files(tmp_path / "whole")


@pytest.mark.parametrize("small_disk", [1024], indirect=True)
def test_a_disk_that_is_full_before_the_first_row(small_disk):
    (small_disk / "filler").write_bytes(bytes(1_044_000))
    with pytest.raises(OSError, match="the disk is full; nothing is stored yet") as full:
        write(small_disk / "s", columns())
    assert full.value.errno == errno.ENOSPC
    assert os.listdir(small_disk) == ["filler"]


# Who may write


def test_a_second_process_is_refused(tmp_path):
    program = f"""
from sae_jax.data.writer import begun, writing
with writing({str(tmp_path / "s")!r}, begun({{"a": 3}})):
    pass
"""
    with writing(tmp_path / "s", empty()) as writer:
        append(writer, columns(), SHARD)
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert "InputError" in done.stderr
        assert f"{tmp_path / 's'} is being written by another process" in done.stderr
        append(writer, columns())
        writer.finish()
    assert_holds(open_store(tmp_path / "s"), columns())


def test_a_finished_store_is_not_written_again(tmp_path):
    write(tmp_path / "s", columns())
    before = files(tmp_path / "s")
    refused(lambda: write(tmp_path / "s", columns()), f"{tmp_path / 's'} is complete", f"{ROWS} rows")
    assert files(tmp_path / "s") == before


def test_strangers_are_left_alone(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    refused(lambda: write(tmp_path, columns()), str(tmp_path), "not empty and holds no store")
    refused(lambda: write(tmp_path / "letter.txt", columns()), "is a file, not a folder")
    assert files(tmp_path) == {"letter.txt": b"dear"}


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (empty("float16"), ["dtype was float32, now float16"]),
        (empty(about={"model": "n", "context": 8}), ["model was m, now n"]),
        (empty(about={"model": "m"}), ["context was 8, now None"]),
        (empty(about={"model": "n", "context": 9}), ["model was m, now n; context was 8, now 9"]),
        (empty(widths={"a": 5}, about={"model": "m", "context": 8}),
         ["sites was ['blocks.0.mlp', 'embed/out'], now ['a']"]),
    ],
)  # fmt: skip
def test_other_options_do_not_go_on(other, words, tmp_path):
    interrupted(tmp_path / "s", columns(), SHARD, empty(about={"model": "m", "context": 8}))
    before = files(tmp_path / "s")
    refused(lambda: write(tmp_path / "s", columns(), other), "begun with other options", *words)
    assert files(tmp_path / "s") == before


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: begun({}), "at least one site"),
        (lambda: begun({"a": 3}, dtype="float64"), "float32, float16, bfloat16, not float64"),
        (lambda: begun({"": 3}), "a site cannot be called ''"),
        (lambda: begun({"tokens": 3}), "a site cannot be called 'tokens'"),
        (lambda: begun({"manifest.json": 3}), "a site cannot be called 'manifest.json'"),
        (lambda: begun({"zarr.json": 3}), "a site cannot be called 'zarr.json'"),
        (lambda: begun({"..": 3}), "a site cannot be called '..'"),
        (lambda: begun({"x" * 300: 3}), "a site cannot be called 'xxx"),
        (lambda: open_store("/nowhere/at/all"), "/nowhere/at/all is no store"),
        (lambda: open_store(os.devnull), os.devnull),
        (lambda: open_store("ftp://host/acts/"), 'unsupported URL scheme "ftp"'),
        (lambda: write("file:///proc/acts", columns()), "file:///proc/acts cannot be written"),
    ],
)
def test_bad_input_is_one_sentence(call, words):
    refused(call, words)


def test_a_site_is_named_where_there_are_several(tmp_path):
    store = write(tmp_path / "s", columns())
    refused(store.site, f"{tmp_path / 's'} holds several sites", "blocks.0.mlp, embed/out", "--site NAME")
    refused(lambda: store.site("mlp"), "has no site 'mlp'; it holds blocks.0.mlp, embed/out")
    one = write(tmp_path / "one", columns(9, {"a": 3}), empty(widths={"a": 3}))
    assert one.site().shape == (9, 3)


# URLs


class Ranges(http.server.SimpleHTTPRequestHandler):
    """Files, and parts of them, as every web server but Python's own gives them."""

    def do_GET(self):
        path = Path(self.translate_path(self.path))
        if path.parent.name == "secret":
            return self.send_error(403)
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not asked or not path.is_file():
            return super().do_GET()
        content, (first, last) = path.read_bytes(), asked.groups()
        begin = int(first) if first else len(content) - int(last)
        end = min(int(last) + 1 if first and last else len(content), len(content))
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(content)}")
        self.send_header("Content-Length", str(end - begin))
        self.end_headers()
        self.wfile.write(content[begin:end])

    def log_message(self, *args):
        pass


class WithoutRanges(http.server.SimpleHTTPRequestHandler):
    """Whole files only."""

    def log_message(self, *args):
        pass


@pytest.fixture(params=[Ranges])
def served(request, tmp_path):
    """The address of the test's folder."""
    handler = partial(request.param, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_store_is_read_through_http(served, tmp_path):
    data = columns()
    write(tmp_path / "acts", data)
    for location in (f"{served}/acts/", f"{served}/acts"):
        assert_holds(open_store(location), data)
    for name in WIDTHS:
        far, near = (stored(open_store(at).site(name), 20, 3, window_rows=40)
                     for at in (f"{served}/acts/", tmp_path / "acts"))  # fmt: skip
        for (ours, stop), (theirs, same) in zip(stages(far, 0, 9), stages(near, 0, 9), strict=True):
            assert stop == same
            count = stop - int(ours.first)
            np.testing.assert_array_equal(ours.columns[0][:count], theirs.columns[0][:count])


def test_what_is_wrong_behind_http_is_told(served, tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "RETRIES", 0)
    refused(lambda: open_store(f"{served}/none/"), f"{served}/none/ is no store")
    refused(lambda: open_store(f"{served}/secret/"), f"{served}/secret/ cannot be read", "403")
    write(tmp_path / "acts", columns())
    (tmp_path / "acts" / "tokens" / "c" / "1").unlink()
    store = open_store(f"{served}/acts/")
    refused(lambda: store.tokens.read(0, ROWS), f"{served}/acts/tokens/c/1 is damaged or missing")
    refused(lambda: write(f"{served}/new/", columns()), f"{served}/new/ cannot be written")


@pytest.mark.parametrize("served", [WithoutRanges], indirect=True)
def test_a_server_that_gives_no_ranges_is_told(served, tmp_path):
    write(tmp_path / "acts", columns())
    store = open_store(f"{served}/acts/")
    refused(lambda: store.tokens.read(0, 3), "range", "was ignored by server")


def test_a_server_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setattr(stores, "RETRIES", 0)
    refused(lambda: open_store("http://127.0.0.1:9/acts/"), "http://127.0.0.1:9/acts/ cannot be read")


def test_a_bucket_without_credentials_is_told(monkeypatch):
    monkeypatch.setattr(stores, "RETRIES", 0)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    refused(lambda: open_store("s3://sae-jax-no-such-bucket/acts/"), "acts/ cannot be read")


def test_a_url_is_written_to(tmp_path):
    data = columns()
    write(f"file://{tmp_path}/acts/", data)
    write(tmp_path / "same", data)
    assert_holds(open_store(f"file://{tmp_path}/acts"), data)
    assert files(tmp_path / "acts") == files(tmp_path / "same")


# Memory


def test_memory_does_not_grow_with_the_store(tmp_path):
    width, rows = 128, 100_000
    x = np.random.default_rng(0).normal(size=(rows, width)).astype(np.float32)
    numbers = np.arange(rows, dtype=np.int32)
    for name, times in (("small", 1), ("large", 4)):
        with writing(tmp_path / name, empty(widths={"a": width}, chunk=1024, shard=16_384)) as writer:
            for turn in range(times):
                writer.append({"a": x}, numbers, numbers, Reached(turn, 0, ""))
            writer.finish()
    program = """
import resource, sys
from sae_jax.data import open_store, stages, stored
for location in sys.argv[1:]:
    x = open_store(location).site()
    steps = len(x) // 1024
    for block, stop in stages(stored(x, 1024, window_rows=8192), 0, steps):
        block.columns[0].block_until_ready()
    assert stop == steps
    print(len(x) * 512, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
    paths = [str(tmp_path / name) for name in ("small", "small", "large")]
    done = subprocess.run([sys.executable, "-c", program, *paths], capture_output=True, text=True, check=True)
    _, (small, before), (large, after) = (map(int, line.split()) for line in done.stdout.splitlines())
    assert large - small == 3 * 51_200_000
    assert after - before < 20_000_000
