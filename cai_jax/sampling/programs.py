"""Which sizes of the step are compiled, and which of them a step uses.

A program for the exact size of a step is the fastest, but every program takes a second or more to
compile. So the first programs are general: one that decodes all slots, and one that also prefills
the largest chunk. A step uses the fastest program that is large enough. Another program is compiled
once it would have saved `WORTH` of the time of its compilation in the steps so far.

On CPUs the results have the same bits with every program. On accelerators only the number of blocks
differs, and each block is read by products of its own, whose shapes do not depend on the number.
"""

import dataclasses
import functools
import math
from collections.abc import Hashable

GENERAL_SHARES = 3 / 8, 1 / 2, 3 / 4, 1  # of a pool's blocks, which general programs get
WORTH = 0.5  # below 1, because a run is likely to go on for longer than it has so far
PAGE_COST = 0.25  # time of reading a page, in units of the time of one more row; measured on a CPU


@dataclasses.dataclass(frozen=True, order=True)
class Size:
  """The size of a step.

  Attributes:
    rows: number of rows of each batch shard; 0 only prefills.
    tokens: number of prefilled tokens of each batch shard; 0 only decodes.
    blocks: number of blocks of each pool.
    drafts: number of tokens that each row drafts.
  """

  rows: int
  tokens: int
  blocks: tuple[int, ...]
  drafts: int = 0

  def holds(self, other: 'Size') -> bool:
    """Return whether a program of this size can run a step of another size."""
    pairs = zip(self.blocks, other.blocks, strict=True)
    fits = self.rows >= other.rows and self.tokens >= other.tokens and self.drafts == other.drafts
    # A burst of several steps needs a program without prefill.
    fits = fits and bool(self.tokens) == bool(other.tokens)
    return fits and all(mine >= theirs for mine, theirs in pairs)


