"""Rates of defects in the samples of Bai et al. (2022), for comparison with a run."""

from typing import Any

from cai_jax.data import quality, quality_summary
from cai_jax.data.published import read_published_samples
from cai_jax.runtime.errors import UserError


def summarize_published(path: str) -> dict[str, Any]:
  """Return the summary of the defects in a file of published samples.

  Args:
    path: a *_SLMADISON.jsonl file of anthropics/ConstitutionalHarmlessnessPaper.

  Returns:
    A summary as `quality_summary.summarize` returns it. It has no rate of truncated texts, because
    the samples do not record why they ended.

  Raises:
    UserError: if the file cannot be read or is not such a file.
  """
  try:
    rows, principles = read_published_samples(path)
  except UserError as error:
    raise UserError(f'report.published: {error}') from error
  summary = quality_summary.summarize(rows, quality.build_references(principles))
  del summary['flags']['truncated']
  return summary
