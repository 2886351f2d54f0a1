"""The rater of a run's variant, if it is the judge or guard model that a server holds."""

from typing import NamedTuple

from cai_jax.feedback.chain import RaterName
from cai_jax.feedback.variants import VARIANTS
from cai_jax.pipeline.sections import RunConfig
from cai_jax.runtime.errors import UserError
from cai_jax.scoring.judge_server import SERVED
from cai_jax.scoring.served_raters import SERVED_RATERS, ServedRater, Service


class FoundRater(NamedTuple):
  """A served rater.

  Attributes:
    name: what the variant says of it.
    kind: how it is checked and loaded.
    service: the server, and how it is asked.
  """

  name: RaterName
  kind: ServedRater
  service: Service


def find_served_rater(config: RunConfig) -> FoundRater | None:
  """Return the served rater of a run's variant; None if it has none, or one in memory.

  Args:
    config: the settings of the run.

  Raises:
    UserError: if the kind cannot be served, or the evaluation has no server for it.
  """
  name = VARIANTS[config.feedback.variant].rater(config.feedback.variant_options)
  if name is None or name.model != SERVED:
    return None
  try:
    kind = SERVED_RATERS[name.kind]
    kind.check_label(name.label)
  except UserError as error:
    raise UserError(
      f'feedback.options: scorer={name.kind!r} with scorer_model={SERVED!r}: {error}'
    ) from error
  server = getattr(config.evaluation, f'{kind.role}_remote')
  if server is None:
    raise UserError(
      f'feedback.options: scorer={name.kind!r} with scorer_model={SERVED!r} needs a server. Give '
      f'evaluation.{kind.role}_remote.url and .model, or name a checkpoint.'
    )
  return FoundRater(name, kind, Service(server, config.evaluation.judge_reasoning, config.seed))


def check_served_guard(config: RunConfig) -> None:
  """Check that a served guard rates responses or candidates, and that a served rater has a server.

  Args:
    config: the settings of the run.

  Raises:
    UserError: if not.
  """
  rater, evaluation = find_served_rater(config), config.evaluation
  rates_candidates = rater is not None and rater.service.server is evaluation.guard_remote
  if evaluation.guard_remote and not evaluation.served_guards and not rates_candidates:
    raise UserError(
      'evaluation.guard_remote.url is set, but nothing uses it. Name the guard in '
      f'evaluation.guards with {SERVED!r} in evaluation.guard_models, or let it rate candidates '
      f"with scorer='guard' and scorer_model={SERVED!r} in feedback.options."
    )
