"""The loss of reward models: torch agrees, and packing and devices change no result."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from cai_jax.data import packing
from cai_jax.model.score_head import init_head, join_head, split_head
from cai_jax.model.transformer import abstract_model
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.mesh import batch_sharding, make_mesh
from cai_jax.training.loop import fit
from cai_jax.training.losses import LOSSES
from cai_jax.training.losses.reward import Reward, bradley_terry, last_scores
from cai_jax.training.state import init_state
from cai_jax.training.step import make_train_step, place_batch
from cai_jax.training.trainable import divide_model
from tests.preference_setup import PREFER, random_units
from tests.training_setup import MODEL, bitwise_equal, initial_params, one_device

REWARD = dataclasses.replace(PREFER, objective='reward')
DECODER = dataclasses.replace(MODEL, tied_embeddings=True)
GRAPH = abstract_model(DECODER)[0]
OPTIONS = {'centering': 0.1, 'margins': True}


def make_params():
  """Return a random reward model whose scores are of the size of 1."""
  head = {'table': 50 * init_head(16, jax.random.key(1))['table']}
  return join_head({k: x for k, x in initial_params().items() if k != 'head'}, head)


def make_units(count=24):
  """Return random comparisons with margins of both signs."""
  draw = np.random.default_rng(5)
  margins = draw.normal(size=count)
  return [
    unit._replace(values={**unit.values, 'margin': (m, -m)})
    for unit, m in zip(random_units(count), margins, strict=True)
  ]


UNITS = make_units()
RNG = np.random.default_rng(0)
SCORES = {name: RNG.normal(size=40).astype(np.float32) * 3 for name in ('chosen', 'rejected')}
LABELS = RNG.uniform(size=40).astype(np.float32)
MARGINS = RNG.normal(size=40).astype(np.float32)


def torch_loss(chosen, rejected, probability, margin, centering):
  """Return the loss with torch's binary cross-entropy, which has its own stable form."""
  loss = torch.nn.functional.binary_cross_entropy_with_logits
  lead = loss(chosen - rejected - margin, probability, reduction='none')
  return lead + centering * (chosen + rejected) ** 2


def test_the_loss_and_its_gradient_agree_with_torch():
  chosen, rejected = (torch.tensor(SCORES[name], requires_grad=True) for name in SCORES)
  rest = torch.tensor(LABELS), torch.tensor(MARGINS)
  expected = torch_loss(chosen, rejected, *rest, 0.1)
  expected.sum().backward()
  actual, pull_back = jax.vjp(
    lambda c, r: bradley_terry(c, r, LABELS, MARGINS, 0.1), *SCORES.values()
  )
  np.testing.assert_allclose(actual, expected.detach(), rtol=1e-5, atol=1e-6)
  for gradient, tensor in zip(pull_back(jnp.ones(40)), (chosen, rejected), strict=True):
    np.testing.assert_allclose(gradient, tensor.grad, rtol=1e-5, atol=1e-6)


def test_the_loss_is_the_same_with_the_sides_swapped_and_finite_far_out():
  chosen, rejected = SCORES.values()
  swapped = bradley_terry(rejected, chosen, 1 - LABELS, -MARGINS, 0.1)
  np.testing.assert_allclose(
    bradley_terry(chosen, rejected, LABELS, MARGINS, 0.1), swapped, rtol=1e-5
  )
  equal = bradley_terry(jnp.zeros(2), jnp.zeros(2), jnp.array([1.0, 0.3]))
  np.testing.assert_allclose(equal, np.log(2), rtol=1e-6)
  far = bradley_terry(jnp.array([1e4, -1e4]), jnp.zeros(2), jnp.ones(2))
  np.testing.assert_allclose(far, [0, 1e4])


def test_the_score_is_that_of_the_last_token_of_each_segment():
  segments = jnp.array([[1, 1, 2, 3, 3, 0], [1, 2, 2, 2, 2, 2], [0, 0, 0, 0, 0, 0]])
  scores = jnp.arange(1.0, 19.0).reshape(3, 6)
  expected = [[2, 3, 5, 0, 0, 0], [7, 12, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]]
  np.testing.assert_array_equal(last_scores(scores, segments), expected)


@jax.jit
def batch_loss(params, batch):
  return LOSSES['reward'].function(GRAPH, params, batch, settings=Reward(**OPTIONS))


@jax.jit
def scores_of_rows(params, tokens, lengths):
  """Return the score of each row, which holds one response and padding after it."""
  rest, head = split_head(params)
  hidden = nnx.merge(GRAPH, rest)(tokens, jnp.broadcast_to(jnp.arange(48), tokens.shape))
  return hidden[jnp.arange(len(tokens)), lengths - 1] @ head['table'][0]


def test_packed_comparisons_have_the_loss_of_unpacked_ones():
  params, units = make_params(), UNITS[:8]
  steps = packing.plan([unit.length for unit in units], [packing.Bucket(96, 4)], 1, 0)
  packed = packing.Batches(units, steps)[0]
  assert len(steps) == 1 and packed['segment_ids'].max() > 4
  loss, sums = batch_loss(params, packed)
  responses = [unit.segments[side].tokens for side in (0, 1) for unit in units]
  rows = np.stack([np.pad(tokens, (0, 48 - len(tokens))) for tokens in responses])
  scores = np.asarray(scores_of_rows(params, rows, np.array([len(x) for x in responses])))
  values = (torch.tensor([u.values[name][0] for u in units]) for name in ('probability', 'margin'))
  expected = torch_loss(torch.tensor(scores[:8]), torch.tensor(scores[8:]), *values, 0.1)
  assert float(loss) == pytest.approx(float(expected.sum()), rel=1e-5)
  assert sums['num_comparisons'] == 8
  assert float(sums['chosen_reward']) == pytest.approx(float(scores[:8].sum()), rel=1e-4)


