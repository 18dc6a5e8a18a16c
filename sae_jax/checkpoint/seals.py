"""A folder that tells whether every byte of it is what was written."""

import hashlib
import json
from typing import Any

from etils import epath

ABOUT = "about.json"
"""What the folder tells of itself, with a digest of every other file and one of all of this."""
UNDIGESTED = (ABOUT, "_CHECKPOINT_METADATA")
"""orbax notes times in the latter as it puts a checkpoint in place; no number depends on it."""
BYTES_AT_ONCE = 2**22


class Damaged(Exception):  # noqa: N818, it is a finding
    """A file is missing or is not what was written; the message names it."""


def seal(folder: epath.Path, about: dict[str, Any]) -> None:
    """Write what the folder tells of itself; the last that is written into it.

    Args:
      folder: with all its files.
      about: plain values.
    """
    about = {**about, "files": {name: _digest(folder / name) for name in _files(folder)}}
    (folder / ABOUT).write_text(json.dumps({"about": about, "sha256": _digest_of(about)}))


def about(folder: epath.Path) -> dict[str, Any]:
    """What a sealed folder tells of itself.

    Raises:
      Damaged: it has no seal, or the seal is not what was written.
    """
    try:
        told = json.loads((folder / ABOUT).read_bytes())
        about, digest = told["about"], told["sha256"]
    except FileNotFoundError:
        raise Damaged(f"{ABOUT} is missing") from None
    except (ValueError, KeyError, TypeError):
        raise Damaged(f"{ABOUT} is not what was written") from None
    if _digest_of(about) != digest:
        raise Damaged(f"{ABOUT} is not what was written")
    return about


def require_whole(folder: epath.Path) -> None:
    """Read every file.

    Raises:
      Damaged: a file is missing, or a byte of one is not what was written.
    """
    present = set(_files(folder))
    for name, digest in about(folder)["files"].items():
        if name not in present:
            raise Damaged(f"{name} is missing")
        if _digest(folder / name) != digest:
            raise Damaged(f"{name} is not what was written")


def _digest_of(about: Any) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _digest(path: epath.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BYTES_AT_ONCE):
            digest.update(block)
    return digest.hexdigest()


def _files(folder: epath.Path) -> list[str]:
    """Names of all files below, but for those that have no digest."""
    names: list[str] = []
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            names += [f"{path.name}/{name}" for name in _files(path)]
        elif path.name not in UNDIGESTED:
            names.append(path.name)
    return names
