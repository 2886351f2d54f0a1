"""Stage `label`: a feedback model compares responses (Bai et al. 2022, section 4.1)."""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from cai_jax.constitution import Constitution, ConstitutionConfig, load_constitution
from cai_jax.feedback.comparisons.config import LabelConfig
from cai_jax.feedback.comparisons.job import FEEDBACK, RESPONSES, LabelJob, check_label
from cai_jax.feedback.comparisons.judging import journaled_judge
from cai_jax.feedback.comparisons.labelling import label
from cai_jax.feedback.contexts import word_tokens
from cai_jax.model import lm as models
from cai_jax.model.lm import LM
from cai_jax.pipeline.costs import shard_writer, write_test_costs
from cai_jax.pipeline.models import model_loader, sampling_mesh
from cai_jax.pipeline.pair_sources import LABELS_FILE
from cai_jax.pipeline.raters import judge_identity
from cai_jax.pipeline.run import Run
from cai_jax.runtime import processes
from cai_jax.runtime.digests import digest_files
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.progress import Progress
from cai_jax.runtime.replicas import find_replica
from cai_jax.runtime.terminal import say
from cai_jax.sampling.journal import Journal
from cai_jax.sampling.remote import Remote
from cai_jax.sampling.types import Chain
from cai_jax.scoring.judge import JUDGES

# Settings of the questions to a language model.
_QUESTIONS = ('verdict', 'thoughts', 'samples', 'temperature', 'clamp', 'demonstrations', 'style')


def label_comparisons(run: Run, manifest: Mapping[str, Any]) -> dict[str, Any]:
  """Write `labels/comparisons.jsonl` and `labels/summary.json`.

  Args:
    run: the run.
    manifest: not used.

  Returns:
    Counts, speeds, and what the labels are worth, for the manifest.

  Raises:
    UserError: if there is nothing to compare, or a model cannot be asked.
  """
  del manifest
  folder = (run.workdir / LABELS_FILE).parent
  with open_label_models(run) as opened:
    replica = find_replica(opened.values())
    journal = Journal(run.journal or run.workdir / 'journal', replica.index, replica)
    try:
      job = _prepare(run, opened, journal)
      with Progress('label') as progress:
        write = shard_writer(run, 'label')
        summary = label(
          job, folder, journal, run.config.engine, progress, lambda costs: write(0, costs)
        )
    finally:
      journal.close()
      if journal.num_faults and replica.leads:
        say(journal.describe_faults())
  if jax.process_index() == 0:
    say(_describe(summary))
  counts = summary.pop('sampling')
  return {
    'rows_in': summary.get('prompts', 0),
    'rows_kept': summary.get('pairs', 0),
    **counts,
    **summary,
    'comparisons_digest': _digest(run.workdir),
  }


def check_labelling(run: Run) -> None:
  """Check that the labels can be made, without weights, before the first stage.

  Models that are yet to be trained are checked by those that they are trained from.

  Args:
    run: the run.

  Raises:
    UserError: if a file or a model cannot be read, or a question does not fit into a context.
  """
  _check_effects(run.config.label)
  with open_label_models(run, weights=False) as opened:
    _prepare(run, opened)


def _check_effects(config: LabelConfig) -> None:
  """Check that no setting of the questions is set for a judge, which reads no questions."""
  if config.remote is not None or config.model not in JUDGES:
    return
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if field.name in _QUESTIONS and value != field.default:
      raise UserError(
        f'label.{field.name}={value!r} has no effect, because label.model={config.model!r} is a '
        f'judge that is asked no question. Leave label.{field.name} out.'
      )


def check_label_server(run: Run) -> None:
  """Check that the server of the feedback model answers requests like those of the stage.

  Args:
    run: a run with `label.remote`.

  Raises:
    UserError: if the check fails.
  """
  with open_label_models(run, weights=False) as opened:
    job = _prepare(run, opened)
    for name, turns in job.test_turns().items():
      model = job.models[name]
      if isinstance(model, Remote):
        (stage,) = (stage for stage in job.stages.values() if stage.model == name)
        try:
          model.check(turns, (stage.dialogue.stop_token_ids, stage.dialogue.stop_strings))
        except UserError as error:
          message = str(error).removeprefix('remote: ')
          raise UserError(f'label.remote: {message}') from error
        write_test_costs(run, FEEDBACK, model.test_usage)


