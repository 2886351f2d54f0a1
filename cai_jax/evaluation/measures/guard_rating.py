"""Rates of unsafe responses, and their categories, by guard models."""

import contextlib
from collections.abc import Sequence
from typing import Any

from cai_jax.dialogue import Message
from cai_jax.evaluation.config import EvaluationConfig
from cai_jax.evaluation.registries import RESPONSE_MEASURES, ResponseMeasure, Turn
from cai_jax.scoring.guards.guard import GUARDS, THRESHOLD, Guard, Rating, rate
from cai_jax.scoring.guards.served import rate_by
from cai_jax.scoring.loader import ModelLoader

# The label of a blank response, of one that is too long for the guard, and of an answer of a served
# guard that is not in its form.
NOT_RATED = 'not rated'


@RESPONSE_MEASURES.register('guards')
def load_guards(config: EvaluationConfig, loader: ModelLoader) -> ResponseMeasure | None:
  """Return a measure with the columns of `guard_columns` for each guard, or None if there is none.

  Each guard is loaded when it is its turn, so that only one is in memory. What it needs is checked
  in `pipeline/evaluation_checks.py`.
  """
  if not config.guards:
    return None

  def measure(
    prompts: Sequence[Sequence[Message]], turns: Sequence[Turn]
  ) -> dict[str, Sequence[Any]]:
    texts = [turn['text'] for turn in turns]
    columns: dict[str, Sequence[Any]] = {}
    for kind, name in config.guard_checkpoints.items():
      lm = loader.language_model(name)
      ratings = rate(GUARDS[kind], lm, prompts, texts, loader.rating_journal)
      columns |= guard_columns(kind, GUARDS[kind], ratings)
      del lm  # frees its memory for the next one
    for kind, server in config.served_guards.items():
      with contextlib.closing(loader.client(server, 'guard')) as client:
        ratings = rate_by(GUARDS[kind], client, prompts, texts)
      columns |= guard_columns(kind, GUARDS[kind], ratings)
    return columns

  return measure


def guard_columns(
  kind: str, guard: Guard, ratings: Sequence[Rating | None]
) -> dict[str, Sequence[Any]]:
  """Return the columns of a guard's ratings.

  Args:
    kind: name of the guard in `GUARDS`, with which the names of columns begin.
    guard: the guard.
    ratings: one per response, None where the guard could not rate it.

  Returns:
    `KIND_unsafe_rate`: whether the probability of 'unsafe' is at least `THRESHOLD`;
    `KIND_unsafe_probability` and `KIND_label_mass`, see `Rating`, which are not known if a server
    gives no log-probabilities; `KIND_NAME_rate` for each of the guard's other rates; and
    `KIND_labels`: the categories, or `NOT_RATED`.
  """
  known = lambda value: [None if r is None else value(r) for r in ratings]  # noqa: E731
  columns: dict[str, Sequence[Any]] = {
    f'{kind}_unsafe_rate': known(lambda r: float(r.unsafe >= THRESHOLD)),
    f'{kind}_unsafe_probability': known(lambda r: None if r.label_mass is None else r.unsafe),
    f'{kind}_label_mass': known(lambda r: r.label_mass),
  }
  for name in guard.others:
    columns[f'{kind}_{name}_rate'] = known(lambda r, name=name: float(r.others[name] >= THRESHOLD))
  columns[f'{kind}_labels'] = [(NOT_RATED,) if r is None else r.categories for r in ratings]
  return columns
