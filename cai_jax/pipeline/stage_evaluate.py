"""Stage `evaluate`: score M_θ, each round of its revisions, and M_aligned on held-out prompts."""

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
from cai_jax.evaluation.judges import load_judge
from cai_jax.feedback import generate
from cai_jax.feedback.job import Job
from cai_jax.model import lm as models
from cai_jax.model.lm import LM
from cai_jax.pipeline import baselines, ground_truth
from cai_jax.pipeline.chains import prepare_job, sample_dataset
from cai_jax.pipeline.models import (
  load_measures,
  local_mesh,
  make_dialogue,
  model_loader,
  open_models,
)
from cai_jax.pipeline.report_chains import EVALUATION_ROWS
from cai_jax.pipeline.run import Run
from cai_jax.runtime import processes
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import replacing, write_json
from cai_jax.runtime.terminal import say
from cai_jax.sampling.journal import Journal
from cai_jax.sampling.remote import Remote
from cai_jax.tiny.files import model_path

Rows = Sequence[Mapping[str, Any]]


def evaluate_models(run: Run, manifest: Mapping[str, Any]) -> dict[str, Any]:
  """Write the answers of both models and their scores to `evaluation/`.

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
  del sampled, job  # frees their memory for M_aligned
  section = run.config.model
  aligned = models.load(
    aligned_path(run), section.dtype, local_mesh(run), long_context=section.long_context
  )
  job = _prepare_answers(run, {'base': aligned}, [*harmful, *helpful], length)
  aligned_counts = sample_dataset(run, job, folder / 'aligned', 'aligned')
  rows['aligned'] = list(d_cai.read_rows(folder / 'aligned'))
  results['aligned'] = _evaluate_model(run, aligned, rows['base'])
  if 'kl' in run.config.evaluation.active_scores:
    if vocabulary == aligned.tokenizer.get_vocab():
      rows['aligned'] = _add_replies(run, job, rows['aligned'])
    elif jax.process_index() == 0:
      reason = 'a server holds M_θ' if vocabulary is None else 'the two vocabularies differ'
      say(f'KL of M_aligned from M_θ: not measured, because {reason}')
  del aligned, job
  processes.run_on_process_0('score responses', lambda: _write_scores(run, rows, results))
  return {'base': base_counts, 'aligned': aligned_counts, 'rows_in': base_counts['rows']}


def _prepare_answers(
  run: Run, sampled: Mapping[str, LM | Remote], prompts: Sequence[Prompt], length: int
) -> Job:
  """Return the job that answers prompts, with caches as long as those of another job.

  The programs that sampled that job then sample this one too, and none is compiled.
  """
  job = prepare_job(run, sampled, [], prompts)
  return dataclasses.replace(job, length=max(job.length, length))


def aligned_path(run: Run) -> str:
  """Return the checkpoint of M_aligned: the configured one, or that of the train stage."""
  name = run.config.model.aligned
  return model_path(name) if name else str(run.workdir / 'model')


def _evaluate_model(run: Run, lm: LM, rows: Rows) -> dict[str, Any] | None:
  """Return a model's results by log-probability in process 0, and None in the others."""
  return processes.run_on_process_0(
    'evaluate a model',
    lambda: suite.evaluate_model(run.config.evaluation, lm, rows, make_dialogue(run, lm)),
  )


def _add_replies(run: Run, job: Job, rows: Rows) -> Rows:
  """Return M_aligned's rows with the token ids and log-probabilities of its answers, as `reply`.

  Process 0 does this from the journals of all processes; the others return the rows as they are.
  """

  def replay() -> list[Mapping[str, Any]]:
    journal = Journal(run.journal or run.workdir / 'journal', jax.process_index())
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

  return processes.run_on_process_0('read the answers of aligned', replay) or rows


def _write_scores(run: Run, rows: Mapping[str, Rows], results: dict[str, Any]) -> None:
  """Write `rows.jsonl` (scores of responses), `summary.json` (their means) and `models.json`."""
  folder, config = run.workdir / 'evaluation', run.config
  if config.evaluation.selections:
    rows, chosen = _select_answers(run, rows)
    results = results | chosen
  rows = _answered_by_both(folder, rows)
  others = {name: rows[name] for name in config.evaluation.baselines}
  groups = summaries.measure_groups(rows['base'], rows['aligned'], load_measures(run), others)
  _write_rows(run.workdir / EVALUATION_ROWS, summaries.response_rows(groups))
  summary = summaries.average_groups(groups)
  ground_truth.add_grammar(summary, run, rows['base'])
  write_json(folder / 'summary.json', summary)
  results = results | suite.compare_models(
    config.evaluation, model_loader(run), rows['base'], rows['aligned'], config.seed
  )
  write_json(folder / 'models.json', results)
  if text := baselines.describe_results(config.evaluation, results):
    say(text)


def _select_answers(run: Run, rows: Mapping[str, Rows]) -> tuple[dict[str, Rows], dict[str, Any]]:
  """Return the rows with the chosen answers of baselines that choose, and results about them."""
  config = run.config.evaluation
  if not config.judge_name:
    config = dataclasses.replace(config, judge='base')
  judge = load_judge(config, model_loader(run), run.config.seed)
  kept, results = dict(rows), {}
  for baseline in config.selections:
    kept[baseline], result = baselines.select_answers(
      run, baseline, judge, rows['base'], rows[baseline]
    )
    baselines.write_answers(run.workdir / 'evaluation' / baseline, kept[baseline])
    results[baseline] = {'judge': config.judge_name} | result
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
