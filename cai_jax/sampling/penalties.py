"""Penalties on tokens that occurred before, and biases: changes of the logits that are drawn from.

The decode program applies them only if an active slot uses them; otherwise it is compiled without
them. In the program, two tables count the tokens of each slot. They are built at the start of a
burst from the text that the host keeps, so no state stays on the device.

Axes: B slots, L positions, W tokens of a slot in a step, K biases, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cai_jax.sampling.types import MAX_BIASES, SamplingConfig


class Penalties(NamedTuple):
  """What penalties and biases need to know of all slots; it is kept on the host.

  Attributes:
    repetition: f32[B], repetition penalty; 1 is off.
    presence: f32[B], presence penalty; 0 is off.
    frequency: f32[B], frequency penalty; 0 is off.
    bias_tokens: i32[B,K], the tokens with a bias, padded with -1.
    biases: f32[B,K], their biases.
  """

  repetition: np.ndarray
  presence: np.ndarray
  frequency: np.ndarray
  bias_tokens: np.ndarray
  biases: np.ndarray

  @classmethod
  def off(cls, slots: int) -> 'Penalties':
    """Return neutral penalties of so many slots."""
    return cls(
      repetition=np.ones(slots, np.float32),
      presence=np.zeros(slots, np.float32),
      frequency=np.zeros(slots, np.float32),
      bias_tokens=np.full((slots, MAX_BIASES), -1, np.int32),
      biases=np.zeros((slots, MAX_BIASES), np.float32),
    )

  def start(self, slot: int, config: SamplingConfig) -> None:
    """Prepare a slot, in place, for a reply.

    Args:
      slot: index of the slot.
      config: sampling settings.
    """
    self.repetition[slot] = config.repetition_penalty
    self.presence[slot] = config.presence_penalty
    self.frequency[slot] = config.frequency_penalty
    self.bias_tokens[slot], self.biases[slot] = -1, 0
    for index, (token, bias) in enumerate(config.logit_bias):
      self.bias_tokens[slot, index], self.biases[slot, index] = token, bias


class Counts(NamedTuple):
  """The tokens of each slot, counted.

  Attributes:
    in_context: bool[B,V], whether the context contains the token.
    in_reply: i32[B,V], how often the reply contains it.
  """

  in_context: jax.Array
  in_reply: jax.Array


def count_tokens(
  text: jax.Array, position: jax.Array, sampled: jax.Array, vocab_size: int
) -> Counts:
  """Count the tokens of each slot.

  Args:
    text: i32[B,L], context and reply of each slot. Entries beyond its position are undefined.
    position: i32[B], position of the last token of context and reply.
    sampled: i32[B], number of tokens of the reply.
    vocab_size: V.
  """

  def count(tokens, position, sampled):
    index, zero = jnp.arange(len(tokens)), jnp.zeros(vocab_size, jnp.int32)
    start = position + 1 - sampled
    in_reply = (index >= start) & (index <= position)
    in_context = zero.at[tokens].add((index < start).astype(jnp.int32)) > 0
    return Counts(in_context, zero.at[tokens].add(in_reply.astype(jnp.int32)))

  return jax.vmap(count)(jnp.asarray(text), position, sampled)


def add_tokens(counts: Counts, tokens: jax.Array, taken: jax.Array) -> Counts:
  """Return the counts after further tokens i32[B,W] of the replies, where `taken` bool[B,W]."""
  add = jax.vmap(lambda row, tokens, taken: row.at[tokens].add(taken.astype(jnp.int32)))
  return counts._replace(in_reply=add(counts.in_reply, tokens, taken))


def count_drafts(counts: Counts, draft: jax.Array) -> Counts:
  """Return the counts [B,W,V] before each token of a step, as if the draft were right.

  Args:
    counts: the tokens of each slot before the step.
    draft: i32[B,W-1], the drafted tokens.
  """
  after = [counts]
  for index in range(draft.shape[1]):
    after.append(add_tokens(after[-1], draft[:, index, None], jnp.ones((len(draft), 1), bool)))
  return jax.tree.map(lambda *x: jnp.stack(x, 1), *after)


def penalize(logits: jax.Array, penalties: Penalties, counts: Counts) -> jax.Array:
  """Return the logits f32[B,V] after biases and penalties, in vLLM's order.

  1. A bias is added to the logit of its token.
  2. Repetition penalty r (Keskar et al. 2019, section 4.1, in Hugging Face's form): the logit of a
     token of context or reply is divided by r if it is positive, and otherwise multiplied by r.
  3. Frequency and presence penalty (OpenAI): the logit of a token that occurs n times in the reply
     falls by n · frequency, and if n > 0 by presence.
  """

  def adjust(logits, in_context, in_reply, repetition, presence, frequency, tokens, biases):
    tokens = jnp.where(tokens < 0, len(logits), tokens)  # padding falls outside the vocabulary
    x = logits.at[tokens].add(biases, mode='drop')
    seen = in_context | (in_reply > 0)
    x = jnp.where(seen, jnp.where(x > 0, x / repetition, x * repetition), x)
    return x - frequency * in_reply - presence * (in_reply > 0)

  return jax.vmap(adjust)(
    logits,
    *counts,
    *map(jnp.asarray, (penalties.repetition, penalties.presence, penalties.frequency)),
    *map(jnp.asarray, (penalties.bias_tokens, penalties.biases)),
  )
