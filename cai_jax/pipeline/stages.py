"""The stages of a run: generate, train, evaluate, report."""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from cai_jax.data import d_cai, preferences, quality, quality_summary
from cai_jax.dialogue import Dialogue
from cai_jax.evaluation import suite
from cai_jax.evaluation import summary as summaries
from cai_jax.evaluation.registries import ResponseMeasure
from cai_jax.feedback import generate
from cai_jax.feedback import job as jobs
from cai_jax.model import lm as models
from cai_jax.model.lm import LM
from cai_jax.model.sharding import copy_to_local_mesh
from cai_jax.pipeline.checks import check, check_reachable
from cai_jax.pipeline.run import (
  Run,
  load_scorer,
  local_mesh,
  mesh_of,
  model_loader,
  model_path,
  published,
)
from cai_jax.pipeline.schema import default_config
from cai_jax.report import write_report
from cai_jax.runtime import processes
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import write_json
from cai_jax.runtime.manifest import Manifest
from cai_jax.runtime.progress import Progress
from cai_jax.runtime.settings import flatten
from cai_jax.sampling import completions as answers
from cai_jax.sampling.journal import Journal
from cai_jax.sampling.remote import Remote
from cai_jax.sampling.stats import describe
from cai_jax.scoring.scorer import Scorer
from cai_jax.training import metrics
from cai_jax.training.loop import Probe
from cai_jax.training.supervised import fine_tune


def generate_stage(run: Run, _) -> dict[str, Any]:
  """D_CAI, the implied preferences, and what the revisions are like."""
  folder = run.workdir / 'd_cai'
  with loaded_models(run) as loaded:
    if run.prompts['eval_harmful']:  # so that a held-out prompt that is too long is found now
      prepare_job(run, loaded, run.prompts['eval_harmful'], run.prompts['eval_helpful'])
    helpful = jobs.repeat_prompts(run.prompts['helpful'], run.feedback.helpful_samples)
    job = prepare_job(run, loaded, run.prompts['harmful'], helpful)
    counts = _sample(run, job, folder, 'generate')
  if jax.process_index() == 0:
    pairs = preferences.write_preferences(
      run.workdir / 'preferences.jsonl', d_cai.read_rows(folder)
    )
    counts |= {'preferences': pairs}
  processes.run_on_all_processes('keep feedback.max_rate', lambda: _check_quality(run, folder))
  return {'rows_in': counts.pop('rows'), 'tokens': counts.pop('sampled_tokens'), **counts}


def _check_quality(run: Run, folder: pathlib.Path) -> None:
  """Writes quality.json and prints its table, in process 0.

  Raises:
    ValueError: if a rate is above its limit in feedback.max_rate.
  """
  if jax.process_index() != 0:
    return
  summary, beside = quality_summary.summarise(d_cai.read_rows(folder), _references(run)), None
  path = run.config['report']['published']
  if path:
    beside = published(path)
  both = {'d_cai': summary} | ({'published': beside} if path else {})
  write_json(run.workdir / 'quality.json', both)
  print(quality_summary.format_table(summary, beside), flush=True)
  over = quality_summary.exceeded_limits(summary, run.feedback.max_rate)
  if over:
    raise UserError(
      f'feedback.max_rate is exceeded ({"; ".join(over)}). All rows are kept in {folder}, the '
      'rates of each round in quality.json. Look at the rows; then raise the limit and start again '
      'in the same workdir, where nothing is sampled again, and leave the rows out of training by '
      'train.filters if you want; or change the prompts, principles, models or sampling in '
      'another.'
    )


def _references(run: Run) -> quality.References:
  """What revisions may have been copied from."""
  requests = {p.id: (p.critique_request, p.revision_request) for p in run.constitution.principles}
  return quality.build_references(requests, run.constitution.demonstrations)


def train_stage(run: Run, _) -> dict[str, Any]:
  """M_aligned, fine-tuned on D_CAI."""
  path = run.config['model']['init'] or run.config['model']['base']
  lm = models.load(
    model_path(path), dtype=run.train.dtype, mesh=mesh_of(run), param_dtype='float32'
  )
  style, options = run.feedback.style, run.feedback.template_options
  dialogue = Dialogue(lm.tokenizer, style, lm.eos_token_ids, options)
  rows = d_cai.read_rows(run.workdir / 'd_cai')
  probe = _probe(run, lm) if run.train.probes else None
  params, summary = fine_tune(
    lm, rows, dialogue, run.train, run.workdir, probe, run.profile, _references(run)
  )
  folder = run.workdir / 'model'
  models.save(dataclasses.replace(lm, params=params), folder)
  return {
    'rows_in': summary.pop('rows'),
    'rows_kept': summary.pop('kept'),
    'rows_dropped': summary.pop('dropped'),
    'tokens': summary.pop('target_tokens'),
    'tokens_per_second': summary.pop('target_tokens_per_second'),
    **summary,
  }


