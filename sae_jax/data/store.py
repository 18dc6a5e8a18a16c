"""A store: activations on disk or behind a URL, as zarr v3 arrays that any zarr reader opens.

Rows are tokens. Each site of a model has an array, and so have the tokens and their positions. Every chunk
carries a checksum. What the manifest does not count does not exist, and it is replaced as a whole after the
rows that it counts are on disk.
"""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jax.numpy as jnp
import numpy as np

from sae_jax.base import InputError, require
from sae_jax.data import manifest
from sae_jax.data.manifest import Manifest
from sae_jax.data.rows import Rows

DTYPES = {name: jnp.dtype(name) for name in ("float32", "float16", "bfloat16")}
OF_TOKENS = ("tokens", "positions")
"""Arrays beside the sites', int32."""
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
        array = open_array(self.location, folder, self.manifest, shape, dtype)
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
        found = files(location).read(manifest.NAME).result()
    except Exception as error:  # tensorstore raises ValueError for whatever goes wrong
        raise InputError(f"{location} cannot be read: {reason(error)}") from None
    if found.state == "missing":
        return None
    return manifest.read(found.value, f"{location}/{manifest.NAME}".replace("//manifest", "/manifest"))


def folder_of(site: str) -> str:
    """The folder of a site's array."""
    return quote(site, safe=" :[]()+,@=")


def arrays_of(found: Manifest) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Every array of a store by folder: its shape and dtype."""
    dtype = DTYPES[found.dtype]
    sites = {folder_of(name): ((found.rows, len(of.mean)), dtype) for name, of in found.sites.items()}
    return sites | {name: ((found.rows,), np.dtype(np.int32)) for name in OF_TOKENS}


def metadata(found: Manifest, shape: tuple[int, ...], dtype: np.dtype) -> dict[str, Any]:
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


def bits(part: np.ndarray) -> np.ndarray:
    """As zarr holds them: bfloat16 as uint16."""
    return part.view(np.uint16) if part.dtype == jnp.bfloat16 else part


def open_array(location: str, folder: str, found: Manifest, shape: tuple[int, ...], dtype: np.dtype) -> Any:
    """An array by what the manifest says of it; `zarr.json` is for other readers."""
    import tensorstore

    spec = {
        "driver": "zarr3",
        "kvstore": kvstore(location, f"{folder}/"),
        "metadata": metadata(found, shape, dtype),
        "assume_metadata": True,
        "fill_missing_data_reads": False,
        # a chunk of zeros is otherwise left out, and a chunk that is left out counts as lost
        "store_data_equal_to_fill_value": True,
    }
    return tensorstore.open(spec, context=context()).result()


def files(location: str) -> Any:
    """The files of a store by name, each written as a whole."""
    import tensorstore

    return tensorstore.KvStore.open(kvstore(location), context=context()).result()


def kvstore(location: str, below: str = "") -> Any:
    """How tensorstore calls a place in a store."""
    if "://" in location:
        return f"{location.rstrip('/')}/{quote(below)}"
    return {"driver": "file", "path": f"{Path(location).absolute()}/{below}"}


def context() -> Any:
    """Few retries, so that what cannot be reached is told soon."""
    import tensorstore

    return tensorstore.Context(
        {f"{kind}_request_retries": {"max_retries": RETRIES} for kind in ("s3", "gcs", "http")}
    )


def _damage(location: str, folder: str, found: Manifest, start: int, stop: int, error: Exception) -> str:
    """Which file could not be read: each is read by itself to find out."""
    first, last = start // found.shard_rows, (max(stop, start + 1) - 1) // found.shard_rows
    shape, dtype = arrays_of(found)[folder]
    array = open_array(location, folder, found, shape, dtype)
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
    return f"{name} is damaged or missing: {reason(error)}"


def reason(error: Exception) -> str:
    """What tensorstore says, without the trail of where in its own code."""
    words = " ".join(str(error).split())
    return words.split(" [source locations")[0].split(" [tensorstore_spec")[0] or type(error).__name__
