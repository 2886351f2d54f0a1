"""The losses: exact targets, agreement with torch, and independence of packing and padding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from cai_jax.data import packing
from cai_jax.data.units import Example
from cai_jax.model.config import ModelConfig
from cai_jax.model.logits import LogitTransform
from cai_jax.model.transformer import abstract_model, init_params
from cai_jax.runtime.mesh import batch_sharding, make_mesh
from cai_jax.training.losses import cross_entropy, negative_log_likelihood, targets

CONFIG = ModelConfig('llama', 48, 16, 32, 2, 4, 2, 8, 64, tied_embeddings=True)
GRAPH, _ = abstract_model(CONFIG)
loss = jax.jit(functools.partial(negative_log_likelihood, GRAPH))


@pytest.fixture(scope='module')
def params():
  return init_params(CONFIG, jax.random.key(0))


def make_examples(seed: int, lengths) -> list[Example]:
  """Return random sequences whose second half is to be learned."""
  rng = np.random.default_rng(seed)
  return [
    Example(rng.integers(0, 48, n).astype(np.int32), np.arange(n) >= max(1, n // 2))
    for n in lengths
  ]


def pack_into_one_batch(examples, row_length, rows):
  steps = packing.plan([len(e.tokens) for e in examples], [packing.Bucket(row_length, rows)], 1, 0)
  assert len(steps) == 1
  return packing.Batches(examples, steps)[0]


def one_per_row(examples, length=24):
  """Return a batch with one example per row, padded on the right."""
  bucket = packing.Bucket(length, len(examples))
  return packing.Batches(
    examples, [packing.Step(bucket, tuple((i,) for i in range(len(examples))))]
  )[0]


def test_loss_agrees_with_torch(params):
  examples = make_examples(0, [12, 5, 20, 9])
  batch = one_per_row(examples)
  model_logits = _logits(params, batch)
  logits = torch.tensor(np.asarray(model_logits))[:, :-1].reshape(-1, 48)
  labels = torch.tensor(np.where(batch['loss_mask'] != 0, batch['tokens'], -100))[:, 1:]
  expected = torch.nn.functional.cross_entropy(
    logits, labels.reshape(-1).long(), ignore_index=-100, reduction='sum'
  )
  nll, sums = loss(params, batch)
  assert nll == pytest.approx(float(expected), rel=1e-5)
  assert sums['num_tokens'] == sum(int(m.sum()) for _, m, _ in examples)
  assert sums['num_sequences'] == 4


@jax.jit
def _logits(params, batch):
  model = nnx.merge(GRAPH, params)
  return model.unembed(model(batch['tokens'], batch['positions'], batch['segment_ids']))


def output_layer(rows=3, length=5):
  """Return random hidden states, table, targets and weights for a vocabulary of 11 tokens."""
  keys = jax.random.split(jax.random.key(1), 4)
  hidden = jax.random.normal(keys[0], (rows, length, 7))
  table = jax.random.normal(keys[1], (11, 7))
  targets = jax.random.randint(keys[2], (rows, length), 0, 11)
  weights = jnp.maximum(jax.random.uniform(keys[3], (rows, length)) - 0.4, 0)
  return hidden, table, targets, weights


@pytest.mark.parametrize('transform', [LogitTransform(), LogitTransform(0.5, 3.0)])
@pytest.mark.parametrize('num_slices', [1, 2, 5])
def test_the_gradient_agrees_with_automatic_differentiation(num_slices, transform):
  hidden, table, targets, weights = output_layer()
  assert 0 < (weights == 0).sum() < weights.size

  def plain(hidden, table):
    logits = hidden @ table.T / transform.divisor
    logits = logits if transform.cap is None else transform.cap * jnp.tanh(logits / transform.cap)
    log_p = jax.nn.log_softmax(logits)
    target_log_p = jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    return -0.5 * jnp.sum(target_log_p * weights)

  def ours(hidden, table):
    arrays = hidden, table, targets, weights
    return 0.5 * cross_entropy.weighted_cross_entropy(num_slices, *arrays, transform)

  for argnums in (0, 1, (0, 1)):
    actual = jax.jit(jax.value_and_grad(ours, argnums))(hidden, table)
    expected = jax.value_and_grad(plain, argnums)(hidden, table)
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-6)
    for a, b in zip(jax.tree.leaves(actual[1]), jax.tree.leaves(expected[1]), strict=True):
      np.testing.assert_allclose(a, b, atol=1e-6)
  np.testing.assert_allclose(ours(hidden, table), plain(hidden, table), rtol=1e-6)


def test_slices_without_targets_are_skipped():
  hidden, table, targets, _ = output_layer(length=8)
  weights = jnp.zeros((3, 8)).at[0, 5].set(1).at[0, 2].set(1).at[2, 7].set(1)
  # The first slice has two positions per row: those with weight, then others in their order.
  used = jnp.zeros((3, 8), bool).at[0, (2, 5)].set(True).at[1, (0, 1)].set(True)
  used = used.at[2, (7, 0)].set(True)
  hidden = jnp.where(used[..., None], hidden, jnp.nan)
  loss, grads = jax.value_and_grad(cross_entropy.weighted_cross_entropy, (1, 2))(
    4, hidden, table, targets, weights
  )
  assert jnp.isfinite(loss) and all(jnp.isfinite(g).all() for g in grads)


def test_targets_are_the_marked_tokens_of_the_same_segment():
  batch = {
    'tokens': jnp.array([[10, 11, 12, 20, 21, 22, 0, 0]]),
    'segment_ids': jnp.array([[1, 1, 1, 2, 2, 2, 0, 0]]),
    'loss_mask': jnp.array([[1, 0, 1, 1, 1, 0, 1, 1]]),
  }
  predicted, weights = targets.next_token_targets(batch)
  # Of the marked tokens, 10 and 20 are the first of their segments, and the last two are padding.
  np.testing.assert_array_equal(weights, [[0, 1, 0, 1, 0, 0, 0, 0]])
  assert predicted[0, 1] == 12 and predicted[0, 3] == 21
  assert targets.count_sequences(batch['segment_ids'], weights) == 2


def test_tokens_after_the_last_target_do_not_change_the_loss(params):
  batch = one_per_row(make_examples(1, [20]))
  nll, _ = loss(params, batch)
  padded = {**batch, 'tokens': batch['tokens'].copy()}
  padded['tokens'][0, 20:] = 7
  assert loss(params, padded)[0] == nll
  shorter = {**batch, 'loss_mask': batch['loss_mask'].copy()}
  shorter['loss_mask'][0, 15:] = 0
  changed = {**shorter, 'tokens': batch['tokens'].copy()}
  changed['tokens'][0, 15:] = (changed['tokens'][0, 15:] + 1) % 48
  assert loss(params, shorter)[0] == loss(params, changed)[0] < nll


def test_the_loss_is_the_sum_over_single_targets(params):
  batch = one_per_row(make_examples(2, [10]))
  whole, parts = loss(params, batch)[0], 0.0
  for position in np.flatnonzero(batch['loss_mask'][0]):
    mask = np.zeros_like(batch['loss_mask'])
    mask[0, position] = 1
    parts += float(loss(params, {**batch, 'loss_mask': mask})[0])
  assert parts == pytest.approx(float(whole), rel=1e-6)


# One layer is enough for the following tests: segments interact in attention only.
SMALL = dataclasses.replace(CONFIG, num_layers=1)
GRAD_GRAPH, _ = abstract_model(SMALL)
gradient = jax.jit(
  jax.value_and_grad(functools.partial(negative_log_likelihood, GRAD_GRAPH), has_aux=True)
)


@pytest.fixture(scope='module')
def small():
  return init_params(SMALL, jax.random.key(0))


def assert_agree(actual, expected):
  """Check that losses, sums and gradients are equal."""
  (nll, sums), grads = actual
  (expected_nll, expected_sums), expected_grads = expected
  assert nll == pytest.approx(float(expected_nll), rel=1e-6)
  assert sums == expected_sums
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)


def test_packed_equals_unpacked(small):
  examples = make_examples(3, [12, 5, 20, 9, 7, 16, 3, 24, 11])
  unpacked = gradient(small, one_per_row(examples))
  assert unpacked[0][1]['num_sequences'] == 9
  for row_length in (24, 40, 64):
    assert_agree(gradient(small, pack_into_one_batch(examples, row_length, rows=11)), unpacked)


# 29 is prime, so the last slice is padded.
@pytest.mark.parametrize('length', [pytest.param(24, marks=pytest.mark.slow), 29])
def test_sliced_logits_give_the_same_gradient(small, monkeypatch, length):
  batch = one_per_row(make_examples(4, [12, 20, 24]), length)
  whole = gradient(small, batch)
  for limit, slice_length in ((3 * 4 * 48, 4), (1, 1)):
    monkeypatch.setattr(cross_entropy, 'LOGITS_AT_ONCE', limit)
    jax.clear_caches()
    assert_agree(gradient(small, batch), whole)
    text = gradient.lower(small, batch).as_text()
    assert f'tensor<3x{slice_length}x48xf32>' in text and f'tensor<3x{length}x48xf32>' not in text


def test_slices_are_sized_by_the_rows_per_device(small, monkeypatch):
  batch = one_per_row(make_examples(4, [12, 20, 24, 9]))
  monkeypatch.setattr(cross_entropy, 'LOGITS_AT_ONCE', 4 * 48)
  rows = batch_sharding(make_mesh(2, 2, devices=jax.devices()[:4]))
  for sharding, slice_length in ((rows, 4), (None, 1)):
    run = functools.partial(negative_log_likelihood, GRAD_GRAPH, sharding=sharding)
    text = jax.jit(run).lower(small, batch).as_text()
    assert f'tensor<4x{slice_length}x48xf32>' in text
