"""Texts to contexts: the batches of tokens that a language model reads."""

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from sae_jax.base import InputError, require

PADDING = -1
"""What stands in `tokens` where a context has no token."""

Begin = Literal["context", "document", "none"]

DOCUMENTS_AT_ONCE = 64  # fast tokenizers share them out among the cores


class Contexts(NamedTuple):
    """A batch of contexts."""

    tokens: Int[np.ndarray, "batch context"]
    """int32, `PADDING` where there is none."""
    kept: Bool[np.ndarray, "batch context"]
    """Positions whose activations are stored and measured."""


def contexts(
    texts: Iterable[str],
    tokenizer: Any,
    context: int,
    *,
    batch_size: int = 32,
    begin: Begin = "context",
    pack: bool = True,
    keep_special: bool = False,
) -> Iterator[Contexts]:
    """Texts as batches of contexts, made as they are asked for; the same texts give the same batches.

    Packed, documents follow one another in one stream of tokens, cut every `context` tokens; what is left
    at its end is dropped. A BOS token (else CLS, else EOS) stands, by `begin`:

        "context"    first in each context, and within one where documents meet   (SAELens's default)
        "document"   first in each document, wherever contexts are cut
        "none"       nowhere

    and is not doubled where a text brings its own. Not packed, each document is a context, cut off at
    `context` tokens or padded, with the special tokens that the tokenizer gives it.

    Args:
      texts: documents.
      tokenizer: of Hugging Face, `torch_hooks.tokenizer(path)` for one.
      context: tokens per context.
      batch_size: contexts per batch; the last batch may have fewer.
      begin: where packed contexts have the BOS token.
      pack: whether a context holds as many documents as it has room for, or one.
      keep_special: whether BOS, EOS, CLS, SEP and PAD tokens are kept like any other.

    Returns:
      An iterator of batches.

    Raises:
      InputError: a context or batch too small, an unknown `begin`, or no token to begin with.

    Example:
      >>> batch = next(contexts(["one text", "another"], tokenizer, context=4))
      >>> batch.tokens.shape
      (1, 4)

    Source: SAELens, `tokenization_and_batching.concat_and_batch_sequences`.
    """
    require(
        begin in ("context", "document", "none"), f"begin must be context, document or none, got {begin!r}"
    )
    smallest = 2 if begin == "context" else 1
    require(context >= smallest, f"context must be at least {smallest}, got {context}")
    require(batch_size >= 1, f"batch_size must be at least 1, got {batch_size}")
    options = {} if pack else {"truncation": True, "max_length": context}
    documents = _documents(texts, tokenizer, add_special_tokens=not pack, **options)
    if pack:
        bos = None if begin == "none" else _bos(tokenizer)
        rows = _packed(documents, context, bos, every_document=begin == "document")
    else:
        rows = (np.pad(tokens, (0, context - len(tokens)), constant_values=PADDING) for tokens in documents)
    special = set() if keep_special else _special(tokenizer)
    return (_contexts(np.stack(batch), special) for batch in _grouped(rows, batch_size))


def from_tokens(
    tokens: Int[np.ndarray, "n context"], batch_size: int = 32, *, special: Sequence[int] = ()
) -> Iterator[Contexts]:
    """Contexts that are tokens already, in batches.

    Args:
      tokens: [n, context] integers, a memory map for one; `PADDING` where there is none.
      batch_size: contexts per batch; the last batch may have fewer.
      special: tokens that are not kept.

    Raises:
      InputError: not integers [n, context], or a batch too small.
    """
    fits = tokens.ndim == 2 and tokens.dtype.kind in "iu"
    require(fits, f"tokens must be integers [n, context], got {tokens.dtype} {list(tokens.shape)}")
    require(batch_size >= 1, f"batch_size must be at least 1, got {batch_size}")
    starts = range(0, len(tokens), batch_size)
    return (_contexts(np.asarray(tokens[start : start + batch_size]), set(special)) for start in starts)


def read_texts(
    sources: str | Path | Sequence[str | Path], *, column: str = "text", split: str = "train"
) -> Iterator[str]:
    """Documents, one after another, from files, folders and datasets.

    Args:
      sources: one or several of: a text file in UTF-8, which is one document; a `.jsonl` file, with one
        a line; a folder, for all of these below it in the order of their paths, hidden and binary files left
        out; a folder of `datasets.save_to_disk`; the name of a dataset on the Hugging Face hub.
      column: where JSON lines and datasets have the text.
      split: of a dataset that has several.

    Returns:
      An iterator of texts, read as they are asked for.

    Raises:
      InputError: nothing there, no such column or split, or the package `datasets` missing; when they are
        reached, text that is not UTF-8 and lines that are not JSON.

    Example:
      >>> batches = contexts(read_texts("books/"), tokenizer, context=128)
    """
    sources = [sources] if isinstance(sources, str | Path) else sources
    opened = [_opened(source, column, split) for source in sources]
    return (text for texts in opened for text in texts)


def size_of(sources: str | Path | Sequence[str | Path]) -> int | None:
    """How many bytes of text files `read_texts` will read; None where datasets are among the sources."""
    sources = [sources] if isinstance(sources, str | Path) else sources
    paths = [Path(source) for source in sources]
    if not all(path.exists() and not _is_saved_dataset(path) for path in paths):
        return None
    files = [file for path in paths for file in (_text_files(path) if path.is_dir() else [path])]
    return sum(file.stat().st_size for file in files)


