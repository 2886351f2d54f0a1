"""The train step: the same parameters for any division of the work; schedule and optimizer."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cai_jax.data import packing
from cai_jax.model.sharding import path_str
from cai_jax.model.transformer import abstract_model
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.mesh import batch_sharding, make_mesh
from cai_jax.training.config import TrainConfig
from cai_jax.training.fit_config import SCHEDULES
from cai_jax.training.losses import LOSSES, Loss, negative_log_likelihood
from cai_jax.training.optimizer import (
  check_warmup,
  make_optimizer,
  make_schedule,
  weight_decay_mask,
)
from cai_jax.training.state import abstract_state, init_state
from cai_jax.training.step import is_deterministic, make_train_step, place_batch
from tests.training_setup import CONFIG, MODEL, initial_params, one_device, random_examples

GRAPH, SHAPES = abstract_model(MODEL)
EXAMPLES = random_examples()


def run_steps(config, mesh, count=4):
  """Return the state after the first `count` steps, and the metrics of each."""
  steps = packing.plan([len(e.tokens) for e in EXAMPLES], [packing.Bucket(32, 8)], 6, 0)
  batches = packing.Batches(EXAMPLES, steps)
  train_step = make_train_step(GRAPH, SHAPES, config, len(steps), mesh)
  state = init_state(initial_params(), config, mesh)
  metrics = []
  for i in range(count):
    state, step_metrics = train_step(state, place_batch(batches[i], batch_sharding(mesh)))
    metrics.append(jax.device_get(step_metrics))
  return state, metrics


@pytest.fixture(scope='module')
def four_steps():
  """Parameters and metrics of four steps on one device."""
  state, metrics = run_steps(CONFIG, one_device())
  return jax.device_get(state.params), metrics


@pytest.fixture(scope='module')
def twenty_steps():
  state, metrics = run_steps(CONFIG, one_device(), count=20)
  return jax.device_get(state.params), metrics


def assert_agree(actual, expected, tolerance=1e-5):
  (state, metrics), (expected_params, expected_metrics) = actual, expected
  for row, expected_row in zip(metrics, expected_metrics, strict=True):
    for name in expected_row:
      assert row[name] == pytest.approx(expected_row[name], rel=tolerance), name
  for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected_params), strict=True):
    np.testing.assert_allclose(a, b, atol=tolerance)


@pytest.mark.parametrize(
  'sizes',
  [(2, 2, 2)]
  + [pytest.param(size, marks=pytest.mark.slow) for size in ((8, 1, 1), (1, 8, 1), (1, 2, 4))],
)
def test_eight_devices_equal_one_after_twenty_steps(twenty_steps, sizes):
  state, metrics = run_steps(CONFIG, make_mesh(*sizes), count=20)
  assert_agree((state, metrics), twenty_steps)
  # The optimizer's moments are sharded like their parameters.
  for moments in (state.opt_state[1][0].mu, state.opt_state[1][0].nu):
    jax.tree.map(lambda m, p: m.sharding == p.sharding or pytest.fail(), moments, state.params)
  kernel = state.params['layers'][0]['mlp']['up']['kernel']
  assert kernel.addressable_shards[0].data.size * sizes[1] * sizes[2] == kernel.size


def compile_step(config, mesh):
  train_step = make_train_step(GRAPH, SHAPES, config, 4, mesh)
  shapes = abstract_state(SHAPES, config, mesh)
  names = ('tokens', 'positions', 'segment_ids', 'loss_mask')
  batch = {name: jax.ShapeDtypeStruct((8, 32), jnp.int32) for name in names}
  return train_step.lower(shapes, batch).compile().as_text()


def test_no_device_holds_the_activations_of_all_rows():
  """Rows stay sharded where parameters are: no device computes logits [8,32,48] of all rows."""
  text = compile_step(CONFIG, make_mesh(1, 8, 1))
  assert 'f32[1,32,48]' in text and 'f32[8,32,48]' not in text


def test_rematerialization_saves_memory_and_changes_no_result(four_steps):
  """Compares the shapes of residuals, since XLA on CPUs merges a computation and its repetition."""
  batch = packing.Batches(EXAMPLES, [packing.Step(packing.Bucket(32, 8), ((0,), (1,)))])[0]

  def residual_bytes(remat):
    loss = lambda p: negative_log_likelihood(GRAPH, p, batch, remat=remat)[0]  # noqa: E731
    residuals = jax.eval_shape(lambda p: jax.vjp(loss, p)[1], SHAPES)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(residuals))

  assert residual_bytes('full') < 0.9 * residual_bytes('dots')
  assert residual_bytes('dots') < 0.9 * residual_bytes('none')
  for remat in ('dots', 'full'):
    config = dataclasses.replace(CONFIG, remat=remat)
    assert_agree(run_steps(config, one_device()), four_steps)


@pytest.mark.parametrize(
  'normalization', [pytest.param('sequence', marks=pytest.mark.slow), 'token']
)
def test_accumulation_equals_one_batch(four_steps, normalization):
  config = dataclasses.replace(CONFIG, loss_normalization=normalization)
  mesh = make_mesh(2, 1, 1, devices=jax.devices()[:2])
  expected = four_steps
  if normalization == 'token':
    state, metrics = run_steps(config, one_device())
    expected = state.params, metrics
  assert_agree(run_steps(dataclasses.replace(config, accumulation=4), mesh), expected)


def test_loss_is_the_mean_over_sequences_or_tokens(four_steps):
  by_sequence = four_steps[1][0]
  config = dataclasses.replace(CONFIG, loss_normalization='token')
  _, (by_token,) = run_steps(config, one_device(), count=1)
  assert by_sequence['loss'] * by_sequence['num_sequences'] == pytest.approx(
    by_token['loss'] * by_token['num_tokens'], rel=1e-6
  )
  assert 3.5 < by_token['loss'] < 5.5  # about log 48 in a random model


def test_norms_and_biases_do_not_decay():
  params = initial_params()
  mask = {
    path_str(path): decays
    for path, decays in jax.tree_util.tree_leaves_with_path(weight_decay_mask(params))
  }
  assert mask['layers/0/attention/query/kernel'] and mask['embed/table'] and mask['head/table']
  assert not mask['layers/0/attention/query/bias']  # [N,H]: as many axes as a matrix
  assert not mask['norm/scale'] and not mask['layers/0/mlp_norm/scale']
  config = dataclasses.replace(CONFIG, warmup=0.0, schedule='constant', weight_decay=0.5)
  optimizer = make_optimizer(config, 10)
  ones = jax.tree.map(jnp.ones_like, params)
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = jax.jit(lambda p: optimizer.update(zeros, optimizer.init(p), p))(ones)
  for path, update in jax.tree_util.tree_leaves_with_path(updates):
    expected = -1e-2 * 0.5 if mask[path_str(path)] else 0.0
    np.testing.assert_allclose(update, expected, rtol=1e-6)


def test_schedules_rise_linearly_and_fall_to_their_final_value_after_the_last_step():
  def learning_rates(steps, **options):
    schedule = make_schedule(TrainConfig(learning_rate=1.0, **options), steps)
    return [float(schedule(i)) for i in range(steps)]

  np.testing.assert_allclose(learning_rates(5, schedule='constant', warmup=0.0), 1.0)
  np.testing.assert_allclose(
    learning_rates(5, schedule='linear', warmup=0.0), [1, 0.8, 0.6, 0.4, 0.2], rtol=1e-6
  )
  np.testing.assert_allclose(
    learning_rates(8, schedule='linear', warmup=0.375, final_share=0.2),
    [0.25, 0.5, 0.75, 1.0, 0.84, 0.68, 0.52, 0.36],
    rtol=1e-6,
  )
  cosine = learning_rates(5, schedule='cosine', warmup=0.0, final_share=0.5)
  expected = [0.5 + 0.5 * (1 + np.cos(np.pi * i / 5)) / 2 for i in range(5)]
  np.testing.assert_allclose(cosine, expected, rtol=1e-6)
  assert learning_rates(1, schedule='cosine', warmup=0.1) == [1.0]
  np.testing.assert_allclose(
    learning_rates(10, schedule='wsd', warmup=0.2, decay=0.4, final_share=0.2),
    [1 / 3, 2 / 3, 1, 1, 1, 1, 0.84, 0.68, 0.52, 0.36],
    rtol=1e-6,
  )
  np.testing.assert_allclose(
    learning_rates(4, schedule='wsd', warmup=0.0, decay=0.9), [1, 0.75, 0.5, 0.25], rtol=1e-6
  )


@pytest.mark.parametrize('steps', [1, 2, 3, 31, 10_000, 3_000_000])
@pytest.mark.parametrize('schedule', SCHEDULES)
def test_every_step_learns_even_the_last(schedule, steps):
  """In float32, (1 + cos x) / 2 is 0 near the end of 10,000 steps."""
  rates = make_schedule(TrainConfig(schedule=schedule, learning_rate=1e-5), steps)
  for step in {0, steps // 2, steps - 2, steps - 1} - {-1}:
    assert rates(jnp.int32(step)) > 0
  short = [float(rates(i)) for i in range(steps)] if steps == 3 else [1.0]
  assert min(short) > 0.2 * max(short)


@pytest.mark.parametrize(('warmup', 'steps'), [(0.9, 3), (0.99, 20), (0.6, 1)])
def test_a_warm_up_that_takes_all_steps_is_refused(warmup, steps):
  with pytest.raises(UserError, match=f'warmup={warmup} takes all {steps} steps'):
    check_warmup(TrainConfig(warmup=warmup), steps)
  check_warmup(TrainConfig(warmup=warmup), 100)


@pytest.mark.parametrize(
  'normalization', ['sequence', pytest.param('token', marks=pytest.mark.slow)]
)
def test_clipping_means_the_same_for_both_normalizations(normalization):
  """The gradient per token is compared with the limit, so summing over a sequence clips nothing."""
  config = dataclasses.replace(CONFIG, loss_normalization=normalization)
  _, (free,) = run_steps(dataclasses.replace(config, clip_norm=0.0), one_device(), count=1)
  per_token = free['grad_norm']
  if normalization == 'sequence':
    per_token = per_token * free['num_sequences'] / free['num_tokens']
  assert free['clipped_share'] == 0
  for limit, shares in ((1.01 * per_token, [0]), (0.05 * per_token, [1, 1, 1])):
    config = dataclasses.replace(config, clip_norm=float(limit))
    _, metrics = run_steps(config, one_device(), count=len(shares))
    assert [row['clipped_share'] for row in metrics] == shares


def test_the_optimizer_is_adamw_on_clipped_gradients():
  params = initial_params()
  config = dataclasses.replace(CONFIG, clip_norm=0.5, warmup=0.0, schedule='constant')
  grads = jax.tree.map(jnp.ones_like, params)
  norm = optax.tree.norm(grads)
  plain = make_optimizer(dataclasses.replace(config, clip_norm=0.0), 10)
  clipping = make_optimizer(config, 10)
  scaled = jax.tree.map(lambda g: g * 0.5 / norm, grads)
  actual, _ = jax.jit(lambda p: clipping.update(grads, clipping.init(p), p))(params)
  expected, _ = jax.jit(lambda p: plain.update(scaled, plain.init(p), p))(params)
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5)


def test_a_registered_loss_is_selected_by_name(four_steps, restored_registries):
  def halved(*args, **options):
    loss, sums = negative_log_likelihood(*args, **options)
    return loss / 2, sums

  LOSSES.register('halved')(Loss(halved, normalizations={'sequence': 'num_sequences'}))
  _, (metrics,) = run_steps(dataclasses.replace(CONFIG, loss='halved'), one_device(), count=1)
  assert metrics['loss'] == pytest.approx(four_steps[1][0]['loss'] / 2, rel=1e-6)
  with pytest.raises(UserError, match=r"loss_normalization='token' is not one of \('sequence',\)"):
    dataclasses.replace(CONFIG, loss='halved', loss_normalization='token')


@pytest.mark.parametrize(
  ('platform', 'settings', 'expected'),
  [
    ('cpu', dict(deterministic=False), True),
    ('gpu', dict(attention='blocks'), True),
    ('gpu', dict(attention='blocks', deterministic=False), False),
    ('gpu', dict(attention='cudnn', dtype='bfloat16'), False),
  ],
)
def test_which_train_steps_are_deterministic(platform, settings, expected):
  mesh = types.SimpleNamespace(devices=np.array([types.SimpleNamespace(platform=platform)]))
  assert is_deterministic(TrainConfig(**settings), mesh) == expected
