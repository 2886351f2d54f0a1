"""The slots whose context is not in the cache yet, and when and how much of it to prefill."""

import math

import numpy as np

from cai_jax.sampling.chunks import Segment, piece_count
from cai_jax.sampling.page_cache import PageCache

NEARLY_FULL = 0.8  # share of a chunk's tokens
MAX_WAIT = 8  # decode steps that a slot may wait to share a prefill chunk with other slots
MAX_MIXED_WAIT = 2  # the same, if the step that prefills also decodes


class PrefillQueue:
  """The waiting slots of one model.

  Args:
    cache: the pages of all slots.
    cached: for each slot, the context tokens that its cache holds. The queue appends to it.
    groups: number of batch shards.
    chunk_sizes: numbers of tokens of a chunk of one batch shard, in ascending order.
    width: C, number of tokens of a piece.
    mixed: whether a step with decoded rows may also prefill.

  Attributes:
    waiting: for each waiting slot, the tokens that its cache must hold before decoding.
    max_wait: number of decode steps that a slot waits at most for a full chunk.
  """

  def __init__(
    self,
    cache: PageCache,
    cached: list[list[int]],
    groups: int,
    chunk_sizes: tuple[int, ...],
    width: int,
    mixed: bool,
  ):
    self._cache, self._cached, self._groups = cache, cached, groups
    self._chunk_sizes, self._width = chunk_sizes, width
    self.waiting: dict[int, list[int]] = {}
    self._since: dict[int, int] = {}  # slot → decode steps run when it began to wait
    # A step that also decodes costs little more with a few tokens of padding.
    self._enough = chunk_sizes[0] // 2 if mixed else chunk_sizes[0]
    self.max_wait = MAX_MIXED_WAIT if mixed else MAX_WAIT
    self._steps = self._occupied = 0  # decode steps, and active slots summed over them
    self._turns = self._tokens = 0  # added turns, and the tokens to prefill for them

  def clear(self) -> None:
    """Remove all slots."""
    self.waiting.clear()
    self._since.clear()

  def add(self, slot: int, target: list[int]) -> None:
    """Let a slot wait until its cache holds the tokens of `target`."""
    self.waiting[slot], self._since[slot] = target, self._steps
    self._turns += 1
    self._tokens += len(target) - len(self._cached[slot])

  def remove(self, slot: int) -> None:
    """Remove a slot, if it waits."""
    self.waiting.pop(slot, None)
    self._since.pop(slot, None)

  def take_ready(self) -> list[int]:
    """Remove and return the slots whose cache holds all of their tokens."""
    ready = [s for s, target in self.waiting.items() if len(target) == len(self._cached[s])]
    for slot in ready:
      del self.waiting[slot], self._since[slot]
    return ready

  def record(self, steps: int, occupied: int) -> None:
    """Take note of decode steps, and of the active slots summed over them."""
    self._steps += steps
    self._occupied += occupied

  def turns_to_wait_for(self, active: int) -> int:
    """Return how many turns should end before the next prefill; 0 to prefill now.

    A chunk takes about the same time however many tokens it has, so it should be full. But waiting
    slots are idle. They wait only if enough turns to fill a chunk are expected to end within
    `max_wait` steps, judging by the turns that ended per active slot and step so far, and no slot
    waits longer than that.

    Args:
      active: number of active slots.
    """
    tokens = self._tokens_left()
    room = self._groups * self._enough - sum(tokens)
    turns = math.ceil(room / max(self._tokens / max(self._turns, 1), 1))
    expected = self.max_wait * active * self._turns / max(self._occupied, 1) if self._steps else 0
    overdue = any(self._steps - since >= self.max_wait for since in self._since.values())
    return 0 if overdue or max(tokens) >= self._enough or turns > expected else turns

  def next_segments(self, prefixes: np.ndarray) -> list[list[Segment]]:
    """Return the next tokens of waiting slots in each batch shard; none if they wait for pages.

    Args:
      prefixes: i32[slots], index of each slot's shared prefix; -1 if none.
    """
    groups: list[list[Segment]] = [[] for _ in range(self._groups)]
    size = self._chunk_tokens()
    left, pieces = [size] * self._groups, [piece_count(size, self._width)] * self._groups
    for slot in sorted(self.waiting, key=lambda slot: self._cache.started[slot]):
      target, cached = self.waiting[slot], self._cached[slot]
      group = self._cache.group_of(slot)
      room = min(left[group], pieces[group] * self._width)
      new = target[len(cached) : len(cached) + room]
      self._cache.forget(slot, len(cached))
      if not new or not self._cache.extend(slot, len(cached) + len(new)):
        continue
      groups[group].append(Segment(slot, new, len(cached), int(prefixes[slot])))
      left[group] -= len(new)
      pieces[group] -= -(-len(new) // self._width)
      cached.extend(new)
    return groups

  def _chunk_tokens(self) -> int:
    """Return how many tokens to prefill at most: a chunk size that they nearly fill."""
    longest = max(self._tokens_left())
    full = [size for size in self._chunk_sizes if size <= longest]
    above = next((size for size in self._chunk_sizes if size >= longest), None)
    if above is not None and (longest >= NEARLY_FULL * above or not full):
      return above
    return full[-1]

  def _tokens_left(self) -> list[int]:
    """Return the number of tokens that wait for prefill in each batch shard."""
    tokens = [0] * self._groups
    for slot, target in self.waiting.items():
      tokens[self._cache.group_of(slot)] += len(target) - len(self._cached[slot])
    return tokens
