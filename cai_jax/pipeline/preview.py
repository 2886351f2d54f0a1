"""`--preview`: print what the models will see, without loading weights or sampling anything."""

from collections.abc import Callable, Mapping

from cai_jax.feedback import job as jobs
from cai_jax.feedback.preview import Context, preview_chain
from cai_jax.model.lm import LM
from cai_jax.pipeline.chains import prepare_job
from cai_jax.pipeline.models import open_models
from cai_jax.pipeline.run import Run
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.terminal import say
from cai_jax.sampling.remote import Remote

_LEGEND = """\
Nothing has been sampled. Control tokens stand between ⟦ and ⟧; the same spelling without these
brackets is ordinary text. ⟨reply: ...⟩ stands where a reply will be sampled."""


def preview_run(run: Run, count: int, log: Callable[[str], None] = say) -> None:
  """Print the contexts of the first prompts in each turn, as the models will see them.

  The contexts are those of the generate stage: of all turns of the first harmful prompts, and of
  the answers to the first helpful prompts.

  Args:
    run: the run. No file of it is written.
    count: number of prompts of each kind.
    log: called with each text.

  Raises:
    UserError: if there is no prompt, or a chain cannot be sampled.
  """
  harmful, helpful = run.prompts['harmful'], run.prompts['helpful']
  if not harmful:
    raise UserError('prompts.harmful.source is empty, so there is no chain to preview. Give some.')
  for note in run.notes:
    log(note)
  with open_models(run, weights=False) as models:
    # A chain may use the next harmful prompt, so the job has one more than are shown.
    job = prepare_job(run, models, harmful[: count + 1], helpful[:count])
    shown = [
      *((prompt, 'harmful') for prompt in harmful[:count]),
      *((prompt, 'helpful') for prompt in helpful[:count]),
    ]
    turns: dict[str, list[Context]] = {}
    for prompt, kind in shown:
      for context in preview_chain(job, prompt, kind):
        turns.setdefault(context.turn.name, []).append(context)
    log(_LEGEND)
    for contexts in turns.values():
      for context in contexts:
        log(_describe(job, models, context))
    if note := job.rewritten_history():
      log(f'\n{note}')


def _describe(job: jobs.Job, models: Mapping[str, LM | Remote], context: Context) -> str:
  """Return a context under a line that says which turn it is and how its reply is sampled."""
  turn = context.turn
  settings = [f'{name}={value}' for name, value in vars(turn.sampling).items() if value != ()]
  title = f'{turn.name.replace("_", " ")}, {context.kind} prompt {context.prompt.id}'
  size = f'{len(turn.context)} tokens of {models[turn.model].name}, placeholders included'
  return f'\n==== {title}: {size}; {", ".join(settings)} ====\n{context.text}'
