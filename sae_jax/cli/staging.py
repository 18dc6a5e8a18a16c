"""A folder that is filled all at once, or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sae_jax.base import require
from sae_jax.cli.lock import LOCK, locked

STAGE = ".writing"


@contextmanager
def staged(out: Path, mark: str, *, overwrite: bool) -> Iterator[Path]:
    """A folder to write into, whose content takes its place in `out` once all is there, and else is gone.

    Args:
      out: made if it is not there, and locked meanwhile.
      mark: a file by which what may be replaced is known.
      overwrite: replace what is there.

    Raises:
      InputError: `out` is a file, holds something, or another process writes there.
    """
    require(out.is_dir() or not out.exists(), f"{out} is a file, not a folder")
    new = [path for path in (out, *out.parents) if not path.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with locked(out):
            there = [path for path in out.iterdir() if path.name not in (LOCK, STAGE)]
            ours = not there or (out / mark).exists()
            require(ours, f"{out} is not empty, and what it holds was not written here: give another folder")
            require(overwrite or not there, f"{out} is not empty: --overwrite replaces what is in it")
            shutil.rmtree(out / STAGE, ignore_errors=True)
            (out / STAGE).mkdir()
            try:
                yield out / STAGE
                for path in there:
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
                for path in (out / STAGE).iterdir():
                    path.replace(out / path.name)
            finally:
                shutil.rmtree(out / STAGE, ignore_errors=True)
    finally:
        for path in new:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
