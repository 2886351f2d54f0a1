"""The load-balancing loss: as in transformers, and the same for any division of the work."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
import torch

import cai_jax
from cai_jax.data import packing
from cai_jax.data.units import Example
from cai_jax.model.config import Experts
from cai_jax.model.sharding import flatten_params
from cai_jax.model.transformer import abstract_model, init_params
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.mesh import batch_sharding, make_mesh
from cai_jax.training import loop
from cai_jax.training.config import TrainConfig
from cai_jax.training.losses import LOSSES, ROUTING, Loss, negative_log_likelihood
from cai_jax.training.losses.balance import balance_loss, usage_metrics
from cai_jax.training.state import abstract_state, init_state
from cai_jax.training.step import make_train_step, place_batch
from tests.families import load_in_torch
from tests.training_setup import CONFIG, MODEL, one_device, random_examples, read_rows

EXPERTS = Experts(4, 2, 24, dense_layers=(1,))
MIXTURE = dataclasses.replace(MODEL, num_layers=3, experts=EXPERTS)
GRAPH, SHAPES = abstract_model(MIXTURE)
BALANCED = dataclasses.replace(CONFIG, balance_loss=0.5)
EXAMPLES = random_examples()
LENGTHS = (11, 16, 7)


def padded_batch(vocab_size=300):
  tokens = np.random.default_rng(0).integers(4, vocab_size, (3, 16)).astype(np.int32)
  real = np.arange(16) < np.array(LENGTHS)[:, None]
  positions = np.broadcast_to(np.arange(16, dtype=np.int32), real.shape)
  segments = real.astype(np.int32)
  return {'tokens': tokens, 'positions': positions, 'segment_ids': segments, 'loss_mask': segments}


@pytest.mark.parametrize(
  'family',
  [
    'mixtral',
    'gpt_oss',
    *(pytest.param(x, marks=pytest.mark.slow) for x in ('qwen3_moe', 'olmoe')),
  ],
)
def test_value_and_gradient_are_those_of_transformers(load, tiny_hf_folder, tmp_path, family):
  """A model whose weights are torch's gradients gives these gradients in our layout."""
  batch, folder = padded_batch(), tiny_hf_folder(family)
  model = load_in_torch(folder)
  tokens, seen = (
    torch.tensor(batch[name], dtype=torch.int64) for name in ('tokens', 'segment_ids')
  )
  theirs = model(tokens, attention_mask=seen, output_router_logits=True).aux_loss
  theirs.backward()
  with torch.no_grad():
    for weight in model.parameters():
      weight.copy_(torch.zeros_like(weight) if weight.grad is None else weight.grad)
  model.save_pretrained(tmp_path / family)
  lm = load(family)
  graph = abstract_model(lm.config)[0]

  def loss(params):
    routing = negative_log_likelihood(graph, params, batch)[1][ROUTING]
    return balance_loss(routing, routing)

  ours, gradient = jax.jit(jax.value_and_grad(loss))(lm.params)
  assert float(ours) == pytest.approx(float(theirs.detach()), rel=1e-5)
  for name in ('tokenizer.json', 'tokenizer_config.json', 'chat_template.jinja'):
    if (folder / name).exists():
      (tmp_path / family / name).write_bytes((folder / name).read_bytes())
  expected = flatten_params(cai_jax.load(tmp_path / family, mesh=lm.mesh).params)
  for path, values in flatten_params(gradient).items():
    size = np.abs(expected[path]).max()
    np.testing.assert_allclose(values, expected[path], atol=1e-4 * size + 1e-7, err_msg=path)
  assert np.abs(gradient['layers'][2]['mlp']['router']['kernel']).max() > 1e-3


def run_steps(config, mesh, count=4, examples=EXAMPLES, packed=6):
  """Return the parameters after `count` steps, and the metrics of each."""
  steps = packing.plan([len(e.tokens) for e in examples], [packing.Bucket(32, 8)], packed, 0)
  batches = packing.Batches(examples, steps)
  train_step = make_train_step(GRAPH, SHAPES, config, len(steps), mesh)
  state = init_state(init_params(MIXTURE, jax.random.key(0)), config, mesh)
  metrics = []
  for i in range(count):
    state, row = train_step(state, place_batch(batches[i], batch_sharding(mesh)))
    metrics.append(jax.device_get(row))
  return jax.device_get(state.params), metrics


@pytest.fixture(scope='module')
def four_steps():
  return run_steps(BALANCED, one_device())


def assert_agree(actual, expected, tolerance=1e-5):
  for row, expected_row in zip(actual[1], expected[1], strict=True):
    assert row.keys() == expected_row.keys()
    for name in row:
      assert row[name] == pytest.approx(expected_row[name], rel=tolerance), name
  ours, theirs = flatten_params(actual[0]), flatten_params(expected[0])
  for path in theirs:
    np.testing.assert_allclose(ours[path], theirs[path], atol=tolerance, err_msg=path)


@pytest.mark.parametrize(
  'normalization', ['sequence', pytest.param('token', marks=pytest.mark.slow)]
)
def test_micro_batches_equal_one_batch(four_steps, normalization):
  """Each needs the use of experts in all of them."""
  config = dataclasses.replace(BALANCED, loss_normalization=normalization)
  expected = four_steps if normalization == 'sequence' else run_steps(config, one_device())
  mesh = make_mesh(2, devices=jax.devices()[:2])
  assert_agree(run_steps(dataclasses.replace(config, accumulation=4), mesh), expected)


