"""Stage `generate`: sample D_CAI, and count the defects of its revisions."""

from collections.abc import Mapping
from typing import Any

from cai_jax.data import d_cai, preferences, quality, quality_summary
from cai_jax.feedback import job as jobs
from cai_jax.pipeline.chains import prepare_job, sample_dataset
from cai_jax.pipeline.models import open_models
from cai_jax.pipeline.published_quality import summarize_published
from cai_jax.pipeline.run import Run
from cai_jax.runtime import processes
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import write_json
from cai_jax.runtime.terminal import say


def generate_d_cai(run: Run, manifest: Mapping[str, Any]) -> dict[str, Any]:
  """Write `d_cai/`, `preferences.jsonl` and `quality.json`.

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
  with open_models(run) as models:
    if run.prompts['eval_harmful']:  # finds a held-out prompt that is too long before sampling
      prepare_job(run, models, run.prompts['eval_harmful'], run.prompts['eval_helpful'])
    samples = run.config.feedback.helpful_samples
    helpful = jobs.repeat_prompts(run.prompts['helpful'], samples)
    job = prepare_job(run, models, run.prompts['harmful'], helpful)
    counts = sample_dataset(run, job, run.workdir / 'd_cai', 'generate')
  pairs = processes.run_on_process_0('write preferences', lambda: _write_preferences(run))
  processes.run_on_process_0('keep feedback.max_rate', lambda: _check_quality(run))
  return {
    'rows_in': counts.pop('rows'),
    'tokens': counts.pop('sampled_tokens'),
    **counts,
    'preferences': pairs,
    'd_cai': d_cai.content_digest(run.workdir / 'd_cai'),
  }


def references(run: Run) -> quality.References:
  """Return the texts that a revision may have copied: requests and demonstrations."""
  requests = {p.id: (p.critique_request, p.revision_request) for p in run.constitution.principles}
  return quality.build_references(requests, run.constitution.demonstrations)


def _write_preferences(run: Run) -> dict[str, int]:
  path, rows = run.workdir / 'preferences.jsonl', d_cai.read_rows(run.workdir / 'd_cai')
  return preferences.write_preferences(path, rows)


def _check_quality(run: Run) -> None:
  """Write `quality.json`, print its table and apply the limits of `feedback.max_rate`."""
  folder = run.workdir / 'd_cai'
  summary, published = quality_summary.summarize(d_cai.read_rows(folder), references(run)), None
  if path := run.config.report.published:
    published = summarize_published(path)
  content = {'d_cai': summary} | ({'published': published} if published else {})
  write_json(run.workdir / 'quality.json', content)
  say(quality_summary.format_table(summary, published))
  exceeded = quality_summary.exceeded_limits(summary, run.config.feedback.max_rate)
  if exceeded:
    raise UserError(
      f'feedback.max_rate is exceeded ({"; ".join(exceeded)}). All rows are kept in {folder}, and '
      'quality.json has the rates of each round. To continue with these rows, raise the limit and '
      'start again in the same workdir; to sample other rows, use another workdir.'
    )