def _opened(source: str | Path, column: str, split: str) -> Iterator[str]:
    path = Path(source)
    if path.is_file():
        return _file(path, column)
    if path.is_dir():
        return _dataset(source, column, split) if _is_saved_dataset(path) else _folder(path, column)
    text = str(source)
    looks_local = text.startswith(("/", ".", "~")) or text.count("/") > 1 or path.suffix in (".txt", ".jsonl")
    require(not looks_local, f"there is no file or folder {source}")
    return _dataset(source, column, split)


def _folder(folder: Path, column: str) -> Iterator[str]:
    paths = _text_files(folder)
    require(bool(paths), f"there are no text files in {folder}")
    return (text for path in paths for text in _file(path, column))


def _is_saved_dataset(path: Path) -> bool:
    return any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _text_files(folder: Path) -> list[Path]:
    def visible(path: Path) -> bool:
        return not any(part.startswith(".") for part in path.relative_to(folder).parts)

    return [path for path in sorted(folder.rglob("*")) if path.is_file() and visible(path) and _is_text(path)]


def _is_text(path: Path) -> bool:
    """Git's rule: no zero byte among the first 8,000."""
    with path.open("rb") as file:
        return b"\0" not in file.read(8000)


def _file(path: Path, column: str) -> Iterator[str]:
    if path.suffix != ".jsonl":
        yield _decoded(path.read_bytes(), path)
        return
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _json_text(_decoded(line, path, offset), column, f"line {number} of {path}")
            offset += len(line)


def _decoded(data: bytes, path: Path, offset: int = 0) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        at, byte = offset + error.start, data[error.start]
        raise InputError(
            f"{path} is not UTF-8: byte {at} is 0x{byte:02x}; convert it, or leave it out"
        ) from None


def _json_text(line: str, column: str, where: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where} is not JSON: {error}") from None
    require(isinstance(row, dict), f"{where} must be a JSON object, got {type(row).__name__}")
    require(column in row, f"{where} has no {column!r}; it has {', '.join(row) or 'nothing'}")
    return _text(row[column], f"{column!r} in {where}")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where} must be text, got {type(value).__name__}")
    return value


def _dataset(source: str | Path, column: str, split: str) -> Iterator[str]:
    """The texts of a saved dataset, or of one on the hub, which is then streamed."""
    try:
        import datasets
    except ImportError:
        raise InputError(f"{source} needs the package datasets: pip install 'sae-jax[lm]'") from None
    rows: Any
    try:
        if Path(source).is_dir():
            rows = datasets.load_from_disk(source)
        else:
            rows = datasets.load_dataset(str(source), split=split, streaming=True)
    except Exception as error:  # the hub, arrow and the file system all raise their own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{source} is no file or folder here, and no dataset can be read from it: {reason}"
        ) from None
    if isinstance(rows, dict):
        require(split in rows, f"{source} has no split {split!r}; it has {', '.join(rows)}")
        rows = rows[split]
    columns = rows.column_names
    require(
        columns is None or column in columns,
        f"{source} has no column {column!r}; it has {', '.join(columns or [])}",
    )
    return (_text(row[column], f"{column!r} in {source}") for row in rows.select_columns([column]))


def _documents(texts: Iterable[str], tokenizer: Any, **options) -> Iterator[Int[np.ndarray, "_"]]:
    """The tokens of each document that has any."""
    for group in _grouped(iter(texts), DOCUMENTS_AT_ONCE):
        # not verbose: that a document is longer than the model's context is no matter here
        for ids in tokenizer(group, verbose=False, **options)["input_ids"]:
            if ids:
                yield np.asarray(ids, np.int32)


def _packed(
    documents: Iterable[Int[np.ndarray, "_"]], context: int, bos: int | None, every_document: bool
) -> Iterator[Int[np.ndarray, "context"]]:
    """The stream of all documents, cut into contexts."""
    nothing, opening = np.empty(0, np.int32), np.asarray([] if bos is None else [bos], np.int32)
    row = nothing
    for document in documents:
        if (every_document or len(row)) and document[0] != bos:
            document = np.concatenate([opening, document])
        while len(document):
            if not len(row) and not every_document and document[0] != bos:
                row = opening
            room = context - len(row)
            row, document = np.concatenate([row, document[:room]]), document[room:]
            if len(row) == context:
                yield row
                row = nothing


def _bos(tokenizer: Any) -> int:
    for name in ("bos", "cls", "eos"):
        if (token := getattr(tokenizer, f"{name}_token_id", None)) is not None:
            return token
    raise InputError("the tokenizer has no BOS, CLS or EOS token to begin with: choose begin='none'")


def _special(tokenizer: Any) -> set[int]:
    """Tokens that structure a text; the unknown word and a chat's marks are text."""
    tokens = (getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "cls", "sep", "pad"))
    return {token for token in tokens if token is not None}


def _contexts(tokens: Int[np.ndarray, "batch context"], special: set[int]) -> Contexts:
    return Contexts(tokens.astype(np.int32), (tokens >= 0) & ~np.isin(tokens, list(special)))


def _grouped(items: Iterator, size: int) -> Iterator[list]:
    while group := list(islice(items, size)):
        yield group