def _probe(run: Run, lm: LM) -> Probe:
  """Answers to the first held-out prompts by parameters as they are, sampled by process 0."""
  chosen = [*run.prompts['eval_harmful'], *run.prompts['eval_helpful']][: run.train.probes]
  mesh, dtype = local_mesh(run), run.config['model']['dtype']

  def probe(params) -> list[dict[str, str]]:
    local = copy_to_local_mesh(params, mesh, dtype)
    return processes.run_on_all_processes('answer probe prompts', lambda: answer(local))

  def answer(local) -> list[dict[str, str]]:
    if jax.process_index() != 0:
      return []
    model = dataclasses.replace(lm, params=local, mesh=mesh, dtype=dtype)
    found = answers.generate(
      model,
      [list(prompt.messages) for prompt in chosen],
      run.sampling.initial,
      run.config['seed'],
      style=run.feedback.style,
    )
    return [
      {'id': prompt.id, 'prompt': prompt.messages[-1]['content'], 'text': answer.text}
      for prompt, answer in zip(chosen, found, strict=True)
    ]

  return probe


def evaluate_stage(run: Run, _) -> dict[str, Any]:
  """Scores of every round, of M_θ and of M_aligned, on the held-out prompts."""
  harmful, helpful = run.prompts['eval_harmful'], run.prompts['eval_helpful']
  folder = run.workdir / 'evaluation'
  told = {}
  with loaded_models(run) as loaded:
    base = _sample(run, prepare_job(run, loaded, harmful, helpful), folder / 'base', 'base')
    rows = {'base': list(d_cai.read_rows(folder / 'base'))}
    if isinstance(loaded['base'], LM):
      told['base'] = _of_model(run, loaded['base'], rows['base'])
  del loaded  # M_aligned takes its place
  aligned = models.load(run.workdir / 'model', run.config['model']['dtype'], local_mesh(run))
  answers = prepare_job(run, {'base': aligned}, [], [*harmful, *helpful])
  counts = _sample(run, answers, folder / 'aligned', 'aligned')
  rows['aligned'] = list(d_cai.read_rows(folder / 'aligned'))
  told['aligned'] = _of_model(run, aligned, rows['base'])
  del aligned
  processes.run_on_all_processes('score responses', lambda: _scored(run, rows, told))
  return {'base': base, 'aligned': counts, 'rows_in': base['rows']}


def _scored(run: Run, rows: dict[str, list[dict[str, Any]]], told: dict[str, Any]) -> None:
  """Writes summary.json and models.json of the rows and of what models told, in process 0."""
  if jax.process_index() != 0:
    return
  folder = run.workdir / 'evaluation'
  summary = summaries.summarise(rows['base'], rows['aligned'], load_measures(run))
  write_json(folder / 'summary.json', summary)
  told = told | suite.compare_models(
    run.evaluation, model_loader(run), rows['base'], rows['aligned'], run.config['seed']
  )
  write_json(folder / 'models.json', told)
  if text := suite.describe(run.evaluation, told):
    print(text, flush=True)


def load_measures(run: Run) -> list[ResponseMeasure]:
  """Return the measures of responses that the config asks for, with their models loaded."""
  return suite.load_response_measures(run.evaluation, model_loader(run))


