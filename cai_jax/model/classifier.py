"""Sequence classifiers: a decoder with a linear head over its hidden state."""

import dataclasses
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from cai_jax.model.checkpoint import check_params, load_params, load_weight
from cai_jax.model.config import ModelConfig
from cai_jax.model.families.family import FAMILIES
from cai_jax.model.families.fields import read_size
from cai_jax.model.folder import find_folder, read_description
from cai_jax.model.transformer import Params
from cai_jax.model.weight_files import check_dtype
from cai_jax.runtime.errors import UserError, show
from cai_jax.runtime.mesh import make_mesh

SCORE = 'score.weight'  # transformers' name of the head
MOST_LABELS = 10_000


class ClassifierInfo(NamedTuple):
  """A sequence classifier without its weights.

  Attributes:
    config: the shape of the decoder. Its embeddings are marked as tied, because there is no output
      layer over the vocabulary.
    labels: the C names of the labels.
    tokenizer: a transformers.PreTrainedTokenizerFast.
    eos_token_ids: tokens that end a reply.
    pad_token_id: the padding token of config.json, or None.
  """

  config: ModelConfig
  labels: tuple[str, ...]
  tokenizer: Any
  eos_token_ids: tuple[int, ...]
  pad_token_id: int | None


class Classifier(NamedTuple):
  """A sequence classifier, placed on a mesh.

  Attributes:
    info: everything but the weights.
    params: nested dict of arrays, the decoder's parameters.
    score: f32[C,D], the head; C is the number of labels.
    mesh: where the parameters are.
  """

  info: ClassifierInfo
  params: Params
  score: np.ndarray
  mesh: Mesh


def inspect_classifier(path: str | os.PathLike) -> ClassifierInfo:
  """Check that `load_classifier` would succeed, without reading the values of the weights.

  Args:
    path: a folder, or a name on the Hugging Face hub.

  Raises:
    UserError: as `load_classifier`.
  """
  folder = find_folder(path)
  info = _read_info(folder)
  check_params(folder, info.config, {SCORE: (len(info.labels), info.config.d_model)})
  return info


def load_classifier(
  path: str | os.PathLike, dtype: str = 'float32', mesh: Mesh | None = None
) -> Classifier:
  """Load a sequence classifier from a Hugging Face folder or from the hub.

  The checkpoint must be a decoder of a supported family with `score.weight` [C,D] and no bias, such
  as `LlamaForSequenceClassification` or `Qwen3ForSequenceClassification`.

  Args:
    path: a folder, or a name on the Hugging Face hub.
    dtype: dtype of the parameters.
    mesh: where the parameters go; None means `make_mesh()`.

  Raises:
    UserError: as `lm.load`, and if the checkpoint has another architecture or further weights.
  """
  check_dtype(dtype, 'dtype')
  folder = find_folder(path)
  info = _read_info(folder)
  mesh = make_mesh() if mesh is None else mesh
  return Classifier(
    info=info,
    params=load_params(folder, info.config, mesh, dtype, extra=(SCORE,)),
    score=load_weight(folder, SCORE, (len(info.labels), info.config.d_model)),
    mesh=mesh,
  )


def _read_info(folder: pathlib.Path) -> ClassifierInfo:
  """Return what a folder holds besides the weights."""
  hf, config, tokenizer, eos, _ = read_description(folder)
  config = dataclasses.replace(config, tied_embeddings=True)
  supported = [FAMILIES[config.family].classifier]
  if supported == [None]:
    raise UserError(
      f'{folder}: transformers has no sequence classifier of the family {config.family}, so there '
      'is none to load. Use a reward model or classifier of another family.'
    )
  if (architectures := hf.get('architectures')) != supported:
    raise UserError(
      f'{folder}: config.json has architectures={architectures}; a reward model or classifier of '
      f'this family has {supported}. Other heads and poolings are not implemented.'
    )
  labels = _labels(hf, folder)
  return ClassifierInfo(config, labels, tokenizer, eos, hf.get('pad_token_id'))


def _labels(hf: dict[str, Any], folder: pathlib.Path) -> tuple[str, ...]:
  """Return the names of the labels in order; transformers stores none for its default of two."""
  names, path = hf.get('id2label'), folder / 'config.json'
  if names is None:
    return tuple(f'LABEL_{i}' for i in range(read_size(hf, 'num_labels', 2, largest=MOST_LABELS)))
  if not isinstance(names, dict) or not names or {*names} != {str(i) for i in range(len(names))}:
    raise UserError(f'{path}: id2label={show(names)}; it must map "0", "1", … to the names.')
  labels = tuple(str(names[str(i)]) for i in range(len(names)))
  if len(set(labels)) < len(labels):
    raise UserError(
      f'{path}: id2label={show(names)} has the same name twice. Give different names.'
    )
  if hf.get('num_labels') not in (None, len(labels)):
    raise UserError(
      f'{path}: num_labels={show(hf["num_labels"])}, but id2label has {len(labels)} names. '
      f'Correct the one that does not belong to {SCORE}.'
    )
  # Transformers may leave its own names in label2id, such as LABEL_0.
  numbers = hf.get('label2id') or {}
  if not isinstance(numbers, dict) or any(numbers.get(x, i) != i for i, x in enumerate(labels)):
    raise UserError(
      f'{path}: label2id={show(numbers)} contradicts id2label={show(names)}. Correct one of them.'
    )
  return labels
