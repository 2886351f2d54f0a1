"""Diversity of a set of texts."""

from collections.abc import Sequence

import numpy as np

from cai_jax.runtime.errors import UserError


def word_pair_diversity(texts: Sequence[str], partners: int = 20, seed: int = 0) -> list[float]:
  """Return how much each text differs from randomly chosen others.

  The value is 1 minus the mean Jaccard similarity between the text's set of adjacent word pairs and
  those of its partners, so it is 0 if all texts are equal. A text of fewer than two words is
  compared by its words. Partners depend only on the seed and the positions of the texts, so arms
  with the same prompts use the same partners.

  Args:
    texts: at least two texts.
    partners: number of other texts that each text is compared with, drawn with replacement.
    seed: seed of the draw.

  Returns:
    One number in [0, 1] per text.

  Raises:
    UserError: if there are fewer than two texts.
  """
  if len(texts) < 2:
    raise UserError(
      'Diversity compares texts with each other and needs at least two, but there are '
      f'{len(texts)}.'
    )
  rng = np.random.default_rng([seed, len(texts)])
  sets = [_word_pairs(text) for text in texts]
  values = []
  for i, own in enumerate(sets):
    steps = rng.integers(1, len(texts), partners)  # never 0, which would be the text itself
    values.append(1 - float(np.mean([_jaccard(own, sets[(i + s) % len(sets)]) for s in steps])))
  return values


def _word_pairs(text: str) -> frozenset:
  words = text.split()
  return frozenset(zip(words, words[1:], strict=False)) if len(words) > 1 else frozenset(words)


def _jaccard(a: frozenset, b: frozenset) -> float:
  return len(a & b) / len(a | b) if a or b else 1.0
