"""The chips of TPU slices, and what each can do."""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

GIB = 2**30


class Chip(NamedTuple):
  """What one chip can do, by cloud.google.com/tpu/docs/v5e, v5p and v6e."""

  memory: float  # bytes of its 16, 95 or 32 GiB that a program may use, as libtpu 0.0.42 says
  flops: float  # FLOP/s in bf16
  bandwidth: float  # bytes/s of HBM
  links: float  # bytes/s that all its links together send; half of the 'bidirectional' figure
  cores: int  # that an accelerator type's name counts of each chip
  type: str  # such names begin with it


CHIPS = {
  'v5e': Chip(15.75 * GIB, 197e12, 819e9, 200e9, 1, 'v5litepod'),
  'v5p': Chip(95.74 * GIB, 459e12, 2765e9, 600e9, 2, 'v5p'),
  'v6e': Chip(31.25 * GIB, 918e12, 1600e9, 400e9, 1, 'v6e'),
}


@dataclasses.dataclass(frozen=True)
class Slice:
  """The chips to compile for."""

  name: str
  chip: Chip
  devices: tuple[Any, ...]

  @property
  def hosts(self) -> int:
    """Processes that the slice runs."""
    return len({d.process_index for d in self.devices})

  def of_host(self) -> 'Slice':
    """One host's part."""
    if self.hosts == 1:
      return self
    first = self.devices[0].process_index
    places = [d.coords for d in self.devices if d.process_index == first]
    dimensions = self.name.count('x') + 1
    sizes = [len({place[axis] for place in places}) for axis in range(dimensions)]
    # Compiled for on its own, as libtpu numbers a program's chips from 0 without gaps.
    return find_slice(f'{self.name.partition(":")[0]}:{"x".join(map(str, sizes))}')


def find_slice(name: str) -> Slice:
  """The chips of a topology such as 'v5e:4x4'.

  Raises:
    ValueError: for a chip that is not in CHIPS, a shape that libtpu does not know, or without it.
  """
  kind, _, shape = name.partition(':')
  if kind not in CHIPS or not re.fullmatch(r'\d+(x\d+)*', shape):
    raise ValueError(f'topology {name!r}: give one of {", ".join(CHIPS)} and a shape: v5e:4x4.')
  if importlib.util.find_spec('libtpu') is None and 'TPU_LIBRARY_PATH' not in os.environ:
    raise ValueError(
      'libtpu, which compiles for TPUs, is not installed: '
      f"pip install 'jax[tpu]=={jax.__version__}'"
    )
  chip = CHIPS[kind]
  cores = chip.cores * math.prod(map(int, shape.split('x')))
  os.environ.setdefault('TPU_ACCELERATOR_TYPE', f'{chip.type}-{cores}')
  try:
    found = topologies.get_topology_desc(platform='tpu', topology_name=name)
  except Exception as error:  # the kind depends on what is wrong
    raise ValueError(f'libtpu has no topology {name!r}: {error}') from error
  return Slice(name, chip, tuple(found.devices))
