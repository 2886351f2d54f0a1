"""Weight tables: which Hugging Face tensors hold our parameters, in both directions."""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

_LAYER = re.compile(r'layers/(\d+)/')
_STACKED = re.compile(r'\{(\w)\}')


class Weight(NamedTuple):
  """One row of a weight table: a parameter of ours and the Hugging Face tensor that holds it.

  Rows with the same name are the parts of one tensor, in the order of the table.

  Attributes:
    path: our path, with `{}` for the number of the layer: 'layers/{}/attention/query/kernel'.
    name: Hugging Face's name, with `{}` as above: 'model.layers.{}.self_attn.q_proj.weight'. A
      letter in braces is an axis of ours with one tensor for each of its indices:
      'model.layers.{}.mlp.experts.{E}.up_proj.weight'.
    axes: our axes and the tensor's: 'DNH->NH,D'. Commas separate the axes of the tensor. Letters
      without a comma between them are axes of ours that the tensor merges into one. `1` is an axis
      of one element, which ours does not have: 'CW->C,1,W'.
      `cai_jax.model.transformer` defines the letters. `+` marks the axis on which parts are joined.
      What stands before it is common to them, and what follows is joined: '+NH' holds one part
      after the other, 'N+H' has the parts side by side in each head, and in 'F+' they alternate.
  """

  path: str
  name: str
  axes: str


class StoredAxis(NamedTuple):
  """An axis of a tensor, and where a parameter is on it.

  The axis merges the axes `outer` of the parameter with one of `total` elements, of which the
  parameter has those from `start` on.

  Attributes:
    outer: indices of the parameter's axes before `+`; () without `+`.
    inner: indices of the parameter's axes after `+`, or all of them.
    start: first element of the parameter.
    total: number of elements of all parts.
  """

  outer: tuple[int, ...]
  inner: tuple[int, ...]
  start: int
  total: int


@dataclasses.dataclass(frozen=True)
class StoredWeight:
  """The Hugging Face tensors that hold one of our parameters, and their layout.

  Attributes:
    names: the tensor's name, such as 'model.layers.0.mlp.up_proj.weight', or one for each index of
      the stacked axis.
    stacked: our axis that has one tensor for each index, or None.
    axes: the axes of each tensor.
    shape: the parameter's shape.
  """

  names: tuple[str, ...]
  stacked: int | None
  axes: tuple[StoredAxis, ...]
  shape: tuple[int, ...]

  @property
  def stored_shape(self) -> tuple[int, ...]:
    """The shape of each tensor, with the parts of other parameters."""
    return tuple(self._size(axis.outer) * axis.total for axis in self.axes)

  @property
  def offset(self) -> int:
    """The place of this parameter among the parts of a tensor."""
    return max(axis.start for axis in self.axes)

  def read_block(
    self, find: Callable[[str], Any], starts: tuple[int, ...], stops: tuple[int, ...]
  ) -> np.ndarray:
    """Read the block [starts, stops) of our parameter, and no more rows of a tensor than needed.

    Where a tensor merges several of our axes, the first is sliced in the file and the others in
    memory. Parts side by side ('N+H', 'F+') are read together, and then separated.

    Args:
      find: returns a slice object of safetensors for a tensor's name.
      starts: first index of the block on each of our axes.
      stops: end of the block on each of our axes.

    Returns:
      The block in our layout.
    """
    if self.stacked is None:
      return self._read(find(self.names[0]), starts, stops)
    names = self.names[starts[self.stacked] : stops[self.stacked]]
    return np.stack([self._read(find(name), starts, stops) for name in names], self.stacked)

  def block_names(self, starts: tuple[int, ...], stops: tuple[int, ...]) -> tuple[str, ...]:
    """Return the names of the tensors that hold a block."""
    if self.stacked is None:
      return self.names
    return self.names[starts[self.stacked] : stops[self.stacked]]

  def _read(self, tensor: Any, starts: tuple[int, ...], stops: tuple[int, ...]) -> np.ndarray:
    """Read the block from one tensor; a stacked axis has no part in it."""
    region: list[slice] = []  # of the file
    joined: list[int] = []  # its shape, with an axis of its own for the parts
    own: list[slice] = []  # what belongs to this parameter
    block: list[int] = []  # its shape, with our axes
    within: list[slice] = []
    for axis in self.axes:
      if not (*axis.outer, *axis.inner):  # an axis of one element
        region.append(slice(axis.start, axis.start + 1))
        joined.append(1)
        own.append(slice(None))
        continue
      first, *rest = (*axis.outer, *axis.inner)
      if axis.outer:
        rows = self._size(axis.outer[1:])
        row, start = rows * axis.total, 0
        joined += [(stops[first] - starts[first]) * rows, axis.total]
        own += [slice(None), slice(axis.start, axis.start + self._size(axis.inner))]
      else:
        row, start = self._size(axis.inner[1:]), axis.start
        joined.append((stops[first] - starts[first]) * row)
        own.append(slice(None))
      region.append(slice(start + starts[first] * row, start + stops[first] * row))
      block += [stops[first] - starts[first], *(self.shape[i] for i in rest)]
      within += [slice(None), *(slice(starts[i], stops[i]) for i in rest)]
    x = tensor[tuple(region)].reshape(joined)[tuple(own)].reshape(block)[tuple(within)]
    return x.transpose(np.argsort(self._order()))

  def _to_part(self, x: np.ndarray, index: int) -> np.ndarray:
    """Return what one tensor holds of our parameter, with an axis of its own for the parts."""
    if self.stacked is not None:
      x = x[(slice(None),) * self.stacked + (index,)]
    order = np.argsort(np.argsort(self._order()))  # without the stacked axis
    shape: list[int] = []
    for axis in self.axes:
      shape += [self._size(axis.outer)] if axis.outer else []
      shape.append(self._size(axis.inner))
    return x.transpose(order).reshape(shape)

  def _order(self) -> list[int]:
    """Return our axes in the order of the tensor."""
    return [i for axis in self.axes for i in (*axis.outer, *axis.inner)]

  def _size(self, axes: Sequence[int]) -> int:
    """Return the number of elements of some of our axes."""
    return math.prod(self.shape[i] for i in axes)


