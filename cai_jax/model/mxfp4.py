"""Weights in MXFP4: 4 bits a number, and a scale for each block of 32 (Rouhani et al. 2023).

gpt-oss stores the experts' matrices in two tensors of bytes. `X_blocks`, u8[E,O,B,16], has two
numbers in a byte, the lower four bits first. `X_scales`, u8[E,O,B], has the exponents of the blocks
plus 127. Together they are the tensor X, [E,32·B,O]. Source: OCP Microscaling Formats (MX)
Specification 1.0, sections 5.2 and 6.3.
"""

import functools
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from cai_jax.model.weight_files import StoredTensor
from cai_jax.runtime.errors import UserError

DTYPE = 'MXFP4'  # of `StoredTensor`
BLOCK = 32  # numbers with the same scale
BLOCKS, SCALES = '_blocks', '_scales'
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the lower three bits; the fourth negates


def join_tensors(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
  """Return tensors with each pair of blocks and scales replaced by the tensor that it stores.

  Args:
    tensors: what the files of a model say of their tensors, by name.

  Raises:
    UserError: if blocks or scales are missing, or do not fit each other.
  """
  joined = dict(tensors)
  for name in tensors:
    if not name.endswith((BLOCKS, SCALES)):
      continue
    base, end = name[: -len(BLOCKS)], name[-len(BLOCKS) :]
    other = base + (SCALES if end == BLOCKS else BLOCKS)
    if other not in tensors:
      raise UserError(
        f'{tensors[name].path}: there is a weight {name!r}, but no {other!r}. Both are needed; '
        'download the files again.'
      )
    if base in tensors:
      raise UserError(
        f'{tensors[name].path}: {name!r} and {base!r} are the same weight. Delete the one that '
        'does not belong to the model.'
      )
    joined[base] = _join(base, tensors[base + BLOCKS], tensors[base + SCALES])
    del joined[name]
  return joined


def _join(name: str, blocks: StoredTensor, scales: StoredTensor) -> StoredTensor:
  """Return the tensor that blocks and scales store."""
  good = len(blocks.shape) == 4 and blocks.shape == (*scales.shape, BLOCK // 2)
  if not good or not blocks.dtype == scales.dtype == 'U8':
    raise UserError(
      f'{blocks.path}: {blocks.name!r} is {blocks.dtype}{list(blocks.shape)} and {scales.name!r} '
      f'is {scales.dtype}{list(scales.shape)}. In MXFP4 they are U8 of shape [E, O, B, 16] and '
      '[E, O, B]. Download the files again.'
    )
  experts, outs, number = scales.shape
  shape = experts, number * BLOCK, outs
  return StoredTensor(name, blocks.path, shape, DTYPE, (blocks, scales))


class Mxfp4Slice:
  """A tensor [E,I,O] in MXFP4 with the indexing of safetensors' slices.

  Args:
    blocks: slice object of the blocks u8[E,O,B,16].
    scales: slice object of the scales u8[E,O,B].
  """

  def __init__(self, blocks: Any, scales: Any):
    self.blocks, self.scales = blocks, scales

  def __getitem__(self, region: tuple[slice, slice, slice]) -> np.ndarray:
    """Return bf16[e,i,o] of a region, which reads whole blocks only.

    Args:
      region: slices of the three axes, with a start and an end.
    """
    experts, ins, outs = region
    first, last = ins.start // BLOCK, -(-ins.stop // BLOCK)
    stored = experts, outs, slice(first, last)
    numbers = decode(self.blocks[stored], self.scales[stored])
    own = slice(ins.start - first * BLOCK, ins.stop - first * BLOCK)
    return numbers[..., own].swapaxes(1, 2)


def decode(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
  """Return the numbers bf16[...,32·B] of blocks; bfloat16 holds all of them exactly.

  Args:
    blocks: u8[...,B,16].
    scales: u8[...,B]; the numbers of a block with the scale 255 are NaN.
  """
  index = scales[..., None].astype(np.uint16) << 8 | blocks
  pairs = _pairs()[index]
  return pairs.view(ml_dtypes.bfloat16).reshape(*scales.shape[:-1], -1)


@functools.cache
def _pairs() -> np.ndarray:
  """Return the two numbers of each byte as u32[65536]: for each scale, those of all bytes."""
  half = np.array(MAGNITUDES, np.float32)
  numbers = np.concatenate([half, -half])
  byte = np.arange(256)
  pairs = numbers[np.stack([byte & 15, byte >> 4], -1)]  # [256,2]
  scale = np.ldexp(np.float32(1), np.arange(255) - 127)
  scale = np.append(scale, np.float32(np.nan))  # 255 stands for no number
  with np.errstate(over='ignore'):  # too large for bfloat16 is infinite, which loading refuses
    scaled = (scale[:, None, None] * pairs).astype(ml_dtypes.bfloat16)
  return scaled.view(np.uint32).reshape(-1)
