"""The check that a model which rates responses can read each prompt with them."""

from collections.abc import Callable, Sequence

from cai_jax.pipeline.prompt_sets import HELD_OUT
from cai_jax.pipeline.run import Run
from cai_jax.runtime.errors import UserError


def check_lengths(
  run: Run,
  context: int,
  responses: int,
  count: Callable[[Sequence[dict[str, str]]], int],
  turns: Sequence[str] = ('initial',),
  prompt_sets: Sequence[str] = HELD_OUT,
) -> None:
  """Check that a model's context holds each prompt with its responses.

  Args:
    run: the run.
    context: tokens that the model reads at most.
    responses: number of responses that it reads together.
    count: returns the number of tokens of a prompt's messages without the responses.
    turns: the turns whose texts are responses.
    prompt_sets: names of the sets of prompts.

  Raises:
    UserError: if it does not; the message names the prompt.
  """
  answer, turn = max((getattr(run.config.sampling, turn).max_tokens, turn) for turn in turns)
  for set_name in prompt_sets:
    for prompt in run.prompts[set_name]:
      tokens = count(prompt.messages)
      if tokens + responses * answer > context:
        raise UserError(
          f'Prompt {prompt.id!r} of prompts.{set_name} has {tokens} tokens, and {responses} '
          f'response(s) up to sampling.{turn}.max_tokens={answer} each, but its context holds '
          f'{context}. Shorten the prompt or the responses, or use a model with a longer context.'
        )
