"""Arrays of rows of different lengths, which take no Python object for a row."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np


class Ragged(NamedTuple):
  """Rows of different lengths, one after the other in one array.

  Attributes:
    values: the rows together, [V].
    offsets: i64[N+1], where each row begins, and the end of the last one.
  """

  values: np.ndarray
  offsets: np.ndarray

  @classmethod
  def of_lengths(cls, values: np.ndarray, lengths: Sequence[int] | np.ndarray) -> 'Ragged':
    """Return rows of given lengths.

    Args:
      values: the rows together.
      lengths: the length of each row.
    """
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return cls(values, offsets)

  @classmethod
  def join(cls, parts: Sequence['Ragged']) -> 'Ragged':
    """Return the rows of all parts.

    Args:
      parts: at least one.
    """
    lengths = np.concatenate([part.lengths for part in parts])
    return cls.of_lengths(np.concatenate([part.values for part in parts]), lengths)

  @property
  def size(self) -> int:
    """Number of rows."""
    return len(self.offsets) - 1

  @property
  def lengths(self) -> np.ndarray:
    """The length of each row, i64[N]."""
    return np.diff(self.offsets)

  def row(self, index: int) -> np.ndarray:
    """Return a row.

    Args:
      index: its number, from 0.
    """
    return self.values[self.offsets[index] : self.offsets[index + 1]]

  def rows(self) -> Iterator[tuple[int, ...]]:
    """Yield each row as a tuple of Python numbers."""
    return (tuple(self.row(i).tolist()) for i in range(self.size))

  def take(self, order: np.ndarray) -> 'Ragged':
    """Return chosen rows in a given order.

    Args:
      order: numbers of rows, i64[M].
    """
    lengths = self.lengths[order]
    taken = Ragged.of_lengths(self.values[:0], lengths)
    shifts = np.repeat(self.offsets[:-1][order] - taken.offsets[:-1], lengths)
    return Ragged(self.values[shifts + np.arange(len(shifts))], taken.offsets)