def test_a_head_of_zeros_starts_at_log_2_and_moves_no_decoder():
  """So the head of a new reward model is random: its decoder learns from the first step on."""
  steps = [packing.Step(packing.Bucket(96, 8), tuple((i,) for i in range(8)))]
  batch = packing.Batches(UNITS, steps)[0]
  settings = Reward()

  def loss(params):
    return LOSSES['reward'].function(GRAPH, params, batch, settings=settings)[0] / 8

  params = make_params()
  compute, zeros = jax.jit(jax.value_and_grad(loss)), jnp.zeros_like(params['score']['table'])
  for table, is_random in ((params['score']['table'], True), (zeros, False)):
    value, gradient = compute(join_head(split_head(params)[0], {'table': table}))
    rest, head = split_head(gradient)
    assert (float(value) == pytest.approx(np.log(2), rel=1e-6)) == (not is_random)
    assert any(np.asarray(x).any() for x in jax.tree.leaves(rest)) == is_random
    assert np.asarray(head['table']).any()


def test_no_logits_of_the_vocabulary_are_computed():
  batch = packing.Batches(UNITS, [packing.Step(packing.Bucket(56, 1), ((0,),))])[0]
  program = jax.make_jaxpr(jax.grad(lambda *args: batch_loss(*args)[0]))(make_params(), batch)
  assert '56,16' in str(program) and '56,48]' not in str(program)


def run_steps(config, mesh, count=3):
  """Return the trained parameters after some steps, and the metrics of the last one."""
  divided = divide_model(DECODER, jax.device_get(make_params()), config, mesh)
  steps = packing.plan([u.length for u in UNITS], [packing.Bucket(48, 8)], 4, 0)
  batches = packing.Batches(UNITS, steps)
  step = make_train_step(divided.graph, divided.params, config, len(steps), mesh, divided.frozen)
  state = init_state(divided.params, config, mesh)
  state = dataclasses.replace(state, frozen=divided.frozen)
  for i in range(count):
    state, metrics = step(state, place_batch(batches[i], batch_sharding(mesh)))
  return jax.device_get(divided.full_params(state)), jax.device_get(metrics)


@pytest.mark.parametrize(
  'changes', [{}, pytest.param({'lora_rank': 2}, marks=pytest.mark.slow)], ids=['all', 'adapters']
)
def test_eight_devices_and_micro_batches_train_as_one_batch(changes):
  config = dataclasses.replace(REWARD, options=tuple(OPTIONS.items()), **changes)
  expected, metrics = run_steps(config, one_device())
  divided = dataclasses.replace(config, accumulation=2)
  actual, other_metrics = run_steps(divided, make_mesh(2, 2, 2))
  for name in metrics:
    assert metrics[name] == pytest.approx(other_metrics[name], rel=1e-4), name
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), actual, expected)
  assert not np.array_equal(actual['score']['table'], make_params()['score']['table'])


@pytest.mark.parametrize('rank', [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_resumed_run_ends_with_the_same_head(rank, tmp_path):
  config = dataclasses.replace(REWARD, ema=0.9, lora_rank=rank, checkpoint_every=1)
  mesh, initial = one_device(), jax.device_get(make_params())
  run = lambda: fit(DECODER, initial, UNITS, config, mesh, tmp_path, init_id='x')  # noqa: E731
  params, summary = run()
  shutil.rmtree(tmp_path / 'checkpoints' / str(summary['steps']))  # as if it had been killed
  again, resumed = run()
  assert bitwise_equal(params, again) and resumed['resumed_at'] == summary['steps'] - 1
  rest, head = split_head(params)
  assert jax.tree.structure(rest) == jax.tree.structure(split_head(initial)[0])
  assert not np.array_equal(head['table'], initial['score']['table'])
  if rank:  # all but the adapted kernels and the head is frozen
    np.testing.assert_array_equal(rest['embed']['table'], initial['embed']['table'])


def test_wrong_starts_and_options_are_refused(tmp_path):
  mesh, params = one_device(), make_params()
  with pytest.raises(UserError, match="'reward' trains a head, and a language model has none"):
    fit(MODEL, initial_params(), UNITS, REWARD, mesh, tmp_path)
  dpo = dataclasses.replace(REWARD, objective='simpo' if 'simpo' in LOSSES else 'dpo')
  with pytest.raises(UserError, match='has no logits'):
    divide_model(DECODER, params, dpo, mesh)
  for value in (-0.1, float('nan'), 'x'):
    with pytest.raises(UserError, match='centering'):
      dataclasses.replace(REWARD, options=(('centering', value),))
  with pytest.raises(UserError, match="pair 0 has no value 'margin', which the objective needs"):
    config = dataclasses.replace(REWARD, options=(('margins', True),))
    fit(DECODER, params, random_units(8), config, mesh, tmp_path / 'run')
