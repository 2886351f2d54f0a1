"""Which stages of the chain each served model samples."""

import dataclasses
from typing import NamedTuple

from cai_jax.feedback.variants import VARIANTS
from cai_jax.pipeline.sections import RunConfig
from cai_jax.sampling.types import SamplingConfig


class ServedStage(NamedTuple):
  """A stage that a server samples.

  Attributes:
    sampling: its settings.
    chooses: whether the model chooses between labels.
  """

  sampling: SamplingConfig
  chooses: bool


def served_stages(config: RunConfig) -> dict[str, dict[str, ServedStage]]:
  """Return the stages that servers sample, by role of the model and by name of the stage.

  These are 'initial', 'critique' and 'revision', and what the variant adds and uses with its
  options. M_critique and M_revision default to M_θ, whose role is 'base'.

  Args:
    config: the settings of the run.
  """
  name, stages = config.feedback.variant, VARIANTS[config.feedback.variant].stages
  names = [field.name for field in dataclasses.fields(config.sampling)]
  names += sorted({stage for _, stage in config.feedback.plan()} - {*names})
  served: dict[str, dict[str, ServedStage]] = {}
  for stage in names:
    added = stages.get(stage)
    role = added.parent if added else stage
    if not (getattr(config.remote, role, None) or getattr(config.model, role, '')):
      role = 'base'
    if getattr(config.remote, role, None) is not None:
      sampling, chooses = config.sampling.of_stage(stage, name), added is not None and added.chooses
      served.setdefault(role, {})[stage] = ServedStage(sampling, chooses)
  return served
