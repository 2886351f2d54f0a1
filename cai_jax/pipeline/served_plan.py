"""What the served models of a run will be asked and cost at most, before anything is sampled."""

from collections.abc import Iterator, Mapping, Sequence

from cai_jax.feedback.contexts import word_tokens
from cai_jax.feedback.job import Job, repeat_prompts
from cai_jax.model.lm import LM
from cai_jax.pipeline import baselines
from cai_jax.pipeline.chains import prepare_job
from cai_jax.pipeline.models import open_models
from cai_jax.pipeline.run import Run
from cai_jax.sampling.planning import planned_turns
from cai_jax.sampling.remote import Remote
from cai_jax.sampling.remote.costs import format_price

RENDERED = 64  # prompts of each kind whose chains are rendered; the others count as their mean


def describe_served(run: Run, stages: Sequence[str]) -> str:
  """Return a line for each served model: requests, tokens and price, at most; '' without any.

  Replies are taken to be as long as allowed. Turns that a journal already has are not left out, and
  tokens are those of the tokenizer that the config names.

  Args:
    run: the run.
    stages: names of the stages to run.

  Raises:
    UserError: if a chain cannot be rendered, or the variable of an API key is not set.
  """
  if not run.remotes or not {'generate', 'evaluate'} & {*stages}:
    return ''
  counts = {role: [0.0, 0.0, 0.0] for role in run.remotes}  # requests, read and sampled tokens
  with open_models(run, weights=False) as models:
    for job in _jobs(run, models, stages):
      for role, *added in _estimate(job):
        if role in counts:
          counts[role] = [a + b for a, b in zip(counts[role], added, strict=True)]
  lines = []
  for role, (requests, read, sampled) in counts.items():
    remote = run.remotes[role]
    line = (
      f'remote.{role} ({remote.model}): {requests:,.0f} requests with up to about {read:,.0f} '
      f'tokens of contexts and {sampled:,.0f} sampled tokens'
    )
    if remote.has_price:
      line += f', price up to about {format_price(remote.price(read, 0, sampled))}'
    lines.append(line)
  return '\n'.join(lines)


def _jobs(run: Run, models: Mapping[str, LM | Remote], stages: Sequence[str]) -> Iterator[Job]:
  """Yield the jobs of the stages that ask served models."""
  prompts = run.prompts
  if 'generate' in stages:
    helpful = repeat_prompts(prompts['helpful'], run.config.feedback.helpful_samples)
    yield prepare_job(run, models, prompts['harmful'], helpful)
  if 'evaluate' in stages:
    held_out = prompts['eval_harmful'], prompts['eval_helpful']
    yield prepare_job(run, models, *held_out)
    for name in run.config.evaluation.baselines:
      answered = baselines.make_prompts(run, name, [*held_out[0], *held_out[1]])
      yield prepare_job(run, models, [], answered)


def _estimate(job: Job) -> Iterator[tuple[str, float, float, float]]:
  """Yield (role, requests, read tokens, sampled tokens) of turns of the job, which add up."""
  fillers = word_tokens(job.models)
  for kind in ('harmful', 'helpful'):
    prompts = [prompt for prompt, own in job.prompts if own == kind]
    rendered = prompts[:: -(-len(prompts) // RENDERED)] if prompts else []
    for prompt in rendered:
      share = len(prompts) / len(rendered)
      for turn in planned_turns(job.placeholder_chain(prompt, kind), fillers):
        yield turn.model, share, share * len(turn.context), share * turn.sampling.max_tokens
