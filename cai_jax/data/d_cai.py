"""D_CAI on disk: a TFDS dataset of chains in ArrayRecord shards.

Neither writing nor reading needs TensorFlow. A shard is written under a temporary name and then
renamed, so every shard that exists is complete.
"""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.core import example_parser, example_serializer, naming

from cai_jax.data.d_cai_rows import SPLIT, Rows, damaged, open_dataset
from cai_jax.runtime.digests import digest_file, digest_files
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import read_json, replacing, write_json, writing
from cai_jax.runtime.settings import flatten

# The schema. Its doc texts are written to features.json.

NAME = 'd_cai'
CHECKSUMS, SHARDS = 'checksums.json', '*.array_record*'
_TEXT = tfds.features.Text
_TURN = {
  'text': _TEXT(doc='the reply, without surrounding white space'),
  'finish_reason': _TEXT(doc="'stop', 'stop_text' or 'length'; '' where no reply was sampled"),
  'logprob': tfds.features.Scalar(np.float32, doc='log P of the sampled tokens in nats'),
  'num_tokens': tfds.features.Scalar(np.int32, doc='sampled tokens, the ending one included'),
}
_THOUGHTS = _TEXT(doc="what a reasoning model wrote before the reply; '' without thoughts")
_IDS_KNOWN = tfds.features.Scalar(
  np.bool_,
  doc='False if a server returned text only: num_tokens then counts the text by the tokenizer of '
  'the config, and the log-probabilities are NaN',
)

_DETAILS = {
  'revised': tfds.features.Scalar(
    np.bool_, doc='whether the round revised; if not, `revision` repeats the response before'
  ),
  'sampled_tokens': tfds.features.Scalar(
    np.int32, doc='tokens of all turns of the round, those that were not kept included'
  ),
  'details': _TEXT(doc='what the variant records besides, as a JSON object'),
}


