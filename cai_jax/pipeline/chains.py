"""Sample the chains of a run into datasets, and prepare them for its report."""

import functools
import math
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

from cai_jax.data.ended import describe_ended, read_ended
from cai_jax.data.prompts import Prompt
from cai_jax.feedback import generate, shards
from cai_jax.feedback import job as jobs
from cai_jax.model.lm import LM
from cai_jax.pipeline.costs import remove_shard_costs, shard_writer, summarize_costs
from cai_jax.pipeline.launches import wait_for_replicas
from cai_jax.pipeline.raters import make_rater
from cai_jax.pipeline.run import Run
from cai_jax.runtime import processes
from cai_jax.runtime.files import writing
from cai_jax.runtime.progress import Progress
from cai_jax.runtime.replicas import find_replica, launched_replica
from cai_jax.runtime.terminal import say
from cai_jax.sampling.journal import Journal
from cai_jax.sampling.remote import Remote
from cai_jax.sampling.stats import describe
from cai_jax.sampling.usage import describe_usage, sum_over_processes, summarize
from cai_jax.scoring.scorer import Scorer

# Counts that are the same in every process, or of which the largest matters. Others are summed.
_MAXIMA = (
  *('rows', 'seconds', 'first_row_seconds', 'slots', 'most_slots', 'occupancy'),
  'journal_faults',
)


def prepare_job(
  run: Run,
  models: Mapping[str, LM | Remote],
  harmful: Sequence[Prompt],
  helpful: Sequence[Prompt],
) -> jobs.Job:
  """Return the job that revises responses to harmful prompts and answers helpful ones.

  Args:
    run: the run, which has the settings.
    models: models by role; 'base' is M_θ.
    harmful: prompts whose responses are critiqued and revised.
    helpful: prompts that are only answered.

  Raises:
    UserError: if the job cannot be sampled, such as for a prompt that is too long.
  """
  config = run.config
  return jobs.prepare(
    models,
    harmful,
    helpful,
    run.constitution,
    config.feedback,
    config.sampling,
    config.seed,
    make_rater(run, models),
  )


def sample_dataset(
  run: Run, job: jobs.Job, folder: pathlib.Path, name: str, started: float | None = None
) -> dict[str, Any]:
  """Sample the chains of a job into a dataset. All processes call this together.

  Args:
    run: the run, which has the journal and the settings of the engine.
    job: what to sample.
    folder: folder of the dataset.
    name: name of the work, shown with the progress.
    started: when the stage began, by `time.perf_counter`. The time from then until the first row is
      then counted as `first_row_seconds`, and printed.

  Returns:
    Counts and speeds over all processes, for the manifest.
  """
  first_row = [0.0]  # seconds until this process had a row; 0 if it sampled none
  with writing(run.workdir):  # a folder that was deleted during the run is not created again
    (run.workdir / 'manifest.json').stat()
  if jax.process_index() == 0 and not shards.is_claimed(folder):
    remove_shard_costs(run, name)  # of shards that were deleted
  with Progress(name) as progress:

    def show(done: int, total: int, tokens: int) -> None:
      if started is not None and done == 1:
        first_row[0] = time.perf_counter() - started
        if jax.process_index() == 0:
          say(f'{name}: first row after {first_row[0]:.1f} s')
      progress(done, total, tokens)

    counts = sample_shards(run, job, folder, name, show)
  if started is not None:
    counts['first_row_seconds'] = first_row[0]
  if launched_replica()[1] > 1:
    find_missing = functools.partial(shards.find_unwritten, folder, job, set())
    processes.run_on_process_0(
      'wait for other replicas', lambda: wait_for_replicas(run.workdir, find_missing)
    )
  return _finish(run, job, folder, name, counts)


