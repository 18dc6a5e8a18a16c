"""Files of unknown origin, read within bounds and without running code; and the same kinds written.

No reader takes memory beyond what a file of that size can hold: headers are bounded, compressed archives
that would grow out of proportion and tensors that say they are larger than their bytes are refused, and
pickles are only read by PyTorch's restricted unpickler. Every failure is one `InputError`.
"""

import errno
import json
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sae_jax.base import InputError, require

Tensors = dict[str, np.ndarray]

LARGEST_TEXT = 8 << 20
"""Bytes of a config or of a safetensors header."""
LARGEST_YAML = 64 << 10
"""Bytes: the parser is slow."""
MOST_NESTED = 500
"""Signs of YAML that may open a level: the parser's time grows with the square of the depth."""
LARGEST_GROWTH = 100
"""How many times its own size an archive above `SMALL` may unpack to."""
SMALL = 64 << 20

NEEDS_TORCH = "a .pt file needs PyTorch: pip install 'sae-jax[torch]'"


class Place:
    """A file or folder that may hold an SAE, each of its documents read once.

    Names are those of files in the folder itself; of a file, its own name is the only one.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.is_file = self.path.is_file()
        self.folder = self.path.parent if self.is_file else self.path
        self.names = [self.path.name] if self.is_file else _files_in(self.path)
        self._documents: dict[tuple[str, str], Any] = {}

    def has(self, *names: str) -> bool:
        """Whether files of all these names are here."""
        return all(name in self.names for name in names)

    def ending(self, *suffixes: str) -> list[str]:
        """The files whose names end so, in order."""
        return sorted(name for name in self.names if name.endswith(suffixes))

    def beside(self, name: str) -> "Place":
        """A file in the same folder, whether this is that folder or another file in it."""
        return Place(self.folder / _plain(name))

    def json(self, name: str) -> dict[str, Any]:
        """A JSON object."""
        return self._read("json", name, read_json)

    def yaml(self, name: str) -> dict[str, Any]:
        """A YAML mapping."""
        return self._read("yaml", name, read_yaml)

    def safetensors(self, name: str) -> Tensors:
        """Every tensor of a safetensors file."""
        return self._read("safetensors", name, read_safetensors)

    def header(self, name: str) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
        """The shapes in a safetensors file and its metadata, without reading tensors."""
        return self._read("header", name, read_header)

    def npz(self, name: str) -> Tensors:
        """Every array of an `.npz` file."""
        return self._read("npz", name, read_npz)

    def torch(self, name: str) -> dict[str, Any]:
        """What `torch.save` wrote: a dictionary of arrays and plain values."""
        return self._read("torch", name, read_torch)

    def _read(self, kind: str, name: str, reader: Callable[[Path], Any]) -> Any:
        if (kind, name) not in self._documents:
            require(name in self.names, f"{self.folder} has no file {name}")
            self._documents[kind, name] = reader(self.folder / _plain(name))
        return self._documents[kind, name]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of at most `LARGEST_TEXT` bytes."""
    with _told(path, "JSON"):
        found = json.loads(_text(path, LARGEST_TEXT))
    require(isinstance(found, dict), f"{path} must hold a JSON object, got {type(found).__name__}")
    return found


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping from a file of at most `LARGEST_YAML` bytes; aliases can multiply: refused."""
    import yaml

    with _told(path, "YAML"):
        text = _text(path, LARGEST_YAML)
        nested = sum(map(text.count, ("[", "{", "- ", "? ")))
        require(
            nested <= MOST_NESTED, f"{path} has {nested} signs that may open a level, too many to be a config"
        )
        aliases = any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text))
        require(not aliases, f"{path} has YAML aliases, which are not read")
        found = yaml.safe_load(text)
    require(isinstance(found, dict), f"{path} must hold a YAML mapping, got {type(found).__name__}")
    return found


def read_header(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes by name, and the metadata, of a safetensors file."""
    with _told(path, "safetensors"):
        _require_bounded_header(path)
        with safe_open(path, framework="numpy") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            return shapes, dict(file.metadata() or {})


def read_safetensors(path: Path) -> Tensors:
    """Every tensor of a safetensors file, in the dtypes it has."""
    with _told(path, "safetensors"):
        _require_bounded_header(path)
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def read_npz(path: Path) -> Tensors:
    """Every array of an `.npz` file; pickled objects are refused."""
    with _told(path, ".npz"), zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        unpacked = sum(entry.file_size for entry in entries)
        grows = unpacked > max(SMALL, LARGEST_GROWTH * path.stat().st_size)
        require(not grows, f"{path} would unpack to {unpacked} bytes, out of proportion to its size")
        names = [entry.filename for entry in entries]
        require(len(set(names)) == len(names), f"{path} holds two arrays of the same name")
        for entry in entries:
            with archive.open(entry) as file:
                _require_honest_array(path, entry, file)
        found = {}
        for entry in entries:
            with archive.open(entry) as file:
                found[entry.filename.removesuffix(".npy")] = np.lib.format.read_array(
                    file, allow_pickle=False
                )
        return found


