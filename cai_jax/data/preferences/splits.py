"""Splits of comparisons by the content of their prompts."""

from collections.abc import Iterable, Iterator, Sequence

from cai_jax.data.near_duplicates import Messages, find_near_duplicates, group_prompts
from cai_jax.data.preferences.comparisons import Comparison, JudgedResponse
from cai_jax.data.preferences.forms import digest64

_CHUNK = 10_000  # prompts that are in memory at the same time


def group_comparisons(comparisons: Iterable[Comparison | JudgedResponse]) -> dict[str, int]:
  """Return the group of each comparison by its id: those with near-duplicate prompts share one.

  `examples.hold_out` keeps groups on one side of its split. Only distinct prompts are compared.

  Args:
    comparisons: comparisons or judged responses; they are read once.
  """
  indices: dict[int, int] = {}  # of a prompt's digest
  index_of: dict[str, int] = {}  # of a comparison's prompt

  def distinct() -> Iterator[Messages]:
    for pair in comparisons:
      digest, count = _digest(pair.prompt), len(indices)
      index_of[pair.id] = indices.setdefault(digest, count)
      if len(indices) > count:
        yield pair.prompt

  groups = group_prompts(distinct())
  return {name: groups[index] for name, index in index_of.items()}


def find_held_out(
  comparisons: Iterable[Comparison | JudgedResponse], held_out: Sequence[Messages]
) -> dict[str, int]:
  """Return the comparisons whose prompt nearly equals a held-out one.

  Args:
    comparisons: comparisons or judged responses; they are read once.
    held_out: the messages of the prompts that must not be trained on.

  Returns:
    Id of a comparison → index of one such prompt.
  """
  if not held_out:
    return {}
  same = {_digest(messages): index for index, messages in enumerate(held_out)}
  found: dict[str, int] = {}
  known: dict[int, int | None] = {}  # digest of a prompt → index of a held-out one
  waiting: dict[int, tuple[Messages, list[str]]] = {}  # prompts that are not known yet, with ids

  def compare() -> None:
    near = find_near_duplicates([messages for messages, _ in waiting.values()], held_out)
    for i, (digest, (_, ids)) in enumerate(waiting.items()):
      index = known[digest] = near.get(i, same.get(digest))
      if index is not None:
        found.update(dict.fromkeys(ids, index))
    waiting.clear()

  for pair in comparisons:
    digest = _digest(pair.prompt)
    if digest not in known:
      waiting.setdefault(digest, (pair.prompt, []))[1].append(pair.id)
      if len(waiting) == _CHUNK:
        compare()
    elif (index := known[digest]) is not None:
      found[pair.id] = index
  compare()
  return found


def _digest(messages: Messages) -> int:
  """Return a hash of the turns of a dialogue, without differences of case and white space."""
  turns = [[m['role'], ' '.join(m['content'].casefold().split())] for m in messages]
  return digest64(turns)
