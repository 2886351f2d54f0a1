"""The rater of a run's variant: what it is, how it is loaded, and whether it can be."""

from collections.abc import Mapping
from typing import Any

from cai_jax.feedback.chain import RaterName
from cai_jax.feedback.score import RaterSource
from cai_jax.feedback.variants import VARIANTS
from cai_jax.model.lm import LM
from cai_jax.pipeline.contents import model_contents
from cai_jax.pipeline.models import model_loader
from cai_jax.pipeline.run import Run
from cai_jax.runtime.errors import UserError
from cai_jax.sampling.remote import Remote
from cai_jax.scoring.loader import Inspected
from cai_jax.scoring.raters import RATERS


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
  # M_aligned and baselines have a job of their own, in which 'base' is another model.
  loaded = {model.name: model for model in models.values() if isinstance(model, LM)}
  loader = model_loader(run, loaded=loaded)
  identity = [*name, _contents(run, name), sorted(run.plugins.values())]
  return RaterSource(identity, lambda: RATERS[name.kind](loader, name.model, name.label))


def check_rater(run: Run) -> None:
  """Check that the rater of the run's variant can be loaded, without loading weights.

  Args:
    run: the run.

  Raises:
    UserError: if it cannot.
  """
  name = find_rater(run)
  if name is not None:
    _find_checkpoint(run, name)


def _find_checkpoint(run: Run, name: RaterName) -> str:
  """Return the folder or hub name of a rater's model; '' if it has none."""
  try:
    RATERS[name.kind](model_loader(run, inspect_only=True), name.model, name.label)
  except Inspected as found:
    return found.path
  except UserError as error:
    raise UserError(f'feedback.options: scorer={name.kind!r}: {error}') from error
  return ''


def _contents(run: Run, name: RaterName) -> Any:
  """Return digests of a rater's checkpoint; {} if it has none."""
  path = _find_checkpoint(run, name)
  return model_contents(path) if path else {}
