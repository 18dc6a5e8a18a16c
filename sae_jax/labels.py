"""What people call features, kept beside an SAE: `labels.json`, an object like {"12": "animals"}."""

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

from sae_jax.base import InputError, require

NAME = "labels.json"
"""Of the file in an SAE's folder."""
LONGEST = 1000
"""Characters of a label."""
LARGEST_FILE = 64 << 20
"""Bytes."""
COLUMNS = ("feature", "label")

Pairs = Iterable[tuple[Any, Any]]


def read(path: str | Path, d_sae: int) -> dict[int, str]:
    """Read labels from a file.

    Args:
      path: `.json`, an object of labels by feature; `.jsonl`, lines like {"feature": 12, "label": "animals"};
        `.csv` or `.tsv` with the columns feature and label. UTF-8.
      d_sae: how many features there are.

    Returns:
      Labels by feature, in order.

    Raises:
      InputError: a feature that does not exist or comes twice, a label that is empty, no text or too long, a
        damaged file, another kind of file.

    Example:
      >>> trained.labelled(labels.read("names.csv", 512)).save("sae/")
    """
    path = Path(path)
    reader = READERS.get(path.suffix.lower())
    require(path.exists(), f"{path} does not exist")
    if reader is None:
        raise InputError(f"labels are read from {', '.join(READERS)}, got {path}")
    size = path.stat().st_size
    require(size <= LARGEST_FILE, f"{path} has {size} bytes, more than the {LARGEST_FILE} that are read")
    try:
        return checked(reader(path.read_bytes().decode("utf-8-sig")), d_sae, str(path))
    except InputError:
        raise
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8: its byte {error.start} is none of a text's") from None
    except (ValueError, RecursionError, csv.Error) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{path} cannot be read as {path.suffix}: {reason}") from None


def write(path: str | Path, labels: Mapping[int, str]) -> None:
    """Write `labels.json`, by feature; what was there stays until all is written."""
    path = Path(path)
    stage = path.with_name(f".{path.name}.writing")
    told = {str(feature): label for feature, label in sorted(labels.items())}
    try:
        stage.write_text(json.dumps(told, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        stage.replace(path)
    finally:
        stage.unlink(missing_ok=True)


def checked(pairs: Pairs, d_sae: int, where: str) -> dict[int, str]:
    """Labels by feature, in order, each of a feature that exists.

    Args:
      pairs: feature, a number or its digits, and label.
      d_sae: how many features there are.
      where: they come from, for the message.

    Raises:
      InputError: as `read`.
    """
    found: dict[int, str] = {}
    for name, label in pairs:
        feature = _feature(name, d_sae, where)
        require(feature not in found, f"{where} has two labels of feature {feature}")
        good = isinstance(label, str) and label.strip() and _is_unicode(label)
        require(bool(good), f"{where}: the label of feature {feature} must be text, got {label!r:.50}")
        require(
            len(label) <= LONGEST,
            f"{where}: the label of feature {feature} has {len(label)} characters, more than {LONGEST}",
        )
        found[feature] = label
    return dict(sorted(found.items()))


def asked(
    features: Sequence[int],
    name: Callable[[int], str | None],
    d_sae: int,
    look: Callable[[int, int], None] = lambda done, total: None,
) -> dict[int, str]:
    """The labels that a user's function gives, feature by feature.

    Args:
      features: their numbers.
      name: called with each; None is no label.
      d_sae: how many features there are.
      look: called after each with how many are done, and of how many.

    Raises:
      InputError: whatever the function raises, with the feature's number; a label as in `checked`.
    """
    found: dict[int, str] = {}
    where = "the function that labels features"
    for done, feature in enumerate(features, 1):
        try:
            label = name(feature)
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise InputError(f"{where} failed at feature {feature}: {reason}") from error
        if label is not None:
            found |= checked([(feature, label)], d_sae, where)
        look(done, len(features))
    return found


def named(feature: int, labels: Mapping[int, str]) -> str:
    """A feature by its number, and by its label where it has one."""
    return f"{feature} {labels[feature]}" if feature in labels else str(feature)


def shown(label: str) -> str:
    """A label on one line, without what would steer a terminal."""
    line = " ".join(label.split())
    return "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in line)


def _feature(name: Any, d_sae: int, where: str) -> int:
    whole = isinstance(name, Integral) and not isinstance(name, bool)
    digits = isinstance(name, str) and re.fullmatch(r"-?[0-9]{1,15}", name.strip())
    require(bool(whole or digits), f"{where}: a feature must be a whole number, got {name!r:.50}")
    feature = int(name)
    require(0 <= feature < d_sae, f"{where}: feature {feature} does not exist, there are 0 to {d_sae - 1}")
    return feature


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _of_json(text: str) -> Pairs:
    # pairs, so that a name that comes twice is seen; a tuple is an object then, a list an array
    found = json.loads(text, object_pairs_hook=tuple)
    if not isinstance(found, tuple):
        raise ValueError('it must be an object like {"12": "animals"}')
    return found


def _of_lines(text: str) -> Iterator[tuple[Any, Any]]:
    # not `splitlines`: a label may hold other line ends than these
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            row = json.loads(line)
            if not isinstance(row, dict) or not set(COLUMNS) <= row.keys():
                raise ValueError(f'line {number} must be like {{"feature": 12, "label": "animals"}}')
            yield row["feature"], row["label"]


def _of_table(delimiter: str) -> Callable[[str], Iterator[tuple[Any, Any]]]:
    def read_table(text: str) -> Iterator[tuple[Any, Any]]:
        rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        if not set(COLUMNS) <= set(rows.fieldnames or ()):
            raise ValueError("its first line must name the columns feature and label")
        for row in rows:
            if row["label"] != "":  # a list of all features, of which some are named
                yield row["feature"], row["label"]

    return read_table


READERS: dict[str, Callable[[str], Pairs]] = {
    ".json": _of_json,
    ".jsonl": _of_lines,
    ".csv": _of_table(","),
    ".tsv": _of_table("\t"),
}
