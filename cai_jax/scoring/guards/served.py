"""Guard models behind an OpenAI-compatible server, which applies the guard's chat template.

The server is asked for a reply to the conversation with the response at its end, as vLLM and SGLang
serve guard models. Policies go to the template as `chat_template_kwargs`, which both servers read.
With log-probabilities, the probability of a label is that of the listed tokens that begin it, at
the place where the answer has its label. Without, the verdict is the label in the text.
"""

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cai_jax.dialogue import Message
from cai_jax.runtime.errors import UserError, show
from cai_jax.sampling.remote.connection import Connection
from cai_jax.sampling.types import Usage
from cai_jax.scoring.answer_form import Answer, Chosen
from cai_jax.scoring.guards.guard import Guard, Rating, guard_turns, summarize
from cai_jax.scoring.judge_answers import JudgeAnswer
from cai_jax.scoring.judge_client import JudgeClient, ask_server
from cai_jax.scoring.judge_server import JudgeServer, messages_request


def rate_by(
  guard: Guard,
  client: JudgeClient,
  prompts: Sequence[Sequence[Message]],
  responses: Sequence[str],
) -> list[Rating | None]:
  """Return the ratings of a served guard.

  Args:
    guard: the kind of the guard.
    client: asks the server.
    prompts: the messages that each response answers.
    responses: the texts to rate.

  Returns:
    A rating for each response; None for a blank one, and for an answer that is not in the guard's
    form. Without log-probabilities, `label_mass` is None and probabilities are 0 or 1.

  Raises:
    UserError: if the server refuses a request.
  """
  rated = [number for number, response in enumerate(responses) if response.strip()]
  bodies = [
    body
    for number in rated
    for body in make_requests(guard, client.server, prompts[number], responses[number])
  ]
  found = [read_form(guard, answer) for answer in client.answer(bodies)]
  ratings: list[Rating | None] = [None] * len(responses)
  size = len(guard.policies)
  for place, number in enumerate(rated):
    answers = [answer for answer in found[place * size : (place + 1) * size] if answer]
    if len(answers) == size:
      ratings[number] = summarize(guard, answers)
  return ratings


def check_served(
  guard: Guard, server: JudgeServer, messages: Sequence[Message], response: str = 'An answer.'
) -> list[Usage]:
  """Check that a server answers a conversation in the guard's form.

  Args:
    guard: the kind of the guard.
    server: its address and settings.
    messages: the longest prompt of the run.
    response: a response to it.

  Returns:
    What the server counted for each request.

  Raises:
    UserError: if the server cannot be reached, refuses the request, or answers in another form.
  """
  usages = []
  with contextlib.closing(Connection(server.connection_config())) as connection:
    connection.check()
    for body in make_requests(guard, server, messages, response):
      answer, usage = ask_server(connection, server, body, 'probe')
      usages.append(usage)
      if read_form(guard, answer) is None:
        raise UserError(
          f'The answer to a test is {show(answer.text)}, which is not the form of {guard.title}. '
          'Name the kind of the guard that the server serves.'
        )
  return usages


def make_requests(
  guard: Guard, server: JudgeServer, messages: Sequence[Message], response: str
) -> list[dict[str, Any]]:
  """Return the JSON body of the request under each policy of a guard.

  Args:
    guard: the kind of the guard.
    server: its address and settings.
    messages: the messages that the response answers.
    response: the text to rate.
  """
  conversation = guard_turns(guard, messages, response)
  tokens = sum(step.most_tokens for step in guard.form)
  bodies = []
  for policy in guard.policies:
    body = messages_request(server, conversation, tokens)
    if options := dict((*guard.options, *policy.options)):
      body['chat_template_kwargs'] = options
    bodies.append(body)
  return bodies


def read_form(guard: Guard, answer: JudgeAnswer) -> Answer | None:
  """Return a served guard's answer in its form, or None if it has another form.

  Args:
    guard: the kind of the guard.
    answer: what the server answered.
  """
  at, found = 0, Answer({}, {})
  text = ''.join(token for token, _ in answer.steps) or answer.text
  for step in guard.form:
    end = step.read(text, at, found)
    if end is None:
      return None
    at = end
  for name, chosen in found.choices.items():
    found.choices[name] = _weigh(answer, chosen)
  return found


def _weigh(answer: JudgeAnswer, chosen: Chosen) -> Chosen:
  """Return a choice with the probabilities of the tokens that are listed at its label."""
  start = 0
  for token, top in answer.steps:
    if start <= chosen.at < start + len(token):
      # The part of the token before the label, such as white space.
      lead = token[: chosen.at - start]
      return _listed(chosen, [(x[len(lead) :], p) for x, p in top if x.startswith(lead)])
    start += len(token)
  return chosen


def _listed(chosen: Chosen, top: Sequence[tuple[str, float]]) -> Chosen:
  """Return a choice with the probabilities of (text, log-probability) pairs.

  A label that is not listed has the probability of the least likely listed token, at most.
  """
  values: dict[str, float] = {}
  for label in chosen.probabilities:
    name = label.strip()
    found = [p for text, p in top if text and (name.startswith(text) or text.strip() == name)]
    values[label] = float(np.logaddexp.reduce(found)) if found else -math.inf
  least = min((p for _, p in top), default=-math.inf)
  mass = sum(math.exp(value) for value in values.values())
  bound = {label: least if value == -math.inf else value for label, value in values.items()}
  total = float(np.logaddexp.reduce(list(bound.values())))
  shares: Mapping[str, float] = {k: math.exp(value - total) for k, value in bound.items()}
  return dataclasses.replace(chosen, probabilities=shares, mass=min(1.0, mass))
