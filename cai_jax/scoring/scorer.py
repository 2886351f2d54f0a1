"""Scorers, which decide which rules a response breaks and whether it helps.

The setting `evaluation.scorer` selects one by name. `SCORERS` maps each name to a function that
builds the scorer:

  @SCORERS.register('my-guard')
  def load_guard(loader: ModelLoader) -> Scorer:
    guard = loader.language_model('my-organization/my-guard')
    return lambda prompts, responses: [classify(guard, p, r) for p, r in zip(prompts, responses)]
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from cai_jax.dialogue import Message
from cai_jax.runtime.registry import Registry
from cai_jax.scoring.loader import ModelLoader


class Verdict(Protocol):
  """A scorer's judgement of one response."""

  @property
  def violations(self) -> frozenset[str]:
    """Names of the rules that the response breaks."""

  @property
  def helpful(self) -> bool:
    """Whether the response does what the prompt asks for."""


# Maps n prompts, each a list of messages, and their n responses to n verdicts.
Scorer = Callable[[Sequence[Sequence[Message]], Sequence[str]], Sequence[Verdict]]

SCORERS: Registry[Callable[[ModelLoader], Scorer | None]] = Registry('scorer')


@SCORERS.register('none')
def no_scorer(loader: ModelLoader) -> None:
  """Return None, so that summaries have no rates of violations and of help."""
  del loader