def _finish(
  run: Run, job: jobs.Job, folder: pathlib.Path, name: str, counts: dict[str, Any]
) -> dict[str, Any]:
  """Finish a dataset whose shards are written, and return the facts of it for the manifest.

  Args:
    run: the run.
    job: what was sampled.
    folder: folder of the dataset.
    name: name of the work, which names its costs.
    counts: counts and speeds of this process, from `sample_shards`.
  """
  usage = sum_over_processes(counts.pop('expert_usage'))
  counts = merge_counts(counts)
  configs = {name: cast(LM, job.models[name]).config for name in usage}
  experts = {name: summarize(configs[name], x) for name, x in usage.items() if x.any()}

  def finish() -> None:
    if counts['sampled_rows']:
      say(describe(counts))
    for model, summary in experts.items():
      say(describe_usage(model, configs[model], summary))
    generate.finish_dataset(job, folder)
    ended = describe_ended(folder, len(job.prompts), (prompt for prompt, _ in job.prompts))
    for line in filter(None, (ended, job.rewritten_history())):
      say(line)

  processes.run_on_process_0(f'finish {folder}', finish)
  facts = {
    'experts': experts,
    'ids_unknown': job.unknown_ids,
    'served': summarize_costs(run, name),
    'rewritten_history': job.rewritten_history(),
  }
  result = counts | {'ended_chains': len(read_ended(folder)), 'engine': run.values['engine']}
  return result | {fact: value for fact, value in facts.items() if value}


def sample_shards(
  run: Run,
  job: jobs.Job,
  folder: pathlib.Path,
  name: str,
  progress: Callable[[int, int, int], None],
) -> dict[str, Any]:
  """Sample the missing shards of a dataset; return counts and speeds of this process.

  All processes call this together.

  Args:
    run: the run, which has the journal and the settings of the engine.
    job: what to sample.
    folder: folder of the dataset.
    name: name of the work, which names its costs.
    progress: as for `generate_shards`.
  """
  replica = find_replica(job.sampled_models.values())
  journal = Journal(run.journal or run.workdir / 'journal', replica.index, replica)
  engine, write_costs = run.config.engine, shard_writer(run, name)
  try:
    counts = processes.run_on_all_processes(
      f'sample {folder}',
      lambda: generate.generate_shards(job, folder, journal, engine, progress, write_costs),
      alone=False,  # the processes first agree on what is missing
    )
  finally:
    journal.close()
    if journal.num_faults and replica.leads:
      say(journal.describe_faults())
  return counts | {'journal_faults': journal.num_faults}


def merge_counts(counts: Mapping[str, float]) -> dict[str, Any]:
  """Return the counts over all processes: sums, or maxima where a sum is meaningless.

  Args:
    counts: this process's counts; every process has the same names.
  """
  if jax.process_count() == 1:
    return dict(counts)
  table = multihost_utils.process_allgather(np.array(list(counts.values()), np.float64))
  totals = np.where([name in _MAXIMA for name in counts], table.max(0), table.sum(0)).tolist()
  return {
    name: type(count)(total) for (name, count), total in zip(counts.items(), totals, strict=True)
  }


def browsable(row: Mapping[str, Any], scorer: Scorer | None) -> dict[str, Any]:
  """Return a row of D_CAI in the form that the report's browser shows.

  Args:
    row: a row of D_CAI.
    scorer: finds the rules that each response breaks; None leaves `violations` out.
  """
  chain = {name: row[name] for name in ('id', 'prompt')} | {'initial': _known(row['initial'])}
  chain['rounds'] = [
    step
    | {'critique': _known(step['critique']) if step['critique']['finish_reason'] else None}
    | {'revision': _known(step['revision'])}
    for step in row['rounds']
  ]
  if scorer is not None:
    texts = [row['initial']['text'], *(step['revision']['text'] for step in row['rounds'])]
    verdicts = scorer([row['prompt']] * len(texts), texts)
    chain['violations'] = [sorted(verdict.violations) for verdict in verdicts]
  return chain


def _known(turn: Mapping[str, Any]) -> dict[str, Any]:
  """Return a turn without a log-probability that is not known."""
  unknown = {'logprob'} if math.isnan(turn.get('logprob', 0.0)) else set()
  return {name: value for name, value in turn.items() if name not in unknown}
