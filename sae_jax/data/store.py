"""A store: activations on disk or behind a URL, as zarr v3 arrays that any zarr reader opens.

Rows are tokens. Each site of a model has an array, and so have the tokens and their positions. Every chunk
carries a checksum. What the manifest does not count does not exist, and it is replaced as a whole after the
rows that it counts are on disk.
"""

import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jax.numpy as jnp
import numpy as np

from sae_jax.base import InputError, require
from sae_jax.data import manifest
from sae_jax.data.manifest import Manifest, Reached
from sae_jax.data.rows import Rows, chunk_rows_for, require_finite

SHARD_BYTES = 2**26
"""About how much of a site's rows a file holds."""
MOST_ROWS_OF_A_SHARD = 65_536
"""A harvest that is killed loses at most so many rows."""
DTYPES = {name: jnp.dtype(name) for name in ("float32", "float16", "bfloat16")}
OF_TOKENS = ("tokens", "positions")
"""Arrays beside the sites', int32."""
TAKEN = (*OF_TOKENS, "zarr.json", manifest.NAME, ".", "..")
"""What a site cannot be called."""
RETRIES = 3
"""Of a request to a URL; what fails so often will fail again."""


@dataclass(frozen=True)
class Store:
    """A store that is read; see `open_store`."""

    location: str
    manifest: Manifest

    @property
    def rows(self) -> int:
        """How many tokens."""
        return self.manifest.rows

    @property
    def sites(self) -> tuple[str, ...]:
        """The names of the sites."""
        return tuple(self.manifest.sites)

    def site(self, name: str | None = None) -> Rows:
        """The activations of a site, [rows, d_in]; the name may be left out where there is only one.

        Raises:
          InputError: no such site, or several and no name.
        """
        listed = ", ".join(self.sites)
        if name is None:
            require(
                len(self.sites) == 1,
                f"{self.location} holds several sites ({listed}): name one of them "
                "(--site NAME on the command line)",
            )
            name = self.sites[0]
        require(name in self.sites, f"{self.location} has no site {name!r}; it holds {listed}")
        width = len(self.manifest.sites[name].mean)
        return self._rows(folder_of(name), (self.rows, width), DTYPES[self.manifest.dtype])

    @cached_property
    def tokens(self) -> Rows:
        """The token of each row, [rows] int32."""
        return self._rows("tokens", (self.rows,), np.dtype(np.int32))

    @cached_property
    def positions(self) -> Rows:
        """Where in its context each row's token stands, [rows] int32."""
        return self._rows("positions", (self.rows,), np.dtype(np.int32))

    def _rows(self, folder: str, shape: tuple[int, ...], dtype: np.dtype) -> Rows:
        array = _open(self.location, folder, self.manifest, shape, dtype)
        label = f"{self.location}, {folder}"

        def read(start: int, stop: int) -> np.ndarray:
            try:
                return array[start:stop].read().result().view(dtype)
            except Exception as error:  # tensorstore raises ValueError for whatever goes wrong
                raise InputError(_damage(self.location, folder, self.manifest, start, stop, error)) from None

        return Rows(shape, dtype, self.manifest.chunk_rows, label, read)


def open_store(location: str | Path, *, unfinished: bool = False) -> Store:
    """A store, to be read.

    Args:
      location: a folder, or a URL that tensorstore knows (`gs://`, `s3://`, `http://`).
      unfinished: whether to open one that is still being written; it then has the rows of this moment.

    Returns:
      The store.

    Raises:
      InputError: no store there, still being written, empty, damaged, or of a newer version.

    Example:
      >>> store = open_store("acts/")
      >>> store.site("mlp.hidden").shape
      (2000000, 512)
    """
    location = os.fspath(location)
    found = read_manifest(location)
    require(found is not None, f"{location} is no store: there is no {manifest.NAME} in it")
    assert found is not None
    require(
        found.complete or unfinished,
        f"{location} is still being written, or its harvest was interrupted after {found.rows:,} rows: "
        "wait for it, or give the same harvest command again to finish it",
    )
    return Store(location, found)


