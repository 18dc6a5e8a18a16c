"""From one weight format to another, and the proof that the SAE stayed the same."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import formats
from sae_jax.base import SAE, require
from sae_jax.formats import Loaded

RANDOM_ROWS = 64
SPREAD = (-1.0, 3.0)
"""log10 of the smallest and largest scale of random rows: which of them an SAE answers to is not known."""
ROUNDINGS = 16
"""How many roundings of the weights' dtype a fold may cost."""
MOST_FLIPS = 1e-4
"""The share of active latents that may lie so near to their threshold that a rounding decides."""


class Difference(NamedTuple):
    """How far two SAEs are apart on the same rows."""

    features: float
    """Largest |f - f'| of a row, relative to the row's largest |f|."""
    reconstructions: float
    """Largest |x_hat - x_hat'| of a row, relative to the row's largest |x_hat|."""
    flips: int
    """Latents active on one side only; rows that have them are left out of the two above."""
    active: int
    """Latents active there, over all rows."""
    rows: int
    bound: float

    @property
    def ok(self) -> bool:
        """Whether they agree to the rounding of their weights."""
        near = max(self.features, self.reconstructions) <= self.bound
        return near and self.flips <= max(1, MOST_FLIPS * self.active)

    def __str__(self) -> str:
        flips = f", {self.flips} latents active on one side only" if self.flips else ""
        return (
            f"largest relative difference {self.features:.1e} in features and {self.reconstructions:.1e} in "
            f"reconstructions over {self.rows} rows with {self.active} active latents{flips}"
        )


class Conversion(NamedTuple):
    """What became of one SAE."""

    source: Path
    format: str
    """The format it was in."""
    target: Path
    left_out: list[str]
    """What the new file does not tell."""
    difference: Difference | None
    """None where it was not checked."""


def convert(
    source: str | Path,
    target: str | Path,
    to: str,
    *,
    check: bool = True,
    x: np.ndarray | None = None,
    lossy: bool = False,
    overwrite: bool = False,
    told: Callable[[Conversion], None] = lambda one: None,
) -> list[Conversion]:
    """Write an SAE, or every SAE of a folder, in another format.

    Args:
      source: a file or folder in any known format, or a folder of several SAEs.
      target: a folder, or a file where the format is one file; of several SAEs the folder for all of them,
        each under the name it had.
      to: a key of `formats.FORMATS`.
      check: read what was written, and compare encoder and decoder before and after in float64, on random
        rows and on `x`.
      x: rows [n, d_in] to compare on as well.
      lossy: go on where the format cannot hold all that the SAE computes, and whatever the check finds.
      overwrite: replace what is at `target`.
      told: called after each SAE.

    Returns:
      What became of each SAE.

    Raises:
      InputError: something at `target` already, as `formats.read` and `formats.write`, or a file that
        disagrees; nothing is left at `target` then.

    Example:
      >>> convert("trainer_0", "sae/", "saelens")[0].difference
    """
    source, target = Path(source), Path(target)
    free = overwrite or not target.exists() or (target.is_dir() and not any(target.iterdir()))
    require(free, f"{target} exists: choose another place, or --overwrite")
    require(to in formats.FORMATS, f"no format is called {to!r}; there are: {', '.join(formats.FORMATS)}")
    several = formats.several(source)
    wanted = {name.removesuffix(".safetensors"): path for name, path in several.items()} or {"": source}
    target.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    done = []
    try:
        for name, path in wanted.items():
            one = _converted(path, stage / target.name / name, to, check, x, lossy)
            done.append(one._replace(target=target / name))
            told(done[-1])
        if target.exists():
            shutil.rmtree(target) if target.is_dir() else target.unlink()
        (stage / target.name).replace(target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return done


def difference(before: Loaded, after: Loaded, x: np.ndarray | None = None) -> Difference:
    """How far two SAEs are apart: both in float64, on random rows of many scales and on `x`.

    Raises:
      InputError: rows of another width.
    """
    rows = _random_rows(before.sae)
    if x is not None:
        require(x.shape[1:] == rows.shape[1:], f"rows must be {rows.shape[1:]}, got {x.shape[1:]}")
        rows = np.concatenate([rows, x.astype(np.float64)])
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        (f, x_hat), (g, y_hat) = (_computed(loaded, rows) for loaded in (before, after))
    shapes = f.shape == g.shape and x_hat.shape == y_hat.shape
    require(shapes, f"shapes differ: {f.shape} and {x_hat.shape} before, {g.shape} and {y_hat.shape} after")
    flipped = (f > 0) != (g > 0)
    same = ~flipped.any(axis=1)
    flat = (array.reshape(len(rows), -1)[same] for array in (f, g, x_hat, y_hat))
    f_same, g_same, x_same, y_same = flat
    eps = max(float(jnp.finfo(one.params["W_dec"].dtype).eps) for one in (before, after))
    return Difference(
        _relative(f_same, g_same),
        _relative(x_same, y_same),
        int(flipped.sum()),
        int((f > 0).sum()),
        len(rows),
        max(ROUNDINGS * eps, 1e-12),
    )


def _converted(path, target, to, check, x, lossy) -> Conversion:
    name, before = formats.read(path)
    left_out = formats.write(
        target, before.sae, before.params, to,
        metadata=before.metadata, log_sparsity=before.log_sparsity, labels=before.labels, lossy=lossy,
    )  # fmt: skip
    found = difference(before, formats.read(target)[1], x) if check else None
    if found is not None and not found.ok:
        require(lossy, f"{path} as {to} is not the same SAE, so it was not written: {found}")
    return Conversion(path, name, target, left_out, found)


def _random_rows(sae: SAE) -> np.ndarray:
    config = sae.config
    shape = (config["sources"], config["d_in"]) if "sources" in config else (config["d_in"],)
    scales = np.logspace(*SPREAD, RANDOM_ROWS).reshape(-1, *(1 for _ in shape))
    return scales * np.random.default_rng(0).normal(size=(RANDOM_ROWS, *shape))


def _computed(loaded: Loaded, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    params = {name: jnp.asarray(leaf, jnp.float64) for name, leaf in loaded.params.items()}
    f = loaded.sae.encode(params, jnp.asarray(rows))
    return np.asarray(f), np.asarray(loaded.sae.decode(params, f, jnp.asarray(rows)))


def _relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    if not ours.size:
        return 0.0
    scale = np.abs(ours).max(axis=1)
    error = np.abs(ours - theirs).max(axis=1)
    worst = np.max(error / np.where(scale > 0, scale, 1.0))
    return float("inf") if np.isnan(worst) else float(worst)
