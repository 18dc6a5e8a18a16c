"""The eight tokens of the post that this package grew out of."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

SEED_TOKENS = "the seed's tokens"
"""What a run calls them."""


class Tokens(NamedTuple):
    """Named rows of activations, and what each feature that should be found is active on."""

    names: tuple[str, ...]
    x: Float[np.ndarray, "tokens d_in"]
    truth: dict[str, frozenset[str]]


def seed_tokens() -> Tokens:
    """The eight tokens, four activations each, of the post that this package grew out of.

    Returns:
      Their names, the [8, 4] float32 matrix, and the three features that the post reads off its figure,
      each with the tokens that it is active on.

    Example:
      >>> seed_tokens().x.shape
      (8, 4)

    Source: "From superposition to interpretable features", a blog post of early 2025; its running example.
    """
    rows = {
        "cat": (0.80, 0.30, 0.10, 0.05),
        "happy cat": (0.82, 0.32, 0.12, 0.06),
        "dog": (0.70, 0.20, 0.05, 0.20),
        "energetic dog": (0.75, 0.30, 0.10, 0.25),
        "not cat": (0.05, 0.90, 0.40, 0.40),
        "not dog": (0.15, 0.85, 0.35, 0.50),
        "robot": (0.00, 0.70, 0.90, 0.80),
        "AI assistant": (0.10, 0.60, 0.85, 0.75),
    }
    truth = {
        "animal": frozenset({"cat", "happy cat", "dog", "energetic dog"}),
        "artificial": frozenset({"robot", "AI assistant"}),
        "not an animal": frozenset({"not cat", "not dog", "robot", "AI assistant"}),
    }
    return Tokens(tuple(rows), np.array(list(rows.values()), np.float32), truth)


def features_found(
    f: Float[np.ndarray, "*members tokens d_sae"], tokens: Tokens
) -> Bool[np.ndarray, "*members truths"]:
    """Which of the true features a dictionary has: those that some latent is active on exactly the tokens of.

    Args:
      f: encoded tokens, in the order of `tokens.names`.
      tokens: whose `truth` to look for.

    Returns:
      One flag per entry of `tokens.truth`, in its order.

    Example:
      >>> features_found(result.member(0).encode(tokens.x), tokens)
    """
    active = np.asarray(f) > 0
    truths = [np.array([name in where for name in tokens.names]) for where in tokens.truth.values()]
    return np.stack([(active == truth[:, None]).all(axis=-2).any(axis=-1) for truth in truths], axis=-1)
