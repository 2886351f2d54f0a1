"""From a config to results: a run, its checks, and its stages."""

from cai_jax.pipeline.checks import check
from cai_jax.pipeline.run import TINY, Run, build, load_scorer, model_path
from cai_jax.pipeline.stages import (
  STAGES,
  browsable,
  load_measures,
  loaded_models,
  prepare_job,
  run_stages,
)

__all__ = [
  'STAGES',
  'TINY',
  'Run',
  'browsable',
  'build',
  'check',
  'load_scorer',
  'loaded_models',
  'load_measures',
  'model_path',
  'prepare_job',
  'run_stages',
]
