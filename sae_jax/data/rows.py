"""Rows that are read a stretch at a time: what a store and files larger than memory have in common."""

import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from sae_jax.base import InputError, require

CHUNK_BYTES = 2**21
"""About how much is read at a time."""
LEAST_CHUNK, MOST_CHUNK = 1024, 4096
"""Rows."""


@dataclass(frozen=True)
class Rows:
    """A matrix somewhere, and how to read rows `start` to `stop` of it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk_rows: int
    """Reading is cheapest in stretches of so many rows that begin at a multiple of it."""
    label: str = field(repr=False)
    """How messages call it."""
    read: Callable[[int, int], Shaped[np.ndarray, "rows *d"]] = field(repr=False)

    def __len__(self) -> int:
        return self.shape[0]


def chunk_rows_for(row_bytes: int) -> int:
    """How many rows of that size make a chunk: a power of two, about 2 MiB where it may be."""
    wanted = max(1, CHUNK_BYTES // max(row_bytes, 1))
    return min(MOST_CHUNK, max(LEAST_CHUNK, 2 ** (wanted.bit_length() - 1)))


def side_by_side(several: list[Rows]) -> Rows:
    """Rows [n, sources, d] of several [n, d], for a crosscoder.

    Args:
      several: alike in shape and dtype.

    Raises:
      InputError: other lengths, widths or dtypes.
    """
    first = several[0]
    for rows in several[1:]:
        alike = (rows.shape, rows.dtype) == (first.shape, first.dtype)
        require(
            alike,
            f"a crosscoder's sources must be alike, but {first.label} is {list(first.shape)} {first.dtype} "
            f"and {rows.label} is {list(rows.shape)} {rows.dtype}",
        )

    def read(start: int, stop: int) -> np.ndarray:
        return np.stack([rows.read(start, stop) for rows in several], axis=1)

    shape = (len(first), len(several), *first.shape[1:])
    return replace(first, shape=shape, label=" and ".join(rows.label for rows in several), read=read)


def open_rows(path: str | Path, name: str | None = None) -> Rows:
    """The rows of a file, read as they are asked for and not before.

    Args:
      path: a `.npy` (mapped), `.safetensors`, or `.pt` file (a tensor or a dictionary of tensors, mapped, and
        loaded without running code), or a folder of Arrow files saved by `datasets`, such as SAELens's
        cached activations: [contexts, context, d_in] becomes [contexts * context, d_in].
      name: which array, where there are several.

    Returns:
      Rows [n, d]. Each stretch is looked through for NaN and infinity as it is read.

    Raises:
      InputError: nothing there, a format that is not one of these, several arrays and no name, not [n, d],
        no floating-point numbers.

    Example:
      >>> source = sae_jax.stored(open_rows("acts.npy"), batch_size=1024)
    """
    path = Path(path)
    require(path.exists(), f"{path} does not exist")
    if path.is_dir():
        return _rows(f"{path}", *_arrow(path, name))
    suffixes = ", ".join(OPENERS)
    require(path.suffix in OPENERS, f"{path} cannot be streamed: it must end in one of {suffixes}")
    try:
        return _rows(f"{path}", *OPENERS[path.suffix](path, name))
    except InputError:
        raise
    except PermissionError:
        raise InputError(f"{path} may not be read by this user") from None
    except ImportError:
        raise
    except Exception as error:  # a damaged file makes the parsers raise a dozen types
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path} cannot be read as {path.suffix}: {reason}") from None


def chosen(path: Path, names: list[str], name: str | None) -> str:
    """Which of a file's arrays is meant.

    Raises:
      InputError: none there, several and no name, or a name that is not there.
    """
    require(bool(names), f"{path} holds no arrays")
    listed = ", ".join(sorted(names))
    if name is None:
        require(
            len(names) == 1,
            f"{path} holds several arrays ({listed}): name one of them (--array NAME on the command line)",
        )
        return names[0]
    require(name in names, f"{path} has no array {name!r}; it holds {listed}")
    return name


Opened = tuple[tuple[int, ...], np.dtype, Callable[[int, int], np.ndarray]]
"""Shape, dtype, and how to read."""


def _rows(
    label: str, shape: tuple[int, ...], dtype: np.dtype, read: Callable[[int, int], np.ndarray]
) -> Rows:
    require(len(shape) in (2, 3), f"{label} must be [rows, d_in], got {list(shape)}")
    require(min(shape) > 0, f"{label} has no rows or no columns (shape {list(shape)})")
    is_float = bool(jnp.issubdtype(dtype, jnp.floating)) and dtype.itemsize <= 8
    require(is_float, f"{label} must hold real floating-point numbers of at most 64 bits, got {dtype}")
    native = dtype.newbyteorder("=")
    row_bytes = int(np.prod(shape[1:])) * dtype.itemsize

    def finite(start: int, stop: int) -> np.ndarray:
        found = read(start, stop).astype(native, copy=False)
        require_finite(found, label, start)
        return found

    return Rows(tuple(shape), native, chunk_rows_for(row_bytes), label, finite)


def require_finite(found: np.ndarray, label: str, start: int) -> None:
    """Raise `InputError` with the first row that holds NaN or infinity; `start` is the number of row 0."""
    # ml_dtypes test bfloat16 one number at a time: all bits of the exponent are set where it is not finite
    halves = found.view(np.uint16) & 0x7F80 == 0x7F80 if found.dtype == jnp.bfloat16 else ~np.isfinite(found)
    if halves.any():
        row = start + int(np.argwhere(halves)[0][0])
        raise InputError(f"{label} holds NaN or infinity, first in row {row}")


def _npy(path: Path, name: str | None) -> Opened:
    require(name is None, f"{path} holds one array, which has no name to ask for")
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    return array.shape, array.dtype, lambda start, stop: np.asarray(array[start:stop])


def _safetensors(path: Path, name: str | None) -> Opened:
    from safetensors import safe_open

    file = safe_open(path, framework="numpy")
    part = file.get_slice(chosen(path, list(file.keys()), name))
    shape = tuple(part.get_shape())
    # what has no rows cannot be sliced, and is refused for its shape
    dtype = part[0:1].dtype if min(shape, default=0) else np.dtype(np.float32)
    return shape, dtype, lambda start, stop: part[start:stop]


def _pt(path: Path, name: str | None) -> Opened:
    torch = _needs("torch", path)
    require(
        zipfile.is_zipfile(path), f"{path} is damaged, or was saved by a torch older than 1.6: save it again"
    )
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise InputError(
            f"{path} holds more than tensors, and to load it could run code: save the tensor alone"
        ) from None
    if isinstance(found, dict):
        tensors = {str(key): value for key, value in found.items() if isinstance(value, torch.Tensor)}
        found = tensors[chosen(path, list(tensors), name)]
    else:
        require(name is None, f"{path} holds one tensor, which has no name to ask for")
    require(isinstance(found, torch.Tensor), f"{path} holds a {type(found).__name__}, not a tensor")
    require(found.layout == torch.strided, f"{path} holds a sparse tensor: save it as a dense one")
    half = found.dtype == torch.bfloat16
    dtype = jnp.dtype(jnp.bfloat16) if half else torch.empty(0, dtype=found.dtype).numpy().dtype

    def read(start: int, stop: int) -> np.ndarray:
        part = found[start:stop].detach().contiguous()
        return part.view(torch.int16).numpy().view(dtype) if half else part.numpy()

    return tuple(found.shape), dtype, read


def _arrow(path: Path, name: str | None) -> Opened:
    datasets = _needs("datasets", path)
    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever a damaged folder makes of its parser
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is neither a store nor a folder saved by `datasets`: {reason}") from None
    require(hasattr(found, "features"), f"{path} holds several splits: give the folder of one of them")
    names = [key for key, feature in found.features.items() if isinstance(feature, datasets.Array2D)]
    column = chosen(path, names, name)
    context, d_in = found.features[column].shape
    require(context is not None, f"{path} has contexts of several lengths in {column}: they must be alike")
    dtype = np.dtype(found.features[column].dtype)
    # without a dtype it would give float32 for float64
    table = found.with_format("numpy", columns=[column], dtype=dtype)

    def read(start: int, stop: int) -> np.ndarray:
        first, last = start // context, -(-stop // context)
        several = np.asarray(table[first:last][column]).reshape(-1, d_in)
        return several[start - first * context : stop - first * context]

    return (len(found) * context, d_in), dtype, read


def _needs(package: str, path: Path) -> Any:
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError:
        raise InputError(
            f"{path} is read by {package}, which is not installed: pip install {package}"
        ) from None


OPENERS: dict[str, Callable[[Path, str | None], Opened]] = {
    ".npy": _npy,
    ".safetensors": _safetensors,
    ".pt": _pt,
}
