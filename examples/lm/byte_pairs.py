"""Tokens made from the text itself: byte pair encoding, in numpy.

Text is cut into pieces (a word with the space before it, a run of punctuation, a line's end with the indent
after it), pieces into bytes, and the commonest pair of neighbours is joined to a new token, again and
again. Every text encodes, since every byte is a token.
"""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

PIECE = re.compile(r"\n *| ?[^\W\d]+| ?\d| ?[^\w\s]+|\s")
BETWEEN = -1
"""Stands after each piece: no pair reaches across it."""

Merges = np.ndarray
"""[merges, 2]: the i-th row is the pair of tokens that token 256 + i joins."""


def learn(texts: Sequence[str], vocabulary: int) -> Merges:
    """The merges that make a vocabulary: each joins the pair that is commonest after those before it.

    Args:
      texts: to learn from.
      vocabulary: how many tokens there are to be, the 256 bytes among them; fewer where no pair is left.
    """
    counts = Counter(piece for text in texts for piece in PIECE.findall(text))
    # a piece that comes once teaches nothing, and half of all kinds are such
    often = {piece: count for piece, count in counts.items() if count > 1}
    symbols, lengths = _symbols(often)
    weights = np.repeat(np.fromiter(often.values(), np.int64), lengths)
    merges = []
    for token in range(256, vocabulary):
        left, right = symbols[:-1], symbols[1:]
        inside = (left != BETWEEN) & (right != BETWEEN)
        pairs = left[inside].astype(np.int64) * vocabulary + right[inside]
        if len(pairs) == 0:
            break
        pair = divmod(np.bincount(pairs, weights[:-1][inside]).argmax(), vocabulary)
        symbols, kept = _joined(symbols, pair, token)
        weights = weights[kept]
        merges.append(pair)
    return np.array(merges, np.int32).reshape(-1, 2)


def encode(texts: Sequence[str], merges: Merges) -> list[np.ndarray]:
    """Texts as tokens.

    Returns:
      int32 tokens of each text.
    """
    pieces: dict[str, int] = {}
    kinds = [
        np.array([pieces.setdefault(piece, len(pieces)) for piece in PIECE.findall(text)], np.int64)
        for text in texts
    ]
    symbols, _ = _symbols(pieces)
    for number, pair in enumerate(merges.tolist()):
        symbols, _ = _joined(symbols, pair, 256 + number)
    ends = np.flatnonzero(symbols == BETWEEN)
    starts = np.concatenate([[0], ends[:-1] + 1])
    return [_gathered(symbols, starts[kind], ends[kind]) for kind in kinds]


def spelled(merges: Merges) -> list[bytes]:
    """What each token stands for."""
    spelling = [bytes([byte]) for byte in range(256)]
    for left, right in merges.tolist():
        spelling.append(spelling[left] + spelling[right])
    return spelling


def _symbols(pieces) -> tuple[np.ndarray, list[int]]:
    """The bytes of all pieces, `BETWEEN` after each, and how many symbols each piece takes."""
    spelled = [piece.encode() for piece in pieces]
    # 255 is no byte of UTF-8
    symbols = np.frombuffer(b"".join(piece + b"\xff" for piece in spelled), np.uint8).astype(np.int32)
    return np.where(symbols == 255, BETWEEN, symbols), [len(piece) + 1 for piece in spelled]


def _joined(symbols: np.ndarray, pair, token: int) -> tuple[np.ndarray, np.ndarray]:
    """The symbols with a pair joined from left to right, and which places are kept."""
    found = np.flatnonzero((symbols[:-1] == pair[0]) & (symbols[1:] == pair[1]))
    # of overlapping finds (a a a) every other one counts
    run = np.cumsum(np.diff(found, prepend=-2) > 1)
    place_in_run = np.arange(len(found)) - np.searchsorted(run, run)
    found = found[place_in_run % 2 == 0]
    kept = np.ones(len(symbols), bool)
    kept[found + 1] = False
    symbols = symbols.copy()
    symbols[found] = token
    return symbols[kept], kept


def _gathered(symbols: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The slices symbols[start:end], end to end."""
    lengths = ends - starts
    offsets = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
    return symbols[offsets + np.arange(lengths.sum())]
