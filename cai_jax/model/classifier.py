"""Sequence classifiers: a decoder with a linear head over its hidden state."""

import copy
import dataclasses
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from cai_jax.model.checkpoint import (
  MAX_SHARD_BYTES,
  check_params,
  load_params,
  load_weight,
)
from cai_jax.model.config import ModelConfig
from cai_jax.model.families.family import FAMILIES, config_to_hf
from cai_jax.model.families.fields import read_size
from cai_jax.model.folder import find_folder, read_description
from cai_jax.model.generation_config import special_token_ids
from cai_jax.model.saving import save_folder
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


def save_classifier(
  classifier: Classifier,
  path: str | os.PathLike,
  dtype: str | None = None,
  max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
  """Save a classifier as a folder that `load_classifier` and transformers read.

  transformers takes the logits at the last token that is not the padding token of config.json. The
  tokenizer in the folder therefore pads with the same token.

  Args:
    classifier: the classifier.
    path: the folder, see `saving.save_folder`.
    dtype: dtype of the weights; None keeps that of the parameters.
    max_shard_bytes: largest size of a safetensors file in bytes; a single weight may exceed it.

  Raises:
    UserError: as `saving.save_folder`; or if transformers has no classifier of this family, or
      there is no token to pad with.
  """
  info = classifier.info
  pad = choose_pad_token(info)
  tokenizer = info.tokenizer
  if tokenizer.pad_token_id != pad:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
  names = dict(enumerate(info.labels))
  entries = {
    **config_to_hf(info.config),
    **special_token_ids(tokenizer, info.eos_token_ids, {}),
    'architectures': [classifier_class(info.config.family)],
    'num_labels': len(names),
    'id2label': {str(number): name for number, name in names.items()},
    'label2id': {name: number for number, name in names.items()},
  }
  save_folder(
    path,
    classifier.params,
    info.config,
    tokenizer,
    entries,
    extra={SCORE: classifier.score},
    dtype=dtype,
    max_shard_bytes=max_shard_bytes,
  )


def choose_pad_token(info: ClassifierInfo) -> int:
  """Return the token that pads rows of a classifier, and that never ends a conversation's score.

  It is the padding token of config.json, or else that of the tokenizer, or else a token that ends
  replies.

  Args:
    info: the classifier.

  Raises:
    UserError: if there is none of these.
  """
  stated = (info.pad_token_id, info.tokenizer.pad_token_id, *info.eos_token_ids)
  for token in (*stated, info.tokenizer.eos_token_id):
    if token is not None and token >= 0:  # early Llama checkpoints have -1 for none
      return token
  raise UserError(
    'The tokenizer has neither a padding token nor a token that ends replies. A reward model needs '
    'one of them to pad rows: set pad_token in tokenizer_config.json.'
  )


def classifier_class(family: str, name: str = 'A reward model') -> str:
  """Return transformers' class for the sequence classifiers of a family.

  Args:
    family: a key of FAMILIES.
    name: the model, for the error message.

  Raises:
    UserError: if transformers has no such class.
  """
  if (classifier := FAMILIES[family].classifier) is not None:
    return classifier
  others = sorted(key for key, value in FAMILIES.items() if value.classifier is not None)
  raise UserError(
    f'{name}: transformers has no sequence classifier of the family {family}, so no program could '
    f'read a reward model of it. Use a model of another family: {", ".join(others)}.'
  )


def _read_info(folder: pathlib.Path) -> ClassifierInfo:
  """Return what a folder holds besides the weights."""
  hf, config, tokenizer, eos, _ = read_description(folder)
  config = dataclasses.replace(config, tied_embeddings=True)
  supported = [classifier_class(config.family, str(folder))]
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
