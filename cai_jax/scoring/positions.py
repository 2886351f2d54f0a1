"""The log-probability of every token of a text, and the most likely tokens at every position.

`cai_jax.scoring.likelihood` sums over the tokens of a continuation. Programs that ask a server
for log-probabilities decide themselves which tokens they sum, so they need each one.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cai_jax.model.lm import LM
from cai_jax.runtime.compilation import jit_on
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.mesh import batch_sharding
from cai_jax.scoring.likelihood import plan_batches, positions_at_once

MOST_ALTERNATIVES = 20  # as OpenAI's chat API allows


class Scored(NamedTuple):
  """The predictions of a model for a text of T tokens.

  Attributes:
    logprobs: f32[T], log P(token t | tokens before t; θ) in nats; NaN for the first token, which
      the model does not predict.
    top_ids: i32[T,K], the most likely tokens after token t, in descending order.
    top_logprobs: f32[T,K], their log-probabilities in nats.
  """

  logprobs: np.ndarray
  top_ids: np.ndarray
  top_logprobs: np.ndarray


def score_tokens(
  lm: LM, rows: Sequence[Sequence[int]], alternatives: int = 1, *, batch_tokens: int = 8192
) -> list[Scored]:
  """Return the log-probabilities of the tokens of each row, before any sampling setting.

  The log-softmax is computed in f32. Up to rounding, the values of a row depend on that row alone.

  Args:
    lm: the model.
    rows: token ids, at least one each.
    alternatives: K, the number of most likely tokens to return, in [1, MOST_ALTERNATIVES].
    batch_tokens: maximum number of tokens in a batch, see `likelihood.log_likelihoods`.

  Returns:
    One value per row, in the order of the rows.

  Raises:
    ValueError: if `alternatives` is out of range.
    UserError: if a row is empty, is longer than the model's context or has a token outside the
      vocabulary, or if logits are not finite.
  """
  if not 1 <= alternatives <= min(MOST_ALTERNATIVES, lm.vocab_size):
    raise ValueError(f'alternatives={alternatives} must be in [1, {MOST_ALTERNATIVES}].')
  for number, row in enumerate(rows):
    _check_row(lm, row, number)
  order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
  sharding = batch_sharding(lm.mesh)
  program = jit_on(lm.mesh.devices.flat[0].platform, _predict, static_argnums=(0, 1, 2, 3))
  scored: dict[int, Scored] = {}
  for count, length, members in plan_batches([len(rows[i]) for i in order], lm, batch_tokens):
    tokens = np.zeros((count, length), np.int32)
    for place, member in enumerate(members):
      row = rows[order[member]]
      tokens[place, : len(row)] = row
    size = positions_at_once(lm, count, length)
    arrays = program(lm.graph, sharding, size, alternatives, lm.params, tokens)
    logprobs, ids, top = map(np.asarray, arrays)
    for place, member in enumerate(members):
      end = len(rows[order[member]])
      values = np.concatenate([[np.nan], logprobs[place, : end - 1]]).astype(np.float32)
      scored[order[member]] = Scored(values, ids[place, :end], top[place, :end])
  results = [scored[i] for i in range(len(rows))]
  for number, result in enumerate(results):
    if not (np.isfinite(result.logprobs[1:]).all() and np.isfinite(result.top_logprobs).all()):
      raise UserError(
        f'Log-probabilities of row {number} are not finite, because logits of {lm.name} are not. '
        'Check its weights, or load it with dtype="float32".'
      )
  return results


def _check_row(lm: LM, row: Sequence[int], number: int) -> None:
  """Raise UserError if a row cannot be scored."""
  if not len(row):
    raise UserError(f'Row {number} has no token. It needs at least one.')
  if not 0 <= min(row) <= max(row) < lm.vocab_size:
    raise UserError(
      f'Row {number} has tokens in {min(row)}..{max(row)}, but the vocabulary is '
      f"0..{lm.vocab_size - 1}. Use the model's own tokenizer."
    )
  if len(row) > lm.max_positions:
    raise UserError(
      f'Row {number} has {len(row)} tokens, more than the {lm.max_positions} positions of '
      f'{lm.name}. Shorten it.'
    )


def _predict(graph, sharding, size, alternatives, params, tokens):
  """Return f32[B,T], i32[B,T,K] and f32[B,T,K]: what each token says about the next one.

  The first array has log P(token t + 1), and is meaningless at the last position. Logits
  f32[B,size,V] are computed for `size` positions per row at a time.
  """
  tokens = jax.lax.with_sharding_constraint(jnp.asarray(tokens), sharding)
  rows, length = tokens.shape
  model = nnx.merge(graph, params)
  positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
  hidden = model(tokens, positions, sharding=sharding)
  following = jnp.roll(tokens, -1, axis=1)

  def add_slice(number, results):
    logprobs, ids, top = results
    # The last slice may repeat the last position, and writes the same values there again.
    places = jnp.minimum(number * size + jnp.arange(size), length - 1)
    logits = model.unembed(hidden[:, places])
    normalizer = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    # Both are differences of the same two numbers, so that a token has one log-probability.
    target = jnp.take_along_axis(logits, following[:, places, None], axis=-1) - normalizer
    top_logits, top_ids = jax.lax.top_k(logits, alternatives)
    return (
      logprobs.at[:, places].set(target[..., 0]),
      ids.at[:, places].set(top_ids),
      top.at[:, places].set(top_logits - normalizer),
    )

  shape = (rows, length, alternatives)
  results = jnp.zeros((rows, length)), jnp.zeros(shape, jnp.int32), jnp.zeros(shape)
  results = jax.lax.fori_loop(0, -(-length // size), add_slice, results)
  # Replicate the results, so that every process can read them.
  return jax.lax.with_sharding_constraint(results, NamedSharding(sharding.mesh, P()))
