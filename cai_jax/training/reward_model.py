"""What a reward model starts from, and the model that its training returns.

A reward model is a decoder with a head of one score (`cai_jax.model.score_head`). It starts from a
language model, whose output layer gives way to a new head, or from another reward model.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from cai_jax.data.preferences.comparisons import Comparison
from cai_jax.data.preferences.units import UnitSet, render_comparisons
from cai_jax.data.units import Example
from cai_jax.dialogue import Dialogue
from cai_jax.model import lm as models
from cai_jax.model.classifier import (
  Classifier,
  ClassifierInfo,
  choose_pad_token,
  classifier_class,
  inspect_classifier,
  load_classifier,
)
from cai_jax.model.families.family import FAMILIES
from cai_jax.model.folder import find_folder, fingerprint_model, read_hf_config
from cai_jax.model.lm import LM, ModelInfo
from cai_jax.model.score_head import init_head, join_head, split_head
from cai_jax.model.transformer import Params
from cai_jax.runtime.digests import digest_files
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.mesh import to_host
from cai_jax.scoring.reward import append_replies, tokens_to_score

LABEL = 'reward'  # name of the score in the config.json of a new reward model


class InitialReward(NamedTuple):
  """A reward model before training.

  Attributes:
    classifier: the model, with a head f32[1,D] and its parameters in f32.
    fingerprint: hex digest of the files and of the seed of a new head.
  """

  classifier: Classifier
  fingerprint: str

  @property
  def params(self) -> Params:
    """The parameters to train: the decoder's and the head."""
    return join_head(self.classifier.params, {'table': self.classifier.score})

  @property
  def lm(self) -> LM:
    """The model in the form that `preference.prefer` trains. It computes no logits."""
    info = self.classifier.info
    return LM(
      config=info.config,
      params=self.params,
      tokenizer=info.tokenizer,
      mesh=self.classifier.mesh,
      dtype='float32',
      name='the reward model',
      fingerprint=self.fingerprint,
      eos_token_ids=info.eos_token_ids,
    )


def inspect_start(path: str | os.PathLike) -> ClassifierInfo:
  """Check that `load_start` would succeed, without reading the values of the weights.

  Args:
    path: a language model or a reward model: a folder, or a name on the Hugging Face hub.

  Returns:
    What is known of the reward model before training.

  Raises:
    UserError: as `load_start`.
  """
  if _is_classifier(path):
    return _check_single(inspect_classifier(path), path)
  return _new_info(models.inspect_model(path), path)


def load_start(path: str | os.PathLike, mesh: Mesh, seed: int) -> InitialReward:
  """Load a language model with a new head, or a reward model with its own head.

  Args:
    path: a language model or a reward model: a folder, or a name on the Hugging Face hub.
    mesh: the devices.
    seed: of a new head.

  Raises:
    UserError: if the model cannot be loaded, transformers has no sequence classifier of its family,
      it is a classifier with several labels, or its head has another shape than [1,D].
  """
  if not _is_classifier(path):
    return add_head(models.load(path, mesh=mesh), seed)
  _check_single(inspect_classifier(path), path)  # before the weights are read
  classifier = load_classifier(path, mesh=mesh)
  info = _check_single(classifier.info, path)
  folder = find_folder(path)
  fingerprint = fingerprint_model(folder, info.config, info.eos_token_ids, 'float32', 'float32')
  return InitialReward(classifier._replace(info=info), fingerprint)


def add_head(lm: LM, seed: int) -> InitialReward:
  """Return a language model as a reward model with a new head.

  Args:
    lm: the language model, with parameters in f32. Its output layer is not used.
    seed: of the head.

  Raises:
    UserError: if transformers has no sequence classifier of its family, or its tokenizer has no
      token to pad with.
  """
  info = _new_info(ModelInfo(lm.config, lm.tokenizer, lm.eos_token_ids), lm.name)
  params = {key: x for key, x in lm.params.items() if key != 'head'}
  # Every process draws the same head, which leaves the device as adapters do.
  score = np.asarray(init_head(lm.config.d_model, jax.random.key(seed))['table'])
  return InitialReward(Classifier(info, params, score, lm.mesh), f'{lm.fingerprint}/{seed}')


def finish_reward_model(start: InitialReward, params: Params, tokenizer: Any = None) -> Classifier:
  """Return the trained reward model, to save with `classifier.save_classifier`.

  Args:
    start: what it started from.
    params: the trained parameters with the head, as `loop.fit` returns them. In a run of several
      processes, every process must call this function.
    tokenizer: its tokenizer with the chat template of the training; None means that of `start`.
  """
  params, head = split_head(params)
  info = start.classifier.info
  info = info if tokenizer is None else info._replace(tokenizer=tokenizer)
  return start.classifier._replace(info=info, params=params, score=to_host(head['table']))


