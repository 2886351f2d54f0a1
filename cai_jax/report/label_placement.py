"""Find a free place for the name of a point in a figure."""

import math
from collections.abc import Sequence

Box = tuple[float, float, float, float]  # left, bottom, right, top

DISTANCES = (8, 16, 28, 42, 60, 84, 112)  # from the point to the nearest edge of the box
DIRECTIONS = (-2, 2, 6, -6, 0, 8, 4, -4, 1, -1, 3, -3, 5, -5, 7, -7)  # in eighths of π
OUTSIDE_COST = 40  # per unit outside the frame, in units of covered area


def place_box(
  x: float, y: float, width: float, height: float, taken: Sequence[Box], frame: Box
) -> Box:
  """Return a box near (x, y) that covers as little as possible.

  The function tries places from near to far, and returns the first that covers nothing.

  Args:
    x, y: coordinates of the point.
    width, height: size of the box.
    taken: areas that the box should not cover.
    frame: area that the box should not leave.
  """
  best: tuple[float, Box] | None = None
  for distance in DISTANCES:
    for direction in DIRECTIONS:
      angle = direction * math.pi / 8
      middle_x = x + math.cos(angle) * (distance + width / 2)
      middle_y = y + math.sin(angle) * (distance + height / 2)
      left, bottom = middle_x - width / 2, middle_y - height / 2
      box = (left, bottom, left + width, bottom + height)
      cost = sum(_overlap(box, other) for other in taken) + OUTSIDE_COST * _outside(box, frame)
      if best is None or cost < best[0]:
        best = cost, box
      if cost == 0:
        return box
  assert best is not None
  return best[1]


def nearest_point(box: Box, x: float, y: float) -> tuple[float, float]:
  """Return the point of the box that is nearest to (x, y).

  Args:
    box: the box.
    x, y: coordinates of a point.
  """
  return min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3])


def _overlap(a: Box, b: Box) -> float:
  width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
  return width * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _outside(box: Box, frame: Box) -> float:
  sides = (frame[0] - box[0], frame[1] - box[1], box[2] - frame[2], box[3] - frame[3])
  return sum(max(0.0, side) for side in sides)
