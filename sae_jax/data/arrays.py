"""Reading a user's array from a file, and saying plainly what is wrong with it."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from safetensors import safe_open

from sae_jax.base import InputError, require
from sae_jax.data.rows import chosen

ROWS_AT_A_TIME = 65_536
SUFFIXES = (".npy", ".npz", ".safetensors")


def read_array(path: str | Path, name: str | None = None) -> Float[np.ndarray, "n *d"]:
    """Read a matrix of activations from a `.npy`, `.npz` or `.safetensors` file.

    Args:
      path: the file.
      name: which array, where the file holds several.

    Returns:
      [n, d], float32 or float64; half precisions are widened to float32. A `.npy` is mapped, not read.

    Raises:
      InputError: no such file, not one of the formats or damaged, pickled objects, not [n, d], no rows,
        integer or complex values, NaN or infinity (how many, and where the first one is).

    Example:
      >>> x = read_array("acts.npy")
    """
    path = Path(path)
    require(path.exists(), f"{path} does not exist")
    require(path.is_file(), f"{path} is not a file")
    require(path.suffix in SUFFIXES, f"{path} must end in one of {', '.join(SUFFIXES)}")
    try:
        array = _read(path, name)
    except InputError:
        raise
    except PermissionError:
        raise InputError(f"{path} may not be read by this user") from None
    except Exception as error:  # a damaged file makes the parsers raise a dozen types
        reason = " ".join(str(error).split()) or type(error).__name__
        if "allow_pickle" in reason or "Python objects" in reason:
            reason = "it holds pickled Python objects, which are not loaded because they can run code"
        raise InputError(f"{path} cannot be read as {path.suffix}: {reason}") from None
    return checked(array, str(path))


def as_float32(array: np.ndarray, label: str) -> Float[np.ndarray, "n *d"]:
    """`array` in float32.

    Raises:
      InputError: values beyond what float32 holds.
    """
    if array.dtype == np.float32:
        return array
    with np.errstate(over="ignore"):
        return checked(array.astype(np.float32), f"{label} as float32")


def _read(path: Path, name: str | None) -> np.ndarray:
    if path.suffix == ".npy":
        with path.open("rb") as file:
            start = file.read(6)
        require(start[:2] != b"PK", f"{path} is an archive of arrays: rename it to .npz")
        require(start == b"\x93NUMPY", f"{path} is no .npy file (a pickle is not read: it can run code)")
        require(name is None, f"{path} holds one array, which has no name to ask for")
        return np.load(path, mmap_mode="r", allow_pickle=False)
    if path.suffix == ".npz":
        archive = np.load(path, allow_pickle=False)
        require(not isinstance(archive, np.ndarray), f"{path} holds a single array: rename it to .npy")
        with archive:
            name = chosen(path, list(archive.files), name)
            array = archive[name]
        require(isinstance(array, np.ndarray), f"{path}: {name} is not an array")
        return array
    with safe_open(path, framework="numpy") as tensors:
        return tensors.get_tensor(chosen(path, list(tensors.keys()), name))


def checked(array: np.ndarray, label: str) -> Float[np.ndarray, "n *d"]:
    """`array` as float32 or float64 if it can serve as activations.

    Args:
      array: anything numpy holds.
      label: how messages call it.

    Raises:
      InputError: see `read_array`.
    """
    fits = array.ndim in (2, 3)
    require(fits, f"{label} must be [rows, d_in] (for a crosscoder [rows, sources, d_in]), got {array.shape}")
    require(array.shape[0] > 0, f"{label} has no rows (shape {array.shape})")
    require(min(array.shape[1:]) > 0, f"{label} has no columns (shape {array.shape})")
    is_float = jnp.issubdtype(array.dtype, jnp.floating)
    require(is_float, f"{label} must hold real floating-point numbers, got {array.dtype}")
    if array.dtype.itemsize < 4 or not array.dtype.isnative:
        array = array.astype(np.float32 if array.dtype.itemsize <= 4 else np.float64)
    if array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    bad, first = 0, None
    for start in range(0, len(array), ROWS_AT_A_TIME):
        wrong = ~np.isfinite(array[start : start + ROWS_AT_A_TIME])
        if wrong.any():
            bad += int(wrong.sum())
            row, *column = map(int, np.argwhere(wrong)[0])
            first = first or (start + row, *column)
    require(not bad, f"{label} holds {bad} values that are NaN or infinite, the first at row, column {first}")
    return array
