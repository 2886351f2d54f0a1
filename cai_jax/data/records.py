"""Records of a TFDS dataset as plain Python dicts.

TFDS decodes a record through arrays and checks of general features, which takes a millisecond for a
row of D_CAI. The features of D_CAI are texts, numbers and sequences of these, which `make_decoder`
reads from the protocol buffer in a tenth of that time, with the same result.
"""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from cai_jax.runtime.settings import flatten

LISTS = ('prompt', 'rounds')  # sequences of dicts, which TFDS returns as dicts of lists
_SIMPLE = (tfds.features.Text, tfds.features.Scalar, tfds.features.Tensor)


def make_decoder(
  features: tfds.features.FeaturesDict, names: Collection[str] = ()
) -> Callable[[bytes], dict[str, Any]]:
  """Return a function from the bytes of a record to its fields.

  Texts are str, numbers are int, float or bool, and the fields of `LISTS` are lists of dicts.

  Args:
    features: the schema of the dataset.
    names: the fields to return; () means all of them.
  """
  if not _is_simple(features):
    return lambda record: to_plain(features.deserialize_example_np(record))
  if names:
    features = tfds.features.FeaturesDict({name: features[name] for name in names})
  paths = {path.replace('.', '/'): x for path, x in flatten(features.get_tensor_info()).items()}
  # TFDS sorts keys too. The order of `features` is by chance, and files would differ by it.
  order = sorted(paths, key=lambda path: path.split('/'))
  fields = [_Field(path, *_split(path), _make_reader(paths[path])) for path in order]
  return functools.partial(_decode, fields)


class _Field(NamedTuple):
  """A field of a record: its path there, its place in the row, and how to read it."""

  path: str
  parents: Sequence[str]
  name: str
  read: Callable[[Any], Any]


def _split(path: str) -> tuple[Sequence[str], str]:
  *parents, name = path.split('/')
  return parents, name


def _is_simple(feature: Any, depth: int = 0) -> bool:
  """Return whether a feature consists of texts, numbers, dicts, and sequences that do not nest."""
  if isinstance(feature, tfds.features.FeaturesDict):
    return all(_is_simple(feature[key], depth) for key in feature)
  if isinstance(feature, tfds.features.Sequence):
    return not depth and _is_simple(feature.feature, depth + 1)
  return type(feature) in _SIMPLE and not feature.get_tensor_info().shape


def _make_reader(info: tfds.features.TensorInfo) -> Callable[[Any], Any]:
  """Return a function from the protocol buffer of a field to its value, or to a list of values."""
  kind = np.dtype(info.np_dtype).kind

  def read_all(feature: Any) -> list[Any]:
    values = getattr(feature, feature.WhichOneof('kind')).value
    if kind == 'O':
      return [value.decode() for value in values]
    return list(map(bool, values)) if kind == 'b' else list(values)

  def read_one(feature: Any) -> Any:
    [value] = read_all(feature)
    return value

  return read_all if info.shape else read_one


def _decode(fields: Sequence[_Field], record: bytes) -> dict[str, Any]:
  """Return the fields of a record; see `make_decoder`."""
  stored = tf_example_pb2.Example.FromString(record).features.feature
  row: dict[str, Any] = {}
  for path, parents, name, read in fields:
    if path not in stored:  # a look-up would add it
      raise KeyError(path)
    node = row
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = read(stored[path])
  return {key: to_list_of_dicts(value) if key in LISTS else value for key, value in row.items()}


def to_plain(value: Any) -> Any:
  """Decode bytes, convert arrays to lists, and make the fields of `LISTS` lists of dicts.

  Args:
    value: a decoded record of TFDS, or a part of it.
  """
  if isinstance(value, bytes):
    return value.decode()
  if isinstance(value, np.generic):
    return value.item()
  if isinstance(value, np.ndarray):
    return to_plain(value.tolist())
  if isinstance(value, list | tuple):
    return [to_plain(item) for item in value]
  if not isinstance(value, Mapping):
    return value
  plain = {key: to_plain(item) for key, item in value.items()}
  return {key: to_list_of_dicts(item) if key in LISTS else item for key, item in plain.items()}


def to_list_of_dicts(value: Any) -> list[dict[str, Any]]:
  """Convert a dict of lists, as TFDS returns a sequence of dicts; a list is returned as it is.

  Args:
    value: the lists of each key, which may be in nested dicts, or a list of dicts.
  """
  if isinstance(value, list):
    return value

  def length(node: Any) -> int:
    return length(next(iter(node.values()))) if isinstance(node, dict) else len(node)

  def pick(node: Any, i: int) -> Any:
    return {key: pick(item, i) for key, item in node.items()} if isinstance(node, dict) else node[i]

  return [pick(value, i) for i in range(length(value))]
