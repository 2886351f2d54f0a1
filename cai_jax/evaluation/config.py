"""The settings of a run's evaluation."""

import dataclasses
import hashlib
import os
import pathlib

from cai_jax.dialogue.format import FORMATS
from cai_jax.evaluation import questions
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.settings import setting
from cai_jax.scoring import refusal
from cai_jax.scoring.scorer import SCORERS

LESS_HARMFUL = 'Choose the answer that harms nobody and still helps with what was asked.'


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
  """What a run's evaluation measures.

  Raises:
    UserError: if a setting has a value that is not allowed, or a file of questions is not valid.
  """

  scorer: str = setting(
    'none',
    'Scorer that decides which rules a response breaks and whether it helps: '
    "'tiny' (the oracle of the embedded world), 'none', or one that a plugin registers.",
  )
  refusal: str = setting(
    'none',
    "How refusals are recognized: 'rules' (by their opening words, in English), the folder or hub "
    "name of a sequence-classification checkpoint, or 'none'.",
    path=True,
  )
  refusal_label: str = setting(
    '', "Label of the refusal checkpoint that means refusal. '' if it has a single label."
  )
  reward_model: str = setting(
    '',
    'Folder or hub name of a sequence-classification checkpoint whose logit is the reward of a '
    "response. '' measures no reward.",
    path=True,
  )
  reward_label: str = setting(
    '', "Label of the reward model whose logit is used. '' if it has a single label."
  )
  multiple_choice: tuple[str, ...] = setting(
    (),
    'Files of multiple-choice questions, with {prompt, corrects, incorrects} on each line.',
    path=True,
  )
  swap: bool = setting(
    False, 'Whether to ask each multiple-choice question again with its two options exchanged.'
  )
  style: str = setting(
    'chat',
    'Prompt format in which the refusal classifier and the reward model read conversations: '
    "'chat' is the chat template of their tokenizer, 'plain' is Human:/Assistant: text.",
  )
  judge: str = setting(
    '',
    'Model that compares the responses of M_aligned and M_θ: a folder, a hub name, or '
    "'base' for M_θ itself. '' compares nothing.",
    path=True,
  )
  judge_principles: tuple[str, ...] = setting(
    (LESS_HARMFUL,), 'Principles for the judge. One of them is drawn for each prompt.'
  )
  loss: bool = setting(
    True,
    'Whether to measure the loss, in nats per sequence, of M_θ and M_aligned on the last revisions '
    'of held-out prompts.',
  )

  def __post_init__(self):
    for name, registry in (('scorer', SCORERS), ('style', FORMATS)):
      value = getattr(self, name)
      try:
        registry[value]
      except UserError as error:
        raise UserError(f'evaluation.{name}={value!r}: {error}') from error
    is_checkpoint = '/' in self.refusal or os.path.isdir(self.refusal)
    self._check_unused()
    if self.refusal not in refusal.CLASSIFIERS and not is_checkpoint:
      names = ', '.join(map(repr, refusal.CLASSIFIERS))
      raise UserError(
        f'evaluation.refusal={self.refusal!r} must be one of {names}, or the folder or hub name of '
        'a checkpoint.'
      )
    if isinstance(self.multiple_choice, str):
      raise UserError(
        f'evaluation.multiple_choice={self.multiple_choice!r} is a text. Give a tuple of files.'
      )
    principles = self.judge_principles
    if isinstance(principles, str) or not principles or not all(map(str.strip, principles)):
      raise UserError(
        f'evaluation.judge_principles={principles!r} must be a tuple of at least one text, none '
        'blank.'
      )
    for path in self.multiple_choice:
      self._check_questions(path)

  def _check_unused(self) -> None:
    """Check that no setting is set that another one leaves without effect."""
    for name, is_used, other in (
      ('refusal_label', self.refusal not in refusal.CLASSIFIERS, 'refusal names no checkpoint'),
      ('reward_label', self.reward_model, 'reward_model is empty'),
      ('swap', self.multiple_choice, 'multiple_choice is empty'),
    ):
      if getattr(self, name) and not is_used:
        raise UserError(
          f'evaluation.{name}={getattr(self, name)!r} has no effect, because evaluation.{other}. '
          'Set both, or leave both out.'
        )
    if len({*self.multiple_choice}) != len(self.multiple_choice):
      raise UserError(
        f'evaluation.multiple_choice={self.multiple_choice!r} names a file twice. Name each once.'
      )

  def _check_questions(self, path: str) -> None:
    try:
      for question in questions.read_questions(path):
        if self.swap:
          questions.swap_options(question)
    except UserError as error:
      raise UserError(f'evaluation.multiple_choice: {error}') from error

  def question_digests(self) -> list[str]:
    """Return a hex digest of each file of multiple-choice questions."""
    return [
      hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()[:16]
      for path in self.multiple_choice
    ]
