"""The rows of D_CAI on disk as plain Python dicts."""

import os
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import tensorflow_datasets as tfds

from cai_jax.data.records import make_decoder
from cai_jax.runtime.errors import UserError

SPLIT = 'train'
_BLOCK = 256  # rows that are read together


class Rows(Sequence[dict[str, Any]]):
  """The rows of a dataset as plain Python dicts, read from disk on access.

  Texts are str, numbers are int and float, and `prompt` and `rounds` are lists of dicts.

  Args:
    folder: the folder that holds dataset_info.json. Its files are not checked; see `read_rows`.
    split: the split to read.

  Raises:
    UserError: if the folder holds no dataset, or the dataset has no such split.
  """

  def __init__(self, folder: str | os.PathLike, split: str = SPLIT):
    self.folder, self.split = os.fspath(folder), split
    builder = open_dataset(folder)
    if split not in builder.info.splits:
      raise UserError(
        f'{folder} has no split {split!r}. Choose one of {sorted(builder.info.splits)}.'
      )
    try:
      raw = tfds.decode.DeserializeMethod.RAW_BYTES
      self._source = builder.as_data_source(split, deserialize_method=raw)
      self._features = builder.info.features
      self._decode = make_decoder(self._features)
    except Exception as error:  # the type depends on the fault and on the versions of libraries
      raise damaged(folder, f'split {split!r}', error) from error

  def __reduce__(self) -> tuple[Any, ...]:
    """Let another process open the dataset again."""
    return Rows, (self.folder, self.split)

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> dict[str, Any]:  # type: ignore[override]  # no slices
    if not 0 <= index < len(self):
      raise IndexError(index)
    try:
      return self._decode(self._source[index])
    except Exception as error:  # as above
      raise damaged(self.folder, f'row {index}', error) from error

  def iterate(self, names: Collection[str]) -> Iterator[dict[str, Any]]:
    """Yield some fields of each row, which takes a part of the time of whole rows.

    Args:
      names: names of the fields, such as 'prompt'.

    Raises:
      UserError: if rows cannot be read.
    """
    decode = make_decoder(self._features, names)
    for begin in range(0, len(self), _BLOCK):
      indices = range(begin, min(begin + _BLOCK, len(self)))
      try:
        rows = [decode(record) for record in self._source.__getitems__(indices)]
      except Exception as error:  # as above
        for i in indices:
          _ = self[i]  # raises an error that names the row
        place = f'a row from {indices[0]} to {indices[-1]}'
        raise damaged(self.folder, place, error) from error
      yield from rows


def open_dataset(directory: str | os.PathLike) -> tfds.core.DatasetBuilder:
  """Return a TFDS dataset of a folder.

  Args:
    directory: the folder that holds dataset_info.json.

  Raises:
    UserError: if there is no dataset, or its description cannot be read.
  """
  try:
    builder = tfds.builder_from_directory(os.fspath(directory))
  except OSError as error:
    raise UserError(
      f'{directory} holds no TFDS dataset: {error}. Run the stage that writes it first.'
    ) from error
  except Exception as error:  # of parsers, for a file with other content
    raise damaged(directory, 'dataset_info.json or features.json', error) from error
  return builder


def damaged(folder: str | os.PathLike, place: str, error: Exception) -> UserError:
  """Return the error for a part of a dataset that cannot be read.

  Args:
    folder: the folder of the dataset.
    place: the part.
    error: what was raised.
  """
  return UserError(
    f'{folder} is damaged: {place} cannot be read ({type(error).__name__}: {error!s:.200}). '
    'Restore the folder from a copy, or start in another workdir.'
  )