def is_store(location: str | Path) -> bool:
    """Whether a folder holds a store; a URL is taken for one."""
    return "://" in str(location) or (Path(location) / manifest.NAME).is_file()


def read_manifest(location: str) -> Manifest | None:
    """The manifest of a store, or None where there is none.

    Raises:
      InputError: damaged, of a newer version, or a URL that does not answer.
    """
    try:
        found = _files(location).read(manifest.NAME).result()
    except Exception as error:  # tensorstore raises ValueError for whatever goes wrong
        raise InputError(f"{location} cannot be read: {_reason(error)}") from None
    if found.state == "missing":
        return None
    return manifest.read(found.value, f"{location}/{manifest.NAME}".replace("//manifest", "/manifest"))


class Writer:
    """Rows go in, shards come out; see `writing`.

    Rows gather until a shard is full in every array, the shards are written, and then the manifest.
    """

    def __init__(self, location: str, begun: Manifest):
        self.location, self.manifest = location, begun
        self._waiting = 0
        self._buffers = {
            folder: np.empty((begun.shard_rows, *shape[1:]), dtype)
            for folder, (shape, dtype) in arrays_of(begun).items()
        }

    def begin(self) -> None:
        """Claim the place: a folder with files and no manifest is taken for someone else's."""
        try:
            _files(self.location).write(manifest.NAME, self.manifest.write()).result()
        except Exception as error:  # tensorstore raises ValueError for whatever goes wrong
            raise self._failure(error) from None

    def append(self, rows: Mapping[str, Any], tokens: np.ndarray, positions: np.ndarray, reached: Reached):
        """Take rows, and commit whenever a shard is full.

        Args:
          rows: [n, d_in] by site.
          tokens, positions: [n] int32.
          reached: what batch these are of; of its rows, those that were stored before are not among these.
        """
        columns = {folder_of(name): part for name, part in rows.items()}
        columns |= {"tokens": tokens, "positions": positions}
        taken = 0
        while taken < len(tokens):
            some = min(self.manifest.shard_rows - self._waiting, len(tokens) - taken)
            for folder, column in columns.items():
                buffer = self._buffers[folder][self._waiting : self._waiting + some]
                with np.errstate(over="ignore"):
                    buffer[:] = column[taken : taken + some]
            self._waiting += some
            taken += some
            if self._waiting == self.manifest.shard_rows:
                self._commit(reached._replace(rows=reached.rows + taken))

    @property
    def rows(self) -> int:
        """Rows taken so far, those that wait for their shard to be full among them."""
        return self.manifest.rows + self._waiting

    def finish(self) -> Store:
        """Write what waits, and say that nothing more will come."""
        self._commit(self.manifest.reached, complete=True)
        return Store(self.location, self.manifest)

    def _commit(self, reached: Reached, complete: bool = False) -> None:
        new = {folder: buffer[: self._waiting] for folder, buffer in self._buffers.items()}
        after = self.manifest
        if self._waiting:
            of_sites = {name: new[folder_of(name)] for name in after.sites}
            after = manifest.grown(after, of_sites, reached)
            for name, found in after.sites.items():
                if not found.finite:
                    label = f"the site {name}, as {after.dtype},"
                    require_finite(of_sites[name], label, self.manifest.rows)
        after = replace(after, complete=complete)
        try:
            self._write(new, after)
        except Exception as error:  # tensorstore raises ValueError for whatever goes wrong
            raise self._failure(error) from None
        self.manifest, self._waiting = after, 0

    def _write(self, new: dict[str, np.ndarray], after: Manifest) -> None:
        files, first = _files(self.location), self.manifest.rows
        writes = [
            _open(self.location, folder, after, (after.rows, *part.shape[1:]), part.dtype)[first : after.rows]
            .write(_bits(part))
            for folder, part in new.items() if len(part)
        ]  # fmt: skip
        # all come to an end before a failure is told: one that went on would bring back what is removed
        for failure in [write.exception() for write in writes]:
            if failure is not None:
                raise failure
        for folder, (shape, dtype) in arrays_of(after).items():
            described = _metadata(after, shape, dtype) | {"attributes": {"dtype": dtype.name}}
            files.write(f"{folder}/zarr.json", json.dumps(described).encode()).result()
        group = {"zarr_format": 3, "node_type": "group", "attributes": after.about}
        files.write("zarr.json", json.dumps(group).encode()).result()
        files.write(manifest.NAME, after.write()).result()

    def _failure(self, error: Exception) -> Exception:
        rows = self.manifest.rows
        stored = f"the first {rows:,} rows are stored and stay good" if rows else "nothing is stored yet"
        if "No space left" in str(error) or "quota" in str(error) or "File too large" in str(error):
            full = f"the disk is full; {stored}: make room and give the same command again"
            return OSError(errno.ENOSPC, full, self.location)
        return InputError(f"{self.location} cannot be written: {_reason(error)}; {stored}")


