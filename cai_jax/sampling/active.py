"""What the engine knows of a run that goes on: its active chains and the free slots."""

import concurrent.futures
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from cai_jax.sampling.types import Chain, Completion, Turn


@dataclasses.dataclass(eq=False)
class ActiveChain:
  """A chain in a slot.

  Attributes:
    id: id of the chain.
    chain: the generator.
    slot: index of its slot.
    turn: the turn that it waits for.
    digest: the turn's key in the journal.
    future: the turn's completion, if a server samples it.
    tokens: token ids sampled for the turn so far.
    logprobs: their log-probabilities in nats.
    finished: journal keys and completions of the turns that were sampled here.
    result: what the chain returned.
  """

  id: str
  chain: Chain
  slot: int
  turn: Turn = dataclasses.field(init=False, repr=False)  # set when its first turn is submitted
  digest: str = ''
  future: concurrent.futures.Future | None = None
  tokens: list[int] = dataclasses.field(default_factory=list)
  logprobs: list[float] = dataclasses.field(default_factory=list)
  finished: list[tuple[str, Completion]] = dataclasses.field(default_factory=list)
  result: Any = None


class Run:
  """A run of the engine.

  Args:
    source: (id, chain) pairs to start, and None where no chain is ready yet.
    slots: number of slots.

  Attributes:
    source: as given.
    active: the active chains, by slot.
    free: the other slots. The last one is used next.
    numbers: counts the chains in the order of their start.
  """

  def __init__(self, source: Iterator[tuple[str, Chain] | None], slots: int):
    self.source = source
    self.active: dict[int, ActiveChain] = {}
    self.free = list(range(slots))[::-1]
    self.numbers = itertools.count()

  def end(self, entry: ActiveChain) -> None:
    """Take the slot back from a chain."""
    del self.active[entry.slot]
    self.free.append(entry.slot)
