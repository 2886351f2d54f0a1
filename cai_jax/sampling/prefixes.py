"""Token prefixes that many contexts share, such as a system prompt with few-shot examples.

The engine prefills a shared prefix once, and every slot attends to it.
"""

from collections.abc import Mapping, Sequence

from cai_jax.sampling.config import round_up_length

# For each model name, the token ids of its shared prefixes.
SharedPrefixes = Mapping[str, Sequence[Sequence[int]]]


def match_prefix(prefixes: Sequence[Sequence[int]], context: Sequence[int]) -> tuple[int, int]:
  """Find the longest prefix of a context that is shorter than the context.

  Args:
    prefixes: token ids of each prefix, in the same type of sequence as `context`.
    context: token ids.

  Returns:
    The index of the prefix and its length in tokens, or (-1, 0) if none matches.
  """
  lengths = ((len(p), i) for i, p in enumerate(prefixes))
  matches = [(n, i) for n, i in lengths if n < len(context) and context[:n] == prefixes[i]]
  length, index = max(matches, default=(0, -1))
  return index, length


def prefix_capacity(prefixes: Sequence[Sequence[int]]) -> int:
  """Return the capacity, in tokens, of the caches of a model's prefixes.

  All prefixes of a model have the same capacity, so that they share one compiled program.

  Args:
    prefixes: token ids of each prefix.
  """
  return round_up_length(max(map(len, prefixes), default=0))


def common_length(a: list[int], b: list[int]) -> int:
  """Return the number of leading tokens that two sequences have in common.

  Args:
    a: token ids.
    b: token ids.
  """
  if a == b[: len(a)]:
    return len(a)
  return next(
    (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
  )
