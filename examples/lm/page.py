"""Features on a page: each with its contexts, and the tokens it makes likelier."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from lm.features import Shown

AGREE, OF = 8, 10


class Feature(NamedTuple):
    """What the page tells of one feature."""

    name: str
    density: float
    """Share of tokens on which it is active."""
    promoted: Sequence[str]
    """The next tokens that it makes likelier, the most first."""
    contexts: Sequence[Shown]


def evident(contexts: Sequence[Shown]) -> str | None:
    """What the strongest contexts have in common, by a rule that asks no reader.

    Of the ten strongest that read differently, at least eight agree, case and spaces aside, in the token on
    which the feature is strongest, or in the last word before it, or in the first word after it.

    Returns:
      The common word and where it stands, or None.
    """
    first = contexts[:OF]
    places = {
        "on": [shown.token for shown in first],
        "after": [" ".join(shown.before.split()[-1:]) for shown in first],
        "before": [" ".join(shown.after.split()[:1]) for shown in first],
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
        lines = [
            f"{shown.value:6.2f}  {flat(shown.before)}«{flat(shown.token)}»{flat(shown.after)}"
            for shown in feature.contexts[:contexts]
        ]
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
