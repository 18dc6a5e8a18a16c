"""The text: the standard library's own source, which every machine with Python has."""

import sysconfig
import zlib
from pathlib import Path
from typing import NamedTuple

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
"""Folders of other people's code and of tests."""


class Corpus(NamedTuple):
    """Files of text, in two parts that share no file."""

    train: list[str]
    validation: list[str]


def read(folder: Path | None = None, share: float = 0.1) -> Corpus:
    """Read the `.py` files below a folder.

    Which part a file falls in is a function of its path alone, the same on every machine.

    Args:
      folder: where to look; None for the standard library of the Python that runs.
      share: of the files that are kept for validation.
    """
    folder = folder or Path(sysconfig.get_path("stdlib"))
    parts = Corpus([], [])
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder)
        if LEFT_OUT.isdisjoint(name.parts):
            held_out = zlib.crc32(name.as_posix().encode()) < share * 2**32
            parts[held_out].append(path.read_text(encoding="utf-8", errors="replace"))
    return parts