def build_reward_units(
  comparisons: Iterable[Comparison],
  dialogue: Dialogue,
  info: ClassifierInfo,
  *,
  max_length: int,
  drop_truncated: bool = True,
  margins: bool = False,
  folder: str | os.PathLike | None = None,
) -> UnitSet:
  """Return a unit of two whole conversations for each comparison, as a reward model reads them.

  They are the tokens that `scoring.reward` scores. Units of other objectives end with the token
  that ends the reply, but chat templates may write more, such as the line break of ChatML. The loss
  mask marks the last token, whose score is learned.

  The values are those of `build_comparison_units`.

  Args:
    comparisons: the comparisons; they are read once.
    dialogue: renders conversations as tokens.
    info: the reward model.
    max_length: maximum number of tokens of a unit, which is those of both sides together. Longer
      ones are dropped as 'too_long'; nothing is cut.
    drop_truncated: whether to drop comparisons with a text that was cut off at a length limit.
    margins: whether the units have margins.
    folder: as for `build_comparison_units`.

  Raises:
    UserError: if no comparison remains, one has no margin although `margins` is set, or the
      dialogue has the tokenizer of another model.
  """
  check_dialogue(info, dialogue)
  render = RenderConversations(dialogue, info.pad_token_id)
  return render_comparisons(comparisons, render, max_length, drop_truncated, margins, folder)


@dataclasses.dataclass(frozen=True)
class RenderConversations:
  """Renders both conversations of a comparison as a reward model reads them.

  Attributes:
    dialogue: renders conversations as tokens.
    pad_token_id: the model's padding token, or None.
  """

  dialogue: Dialogue
  pad_token_id: int | None

  @property
  def digest(self) -> str:
    """A hex digest of the dialogue, the padding token and the code that renders."""
    package = pathlib.Path(__file__).parents[1]
    code = digest_files(package, ['scoring/reward.py', 'training/reward_model.py'])
    return json.dumps([self.dialogue.digest, self.pad_token_id, code])

  def __call__(self, pair: Comparison) -> tuple[Example, ...]:
    """Return the segments of a comparison.

    Args:
      pair: the comparison.
    """
    conversations = append_replies([pair.prompt] * 2, [pair.chosen, pair.rejected])
    rows = [tokens_to_score(self.dialogue, x, self.pad_token_id) for x in conversations]
    return tuple(
      Example(np.asarray(row, np.int32), np.arange(len(row)) == len(row) - 1, pair.id)
      for row in rows
    )


def check_dialogue(info: ClassifierInfo, dialogue: Dialogue) -> None:
  """Check that a dialogue renders conversations with the tokenizer of a reward model.

  Args:
    info: the reward model.
    dialogue: what renders the comparisons.

  Raises:
    UserError: if the two vocabularies differ.
  """
  ours, theirs = info.tokenizer.get_vocab(), dialogue.tokenizer.get_vocab()
  if ours == theirs:
    return
  differing = sum(theirs.get(token) != number for token, number in ours.items())
  raise UserError(
    f'The comparisons are rendered with the tokenizer of another model: it has {len(theirs):,} '
    f'tokens, and the reward model has {len(ours):,}, of which {differing:,} have another id there '
    'or none. Render them with the tokenizer of the model that the reward model starts from.'
  )


def _is_classifier(path: str | os.PathLike) -> bool:
  """Return whether config.json names the sequence classifier of a family."""
  named = read_hf_config(find_folder(path)).get('architectures')
  return any(named == [family.classifier] for family in FAMILIES.values())


def _check_single(info: ClassifierInfo, path: str | os.PathLike) -> ClassifierInfo:
  """Check that a classifier has one label, and choose its padding token."""
  if len(info.labels) != 1:
    raise UserError(
      f'{path} is a classifier with {len(info.labels)} labels {info.labels}. A reward model starts '
      'from a language model, or from a reward model, which has one label (num_labels=1).'
    )
  return info._replace(pad_token_id=choose_pad_token(info))


def _new_info(model: ModelInfo, path: str | os.PathLike) -> ClassifierInfo:
  """Return what is known of the reward model that a language model becomes."""
  classifier_class(model.config.family, str(path))
  config = dataclasses.replace(model.config, tied_embeddings=True)
  info = ClassifierInfo(config, (LABEL,), model.tokenizer, model.eos_token_ids, None)
  return info._replace(pad_token_id=choose_pad_token(info))
