"""`--dry_run`: what a run's prompts can show, before anything is sampled."""

from cai_jax.evaluation.power import describe_power
from cai_jax.pipeline import prompt_sets
from cai_jax.pipeline.run import Run


def describe_plan(run: Run) -> str:
  """Return a text with the number of prompts and the smallest difference that they can show.

  Args:
    run: the run.
  """
  lines = [f'prompts.{name}: {len(run.prompts[name]):,}' for name in prompt_sets.NAMES]
  lines += [
    f'prompts.{name}: {describe_power(len(run.prompts[name]))}'
    for name in prompt_sets.HELD_OUT
    if run.prompts[name]
  ]
  return '\n'.join(lines)
