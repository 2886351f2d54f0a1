"""What the served models of a run will be asked and cost at most, before anything is sampled."""

import collections
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from cai_jax.feedback.contexts import word_tokens
from cai_jax.feedback.job import Job, repeat_prompts
from cai_jax.model.lm import LM
from cai_jax.pipeline import baselines
from cai_jax.pipeline.chains import prepare_job
from cai_jax.pipeline.costs import FEEDBACK, GUARD, JUDGE
from cai_jax.pipeline.models import open_models
from cai_jax.pipeline.rating_plan import plan_evaluation, plan_rater
from cai_jax.pipeline.run import Run
from cai_jax.pipeline.served_raters import find_served_rater
from cai_jax.pipeline.stage_label import planned_chains
from cai_jax.sampling.planning import planned_turns
from cai_jax.sampling.remote import Remote, RemoteConfig
from cai_jax.sampling.remote.costs import format_price
from cai_jax.sampling.types import Chain
from cai_jax.scoring.judge_client import Tally

RENDERED = 64  # prompts of each kind whose chains are rendered; the others count as their mean

_Tallies = dict[str, Tally]  # by role


def describe_served(run: Run, stages: Sequence[str]) -> str:
  """Return a line for each served model: requests, tokens and price, at most; '' without any.

  Replies are taken to be as long as allowed, and answers that a journal already has are not left
  out. Tokens of models that sample are those of the tokenizer that the config names. Those of
  judges and guard models are estimated from the bytes of their texts, without what the template of
  the server adds.

  Args:
    run: the run.
    stages: names of the stages to run.

  Raises:
    UserError: if a chain cannot be rendered, or the variable of an API key is not set.
  """
  tallies: _Tallies = collections.defaultdict(Tally)
  if run.remotes or find_served_rater(run.config):
    _plan_chains(run, stages, tallies)
  if run.config.label.remote and 'label' in stages:
    _plan_labels(run, tallies)
  if 'evaluate' in stages:
    for role, tally in plan_evaluation(run).items():
      tallies[role].add(tally)
  return '\n'.join(
    _describe(name, config, tallies[role])
    for name, role, config in _list_served(run)
    if tallies[role].requests
  )


def _list_served(run: Run) -> Iterator[tuple[str, str, RemoteConfig]]:
  """Yield (name in the config, role, settings) of each served model."""
  for role, remote in run.remotes.items():
    yield f'remote.{role}', role, remote
  evaluation = run.config.evaluation
  for name, role, server in (
    ('evaluation.judge_remote', JUDGE, evaluation.judge_remote),
    ('evaluation.guard_remote', GUARD, evaluation.guard_remote),
  ):
    if server:
      yield name, role, server.connection_config()
  if run.config.label.remote:
    yield 'label.remote', FEEDBACK, run.config.label.remote


def _describe(name: str, config: RemoteConfig, tally: Tally) -> str:
  """Return the line of a served model."""
  line = (
    f'{name} ({config.model}): {tally.requests:,.0f} requests with up to about {tally.read:,.0f} '
    f'tokens of contexts and {tally.sampled:,.0f} sampled tokens'
  )
  if config.has_price:
    line += f', price up to about {format_price(config.price(tally.read, 0, tally.sampled))}'
  return line


def _plan_chains(run: Run, stages: Sequence[str], tallies: _Tallies) -> None:
  """Add what the chains of the stages `generate` and `evaluate` ask."""
  rater = find_served_rater(run.config)
  with open_models(run, weights=False) as models:
    for job in _jobs(run, models, stages):
      fillers = word_tokens(job.models)
      for kind in ('harmful', 'helpful'):
        prompts = [prompt for prompt, own in job.prompts if own == kind]
        for prompt, share in _sample(prompts):
          _add_turns(tallies, job.placeholder_chain(prompt, kind), fillers, share)
          if rater and kind == 'harmful':
            tallies[rater.kind.role].add(plan_rater(run, rater, job, prompt), share)


def _jobs(run: Run, models: Mapping[str, LM | Remote], stages: Sequence[str]) -> Iterator[Job]:
  """Yield the jobs of the stages `generate` and `evaluate` in which M_θ and its helpers sample."""
  prompts = run.prompts
  if 'generate' in stages:
    helpful = repeat_prompts(prompts['helpful'], run.config.feedback.helpful_samples)
    yield prepare_job(run, models, prompts['harmful'], helpful)
  if 'evaluate' in stages:
    held_out = prompts['eval_harmful'], prompts['eval_helpful']
    yield prepare_job(run, models, *held_out)
    for name in run.config.evaluation.baselines:
      answered = baselines.make_prompts(run, name, [*held_out[0], *held_out[1]])
      yield prepare_job(run, models, [], answered)


def _plan_labels(run: Run, tallies: _Tallies) -> None:
  """Add what the feedback model is asked about comparisons."""
  with planned_chains(run) as (chains, fillers):
    for make_chain, share in _sample(chains):
      _add_turns(tallies, make_chain(), fillers, share)


def _sample(items: Sequence[Any]) -> Iterable[tuple[Any, float]]:
  """Yield about `RENDERED` items, each with the number of items for which it stands."""
  chosen = items[:: -(-len(items) // RENDERED)] if items else []
  return [(item, len(items) / len(chosen)) for item in chosen]


def _add_turns(tallies: _Tallies, chain: Chain, fillers: Mapping[str, int], share: float) -> None:
  """Add the turns of a chain, which stands for `share` chains."""
  for turn in planned_turns(chain, fillers):
    tally = Tally(1, len(turn.context), turn.sampling.max_tokens)
    tallies[turn.model].add(tally, share)
