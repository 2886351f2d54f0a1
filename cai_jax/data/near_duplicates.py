"""Groups of near-duplicate prompts, so that a split keeps each of them on one side.

Two prompts are near-duplicates if

- the word triples of their human turns have a Jaccard similarity of at least 0.8 (Broder 1997), or
- their dialogues open with the same human turn of at least four words.

Words are compared without case and punctuation. Groups are the connected components. If two
sets are that similar, their rarest fifths share a triple (prefix filter; Bayardo, Ma and Srikant
2007), so only such pairs are compared. A triple leads to the first 200 prompts that have it.
"""

import array
import collections
import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

SIMILARITY = 0.8
WORDS = 3  # of a shingle
OPENING_WORDS = 4  # shorter openings, such as 'Hi there', say nothing about a dialogue
# A triple leads to at most this many prompts, so that a common phrase does not make the search
# quadratic. Near-duplicates among the others are found through rarer triples or through these.
_MAX_POSTINGS = 200

Messages = Sequence[Mapping[str, str]]


def group_prompts(prompts: Iterable[Messages]) -> list[int]:
  """Return the group of each prompt: the index of the first prompt of the group.

  Args:
    prompts: the messages of each prompt, with `role` and `content`. They are read once, and need
      not be in memory together.
  """
  groups: list[int] = []

  def read() -> Iterator[Messages]:
    for messages in prompts:
      groups.append(len(groups))
      yield messages

  def find(i: int) -> int:
    while groups[i] != i:
      groups[i] = groups[groups[i]]
      i = groups[i]
    return i

  for i, j in _similar_pairs(read()):
    first, second = sorted((find(i), find(j)))
    groups[second] = first
  return [find(i) for i in range(len(groups))]


def find_near_duplicates(prompts: Sequence[Messages], others: Sequence[Messages]) -> dict[int, int]:
  """Return for each prompt with a near-duplicate among the others the index of one of them.

  Args:
    prompts: the messages of each prompt.
    others: the messages of the prompts to compare with.
  """
  count = len(others)
  found: dict[int, int] = {}
  for i, j in _similar_pairs([*others, *prompts], count):
    other, prompt = sorted((i, j))
    if other < count <= prompt:
      found.setdefault(prompt - count, other)
  return found


def _similar_pairs(prompts: Iterable[Messages], num_old: int = 0) -> Iterable[tuple[int, int]]:
  """Yield pairs of indices of near-duplicates, enough to connect every group.

  Args:
    prompts: the messages of each prompt.
    num_old: if positive, only the first `num_old` prompts are candidates for the others.
  """
  openings: dict[tuple[int, ...], int] = {}
  texts = _Texts()
  for i, messages in enumerate(prompts):
    turns = [texts.number(_words(m['content'])) for m in messages if m['role'] == 'user']
    opening = tuple(turns[0]) if turns else ()
    if len(opening) >= OPENING_WORDS:
      if opening in openings:
        yield openings[opening], i
      elif not num_old or i < num_old:
        openings[opening] = i
    texts.add([word for turn in turns for word in turn])
  rows = texts.shingles()
  postings: dict[int, list[int]] = collections.defaultdict(list)
  for i in range(len(texts)):
    row = rows[i]
    own = set(row.tolist())
    # The overlap of similar sets is at least SIMILARITY × the size of either.
    prefix = row[: len(row) - _ceil(SIMILARITY * len(row)) + 1]
    compared = set()
    for shingle in prefix[prefix >= rows.num_single].tolist():
      for j in postings[shingle]:
        if j not in compared:
          compared.add(j)
          if _jaccard(own, rows[j]) >= SIMILARITY:
            yield j, i
      if (not num_old or i < num_old) and len(postings[shingle]) < _MAX_POSTINGS:
        postings[shingle].append(i)


@dataclasses.dataclass(frozen=True)
class _Shingles:
  """The shingles of texts as numbers, from those that the fewest texts have to the most frequent.

  Attributes:
    ids: i32[S], the shingles of all texts; those of one text are distinct and ascend.
    offsets: i64[N + 1], where those of each text begin.
    num_single: the shingles below this number occur in one text only.
  """

  ids: np.ndarray
  offsets: np.ndarray
  num_single: int

  def __getitem__(self, i: int) -> np.ndarray:
    """Return the shingles of a text."""
    return self.ids[self.offsets[i] : self.offsets[i + 1]]


class _Texts:
  """Texts as numbers of words, which take a few bytes each."""

  def __init__(self) -> None:
    self._numbers: dict[str, int] = {}  # of each word
    self._words, self._lengths = array.array('I'), array.array('I')
    self._short: dict[tuple[int, ...], list[int]] = {}  # texts of fewer words than a shingle

  def __len__(self) -> int:
    return len(self._lengths)

  def number(self, words: Sequence[str]) -> list[int]:
    """Return the number of each word."""
    return [self._numbers.setdefault(word, len(self._numbers)) for word in words]

  def add(self, words: Sequence[int]) -> None:
    """Add a text, whose words are given by their numbers."""
    if len(words) < WORDS:
      self._short.setdefault(tuple(words), []).append(len(self._lengths))
      words = ()
    self._words.extend(words)
    self._lengths.append(len(words))

  def shingles(self) -> _Shingles:
    """Return the shingles of all texts. A text of fewer words is a shingle of its own."""
    texts, keys = self._number_shingles()
    # Shingles in the order of the number of their texts, then of their words.
    counts = np.bincount(keys)
    order = np.argsort(counts, kind='stable')
    rank = np.empty(len(order), np.int32)
    rank[order] = np.arange(len(order))
    ids = rank[keys]
    sizes = np.bincount(texts, minlength=len(self._lengths))
    return _Shingles(
      ids[np.lexsort((ids, texts))],
      np.concatenate([[0], np.cumsum(sizes)]),
      int((counts == 1).sum()),
    )

  def _number_shingles(self) -> tuple[np.ndarray, np.ndarray]:
    """Return the text of each shingle, and its number in the order of the words; each i64[S]."""
    alphabetical = np.empty(len(self._numbers), np.int64)
    for place, word in enumerate(sorted(self._numbers)):
      alphabetical[self._numbers[word]] = place
    words = alphabetical[np.array(self._words, np.int64)]
    lengths = np.array(self._lengths, np.int64)
    texts = np.repeat(np.arange(len(lengths)), lengths)
    left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(words))  # words, with this one
    starts = np.flatnonzero(left >= WORDS)
    keys = words[starts]
    for k in range(1, WORDS):  # number sequences of k + 1 words
      keys = keys * len(self._numbers) + words[starts + k]
      keys = np.unique(keys, return_inverse=True)[1]
    number = int(keys.max()) + 1 if len(keys) else 0
    short = [(i, number + k) for k, which in enumerate(self._short.values()) for i in which]
    texts = np.concatenate([texts[starts], np.array([i for i, _ in short], np.int64)])
    keys = np.concatenate([keys, np.array([key for _, key in short], np.int64)])
    number += len(self._short)
    once = np.unique(texts * number + keys)
    return once // number, once % number


def _words(text: str) -> list[str]:
  return re.findall(r'\w+', text.casefold())


def _ceil(value: float) -> int:
  return -int(-value // 1)


def _jaccard(a: set[int], b: np.ndarray) -> float:
  if min(len(a), len(b)) < SIMILARITY * max(len(a), len(b)):
    return 0.0  # the similarity is at most the quotient of the sizes
  shared = len(a.intersection(b.tolist()))
  return shared / (len(a) + len(b) - shared)
