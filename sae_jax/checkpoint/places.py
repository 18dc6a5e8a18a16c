"""Folders on a disk and in a bucket, alike."""

import importlib.util
import shutil
from os import PathLike
from pathlib import Path

from etils import epath

from sae_jax.base import require

NEEDED = ("gcsfs", "google-cloud-storage")
"""For gs://: what etils lists with, and what orbax removes with."""


def place(folder: str | PathLike[str]) -> epath.Path:
    """A folder or URL as what can be read and written alike; a relative one as it is meant now.

    Args:
      folder: a path, file:///PATH, or gs://BUCKET/FOLDER.

    Raises:
      InputError: a URL that orbax cannot write to, or that needs packages which are not installed.
    """
    scheme, found, rest = str(folder).partition("://")
    if not found:
        return epath.Path(Path(folder).absolute())
    if scheme == "file":
        return epath.Path("/" + rest.lstrip("/"))
    require(
        scheme == "gs",
        f"checkpoints go to a folder or to gs://BUCKET/FOLDER, which is what orbax writes, not to {folder}",
    )
    missing = [name for name in NEEDED if not _installed(name)]
    require(not missing, f"{folder} needs packages that are not here: pip install {' '.join(missing)}")
    return epath.Path(folder)


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package.replace("-", ".")) is not None
    except ModuleNotFoundError:
        return False


def has_room(folder: epath.Path, size: int) -> bool:
    """Whether a folder's disk has so many bytes free; a bucket always has."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return "://" in str(folder) or shutil.disk_usage(existing).free >= size


def remove(path: epath.Path) -> None:
    """Whatever is there, if anything."""
    if path.is_dir():
        path.rmtree()
    else:
        path.unlink(missing_ok=True)
