"""What a store tells of itself: the one file that decides which of its rows exist."""

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from sae_jax.base import InputError, require

NAME = "manifest.json"
FORMAT, VERSION = "sae_jax activation store", 1
ROWS_AT_A_TIME = 4096


class Statistics(NamedTuple):
    """Of the rows of one site so far: sums in float64 over values in float32."""

    rows: int
    mean: Float[np.ndarray, "d_in"]
    variance: Float[np.ndarray, "d_in"]
    """The diagonal of the covariance, over n."""
    mean_norm: float
    """E|x|."""

    def with_rows(self, x: Shaped[np.ndarray, "rows d_in"]) -> "Statistics":
        """With more rows among them, merged as Chan, Golub and LeVeque 1979 do; exact in its order."""
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is seen by `finite`
            return self._with_rows(x)

    def _with_rows(self, x: np.ndarray) -> "Statistics":
        now = self
        for start in range(0, len(x), ROWS_AT_A_TIME):
            part = x[start : start + ROWS_AT_A_TIME].astype(np.float32)
            mean = part.mean(axis=0, dtype=np.float64)
            norm = np.sqrt(np.einsum("nd,nd->n", part, part)).mean(dtype=np.float64)
            part -= mean.astype(np.float32)
            variance = np.square(part, out=part).mean(axis=0, dtype=np.float64)
            now = now._merged(len(part), mean, variance, float(norm))
        return now

    @property
    def finite(self) -> bool:
        """Whether every row is."""
        return bool(np.isfinite(self.mean_norm) and np.isfinite(self.variance).all())

    def _merged(self, rows: int, mean: np.ndarray, variance: np.ndarray, mean_norm: float) -> "Statistics":
        total = self.rows + rows
        share, apart = rows / total, mean - self.mean
        return Statistics(
            total,
            self.mean + share * apart,
            (1 - share) * self.variance + share * variance + share * (1 - share) * np.square(apart),
            (1 - share) * self.mean_norm + share * mean_norm,
        )


def no_rows(d_in: int) -> Statistics:
    """Of nothing yet."""
    return Statistics(0, np.zeros(d_in), np.zeros(d_in), 0.0)


class Reached(NamedTuple):
    """How far a harvest has come: what its next batches must go on from."""

    batch: int = -1
    """The last batch of contexts some of whose rows are stored."""
    rows: int = 0
    """How many of its rows are."""
    digest: str = ""
    """Of the tokens of all batches up to it."""


@dataclass(frozen=True)
class Manifest:
    """See the fields."""

    dtype: str
    """"float32", "float16" or "bfloat16"; of all sites."""
    chunk_rows: int
    shard_rows: int
    sites: dict[str, Statistics]
    """By name, in the order they were asked for."""
    about: dict[str, Any] = field(default_factory=dict)
    """Where the rows come from, as plain values: model, revision, text, context, ..."""
    rows: int = 0
    complete: bool = False
    reached: Reached = field(default_factory=Reached)

    def write(self) -> bytes:
        """As JSON, with a digest of itself."""
        told = asdict(self) | {
            "format": FORMAT,
            "version": VERSION,
            "sites": {name: _plain(found) for name, found in self.sites.items()},
            "reached": self.reached._asdict(),
        }
        return json.dumps(told | {"sha256": _digest(told)}, indent=1).encode()


def read(text: bytes, label: str) -> Manifest:
    """A manifest from its file.

    Args:
      text: the bytes of the file.
      label: how messages call it.

    Raises:
      InputError: not a manifest, of a newer version, or damaged.
    """
    try:
        told = json.loads(text)
        known = told["format"] == FORMAT
    except (ValueError, TypeError, KeyError, RecursionError):
        known, told = False, {}
    require(known, f"{label} is damaged, or no manifest of a store")
    version = told.get("version")
    require(
        not isinstance(version, int) or version <= VERSION,
        f"{label} is of version {version}, but this sae_jax reads up to {VERSION}: update it",
    )
    digest = told.pop("sha256", None)
    require(digest == _digest(told), f"{label} is damaged: its digest is not that of its content")
    sites = {
        name: Statistics(told["rows"], np.array(found["mean"], float), np.array(found["variance"], float),
                         found["mean_norm"])
        for name, found in told["sites"].items()
    }  # fmt: skip
    told = {name: value for name, value in told.items() if name not in ("format", "version")}
    return Manifest(**told | {"sites": sites, "reached": Reached(**told["reached"])})


def grown(manifest: Manifest, added: dict[str, np.ndarray], reached: Reached) -> Manifest:
    """The manifest once these rows are stored too."""
    sites = {name: found.with_rows(added[name]) for name, found in manifest.sites.items()}
    rows = manifest.rows + len(next(iter(added.values())))
    return replace(manifest, sites=sites, rows=rows, reached=reached)


def require_same_origin(before: Manifest, now: Manifest, label: str) -> None:
    """Raise `InputError` with what differs, unless both are to hold the same rows of the same model."""
    told = [{"dtype": one.dtype, "sites": list(one.sites), **one.about} for one in (before, now)]
    told = [json.loads(json.dumps(one)) for one in told]
    names = [name for name in told[0] | told[1] if told[0].get(name) != told[1].get(name)]
    differences = "; ".join(f"{name} was {told[0].get(name)}, now {told[1].get(name)}" for name in names)
    if names:
        raise InputError(
            f"{label} was begun with other options, so these cannot go on with it: {differences}"
        )


def _plain(found: Statistics) -> dict[str, Any]:
    return {
        "d_in": len(found.mean),
        "mean_norm": found.mean_norm,
        "mean": found.mean.tolist(),
        "variance": found.variance.tolist(),
    }


def _digest(told: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
