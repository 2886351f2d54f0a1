"""Digests of training data, by which a resumed run knows its own."""

import functools
import hashlib
from collections.abc import Sequence

import numpy as np

from cai_jax.data.unit_table import UnitTable
from cai_jax.data.units import Example, Unit, as_unit


@functools.singledispatch
def fingerprint(items: Sequence[Example | Unit]) -> str:
  """Return a hex digest of tokens, masks and values of examples or units, in their order.

  Args:
    items: the examples or units.
  """
  digest = hashlib.sha256()
  for item in items:
    unit = as_unit(item)
    for segment in unit.segments:
      digest.update(np.int64(len(segment.tokens)).tobytes())
      digest.update(segment.tokens.tobytes() + segment.loss_mask.tobytes())
    digest.update(_describe_values(len(unit.segments), unit.values))
  return digest.hexdigest()[:32]


@fingerprint.register
def _(items: UnitTable) -> str:
  """Return the same digest for a table, at a tenth of the time for each item."""
  digest, values, width = hashlib.sha256(), items.values(), items.segment_lengths().shape[1]
  for indices, segments in items.blocks():
    sizes, ends = segments.lengths.tobytes(), segments.offsets.tolist()
    tokens, masks = items.decode(segments.values)
    token_bytes, mask_bytes = tokens.tobytes(), masks.tobytes()
    for i, (begin, end) in enumerate(zip(ends, ends[1:], strict=False)):
      digest.update(
        sizes[8 * i : 8 * i + 8] + token_bytes[4 * begin : 4 * end] + mask_bytes[begin:end]
      )
      if values and i % width == width - 1:
        number = indices[i // width]
        digest.update(_describe_values(width, {name: x[number] for name, x in values.items()}))
  return digest.hexdigest()[:32]


def _describe_values(segments: int, values) -> bytes:
  """Return the values of a unit as bytes; none if it has no values."""
  if not values:
    return b''
  return repr((segments, sorted((n, tuple(map(float, x))) for n, x in values.items()))).encode()
