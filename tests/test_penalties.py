"""Penalties and biases equal those of transformers, and each row depends on itself alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor

from cai_jax.runtime.errors import UserError
from cai_jax.sampling.noise import token_keys
from cai_jax.sampling.penalties import Penalties, add_tokens, count_drafts, count_tokens, penalize
from cai_jax.sampling.sample import sample
from cai_jax.sampling.types import MAX_BIASES, SamplingConfig

VOCAB, LENGTH, CONTEXT, REPLY = 300, 40, 20, 12
SETTINGS = [
  {},
  {'repetition_penalty': 1.3},
  {'repetition_penalty': 0.7},
  {'presence_penalty': 0.9},
  {'frequency_penalty': -0.4},
  {'logit_bias': ((0, 2.5), (7, -100.0), (299, 1.0))},
  {
    'repetition_penalty': 1.5,
    'presence_penalty': 1.0,
    'frequency_penalty': 0.5,
    'logit_bias': ((3, -1.0),),
  },
]


@pytest.fixture(scope='module')
def rows():
  """Return logits f32[N,V] and tokens i32[N,CONTEXT+REPLY], one row for each of SETTINGS."""
  rng = np.random.default_rng(0)
  logits = rng.normal(0, 3, (len(SETTINGS), VOCAB)).astype(np.float32)
  return logits, rng.integers(0, 50, (len(SETTINGS), CONTEXT + REPLY)).astype(np.int32)


def adjusted(logits, tokens, settings, later=0, drafted=0):
  """Return logits after penalties, where some tokens are counted after those that are known.

  Args:
    logits: f32[N,V].
    tokens: i32[N,CONTEXT+REPLY].
    settings: the settings of each row.
    later: how many of the last tokens are counted one by one.
    drafted: how many of those are a draft.
  """
  penalties = Penalties.off(len(logits))
  for slot, own in enumerate(settings):
    penalties.start(slot, SamplingConfig(**own))
  text = np.full((len(logits), LENGTH), 8, np.int32)  # of an earlier turn
  text[:, : CONTEXT + REPLY] = tokens
  known = np.full(len(logits), REPLY - later, np.int32)
  return np.array(
    ADJUST(logits, penalties, text, known, tokens[:, CONTEXT + REPLY - later :], drafted)
  )


@functools.partial(jax.jit, static_argnums=5)
def ADJUST(logits, penalties, text, known, later, drafted):
  counts = count_tokens(text, CONTEXT + known - 1, known, VOCAB)
  taken = jnp.arange(later.shape[1]) < later.shape[1] - drafted
  counts = add_tokens(counts, later, jnp.broadcast_to(taken, later.shape))
  counts = count_drafts(counts, later[:, later.shape[1] - drafted :])
  return penalize(logits, penalties, jax.tree.map(lambda x: x[:, drafted], counts))


def expected(logits, tokens, own):
  """Return the logits of one row by transformers, and by OpenAI's formula, which it lacks."""
  scores, ids = torch.tensor(logits[None]), torch.tensor(tokens[None]).long()
  if biases := own.get('logit_bias'):
    scores = SequenceBiasLogitsProcessor([[[t], b] for t, b in biases])(ids, scores)
  if penalty := own.get('repetition_penalty'):
    scores = RepetitionPenaltyLogitsProcessor(penalty)(ids, scores)
  counts = np.bincount(tokens[CONTEXT:], minlength=VOCAB)
  frequency, presence = own.get('frequency_penalty', 0.0), own.get('presence_penalty', 0.0)
  return scores.numpy()[0] - np.float32(frequency) * counts - np.float32(presence) * (counts > 0)


@pytest.mark.parametrize(('later', 'drafted'), [(0, 0), (5, 0), (5, 3)])
def test_penalties_and_biases_equal_those_of_transformers(rows, later, drafted):
  result = adjusted(*rows, SETTINGS, later, drafted)
  for logits, tokens, own, row in zip(*rows, SETTINGS, result, strict=True):
    np.testing.assert_allclose(row, expected(logits, tokens, own), rtol=1e-6, atol=1e-6)
  assert (result[0] == rows[0][0]).all()  # neutral settings change no bit


def test_each_row_is_changed_by_its_own_settings_alone(rows):
  together = adjusted(*rows, SETTINGS)
  for index in (2, 5, 6):
    alone = adjusted(*(x[index : index + 1] for x in rows), SETTINGS[index : index + 1])
    assert (alone[0] == together[index]).all()


def test_tokens_follow_the_changed_logits_and_log_probabilities_the_model(rows):
  logits, tokens = rows
  changed = adjusted(logits, tokens, SETTINGS)
  count = len(logits)
  keys = token_keys(jnp.tile(jnp.array([[1, 2]], jnp.uint32), (count, 1)), jnp.arange(count))
  settings = jnp.zeros(count).at[::2].set(0.8), jnp.zeros(count, int), jnp.ones(count)
  settings = *settings, jnp.zeros(count)
  drawn, logprobs = jax.jit(sample)(logits, keys, *settings, changed)
  plain, plain_logprobs = jax.jit(sample)(logits, keys, *settings)
  assert drawn[0] == plain[0] and logprobs[0] == plain_logprobs[0]  # this row has no penalty
  assert (np.array(drawn)[1::2] == changed.argmax(-1)[1::2]).all()
  assert (np.array(drawn) == np.array(jax.jit(sample)(changed, keys, *settings)[0])).all()
  model = torch.log_softmax(torch.tensor(logits).double(), -1).numpy()
  np.testing.assert_allclose(logprobs, model[np.arange(count), drawn], rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize(
  'settings',
  [
    {'min_p': -0.1},
    {'min_p': 1.5},
    {'repetition_penalty': 0.0},
    {'presence_penalty': 2.5},
    {'frequency_penalty': -3.0},
    {'logit_bias': ((-1, 1.0),)},
    {'logit_bias': ((1, 101.0),)},
    {'logit_bias': ((1, 1.0), (1, 2.0))},
    {'logit_bias': tuple((i, 1.0) for i in range(MAX_BIASES + 1))},
  ],
)
def test_values_out_of_range_are_refused(settings):
  with pytest.raises(UserError, match=f'sampling: {next(iter(settings))}=.* must be '):
    SamplingConfig(**settings)


def test_a_bias_on_a_token_beyond_the_vocabulary_is_refused():
  SamplingConfig(logit_bias=((9, 1.0),)).check_vocabulary(10, 'here')
  with pytest.raises(UserError, match='here: logit_bias names token 10, .* 0 to 9'):
    SamplingConfig(logit_bias=((10, 1.0),)).check_vocabulary(10, 'here')
