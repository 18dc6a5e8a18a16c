"""Weight formats, one file each, and the one place that knows them all."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from sae_jax import labels as beside
from sae_jax.architectures import TABLE
from sae_jax.base import SAE, InputError, Params, require
from sae_jax.folds import fold_decoder_norms, plain
from sae_jax.formats import (
    circuit_tracer,
    crosscoder,
    described,
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    llama_scope,
    openai,
    saelens,
    seed_module,
    sparsify,
)
from sae_jax.formats.files import Place
from sae_jax.formats.format import Form, Format, Loaded

FORMATS: dict[str, Format] = {
    "llama_scope": llama_scope.FORMAT,
    "saelens": saelens.FORMAT,
    "dictionary_learning": dictionary_learning.FORMAT,
    "sparsify": sparsify.FORMAT,
    "gemma_scope": gemma_scope.FORMAT,
    "gemma_scope_2": gemma_scope_2.FORMAT,
    "circuit_tracer": circuit_tracer.FORMAT,
    "openai": openai.FORMAT,
    "crosscoder": crosscoder.FORMAT,
    "seed": seed_module.FORMAT,
}
"""Every format by name, in the order in which they are looked for."""

LONGEST_MESSAGE = 1000
DEEPEST, MOST_FOLDERS = 4, 10_000
"""How far below a folder SAEs are looked for, and in how many folders."""


def read(path: str | Path) -> tuple[str, Loaded]:
    """Read an SAE from disk, whichever of the known formats it is in.

    Args:
      path: a folder or file.

    Returns:
      The name of its format, and what it holds, with the `labels.json` of its folder.

    Raises:
      InputError: nothing there, no known format (what was looked for, and what is there), several SAEs, or a
        damaged file.
    """
    path = Path(path)
    require(path.exists(), f"{path} does not exist")
    place = Place(path)
    name = recognise(place)
    if name is None:
        below = {} if place.is_file else inside(path)
        if len(below) == 1:
            return read(*below.values())
        raise InputError(_unknown(place, below))
    try:
        loaded = described.restored(FORMATS[name].read(place))
        return name, loaded._replace(labels=_labels(place, loaded.sae))
    except InputError as error:
        # what a file says may be quoted, and be as long as the file
        reason = " ".join(str(error).split())[:LONGEST_MESSAGE]
        raise InputError(reason if str(path) in reason else f"{path}: {reason}") from None
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError) as error:
        # a config may say anything, and no reader thinks of all of it
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:LONGEST_MESSAGE]
        raise InputError(f"{path} says of its SAE what cannot be built: {reason}") from None


def recognise(place: Place) -> str | None:
    """The name of the format that a file or folder is in; None where it is in none."""
    return next((name for name, one in FORMATS.items() if one.recognise(place)), None)


def home(path: str | Path) -> Path | None:
    """The folder that is one SAE's own, where its `labels.json` lies; None of a file among others.

    Args:
      path: of the SAE: the folder, or the file in it.
    """
    place = Place(path)
    own = not place.is_file or recognise(Place(place.folder)) is not None
    return place.folder if own else None


def inside(folder: str | Path) -> dict[str, Path]:
    """The SAEs below a folder: a run of dictionary_learning, sparsify's hookpoints, a sweep's members.

    Args:
      folder: looked through four levels down.

    Returns:
      Paths by their names relative to the folder, in order; the folder itself is not among them.
    """
    found, level = {}, [Path(folder)] if Path(folder).is_dir() else []
    for _ in range(DEEPEST):
        below = sorted(one for parent in level for one in parent.iterdir())[:MOST_FOLDERS]
        for one in below:
            if (one.is_dir() or one.suffix == ".safetensors") and recognise(Place(one)) is not None:
                found[one.relative_to(folder).as_posix()] = one
        level = [one for one in below if one.is_dir() and not one.is_symlink() and one not in found.values()]
    return found


def several(path: str | Path) -> dict[str, Path]:
    """The SAEs below a folder that is none itself; empty of anything else."""
    place = Place(path)
    return {} if place.is_file or recognise(place) is not None else inside(path)


def write(
    path: str | Path,
    sae: SAE,
    params: Params,
    format: str = "saelens",
    *,
    metadata: Mapping[str, Any] | None = None,
    log_sparsity: np.ndarray | None = None,
    labels: Mapping[int, str] = MappingProxyType({}),
    lossy: bool = False,
) -> list[str]:
    """Write an SAE in one of the known formats.

    Decoder norms that features are chosen by are folded into the encoder first, as SAELens does.

    Args:
      path: a folder, made if missing, in which files of the same names are replaced; or a file, where the
        format is one file and the path ends as that does.
      sae: the model.
      params: its weights.
      format: a key of `FORMATS`.
      metadata: of the model, site and training, as `read` gives it.
      log_sparsity: log10 of how often each latent was active, [d_sae].
      labels: what features are called, by number; `labels.json` where the SAE has a folder of its own.
      lossy: write it even if the format cannot hold all that features and reconstructions depend on.

    Returns:
      What the file does not tell, each a phrase; empty where it holds everything.

    Raises:
      InputError: no such format, an SAE that it cannot hold; the message says what would be lost.
    """
    require(format in FORMATS, f"no format is called {format!r}; there are: {', '.join(FORMATS)}")
    known, name = FORMATS[format], sae.config.get("architecture")
    require(name in TABLE, f"an SAE called {name!r} cannot be written: no reader knows it")
    sae, params = fold_decoder_norms(sae, {name: np.asarray(leaf) for name, leaf in params.items()})
    kept = {**(metadata or {}), **described.description(sae, params)}
    form = known.form(Loaded(*plain(sae, params), kept, log_sparsity))
    require(
        lossy or not form.lost,
        f"{format} cannot hold this SAE; it would lose {', and '.join(form.lost)} (--lossy goes on without)",
    )
    path, name = Path(path), next(iter(form.files))
    single = len(form.files) == 1 and path.suffix == Path(name).suffix and not path.is_dir()
    files = {path: form.files[name]} if single else {path / name: put for name, put in form.files.items()}
    own = not single and not known.several
    if own:
        files[path / beside.NAME] = partial(beside.write, labels=labels) if labels else None
    _put(files)
    untold = [] if known.keeps_metadata else ["how it was trained, and on what"]
    unnamed = ["what its features are called"] if labels and not own else []
    return [*form.lost, *untold, *unnamed]


def _labels(place: Place, sae: SAE) -> Mapping[int, str]:
    file = place.folder / beside.NAME
    return beside.read(file, sae.config["d_sae"]) if file.is_file() and home(place.path) else {}


def _put(files: Mapping[Path, Callable[[Path], None] | None]) -> None:
    """Every file written beside its place first, so that a full disk leaves what was there."""
    stages: dict[Path, Path] = {}
    try:
        for file, put in files.items():
            if put is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                stages[file] = file.with_name(f".{file.name}.writing")
                put(stages[file])
        for file in files:
            if file in stages:
                stages[file].replace(file)
            else:
                file.unlink(missing_ok=True)
    finally:
        for stage in stages.values():
            stage.unlink(missing_ok=True)


def _unknown(place: Place, below: dict[str, Path]) -> str:
    if below:
        names = ", ".join(list(below)[:20]) + (", ..." if len(below) > 20 else "")
        return f"{place.path} holds {len(below)} SAEs: name one of {names}, or use load_all"
    found = [f"{name}{_content(place, name)}" for name in place.names[:10]]
    listed = ", ".join(found) + (", ..." if len(place.names) > 10 else "")
    looked_for = "; ".join(one.told for one in FORMATS.values())
    return f"{place.path} is in no format known here; looked for: {looked_for}; found: {listed or 'no files'}"


def _content(place: Place, name: str) -> str:
    """The names in a file of tensors; what is wrong with one that is damaged is raised."""
    readers = {".safetensors": lambda name: place.header(name)[0], ".npz": place.npz}
    readers |= dict.fromkeys((".pt", ".pth"), place.torch)
    reader = readers.get(Path(name).suffix)
    if reader is None:
        return ""
    keys = list(reader(name))
    return f" ({', '.join(keys[:8]) or 'nothing'}{', ...' if len(keys) > 8 else ''})"


__all__ = [
    "FORMATS",
    "Form",
    "Format",
    "Loaded",
    "Place",
    "home",
    "inside",
    "read",
    "recognise",
    "several",
    "write",
]
