"""Writing a store: rows gather until a shard is full, shards are written, and then the manifest."""

import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sae_jax.base import InputError, require
from sae_jax.data import manifest
from sae_jax.data.manifest import Manifest, Reached
from sae_jax.data.rows import chunk_rows_for, require_finite
from sae_jax.data.store import (
    DTYPES,
    OF_TOKENS,
    Store,
    arrays_of,
    bits,
    context,
    files,
    folder_of,
    kvstore,
    metadata,
    open_array,
    read_manifest,
    reason,
)

SHARD_BYTES = 2**26
"""About how much of a site's rows a file holds."""
MOST_ROWS_OF_A_SHARD = 65_536
"""A harvest that is killed loses at most so many rows."""
TAKEN = (*OF_TOKENS, "zarr.json", manifest.NAME, ".", "..")
"""What a site cannot be called."""


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
            files(self.location).write(manifest.NAME, self.manifest.write()).result()
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
        first = self.manifest.rows
        writes = []
        for folder, part in new.items():
            if len(part):
                array = open_array(self.location, folder, after, (after.rows, *part.shape[1:]), part.dtype)
                writes.append(array[first : after.rows].write(bits(part)))
        # all come to an end before a failure is told: one that went on would bring back what is removed
        for failure in [write.exception() for write in writes]:
            if failure is not None:
                raise failure
        place = files(self.location)
        for folder, (shape, dtype) in arrays_of(after).items():
            described = metadata(after, shape, dtype) | {"attributes": {"dtype": dtype.name}}
            place.write(f"{folder}/zarr.json", json.dumps(described).encode()).result()
        group = {"zarr_format": 3, "node_type": "group", "attributes": after.about}
        place.write("zarr.json", json.dumps(group).encode()).result()
        place.write(manifest.NAME, after.write()).result()

    def _failure(self, error: Exception) -> Exception:
        rows = self.manifest.rows
        stored = f"the first {rows:,} rows are stored and stay good" if rows else "nothing is stored yet"
        if "No space left" in str(error) or "quota" in str(error) or "File too large" in str(error):
            full = f"the disk is full; {stored}: make room and give the same command again"
            return OSError(errno.ENOSPC, full, self.location)
        return InputError(f"{self.location} cannot be written: {reason(error)}; {stored}")


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
        array = tensorstore.KvStore.open(kvstore(location, f"{folder}/"), context=context()).result()
        array.delete_range(tensorstore.KvStore.KeyRange()).result()
    for name in ("zarr.json", manifest.NAME):
        files(location).write(name, None).result()
    if "://" not in location:
        for path in sorted((path for path in Path(location).rglob("*") if path.is_dir()), reverse=True):
            path.rmdir()
        Path(location).rmdir()
