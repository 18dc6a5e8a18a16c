"""Labels for features by a user's own function of the contexts in which they are active."""

from collections.abc import Callable

import numpy as np

from sae_jax import labels
from sae_jax.features.contexts import contexts
from sae_jax.features.observed import Observed

Name = Callable[[int, list[str]], str | None]
"""The label of a feature, from its number and its strongest contexts; None for no label."""


def from_function(
    observed: Observed, function: Name, *, look: Callable[[int, int], None] = lambda done, total: None
) -> dict[int, str]:
    """What a function calls each feature that is ever active.

    Args:
      observed: what is known of the features.
      function: takes a feature's number and the texts of its strongest contexts, the strongest first, with
        the token where it is strongest in marks, " a «cat» sat"; gives a label, or None for no label.
      look: called after each feature with how many are done, and of how many.

    Returns:
      Labels by feature.

    Raises:
      InputError: whatever the function raises, with the feature's number; a label that is empty, no text or
        longer than 1,000 characters.

    Example:
      >>> trained.labelled(from_function(observed, lambda feature, texts: my_model(texts))).save("sae/")
    """

    def name(feature: int) -> str | None:
        return function(feature, [each.text for each in contexts(observed, observed.seen.strongest, feature)])

    alive = np.flatnonzero(observed.seen.fired).tolist()
    return labels.asked(alive, name, observed.d_sae, look)
