"""Stage `generate`: sample D_CAI, and count the defects of its revisions."""

import time
from collections.abc import Mapping
from typing import Any

from cai_jax.data import d_cai, preferences
from cai_jax.feedback import job as jobs
from cai_jax.pipeline.chains import prepare_job, sample_dataset
from cai_jax.pipeline.models import open_models
from cai_jax.pipeline.quality_gate import keep_limits, measure_quality, score_topics
from cai_jax.pipeline.run import Run
from cai_jax.runtime import processes


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
    if run.prompts['eval_harmful']:  # finds a held-out prompt that is too long before sampling
      prepare_job(run, models, run.prompts['eval_harmful'], run.prompts['eval_helpful'])
    samples = run.config.feedback.helpful_samples
    helpful = jobs.repeat_prompts(run.prompts['helpful'], samples)
    job = prepare_job(run, models, run.prompts['harmful'], helpful)
    counts = sample_dataset(run, job, run.workdir / 'd_cai', 'generate', started)
    processes.run_on_process_0(
      'measure the defects', lambda: measure_quality(run, score_topics(run, models))
    )
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


def _write_preferences(run: Run) -> dict[str, int]:
  path, rows = run.workdir / 'preferences.jsonl', d_cai.read_rows(run.workdir / 'd_cai')
  return preferences.write_preferences(path, rows)
