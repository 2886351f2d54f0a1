"""Diversity of a set of texts: word pairs, distinct n-grams, self-BLEU, and spread of embeddings.

A measure returns one number per text, and the diversity of the set is their mean. So an experiment
compares the numbers of two arms prompt by prompt. A number depends on the other texts of its set,
which intervals over prompts do not know: they are approximate.

To add a measure, register a function that takes a `ModelLoader` and returns the measure. The names
in `DIVERSITY` are those that `Experiment.diversity` can list.

All measures depend on the number of texts and on their lengths: compare sets of equally many texts,
and look at `mean_tokens` beside them. Words are separated by white space.
"""

import bisect
import collections
import functools
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from cai_jax.runtime.errors import UserError
from cai_jax.runtime.registry import Registry
from cai_jax.scoring.embeddings import embed_texts
from cai_jax.scoring.loader import ModelLoader

BLEU_ORDER = 4  # longest n-gram of self-BLEU
EPSILON = 0.1  # matches that count where there is none (Chen and Cherry 2014, smoothing 1)

Measure = Callable[[Sequence[str]], Sequence[float]]  # at least two texts → one number per text
Gram = tuple[str, ...]
DIVERSITY: Registry[Callable[[ModelLoader], Measure]] = Registry('measure of diversity')


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
  _check_count(texts)
  rng = np.random.default_rng([seed, len(texts)])
  sets = [_word_pairs(text) for text in texts]
  values = []
  for i, own in enumerate(sets):
    steps = rng.integers(1, len(texts), partners)  # never 0, which would be the text itself
    values.append(1 - float(np.mean([_jaccard(own, sets[(i + s) % len(sets)]) for s in steps])))
  return values


def text_changes(texts: Sequence[str], references: Sequence[str]) -> list[float]:
  """Return how much each text differs from its own reference, such as a revision from its draft.

  The value is 1 minus the Jaccard similarity of their sets of adjacent word pairs: 0 if a text has
  the same word pairs, 1 if it shares none.

  Args:
    texts: the texts.
    references: one text for each of them.

  Returns:
    One number in [0, 1] per text.
  """
  pairs = zip(texts, references, strict=True)
  return [1 - _jaccard(_word_pairs(text), _word_pairs(other)) for text, other in pairs]


def distinct_ngrams(texts: Sequence[str], order: int) -> list[float]:
  """Return numbers whose mean is distinct-n: different n-grams, divided by all n-grams.

  Distinct-n is that of Li et al. 2016, section 5.3, over the whole set. An n-gram that occurs c
  times in the set counts 1 / c wherever it occurs, which adds up to the number of different
  n-grams. A text's number is its sum, divided by the mean number of n-grams per text. A set without
  n-grams has 0.

  Args:
    texts: at least two texts.
    order: n, the number of words of an n-gram.

  Returns:
    One number per text; a long text can have more than 1, and the mean is in [0, 1].

  Raises:
    UserError: if there are fewer than two texts.
  """
  _check_count(texts)
  grams = [_ngrams(text.split(), order) for text in texts]
  counts = collections.Counter(gram for own in grams for gram in own)
  mean = counts.total() / len(texts)
  return [sum(1 / counts[gram] for gram in own) / mean if mean else 0.0 for own in grams]


def self_bleu(texts: Sequence[str], order: int = BLEU_ORDER) -> list[float]:
  """Return the BLEU of each text with all other texts as references (Zhu et al. 2018, section 3.2).

  Lower is more diverse; equal texts have 1. BLEU is that of sentences (Papineni et al. 2002) with
  equal weights: an order without a match counts `EPSILON` matches, and without a matching word the
  value is 0. These are the choices of Texygen (utils/metrics/SelfBleu.py of geek-ai/Texygen), which
  calls NLTK's `sentence_bleu` with `SmoothingFunction().method1`. It splits texts with NLTK's
  tokenizer and stops at 3-grams by default; here words are separated by white space.

  Args:
    texts: at least two texts.
    order: length of the longest n-grams.

  Returns:
    One number in [0, 1] per text.

  Raises:
    UserError: if there are fewer than two texts.
  """
  _check_count(texts)
  words = [text.split() for text in texts]
  lengths = sorted(map(len, words))
  logs = np.zeros(len(texts))
  without_match = np.zeros(len(texts), bool)
  for n in range(1, order + 1):
    counts = [collections.Counter(_ngrams(own, n)) for own in words]
    most = _two_largest(counts)
    for i, own in enumerate(counts):
      matches = sum(
        min(count, most[gram][1] if most[gram][0] == count else most[gram][0])
        for gram, count in own.items()
      )
      without_match[i] |= n == 1 and not matches
      logs[i] += math.log((matches or EPSILON) / max(own.total(), 1)) / order
  scores = np.exp(logs + [_brevity_penalty(len(own), lengths) for own in words])
  return np.where(without_match, 0.0, scores).tolist()


