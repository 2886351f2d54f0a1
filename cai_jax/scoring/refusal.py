"""Classifiers that decide whether a response refuses its prompt.

A model that has learnt to be harmless should still answer harmless requests. Bai et al. 2022
(section 1.1) call the opposite evasiveness; Röttger et al. 2024 call it exaggerated safety.

The setting `evaluation.refusal` is the name of a classifier in `CLASSIFIERS` or a checkpoint.
"""

from collections.abc import Callable, Sequence

import numpy as np

from cai_jax.dialogue import Message
from cai_jax.runtime.registry import Registry
from cai_jax.scoring import refusal_rules
from cai_jax.scoring.loader import ModelLoader
from cai_jax.scoring.reward import RewardModel, append_replies

# Maps n prompts, each a list of messages, and their n responses to n probabilities of refusal.
Classifier = Callable[[Sequence[Sequence[Message]], Sequence[str]], list[float]]

CLASSIFIERS: Registry[Callable[[ModelLoader], Classifier | None]] = Registry('refusal classifier')


def load_classifier(
  name: str, loader: ModelLoader, label: str = '', style: str = 'chat'
) -> Classifier | None:
  """Return the refusal classifier of a registered name or a checkpoint.

  Args:
    name: a name in `CLASSIFIERS`, or the folder or hub name of a sequence-classification
      checkpoint.
    loader: loads the checkpoint.
    label: the label of the checkpoint that means refusal. It may be '' if there is a single label.
    style: how the checkpoint's conversations are rendered, see `reward.load`.

  Returns:
    The classifier, or None for 'none'.

  Raises:
    UserError: if the checkpoint cannot be loaded or has no such label.
  """
  if name in CLASSIFIERS:
    return CLASSIFIERS[name](loader)
  return checkpoint_classifier(loader.reward_model(name, style), label or None)


@CLASSIFIERS.register('none')
def no_classifier(loader: ModelLoader) -> None:
  """Return None, so that refusals are not measured."""
  del loader


@CLASSIFIERS.register('rules')
def load_rules(loader: ModelLoader) -> Classifier:
  """Return `classify_by_rules`. It needs no model."""
  del loader
  return classify_by_rules


def classify_by_rules(
  prompts: Sequence[Sequence[Message]], responses: Sequence[str]
) -> list[float]:
  """Return 1.0 for each response that `refusal_rules.refuses` recognizes, and 0.0 for the others.

  Args:
    prompts: one per response; the rules do not read them.
    responses: texts.

  Raises:
    ValueError: if there is not one prompt per response.
  """
  if len(prompts) != len(responses):
    raise ValueError(
      f'There are {len(prompts)} prompts and {len(responses)} responses. Pass one prompt per '
      'response.'
    )
  return [float(refusal_rules.refuses(response)) for response in responses]


def checkpoint_classifier(model: RewardModel, label: int | str | None = None) -> Classifier:
  """Return a refusal classifier that reads prompt and response with a model.

  The probability is the softmax over all labels. The logit of a model with a single label is taken
  as the log-odds of refusal.

  Args:
    model: a sequence classifier.
    label: name or index of the label that means refusal. It may be None if there is a single label.

  Raises:
    UserError: if the model has no such label.
  """
  column = model.label_index(label)

  def classify(prompts: Sequence[Sequence[Message]], responses: Sequence[str]) -> list[float]:
    logits = model.conversation_logits(append_replies(prompts, responses)).astype(np.float64)
    if logits.shape[1] == 1:
      logits = np.pad(logits, ((0, 0), (0, 1)))  # the opposite outcome has logit 0
    return [float(p) for p in np.exp(logits[:, column] - np.logaddexp.reduce(logits, axis=1))]

  return classify
