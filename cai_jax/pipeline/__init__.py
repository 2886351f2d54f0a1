"""From a config to results: a run, its checks and its stages."""

from cai_jax.pipeline.chains import browsable, prepare_job
from cai_jax.pipeline.checks import check_run
from cai_jax.pipeline.engine_sizes import resolve_engine
from cai_jax.pipeline.models import load_measures, load_scorer, model_loader, open_models
from cai_jax.pipeline.run import Run, build
from cai_jax.pipeline.stages import STAGES, default_stages, run_stages

__all__ = [
  'STAGES',
  'Run',
  'browsable',
  'build',
  'check_run',
  'default_stages',
  'load_measures',
  'load_scorer',
  'model_loader',
  'open_models',
  'prepare_job',
  'resolve_engine',
  'run_stages',
]
