"""Groups of near-duplicate prompts, so that a split keeps each of them on one side.

Two prompts are near-duplicates if

- the word triples of their human turns have a Jaccard similarity of at least 0.8 (Broder 1997), or
- their dialogues open with the same human turn of at least four words.

Words are compared without case and punctuation. Groups are the connected components. If two
sets are that similar, their rarest fifths share a triple (prefix filter; Bayardo, Ma and Srikant
2007), so only such pairs are compared. A triple leads to the first 200 prompts that have it.
"""

import collections
import re
from collections.abc import Iterable, Mapping, Sequence

SIMILARITY = 0.8
WORDS = 3  # of a shingle
OPENING_WORDS = 4  # shorter openings, such as 'Hi there', say nothing about a dialogue
# A triple leads to at most this many prompts, so that a common phrase does not make the search
# quadratic. Near-duplicates among the others are found through rarer triples or through these.
_MAX_POSTINGS = 200

Messages = Sequence[Mapping[str, str]]


def group_prompts(prompts: Sequence[Messages]) -> list[int]:
  """Return the group of each prompt: the index of the first prompt of the group.

  Args:
    prompts: the messages of each prompt, with `role` and `content`.
  """
  groups = list(range(len(prompts)))

  def find(i: int) -> int:
    while groups[i] != i:
      groups[i] = groups[groups[i]]
      i = groups[i]
    return i

  for i, j in _similar_pairs(prompts):
    first, second = sorted((find(i), find(j)))
    groups[second] = first
  return [find(i) for i in range(len(prompts))]


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


def _similar_pairs(prompts: Sequence[Messages], num_old: int = 0) -> Iterable[tuple[int, int]]:
  """Yield pairs of indices of near-duplicates, enough to connect every group.

  Args:
    prompts: the messages of each prompt.
    num_old: if positive, only the first `num_old` prompts are candidates for the others.
  """
  openings: dict[tuple[str, ...], int] = {}
  shingles = []
  for i, messages in enumerate(prompts):
    turns = [_words(m['content']) for m in messages if m['role'] == 'user']
    opening = tuple(turns[0]) if turns else ()
    if len(opening) >= OPENING_WORDS:
      if opening in openings:
        yield openings[opening], i
      elif not num_old or i < num_old:
        openings[opening] = i
    words = [word for turn in turns for word in turn]
    triples = zip(*(words[k:] for k in range(WORDS)), strict=False)
    shingles.append(frozenset(triples) or frozenset([tuple(words)]))
  counts = collections.Counter(shingle for row in shingles for shingle in row)
  postings: dict[tuple[str, ...], list[int]] = collections.defaultdict(list)
  for i, row in enumerate(shingles):
    ordered = sorted(row, key=lambda shingle: (counts[shingle], shingle))
    # The overlap of similar sets is at least SIMILARITY × the size of either.
    prefix = ordered[: len(row) - _ceil(SIMILARITY * len(row)) + 1]
    compared = set()
    for shingle in prefix:
      for j in postings[shingle]:
        if j not in compared:
          compared.add(j)
          if _jaccard(row, shingles[j]) >= SIMILARITY:
            yield j, i
      if (not num_old or i < num_old) and len(postings[shingle]) < _MAX_POSTINGS:
        postings[shingle].append(i)


def _words(text: str) -> list[str]:
  return re.findall(r'\w+', text.casefold())


def _ceil(value: float) -> int:
  return -int(-value // 1)


def _jaccard(a: frozenset, b: frozenset) -> float:
  shared = len(a & b)
  return shared / (len(a) + len(b) - shared)
