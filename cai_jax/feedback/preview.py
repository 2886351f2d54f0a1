"""The contexts of a chain as the models will see them, before anything is sampled."""

from collections.abc import Iterator
from typing import NamedTuple

from cai_jax.data.prompts import Prompt
from cai_jax.dialogue import ChatDialogue
from cai_jax.feedback.chain import Stage
from cai_jax.feedback.job import Job
from cai_jax.feedback.stage import THOUGHTS
from cai_jax.sampling.types import Completion, Turn

PLACEHOLDER = '⟨reply: {}⟩'  # stands where the reply of a turn will be sampled


class Context(NamedTuple):
  """What a model sees before it samples a turn.

  Attributes:
    prompt: the prompt of the chain.
    kind: 'harmful' or 'helpful'.
    turn: the turn, with its token ids and sampling settings.
    text: the decoded token ids; control tokens are marked, see `Dialogue.show`.
  """

  prompt: Prompt
  kind: str
  turn: Turn
  text: str


def preview_chain(job: Job, prompt: Prompt, kind: str) -> Iterator[Context]:
  """Yield the context of each turn of a prompt's chain, with a placeholder for each reply.

  The chain and its principles are those that `generate` will run. A placeholder is encoded as a
  reply that the model itself ended, so a context differs from the real one only in its replies. Of
  candidates, the first is kept, and of labels, the first is chosen.

  Args:
    job: the job.
    prompt: one of its prompts.
    kind: 'harmful' or 'helpful'.

  Raises:
    UserError: if a context cannot be rendered.
  """
  # Stages of one model have equal dialogues.
  stages: dict[str, Stage] = {stage.model: stage for stage in job.stages.by_name().values()}
  chain, completion, previous = job.placeholder_chain(prompt, kind), None, ''
  while True:
    try:
      turn = chain.send(completion)  # type: ignore[arg-type]  # None starts it
    except StopIteration:
      return
    dialogue = stages[turn.model].dialogue
    yield Context(prompt, kind, turn, dialogue.show(turn.context))
    text = PLACEHOLDER.format(turn.name.replace('_', ' '))
    if isinstance(dialogue, ChatDialogue):
      tokens = dialogue.reply(text)
    elif turn.name.endswith(THOUGHTS):
      whole = dialogue.reply('x', thoughts=text)
      tokens = whole[len(dialogue.open_thoughts()) : whole.index(dialogue.end_of_thought) + 1]
    elif previous == turn.name + THOUGHTS:
      whole = dialogue.reply(text, thoughts='x')
      tokens = whole[whole.index(dialogue.end_of_thought) + 1 :]
    else:
      tokens = dialogue.reply(text)
    previous = turn.name
    completion = Completion(tokens, text, [0.0] * len(tokens), 'stop')
