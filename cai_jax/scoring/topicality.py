"""How much a text depends on its prompt, by the log-probabilities of a language model.

The score of a text y and a prompt x is the pointwise mutual information per token,

  score(y, x) = (log P(y | x; θ) - log P(y; θ)) / tokens of y,

in nats (Li et al. 2016, "A Diversity-Promoting Objective Function for Neural Conversation Models",
section 4). A response to another question gains nothing from this one, so its score is near 0 or
below, however fluent the text is.

For log P(y; θ) the model reads the same prompt format with an empty user message. The system
message stays, if there is one, and so do the tokens that begin a reply. Only the request is
missing. Without the format, a chat model would read the text as a continuation of nothing, and
every text would seem to depend on its prompt.

A threshold needs no labels. `shuffled_scores` scores the same texts under other prompts of the run.
A text is off topic if its score is not above the 90th percentile of these (`find_off_topic`), so a
tenth of the texts that have nothing to do with their prompts are missed. A higher percentile lies
among the pairs that happen to fit, because some prompts of a run ask for the same thing.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cai_jax.dialogue import Dialogue, Message
from cai_jax.dialogue.messages import split_system
from cai_jax.model.lm import LM
from cai_jax.scoring.likelihood import log_likelihoods

LEVEL = 0.9  # share of shuffled pairs that are below the threshold
FEWEST, MOST = 40, 200  # shuffled pairs that a threshold is computed from, if there are so many


class TextScore(NamedTuple):
  """The scores of a text, in nats per token. Both are 0 for a text without tokens.

  Attributes:
    topic: mean of log P(text | prompt) - log P(text).
    mean_logprob: mean of log P(text | prompt).
  """

  topic: float
  mean_logprob: float


class OffTopic(NamedTuple):
  """Which texts are off topic.

  Attributes:
    scores: the scores of each text under its own prompt.
    threshold: the percentile of the scores under other prompts; None if all prompts are the same.
    flags: whether each text is off topic, which is unknown, and False, without a threshold. A blank
      text is not on any topic, but it is flagged as empty elsewhere, and not here.
  """

  scores: list[TextScore]
  threshold: float | None
  flags: list[bool]


def topic_scores(
  lm: LM,
  dialogue: Dialogue,
  prompts: Sequence[Sequence[Message]],
  texts: Sequence[str],
  *,
  batch_tokens: int = 8192,
) -> list[float]:
  """Return the mean of log P(text | prompt) - log P(text) over the tokens of each text, in nats.

  Args:
    lm: the model.
    dialogue: renders messages for the model.
    prompts: the messages that each text answers.
    texts: replies, without the token that ends them.
    batch_tokens: maximum number of tokens in a batch, see `log_likelihoods`.

  Raises:
    ValueError: if there is not one prompt per text.
    UserError: if a prompt and its text do not fit into the model's context together.
  """
  scores = score_texts(lm, dialogue, prompts, texts, batch_tokens=batch_tokens)
  return [score.topic for score in scores]


def score_texts(
  lm: LM,
  dialogue: Dialogue,
  prompts: Sequence[Sequence[Message]],
  texts: Sequence[str],
  *,
  batch_tokens: int = 8192,
) -> list[TextScore]:
  """Return both scores of each text. See `topic_scores` for the arguments.

  Raises:
    ValueError: if there is not one prompt per text.
    UserError: if a prompt and its text do not fit into the model's context together.
  """
  replies = [_encode_text(dialogue, text) for text in texts]
  given = _mean_logprobs(lm, dialogue, prompts, replies, batch_tokens)
  without = [_without_request(prompt) for prompt in prompts]
  alone = _mean_logprobs(lm, dialogue, without, replies, batch_tokens)
  return [TextScore(a - b, a) for a, b in zip(given, alone, strict=True)]


def find_off_topic(
  lm: LM,
  dialogue: Dialogue,
  prompts: Sequence[Sequence[Message]],
  texts: Sequence[str],
  *,
  seed: int = 0,
  level: float = LEVEL,
  batch_tokens: int = 8192,
) -> OffTopic:
  """Find the texts whose score is not above those of texts under other prompts of the run.

  The threshold is the `level` quantile of `shuffled_scores`. It does not depend on the order of the
  texts.

  Args:
    lm: the model.
    dialogue: renders messages for the model.
    prompts: the messages that each text answers.
    texts: replies, without the token that ends them.
    seed: seed of the shuffling.
    level: share of shuffled pairs below the threshold, in (0, 1).
    batch_tokens: maximum number of tokens in a batch, see `log_likelihoods`.

  Raises:
    ValueError: if there is not one prompt per text.
    UserError: if a prompt and a text do not fit into the model's context together.
  """
  scores = score_texts(lm, dialogue, prompts, texts, batch_tokens=batch_tokens)
  alone = [score.mean_logprob - score.topic for score in scores]
  shuffled = _shuffled(lm, dialogue, prompts, texts, alone, seed, batch_tokens)
  if not shuffled:
    return OffTopic(scores, None, [False] * len(texts))
  threshold = float(np.quantile(shuffled, level))
  flags = [
    bool(text.strip()) and score.topic <= threshold
    for text, score in zip(texts, scores, strict=True)
  ]
  return OffTopic(scores, threshold, flags)


def shuffled_scores(
  lm: LM,
  dialogue: Dialogue,
  prompts: Sequence[Sequence[Message]],
  texts: Sequence[str],
  *,
  seed: int = 0,
  batch_tokens: int = 8192,
) -> list[float]:
  """Return topic scores of the texts under other prompts than their own.

  There are `FEWEST` to `MOST` pairs if there are enough prompts and texts. Blank texts, and prompts
  that leave no room for the text, are left out.

  Args:
    lm: the model.
    dialogue: renders messages for the model.
    prompts: the messages that each text answers.
    texts: replies, without the token that ends them.
    seed: seed of the shuffling.
    batch_tokens: maximum number of tokens in a batch, see `log_likelihoods`.

  Returns:
    The scores, in nats per token. Empty if all prompts are the same.

  Raises:
    ValueError: if there is not one prompt per text.
  """
  replies = [_encode_text(dialogue, text) for text in texts]
  without = [_without_request(prompt) for prompt in prompts]
  alone = _mean_logprobs(lm, dialogue, without, replies, batch_tokens)
  return _shuffled(lm, dialogue, prompts, texts, alone, seed, batch_tokens)


def _shuffled(
  lm: LM,
  dialogue: Dialogue,
  prompts: Sequence[Sequence[Message]],
  texts: Sequence[str],
  alone: Sequence[float],
  seed: int,
  batch_tokens: int,
) -> list[float]:
  """Return `shuffled_scores`, given the mean of log P(text) of each text."""
  keys = [json.dumps(list(prompt), sort_keys=True) for prompt in prompts]
  distinct = dict(sorted(zip(keys, prompts, strict=True)))  # sorted: input order has no effect
  if len(distinct) < 2 or not any(text.strip() for text in texts):
    return []
  order = [list(distinct)[i] for i in np.random.default_rng(seed).permutation(len(distinct))]
  place = {key: number for number, key in enumerate(order)}
  replies = [_encode_text(dialogue, text) for text in texts]
  pairs: list[tuple[Sequence[Message], list[int], float]] = []
  for shift in range(1, len(order)):
    for key, reply, logprob in zip(keys, replies, alone, strict=True):
      other = distinct[order[(place[key] + shift) % len(order)]]
      if reply and len(dialogue.prompt(other)) + len(reply) <= lm.max_positions:
        pairs.append((other, reply, logprob))
    if len(pairs) >= FEWEST:
      break
  pairs = sorted(pairs, key=lambda pair: _draw(seed, pair[0], pair[1]))[:MOST]
  others, paired, logprobs = map(list, zip(*pairs, strict=True)) if pairs else ([], [], [])
  given = _mean_logprobs(lm, dialogue, others, paired, batch_tokens)
  return [a - b for a, b in zip(given, logprobs, strict=True)]


def _draw(seed: int, prompt: Sequence[Message], reply: Sequence[int]) -> str:
  """Return a pseudorandom text that depends on a pair and the seed only."""
  return hashlib.sha256(json.dumps([seed, list(prompt), list(reply)]).encode()).hexdigest()


def _mean_logprobs(
  lm: LM,
  dialogue: Dialogue,
  prompts: Sequence[Sequence[Message]],
  replies: Sequence[list[int]],
  batch_tokens: int,
) -> list[float]:
  """Return the mean of log P(token) over each reply after its prompt; 0 for an empty reply."""
  contexts = [dialogue.prompt(prompt) for prompt in prompts]
  filled = [i for i, (_, reply) in enumerate(zip(contexts, replies, strict=True)) if reply]
  sums = log_likelihoods(
    lm, [contexts[i] for i in filled], [replies[i] for i in filled], batch_tokens=batch_tokens
  )
  means = [0.0] * len(replies)
  for i, total in zip(filled, sums, strict=True):
    means[i] = total / len(replies[i])
  return means


def _encode_text(dialogue: Dialogue, text: str) -> list[int]:
  """Return the tokens of a reply without those that end it; [] for a blank text."""
  tokens = dialogue.reply(text) if text.strip() else []
  while tokens and tokens[-1] in dialogue.stop_token_ids:
    tokens.pop()
  return tokens


def _without_request(prompt: Sequence[Message]) -> list[Message]:
  """Return the system message of a prompt, if it has one, and an empty user message."""
  system, _ = split_system(prompt)
  return [*system, {'role': 'user', 'content': ''}]
