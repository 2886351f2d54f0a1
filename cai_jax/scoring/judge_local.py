"""A language model in memory as a judge.

A model with a chat template reads the question as a user's message, and its answer opens with 'The
answer is:'. A model without one reads the question and the opening as plain text. The label
follows, and its log-probability is that of all of its tokens.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from cai_jax.dialogue import Dialogue, control_tokens, known_options
from cai_jax.dialogue.format import TemplateOptions
from cai_jax.model.lm import LM
from cai_jax.runtime.errors import UnreadableError, UserError
from cai_jax.sampling.completions import generate
from cai_jax.sampling.prefixes import common_length
from cai_jax.sampling.types import SamplingConfig
from cai_jax.scoring import likelihood
from cai_jax.scoring.judge import Comparison, Judge, Match
from cai_jax.scoring.judge_questions import OPENING, OPTIONS, REASON_FIRST, build_questions

Pair = tuple[list[int], list[int]]  # token ids of a context and of the label that follows it


@dataclasses.dataclass(frozen=True)
class Reasoning:
  """What a judge may write before its verdict.

  Attributes:
    max_tokens: most tokens that it writes; 0 asks for the verdict at once.
    temperature: temperature of these tokens.
    seed: seed of these tokens.
  """

  max_tokens: int = 0
  temperature: float = 1.0
  seed: int = 0


def judge_dialogue(
  tokenizer: Any,
  eos_token_ids: Sequence[int] = (),
  template_options: TemplateOptions = (),
  style: str = 'chat',
) -> Dialogue | None:
  """Return the dialogue in which a judge reads questions, or None if it reads plain text.

  Args:
    tokenizer: the judge's tokenizer. Without a chat template, the judge reads plain text.
    eos_token_ids: further ids that end a turn.
    template_options: (name, value) pairs; the judge's template gets those that it reads.
    style: 'plain' for plain text even with a chat template, as base models read it.

  Raises:
    UserError: if the chat template cannot be used.
  """
  if style == 'plain' or not tokenizer.chat_template:
    return None
  options = known_options(tokenizer, template_options)
  return Dialogue(tokenizer, style, tuple(eos_token_ids), options)


def local_judge(
  lm: LM,
  dialogue: Dialogue | None = None,
  *,
  reasoning: Reasoning = Reasoning(),
  batch_tokens: int = 8192,
) -> Judge:
  """Return a judge that asks a language model.

  Its log-odds are log P(label (A)) - log P(label (B)), and its label mass is P(label (A)) +
  P(label (B)), given everything before the label.

  Args:
    lm: the model. Prefer one that is not one of the players.
    dialogue: renders the question, see `judge_dialogue`. None asks in plain text.
    reasoning: what the judge may write before its verdict.
    batch_tokens: maximum number of tokens in a batch, see `likelihood.log_likelihoods`.

  Returns:
    The judge. It raises UnreadableError if a match cannot be put as a question or is too long.
  """

  def judge(matches: Sequence[Match]) -> list[Comparison]:
    questions: list[str] = []
    names: list[str] = []
    for number, match in enumerate(matches):
      name = f'match {number} (prompt {match.prompt!r})'
      try:
        questions += build_questions(match)
      except UserError as error:
        raise UnreadableError(f'{name}: {error}') from error
      names += [name, name]
    if not questions:
      return []
    pairs = _reason(lm, dialogue, questions, reasoning) if reasoning.max_tokens else []
    try:
      if not reasoning.max_tokens:
        pairs = [p for q in questions for p in tokenize_question(lm.tokenizer, dialogue, q)]
      for number, pair in enumerate(pairs):
        likelihood.check_pair(lm, *pair, names[number // 2])
    except UserError as error:
      raise UnreadableError(str(error)) from error
    contexts, labels = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    values = likelihood.log_likelihoods(lm, contexts, labels, batch_tokens=batch_tokens)
    return compare_labels(matches, np.reshape(values, (-1, 2, 2)))

  return judge


def compare_labels(matches: Sequence[Match], log_p: np.ndarray) -> list[Comparison]:
  """Return the comparisons that follow from the log-probabilities of the labels.

  Args:
    matches: N matches.
    log_p: f64[N,2,2], log-probabilities in nats of label (A) and label (B) (last axis), with the
      first response as option (A) and as option (B) (middle axis).
  """
  odds_of_a, mass = log_p[..., 0] - log_p[..., 1], np.exp(log_p).sum(axis=-1)
  return [
    Comparison(
      match.prompt,
      match.players,
      (float(odds[0]), -float(odds[1])),
      (min(1.0, float(total[0])), min(1.0, float(total[1]))),
    )
    for match, odds, total in zip(matches, odds_of_a, mass, strict=True)
  ]


def tokenize_question(tokenizer: Any, dialogue: Dialogue | None, question: str) -> list[Pair]:
  """Return the tokens before each of the two labels, and those of the label.

  Args:
    tokenizer: the judge's tokenizer.
    dialogue: renders the question as a user's message. None asks in plain text.
    question: a question of `build_question`.

  Raises:
    UserError: if the question spells a control token that the tokenizer cannot read as text, or
      the chat template rejects it.
  """
  if dialogue is None:
    context = f'{question}\n\n{OPENING}'
    return [likelihood.tokenize_pair(tokenizer, context, option) for option in OPTIONS]
  prompt = dialogue.prompt([{'role': 'user', 'content': question}])
  opening = _reply_tokens(dialogue, OPENING)
  pairs = []
  for option in OPTIONS:
    whole = _reply_tokens(dialogue, OPENING + option)
    split = common_length(opening, whole)
    pairs.append((prompt + whole[:split], whole[split:]))
  return pairs


def _reply_tokens(dialogue: Dialogue, text: str) -> list[int]:
  """Return the tokens of a reply that has not ended."""
  tokens = dialogue.reply(text)
  return tokens[:-1] if tokens[-1] in dialogue.stop_token_ids else tokens


def close_thought(tokenizer: Any, tokens: list[int]) -> list[int]:
  """Return tokens that end outside a thought, because a verdict is not part of one.

  A chat template of a reasoning model may open a thought at the end of its prompt.

  Args:
    tokenizer: the judge's tokenizer.
    tokens: token ids of the question, and of what the judge wrote.
  """
  control = control_tokens(tokenizer)
  think, end_of_thought = control.get('<think>'), control.get('</think>')
  thoughts = [token for token in tokens if token in (think, end_of_thought)]
  if end_of_thought is not None and thoughts[-1:] == [think]:
    return [*tokens, end_of_thought]
  return tokens


def _reason(
  lm: LM, dialogue: Dialogue | None, questions: Sequence[str], reasoning: Reasoning
) -> list[Pair]:
  """Let the judge write about each question, and return the pairs of the two labels after it.

  Equal questions get equal texts.
  """
  contexts = {question: _reasoning_context(lm, dialogue, question) for question in questions}
  sampling = SamplingConfig(
    temperature=reasoning.temperature,
    max_tokens=reasoning.max_tokens,
    stop_token_ids=dialogue.stop_token_ids if dialogue else (),
  )
  completions = generate(lm, list(contexts.values()), sampling, reasoning.seed)
  opening, *answers = (
    lm.tokenizer.encode(f'\n\n{OPENING}{option}', add_special_tokens=False)
    for option in ('', *OPTIONS)
  )
  pairs = {}
  for (question, context), completion in zip(contexts.items(), completions, strict=True):
    written = completion.tokens[: -1 if completion.finish_reason == 'stop' else None]
    before = close_thought(lm.tokenizer, context + written)
    splits = [common_length(opening, answer) for answer in answers]
    pairs[question] = [
      (before + answer[:split], answer[split:])
      for answer, split in zip(answers, splits, strict=True)
    ]
  return [pair for question in questions for pair in pairs[question]]


def _reasoning_context(lm: LM, dialogue: Dialogue | None, question: str) -> list[int]:
  """Return the tokens after which the judge writes what it thinks about a question."""
  asked = f'{question}\n\n{REASON_FIRST}'
  if dialogue is not None:
    return dialogue.prompt([{'role': 'user', 'content': asked}])
  context, rest = likelihood.tokenize_pair(lm.tokenizer, asked, '\n\n')
  return context + rest