@pytest.mark.slow
@pytest.mark.parametrize('shape', [(2, 1, 1, 4), (1, 2, 2, 2), (2, 2, 1, 2)])
@pytest.mark.parametrize('accumulation', [1, 2])
def test_eight_devices_equal_one(four_steps, shape, accumulation):
  """Axes are data, fsdp, tensor and expert."""
  *sizes, expert = shape
  config = dataclasses.replace(BALANCED, accumulation=accumulation)
  assert_agree(run_steps(config, make_mesh(*sizes, expert=expert)), four_steps)


def test_packing_changes_nothing():
  """Eight examples, two in a row and each in a row of its own."""
  examples = [Example(e.tokens[:16], e.loss_mask[:16]) for e in random_examples(8)]
  together = packing.Step(packing.Bucket(32, 8), tuple((2 * i, 2 * i + 1) for i in range(4)))
  apart = packing.Step(packing.Bucket(32, 8), tuple((i,) for i in range(8)))
  params = init_params(MIXTURE, jax.random.key(0))

  def loss(params, batch):
    routing = negative_log_likelihood(GRAPH, params, batch)[1][ROUTING]
    return balance_loss(routing, routing), routing.counts

  compute = jax.jit(jax.value_and_grad(loss, has_aux=True))
  (ours, gradient), (theirs, expected) = (
    compute(params, packing.Batches(examples, [step])[0]) for step in (together, apart)
  )
  assert float(ours[0]) == pytest.approx(float(theirs[0]), rel=1e-6)
  np.testing.assert_array_equal(ours[1], theirs[1])
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradient, expected)


def test_metrics_describe_the_use_of_experts():
  batch = packing.Batches(EXAMPLES, [packing.Step(packing.Bucket(32, 8), ((0,), (1,)))])[0]
  params = init_params(MIXTURE, jax.random.key(0))
  params = jax.tree_util.tree_map_with_path(
    lambda path, x: x * 0 if 'router' in str(path) else x, params
  )
  routing = jax.jit(lambda params: negative_log_likelihood(GRAPH, params, batch)[1][ROUTING])(
    params
  )
  tokens = len(EXAMPLES[0].tokens) + len(EXAMPLES[1].tokens)
  # Equal logits choose the first experts, with probabilities of a fourth.
  np.testing.assert_array_equal(routing.counts, [[tokens, tokens, 0, 0]] * 2)
  np.testing.assert_allclose(routing.probabilities, tokens / 4)
  np.testing.assert_array_equal(routing.tokens, tokens)
  metrics = usage_metrics(routing)
  assert float(metrics['expert_balance']) == pytest.approx(2) and metrics['busiest_expert'] == 1


@pytest.mark.parametrize(
  'normalization', [pytest.param('sequence', marks=pytest.mark.slow), 'token']
)
def test_a_step_adds_the_loss_whatever_divides_the_other_one(normalization):
  """The reported loss is without it."""
  config = dataclasses.replace(BALANCED, loss_normalization=normalization)
  _, (row,) = run_steps(config, one_device(), count=1)
  steps = packing.plan([len(e.tokens) for e in EXAMPLES], [packing.Bucket(32, 8)], 6, 0)
  batch = packing.Batches(EXAMPLES, steps)[0]
  divisor = {'sequence': 'num_sequences', 'token': 'num_tokens'}[normalization]

  def objective(params):
    loss, sums = negative_log_likelihood(GRAPH, params, batch, attention='blocks')
    loss = loss / sums[divisor]
    return loss + 0.5 * balance_loss(sums[ROUTING], sums[ROUTING]), loss

  gradient, loss = jax.jit(jax.grad(objective, has_aux=True))(
    init_params(MIXTURE, jax.random.key(0))
  )
  assert float(loss) == pytest.approx(row['loss'], rel=1e-5)
  assert float(optax.tree.norm(gradient)) == pytest.approx(row['grad_norm'], rel=1e-5)


def test_runs_without_the_loss_log_the_use_of_experts_and_dense_models_refuse_it(tmp_path):
  params = init_params(MIXTURE, jax.random.key(0))
  config = dataclasses.replace(CONFIG, epochs=1)
  loop.fit(MIXTURE, params, EXAMPLES, config, one_device(), tmp_path / 'run')
  for row in read_rows(tmp_path / 'run'):
    assert row['expert_balance'] > 1.9 and 0.5 <= row['busiest_expert'] <= 1
  with pytest.raises(UserError, match='balance_loss=0.5 is for mixtures of experts, but The model'):
    loop.fit(MODEL, params, EXAMPLES, BALANCED, one_device(), tmp_path / 'dense')


def test_a_loss_that_says_nothing_about_experts_is_refused(restored_registries):
  def plain(*args, **options):
    loss, sums = negative_log_likelihood(*args, **options)
    return loss, {name: x for name, x in sums.items() if name != ROUTING}

  LOSSES.register('plain')(Loss(plain, normalizations={'sequence': 'num_sequences'}))
  with pytest.raises(UserError, match=r"train.loss='plain' does not. .* one of \['nll'\]"):
    TrainConfig(loss='plain', balance_loss=0.01)
  with pytest.raises(UserError, match='train.balance_loss=-1 must be at least 0'):
    TrainConfig(balance_loss=-1)
  config = dataclasses.replace(CONFIG, loss='plain')
  train_step = make_train_step(GRAPH, SHAPES, config, 4, one_device())
  batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in padded_batch().items()}
  _, metrics = jax.eval_shape(train_step, abstract_state(SHAPES, config, one_device()), batch)
  assert 'loss' in metrics and 'expert_balance' not in metrics
