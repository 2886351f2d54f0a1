"""D_CAI on disk: a TFDS dataset of chains in ArrayRecord shards, and the implied preferences.

A shard is written whole under a temporary name and then renamed, so a shard that is there is
complete. TensorFlow is needed neither to write nor to read.
"""

import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.core import example_serializer, naming

from cai_jax.feedback.chain import Record, Reply

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


def row_of(
  record: Record, kind: str, seed: int, models: dict[str, str], constitution: str
) -> dict[str, Any]:
  """The row of D_CAI for a chain's record.

  Args:
    record: what the chain gave.
    kind: 'harmful' or 'helpful'.
    seed: of the run.
    models: names for the keys 'initial', 'critique' and 'revision'.
    constitution: its fingerprint.
  """
  replies = [record.initial]
  for step in record.rounds:
    replies += [step.critique, step.revision]
  return {
    'id': record.prompt.id,
    'kind': kind,
    'prompt': [dict(message) for message in record.prompt.messages],
    'metadata': json.dumps(record.prompt.metadata, sort_keys=True),
    'initial': _turn(record.initial),
    'rounds': [
      {
        'principle': step.principle.id,
        'critique': _turn(step.critique),
        'revision': _turn(step.revision),
      }
      for step in record.rounds
    ],
    'logprobs': [x for reply in replies if reply for x in reply.completion.logprobs],
    'seed': seed,
    'model': models['initial'],
    'critique_model': models['critique'],
    'revision_model': models['revision'],
    'constitution': constitution,
  }


def _turn(reply: Reply | None) -> dict[str, Any]:
  if reply is None:
    return {'text': '', 'finish_reason': '', 'logprob': 0.0, 'num_tokens': 0}
  completion = reply.completion
  return {
    'text': reply.text,
    'finish_reason': completion.finish_reason,
    'logprob': float(np.float32(sum(completion.logprobs))),
    'num_tokens': len(completion.tokens),
  }


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
    raise ValueError(f'{folder}: {len(missing)} shards are missing, the first is {missing[0]}.')
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


def write_preferences(path: str | os.PathLike, rows: Iterable[dict[str, Any]]) -> dict[str, int]:
  """Writes (last revision ≻ y_init) in TRL's conversational form; counts what became of each row.

  One JSON object a line with `prompt`, `chosen` and `rejected`, each a list of messages, and `id`.
  Pairs of equal texts say nothing and are left out, as are those with an empty one.
  """
  counts = {'written': 0, 'identical': 0, 'empty': 0, 'not_revised': 0}
  temporary = pathlib.Path(f'{path}.tmp')
  with open(temporary, 'w', encoding='utf-8') as file:
    for row in rows:
      pair = _preference(row)
      if isinstance(pair, str):
        counts[pair] += 1
        continue
      counts['written'] += 1
      file.write(json.dumps(pair, ensure_ascii=False) + '\n')
  os.replace(temporary, path)
  return counts


def _preference(row: dict[str, Any]) -> dict[str, Any] | str:
  """The preference pair of a row, or why there is none."""
  if not row['rounds']:
    return 'not_revised'
  chosen, rejected = row['rounds'][-1]['revision']['text'], row['initial']['text']
  if not chosen or not rejected:
    return 'empty'
  if chosen == rejected:
    return 'identical'
  return {
    'id': row['id'],
    'prompt': row['prompt'],
    'chosen': [{'role': 'assistant', 'content': chosen}],
    'rejected': [{'role': 'assistant', 'content': rejected}],
  }


def _template(folder: str | os.PathLike) -> naming.ShardedFileTemplate:
  return naming.ShardedFileTemplate(
    data_dir=str(folder),
    dataset_name=NAME,
    split=SPLIT,
    filetype_suffix='array_record',
    template='{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}',
  )
