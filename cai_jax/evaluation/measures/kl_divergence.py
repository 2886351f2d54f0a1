"""How far M_aligned has moved from M_θ: the KL divergence, estimated from its own responses.

  KL = E_{y ~ M_aligned} Σ_t [log P(y_t | x, y_<t; M_aligned) - log P(y_t | x, y_<t; M_θ)]

The estimate is the mean over M_aligned's responses y to held-out prompts x, with the token ids that
were sampled and the context that the model read. A single term may be negative, but the expectation
is not if responses are drawn from the distribution itself: temperature 1 and no filters. With other
sampling settings, it is the mean log-ratio of the responses that were drawn. A response that was
cut off at the token limit contributes the tokens up to there.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cai_jax.evaluation.config import EvaluationConfig
from cai_jax.evaluation.intervals import paired_difference
from cai_jax.evaluation.registries import COMPARISONS, ModelComparison, Policy, Row
from cai_jax.model.lm import LM
from cai_jax.scoring.likelihood import log_likelihoods
from cai_jax.scoring.loader import ModelLoader


@COMPARISONS.register('kl')
def create_kl(config: EvaluationConfig) -> ModelComparison | None:
  """Return the comparison, or None if the config does not ask for 'kl'."""
  if 'kl' not in config.active_scores:
    return None

  def compare(
    loader: ModelLoader, base: Sequence[Row], aligned: Sequence[Row], seed: int
  ) -> dict[str, Any] | None:
    return compare_policies(loader, base, aligned, seed, {})

  def compare_policies(
    loader: ModelLoader,
    base: Sequence[Row],
    aligned: Sequence[Row],
    seed: int,
    policies: Mapping[str, Policy],
  ) -> dict[str, Any] | None:
    del base, seed
    replies = list_replies(aligned)
    others = {name: list_replies(policy.rows) for name, policy in policies.items()}
    if 'base' not in loader.aliases or not any((replies, *others.values())):
      return None
    lm = loader.language_model('base')
    if not any(others.values()):
      return measure_kl(lm, replies)
    measured = {name: measure_kl(lm, found, items=True) for name, found in others.items() if found}
    own = measure_kl(lm, replies, items=True) if replies else {}
    return own | {'policies': measured}

  return ModelComparison(compare, describe, compare_policies)


def list_replies(rows: Sequence[Row]) -> list[Row]:
  """Return the replies whose token ids and log-probabilities are known, without empty ones.

  Args:
    rows: rows of a model, with `reply` where it is known.
  """
  known = [row for row in rows if row.get('reply') and row['reply']['tokens']]
  return [{**row['reply'], 'id': row['id']} for row in known]


def measure_kl(base: LM, replies: Sequence[Row], items: bool = False) -> dict[str, Any]:
  """Return the estimate of KL(M_aligned ‖ M_θ).

  Args:
    base: M_θ. It has M_aligned's vocabulary.
    replies: responses of M_aligned, at least one: `context` and `tokens`, the ids that it read and
      sampled, and `logprobs`, its log P of each sampled token in nats; and `id` for `items`.
    items: whether to return the term of each response.

  Returns:
    `per_response`, the mean over responses, and `per_token`, the sum over all responses divided by
    their tokens, both in nats, with their 95 % intervals over responses; `responses` and `tokens`;
    and `items`, the terms in nats by id, if they are asked for.
  """
  contexts, tokens = ([reply[key] for reply in replies] for key in ('context', 'tokens'))
  given = np.array(log_likelihoods(base, contexts, tokens))
  own = np.array([math.fsum(reply['logprobs']) for reply in replies])
  counts = np.array([len(reply) for reply in tokens], np.float64)
  terms = (own - given).tolist()
  rate = (own - given).sum() / counts.sum()
  # The interval of a ratio of sums by its linearization (Cochran 1977, section 2.11).
  _, low, high = paired_difference(own / counts.mean(), (given + rate * counts) / counts.mean())
  per_response = paired_difference(own, given)
  return {
    'per_response': per_response.value,
    'per_response_interval': [per_response.low, per_response.high],
    'per_token': float(rate),
    'per_token_interval': [float(rate + low), float(rate + high)],
    'responses': len(replies),
    'tokens': int(counts.sum()),
  } | ({'items': dict(zip([r['id'] for r in replies], terms, strict=True))} if items else {})


def describe(result: dict[str, Any]) -> list[str]:
  """Return a line of text with the estimate.

  Args:
    result: the result of `measure_kl` for M_aligned, if it has replies, and those of the policies
      by name, as `policies`.
  """
  lines = [_describe_kl('aligned', result)] if 'per_response' in result else []
  return lines + [_describe_kl(*item) for item in result.get('policies', {}).items()]


def _describe_kl(name: str, result: dict[str, Any]) -> str:
  """Return the line about one model."""
  values = [
    f'{result[name]:.{digits}f} '
    f'[{result[f"{name}_interval"][0]:.{digits}f}, {result[f"{name}_interval"][1]:.{digits}f}]'
    for name, digits in (('per_response', 2), ('per_token', 4))
  ]
  return (
    f'KL of {name} from base: {values[0]} nats per response, {values[1]} per token, on '
    f'{result["responses"]} responses of {name}'
  )
