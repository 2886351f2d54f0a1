"""Responses that share one copy of their prompt: the same losses from fewer tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cai_jax.data import packing
from cai_jax.data.units import LAST_SEGMENTS, Example, Unit, share_prompt, unit_lengths
from cai_jax.model.attention.kernels import blockwise
from cai_jax.model.attention.kernels.kernel import KERNELS, bind_kernel, check_kernel, choose_kernel
from cai_jax.model.attention.mask import SharedTokens
from cai_jax.model.attention.scores import PLAIN
from cai_jax.model.config import DeltaRule, ModelConfig
from cai_jax.model.score_head import init_head, join_head
from cai_jax.model.transformer import abstract_model, init_params
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.mesh import make_mesh
from cai_jax.training.losses import LOSSES, negative_log_likelihood, register_loss
from cai_jax.training.prefer_config import PreferConfig
from cai_jax.training.workload import measure_workload
from tests.preference_setup import PREFER, random_units, with_reference
from tests.test_kernels import FakeMesh
from tests.training_setup import one_device

# Two layers, of which the first sees four tokens, so that windows end inside prompts.
MODEL = ModelConfig('qwen2', 48, 16, 32, 2, 4, 2, 8, 64, qkv_bias=True, windows=(4, None))
GRAPH, _ = abstract_model(MODEL)


def make_unit(*sides):
  """Return a unit of sides, each the tokens and the number of the first token to learn."""
  segments = (
    Example(np.array(tokens, np.int32), np.arange(len(tokens)) >= first) for tokens, first in sides
  )
  return Unit(tuple(segments))


def test_what_is_shared_is_equal_and_predicts_nothing():
  for sides, shared in (
    ((([1, 2, 3, 7, 8], 3), ([1, 2, 3, 9], 3)), 2),  # the last token of the prompt is on both sides
    ((([1, 2, 3, 7, 8], 3), ([1, 2, 3, 7, 9], 3)), 2),  # both learn the 7
    ((([1, 2, 3, 7, 8], 4), ([1, 2, 3, 7, 9], 4)), 3),  # neither does, as in a reward model
    ((([1, 2, 3, 7, 8], 3), ([1, 5, 3, 7], 3)), 1),  # different prompts
    ((([1, 2, 3], 2), ([4, 2, 3], 2)), 0),
    ((([1, 2, 3], 1), ([1, 2, 4], 1)), 0),
    ((([1, 2, 3], 0), ([1, 2, 4], 0)), 0),
    ((([1, 2, 3, 7], 3), ([1, 2, 3, 8], 3), ([1, 2, 9], 2)), 1),
  ):
    unit = share_prompt(make_unit(*sides))
    assert unit.shared == shared
    lengths = [len(tokens) for tokens, _ in sides]
    assert unit.length == sum(lengths) - shared * (len(sides) - 1)


def test_a_batch_holds_the_prompt_once():
  first = make_unit(([1, 2, 3, 7, 8], 3), ([1, 2, 3, 9], 3))
  second = make_unit(([4, 5, 6], 2), ([4, 5, 6, 6], 2))
  units = [share_prompt(first), second]
  assert unit_lengths(units) == [7, 7]
  batch = packing.Batches(units, [packing.Step(packing.Bucket(16, 1), ((0, 1),))])[0]
  for name, row in (
    ('tokens', [1, 2, 3, 7, 8, 3, 9, 4, 5, 6, 4, 5, 6, 6, 0, 0]),
    ('positions', [0, 1, 2, 3, 4, 2, 3, 0, 1, 2, 0, 1, 2, 3, 0, 0]),
    ('segment_ids', [1, 1, 1, 1, 1, 2, 2, 3, 3, 3, 4, 4, 4, 4, 0, 0]),
    ('last_segment_ids', [2, 2, 1, 1, 1, 2, 2, 3, 3, 3, 4, 4, 4, 4, 0, 0]),
    ('loss_mask', [0, 0, 0, 1, 1, 0, 1, 0, 0, 1, 0, 0, 1, 1, 0, 0]),
  ):
    assert batch[name].tolist() == [row], name


@pytest.mark.parametrize('window', [None, 9])
@pytest.mark.parametrize('name', ['xla', 'blocks', 'cudnn'])
def test_kernels_attend_to_shared_tokens_as_to_copies(name, window, monkeypatch):
  """Outputs and gradients agree. On CPUs, cuDNN's call goes to XLA."""
  monkeypatch.setattr(blockwise, 'MIN_TILE', 8)
  units = [u._replace(values={}) for u in random_units(6)]
  row = tuple(range(6))
  shared = packing.Batches(
    list(map(share_prompt, units)), [packing.Step(packing.Bucket(144, 1), (row,))]
  )[0]
  apart = packing.Batches(units, [packing.Step(packing.Bucket(160, 1), (row,))])[0]
  # Where each token of `apart` stands in `shared`. Second copies of a prompt have no weight.
  place = {
    (int(segment), int(position)): t
    for t in range(144)
    for position in [shared['positions'][0, t]]
    for segment in range(shared['segment_ids'][0, t], shared[LAST_SEGMENTS][0, t] + 1)
  }
  keys = list(zip(apart['segment_ids'][0].tolist(), apart['positions'][0].tolist(), strict=True))
  index = np.array([place[key] for key in keys])
  first = np.isin(np.arange(160), np.unique(index, return_index=True)[1]) & (
    apart['segment_ids'][0] > 0
  )
  draws = jax.random.split(jax.random.key(0), 3)
  inputs = [jax.random.normal(k, (1, 144, n, 8)) for k, n in zip(draws, (4, 2, 2), strict=True)]
  options = {'implementation': 'xla'} if name == 'cudnn' else {}
  tokens = SharedTokens(shared[LAST_SEGMENTS], shared['positions'])

  def weigh(out):
    out = jnp.where(first[None, :, None, None], out, 0.0)
    return jnp.sum(out * jnp.cos(out)), out

  def together(*inputs):
    ids = shared['segment_ids']
    out = KERNELS[name].attend(*inputs, ids, window, None, PLAIN, shared=tokens, **options)
    return weigh(out[:, index])

  def copied(*inputs):
    copies = (x[:, index] for x in inputs)
    return weigh(KERNELS['xla'].attend(*copies, apart['segment_ids'], window, None, PLAIN))

  (_, out), gradients = jax.jit(jax.value_and_grad(together, (0, 1, 2), has_aux=True))(*inputs)
  (_, exact), expected = jax.jit(jax.value_and_grad(copied, (0, 1, 2), has_aux=True))(*inputs)
  np.testing.assert_allclose(out, exact, atol=1e-5)
  for a, b in zip(gradients, expected, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def make_units(objective):
  """Return six units with all values, of which a reward model learns the last token only."""
  units = with_reference(random_units(6, desirable=1.0, margin=0.5))
  if LOSSES[objective].head is None:
    return units
  last = lambda s: s._replace(loss_mask=np.arange(len(s.tokens)) == len(s.tokens) - 1)  # noqa: E731
  return [unit._replace(segments=tuple(map(last, unit.segments))) for unit in units]


@functools.cache
def parameters(head):
  params = init_params(MODEL, jax.random.key(0))
  if head is None:
    return params
  return join_head(params, init_head(MODEL.d_model, jax.random.key(1)))


@pytest.mark.parametrize(
  ('objective', 'kernel'),
  [
    ('dpo', 'blocks'),
    ('reward', 'xla'),
    *(
      pytest.param(name, 'xla', marks=pytest.mark.slow)
      for name in ('dpo', 'robust_dpo', 'ipo', 'orpo', 'simpo', 'kto')
    ),
  ],
)
def test_the_loss_is_that_of_two_copies(objective, kernel, monkeypatch):
  """In packed rows and in rows of one comparison each, with the gradient and all sums."""
  monkeypatch.setattr(blockwise, 'MIN_TILE', 8)
  units = make_units(objective)
  shared = list(map(share_prompt, units))
  assert sum(unit_lengths(shared)) < 0.9 * sum(unit_lengths(units))
  settings = PreferConfig(objective=objective).loss_settings

  def loss(params, batch):
    return LOSSES[objective].function(GRAPH, params, batch, attention=kernel, settings=settings)

  compute = jax.jit(jax.value_and_grad(loss, has_aux=True))

  def run(units, rows):
    batch = packing.Batches(units, [packing.Step(packing.Bucket(56, 6), rows)])[0]
    return compute(parameters(LOSSES[objective].head), batch)

  alone = tuple((i,) for i in range(6))
  (expected, sums), exact = run(units, alone)
  scale = max(np.abs(x).max() for x in jax.tree.leaves(exact))
  for rows in (alone, ((0, 1), (2, 3), (4,), (5,))):
    (actual, ours), gradient = run(shared, rows)
    assert float(actual) == pytest.approx(float(expected), rel=1e-5)
    for name in sums:
      assert float(ours[name]) == pytest.approx(float(sums[name]), rel=1e-4, abs=1e-5), name
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), gradient, exact)


