"""Judges that rate responses by a rubric: a language model in memory, or a served one."""

import contextlib
import os
from collections.abc import Callable, Sequence

from cai_jax.dialogue import Message
from cai_jax.dialogue.format import TemplateOptions
from cai_jax.model.lm import LM
from cai_jax.runtime.errors import UserError
from cai_jax.scoring.answer_form import ask, count_tokens
from cai_jax.scoring.judge_client import JudgeClient
from cai_jax.scoring.judge_server import text_request
from cai_jax.scoring.rubrics.rubric import Asker, Labels, Rubric, build_question, read_labels

LINE_TOKENS = 16  # of each line that a served judge answers

# Maps a rubric, prompts and their responses to the labels of each response. It is None if the
# response is blank, or if the answer does not have the form.
Rater = Callable[[Rubric, Sequence[Sequence[Message]], Sequence[str]], list[Labels | None]]


def local_rater(
  lm: LM,
  journal: str | os.PathLike | None = None,
  template_options: TemplateOptions = (),
  style: str = 'chat',
) -> Rater:
  """Return a rater that asks a language model, whose most likely labels are the answer.

  Args:
    lm: the model.
    journal: folder in which its turns are stored and looked up; None stores none.
    template_options: (name, value) pairs; the model's chat template gets those that it reads.
    style: 'plain' for plain text even with a chat template.

  Returns:
    The rater. It raises UserError if a question does not fit into the model's context.
  """
  asker = Asker(lm.tokenizer, template_options, style)

  def rate_responses(
    rubric: Rubric, prompts: Sequence[Sequence[Message]], responses: Sequence[str]
  ) -> list[Labels | None]:
    questions = _questions(rubric, prompts, responses)
    pieces = {number: asker.prompt(question) for number, question in questions.items()}
    for number, prompt in pieces.items():
      tokens = count_tokens(asker.encoder, prompt, rubric.form)
      if tokens > lm.max_positions:
        raise UserError(
          f'The question of the rubric {rubric.title} about response {number} has {tokens} tokens '
          f'with its answer, but the context of {lm.name} holds {lm.max_positions}. Use a judge '
          'with a longer context, or shorter responses.'
        )
    answers = ask(lm, list(pieces.values()), rubric.form, journal)
    labels: list[Labels | None] = [None] * len(responses)
    for number, answer in zip(pieces, answers, strict=True):
      labels[number] = {name: chosen.label.strip() for name, chosen in answer.choices.items()}
    return labels

  return rate_responses


def remote_rater(client: JudgeClient, reasoning_tokens: int = 0, seed: int = 0) -> Rater:
  """Return a rater that asks a server, which writes the answer as text.

  Args:
    client: asks the judge, with the settings of `JudgeServer.as_text`. Each call of the rater
      closes it at its end.
    reasoning_tokens: most tokens that the judge writes before its answer.
    seed: seed of answers, for a temperature above 0.

  Returns:
    The rater. It raises UserError if the server refuses a question.
  """

  def rate_responses(
    rubric: Rubric, prompts: Sequence[Sequence[Message]], responses: Sequence[str]
  ) -> list[Labels | None]:
    questions = _questions(rubric, prompts, responses)
    tokens = reasoning_tokens + LINE_TOKENS * len(rubric.form)
    bodies = [text_request(client.server, q, tokens, seed) for q in questions.values()]
    with contextlib.closing(client):
      answers = client.answer(bodies)
    labels: list[Labels | None] = [None] * len(responses)
    for number, answer in zip(questions, answers, strict=True):
      labels[number] = read_labels(rubric.form, answer.text)
    return labels

  return rate_responses


def _questions(
  rubric: Rubric, prompts: Sequence[Sequence[Message]], responses: Sequence[str]
) -> dict[int, str]:
  """Return the question about each response that is not blank, by its number."""
  pairs = zip(prompts, responses, strict=True)
  return {
    number: build_question(rubric, messages, response)
    for number, (messages, response) in enumerate(pairs)
    if response.strip()
  }
