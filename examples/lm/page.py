"""Features on a page: each with its contexts, and the tokens it makes likelier."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from sae_jax.features import Context

AGREE, OF = 8, 10


class Feature(NamedTuple):
    """What the page tells of one feature."""

    name: str
    density: float
    """Share of tokens on which it is active."""
    promoted: Sequence[str]
    """The next tokens that it makes likelier, the most first."""
    contexts: Sequence[Context]


def read_differently(contexts: Sequence[Context]) -> list[Context]:
    """The contexts, but once those that read alike from three tokens before the strongest to two after it."""
    found = {}
    for context in contexts:
        near = context.tokens[max(0, context.place - 3) : context.place + 3]
        found.setdefault((near, min(context.place, 3)), context)
    return list(found.values())


def evident(contexts: Sequence[Context]) -> str | None:
    """What the strongest contexts have in common, by a rule that asks no reader.

    Of the ten strongest that read differently, at least eight agree, case and spaces aside, in the token on
    which the feature is strongest, or in the last word before it, or in the first word after it.

    Returns:
      The common word and where it stands, or None.
    """
    first = contexts[:OF]
    places = {
        "on": [shown.tokens[shown.place] for shown in first],
        "after": [" ".join("".join(shown.tokens[: shown.place]).split()[-1:]) for shown in first],
        "before": [" ".join("".join(shown.tokens[shown.place + 1 :]).split()[:1]) for shown in first],
    }
    for place, words in places.items():
        word, times = Counter(word.strip().lower() or repr(word) for word in words).most_common(1)[0]
        if len(first) == OF and times >= AGREE:
            return f"{place} `{word}` in {times} of {OF}"
    return None


def page(title: str, about: str, found: Sequence[Feature], contexts: int = 10) -> str:
    """Markdown: a block of contexts per feature, the strongest token of each between guillemets."""
    parts = [f"# {title}\n\n{about}"]
    for feature in found:
        lines = [f"{shown.peak:6.2f}  {flat(shown.text)}" for shown in feature.contexts[:contexts]]
        promoted = "  ".join(flat(token) for token in feature.promoted)
        parts.append(
            f"## {feature.name}\n\nActive on {feature.density:.2%} of tokens; "
            f"{evident(feature.contexts) or 'no common word'}.\n\n"
            + "\n".join(["```text", *lines, f"makes likelier:  {promoted}", "```"])
        )
    return "\n\n".join(parts) + "\n"


def flat(text: str) -> str:
    """Text on one line."""
    return text.replace("\n", "⏎").replace("\t", "⇥").replace("\0", "␀").replace("\r", "")
