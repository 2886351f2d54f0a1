"""The head of a reward model: a linear layer [C,D] over the hidden states, without a bias.

It has the form of the head of transformers' `...ForSequenceClassification`. A tree of parameters
holds it under the key 'score', next to the decoder's parameters, so an optimizer, a moving average
and a checkpoint treat it like any other parameter. The decoder does not use it: `split_head` takes
it out before `nnx.merge`.
"""

import jax

from cai_jax.model.precision import einsum_f32
from cai_jax.model.transformer import Params

HEAD = 'score'
INITIAL_STD = 0.02  # transformers' default of `initializer_range`


def init_head(d_model: int, key: jax.Array) -> Params:
  """Draw the head of a reward model with one score: normal with standard deviation 0.02.

  This is what transformers draws. A head of zeros would also do, but a change of the decoder moves
  a score only as far as the head is large, and AdamW changes an entry of the head by about one
  learning rate a step: at 1e-5, a head that starts at zero needs 2,000 steps to reach 0.02.

  Args:
    d_model: D.
    key: a JAX random key.

  Returns:
    {'table': f32[1,D]}.
  """
  return {'table': INITIAL_STD * jax.random.normal(key, (1, d_model))}


def join_head(params: Params, head: Params) -> Params:
  """Return the parameters of a decoder with a head beside them.

  Args:
    params: the decoder's parameters.
    head: {'table': [C,D]}.
  """
  return {**params, HEAD: head}


def split_head(params: Params) -> tuple[Params, Params]:
  """Split parameters into those of the decoder and the head; the inverse of `join_head`.

  Args:
    params: parameters with a head.
  """
  return {key: x for key, x in params.items() if key != HEAD}, params[HEAD]


def score_states(hidden: jax.Array, table: jax.Array) -> jax.Array:
  """Return the scores f32[...,C] of hidden states.

  Args:
    hidden: [B,D] or [B,T,D], after the last norm. Its dtype is the compute dtype.
    table: [C,D].
  """
  axes = 'BTD'[: hidden.ndim - 1] + 'D'
  return einsum_f32(f'{axes},CD->{axes[:-1]}C', hidden, table.astype(hidden.dtype))
