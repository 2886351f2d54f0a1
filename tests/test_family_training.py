"""Every family's training agrees with torch, and eight devices train as one does."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest
import torch

import cai_jax
from cai_jax.data import packing
from cai_jax.data.units import Example
from cai_jax.model.sharding import flatten_params
from cai_jax.model.transformer import abstract_model
from cai_jax.runtime.mesh import batch_sharding, make_mesh
from cai_jax.training.config import TrainConfig
from cai_jax.training.state import init_state
from cai_jax.training.step import make_train_step, place_batch
from tests.families import REPEATED, SIMILAR, load_in_torch, mark_slow

# Adam divides a tiny gradient by its own size, which would turn rounding errors into whole steps.
# A larger eps keeps them small, so parameters can be compared.
CONFIG = TrainConfig(
  attention='blocks',
  batch_size=8,
  max_length=48,
  learning_rate=6e-3,
  schedule='linear',
  warmup=0.3,
  weight_decay=0.1,
  eps=1e-2,
)
STEPS = 10


@pytest.fixture(params=mark_slow(REPEATED + SIMILAR))
def family(request) -> str:
  """Each key of FAMILIES in turn."""
  return request.param


@functools.cache
def plan_steps():
  """Return examples and the first steps: packed rows, of which the second half of a text counts."""
  rng = np.random.default_rng(0)
  examples = [
    Example(rng.integers(4, 300, n).astype(np.int32), np.arange(n) >= n // 2)
    for n in rng.integers(8, 40, 180)
  ]
  plan = packing.plan([len(e.tokens) for e in examples], [packing.Bucket(48, 8)], 1, 0)
  assert len(plan) >= STEPS
  return examples, plan[:STEPS]


def torch_loss(model, examples):
  """Return -1/N Σ log P(y_i | x_i) of examples padded on the right, and mean tokens of y_i."""
  longest = max(len(e.tokens) for e in examples)
  tokens, labels, seen = np.zeros((3, len(examples), longest), np.int64)
  labels[:] = -100
  for row, e in enumerate(examples):
    n = len(e.tokens)
    tokens[row, :n], seen[row, :n] = e.tokens, 1
    labels[row, :n] = np.where(e.loss_mask, e.tokens, -100)
  tokens, labels, seen = map(torch.tensor, (tokens, labels[:, 1:], seen))
  logits = model(tokens, attention_mask=seen).logits[:, :-1]
  nll = torch.nn.functional.cross_entropy(
    logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), reduction='sum'
  )
  return nll / len(examples), float((labels >= 0).sum()) / len(examples)


def learning_rate(number):
  """Return the factor of the learning rate in a step: it rises in 3 steps and falls linearly."""
  warmup = round(CONFIG.warmup * STEPS)
  return min((number + 1) / (warmup + 1), (STEPS - number) / (STEPS - warmup))


def train_in_torch(folder, clip_norm):
  """Return the losses of clipped AdamW, the gradients' norms, and the loss without training.

  Losses are those before each step, norms those per token, and the last value is the untrained
  model's loss on the last batch.

  Args:
    folder: the model's folder.
    clip_norm: largest norm of the gradient per token, or None.
  """
  model = load_in_torch(folder)
  decays = lambda name, p: p.ndim >= 2 and not name.endswith('bias')  # noqa: E731
  groups = [
    {'params': [p for name, p in model.named_parameters() if decays(name, p)], 'weight_decay': 0.1},
    {'params': [p for name, p in model.named_parameters() if not decays(name, p)]},
  ]
  options = dict(lr=CONFIG.learning_rate, betas=(CONFIG.b1, CONFIG.b2), eps=CONFIG.eps)
  optimizer = torch.optim.AdamW(groups, weight_decay=0.0, **options)
  examples, plan = plan_steps()
  batches = [[examples[i] for row in step.rows for i in row] for step in plan]
  with torch.no_grad():
    untrained = float(torch_loss(model, batches[-1])[0])
  losses, norms = [], []
  for number, batch in enumerate(batches):
    for group in optimizer.param_groups:
      group['lr'] = CONFIG.learning_rate * learning_rate(number)
    loss, tokens_per_sequence = torch_loss(model, batch)
    optimizer.zero_grad()
    loss.backward()
    limit = math.inf if clip_norm is None else clip_norm * tokens_per_sequence
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), limit))
    norms.append(norm / tokens_per_sequence)
    optimizer.step()
    losses.append(float(loss.detach()))
  return losses, np.array(norms), untrained


def train(lm, config, steps):
  """Return the losses of our train step, and the parameters after the first step."""
  graph, shapes = abstract_model(lm.config)
  train_step = make_train_step(graph, shapes, config, STEPS, lm.mesh)
  examples, plan = plan_steps()
  batches = packing.Batches(examples, plan)
  state = init_state(jax.tree.map(lambda x: x.copy(), lm.params), config, lm.mesh)
  losses, first = [], None
  for i in range(steps):
    state, metrics = train_step(state, place_batch(batches[i], batch_sharding(lm.mesh)))
    losses.append(float(metrics['loss']))
    if i == 0:
      first = jax.device_get(flatten_params(state.params))
  return losses, first


@pytest.fixture(scope='module')
def trained(load, tiny_hf_folder):
  """`trained(family)` returns the config, torch's results, our losses and first parameters.

  The gradients of some steps are clipped and those of others are not.
  """
  cached = {}

  def get(family):
    if family not in cached:
      folder = tiny_hf_folder(family)
      _, norms, _ = train_in_torch(folder, None)
      config = dataclasses.replace(CONFIG, clip_norm=float(np.median(norms)))
      theirs, norms, untrained = train_in_torch(folder, config.clip_norm)
      assert 0 < (norms > config.clip_norm).sum() < STEPS
      assert abs(theirs[-1] / untrained - 1) > 0.02  # so a wrong update would show
      cached[family] = config, theirs, *train(load(family), config, STEPS)
    return cached[family]

  return get


def test_ten_losses_agree_with_torch(trained, family):
  _, theirs, ours, _ = trained(family)
  np.testing.assert_allclose(ours, theirs, rtol=1e-4)


@pytest.mark.slow
def test_eight_devices_train_as_one(trained, load, tiny_hf_folder, family):
  """Data, rows of parameters and channels are split."""
  config, _, losses, expected = trained(family)
  tensor = math.gcd(2, load(family).config.num_kv_heads)
  lm = cai_jax.load(tiny_hf_folder(family), mesh=make_mesh(2, 4 // tensor, tensor))
  (loss,), params = train(lm, config, 1)
  assert loss == pytest.approx(losses[0], rel=1e-5)
  before = flatten_params(load(family).params)
  for path, value in params.items():
    np.testing.assert_allclose(value, expected[path], atol=1e-5)
  assert any(np.abs(value - before[path]).max() > 1e-4 for path, value in params.items())