def cosine_distances(vectors: np.ndarray) -> list[float]:
  """Return the mean cosine distance of each vector to all others: 1 minus the cosine.

  Args:
    vectors: f32[N,D], at least two. The vector 0 has the cosine 0 with every vector.

  Returns:
    One number in [0, 2] per vector; the mean is the mean distance of all pairs.
  """
  vectors = np.asarray(vectors, np.float64)
  norms = np.linalg.norm(vectors, axis=1, keepdims=True)
  units = np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)
  similar = units @ units.sum(axis=0) - (units * units).sum(axis=1)
  return (1 - similar / (len(units) - 1)).tolist()


@DIVERSITY.register('diversity')
def load_word_pairs(loader: ModelLoader) -> Measure:
  """Return `word_pair_diversity`."""
  del loader
  return word_pair_diversity


def _load_distinct(order: int, loader: ModelLoader) -> Measure:
  del loader
  return functools.partial(distinct_ngrams, order=order)


for _order in (1, 2, 3):
  DIVERSITY.register(f'distinct_{_order}')(functools.partial(_load_distinct, _order))


@DIVERSITY.register('self_bleu')
def load_self_bleu(loader: ModelLoader) -> Measure:
  """Return `self_bleu`."""
  del loader
  return self_bleu


@DIVERSITY.register('embedding_spread')
def load_embedding_spread(loader: ModelLoader) -> Measure:
  """Return the mean cosine distance of a text's embedding to those of the others.

  Embeddings are those of M_θ (`embed_texts`), also for texts of other models. Hidden states point
  mostly in one direction (Ethayarajh 2019), so distances are small; compare them with each other
  only.
  """
  lm = loader.language_model('base')

  def measure(texts: Sequence[str]) -> list[float]:
    _check_count(texts)
    return cosine_distances(embed_texts(lm, texts))

  return measure


def _check_count(texts: Sequence[str]) -> None:
  if len(texts) < 2:
    raise UserError(
      'Diversity compares texts with each other and needs at least two, but there are '
      f'{len(texts)}.'
    )


def _ngrams(words: Sequence[str], order: int) -> list[Gram]:
  return [tuple(words[i : i + order]) for i in range(len(words) - order + 1)]


def _two_largest(counts: Iterable[collections.Counter[Gram]]) -> dict[Gram, tuple[int, int]]:
  """Return the largest and the second largest count of each n-gram over texts.

  The largest count in the other texts is the second if the text itself has the largest one. If
  another text has as many, the two are equal, and either will do.
  """
  most: dict[Gram, tuple[int, int]] = {}
  for own in counts:
    for gram, count in own.items():
      first, second = most.get(gram, (0, 0))
      most[gram] = (count, first) if count > first else (first, max(second, count))
  return most


def _brevity_penalty(length: int, lengths: list[int]) -> float:
  """Return the logarithm of BLEU's penalty of a text shorter than the reference of nearest length.

  Args:
    length: number of words of the text.
    lengths: number of words of all texts, in ascending order, with the text itself.
  """
  place = bisect.bisect_left(lengths, length)  # the text itself, or one of the same length
  near = lengths[max(place - 1, 0) : place] + lengths[place + 1 : place + 2]
  closest = min(near, key=lambda other: (abs(other - length), other))
  return 0.0 if length >= closest else 1 - closest / max(length, 1)


def _word_pairs(text: str) -> frozenset:
  words = text.split()
  return frozenset(zip(words, words[1:], strict=False)) if len(words) > 1 else frozenset(words)


def _jaccard(a: frozenset, b: frozenset) -> float:
  return len(a & b) / len(a | b) if a or b else 1.0
