"""Texts as vectors: the mean of a language model's last hidden states over the tokens of a text."""

from collections.abc import Sequence

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
from cai_jax.scoring.likelihood import encode_text, plan_batches


def embed_texts(lm: LM, texts: Sequence[str], *, batch_tokens: int = 8192) -> np.ndarray:
  """Return the embedding of each text: the mean of the hidden states after the last norm.

  The model reads a text alone, without a prompt or a chat template, after the tokens that its
  tokenizer adds in front (BOS), which the mean leaves out. The mean is computed in f32.

  Args:
    lm: the model.
    texts: the texts. A text without tokens has the embedding 0.
    batch_tokens: maximum number of tokens in a batch, including padding.

  Returns:
    f32[N,D], in the order of the texts.

  Raises:
    UserError: if a text is longer than the model's context, or spells a control token.
  """
  prefix = len(encode_text(lm.tokenizer, ''))
  tokens = [encode_text(lm.tokenizer, text) for text in texts]
  for number, row in enumerate(tokens):
    if len(row) > lm.max_positions:
      raise UserError(
        f'Text {number} has {len(row)} tokens, but the context of {lm.name} holds '
        f'{lm.max_positions}. Embed it with a model that has a longer context.'
      )
  embeddings = np.zeros((len(texts), lm.config.d_model), np.float32)
  order = sorted((i for i, row in enumerate(tokens) if len(row) > prefix), key=lambda i: tokens[i])
  order.sort(key=lambda i: len(tokens[i]))
  sharding = batch_sharding(lm.mesh)
  program = jit_on(lm.mesh.devices.flat[0].platform, _mean_states, static_argnums=(0, 1))
  for count, length, members in plan_batches([len(tokens[i]) for i in order], lm, batch_tokens):
    padded, ends = np.zeros((count, length), np.int32), np.full(count, prefix + 1, np.int32)
    chosen = [order[i] for i in members]
    for number, i in enumerate(chosen):
      padded[number, : len(tokens[i])] = tokens[i]
      ends[number] = len(tokens[i])
    means = program(lm.graph, sharding, lm.params, padded, np.int32(prefix), ends)
    embeddings[chosen] = np.asarray(means)[: len(chosen)]
  return embeddings


def _mean_states(graph, sharding, params, tokens, start, ends):
  """Return f32[B,D], the mean hidden state of the tokens start..end-1 of each row i32[B,T]."""
  tokens = jax.lax.with_sharding_constraint(tokens, sharding)
  places = jnp.arange(tokens.shape[1], dtype=jnp.int32)
  positions = jnp.broadcast_to(places, tokens.shape)
  # Padding is on the right, where a causal model's earlier states cannot see it.
  states = nnx.merge(graph, params)(tokens, positions, sharding=sharding).astype(jnp.float32)
  counted = (places >= start) & (places < ends[:, None])
  sums = jnp.sum(jnp.where(counted[..., None], states, 0.0), axis=1)
  means = sums / jnp.sum(counted, axis=1, keepdims=True)
  # Replicate the result, so that every process can read it.
  return jax.lax.with_sharding_constraint(means, NamedSharding(sharding.mesh, P()))
