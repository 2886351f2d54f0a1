"""Long rows: tokens of a row that are split over devices, and attention without large arrays."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx

from cai_jax.data import packing
from cai_jax.data.units import Example
from cai_jax.model import transformer
from cai_jax.model.attention import softmax
from cai_jax.model.attention.kernels import blockwise
from cai_jax.model.attention.scores import PLAIN
from cai_jax.model.attention.sequence import check_sequence
from cai_jax.model.config import DeltaRule, Experts, ModelConfig
from cai_jax.model.transformer import abstract_model, init_params
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.mesh import join_sequence, make_mesh, place, token_sharding
from cai_jax.training.losses import LOSSES
from cai_jax.training.losses.logprobs import sequence_logprobs

LENGTH = 64
SHAPE = dict(vocab_size=48, d_model=16, d_ff=32, num_layers=2, num_heads=8, num_kv_heads=2)
MODEL = ModelConfig('qwen2', **SHAPE, head_dim=4, max_positions=LENGTH, windows=(None, 9))
ONE_LAYER = dataclasses.replace(MODEL, num_layers=1, windows=())
MODELS = {
  'windows': MODEL,
  'cap and sinks': dataclasses.replace(MODEL, attention_cap=5.0, query_scale=0.3, sinks=True),
  'experts': dataclasses.replace(MODEL, experts=Experts(4, 2, 16)),
  'delta rule': dataclasses.replace(MODEL, windows=(), delta=DeltaRule((0,), 8, 8, 4, 4, 3)),
}


@functools.cache
def batch():
  """Return four packed rows: examples of many lengths, so that shards begin within them."""
  rng = np.random.default_rng(0)
  examples = [
    Example(rng.integers(0, 48, n).astype(np.int32), np.arange(n) >= n // 3, str(n))
    for n in (64, 30, 33, 17, 16, 15, 9, 40, 1)
  ]
  steps = packing.plan([len(e.tokens) for e in examples], [packing.Bucket(LENGTH, 4)], 1, 0)
  (rows,) = packing.Batches(examples, steps)
  assert (rows['segment_ids'].max(1) > 1).any() and (rows['segment_ids'] == 0).any()
  return rows


@functools.cache
def run(model: ModelConfig, attention: str, **sizes: int):
  """Return the loss, the log-probabilities of segments and the gradients of both on a mesh."""
  devices = int(np.prod(list(sizes.values())))
  mesh = make_mesh(**{'data': 1} | sizes, devices=jax.devices()[:devices])
  sharding = token_sharding(mesh)
  rows = {name: place(x, sharding) for name, x in batch().items()}
  graph, params = abstract_model(model)[0], init_params(model, jax.random.key(0))

  @jax.jit
  def compute(params, rows):
    def loss(params):
      total, sums = LOSSES['nll'].function(graph, params, rows, sharding, 'dots', attention)
      logprobs = sequence_logprobs(nnx.merge(graph, params), rows, sharding, attention=attention)
      weights = 1 + jax.numpy.arange(LENGTH) / 7
      return total + (weights * logprobs.sums).sum(), (total, sums, logprobs)

    return jax.grad(loss, has_aux=True)(params)

  return jax.tree.map(np.asarray, compute(params, rows))


def check_equal(model, sizes, attention='blocks', limit=1e-5):
  expected, found = run(model, attention), run(model, attention, **sizes)
  for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
    np.testing.assert_allclose(b, a, rtol=limit, atol=limit * max(1, np.abs(a).max()))


def test_two_devices_equal_one():
  check_equal(ONE_LAYER, {'sequence': 2})


@pytest.mark.slow
@pytest.mark.parametrize('attention', ['blocks', 'xla'])
@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize(
  'sizes',
  [
    {'sequence': 4},
    {'sequence': 8},
    {'fsdp': 2, 'tensor': 2, 'sequence': 2},
    {'data': 2, 'sequence': 4},
    {'fsdp': 2, 'sequence': 2, 'expert': 2},
  ],
  ids=str,
)
def test_any_mesh_equals_one_device(name, sizes, attention):
  # The recurrence of the delta rule adds the rounding of all earlier tokens: on one device, two
  # programs of XLA (with many and with few optimizations) differ by 4.2e-5, and meshes by 4.5e-5.
  check_equal(MODELS[name], sizes, attention, limit=6e-5 if name == 'delta rule' else 1e-5)


def test_what_cannot_be_split_is_refused():
  mesh = make_mesh(1, 1, 2, sequence=4)
  check_sequence(mesh, 64, MODEL)
  check_sequence(make_mesh(), 65, MODEL)
  with pytest.raises(UserError, match='sequence=4 does not divide rows of 66 tokens.* such as 68'):
    check_sequence(mesh, 66, MODEL)
  with pytest.raises(UserError, match=r'sequence = 8 does not divide the 4 query heads.*\[1, 2, 4'):
    check_sequence(mesh, 64, dataclasses.replace(MODEL, num_heads=4))
  delta = dataclasses.replace(MODEL, delta=DeltaRule((0,), 4, 8, 4, 4, 3))
  with pytest.raises(UserError, match='the 4 heads of the gated delta rule'):
    check_sequence(mesh, 64, delta)


@pytest.mark.parametrize(
  ('data', 'sequence', 'expected'), [(2, 4, 8), (-1, 4, -1), (1, -1, -1), (3, 1, 3)]
)
def test_sampling_counts_the_devices_as_data(data, sequence, expected):
  sizes = {'data': data, 'fsdp': 2, 'sequence': sequence}
  assert join_sequence(sizes) == {'data': expected, 'fsdp': 2, 'sequence': 1}


@pytest.mark.parametrize('with_segments', [False, True])
def test_long_rows_use_blocks(with_segments, monkeypatch):
  graph, params = abstract_model(ONE_LAYER)[0], init_params(ONE_LAYER, jax.random.key(0))
  rows = batch()
  segments = rows['segment_ids'] if with_segments else None
  positions = (
    rows['positions'] if with_segments else np.broadcast_to(np.arange(LENGTH), (4, LENGTH))
  )

  def hidden(params):
    return nnx.merge(graph, params)(rows['tokens'], positions, segments)

  expected, jaxpr = jax.jit(hidden)(params), str(jax.make_jaxpr(lambda x: hidden(x))(params))
  assert f'bool[4,{LENGTH},{LENGTH}]' in jaxpr
  monkeypatch.setattr(transformer, 'LONGEST_MASK', LENGTH - 1)
  monkeypatch.setattr(blockwise, 'MIN_TILE', 16)
  real = rows['segment_ids'] > 0
  np.testing.assert_allclose(jax.jit(lambda x: hidden(x))(params)[real], expected[real], atol=1e-5)
  assert f'{LENGTH},{LENGTH}]' not in str(jax.make_jaxpr(lambda x: hidden(x))(params))


def test_long_keys_are_read_in_blocks(monkeypatch):
  keys = jax.random.split(jax.random.key(0), 4)
  queries = jax.random.normal(keys[0], (2, 6, 8))
  k, v = jax.random.normal(keys[1], (2, 8, 96)), jax.random.normal(keys[2], (2, 96, 8))
  mask = jax.random.bernoulli(keys[3], 0.3, (3, 96)).at[0].set(False)
  args = queries, k, v, mask, PLAIN
  whole = softmax.read_keys(*args)
  for a, b in zip(softmax.read_long_keys(*args), whole, strict=True):
    np.testing.assert_array_equal(a, b)
  monkeypatch.setattr(softmax, 'SCORES_AT_ONCE', 2 * 6 * 20)
  assert 'f32[2,6,96]' in str(jax.make_jaxpr(lambda *a: softmax.read_keys(*a, PLAIN))(*args[:4]))
  text = str(jax.make_jaxpr(lambda *a: softmax.read_long_keys(*a, PLAIN))(*args[:4]))
  assert 'f32[2,6,16]' in text and 'f32[2,6,96]' not in text  # six blocks of equal size
  parts = softmax.read_long_keys(*args).divided()
  seen = np.asarray(mask.any(1))[[0, 1, 2, 0, 1, 2]]
  np.testing.assert_allclose(parts[:, seen], whole.divided()[:, seen], atol=1e-6)
