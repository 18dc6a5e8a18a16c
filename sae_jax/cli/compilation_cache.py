"""What XLA compiles for one command is kept for the next, in a folder of the user's own.

Only the command line does so: what a library's import does to a process is not its business.
"""

import atexit
import os
import shutil
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax

CONFIG: Any = jax.config  # its options are attributes that no type knows
MOST_BYTES = 2**29
"""Of what is kept."""
OTHERS_MAY_WRITE = 0o022
ASKED = "/jax/compilation_cache/compile_requests_use_cache"
COMPILED = "/jax/core/compile/backend_compile_duration"
"""What JAX announces before it looks into its cache, and after a program is there."""
TROUBLE = ("Error reading persistent compilation cache", "Error writing persistent compilation cache")
"""How its warnings begin when it could not do so, and compiled as it would without."""


def keep_compiled() -> None:
    """Have JAX keep what it compiles, and take from there what it has compiled before; touches no device.

    Where JAX_COMPILATION_CACHE_DIR names a folder that one is used, and JAX_ENABLE_COMPILATION_CACHE=false
    turns all of it off. A folder that cannot be had is no reason to stop: the command compiles as it would
    without. JAX keeps programs apart by their text, its own version, compiler flags, and the device with the
    features of its processor.
    """
    if not CONFIG.jax_enable_compilation_cache:
        return
    if CONFIG.jax_compilation_cache_dir is None:
        folder = private_folder()
        if folder is None:
            return
        CONFIG.update("jax_compilation_cache_dir", str(folder))
        # most programs of a small sweep compile in milliseconds, and there are forty of them
        CONFIG.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        troubles = _troubles()
        # not by jax_compilation_cache_max_size, with which each program that is kept reads all that are there
        atexit.register(lambda: empty(folder) if troubles else trim(folder, MOST_BYTES))
    jax.monitoring.register_event_listener(_before)
    jax.monitoring.register_event_duration_secs_listener(_after)


def private_folder() -> Path | None:
    """The folder, made if missing; None where there is none, or where others may put programs into it."""
    with suppress(OSError, RuntimeError):  # the second of a user who has no home
        base = Path(os.environ.get("XDG_CACHE_HOME", ""))
        base = base if base.is_absolute() else Path.home() / ".cache"
        base.mkdir(parents=True, exist_ok=True)
        folder = base / "sae-jax" / "xla"
        for place in (folder.parent, folder):
            place.mkdir(mode=0o700, exist_ok=True)
            if problem := _not_private(place):
                print(f"sae-jax: compiled programs are not kept: {problem}", file=sys.stderr)
                return None
        return folder
    return None


def _not_private(place: Path) -> str | None:
    """Why programs from there are not run: whoever may write them has what runs them do anything."""
    found = place.stat()
    if found.st_uid != os.geteuid():
        return f"{place} belongs to another user"
    if found.st_mode & OTHERS_MAY_WRITE:
        return f"other users may write to {place} (chmod go-w would mend it)"
    return None


def trim(folder: Path, most: int) -> None:
    """Remove the programs that were used longest ago until the others take no more than `most` bytes.

    Args:
      folder: of programs; another process may add and remove some meanwhile.
      most: in bytes.
    """
    used: list[tuple[float, int, Path]] = []
    for path in folder.rglob("*"):
        with suppress(OSError):
            found = path.stat()
            if path.is_file():
                # many systems note a reading once a day, and some never
                used.append((max(found.st_atime, found.st_mtime), found.st_size, path))
    left = sum(size for _, size, _ in used)
    for _, size, path in sorted(used):
        if left <= most:
            return
        with suppress(OSError):
            path.unlink(missing_ok=True)
        left -= size


def empty(folder: Path) -> None:
    """Remove all programs."""
    shutil.rmtree(folder, ignore_errors=True)


def _troubles() -> list[str]:
    """A list that takes JAX's warnings of a cache it cannot use, in place of the screen.

    A full disk cuts programs short, and JAX never replaces one that is there: after a trouble the folder is
    emptied.
    """
    troubles: list[str] = []
    others = warnings.showwarning

    def show(message, *rest, **named) -> None:
        if str(message).startswith(TROUBLE):
            troubles.append(str(message))
        else:
            others(message, *rest, **named)

    warnings.showwarning = show
    return troubles


def told() -> str:
    """Where programs are kept, for `sae-jax doctor`."""
    folder = CONFIG.jax_compilation_cache_dir
    return f"in {folder}" if folder and CONFIG.jax_enable_compilation_cache else "not kept"


def _before(event: str, **_: str | int) -> None:
    # XLA holds against each program that it reads on a CPU with AVX-512 that the processor lacks the
    # "features" prefer-no-gather and prefer-no-scatter, which are advice to its compiler (openxla/xla 44565)
    if event == ASKED and jax.default_backend() == "cpu":
        _xla_tells_from("CRITICAL")


def _after(event: str, duration_secs: float, **_: str | int) -> None:
    if event == COMPILED and jax.default_backend() == "cpu":
        _xla_tells_from("WARNING")


def _xla_tells_from(level: str) -> None:
    """Of XLA's messages only; the second line takes the level back from Python's loggers."""
    CONFIG.update("jax_logging_level", level)
    CONFIG.update("jax_logging_level", "NOTSET")
