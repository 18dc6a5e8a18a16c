"""Everything that is to be known of the features of an SAE, put together."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Array, Float

from sae_jax.base import require
from sae_jax.features.keeping import USUAL, Options
from sae_jax.features.look import Told, look, require_fit
from sae_jax.features.observed import NONE, Observed, Seen, Weighed
from sae_jax.features.reading import Reading
from sae_jax.features.weigh import weigh
from sae_jax.folds import untied
from sae_jax.trained import TrainedSAE

Words = Callable[[int], str]
"""How a token is written, by its id."""


def observe(
    trained: TrainedSAE,
    reading: Reading,
    *,
    words: Words | Sequence[str] | None = None,
    labels: Mapping[int, str] | None = None,
    unembedding: Float[Array | np.ndarray, "d_out vocabulary"] | None = None,
    others: Sequence[TrainedSAE] = (),
    options: Options = USUAL,
    projection: Literal["pca", "umap"] = "pca",
    about: Mapping[str, Any] | None = None,
    told: Callable[[Told], None] = lambda now: None,
) -> Observed:
    """What each feature answers to, what it writes, and which others are like it.

    Args:
      trained: the SAE.
      reading: activations in contexts, from `of_store` or `of_rows`; they are read once.
      words: how tokens are written: a list by id, or a function of the id; None where nobody knows.
      labels: what features are called; None for those that the SAE carries.
      unembedding: what decoder rows add to the logits of the vocabulary; None where there is none.
      others: SAEs that differ from this one by their seed.
      options: how much of each feature to keep.
      projection: of the map.
      about: where all this comes from, for the page.
      told: see `look`.

    Returns:
      `Observed`. What could not be had is named in `left_out`.

    Raises:
      InputError: widths that differ, or labels of features that do not exist.

    Example:
      >>> found = observe(load("sae/"), of_store(open_store("acts/")), words=tokenizer.convert_ids_to_tokens)
      >>> report.write_dashboard(found, "sae/features")
    """
    require_fit(trained.sae, reading, options)
    labels = trained.about.labels if labels is None else labels
    # what the weights tell comes first: bad input is then found before the pass and not after it
    weighed = weigh(
        untied(*trained)[1],
        near=options.near,
        unembedding=unembedding,
        others=[untied(*one)[1] for one in others],
        projection=projection,
    )
    d_sae = len(weighed.norm)
    missing = [feature for feature in labels if not 0 <= feature < d_sae]
    require(not missing, f"there is no feature {missing[:1]} to label: they are 0 to {d_sae - 1}")
    seen = look(trained.sae, trained.params, reading, options, told=told)
    return Observed(
        seen,
        weighed,
        None if words is None else _written(seen, weighed, words),
        labels,
        _left_out(seen, weighed, words is not None),
        {} if about is None else about,
    )


def _written(seen: Seen, weighed: Weighed, words: Words | Sequence[str]) -> dict[int, str]:
    """The tokens that occur."""
    ids = [
        found.tokens for found in (seen.strongest, seen.by_chance, seen.passages) if found.tokens is not None
    ]
    ids += [near.places for near in (weighed.promoted, weighed.suppressed) if near is not None]
    occur = (
        np.setdiff1d(np.concatenate([np.unique(each) for each in ids]), [NONE]) if ids else np.zeros(0, int)
    )
    write = words if callable(words) else words.__getitem__
    if not callable(words):
        largest = int(occur.max(initial=0))
        require(largest < len(words), f"there are {len(words)} words, but a token has the id {largest}")
    return {token: str(write(token)) for token in occur.tolist()}


def _left_out(seen: Seen, weighed: Weighed, written: bool) -> tuple[str, ...]:
    sentences = {
        "The rows come without tokens, so contexts are shown as numbers of rows.": seen.strongest.tokens
        is None,
        "Tokens are shown by their ids: there is no tokenizer or list of words.": not written
        and seen.strongest.tokens is not None,
        "What features write to the logits is not shown: there is no unembedding.": weighed.promoted is None,
        "How stable features are across seeds is not shown: there are no SAEs of other seeds.": weighed.again
        is None,
        "Encoder and decoder are not compared: they have different shapes.": weighed.cosine is None,
    }
    return tuple(sentence for sentence, holds in sentences.items() if holds)
