"""Checks that the weight files of a folder hold the model that its config.json describes."""

import collections
import functools
import logging
import math
import pathlib
from collections.abc import Collection, Iterable, Mapping

import numpy as np

from cai_jax.model.config import ModelConfig
from cai_jax.model.families.family import FAMILIES, Family
from cai_jax.model.families.quantized import DTYPES, MXFP4, NAMES, advise
from cai_jax.model.families.weight_table import StoredWeight
from cai_jax.model.mxfp4 import join_tensors
from cai_jax.model.sharding import flatten_params
from cai_jax.model.transformer import abstract_model
from cai_jax.model.weight_files import (
  StoredTensor,
  check_weight,
  is_buffer,
  locate_weights,
  open_weights,
)
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import read_json

log = logging.getLogger(__name__)


def check_tensors(
  folder: pathlib.Path, config: ModelConfig, extra: Collection[str] = ()
) -> dict[str, StoredTensor]:
  """Check that the files hold the model that config.json describes, and return their tensors.

  Args:
    folder: the model's folder.
    config: the model's config.
    extra: names of tensors that the files must contain in addition to the model's own.

  Returns:
    What the files say of each tensor, by its name in the family's weight table.

  Raises:
    UserError: if a weight is missing, unused, or of an unexpected shape or dtype.
  """
  family = FAMILIES[config.family]
  tensors = _rename(locate_weights(folder), family, folder)
  if MXFP4 in family.quantized:
    tensors = join_tensors(tensors)
  _check_unquantized(tensors, family, folder)
  # Before anything of the described size is built: the config may be damaged. If only a few weights
  # are missing, the messages below say more.
  elements = sum(math.prod(tensor.shape) for tensor in tensors.values())
  if config.num_params > 2 * elements:
    raise UserError(
      f'{folder}: config.json describes a {config.family} model of {config.num_params:,} '
      f'parameters, but the weight files hold {elements:,}. Use the config.json and the weights of '
      'one model.'
    )
  weights, family = stored_weights(config, tensors), family.in_layout_of(tensors)
  needed = {name for stored in weights.values() for name in stored.names}
  _check_names(set(tensors), needed, config, folder, extra)
  for path, stored in weights.items():
    fields = family.describe_shape(path)
    for name in stored.names:
      check_weight(tensors[name], tensors[name].name, stored.stored_shape, fields)
  _check_tied_tables(tensors, config, extra)
  return tensors


def stored_weights(config: ModelConfig, names: Iterable[str] = ()) -> dict[str, StoredWeight]:
  """Return where each parameter of a model is stored, by its path.

  Args:
    config: the model's config.
    names: of the tensors of files, whose layout counts; none give the layout of files to write.
  """
  shapes = {path: leaf.shape for path, leaf in flatten_params(abstract_model(config)[1]).items()}
  return FAMILIES[config.family].in_layout_of(names).find_weights(shapes)


def _rename(
  tensors: Mapping[str, StoredTensor], family: Family, folder: pathlib.Path
) -> dict[str, StoredTensor]:
  """Return tensors by their names in the family's weight table."""
  renamed: dict[str, StoredTensor] = {}
  for name, tensor in tensors.items():
    canonical = family.canonical_name(name)
    if canonical in renamed:
      raise UserError(
        f'{folder}: {renamed[canonical].name!r} and {name!r} are the same weight of the model. '
        'Delete the one that does not belong to it.'
      )
    renamed[canonical] = tensor
  return renamed


def _check_unquantized(
  tensors: Mapping[str, StoredTensor], family: Family, folder: pathlib.Path
) -> None:
  """Check that no weight holds quantized numbers."""
  for name, tensor in tensors.items():
    if family.ignores(name) or tensor.parts:
      continue
    if not (DTYPES.fullmatch(tensor.dtype) or NAMES.fullmatch(name)):
      continue
    config = folder / 'config.json'
    raise UserError(
      f'{tensor.path}: weight {tensor.name!r} is {tensor.dtype}: it is quantized, which is not '
      f'supported. {advise(read_json(config) if config.exists() else {})}'
    )


def _check_tied_tables(
  tensors: Mapping[str, StoredTensor], config: ModelConfig, extra: Collection[str]
) -> None:
  """Check that the output layer in the files is the embedding's table if both are tied."""
  family = FAMILIES[config.family]
  names = [family.find_name('embed/table'), family.find_name('head/table')]
  found = [tensors[name] for name in names if name is not None and name in tensors]
  if not config.tied_embeddings or extra or len(found) < 2:
    return
  embedding, head = found
  check_weight(head, head.name, embedding.shape, f'the shape of {embedding.name}')
  with open_weights(embedding.path) as first, open_weights(head.path) as second:
    one, other = first.get_slice(embedding.name), second.get_slice(head.name)
    rows = max(1, 2**22 // config.d_model)  # compared in blocks, because tables can be large
    for start in range(0, config.vocab_size, rows):
      block = slice(start, min(start + rows, config.vocab_size))
      if not np.array_equal(one[block].astype(np.float32), other[block].astype(np.float32)):
        raise UserError(
          f'{head.path}: {head.name} differs from {embedding.name}, but config.json has '
          'tie_word_embeddings=true, so they are the same. Set it to false if the model was '
          f'trained with both, or remove {head.name}.'
        )


def _check_names(
  names: set[str],
  needed: set[str],
  config: ModelConfig,
  folder: pathlib.Path,
  extra: Collection[str],
) -> None:
  """Check that the files hold every weight of the model, the extra ones, and no other."""
  family = FAMILIES[config.family]
  head = family.find_name('head/table')
  needed = needed | set(extra)
  if missing := sorted(needed - names):
    untied = ', which has tie_word_embeddings=false' if head in missing else ''
    raise UserError(
      f'{folder}: weight {missing[0]!r} is missing ({len(missing)} of {len(needed)} are). The '
      f'files must hold every weight of the {config.family} model that config.json describes'
      f'{untied}.'
    )
  unused = sorted(name for name in names - needed if not is_buffer(name))
  if config.tied_embeddings and not extra and head in unused:
    _log_once(f'{folder}: {head} is not read, because config.json ties it to the embedding.')
    unused.remove(head)
  left_out = collections.Counter(filter(None, map(family.ignores, unused)))
  unused = [name for name in unused if not family.ignores(name)]
  if unused:
    raise UserError(
      f'{folder}: weight {unused[0]!r} does not belong to the {config.family} model that '
      f'config.json describes ({len(unused)} such weights). Use a complete checkpoint of this '
      'architecture, not an adapter.'
    )
  if left_out:
    parts = ', '.join(f'{pattern} ({count} weights)' for pattern, count in left_out.items())
    _log_once(f'{folder}: only the {config.family} model is loaded, without {parts}.')


@functools.cache
def _log_once(message: str) -> None:
  """Log a message, unless this process has done so: a folder is checked more than once."""
  log.info('%s', message)