def test_the_work_of_a_step_counts_shared_tokens_once():
  units = random_units(4)
  shared = list(map(share_prompt, units))
  rows = [packing.Step(packing.Bucket(64, 4), tuple((i,) for i in range(4)))]
  before, after = (measure_workload(MODEL, x, rows, PREFER, one_device()) for x in (units, shared))
  spared = np.array([unit.shared for unit in shared])
  assert spared.sum() and after.tokens.dtype.kind == 'i'
  assert before.tokens - after.tokens == spared.sum()
  assert before.flops - after.flops == pytest.approx(MODEL.training_flops(spared))


def test_what_cannot_share_is_refused(restored_registries):
  tpu = FakeMesh('tpu')
  assert choose_kernel(tpu, 'float32', [128], [64], shares=True) == 'blocks'
  message = "'splash' cannot share the tokens of a prompt. Choose 'blocks' or 'xla', or set share_p"
  with pytest.raises(UserError, match=message):
    check_kernel('splash', tpu, 'float32', 128, shares=True)
  ids = np.ones((1, 8), np.int32)
  with pytest.raises(ValueError, match="'splash' cannot share tokens"):
    bind_kernel(
      'splash', ids, make_mesh(1, devices=jax.devices()[:1]), PLAIN, SharedTokens(ids, ids)
    )
  sharing = dataclasses.replace(PREFER, share_prompts=True)
  state = dataclasses.replace(MODEL, windows=(), delta=DeltaRule((0,), 2, 2, 4, 4, 3))
  with pytest.raises(UserError, match='prefer.share_prompts=True is not possible: M has layers'):
    sharing.check_model(state, 'M')
  register_loss('unaware', {'comparison': 'num_tokens'}, units='comparison')(
    negative_log_likelihood
  )
  with pytest.raises(UserError, match="share_prompts=True needs an objective.*'unaware' does not"):
    dataclasses.replace(sharing, objective='unaware')