def begun(
    sites: Mapping[str, int],
    *,
    dtype: str = "bfloat16",
    about: Mapping[str, Any] | None = None,
) -> Manifest:
    """The manifest of a store before its first row.

    Args:
      sites: the width of each site.
      dtype: "float32", "float16" or "bfloat16".
      about: where the rows come from, as plain values.

    Raises:
      InputError: no sites, another dtype, or a site called as an array that every store has.
    """
    require(bool(sites), "a store needs at least one site")
    require(dtype in DTYPES, f"a store holds {', '.join(DTYPES)}, not {dtype}")
    for name in sites:
        fits = bool(name) and name not in TAKEN and len(folder_of(name)) <= 255
        require(fits, f"a site cannot be called {name!r}")
    row_bytes = max(sites.values()) * DTYPES[dtype].itemsize
    chunk_rows = chunk_rows_for(row_bytes)
    chunks = max(1, min(MOST_ROWS_OF_A_SHARD // chunk_rows, SHARD_BYTES // (chunk_rows * row_bytes)))
    nothing = {name: manifest.no_rows(width) for name, width in sites.items()}
    return Manifest(dtype, chunk_rows, chunk_rows * chunks, nothing, dict(about or {}))


@contextmanager
def writing(location: str | Path, empty: Manifest) -> Iterator[Writer]:
    """Write a store, or go on with one that was interrupted.

    Args:
      location: a folder or a URL.
      empty: from `begun`; what is there already must have been begun alike.

    Raises:
      InputError: another store is there or anything else, it is complete, or another process writes it.

    Example:
      >>> with writing("acts/", begun({"mlp": 512})) as writer:
      ...     writer.append({"mlp": x}, tokens, positions, Reached(0, 0, ""))
      ...     store = writer.finish()
    """
    location = os.fspath(location)
    with _locked(location):
        before = read_manifest(location)
        if before is not None:
            manifest.require_same_origin(before, empty, location)
            require(not before.complete, f"{location} is complete already: it holds {before.rows:,} rows")
        writer = Writer(location, before or empty)
        try:
            if before is None:
                writer.begin()
            yield writer
        finally:
            if writer.manifest.rows == 0:
                # what was raised tells more than what could not be taken back
                with suppress(Exception):
                    _remove(location, empty)


@contextmanager
def _locked(location: str) -> Iterator[None]:
    """A folder to oneself; a URL knows no locks."""
    if "://" in location:
        yield
        return
    import fcntl

    folder = Path(location)
    require(folder.is_dir() or not folder.exists(), f"{folder} is a file, not a folder")
    # a kill while the first manifest is written leaves the file that becomes it
    ours = {manifest.NAME, f"{manifest.NAME}.__lock"}
    stranger = folder.is_dir() and any(folder.iterdir()) and not ours & set(os.listdir(folder))
    require(not stranger, f"{folder} is not empty and holds no store: give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise InputError(f"{folder} is being written by another process") from None
    try:
        yield
    finally:
        os.close(handle)


def _remove(location: str, empty: Manifest) -> None:
    """Take back a store that got no rows."""
    import tensorstore

    for folder in arrays_of(empty):
        array = tensorstore.KvStore.open(_kvstore(location, f"{folder}/"), context=_context()).result()
        array.delete_range(tensorstore.KvStore.KeyRange()).result()
    for name in ("zarr.json", manifest.NAME):
        _files(location).write(name, None).result()
    if "://" not in location:
        for path in sorted((path for path in Path(location).rglob("*") if path.is_dir()), reverse=True):
            path.rmdir()
        Path(location).rmdir()


def folder_of(site: str) -> str:
    """The folder of a site's array."""
    return quote(site, safe=" :[]()+,@=")


def arrays_of(found: Manifest) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Every array of a store by folder: its shape and dtype."""
    dtype = DTYPES[found.dtype]
    sites = {folder_of(name): ((found.rows, len(of.mean)), dtype) for name, of in found.sites.items()}
    return sites | {name: ((found.rows,), np.dtype(np.int32)) for name in OF_TOKENS}


def _metadata(found: Manifest, shape: tuple[int, ...], dtype: np.dtype) -> dict[str, Any]:
    """What `zarr.json` says of an array."""
    ends = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    inner = {"chunk_shape": [found.chunk_rows, *shape[1:]], "codecs": ends, "index_codecs": ends}
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        # not every reader of zarr knows bfloat16
        "data_type": "uint16" if dtype == jnp.bfloat16 else dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [found.shard_rows, *shape[1:]]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0.0 if dtype.kind == "f" else 0,
        "codecs": [{"name": "sharding_indexed", "configuration": {**inner, "index_location": "end"}}],
    }


def _bits(part: np.ndarray) -> np.ndarray:
    return part.view(np.uint16) if part.dtype == jnp.bfloat16 else part


def _open(location: str, folder: str, found: Manifest, shape: tuple[int, ...], dtype: np.dtype) -> Any:
    """An array by what the manifest says of it; `zarr.json` is for other readers."""
    import tensorstore

    spec = {
        "driver": "zarr3",
        "kvstore": _kvstore(location, f"{folder}/"),
        "metadata": _metadata(found, shape, dtype),
        "assume_metadata": True,
        "fill_missing_data_reads": False,
        # a chunk of zeros is otherwise left out, and a chunk that is left out counts as lost
        "store_data_equal_to_fill_value": True,
    }
    return tensorstore.open(spec, context=_context()).result()


def _files(location: str) -> Any:
    import tensorstore

    return tensorstore.KvStore.open(_kvstore(location), context=_context()).result()


def _kvstore(location: str, below: str = "") -> Any:
    if "://" in location:
        return f"{location.rstrip('/')}/{quote(below)}"
    return {"driver": "file", "path": f"{Path(location).absolute()}/{below}"}


def _context() -> Any:
    import tensorstore

    return tensorstore.Context(
        {f"{kind}_request_retries": {"max_retries": RETRIES} for kind in ("s3", "gcs", "http")}
    )


def _damage(location: str, folder: str, found: Manifest, start: int, stop: int, error: Exception) -> str:
    """Which file could not be read: each is read by itself to find out."""
    first, last = start // found.shard_rows, (max(stop, start + 1) - 1) // found.shard_rows
    shape, dtype = arrays_of(found)[folder]
    array = _open(location, folder, found, shape, dtype)
    for shard in range(first, last + 1):
        begin, end = max(start, shard * found.shard_rows), min(stop, (shard + 1) * found.shard_rows)
        try:
            array[begin:end].read().result()
        except Exception as own:
            error = own
            break
    else:
        shard = first
    name = f"{location.rstrip('/')}/{folder}/c/{shard}" + ("/0" if len(shape) > 1 else "")
    return f"{name} is damaged or missing: {_reason(error)}"


def _reason(error: Exception) -> str:
    """What tensorstore says, without the trail of where in its own code."""
    words = " ".join(str(error).split())
    return words.split(" [source locations")[0].split(" [tensorstore_spec")[0] or type(error).__name__