def read_torch(path: Path) -> dict[str, Any]:
    """A dictionary that `torch.save` wrote: tensors as arrays, and plain values. Needs torch.

    Raises:
      InputError: torch missing, a file that is damaged, or that holds more than tensors and plain values.
    """
    torch = _torch()
    with _told(path, "a PyTorch file"):
        old = f"{path} cannot be read as a PyTorch file: it is none, or one of before 1.6"
        require(zipfile.is_zipfile(path), old)
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
            whole = sum(entry.file_size for entry in entries) <= size
            require(not packed and whole, f"{path} is compressed, which PyTorch's files are not")
            text = sum(entry.file_size for entry in entries if entry.filename.endswith(".pkl"))
            require(text <= LARGEST_TEXT, f"{path} has {text} bytes that are not tensors")
        found = torch.load(path, map_location="cpu", weights_only=True)
        require(isinstance(found, Mapping), f"{path} must hold a dictionary, got {type(found).__name__}")
        tensors = [value for value in found.values() if isinstance(value, torch.Tensor)]
        total = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        require(total <= 2 * size, f"{path}: its tensors claim {total} bytes, but the file has {size}")
        return {
            str(name): _as_array(path, str(name), value) if isinstance(value, torch.Tensor) else value
            for name, value in found.items()
        }


def write_json(document: Mapping[str, Any], path: Path) -> None:
    """Write a JSON object."""
    path.write_text(json.dumps(document, indent=2) + "\n")


def write_yaml(document: Mapping[str, Any], path: Path) -> None:
    """Write a YAML mapping, in its own order."""
    import yaml

    path.write_text(yaml.safe_dump(dict(document), sort_keys=False))


def write_safetensors(tensors: Tensors, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file."""
    dense = {name: np.array(leaf, order="C") for name, leaf in tensors.items()}
    try:
        save_file(dense, path, metadata=None if metadata is None else dict(metadata))
    except SafetensorError as error:  # a full disk is told as one of its own
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error), str(path)) from None


def write_npz(tensors: Tensors, path: Path) -> None:
    """Write an `.npz` file, not compressed: weights hardly would be."""
    with path.open("wb") as file:
        np.savez(file, **tensors)  # pyright: ignore[reportArgumentType]


def write_torch(document: Mapping[str, Any], path: Path) -> None:
    """Write what `torch.load` reads: arrays as tensors, and plain values. Needs torch."""
    torch = _torch()
    held = {name: as_tensor(v) if isinstance(v, np.ndarray) else v for name, v in document.items()}
    try:
        with path.open("wb") as file:
            torch.save(held, file)
    except RuntimeError as error:  # what torch makes of a full disk
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def as_tensor(array: np.ndarray):
    """A torch tensor of the same values and dtype, with memory of its own. Needs torch."""
    torch = _torch()
    array = np.array(array, order="C")
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _as_array(path: Path, name: str, tensor) -> np.ndarray:
    torch = _torch()
    plain = tensor.layout == torch.strided and not tensor.is_quantized and tensor.device.type == "cpu"
    require(plain, f"{path}: {name} is not a plain tensor")
    tensor = tensor.detach()
    own = tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    require(own, f"{path}: {name} says that it is larger than its bytes")
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.contiguous().numpy()


def _require_bounded_header(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    bounded = size >= 8 and header <= min(size - 8, LARGEST_TEXT)
    require(bounded, f"{path} is no safetensors file: its header would be {header} bytes")


def _require_honest_array(path: Path, entry: zipfile.ZipInfo, file) -> None:
    """Refuse an array whose header promises other than the entry has, before room is made for it."""
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    require(version in readers, f"{path}: {entry.filename} is of an unknown version {version}")
    shape, _, dtype = readers[version](file)
    require(not dtype.hasobject, f"{path}: {entry.filename} holds pickled objects, which can run code")
    count = 1
    for extent in shape:
        count *= extent
    promised = count * dtype.itemsize + file.tell()
    honest = min(shape, default=0) >= 0 and promised == entry.file_size
    require(honest, f"{path}: {entry.filename} promises {promised} bytes and has {entry.file_size}")


def _files_in(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    except OSError:
        return []


def _plain(name: str) -> str:
    """A name that stays in its folder."""
    stays = name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}
    require(stays, f"{name!r} is not the name of a file in this folder")
    return name


def _text(path: Path, largest: int) -> str:
    size = path.stat().st_size
    require(size <= largest, f"{path} has {size} bytes, more than the {largest} that are read")
    return path.read_text(encoding="utf-8")


@contextmanager
def _told(path: Path, kind: str) -> Iterator[None]:
    """Whatever a parser raises on a damaged file, as one sentence."""
    try:
        yield
    except InputError:
        raise
    except PermissionError:
        raise InputError(f"{path} may not be read by this user") from None
    except Exception as error:  # parsers raise a dozen types, RecursionError among them
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if "weights_only" in reason or "Weights only" in reason:
            reason = "it holds more than tensors, which is not loaded because it can run code"
        raise InputError(f"{path} cannot be read as {kind}: {reason}") from None


def _torch():
    try:
        import torch
    except ImportError:
        raise InputError(NEEDS_TORCH) from None
    return torch
