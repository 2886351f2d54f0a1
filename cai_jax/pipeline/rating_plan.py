"""What served judges and guard models will be asked at most: a rehearsal with placeholder texts.

The code that asks them runs as in the stages, on responses of the largest length, and with clients
that count requests instead of sending them.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from cai_jax.data.prompts import Prompt
from cai_jax.evaluation.baselines import BY_JUDGE
from cai_jax.evaluation.config import EvaluationConfig
from cai_jax.evaluation.judges import load_judge
from cai_jax.evaluation.measures.guard_rating import load_guards
from cai_jax.evaluation.measures.judge_comparison import compare_with_judge
from cai_jax.evaluation.measures.rubric_scores import load_rubrics
from cai_jax.evaluation.registries import Policy, Row
from cai_jax.evaluation.summary import measure_groups
from cai_jax.feedback.job import Job
from cai_jax.feedback.score import Score, rate_all_equally
from cai_jax.pipeline.baselines import copy_ids, num_answers, select_answers
from cai_jax.pipeline.models import model_loader
from cai_jax.pipeline.policies import list_policies
from cai_jax.pipeline.run import Run
from cai_jax.pipeline.served_raters import FoundRater
from cai_jax.runtime.errors import UnreadableError
from cai_jax.sampling.planning import planned_turns
from cai_jax.scoring.judge_client import BYTES_PER_TOKEN, CountingClient, Tally
from cai_jax.scoring.judge_server import SERVED, JudgeServer
from cai_jax.scoring.loader import ModelLoader


def plan_evaluation(run: Run) -> dict[str, Tally]:
  """Return what the stage `evaluate` asks its judge and guard model, by role: 'judge' and 'guard'.

  The rater of a variant is not counted, see `plan_rater`.

  Args:
    run: the run.
  """
  config, seed = run.config.evaluation, run.config.seed
  if not config.judge_remote and not config.served_guards:
    return {}
  tallies = {'judge': Tally(), 'guard': Tally()}

  def count(server: JudgeServer, role: str) -> CountingClient:
    return CountingClient(server, tallies[role])

  loader = dataclasses.replace(model_loader(run), clients=count)
  base, aligned = _rows(run, 'base', run.config.feedback.rounds), _rows(run, 'aligned')
  policies = {
    p.name: Policy(p.compared_with, _rows(run, p.name)) for p in list_policies(run.config)
  }
  others = {name: policy.rows for name, policy in policies.items()}
  others |= {name: _rows(run, name) for name in config.baselines}
  _measure(config, loader, base, aligned, others)
  if config.judge_remote:
    judge = load_judge(config, loader, seed)
    compare_with_judge(judge, config, base, aligned, seed, policies)
    for name in config.selections_by(BY_JUDGE):
      select_answers(run, name, judge, base, _candidates(run, name, base))
  return tallies


def plan_rater(run: Run, found: FoundRater, job: Job, prompt: Prompt) -> Tally:
  """Return what a served rater is asked about the candidates of a harmful prompt.

  Args:
    run: the run.
    found: its rater.
    job: makes the chain of the prompt.
    prompt: the prompt.
  """
  tally, size = Tally(), run.config.sampling.revision.max_tokens
  client = CountingClient(found.service.server, tally)
  rate = found.kind.load(found.service, found.name.label, client)

  def count(score: Score) -> list[float]:
    # The placeholder replies of a chain are all equal. Candidates that differ are asked about, and
    # those of each round differ from those of another.
    texts = [_filler(f'{score.name} {number}', size) for number, _ in enumerate(score.texts)]
    try:
      rate(score.messages, texts, score.question)
    except UnreadableError:
      pass  # the empty answer of a `CountingClient` is no rating of a guard model
    return rate_all_equally(score)

  for _ in planned_turns(job.placeholder_chain(prompt, 'harmful', count)):
    pass
  return tally


def _measure(
  config: EvaluationConfig,
  loader: ModelLoader,
  base: Sequence[Row],
  aligned: Sequence[Row],
  others: Mapping[str, Sequence[Row]],
) -> None:
  """Rehearse the measures of responses that ask servers."""
  guards = tuple(config.served_guards)
  served = dataclasses.replace(config, guards=guards, guard_models=(SERVED,) * len(guards))
  measures = [load_guards(served, loader)]
  if config.judge_remote:
    measures.append(load_rubrics(config, loader))
  measure_groups(base, aligned, [measure for measure in measures if measure], others)


def _rows(run: Run, name: str, rounds: int = 0) -> list[dict[str, Any]]:
  """Return rows of a model on the held-out prompts, with texts of the largest length."""
  sampling = run.config.sampling
  answer = functools.partial(_filler, count=sampling.initial.max_tokens)
  revision = functools.partial(_filler, count=sampling.revision.max_tokens)
  rows: list[dict[str, Any]] = []
  for kind in ('harmful', 'helpful'):
    for prompt in run.prompts[f'eval_{kind}']:
      revisions = range(rounds if kind == 'harmful' else 0)
      rows.append(
        {
          'id': prompt.id,
          'kind': kind,
          'prompt': prompt.messages,
          'initial': _turn(answer(f'{name} {prompt.id}')),
          'rounds': [
            {'critique': _turn(''), 'revision': _turn(revision(f'round {number} {prompt.id}'))}
            for number in revisions
          ],
        }
      )
  return rows


def _candidates(run: Run, name: str, base: Sequence[Row]) -> list[dict[str, Any]]:
  """Return rows with all answers from which a baseline chooses."""
  count = run.config.sampling.initial.max_tokens
  return [
    dict(row) | {'id': copy, 'initial': _turn(_filler(copy, count))}
    for row in base
    for copy in copy_ids(row['id'], num_answers(run, name))
  ]


def _turn(text: str) -> dict[str, Any]:
  """Return a placeholder turn. It has no tokens, so that all candidates are affordable."""
  return {'text': text, 'num_tokens': 0, 'finish_reason': 'length'}


def _filler(name: str, count: int) -> str:
  """Return a text that counts as `count` tokens or a few more, and differs for each name."""
  return f'{name} '.ljust(BYTES_PER_TOKEN * count, '.')
