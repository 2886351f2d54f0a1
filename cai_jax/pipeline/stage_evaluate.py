"""Stage `evaluate`: score the models of a run on held-out prompts.

These are M_θ, each round of its revisions, M_aligned, and the policies that learnt from
preferences.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

from cai_jax.data import d_cai
from cai_jax.data.ended import read_ended
from cai_jax.data.prompts import Prompt
from cai_jax.evaluation import suite
from cai_jax.evaluation import summary as summaries
from cai_jax.evaluation.baselines import BASELINES, Selection
from cai_jax.evaluation.registries import Policy
from cai_jax.feedback import generate
from cai_jax.feedback.job import Job
from cai_jax.model import lm as models
from cai_jax.model.lm import LM
from cai_jax.pipeline import baselines, ground_truth
from cai_jax.pipeline.chains import prepare_job, sample_dataset
from cai_jax.pipeline.models import (
  load_measures,
  make_dialogue,
  model_loader,
  open_models,
  sampling_mesh,
)
from cai_jax.pipeline.policies import list_policies
from cai_jax.pipeline.policy_table import policy_table
from cai_jax.pipeline.report_chains import EVALUATION_ROWS
from cai_jax.pipeline.run import Run
from cai_jax.runtime import processes
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import replacing, write_json
from cai_jax.runtime.replicas import find_replica, replica_of, run_on_first_replica
from cai_jax.runtime.terminal import say
from cai_jax.sampling.journal import Journal
from cai_jax.sampling.remote import Remote

Rows = Sequence[Mapping[str, Any]]


def evaluate_models(run: Run, manifest: Mapping[str, Any]) -> dict[str, Any]:
  """Write the answers of all models and their scores to `evaluation/`.

  Args:
    run: the run.
    manifest: not used.

  Returns:
    Counts and speeds for the manifest.

  Raises:
    UserError: if a model cannot be loaded or sampled from.
  """
  del manifest
  harmful, helpful = run.prompts['eval_harmful'], run.prompts['eval_helpful']
  folder = run.workdir / 'evaluation'
  results: dict[str, Any] = {}
  rows: dict[str, Rows] = {}
  with open_models(run) as sampled:
    job = prepare_job(run, sampled, harmful, helpful)
    length = job.length
    base_counts = sample_dataset(run, job, folder / 'base', 'base')
    rows['base'] = list(d_cai.read_rows(folder / 'base'))
    vocabulary = None
    if isinstance(sampled['base'], LM):
      vocabulary = sampled['base'].tokenizer.get_vocab()
      results['base'] = _evaluate_model(run, sampled['base'], rows['base'])
    for name in run.config.evaluation.baselines:
      prompts = baselines.make_prompts(run, name, [*harmful, *helpful])
      job = _prepare_answers(run, sampled, prompts, length)
      # The answers that a baseline chooses from are no model's, so they have a folder of their own.
      selects = name in run.config.evaluation.selections
      place = folder / 'candidates' / name if selects else folder / name
      sample_dataset(run, job, place, name)
      rows[name] = list(d_cai.read_rows(place))
  del sampled, job  # frees their memory for the other models
  counts: dict[str, Any] = {'base': base_counts}
  trained = {'aligned': run.aligned}
  trained |= {policy.name: str(run.workdir / policy.folder) for policy in list_policies(run.config)}
  for name, path in trained.items():
    counts[name] = _answer(run, name, path, length, vocabulary, rows, results)
  processes.run_on_process_0('score responses', lambda: _write_scores(run, rows, results))
  return counts | {'rows_in': base_counts['rows']}


def _answer(
  run: Run,
  name: str,
  path: str,
  length: int,
  vocabulary: Mapping[str, int] | None,
  rows: dict[str, Rows],
  results: dict[str, Any],
) -> dict[str, Any]:
  """Answer the held-out prompts with a trained model, and add its rows and results to the dicts.

  Args:
    run: the run.
    name: name of the model, and of the folder of its answers.
    path: its checkpoint.
    length: as in `_prepare_answers`.
    vocabulary: that of M_θ; None if a server holds M_θ.
    rows: rows by model, which have those of M_θ.
    results: results of the measures by model.

  Returns:
    Counts and speeds, for the manifest.
  """
  section, folder = run.config.model, run.workdir / 'evaluation' / name
  lm = models.load(
    path,
    section.dtype,
    sampling_mesh(run),
    long_context=section.long_context,
    weights=section.weights,
    params=run.kept.params.pop(path, None),
  )
  prompts = [*run.prompts['eval_harmful'], *run.prompts['eval_helpful']]
  job = _prepare_answers(run, {'base': lm}, prompts, length)
  counts = sample_dataset(run, job, folder, name)
  rows[name] = list(d_cai.read_rows(folder))
  results[name] = _evaluate_model(run, lm, rows['base'])
  if 'kl' in run.config.evaluation.active_scores:
    if vocabulary == lm.tokenizer.get_vocab():
      rows[name] = _add_replies(run, job, rows[name])
    elif jax.process_index() == 0:
      reason = 'a server holds M_θ' if vocabulary is None else 'the two vocabularies differ'
      shown = 'M_aligned' if name == 'aligned' else name
      say(f'KL of {shown} from M_θ: not measured, because {reason}')
  return counts


def _prepare_answers(
  run: Run, sampled: Mapping[str, LM | Remote], prompts: Sequence[Prompt], length: int
) -> Job:
  """Return the job that answers prompts, with caches as long as those of another job.

  The programs that sampled that job then sample this one too, and none is compiled.
  """
  job = prepare_job(run, sampled, [], prompts)
  return dataclasses.replace(job, length=max(job.length, length))


def _evaluate_model(run: Run, lm: LM, rows: Rows) -> dict[str, Any] | None:
  """Return a model's results by log-probability in its first replica, and None elsewhere."""
  return run_on_first_replica(
    'evaluate a model',
    replica_of(lm.mesh),
    lambda: suite.evaluate_model(run.config.evaluation, lm, rows, make_dialogue(run, lm)),
  )