class Programs:
  """The compiled programs of a model, and the time that steps lose without others.

  Args:
    row_sizes: numbers of rows for which programs may be compiled, in ascending order.
    chunk_sizes: the same for prefilled tokens.
    block_sizes: the same for the blocks of each pool.
    block_pages: for each pool, number of pages of a block.
    mixed: whether a program may both decode and prefill.
    least: the fewest rows and prefilled tokens of a program, taken together, where rows may vary.
  """

  def __init__(
    self,
    row_sizes: tuple[int, ...],
    chunk_sizes: tuple[int, ...],
    block_sizes: tuple[tuple[int, ...], ...],
    block_pages: tuple[int, ...],
    mixed: bool,
    least: int,
  ):
    self._row_sizes, self._chunk_sizes, self._block_sizes = row_sizes, chunk_sizes, block_sizes
    self._block_pages, self._mixed, self._least = block_pages, mixed, least
    self._compiled: set[Size] = set()
    # For the exact size of each step so far: the number of steps, and the least cost of a program.
    self._steps: dict[Size, int] = {}
    self._least_costs: dict[Size, float] = {}
    # For those that are not compiled: the time that a program would have saved, in units of rows.
    self._saved: dict[Size, float] = {}
    self._unit = 0.0  # seconds of one more row in a step, the least that was measured
    self._compilations, self._compile_seconds = 0, 0.0

  def choose(self, rows: int, tokens: int, blocks: tuple[int, ...], drafts: int = 0) -> Size:
    """Return the size of the program to use, which may have to be compiled.

    Args:
      rows: number of rows; 0 only prefills.
      tokens: number of prefilled tokens; 0 only decodes.
      blocks: number of blocks in use of each pool.
      drafts: number of tokens that each row drafts.
    """
    # `least` rows and prefilled tokens have the same bits as more of them.
    if tokens and not rows:
      tokens = max(tokens, min(self._least, self._chunk_sizes[-1]))
    chunk = _round_up(tokens, self._chunk_sizes)
    if rows and self._mixed:
      rows = max(rows, -(-(self._least - chunk) // (1 + drafts)))
    exact = Size(
      _round_up(rows, self._sizes_of_rows(drafts)),
      chunk,
      tuple(_round_up(n, sizes) for n, sizes in zip(blocks, self._block_sizes, strict=True)),
      drafts,
    )
    best = min((size for size in self._compiled if size.holds(exact)), key=self._cost, default=None)
    if best is None:
      return self._use(self._general(exact))
    if exact not in self._steps:
      self._steps[exact], self._least_costs[exact] = 0, self._cost(best)
      if exact not in self._compiled:
        self._saved[exact] = self._sum_saved(exact)
    self._steps[exact] += 1
    lost = {size: self._cost(best) - self._cost(size) for size in self._saved if size.holds(exact)}
    useful = [size for size in lost if lost[size] > 0]
    for size in useful:
      self._saved[size] += lost[size]
    worth = max(useful, key=self._saved.__getitem__, default=best)
    if self._unit * self._saved.get(worth, 0.0) <= WORTH * self._compile_seconds:
      return best
    return self._use(worth)

  def _use(self, size: Size) -> Size:
    """Take note of a size whose program will be compiled now, and return it."""
    self._compiled.add(size)
    self._saved.pop(size, None)
    for other, least in self._least_costs.items():
      if size.holds(other):
        self._least_costs[other] = min(least, self._cost(size))
    self._saved = {other: self._sum_saved(other) for other in self._saved}
    return size

  def _sum_saved(self, size: Size) -> float:
    """Return the time that a program would have saved in all steps so far, in units of rows."""
    cost = self._cost(size)
    return sum(
      count * max(self._least_costs[other] - cost, 0.0)
      for other, count in self._steps.items()
      if size.holds(other)
    )

  def record(self, size: Size, seconds: float, compiled: bool) -> None:
    """Take note of a program that ran.

    Args:
      size: its size.
      seconds: time of compilation if it was compiled, otherwise of one step.
      compiled: whether it was compiled.
    """
    if compiled:
      self._compilations += 1
      self._compile_seconds += (seconds - self._compile_seconds) / self._compilations  # the mean
    else:
      unit = seconds / self._cost(size)
      self._unit = min(self._unit or unit, unit)

  def _general(self, exact: Size) -> Size:
    """Return the size of a general program that holds a step."""
    blocks = []
    for used, sizes in zip(exact.blocks, self._block_sizes, strict=True):
      shares = (math.ceil(share * sizes[-1]) for share in GENERAL_SHARES)
      blocks.append(_round_up(used, tuple(shares)))
    tokens = self._chunk_sizes[-1] if exact.tokens else 0
    rows = self._row_sizes[-1] if exact.rows or self._mixed else 0
    if exact.drafts and self._mixed:
      rows = exact.rows  # each row costs as much as several without drafts
    return Size(rows, tokens, tuple(blocks), exact.drafts)

  def _sizes_of_rows(self, drafts: int) -> tuple[int, ...]:
    """Return the numbers of rows for programs with so many drafts.

    The smallest one has, with its drafts, as many tokens as the smallest step without.
    """
    if not drafts or not self._mixed:
      return self._row_sizes
    return tuple(sorted({-(-self._least // (1 + drafts)), *self._row_sizes}))

  def _cost(self, size: Size) -> float:
    """Return the time of a step in units of one more row."""
    pages = sum(n * p for n, p in zip(size.blocks, self._block_pages, strict=True))
    rows = size.rows * (1 + size.drafts)
    return rows + size.tokens + PAGE_COST * pages / len(size.blocks) * (size.rows > 0)


@functools.cache
def find_programs(key: Hashable, *args) -> Programs:
  """Return the programs for a key: engines with the same key share what this process compiled.

  Args:
    key: everything that the shapes of the arguments depend on.
    *args: arguments of `Programs`.
  """
  del key
  return Programs(*args)


def _round_up(count: int, sizes: tuple[int, ...]) -> int:
  return next(size for size in sizes if size >= count) if count else 0