def join_parts(parts: Sequence[tuple[StoredWeight, np.ndarray]], index: int = 0) -> np.ndarray:
  """Return a tensor of Hugging Face, contiguous in memory.

  Args:
    parts: where the tensor holds our parameters, and their values, in the order of `offset`.
    index: index of the stacked axis.
  """
  first = parts[0][0]
  pieces = [stored._to_part(x, index) for stored, x in parts]
  joined = pieces[0]
  if len(pieces) > 1:
    sizes = [(axis.total, first._size(axis.inner)) for axis in first.axes]
    number = next(i for i, (total, own) in enumerate(sizes) if total > own)
    joined = np.concatenate(pieces, number + bool(first.axes[number].outer))
  # safetensors writes the buffer of a strided array as it is, so the array must be contiguous.
  return np.ascontiguousarray(joined.reshape(first.stored_shape))


def find_weights(
  table: Sequence[Weight], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, StoredWeight]:
  """Return the tensors that hold the parameters of a model, by path.

  Args:
    table: the family's weight table.
    shapes: the shape of each parameter of the model, by path.

  Raises:
    ValueError: if the table has no row for a parameter.
  """
  by_path = {row.path: row for row in table}
  by_name = collections.defaultdict(list)
  for row in table:
    by_name[row.name].append(row)
  found = {}
  for path, shape in shapes.items():
    row, layer = find_row(by_path, path)
    rows = {part.path.format(layer): part for part in by_name[row.name]}
    parts = [(rows[part], shapes[part]) for part in rows if part in shapes]
    found[path] = _locate(row, layer, shape, parts)
  return found


def find_row(by_path: Mapping[str, Weight], path: str) -> tuple[Weight, str]:
  """Return the row of the parameter at a path, and the number of its layer or ''.

  Args:
    by_path: the rows of a table by their path.
    path: such as 'layers/0/mlp/up/kernel'.

  Raises:
    ValueError: if there is none.
  """
  layer = _LAYER.match(path)
  general = path if layer is None else f'layers/{{}}/{path[layer.end() :]}'
  if general not in by_path:
    raise ValueError(f'0 rows of the weight table have the path {general!r}, not one.')
  return by_path[general], '' if layer is None else layer[1]


