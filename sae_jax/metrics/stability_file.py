"""How far seeds agree, kept beside a run: `stability.npz`."""

from pathlib import Path

import numpy as np

from sae_jax.metrics.stability import Stability

NAME = "stability.npz"


def write(folder: Path, found: Stability) -> None:
    """Keep it in the folder of a run."""
    np.savez(
        folder / NAME,
        widths=[len(each) for each in found.comes_back],
        comes_back=np.concatenate([*found.comes_back, np.zeros(0)]),
        mean_cosine=np.concatenate([*found.mean_cosine, np.zeros(0)]),
        of_member=found.of_member,
        consistency=found.consistency,
        error=found.error,
        sizes=[len(group) for group in found.groups],
        groups=np.concatenate([*found.groups, np.zeros(0, int)]),
    )


def read(folder: Path) -> Stability | None:
    """What `write` kept in a folder; None where it kept nothing."""
    if not (folder / NAME).is_file():
        return None
    with np.load(folder / NAME, allow_pickle=False) as found:

        def parts(name: str, sizes: str) -> tuple[np.ndarray, ...]:
            return tuple(np.split(found[name], np.cumsum(found[sizes])))[:-1]

        return Stability(
            parts("comes_back", "widths"),
            parts("mean_cosine", "widths"),
            found["of_member"],
            found["consistency"],
            found["error"],
            parts("groups", "sizes"),
        )
