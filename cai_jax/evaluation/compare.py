"""Means over prompts and seeds, and paired differences between arms, with bootstrap intervals.

Arms of an experiment answer the same prompts with the same randomness, so what is compared is each
prompt's pair: what two arms have in common by chance cancels.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from cai_jax.runtime.errors import UserError

Values = Mapping[int, Mapping[str, float]]  # seed → prompt id → what was measured of its response


class Estimate(NamedTuple):
  """A mean and its interval."""

  value: float
  low: float
  high: float


def mean(values: Values, samples: int = 2000, level: float = 0.95, seed: int = 0) -> Estimate:
  """The mean over prompts and seeds, with its bootstrap interval.

  Seeds are resampled and, within each, prompts; where all seeds have the same prompts, one resample
  of these serves them all. With a single seed the interval tells of prompts only. With n seeds it
  shows (n - 1) / n of the variance between them, and that of prompts up to (2 n - 1) / n times: it
  is too wide, by 1.3 for three seeds, where they hardly differ, and too narrow, by 0.8, where they
  differ much more than prompts do.

  Args:
    values: one number a prompt and seed.
    samples: number of resamples.
    level: coverage.
    seed: of the resampling.

  Raises:
    ValueError: if there is no value, or a seed has none.
  """
  if not values or not all(values.values()):
    raise UserError('a mean needs at least one seed, and each seed at least one prompt.')
  rng = np.random.default_rng(seed)
  first = list(next(iter(values.values())))
  crossed = len(values) > 1 and all(set(found) == set(first) for found in values.values())
  names = {s: first if crossed else list(found) for s, found in values.items()}
  rows = [np.array([values[s][name] for name in names[s]], np.float64) for s in values]
  means = [_resampled(rows, crossed, rng) for _ in range(samples)]
  low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
  return Estimate(float(np.mean([row.mean() for row in rows])), float(low), float(high))


def paired_difference(arm: Values, reference: Values, **options) -> Estimate:
  """The mean of arm - reference over their common prompts and seeds, with its interval.

  Options are those of `mean`.

  Raises:
    ValueError: unless both have the same seeds, and for each the same prompts.
  """
  if set(arm) != set(reference):
    raise UserError(
      f'one arm has the seeds {sorted(arm)} and the other {sorted(reference)}; a difference is '
      'paired, so run both with the same seeds.'
    )
  for seed, values in arm.items():
    only = sorted(set(values) ^ set(reference[seed]))
    if only:
      raise UserError(
        f'the arms answer different prompts (seed {seed}: {len(only)} of {len(values)} and '
        f'{len(reference[seed])} have no partner, the first is {only[0]!r}); a difference is '
        'paired, so score both on the same prompts.'
      )
  differences = {
    seed: {name: value - reference[seed][name] for name, value in values.items()}
    for seed, values in arm.items()
  }
  return mean(differences, **options)


def _resampled(rows: Sequence[np.ndarray], crossed: bool, rng: np.random.Generator) -> float:
  """The mean of one resample."""
  chosen = rng.integers(0, len(rows), len(rows))
  if crossed:
    places = rng.integers(0, rows[0].size, rows[0].size)
    return float(np.mean([rows[i][places].mean() for i in chosen]))
  return float(
    np.mean([rows[i][rng.integers(0, rows[i].size, rows[i].size)].mean() for i in chosen])
  )


def diversity(texts: Sequence[str], partners: int = 20, seed: int = 0) -> list[float]:
  """For each text 1 - the mean Jaccard similarity of its word pairs to those of other texts.

  A number in [0, 1]: 0 where all texts are the same. The others are drawn by the seed and their
  places, so that arms over the same prompts are compared with the same partners. Texts of fewer
  than two words count by their words.

  Raises:
    ValueError: for fewer than two texts.
  """
  if len(texts) < 2:
    raise UserError(f'diversity compares texts with each other, and there are {len(texts)}.')
  rng = np.random.default_rng([seed, len(texts)])
  sets = [_pairs(text) for text in texts]
  found = []
  for i, own in enumerate(sets):
    steps = rng.integers(1, len(texts), partners)  # never the text itself
    found.append(1 - float(np.mean([_jaccard(own, sets[(i + s) % len(sets)]) for s in steps])))
  return found


def _pairs(text: str) -> frozenset:
  words = text.split()
  return frozenset(zip(words, words[1:], strict=False)) if len(words) > 1 else frozenset(words)


def _jaccard(a: frozenset, b: frozenset) -> float:
  return len(a & b) / len(a | b) if a or b else 1.0