@contextlib.contextmanager
def planned_chains(run: Run) -> Iterator[tuple[list[Callable[[], Chain]], dict[str, int]]]:
  """Yield what the feedback model will be asked, without weights.

  Args:
    run: the run.

  Yields:
    For each prompt a function that returns its chain for placeholder replies; and for each model
    the token of which placeholder replies consist.
  """
  with open_label_models(run, weights=False) as opened:
    job = _prepare(run, opened)
    yield (
      [functools.partial(job.placeholder_chain, item, job.principles(item)) for item in job.items],
      word_tokens(job.models),
    )


@contextlib.contextmanager
def open_label_models(run: Run, weights: bool = True) -> Iterator[dict[str, LM | Remote]]:
  """Yield the models that sample and that compare responses, by role.

  Args:
    run: the run.
    weights: whether to load parameters. Without them, a model can only render contexts.

  Yields:
    'responses' and 'feedback', as far as the settings need them.
  """
  config = run.config.label
  names = {}
  if config.responses:
    names[RESPONSES] = config.sampled_by
  if config.remote is None and config.model not in JUDGES:
    names[FEEDBACK] = config.model
  loaded: dict[str, LM] = {}
  with contextlib.ExitStack() as stack:
    opened: dict[str, LM | Remote] = {}
    if config.remote is not None:
      opened[FEEDBACK] = stack.enter_context(contextlib.closing(Remote(config.remote)))
    for role, name in names.items():
      if name not in loaded:
        field = 'sampled_by' if role == RESPONSES else 'model'
        loaded[name] = _load(run, name, weights, f'label.{field}')
      opened[role] = loaded[name]
    yield opened


def _load(run: Run, name: str, weights: bool, field: str) -> LM:
  """Return a model, or its description without weights."""
  section = run.config.model
  path = run.preference_start(name) if weights else run.stand_in(name)
  if not path:
    raise UserError(f'{field}={name!r}: a server holds this model. Name a checkpoint.')
  load = models.describe
  if weights:
    load = functools.partial(models.load, weights=section.weights)
  try:
    lm = load(path, section.dtype, sampling_mesh(run), long_context=section.long_context)
  except UserError as error:
    raise UserError(f'{field}={name!r}: {error}') from error
  return dataclasses.replace(lm, name=name)


def _prepare(
  run: Run, opened: Mapping[str, LM | Remote], journal: Journal | None = None
) -> LabelJob:
  """Return the checked job of the run. With a journal, a judge is asked nothing twice."""
  config = run.config.label
  loader = model_loader(run)
  judge = JUDGES[config.model](loader) if config.model in JUDGES else None
  if judge is not None and journal is not None:
    plugins = sorted(run.plugins.values())
    identity = [config.model, plugins, *judge_identity(config.model, loader)]
    judge = journaled_judge(judge, identity, journal)
  return check_label(
    opened,
    run.prompts['harmful'],
    _load_constitution(run),
    config,
    run.config.feedback,
    run.config.sampling.initial,
    run.config.seed,
    judge,
  )


def _load_constitution(run: Run) -> Constitution:
  """Return the constitution that the feedback model reads."""
  path = run.config.label.constitution
  return load_constitution(ConstitutionConfig(path=path)) if path else run.constitution


def _digest(workdir: pathlib.Path) -> str:
  return (
    processes.run_on_process_0('digest the labels', lambda: digest_files(workdir, [LABELS_FILE]))
    or ''
  )


def _describe(summary: Mapping[str, Any]) -> str:
  """Return a line on what the labels are worth."""
  known = [
    f'right on {100 * result["accuracy"]:.1f} % of {result["count"]} labelled pairs of {source}'
    for source, result in summary.get('accuracy', {}).items()
  ]
  worth = '; '.join(known) or 'no labelled pairs show whether they are right (label.labelled)'
  return (
    f'label: {summary.get("pairs", 0)} comparisons of {summary.get("prompts", 0)} prompts; {worth}'
  )
