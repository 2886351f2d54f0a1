"""TPU slices and the specifications of their chips."""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from cai_jax.runtime.errors import UserError

GIB = 2**30


class Chip(NamedTuple):
  """The specification of one chip. Source: cloud.google.com/tpu/docs/v5e, v5p and v6e."""

  memory: float  # bytes that a program may use, according to libtpu 0.0.42
  flops: float  # peak FLOP/s in bf16
  bandwidth: float  # of HBM, in bytes/s
  links: float  # bytes/s that all links send together: half of the 'bidirectional' figure
  cores: int  # per chip, as counted in the names of accelerator types
  type: str  # prefix of the names of accelerator types


CHIPS = {
  'v5e': Chip(15.75 * GIB, 197e12, 819e9, 200e9, 1, 'v5litepod'),
  'v5p': Chip(95.74 * GIB, 459e12, 2765e9, 600e9, 2, 'v5p'),
  'v6e': Chip(31.25 * GIB, 918e12, 1600e9, 400e9, 1, 'v6e'),
}


@dataclasses.dataclass(frozen=True)
class Slice:
  """The chips that programs are compiled for."""

  name: str
  chip: Chip
  devices: tuple[Any, ...]

  @property
  def hosts(self) -> int:
    """The number of hosts, and so of processes."""
    return len({d.process_index for d in self.devices})

  def first_hosts(self, count: int) -> 'Slice':
    """Return as many chips as some hosts have, as a slice.

    It is a topology of its own, because libtpu numbers the chips of a program from 0 without gaps.
    The chips of several consecutive hosts can be a longer strip than any topology. Then this is a
    block of as many chips, whose links are shorter.

    Args:
      count: number of hosts.
    """
    if self.hosts == count:
      return self
    kept = sorted({d.process_index for d in self.devices})[:count]
    coordinates = [d.coords for d in self.devices if d.process_index in kept]
    dimensions = self.name.count('x') + 1
    sizes = [len({c[axis] for c in coordinates}) for axis in range(dimensions)]
    if count > 1 and dimensions == 2:
      side = max(n for n in range(1, math.isqrt(len(coordinates)) + 1) if len(coordinates) % n == 0)
      sizes = [side, len(coordinates) // side]
    return find_slice(f'{self.name.partition(":")[0]}:{"x".join(map(str, sizes))}')


def find_slice(name: str) -> Slice:
  """Return the slice with a topology such as 'v5e:4x4'.

  Raises:
    UserError: if the chip is not in CHIPS, libtpu does not know the shape, or libtpu is missing.
  """
  kind, _, shape = name.partition(':')
  if kind not in CHIPS or not re.fullmatch(r'\d+(x\d+)*', shape):
    raise UserError(
      f'{name!r} is not a topology. Give a chip ({", ".join(CHIPS)}) and a shape, such as v5e:4x4.'
    )
  if importlib.util.find_spec('libtpu') is None and 'TPU_LIBRARY_PATH' not in os.environ:
    raise UserError(
      'libtpu, which compiles for TPUs, is not installed: '
      f"pip install 'jax[tpu]=={jax.__version__}'"
    )
  chip = CHIPS[kind]
  cores = chip.cores * math.prod(map(int, shape.split('x')))
  os.environ.setdefault('TPU_ACCELERATOR_TYPE', f'{chip.type}-{cores}')
  try:
    description = topologies.get_topology_desc(platform='tpu', topology_name=name)
  except Exception as error:  # libtpu raises several types
    raise UserError(f'libtpu has no topology {name!r}: {error}') from error
  return Slice(name, chip, tuple(description.devices))
