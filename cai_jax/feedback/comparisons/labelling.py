"""Run a job of AI feedback, and write its labels and what they are worth."""

import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from cai_jax.feedback.comparisons.job import LabelJob
from cai_jax.feedback.comparisons.records import Item, Outcome
from cai_jax.feedback.comparisons.summary import summarize
from cai_jax.feedback.contexts import smallest_context_limit
from cai_jax.feedback.forward import forward
from cai_jax.feedback.waiting import end_waiting, has_batch, set_aside
from cai_jax.runtime import processes
from cai_jax.runtime.files import make_folder, replacing, write_json
from cai_jax.runtime.replicas import exit_alone, find_replica, run_on_first_replica
from cai_jax.sampling.config import EngineConfig
from cai_jax.sampling.engine import DEFERRED, Engine
from cai_jax.sampling.journal import Journal
from cai_jax.sampling.remote import Remote
from cai_jax.sampling.remote.costs import CostsByModel, sum_usage
from cai_jax.sampling.stats import Stats
from cai_jax.sampling.types import Chain, Completion, Turn, Usage

COMPARISONS, SUMMARY = 'comparisons.jsonl', 'summary.json'

# Called with the numbers of finished prompts, of all prompts, and of sampled tokens.
Progress = Callable[[int, int, int], None]


def label(
  job: LabelJob,
  folder: str | os.PathLike,
  journal: Journal,
  engine: EngineConfig,
  progress: Progress = lambda done, total, tokens: None,
  write_costs: Callable[[CostsByModel], None] = lambda costs: None,
) -> dict[str, Any]:
  """Label the comparisons of a job, and write `comparisons.jsonl` and `summary.json`.

  All processes call this together, with the same shared folder and journal. Each replica of the
  models asks an equal part of the questions, and the first one then reads all answers from the
  journal. Both files depend on the job alone, so a job that was killed ends with the same bytes,
  and nothing is asked twice.

  Args:
    job: what to label; its models have their weights.
    folder: the folder of the two files, created if it does not exist.
    journal: stores finished turns and replays them.
    engine: sizes of the compiled programs.
    progress: called after each prompt of this process.
    write_costs: called in process 0 with what servers counted for all turns, whenever they were
      sampled.

  Returns:
    The summary, see `summary.summarize`, and under 'sampling' the counts and speeds of this
    process.

  Raises:
    UserError: if a model cannot answer, such as a server without log-probabilities.
    WaitingError: if questions wait for a batch. Its requests are written.
  """
  replica = find_replica(job.models.values())
  mine = job.items[replica.index :: replica.count]

  def ask() -> _Asked:
    with exit_alone(replica):
      return _run(job, mine, journal, engine, progress)

  asked = processes.run_on_all_processes('compare the responses', ask, alone=not replica.is_split)

  def write() -> dict[str, Any]:
    done = asked
    if replica.count > 1:  # the others have stored their part in the journal
      done = _run(job, job.items, journal, engine, lambda *_: None)
    if not replica.leads:
      return {}
    write_costs(sum_usage(done.usages))
    return _write(job, pathlib.Path(folder), done.outcomes)

  summary = run_on_first_replica('write the labels', replica, write) or {}
  return summary | {'sampling': asked.stats.summary()}


class _Asked(NamedTuple):
  """The outcomes of some items in their order, counters, and what servers counted, by model."""

  outcomes: list[Outcome]
  stats: Stats
  usages: list[tuple[str, Usage]]


def _run(
  job: LabelJob,
  items: Sequence[Item],
  journal: Journal,
  config: EngineConfig,
  progress: Progress,
) -> _Asked:
  """Ask the questions about some items."""
  if not job.stages:  # a judge compares given responses
    journal.refresh()  # the answers to the other processes
    return _Asked([_play(job.chain(item)) for item in items], Stats(), [])
  usages: list[tuple[str, Usage]] = []
  engine = _make_engine(job, journal, config)
  served = {name for name, model in job.models.items() if isinstance(model, Remote)}
  failures: list[str] = []
  batched = has_batch(job.models)

  def chain(item: Item) -> Chain:
    metered = _metered(job.chain(item), usages, served)
    return set_aside(metered, item.id, failures) if batched else metered

  outcomes: dict[str, Outcome] = {}
  deferred = 0
  for name, outcome in engine.run((item.id, chain(item)) for item in items):
    if outcome is DEFERRED:
      deferred += 1
      continue
    outcomes[name] = outcome
    progress(len(outcomes), len(items), engine.stats.sampled_tokens)
  if deferred:
    end_waiting(job.models, deferred, failures)
  return _Asked([outcomes[item.id] for item in items], engine.stats, usages)


def _play(chain: Chain) -> Outcome:
  """Return the result of a chain without turns."""
  try:
    next(chain)
  except StopIteration as stop:
    return stop.value
  raise AssertionError('a chain without a model has no turn')


def _make_engine(job: LabelJob, journal: Journal, config: EngineConfig) -> Engine:
  stages = job.stages.values()
  return Engine(
    job.models,
    length=min(job.length + config.spare_tokens, smallest_context_limit(job.models)),
    seed=job.seed,
    config=config,
    journal=journal,
    stops={
      stage.model: (stage.dialogue.stop_token_ids, stage.dialogue.stop_strings) for stage in stages
    },
  )


def _metered(chain: Chain, usages: list[tuple[str, Usage]], served: set[str]) -> Chain:
  """Return a chain that notes what servers counted for each turn, by the turn's model."""

  def answer(turn: Turn) -> Chain:
    completion: Completion = yield turn
    if turn.model in served:
      usages.append((turn.model, completion.usage or Usage()))
    return completion

  return forward(chain, answer)


def _write(job: LabelJob, folder: pathlib.Path, outcomes: Sequence[Outcome]) -> dict[str, Any]:
  """Write the rows and the summary, and return the summary."""
  make_folder(folder)
  has_several_pairs = job.config.responses > 2
  with (
    replacing(folder / COMPARISONS) as temporary,
    open(temporary, 'w', encoding='utf-8') as file,
  ):
    for outcome in outcomes:
      for pair in outcome.labels if outcome.item.is_written else ():
        row: Mapping[str, Any] = pair.row(has_several_pairs)
        file.write(json.dumps(row, ensure_ascii=False) + '\n')
  summary = summarize(outcomes)
  write_json(folder / SUMMARY, summary)
  return summary
