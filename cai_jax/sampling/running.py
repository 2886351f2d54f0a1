"""Bursts of decode steps on the device: the rows that take part, and what they have sampled."""

from typing import NamedTuple

import jax
import numpy as np

from cai_jax.model.lm import LM
from cai_jax.runtime.errors import SampledError
from cai_jax.sampling.programs import Size
from cai_jax.sampling.step_arrays import Burst, Slots


class Running(NamedTuple):
  """A burst on the device.

  Attributes:
    burst: its result.
    rows: i32[G·D], the slots of its rows; -1 is padding.
    before: the state of the rows at its start.
    size: size of the program.
    compiled: whether it was compiled for this burst.
    begin: `time.perf_counter()` of the dispatch.
  """

  burst: Burst
  rows: np.ndarray
  before: Slots
  size: Size
  compiled: bool
  begin: float

  def fetch(self, lm: LM) -> Burst:
    """Wait for the result and return it on the host.

    Args:
      lm: the model, which an error names.

    Raises:
      SampledError: if a log-probability is NaN.
    """
    burst = Burst(*map(np.array, jax.device_get(self.burst)))
    sampled = np.arange(burst.logprobs.shape[1]) < burst.num_sampled[:, None]
    if np.isnan(burst.logprobs[sampled]).any():
      raise SampledError(
        f'{lm.name} produces NaN logits in {lm.dtype}: its weights are damaged or '
        "overflow this dtype. Try model.dtype='float32'."
      )
    return burst


def pad_rows(groups: list[list[int]], count: int) -> np.ndarray:
  """Return the slots i32[G·count] of each batch shard in order, padded with -1."""
  padded = [sorted(group) + [-1] * (count - len(group)) for group in groups]
  return np.array(padded, np.int32).reshape(-1)


def burst_by_slot(burst: Burst, rows: np.ndarray, slots: int) -> Burst:
  """Return a burst with a row for each slot.

  Args:
    burst: the result of a program, with a row for each entry of `rows`.
    rows: i32[G·D], the slots of the rows; -1 is padding.
    slots: number of slots.
  """
  index, taken = rows[rows >= 0], rows >= 0

  def put(x):
    out = np.zeros((slots, *x.shape[1:]), x.dtype)
    out[index] = x[taken]
    return out

  per_row = burst._replace(steps=burst.row_steps)  # any array with rows
  return Burst(*map(put, per_row))._replace(steps=burst.steps)
