"""How a tokenizer's tokens are written."""

from collections.abc import Callable
from typing import Any

BEGINS_A_WORD = "▁"
"""In place of a space, in tokens of SentencePiece; decoded alone they would lose it."""


def words(tokenizer: Any) -> Callable[[int], str]:
    """The text of each token by itself, the space before a word included.

    Args:
      tokenizer: of Hugging Face, `torch_hooks.tokenizer(path)` for one.

    Returns:
      A function of a token's id. An id that the tokenizer does not know is written as "#" and its number;
      bytes that are no text by themselves as the replacement character.

    Example:
      >>> words(torch_hooks.tokenizer("gpt2"))(262)
      ' the'
    """

    def word(token: int) -> str:
        written = tokenizer.convert_ids_to_tokens(token) if 0 <= token < len(tokenizer) else None
        if written is None:
            return f"#{token}"
        if BEGINS_A_WORD in written:
            return written.replace(BEGINS_A_WORD, " ")
        return tokenizer.decode([token])

    return word
