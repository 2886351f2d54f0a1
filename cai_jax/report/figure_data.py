"""The data of figures: lines, panels of arms, and points."""

import dataclasses

from cai_jax.report.palette import COLOURS
from cai_jax.runtime.errors import UserError

MAX_MARKERS = 40  # series with more points have no markers


@dataclasses.dataclass(frozen=True)
class Series:
  """One line: values y at positions x, with an optional interval around each value.

  Attributes:
    name: shown in the legend.
    x, y: coordinates of the points. A y that is not finite makes a gap in the line.
    low, high: bounds of the intervals; None where there is none.
    colour: index into `COLOURS`.
    faint: whether to draw a thin, pale line, for the raw values behind a running mean.

  Raises:
    UserError: if the lengths differ or there is no such colour.
  """

  name: str
  x: tuple[float, ...]
  y: tuple[float, ...]
  low: tuple[float | None, ...] | None = None
  high: tuple[float | None, ...] | None = None
  colour: int = 0
  faint: bool = False

  def __post_init__(self):
    for name in ('y', 'low', 'high'):
      values = getattr(self, name)
      if values is not None and len(values) != len(self.x):
        raise UserError(
          f'Series {self.name!r} has {len(self.x)} x and {len(values)} {name}. The lengths must be '
          'equal.'
        )
    if (self.low is None) != (self.high is None):
      raise UserError(f'Series {self.name!r} has only one of low and high. Give both or neither.')
    _check_colour(self.colour, f'series {self.name!r}')

  @property
  def has_markers(self) -> bool:
    """Whether each point has a marker."""
    return not self.faint and len(self.x) <= MAX_MARKERS


@dataclasses.dataclass(frozen=True)
class Panel:
  """One quantity of several arms.

  Attributes:
    label: the quantity with its unit.
    values: one per arm; None where an arm has no value.
    low, high: bounds of the intervals; None where there is none.
    colour: index into `COLOURS`.
    x_range: (low, high) of the axis; by default round numbers around all values and bounds.

  Raises:
    UserError: if the lengths differ or there is no such colour.
  """

  label: str
  values: tuple[float | None, ...]
  low: tuple[float | None, ...]
  high: tuple[float | None, ...]
  colour: int = 0
  x_range: tuple[float, float] | None = None

  def __post_init__(self):
    lengths = {len(self.values), len(self.low), len(self.high)}
    if len(lengths) != 1:
      raise UserError(
        f'Panel {self.label!r} has lists of {sorted(lengths)} numbers. Their lengths must be equal.'
      )
    _check_colour(self.colour, f'panel {self.label!r}')


@dataclasses.dataclass(frozen=True)
class Point:
  """A named arm with two quantities, x and y, and their intervals if they are known."""

  name: str
  x: float
  y: float
  x_bounds: tuple[float, float] | None = None
  y_bounds: tuple[float, float] | None = None
  colour: int = 1


def _check_colour(colour: int, where: str) -> None:
  if colour not in range(len(COLOURS)):
    raise UserError(f'{where}: colour {colour} must be in 0..{len(COLOURS) - 1}.')
