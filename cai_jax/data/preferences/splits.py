"""Splits of comparisons by the content of their prompts."""

from collections.abc import Iterable, Sequence

from cai_jax.data.near_duplicates import Messages, find_near_duplicates, group_prompts
from cai_jax.data.preferences.comparisons import Comparison, JudgedResponse
from cai_jax.data.preferences.forms import digest64

_CHUNK = 10_000  # prompts whose word triples are in memory at the same time


def group_comparisons(comparisons: Iterable[Comparison | JudgedResponse]) -> dict[str, int]:
  """Return the group of each comparison by its id: those with near-duplicate prompts share one.

  `examples.hold_out` keeps groups on one side of its split. Only distinct prompts are compared, and
  only these are in memory.

  Args:
    comparisons: comparisons or judged responses.
  """
  distinct = _Distinct()
  index_of = {pair.id: distinct.add(pair.prompt) for pair in comparisons}
  groups = group_prompts(distinct.prompts)
  return {name: groups[index] for name, index in index_of.items()}


def find_held_out(
  comparisons: Iterable[Comparison | JudgedResponse], held_out: Sequence[Messages]
) -> dict[str, int]:
  """Return the comparisons whose prompt nearly equals a held-out one.

  Args:
    comparisons: comparisons or judged responses.
    held_out: the messages of the prompts that must not be trained on.

  Returns:
    Id of a comparison → index of one such prompt.
  """
  distinct = _Distinct()
  index_of = {pair.id: distinct.add(pair.prompt) for pair in comparisons} if held_out else {}
  same = {_digest(messages): index for index, messages in enumerate(held_out)}
  near: dict[int, int] = {}
  for begin in range(0, len(distinct.prompts), _CHUNK):
    chunk = distinct.prompts[begin : begin + _CHUNK]
    found = find_near_duplicates(chunk, held_out)
    for i, messages in enumerate(chunk):
      index = found.get(i, same.get(_digest(messages)))
      if index is not None:
        near[begin + i] = index
  return {name: near[index] for name, index in index_of.items() if index in near}


class _Distinct:
  """Prompts without repetitions."""

  def __init__(self) -> None:
    self.prompts: list[Messages] = []
    self._indices: dict[int, int] = {}

  def add(self, prompt: Messages) -> int:
    """Return the index of a prompt in `prompts`; add it if it is new."""
    index = self._indices.setdefault(_digest(prompt), len(self.prompts))
    if index == len(self.prompts):
      self.prompts.append(prompt)
    return index


def _digest(messages: Messages) -> int:
  """Return a hash of the turns of a dialogue, without differences of case and white space."""
  turns = [[m['role'], ' '.join(m['content'].casefold().split())] for m in messages]
  return digest64(turns)
