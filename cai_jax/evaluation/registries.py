"""The registries of measures, and the types of their entries.

There are three kinds of measures: of responses, of a model, and of two models' responses to the
same prompts. Each entry of a registry is a function that reads the config and returns the measure,
or None if the config does not ask for it. A run uses all registered measures, so registering one is
enough:

  from cai_jax.evaluation.registries import RESPONSE_MEASURES

  @RESPONSE_MEASURES.register('questions')
  def load_question_rate(config, loader):
    def measure(prompts, turns):
      return {'question_rate': [float('?' in turn['text']) for turn in turns]}

    return measure
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cai_jax.dialogue import Dialogue, Message
from cai_jax.evaluation.config import EvaluationConfig
from cai_jax.model.lm import LM
from cai_jax.runtime.registry import Registry
from cai_jax.scoring.loader import ModelLoader

Row = Mapping[str, Any]  # a row of D_CAI: a prompt, its initial response and its rounds
Turn = Mapping[str, Any]  # a sampled turn of a row, with `text` and `num_tokens`

# Maps n prompts, each a list of messages, and the n turns that answer them to columns of n numbers.
# The name of a column of shares ends in `_rate`; these get an interval. None means unknown. In the
# summary of a run, a turn also has a `reference`: the text of M_θ's answer, or None if it is that.
# A column whose name ends in `_labels` has a tuple of texts for each response instead, such as the
# categories of a guard model. It has no mean; the report shows and filters its labels as flags.
ResponseMeasure = Callable[
  [Sequence[Sequence[Message]], Sequence[Turn]], Mapping[str, Sequence[Any]]
]


@dataclasses.dataclass(frozen=True)
class ModelMeasure:
  """A measure of a model's log-probabilities.

  Attributes:
    measure: maps the model, the rows of M_θ on held-out prompts, and the dialogue that renders
      messages for the model, to a result of JSON types. None means that there is nothing to
      measure.
    describe: maps the model's name and a result to lines of text.
  """

  measure: Callable[[LM, Sequence[Row], Dialogue], Any]
  describe: Callable[[str, Any], list[str]]


@dataclasses.dataclass(frozen=True)
class Policy:
  """The responses of a model that learnt from preferences.

  Attributes:
    start: the model that it is compared with: 'aligned' if its training began from M_aligned, and
      else 'base' for M_θ.
    rows: its rows on the held-out prompts.
  """

  start: str
  rows: Sequence[Row]


@dataclasses.dataclass(frozen=True)
class ModelComparison:
  """A comparison of the responses of M_θ and M_aligned.

  Attributes:
    compare: maps a loader, the rows of M_θ, the rows of M_aligned on the same prompts, and a seed
      to a result of JSON types. None means that there is nothing to compare.
    describe: maps a result to lines of text.
    compare_policies: for a run with further policies, what is called instead of `compare`. It gets
      one more argument: the policies, each with its rows on the same prompts, by name. Its result
      has what that of `compare` has. None compares M_aligned alone.
  """

  compare: Callable[[ModelLoader, Sequence[Row], Sequence[Row], int], Any]
  describe: Callable[[Any], list[str]]
  compare_policies: (
    Callable[[ModelLoader, Sequence[Row], Sequence[Row], int, Mapping[str, Policy]], Any] | None
  ) = None


RESPONSE_MEASURES: Registry[Callable[[EvaluationConfig, ModelLoader], ResponseMeasure | None]] = (
  Registry('measure of responses')
)
MODEL_MEASURES: Registry[Callable[[EvaluationConfig], ModelMeasure | None]] = Registry(
  'measure of a model'
)
COMPARISONS: Registry[Callable[[EvaluationConfig], ModelComparison | None]] = Registry(
  'comparison of models'
)