def _add_replies(run: Run, job: Job, rows: Rows) -> Rows:
  """Return M_aligned's rows with the token ids and log-probabilities of its answers, as `reply`.

  The first replica does this from the journals of all; the others return the rows as they are.
  """
  replica = find_replica(job.sampled_models.values())

  def replay() -> list[Mapping[str, Any]]:
    journal = Journal(run.journal or run.workdir / 'journal', replica.index, replica)
    try:
      turns = generate.replay_turns(job, journal, run.config.engine)
    finally:
      journal.close()
    replies = {
      name: {
        'context': turn.context,
        'tokens': completion.tokens,
        'logprobs': completion.logprobs,
      }
      for name, replayed in turns.items()
      for turn, completion in replayed[-1:]  # the answer; a thought budget has a turn before it
    }
    return [{**row, 'reply': replies[row['id']]} for row in rows]

  return run_on_first_replica('read the answers of aligned', replica, replay) or rows


def _write_scores(run: Run, rows: Mapping[str, Rows], results: dict[str, Any]) -> None:
  """Write `rows.jsonl` (scores of responses), `summary.json` (their means) and `models.json`."""
  folder, config = run.workdir / 'evaluation', run.config
  if config.evaluation.selections:
    rows, chosen = _select_answers(run, rows)
    results = results | chosen
  rows = _answered_by_both(folder, rows)
  trained = {policy.name: policy for policy in list_policies(config)}
  others = {name: rows[name] for name in (*config.evaluation.baselines, *trained)}
  groups = summaries.measure_groups(rows['base'], rows['aligned'], load_measures(run), others)
  _write_rows(run.workdir / EVALUATION_ROWS, summaries.response_rows(groups))
  starts = {name: policy.compared_with for name, policy in trained.items()}
  summary = summaries.average_groups(groups, starts)
  ground_truth.add_grammar(summary, run, rows['base'])
  write_json(folder / 'summary.json', summary)
  policies = {name: Policy(starts[name], rows[name]) for name in trained}
  results = results | suite.compare_models(
    config.evaluation, model_loader(run), rows['base'], rows['aligned'], config.seed, policies
  )
  write_json(folder / 'models.json', results)
  if text := baselines.describe_results(config.evaluation, results):
    say(text)
  if table := policy_table(config, summary, results):
    say(f'\n{table}')


def _select_answers(run: Run, rows: Mapping[str, Rows]) -> tuple[dict[str, Rows], dict[str, Any]]:
  """Return the rows with the chosen answers of baselines that choose, and results about them."""
  choosers = baselines.load_choosers(run)
  kept, results = dict(rows), {}
  for baseline in run.config.evaluation.selections:
    selection = BASELINES[baseline]
    assert isinstance(selection, Selection)
    name, chooser = choosers[selection.by]
    kept[baseline], result = baselines.select_answers(
      run, baseline, chooser, rows['base'], rows[baseline]
    )
    baselines.write_answers(run.workdir / 'evaluation' / baseline, kept[baseline])
    results[baseline] = name | result
  return kept, results


def _write_rows(path: pathlib.Path, rows: Iterable[Mapping[str, Any]]) -> None:
  """Write rows as JSON Lines, atomically."""
  with replacing(path) as temporary, open(temporary, 'w', encoding='utf-8') as file:
    file.writelines(json.dumps(row) + '\n' for row in rows)


def _answered_by_both(folder: pathlib.Path, rows: Mapping[str, Rows]) -> dict[str, Rows]:
  """Return the rows without the prompts for which the chain of either model ended early."""
  ended = {entry['id'] for name in rows for entry in read_ended(folder / name)}
  kept: dict[str, Rows] = {
    name: [row for row in group if row['id'] not in ended] for name, group in rows.items()
  }
  if not any(row['kind'] == 'harmful' for row in kept['base']):
    raise UserError(
      f'No harmful held-out prompt was answered by both models. See ended-*.jsonl in {folder}/base '
      f'and {folder}/aligned for why their chains ended, and give other prompts.'
    )
  return kept
