"""The model card of an SAE on the Hugging Face hub."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from sae_jax.architectures import describe
from sae_jax.base import SAE, Params
from sae_jax.hub import MARK

FRONT = f"""---
library_name: sae_jax
tags:
- sae_jax
- saelens
- sparse-autoencoder
---
{MARK}
"""
LONGEST = 200
"""Characters of one cell."""
FIRST_LABELS = 10


def of_sae(
    repo_id: str,
    path: str,
    sae: SAE,
    params: Params,
    metadata: Mapping[str, Any],
    labels: Mapping[int, str],
    metrics: Mapping[str, Any] | None,
    opens_in_saelens: bool,
) -> str:
    """The card of one SAE: what it is, what it reads, how good it is, how it is loaded.

    Args:
      repo_id: where it goes, "user/repo".
      path: where in there.
      sae: the model.
      params: its weights.
      metadata: of the model, the site and the training; what is no number or text is left out.
      labels: what features are called, by number; the first are shown.
      metrics: by name, as `sae-jax eval --json` gives them; of lists only those by source are shown.
      opens_in_saelens: whether SAELens has a form for it.

    Returns:
      Markdown, with front matter.
    """
    config = {name: value for name, value in describe(sae.config).items() if name != "architecture"}
    name = sae.config["architecture"]
    of = f" of {metadata['model_name']}" if metadata.get("model_name") else ""
    tensors = {leaf: f"{list(np.shape(value))}, {np.asarray(value).dtype}" for leaf, value in params.items()}
    parts = [
        FRONT,
        f"# {_cell(f'Sparse autoencoder ({name}){of}')}\n",
        _table("", "", {"architecture": name, **_plain(config)}),
        _table("tensor", "shape, dtype", tensors),
    ]
    site = _plain(metadata)
    if site:
        parts += ["## What it reads\n", _table("", "", site)]
    if metrics:
        table = _table("metric", "value", _figures(metrics))
        parts += ["## Metrics\n", table, "As `sae-jax eval` names them.\n"]
    if labels:
        first = {str(feature): label for feature, label in [*labels.items()][:FIRST_LABELS]}
        told = f"{len(labels):,} of {sae.config['d_sae']:,} features have a label in `labels.json`.\n"
        parts += ["## What features are called\n", told, _table("feature", "label", first)]
    return "\n".join([*parts, "## Load it\n", _loading(repo_id, path, opens_in_saelens)])


def of_repository(repo_id: str) -> str:
    """The card of a repository of several SAEs, each in a folder with its own."""
    return (
        f"{FRONT}\n# Sparse autoencoders\n\nEach folder holds one, with its own card.\n\n"
        f'```python\nimport sae_jax\n\ntrained = sae_jax.load("{repo_id}", "FOLDER")\n```\n'
    )


def _loading(repo_id: str, path: str, opens_in_saelens: bool) -> str:
    where = f'"{repo_id}"' + (f', "{path}"' if path else "")
    ours = f"```python\nimport sae_jax\n\ntrained = sae_jax.load({where})\nf = trained.encode(x)\n```\n"
    if not opens_in_saelens:
        return f"{ours}\nSAELens has no form for this architecture.\n"
    # from_pretrained asks for "FOLDER/cfg.json", so that a repository's own folder has no name it could take
    call = (
        f"SAE.from_pretrained({where})"
        if path
        else f"SAE.load_from_disk(huggingface_hub.snapshot_download({where}))"
    )
    imports = "from sae_lens import SAE" if path else "import huggingface_hub\nfrom sae_lens import SAE"
    return f"{ours}\nIn SAELens:\n\n```python\n{imports}\n\nsae = {call}\n```\n"


def _figures(metrics: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name, value in metrics.items():
        values = [np.nan if one is None else one for one in np.ravel(np.asarray(value, object)).tolist()]
        if np.ndim(value) == 0 or name.endswith("_by_source"):
            found[name] = ", ".join(f"{float(one):.6g}" for one in values)
    return found


def _plain(told: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in told.items() if isinstance(value, str | int | float)}


def _table(left: str, right: str, rows: Mapping[str, Any]) -> str:
    lines = [f"| {left} | {right} |", "| --- | --- |"]
    lines += [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items()]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    """One line that Markdown does not take for more than text."""
    text = " ".join(str(value).split())[:LONGEST]
    return "".join(f"\\{each}" if each in "\\|<>[]`*" else each for each in text)
