"""The verdict in a served judge's answer.

From log-probabilities: the most likely answer is followed as long as it may still become a label.
At each of its tokens, the alternatives that complete a label give that label the probability of the
path times their own. A label that no alternative completes gets the probability of the least likely
one that is listed, which is more than it has, so the log-odds are nearer to 0 than the judge's.

What is lost: labels behind tokens that are not listed, and labels spelled along another path than
the most likely one. The mass of the labels therefore is a lower bound, up to the ')' of a label,
which is not waited for.
"""

import json
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from cai_jax.sampling.remote.answers import ContradictionError
from cai_jax.sampling.remote.fields import ProtocolError

# Log-odds in nats of a sampled verdict. It has no probability, so its calibration says nothing.
SAMPLED_LOG_ODDS = 1.0
MAX_LOGPROB = 1e-3  # log-probabilities are at most 0, except for rounding

_LABEL = re.compile(r'\s*\(([AB])\)?[.:]?\s*')
_BEGIN = re.compile(r'\s*\(?')  # what may still become a label
_SAID = re.compile(r'\(([AB])\)')
_ANSWERED = re.compile(r'answer\W+(?:is\W*?)?\(([AB])\)', re.IGNORECASE)

Alternatives = list[tuple[str, float]]


class JudgeAnswer(NamedTuple):
  """An answer of a served judge.

  Attributes:
    text: what it wrote.
    steps: for each token, its text and the listed (text, log-probability in nats) of the most
      likely tokens, the token itself included; empty without log-probabilities.
  """

  text: str
  steps: Sequence[tuple[str, Alternatives]] = ()

  def to_json(self) -> str:
    """Return the answer as the journal holds it."""
    return json.dumps([self.text, list(self.steps)])

  @classmethod
  def from_json(cls, text: str) -> 'JudgeAnswer':
    """Return the answer that `to_json` wrote."""
    written, steps = json.loads(text)
    return cls(written, [(t, [(a, float(p)) for a, p in others]) for t, others in steps])


def read_answer(data: bytes, needs_logprobs: bool) -> JudgeAnswer:
  """Parse the body of a response.

  Args:
    data: the body.
    needs_logprobs: whether an answer without log-probabilities is refused.

  Raises:
    ProtocolError: if it does not follow the API.
    ContradictionError: if it has no log-probabilities, or one above 0.
  """
  try:
    choice = json.loads(data, parse_constant=_refuse_constant)['choices'][0]
    text = choice['message']['content'] if 'message' in choice else choice['text']
    steps = _read_steps(choice.get('logprobs') or {}) if needs_logprobs else []
    text = '' if text is None else text
    '\n'.join([text, *(name for token, top in steps for name, _ in ((token, 0), *top))]).encode()
  except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
    raise ProtocolError(f'{type(error).__name__}: {error}') from None
  if choice.get('finish_reason') == 'content_filter':
    return JudgeAnswer('')
  if needs_logprobs and not steps:
    raise ContradictionError(
      'It has no log-probabilities (logprobs with their most likely tokens). Serve the judge with '
      "log-probabilities, or set evaluation.judge_remote.verdict='sampled'."
    )
  if any(value > MAX_LOGPROB for _, top in steps for _, value in top):
    raise ContradictionError('It has a log-probability above 0.')
  return JudgeAnswer(text, steps)


def label_log_probabilities(answer: JudgeAnswer) -> tuple[tuple[float, float], float]:
  """Return the log-probabilities of labels (A) and (B) in nats, and their listed mass.

  Args:
    answer: an answer with log-probabilities. Without any, neither label has a preference or mass.

  Returns:
    The log-probabilities, where a label that is not listed has an upper bound, and the probability
    of the listed labels together.
  """
  listed, path, prefix, least = {'A': -math.inf, 'B': -math.inf}, 0.0, '', 0.0
  for token, top in answer.steps:
    for text, value in top:
      if found := _LABEL.fullmatch(prefix + text):
        listed[found[1]] = float(np.logaddexp(listed[found[1]], path + value))
    least = min(least, path + min(value for _, value in top))
    path += next((value for text, value in top if text == token), 0.0)
    prefix += token
    if not _BEGIN.fullmatch(prefix):
      break
  mass = sum(math.exp(value) for value in listed.values())
  if not mass:
    return (least, least), 0.0
  bound = {label: least if value == -math.inf else value for label, value in listed.items()}
  return (bound['A'], bound['B']), mass


def sampled_log_odds(text: str) -> float:
  """Return the log-odds in nats of label (A) that a sampled verdict stands for.

  The last '(A)' or '(B)' after 'answer' counts, else the only label in the text. A text without a
  verdict has the log-odds 0.

  Args:
    text: what the judge wrote. Reasoning up to '</think>' is not part of the verdict, and reasoning
      that was cut off has none.
  """
  text = text.rpartition('</think>')[2].partition('<think>')[0]
  labels = _ANSWERED.findall(text)[-1:] or sorted({*_SAID.findall(text)})
  if len(labels) != 1:
    return 0.0
  return SAMPLED_LOG_ODDS if labels[0] == 'A' else -SAMPLED_LOG_ODDS


def _read_steps(record: dict[str, Any]) -> list[tuple[str, Alternatives]]:
  """Return the tokens of an answer with their alternatives.

  The chat API, and llama.cpp in both, list objects; the completions API has parallel lists.
  """
  steps = []
  if 'content' in record:
    for entry in record['content'] or ():
      others = [(top['token'], top['logprob']) for top in entry.get('top_logprobs') or ()]
      steps.append((entry['token'], entry['logprob'], others))
  else:
    tops = record.get('top_logprobs') or ()
    if tops:
      for token, value, top in zip(record['tokens'], record['token_logprobs'], tops, strict=True):
        steps.append((token, value, list((top or {}).items())))
  return [
    (token, _with_token(token, value, [(text, _number(p)) for text, p in others]))
    for token, value, others in steps
  ]


def _with_token(token: str, value: Any, others: Alternatives) -> Alternatives:
  """Return the alternatives with the token itself, which some servers do not list."""
  if any(text == token for text, _ in others):
    return others
  return [(token, _number(value)), *others]


def _number(value: Any) -> float:
  if type(value) not in (int, float):
    raise ValueError('a log-probability is not a number')
  return float(value)


def _refuse_constant(name: str) -> None:
  raise ValueError(f'{name} is not a number in JSON')
