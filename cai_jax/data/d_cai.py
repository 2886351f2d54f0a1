"""D_CAI on disk: a TFDS dataset of chains in ArrayRecord shards, and the implied preferences.

A shard is written whole under a temporary name and then renamed, so a shard that is there is
complete. TensorFlow is needed neither to write nor to read.
"""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.core import example_serializer, naming

from cai_jax.runtime.errors import UserError

NAME, SPLIT = 'd_cai', 'train'
_TEXT = tfds.features.Text
_TURN = {
  'text': _TEXT(doc='the reply, without surrounding white space'),
  'finish_reason': _TEXT(doc="'stop', 'stop_text' or 'length'; '' where no reply was sampled"),
  'logprob': tfds.features.Scalar(np.float32, doc='log P of the sampled tokens in nats'),
  'num_tokens': tfds.features.Scalar(np.int32, doc='sampled tokens, the ending one included'),
}
FEATURES = tfds.features.FeaturesDict(
  {
    'id': _TEXT(),
    'kind': _TEXT(doc="'harmful' (revised) or 'helpful' (answered only)"),
    'prompt': tfds.features.Sequence({'role': _TEXT(), 'content': _TEXT()}),
    'metadata': _TEXT(doc="the prompt's metadata as a JSON object"),
    'initial': _TURN,
    'rounds': tfds.features.Sequence(
      {'principle': _TEXT(doc='its id'), 'critique': _TURN, 'revision': _TURN}
    ),
    # Sequences of sequences cannot be written without TensorFlow, so these stand side by side.
    'logprobs': tfds.features.Sequence(
      np.float32, doc='log P of each sampled token in nats: y_init, critique 1, revision 1, ...'
    ),
    'seed': tfds.features.Scalar(np.int64),
    'model': _TEXT(doc='which sampled y_init'),
    'critique_model': _TEXT(),
    'revision_model': _TEXT(),
    'constitution': _TEXT(doc='fingerprint of its content'),
  }
)


def shard_path(folder: str | os.PathLike, index: int) -> pathlib.Path:
  """Where a shard lies."""
  return pathlib.Path(_template(folder).sharded_filepath(shard_index=index, num_shards=index + 1))


def write_shard(folder: str | os.PathLike, index: int, rows: Sequence[dict[str, Any]]) -> None:
  """Writes the rows of one shard; it is there whole or not at all."""
  path = shard_path(folder, index)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f'.{path.name}.tmp')
  serializer = example_serializer.ExampleSerializer(FEATURES.get_serialized_info())
  writer = array_record_module.ArrayRecordWriter(str(temporary), 'group_size:1')
  for row in rows:
    example = serializer.get_tf_example(FEATURES.encode_example(row))
    # A protocol buffer's maps have no order of their own: without this, bytes change by process.
    writer.write(example.SerializeToString(deterministic=True))
  writer.close()
  with open(temporary, 'rb') as file:
    os.fsync(file.fileno())
  os.replace(temporary, path)


def write_metadata(folder: str | os.PathLike, shard_lengths: Sequence[int]) -> None:
  """Makes the folder's shards a dataset that `tfds.builder_from_directory` reads.

  Raises:
    ValueError: if a shard is missing.
  """
  paths = [shard_path(folder, index) for index in range(len(shard_lengths))]
  missing = [path.name for path in paths if not path.exists()]
  if missing:
    raise UserError(f'{folder}: {len(missing)} shards are missing, the first is {missing[0]}.')
  split = tfds.core.SplitInfo(
    name=SPLIT,
    shard_lengths=list(shard_lengths),
    num_bytes=sum(path.stat().st_size for path in paths),
    filename_template=_template(folder),
  )
  tfds.folder_dataset.write_metadata(
    data_dir=str(folder),
    features=FEATURES,
    split_infos=[split],
    filename_template=_template(folder),
    description="Constitutional AI's supervised dataset: prompts, critiques and revisions.",
    check_data=False,
  )


def _template(folder: str | os.PathLike) -> naming.ShardedFileTemplate:
  return naming.ShardedFileTemplate(
    data_dir=str(folder),
    dataset_name=NAME,
    split=SPLIT,
    filetype_suffix='array_record',
    template='{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}',
  )


class Rows:
  """Rows of D_CAI as plain dicts with str texts and lists of dicts, read as they are asked for."""

  def __init__(self, source):
    self._source = source

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> dict[str, Any]:
    if not 0 <= index < len(self):
      raise IndexError(index)
    return _plain(self._source[index])


def read_rows(directory: str | os.PathLike, split: str = 'train') -> Rows:
  """Rows of a TFDS dataset on disk (ArrayRecord), in any order.

  Raises:
    ValueError: if the folder holds no such dataset, or the dataset no such split.
  """
  try:
    builder = tfds.builder_from_directory(os.fspath(directory))
  except OSError as error:
    raise UserError(f'{directory} holds no TFDS dataset ({error}): generate it first.') from error
  if split not in builder.info.splits:
    raise UserError(
      f'{directory} has no split {split!r}; it has {sorted(builder.info.splits)}: name one of them.'
    )
  return Rows(builder.as_data_source(split))


def _plain(value):
  """`value` in plain types: bytes decoded, and `prompt` and `rounds` as lists of dicts."""
  if isinstance(value, bytes):
    return value.decode()
  if isinstance(value, np.generic):
    return value.item()
  if isinstance(value, np.ndarray):
    return _plain(value.tolist())
  if isinstance(value, list | tuple):
    return [_plain(v) for v in value]
  if not isinstance(value, Mapping):
    return value
  return {
    k: _transpose(_plain(v)) if k in ('prompt', 'rounds') else _plain(v) for k, v in value.items()
  }


def _transpose(value):
  """A list of dicts, for one or for a dict of lists (in which TFDS gives a sequence of dicts)."""
  if isinstance(value, list):
    return value

  def length(node):
    return length(next(iter(node.values()))) if isinstance(node, dict) else len(node)

  def pick(node, i):
    return {k: pick(v, i) for k, v in node.items()} if isinstance(node, dict) else node[i]

  return [pick(value, i) for i in range(length(value))]