def _locate(
  row: Weight,
  layer: str,
  shape: tuple[int, ...],
  parts: Sequence[tuple[Weight, tuple[int, ...]]],
) -> StoredWeight:
  """Return where a parameter is stored.

  Args:
    row: its row.
    layer: the number of its layer, or ''.
    shape: its shape.
    parts: the rows and shapes of all parameters in the same tensor.
  """
  ours, theirs = row.axes.split('->')
  axes = []
  for number, axis in enumerate(theirs.split(',')):
    outer, joined, inner = axis.replace('1', '').rpartition('+')
    sizes = {r.path: _part_size(r, s, number) for r, s in parts} if joined else {}
    start = 0
    for path, size in sizes.items():
      if path == row.path:
        break
      start += size
    outer_axes, inner_axes = tuple(map(ours.index, outer)), tuple(map(ours.index, inner))
    total = sum(sizes.values()) if joined else math.prod(shape[i] for i in inner_axes)
    axes.append(StoredAxis(outer_axes, inner_axes, start, total))
  name = row.name.replace('{}', layer)
  if (braces := _STACKED.search(name)) is None:
    return StoredWeight((name,), None, tuple(axes), shape)
  stacked = ours.index(braces[1])
  names = tuple(name.replace(braces[0], str(index)) for index in range(shape[stacked]))
  return StoredWeight(names, stacked, tuple(axes), shape)


def whole_tensor(name: str, shape: tuple[int, ...]) -> StoredWeight:
  """Return where an array is stored whose tensor has the same axes.

  Args:
    name: the tensor's name.
    shape: the shape of the array and of the tensor.
  """
  axes = tuple(StoredAxis((), (axis,), 0, size) for axis, size in enumerate(shape))
  return StoredWeight((name,), None, axes, shape)


def _part_size(row: Weight, shape: tuple[int, ...], number: int) -> int:
  """Return how many elements a part has behind the `+` of an axis of the tensor."""
  ours, theirs = row.axes.split('->')
  inner = theirs.split(',')[number].replace('1', '').rpartition('+')[2]
  return math.prod(shape[ours.index(letter)] for letter in inner)


def describe_axes(row: Weight, table: Sequence[Weight], sizes: Mapping[str, str]) -> str:
  """Return the entries of config.json that give the shape of a tensor.

  Args:
    row: a row of the table.
    table: the weight table.
    sizes: the entry that gives the size of each axis, by letter.

  Returns:
    Such as 'intermediate_size, hidden_size', with × between factors of one axis and + between
    parts.
  """
  parts = [other for other in table if other.name == row.name]
  sizes = {**sizes, '1': '1'}
  texts = []
  for number, axis in enumerate(row.axes.split('->')[1].split(',')):
    outer, joined, inner = axis.rpartition('+')
    factors = [sizes[letter] for letter in outer]
    if joined:
      inners = [p.axes.split('->')[1].split(',')[number].rpartition('+')[2] for p in parts]
      if len(set(inners)) == 1:
        factors.append(str(len(parts)))
      else:
        terms = ' + '.join(' × '.join(sizes[letter] for letter in part) for part in inners)
        factors, inner = [*factors, f'({terms})' if outer else terms], ''
    texts.append(' × '.join([*factors, *(sizes[letter] for letter in inner)]))
  return ', '.join(texts)


def check_table(table: Sequence[Weight], sizes: Mapping[str, str]) -> None:
  """Check that a weight table can be read in both directions.

  Args:
    table: the weight table.
    sizes: the entry of config.json that gives the size of each axis, by letter.

  Raises:
    ValueError: if it cannot.
  """
  paths = collections.Counter(row.path for row in table)
  if double := [path for path, count in paths.items() if count > 1]:
    raise ValueError(f'{paths[double[0]]} rows of the weight table have the path {double[0]!r}.')
  counts = collections.Counter(row.name for row in table)
  for row in table:
    ours, _, theirs = row.axes.partition('->')
    letters = [*re.sub('[,+1]', '', theirs), *_STACKED.findall(row.name)]
    if sorted(letters) != sorted(set(ours)) or '' in (a.strip('+') for a in theirs.split(',')):
      raise ValueError(f'{row} does not use each of our axes once.')
    if unknown := sorted(set(ours) - sizes.keys()):
      raise ValueError(f'{row}: no entry of config.json is known to give the axis {unknown[0]!r}.')
    if theirs.count('+') != (counts[row.name] > 1):
      raise ValueError(f'{row}: exactly the parts of a tensor with several need one +.')