def _of_model(run: Run, lm: LM, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """What a model's log-probabilities tell, by process 0."""

  def ask() -> dict[str, Any]:
    if jax.process_index() != 0:
      return {}
    options = run.feedback.style, lm.eos_token_ids, run.feedback.template_options
    return suite.evaluate_model(run.evaluation, lm, rows, Dialogue(lm.tokenizer, *options))

  return processes.run_on_all_processes('evaluate a model', ask)


def report_stage(run: Run, manifest: dict[str, Any]) -> dict[str, Any]:
  """report.html."""
  if jax.process_index() != 0:
    return {}
  files = (
    'evaluation/summary.json',
    'evaluation/models.json',
    'quality.json',
    metrics.METRICS_FILE,
  )
  gone = [name for name in files if not (run.workdir / name).exists()]
  if gone:
    raise UserError(f'{run.workdir / gone[0]} is gone: put it back, or run all in a new workdir.')
  summary, told, found = (json.loads((run.workdir / name).read_text()) for name in files[:3])
  rows = d_cai.read_rows(run.workdir / 'd_cai')
  shown = [rows[i] for i in range(min(len(rows), run.config['report']['chains']))]
  scorer = load_scorer(run)
  write_report(
    run.workdir / 'report.html',
    title=run.workdir.name,
    config=run.config,
    manifest=manifest,
    summary=summary,
    training=metrics.read_rows(run.workdir / metrics.METRICS_FILE),
    held_out=metrics.read_rows(run.workdir / metrics.HELD_OUT_FILE),
    probes=metrics.read_rows(run.workdir / metrics.PROBES_FILE),
    texts={
      'Quality of the revisions': quality_summary.format_table(
        found['d_cai'], found.get('published')
      ),
      'Models': suite.describe(run.evaluation, told),
    },
    chains=[browsable(row, scorer) for row in shown],
  )
  return {'chains': len(shown)}


STAGES = {
  'generate': generate_stage,
  'train': train_stage,
  'evaluate': evaluate_stage,
  'report': report_stage,
}


def run_stages(run: Run, stages: Sequence[str], say: Callable[[str], None] = print) -> None:
  """Runs those of the stages that are not done, in their order.

  Raises:
    ValueError: for an unknown stage, a workdir that cannot be used or that holds another run.
  """
  unknown = [name for name in stages if name not in STAGES]
  if not stages:
    raise UserError(f'no stage is given; there is {", ".join(STAGES)}.')
  if unknown:
    raise UserError(f'unknown stage {", ".join(unknown)}; there is {", ".join(STAGES)}.')
  processes.run_on_all_processes('check', lambda: check(run, stages))
  first = jax.process_index() == 0
  manifest = Manifest(run.workdir, writes=first)
  defaults = flatten(default_config().to_dict())
  for name in list(STAGES)[: max(map(list(STAGES).index, stages)) + 1]:
    manifest.check(name, run.settings(name), defaults)
    if name not in stages and not manifest.done(name):
      raise UserError(f'stage {name} is not done in {run.workdir}; add it to --stages.')
  if any(name in ('generate', 'evaluate') and not manifest.done(name) for name in stages):
    processes.run_on_all_processes('reach servers', lambda: check_reachable(run))
  processes.barrier('manifest read')
  if first:
    write_json(run.workdir / 'config.json', run.config)
  for name in (name for name in STAGES if name in stages):
    if manifest.done(name):
      say(f'{name}: done before')
      continue
    say(f'{name} ...')
    with manifest.stage(name, run.settings(name)) as entry:
      entry |= STAGES[name](run, manifest.content)
    say(f'{name}: {entry["seconds"]:.0f} s')
    processes.barrier(name)


@contextlib.contextmanager
def loaded_models(run: Run) -> Iterator[dict[str, LM | Remote]]:
  """M_θ, and M_critique and M_revise where they are others; loaded once each."""
  section = run.config['model']
  mesh = local_mesh(run)
  names = {
    name: section[name]
    for name in ('base', 'critique', 'revision')
    if section[name] and (name == 'base' or section[name] != section['base'])
  }

  def load(path: str) -> LM:
    return dataclasses.replace(models.load(model_path(path), section['dtype'], mesh), name=path)

  with contextlib.ExitStack() as open_remotes:
    served = {}
    for name, settings in run.remotes.items():
      served[name] = Remote(settings)
      open_remotes.callback(served[name].close)
    loaded = {path: load(path) for path in set(names.values())}
    yield {name: loaded[path] for name, path in names.items()} | served


def prepare_job(run: Run, loaded: dict[str, LM | Remote], harmful, helpful) -> jobs.Job:
  """The chains of harmful prompts and answers to helpful ones by the loaded models."""
  seed = run.config['seed']
  return jobs.prepare(loaded, harmful, helpful, run.constitution, run.feedback, run.sampling, seed)


def _sample(run: Run, job: jobs.Job, folder: pathlib.Path, name: str) -> dict[str, Any]:
  """Runs a job's chains into a dataset."""
  journal = Journal(run.journal or run.workdir / 'journal', jax.process_index())
  with Progress(name) as progress:
    work = lambda: generate.generate_shards(job, folder, journal, run.engine, progress)  # noqa: E731
    counts = processes.run_on_all_processes(f'sample {folder}', work)
  journal.close()
  counts = _over_processes(counts) | {'engine': run.config['engine']}
  if jax.process_index() == 0:
    if counts['sampled_rows']:
      print(describe(counts), flush=True)
    generate.finish_dataset(job, folder)
  processes.barrier(f'finished {folder}')
  return counts


def _over_processes(counts: dict[str, float]) -> dict[str, float]:
  """What all processes counted: sums, but the longest time and what is the same for each."""
  if jax.process_count() == 1:
    return counts
  table = multihost_utils.process_allgather(np.array(list(counts.values()), np.float64))
  kept = ('rows', 'seconds', 'slots', 'most_slots', 'occupancy')
  totals = np.where([name in kept for name in counts], table.max(0), table.sum(0)).tolist()
  return {name: type(count)(t) for (name, count), t in zip(counts.items(), totals, strict=True)}


def browsable(row: dict[str, Any], scorer: Scorer | None) -> dict[str, Any]:
  """A row of D_CAI as the report shows it."""
  shown = {k: row[k] for k in ('id', 'prompt', 'initial')}
  shown['rounds'] = [
    step | {'critique': step['critique'] if step['critique']['finish_reason'] else None}
    for step in row['rounds']
  ]
  if scorer is not None:
    responses = [row['initial'], *(step['revision'] for step in row['rounds'])]
    texts = [response['text'] for response in responses]
    verdicts = scorer([row['prompt']] * len(texts), texts)
    shown['violations'] = [sorted(verdict.violations) for verdict in verdicts]
  return shown
