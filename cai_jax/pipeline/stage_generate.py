"""Stage `generate`: sample D_CAI, and count the defects of its revisions."""

import time
from collections.abc import Mapping
from typing import Any

from cai_jax.data import d_cai, preferences
from cai_jax.feedback import job as jobs
from cai_jax.model.lm import LM
from cai_jax.pipeline.chains import merge_counts, prepare_job, sample_dataset, sample_shards
from cai_jax.pipeline.models import open_models
from cai_jax.pipeline.quality_gate import keep_limits, measure_quality, score_topics
from cai_jax.pipeline.run import Run
from cai_jax.runtime import processes
from cai_jax.runtime.progress import Progress
from cai_jax.runtime.replicas import Replica, find_replica, run_on_first_replica
from cai_jax.sampling.remote import Remote


def generate_d_cai(run: Run, manifest: Mapping[str, Any]) -> dict[str, Any]:
  """Write `d_cai/`, `preferences.jsonl`, `quality.json` and `quality_rows.jsonl`.

  Args:
    run: the run.
    manifest: not used.

  Returns:
    Counts and speeds for the manifest.

  Raises:
    UserError: if the chains cannot be sampled, or a rate of defects exceeds its limit in
      `feedback.max_rate`.
  """
  del manifest
  started = time.perf_counter()
  with open_models(run) as models:
    job = _prepare(run, models)
    counts = sample_dataset(run, job, run.workdir / 'd_cai', 'generate', started)
    _measure_defects(run, models, find_replica(job.sampled_models.values()))
  pairs = processes.run_on_process_0('write preferences', lambda: _write_preferences(run))
  processes.run_on_process_0('keep feedback.max_rate', lambda: keep_limits(run))
  return {
    'rows_in': counts.pop('rows'),
    'tokens': counts.pop('sampled_tokens'),
    **counts,
    'near_duplicates_left_out': dict(run.near_duplicates),
    'repeats_left_out': dict(run.repeats),
    'preferences': pairs,
    'd_cai': d_cai.content_digest(run.workdir / 'd_cai'),
  }


def sample_share(run: Run) -> dict[str, Any]:
  """Write the shards of D_CAI that belong to this launch, which is a replica after the first.

  Args:
    run: the run.

  Returns:
    Counts and speeds over all processes of this launch.

  Raises:
    UserError: if the chains cannot be sampled.
  """
  with open_models(run) as models, Progress('generate') as progress:
    job = _prepare(run, models)
    counts = sample_shards(run, job, run.workdir / 'd_cai', 'generate', progress)
  counts.pop('expert_usage')
  return merge_counts(counts)


def _prepare(run: Run, models: Mapping[str, LM | Remote]) -> jobs.Job:
  """Return the checked job of the stage."""
  if run.prompts['eval_harmful']:  # finds a held-out prompt that is too long before sampling
    prepare_job(run, models, run.prompts['eval_harmful'], run.prompts['eval_helpful'])
  samples = run.config.feedback.helpful_samples
  helpful = jobs.repeat_prompts(run.prompts['helpful'], samples)
  return prepare_job(run, models, run.prompts['harmful'], helpful)


def _measure_defects(run: Run, models: Mapping[str, LM | Remote], replica: Replica) -> None:
  """Count the defects of the revisions, some of which the first replica of M_θ finds."""

  def measure() -> None:
    scores = score_topics(run, models)
    if replica.leads:
      measure_quality(run, scores)

  run_on_first_replica('measure the defects', replica, measure)


def _write_preferences(run: Run) -> dict[str, int]:
  path, rows = run.workdir / 'preferences.jsonl', d_cai.read_rows(run.workdir / 'd_cai')
  return preferences.write_preferences(path, rows)
