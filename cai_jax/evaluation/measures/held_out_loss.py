"""Loss and perplexity of a model on the last revisions of held-out prompts."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from cai_jax.dialogue import Dialogue
from cai_jax.evaluation.config import EvaluationConfig
from cai_jax.evaluation.registries import MODEL_MEASURES, ModelMeasure, Row
from cai_jax.model.lm import LM
from cai_jax.runtime.errors import UserError
from cai_jax.scoring.likelihood import log_likelihoods


@MODEL_MEASURES.register('loss')
def create_held_out_loss(config: EvaluationConfig) -> ModelMeasure | None:
  """Return the measure, or None if `config.loss` is False."""
  return ModelMeasure(measure_held_out_loss, describe) if config.loss else None


def measure_held_out_loss(
  lm: LM, rows: Sequence[Row], dialogue: Dialogue
) -> dict[str, float | int] | None:
  """Return a model's loss on last revisions, except blank ones and those cut at max_tokens.

  Args:
    lm: the model.
    rows: rows of M_θ on held-out prompts. Rows without rounds are ignored.
    dialogue: renders messages for the model.

  Returns:
    The result of `loss_and_perplexity`, with `too_long`, the number of revisions that were left out
    because the model's context is too short for them. None if no revision is left.
  """
  pairs = []
  for row in rows:
    if row['rounds']:
      revision = row['rounds'][-1]['revision']
      if revision['text'].strip() and revision['finish_reason'] != 'length':
        pairs.append(_tokenize_reply(dialogue, row, revision['text']))
  fitting = [pair for pair in pairs if sum(map(len, pair)) <= lm.max_positions]
  if not fitting:
    return None
  return loss_and_perplexity(lm, fitting) | {'too_long': len(pairs) - len(fitting)}


def describe(model: str, result: dict[str, Any]) -> list[str]:
  """Return a line of text with the loss and the perplexity.

  Args:
    model: name of the model.
    result: result of `measure_held_out_loss`.
  """
  return [
    f'{model}: {result["loss"]:.2f} nats per sequence and perplexity {result["perplexity"]:.3f} '
    f'per token on {result["sequences"]} last revisions of held-out prompts'
  ]


def loss_and_perplexity(
  lm: LM,
  pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
  *,
  batch_tokens: int = 8192,
) -> dict[str, float | int]:
  """Return the loss and the perplexity of continuations.

  Args:
    lm: the model.
    pairs: token ids of each context and its continuation.
    batch_tokens: maximum number of tokens in a batch, see `log_likelihoods`.

  Returns:
    A dict with

    - `loss`: -1/N Σ_i log P(y_i | x_i; θ) in nats per sequence, the training objective with
      `train.loss_normalization='sequence'`;
    - `loss_per_token`: nats per token of the continuations;
    - `perplexity`: exp(`loss_per_token`);
    - `tokens`: number of tokens in the continuations;
    - `sequences`: number of pairs.

  Raises:
    UserError: if there are no pairs, or one cannot be scored, see `likelihood.check_pair`.
  """
  if not len(pairs):
    raise UserError('There is no pair to compute the loss of. Give at least one.')
  contexts, continuations = zip(*pairs, strict=True)
  total = -math.fsum(log_likelihoods(lm, contexts, continuations, batch_tokens=batch_tokens))
  tokens = sum(map(len, continuations))
  return {
    'loss': total / len(pairs),
    'loss_per_token': total / tokens,
    'perplexity': float(np.exp(total / tokens)),
    'tokens': tokens,
    'sequences': len(pairs),
  }


def _tokenize_reply(dialogue: Dialogue, row: Row, reply: str) -> tuple[list[int], list[int]]:
  """Return the tokens of a row's prompt, and of a reply with the token that ends it."""
  tokens, mask = dialogue.example([*row['prompt'], {'role': 'assistant', 'content': reply}])
  start = list(mask).index(True)
  return list(tokens[:start]), list(tokens[start:])
