"""The rater of a run's variant: what it is, how it is loaded, and whether it can be."""

from collections.abc import Mapping
from typing import Any

from cai_jax.feedback.chain import RaterName
from cai_jax.feedback.score import RaterSource
from cai_jax.feedback.variants import VARIANTS
from cai_jax.model.lm import LM
from cai_jax.model.quantized.kernel import FULL
from cai_jax.pipeline.contents import model_contents
from cai_jax.pipeline.lengths import check_lengths
from cai_jax.pipeline.models import model_loader, open_client
from cai_jax.pipeline.run import Run
from cai_jax.pipeline.served_raters import FoundRater, find_served_rater
from cai_jax.runtime.errors import UserError
from cai_jax.sampling.remote import Remote
from cai_jax.scoring.judge import JUDGES
from cai_jax.scoring.loader import ModelLoader
from cai_jax.scoring.raters import RATERS, Inspection, inspect_rater


def find_rater(run: Run) -> RaterName | None:
  """Return what rates the candidates of the run's variant, or None if it rates none."""
  feedback = run.config.feedback
  return VARIANTS[feedback.variant].rater(feedback.variant_options)


def make_rater(run: Run, models: Mapping[str, LM | Remote]) -> RaterSource | None:
  """Return the rater of the run's variant, to be loaded when it is needed; None if it has none.

  Args:
    run: the run.
    models: the models that sample, by role. A rater that is one of them is not loaded again.
  """
  name = find_rater(run)
  if name is None:
    return None
  if served := find_served_rater(run.config):
    return _make_served(run, served)
  # M_aligned and baselines have a job of their own, in which 'base' is another model.
  loaded = {model.name: model for model in models.values() if isinstance(model, LM)}
  loader = model_loader(run, loaded=loaded)
  return RaterSource(
    _identity(run, name, loader), lambda: RATERS[name.kind](loader, name.model, name.label)
  )


def check_rater(run: Run) -> None:
  """Check that the rater of the run's variant can be loaded, and reads each prompt with candidates.

  Weights are not loaded.

  Args:
    run: the run.

  Raises:
    UserError: if it cannot be loaded, or its context is too short.
  """
  name = find_rater(run)
  if name is None or find_served_rater(run.config):  # a server is asked, see `server_checks`
    return
  found = _inspect(run, name)
  if not found.max_positions:
    return
  question = name.question or 'x'
  try:
    check_lengths(
      run,
      found.max_positions,
      found.candidates,
      lambda messages: found.count_tokens(messages, question),
      turns=('revision',),
      prompt_sets=('harmful', 'eval_harmful'),
    )
  except UserError as error:
    raise UserError(f'feedback.options: scorer_model={name.model!r}: {error}') from error


def judge_identity(name: str, loader: ModelLoader) -> list[Any]:
  """Return what a judge may read besides its questions, as JSON types.

  Judges of this package load no model. Any other judge may load every model that the loader names.

  Args:
    name: a name in `JUDGES`.
    loader: the loader of the judge.

  Raises:
    UserError: if there is no such model.
  """
  if JUDGES[name].__module__.startswith('cai_jax.'):
    return []
  contents = {alias: model_contents(path) for alias, path in loader.aliases.items()}
  return [contents, _reading(loader)]


def _make_served(run: Run, found: FoundRater) -> RaterSource:
  """Return a served rater, to be connected when it is needed."""
  name, service = found.name, found.service
  return RaterSource(
    [name.kind, name.label, service.identity(), sorted(run.plugins.values())],
    lambda: found.kind.load(service, name.label, open_client(run, service.server, found.kind.role)),
  )


def _inspect(run: Run, name: RaterName) -> Inspection:
  """Return what is known of a rater without its weights."""
  try:
    loader = model_loader(run, inspect_only=True)
    return inspect_rater(loader, name.kind, name.model, name.label)
  except UserError as error:
    raise UserError(f'feedback.options: scorer={name.kind!r}: {error}') from error


def _identity(run: Run, name: RaterName, loader: ModelLoader) -> list[Any]:
  """Return everything that determines a rater's ratings, as JSON types."""
  path = _inspect(run, name).path
  contents = model_contents(path) if path else {}
  found = [name.kind, name.model, name.label, contents, _reading(loader)]
  judge = judge_identity(name.model, loader) if name.model in JUDGES else []
  return [*found, sorted(run.plugins.values()), *judge]


def _reading(loader: ModelLoader) -> list[Any]:
  """Return how a loader's models are loaded and read, as JSON types."""
  options = [list(pair) for pair in loader.template_options]
  reading = [loader.dtype, loader.style, options, loader.long_context]
  return reading + ([] if loader.weights == FULL else [loader.weights])
