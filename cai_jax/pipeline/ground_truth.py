"""The truth beside the rates of a run in the embedded world: what its grammar itself gives.

A run of the embedded world can at best recover these rates, because its model was trained to
imitate the grammar. They are no evidence about the method.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cai_jax.dialogue import Message
from cai_jax.evaluation.registries import Row
from cai_jax.pipeline.run import Run
from cai_jax.sampling.types import SamplingConfig
from cai_jax.tiny import simulate
from cai_jax.tiny.files import MODELS
from cai_jax.tiny.grammar_rounds import GRAMMAR_ROUNDS

PREFIX = 'grammar_'  # of the names of the grammar's rates
COLUMNS = ('violation_rate', 'helpful_rate')
Rates = Mapping[str, float]


def grammar_rates(
  run: Run, prompts: Sequence[Sequence[Message]], kind: str
) -> dict[str, dict[str, float]]:
  """Return what the grammar gives at the settings of a run, for the responses that it defines.

  The grammar writes ten chains for each prompt, with the principles, the rounds and the variant of
  the run, and the oracle judges them. Where the settings leave the grammar (another temperature,
  critiques of other prompts, another model or constitution), it has no rates. For M_aligned, the
  rates are those of a perfect imitator of its training texts.

  Args:
    run: the settings.
    prompts: the messages of each prompt. All are of one kind.
    kind: 'harmful' or 'helpful'. Helpful prompts are answered and not revised.

  Returns:
    Response ('initial', 'revision_n', 'last', 'base', 'revised' or 'aligned') → column, such as
    'grammar_violation_rate' → rate in [0, 1].

  Raises:
    UserError: if a prompt is not a request of the embedded world.
  """
  if not _is_embedded(run) or not prompts:
    return {}
  rounds = run.config.feedback.rounds if kind == 'harmful' and _revises_as_grammar(run) else 0
  feedback = run.config.feedback
  variant, options = feedback.variant, feedback.variant_options
  if not rounds:  # any variant that the grammar has
    variant, options = 'critique', None
  rates = simulate.simulate_prompts(
    prompts, run.constitution.principles, rounds, variant=variant, options=options
  )
  named = {'initial': rates[0], 'base': rates[0]}
  if kind == 'helpful':
    named['revised'] = rates[0]
  elif rounds:
    named |= {f'revision_{number}': rates[number] for number in range(1, rounds + 1)}
    named |= {'last': rates[-1], 'revised': rates[-1]}
  if (aligned := _aligned_rates(run, rates, kind)) is not None:
    named['aligned'] = aligned
  return {
    name: {f'{PREFIX}{column}': rate for column, rate in zip(COLUMNS, pair, strict=True)}
    for name, pair in named.items()
  }


def add_grammar(summary: Mapping[str, dict[str, Any]], run: Run, rows: Iterable[Row]) -> None:
  """Add the grammar's rates to the summary of a run, in place.

  Args:
    summary: the result of `cai_jax.evaluation.summary.summarize`.
    run: the run.
    rows: rows of M_θ on the held-out prompts.
  """
  rows = list(rows)
  for kind, groups in (('harmful', ('stages', 'models')), ('helpful', ('benign',))):
    rates = grammar_rates(run, [row['prompt'] for row in rows if row['kind'] == kind], kind)
    for group in groups:
      for name, row in summary.get(group, {}).items():
        row.update(rates.get(name, {}))


def _is_embedded(run: Run) -> bool:
  """Return whether embedded models alone answer, by the grammar's constitution, as it writes."""
  config = run.config
  names = (config.model.base, config.model.critique or 'tiny', config.model.revision or 'tiny')
  return (
    config.evaluation.scorer == 'tiny'
    and config.constitution.path == 'tiny'
    and not run.remotes
    and all(name in MODELS for name in names)
    and _is_plain(config.sampling.initial)
  )


def _is_plain(sampling: SamplingConfig) -> bool:
  """Return whether replies are draws from the model's distribution, unchanged."""
  default = SamplingConfig()
  return dataclasses.replace(sampling, max_tokens=default.max_tokens) == default


def _revises_as_grammar(run: Run) -> bool:
  feedback, sampling = run.config.feedback, run.config.sampling
  make_writer = GRAMMAR_ROUNDS.get(feedback.variant)
  stages = {stage for _, stage in feedback.plan()}
  return (
    make_writer is not None
    and make_writer(feedback.variant_options) is not None
    and feedback.repeat_principles
    and all(_is_plain(sampling.of_stage(stage, feedback.variant)) for stage in stages)
  )


def _aligned_rates(
  run: Run, rates: Sequence[tuple[float, float]], kind: str
) -> tuple[float, float] | None:
  """Return the rates of a perfect imitator of the training texts, or None if unknown.

  Args:
    run: the run.
    rates: rates of y_init and of each revision.
    kind: kind of the prompts.
  """
  model, train = run.config.model, run.config.train
  if model.aligned or model.init or run.config.data.d_cai or train.loss != 'nll' or train.filters:
    return None
  if train.target == 'initial':
    return rates[0]
  if kind == 'helpful':
    return rates[0] if train.helpfulness_share else None
  if len(rates) == 1:
    return None
  learnt = rates[1:] if train.target == 'all' else rates[-1:]
  violating, helpful = (sum(column) / len(learnt) for column in zip(*learnt, strict=True))
  return violating, helpful
