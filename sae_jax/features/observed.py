"""What is known of the features of an SAE: by a pass over activations, and by its weights."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

NONE = -1
"""Where there is no feature, no row or no token."""


class Examples(NamedTuple):
    """Of every feature some contexts, the stronger first, each a window around its strongest token."""

    rows: Int[np.ndarray, "d_sae shown"]
    """The row of that token; `NONE` where there are no more."""
    values: Float[np.ndarray, "d_sae shown window"]
    """Activations of the feature on the tokens of the window, float32; NaN beyond the context."""
    tokens: Int[np.ndarray, "d_sae shown window"] | None
    """Their ids, `NONE` beyond the context; None for rows without tokens."""
    before: int
    """The strongest token's place in the window."""

    @property
    def peaks(self) -> Float[np.ndarray, "d_sae shown"]:
        """The largest activation of each context; 0 where there are no more."""
        return np.where(self.rows == NONE, 0, self.values[..., self.before])


class Near(NamedTuple):
    """Of every feature some others, or some tokens, the nearest first."""

    places: Int[np.ndarray, "d_sae near"]
    """Numbers of features or ids of tokens; `NONE` where there are no more."""
    values: Float[np.ndarray, "d_sae near"]


class Passages(NamedTuple):
    """Some whole contexts, and what is active in them."""

    rows: Int[np.ndarray, "passages length"]
    """`NONE` beyond the end."""
    tokens: Int[np.ndarray, "passages length"] | None
    features: Int[np.ndarray, "passages shown"]
    """The features that are strongest in the passage, in their own order; `NONE` where there are no more."""
    values: Float[np.ndarray, "passages length shown"]


class Seen(NamedTuple):
    """What a pass over activations tells of every feature; see `look`."""

    rows: int
    """Tokens seen."""
    contexts: int
    fired: Int[np.ndarray, "d_sae"]
    """Tokens on which it is active."""
    mean: Float[np.ndarray, "d_sae"]
    """Of its activations where it is active; 0 where it never is."""
    edges: Float[np.ndarray, "bins"]
    """Where the bins of the histogram begin: bin i is of activations above edges[i] and not above
    edges[i + 1]; the first begins at 0, the last has no end."""
    histogram: Int[np.ndarray, "d_sae bins"]
    """Tokens by activation, of those on which it is active."""
    strongest: Examples
    """The contexts with the largest activations."""
    by_chance: Examples
    """Contexts drawn evenly from those in which it is active: all of them where they are few."""
    fires_with: Near
    """Other features by the correlation of their activity with its own, over `sampled` tokens."""
    sampled: int
    passages: Passages

    @property
    def density(self) -> Float[np.ndarray, "d_sae"]:
        """Share of tokens on which each feature is active."""
        return self.fired / max(self.rows, 1)


class Weighed(NamedTuple):
    """What the weights tell of every feature; see `weigh`."""

    norm: Float[np.ndarray, "d_sae"]
    """Of its decoder row."""
    cosine: Float[np.ndarray, "d_sae"] | None
    """Between its encoder column and its decoder row; None where these differ in width."""
    near: Near
    """Other features by the cosine of their decoder rows."""
    place: Float[np.ndarray, "d_sae 2"]
    """In the plane of the map."""
    again: Float[np.ndarray, "d_sae"] | None
    """Mean over other seeds of the largest cosine with one of their decoder rows; None without any."""
    promoted: Near | None
    """Tokens to whose logits it adds most, by how much; None without an unembedding."""
    suppressed: Near | None
    """Tokens from whose logits it takes most, the most first; values are negative."""


class Observed(NamedTuple):
    """What a dashboard shows; see `observe`."""

    seen: Seen
    weighed: Weighed
    words: Mapping[int, str] | None
    """How each token that occurs is written; None where only ids are known."""
    labels: Mapping[int, str]
    """What people call features, by number."""
    left_out: tuple[str, ...]
    """What cannot be shown, and why, each a sentence."""
    about: Mapping[str, Any]
    """Where it comes from, as plain values: the SAE, the data, the command, versions, seconds."""

    @property
    def d_sae(self) -> int:
        """How many features."""
        return len(self.seen.fired)

    def word(self, token: int) -> str:
        """How a token is written; its number where that is not known."""
        return f"#{token}" if self.words is None else self.words.get(token, f"#{token}")