def make_features(
  thoughts: bool = False, unknown_ids: bool = False, details: bool = False
) -> tfds.features.FeaturesDict:
  """Return the schema of D_CAI.

  Args:
    thoughts: whether each turn has the field `thoughts`, as in runs of reasoning models.
    unknown_ids: whether each turn has the field `ids_known`, as in runs with a chat-only server.
    details: whether each round has the fields `revised`, `sampled_tokens` and `details`, as with
      variants that may keep a response or sample more than a critique and a revision.
  """
  turn = _TURN | ({'thoughts': _THOUGHTS} if thoughts else {})
  turn |= {'ids_known': _IDS_KNOWN} if unknown_ids else {}
  step = {'principle': _TEXT(doc='its id'), 'critique': turn, 'revision': turn}
  step |= _DETAILS if details else {}
  return tfds.features.FeaturesDict(
    {
      'id': _TEXT(),
      'kind': _TEXT(doc="'harmful' (revised) or 'helpful' (answered only)"),
      'prompt': tfds.features.Sequence({'role': _TEXT(), 'content': _TEXT()}),
      'metadata': _TEXT(doc="the prompt's metadata as a JSON object"),
      'initial': turn,
      'rounds': tfds.features.Sequence(step),
      # TFDS cannot write nested sequences without TensorFlow, so all turns share one sequence.
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


FEATURES = make_features()  # the fields that every D_CAI has


# Writing.


def shard_path(folder: str | os.PathLike, index: int) -> pathlib.Path:
  """Return the path of a shard.

  Args:
    folder: the folder of the dataset.
    index: the index of the shard, from 0.
  """
  template = _filename_template(folder)
  return pathlib.Path(template.sharded_filepath(shard_index=index, num_shards=index + 1))


def write_shard(
  folder: str | os.PathLike,
  index: int,
  rows: Sequence[dict[str, Any]],
  thoughts: bool = False,
  unknown_ids: bool = False,
  details: bool = False,
) -> None:
  """Write one shard atomically.

  Args:
    folder: the folder of the dataset, which exists. If it was deleted during the run, its earlier
      shards are gone, so it is not created again.
    index: the index of the shard.
    rows: the rows of the shard, with the fields of `make_features` for the same arguments.
    thoughts: whether the turns have thoughts.
    unknown_ids: whether the turns say if their ids are known.
    details: whether the rounds have details.
  """
  features = make_features(thoughts, unknown_ids, details)
  serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
  with replacing(shard_path(folder, index)) as temporary:
    writer = array_record_module.ArrayRecordWriter(str(temporary), 'group_size:1')
    for row in rows:
      example = serializer.get_tf_example(features.encode_example(row))
      # Protocol buffers do not order their maps; without this, the bytes vary between processes.
      writer.write(example.SerializeToString(deterministic=True))
    writer.close()


def read_ids(path: pathlib.Path) -> list[str]:
  """Return the ids of the rows of one shard, in order.

  Args:
    path: the shard.

  Raises:
    UserError: if the shard is damaged.
  """
  try:
    records = array_record_module.ArrayRecordReader(str(path)).read_all()
    examples = (example_parser.tf_example_pb2.Example.FromString(record) for record in records)
    return [example.features.feature['id'].bytes_list.value[0].decode() for example in examples]
  except Exception as error:  # the type depends on the fault and on the version of the library
    raise damaged(path.parent, path.name, error) from error


def write_metadata(
  folder: str | os.PathLike,
  shard_lengths: Sequence[int],
  thoughts: bool = False,
  unknown_ids: bool = False,
  details: bool = False,
) -> None:
  """Write the metadata that turns the shards of a folder into a TFDS dataset.

  Args:
    folder: the folder of the dataset.
    shard_lengths: the number of rows in each shard.
    thoughts: whether the turns have thoughts.
    unknown_ids: whether the turns say if their ids are known.
    details: whether the rounds have details.

  Raises:
    UserError: if a shard is missing, or there is one too many.
  """
  paths = [shard_path(folder, index) for index in range(len(shard_lengths))]
  missing = [path.name for path in paths if not path.exists()]
  if missing:
    raise UserError(
      f'{folder} lacks {len(missing)} of {len(paths)} shards, such as {missing[0]}. Run the stage '
      'that writes them again.'
    )
  foreign = sorted(path.name for path in pathlib.Path(folder).glob(SHARDS) if path not in paths)
  if foreign:
    raise UserError(f'{folder} holds {foreign[0]}, which does not belong to it. Delete that file.')
  split = tfds.core.SplitInfo(
    name=SPLIT,
    shard_lengths=list(shard_lengths),
    num_bytes=sum(path.stat().st_size for path in paths),
    filename_template=_filename_template(folder),
  )
  with writing(folder):
    tfds.folder_dataset.write_metadata(
      data_dir=str(folder),
      features=make_features(thoughts, unknown_ids, details),
      split_infos=[split],
      filename_template=_filename_template(folder),
      description="Constitutional AI's supervised dataset: prompts, critiques and revisions.",
      check_data=False,
    )


def _filename_template(folder: str | os.PathLike) -> naming.ShardedFileTemplate:
  return naming.ShardedFileTemplate(
    data_dir=str(folder),
    dataset_name=NAME,
    split=SPLIT,
    filetype_suffix='array_record',
    template='{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}',
  )


def write_checksums(folder: str | os.PathLike) -> None:
  """Write the digest of every file of a finished dataset, for `check_files` to compare.

  Args:
    folder: the folder of the dataset.
  """
  folder = pathlib.Path(folder)
  write_json(folder / CHECKSUMS, {name: digest_file(folder / name) for name in _file_names(folder)})


def check_files(folder: str | os.PathLike) -> None:
  """Check that a dataset's files are those that were written.

  A dataset without a file of checksums, as earlier versions wrote it, passes.

  Args:
    folder: the folder of the dataset.

  Raises:
    UserError: if a file is missing, changed or foreign; the message names it.
  """
  folder = pathlib.Path(folder)
  if not (folder / CHECKSUMS).exists():
    return
  expected = read_json(folder / CHECKSUMS)
  for name in sorted({*expected, *(path.name for path in folder.glob(SHARDS))}):
    if name not in expected:
      fault = 'does not belong to it'
    elif not os.path.isfile(folder / name):
      fault = 'is missing'
    elif digest_file(folder / name) != expected[name]:
      fault = 'has changed since it was written'
    else:
      continue
    raise UserError(
      f'{folder} is damaged: {name} {fault}. Restore the folder from a copy, or start in another '
      'workdir; with a copy of journal/, no turn is sampled again.'
    )


def content_digest(folder: str | os.PathLike) -> str:
  """Return a digest of the names and contents of a dataset's files, 16 hex digits.

  Args:
    folder: the folder of the dataset. If it has checksums, `check_files` checks them.

  Raises:
    OSError: if a file cannot be read.
  """
  folder = pathlib.Path(folder)
  if (folder / CHECKSUMS).exists():
    return digest_files(folder, [CHECKSUMS])
  return digest_files(folder, _file_names(folder))


def _file_names(folder: pathlib.Path) -> list[str]:
  """Return the sorted names of a dataset's files, without the file of checksums."""
  names = (path.name for path in folder.iterdir() if path.is_file())
  return sorted(name for name in names if name != CHECKSUMS and not name.startswith('.'))


# Reading.


def read_rows(directory: str | os.PathLike, split: str = SPLIT) -> Rows:
  """Return the rows of a TFDS dataset in ArrayRecord files.

  Args:
    directory: the folder that holds dataset_info.json.
    split: the split to read.

  Raises:
    UserError: if the folder holds no such dataset, its files are not those that were written, or
      the dataset has no such split.
  """
  check_files(directory)
  return Rows(directory, split)


def round_tokens(step: Mapping[str, Any]) -> int:
  """Return the number of tokens that a round sampled.

  Args:
    step: a round of a row. Variants without candidates do not have the field `sampled_tokens`.
  """
  turns = step['critique'], step['revision']
  return step.get('sampled_tokens', sum(turn['num_tokens'] for turn in turns))


def check_schema(directory: str | os.PathLike) -> None:
  """Check that a TFDS dataset has the fields of D_CAI.

  Args:
    directory: the folder that holds dataset_info.json.

  Raises:
    UserError: if the folder holds no dataset, or a field is missing or has another type.
  """
  expected, actual = (
    {
      name: (info.shape, info.np_dtype)
      for name, info in flatten(features.get_tensor_info()).items()
    }
    for features in (FEATURES, open_dataset(directory).info.features)
  )
  wrong = sorted(name for name, kind in expected.items() if actual.get(name) != kind)
  if wrong:
    raise UserError(
      f'{directory} is not a D_CAI: {len(wrong)} of its fields are missing or have another type, '
      f'the first is {wrong[0]!r}. Give the folder d_cai/ of a run.'
    )
