"""Scanned layers: which are stacked, and that nothing but the compiled step notices."""

import dataclasses
import functools
import math
import shutil

import jax
import numpy as np
import pytest

from cai_jax.data import packing
from cai_jax.model.config import DeltaRule, Experts, Rope
from cai_jax.model.quantized.kernel import dequantize, map_params
from cai_jax.model.quantized_params import quantize_params
from cai_jax.model.sharding import flatten_params, param_shardings
from cai_jax.model.stacks import Run, arrange_layers, find_runs
from cai_jax.model.transformer import abstract_model, init_params
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.mesh import make_mesh
from cai_jax.training import loop
from cai_jax.training.losses import ROUTING, negative_log_likelihood
from cai_jax.training.trainable import trained_graph
from tests.families import REPEATED, SIMILAR
from tests.training_setup import (
  CONFIG,
  MODEL,
  bitwise_equal,
  killed_before,
  one_device,
  random_examples,
)

EXAMPLES = random_examples(40)
DEEP = dataclasses.replace(MODEL, num_layers=2)
WINDOWS = (5, None, 5, None, 5)
MODELS = {
  # One dense layer before the layers of experts.
  'mixture': dataclasses.replace(
    MODEL, num_layers=4, experts=Experts(4, 2, 24, dense_layers=(0,)), layer_scalar=True
  ),
  'pattern': dataclasses.replace(
    MODEL, num_layers=5, windows=WINDOWS, ropes=tuple(w and Rope(100.0) for w in WINDOWS)
  ),
  'hybrid': dataclasses.replace(
    MODEL, num_layers=8, delta=DeltaRule((0, 1, 2, 4, 5, 6), 2, 4, 8, 8, 3), attention_gate=True
  ),
}


@pytest.mark.parametrize(
  ('forms', 'runs'),
  [
    ('', []),
    ('A', [(0, 1, 1)]),
    ('ABC', [(0, 1, 1), (1, 1, 1), (2, 1, 1)]),
    ('AAAAAAAA', [(0, 1, 8)]),
    ('DMMM', [(0, 1, 1), (1, 1, 3)]),
    ('LLLLLG' * 4 + 'LL', [(0, 6, 4), (24, 1, 2)]),
    ('AAAG' * 8, [(0, 4, 8)]),
    ('AAAABBBB', [(0, 1, 4), (4, 1, 4)]),
    ('LGLGL', [(0, 2, 2), (4, 1, 1)]),
  ],
)
def test_a_run_repeats_the_shortest_pattern_that_covers_most_layers(forms, runs):
  found = find_runs(forms)
  assert list(found) == [Run(*run) for run in runs]
  layers = [layer for run in found for layer in zip(*run.stacks, strict=True)]
  assert [i for group in layers for i in group] == list(range(len(forms)))
  assert all(len({forms[i] for i in stack}) == 1 for run in found for stack in run.stacks)


def batch_of(rows=4):
  """Return packed rows of two segments and padding."""
  tokens = np.random.default_rng(0).integers(0, 48, (rows, 24)).astype(np.int32)
  segments = np.repeat([1, 2, 0], (10, 11, 3)).astype(np.int32)
  positions = np.concatenate([np.arange(10), np.arange(11), np.zeros(3)]).astype(np.int32)
  of_row = {'segment_ids': segments, 'positions': positions, 'loss_mask': np.int32(segments > 0)}
  return {'tokens': tokens} | {n: np.broadcast_to(x, tokens.shape) for n, x in of_row.items()}


def losses(config, params, remat, batch):
  """Return the loss, its sums and gradient, of scanned and of separate layers."""
  graph, shapes = abstract_model(config)
  results = []
  for name in ('scan', 'unrolled'):
    arranged, layout = arrange_layers(name, config, graph, shapes)
    assert bool(layout.runs) == (name == 'scan')
    loss = functools.partial(
      negative_log_likelihood, arranged, batch=batch, remat=remat, attention='blocks'
    )
    compute = jax.jit(jax.value_and_grad(loss, has_aux=True))
    value, gradient = compute(layout.stack(params))
    results.append((value, layout.unstack(gradient)))
  return results


def assert_equal(actual, expected):
  """Arrays agree to 1e-6 of their largest entry."""
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(x, y, rtol=0, atol=1e-6 * np.abs(y).max())


@pytest.mark.parametrize(
  ('name', 'remat'),
  [
    ('pattern', 'dots'),
    pytest.param('pattern', 'none', marks=pytest.mark.slow),
    pytest.param('mixture', 'full', marks=pytest.mark.slow),
    pytest.param('hybrid', 'full', marks=pytest.mark.slow),
  ],
)
def test_scanned_layers_equal_unrolled_ones(name, remat):
  config = MODELS[name]
  params = init_params(config, jax.random.key(0))
  scanned, unrolled = losses(config, params, remat, batch_of())
  assert_equal(scanned, unrolled)


def test_the_use_of_experts_is_in_the_order_of_layers():
  """Layers 1 and 3 are mixtures, of a pattern of two layers that is repeated."""
  config = dataclasses.replace(MODEL, num_layers=4, experts=Experts(4, 1, 8, dense_layers=(0, 2)))
  params, batch = init_params(config, jax.random.key(0)), batch_of(2)
  graph, shapes = abstract_model(config)
  results = []
  for name in ('scan', 'unrolled'):
    arranged, layout = arrange_layers(name, config, graph, shapes)
    loss = functools.partial(negative_log_likelihood, arranged, attention='xla')
    _, sums = jax.jit(loss)(layout.stack(params), batch)
    results.append(sums[ROUTING])
  assert layout.runs == () and results[1].counts.shape == (2, 4)
  assert not np.array_equal(*results[1].counts)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), *results)


@pytest.mark.slow
@pytest.mark.parametrize('family', REPEATED + SIMILAR)
def test_every_family_can_be_scanned(load, family):
  lm = load(family)
  scanned, unrolled = losses(lm.config, lm.params, 'dots', batch_of())
  assert_equal(scanned, unrolled)


def test_a_program_of_scanned_layers_does_not_grow_with_the_depth():
  def size(name, layers):
    config = dataclasses.replace(MODEL, num_layers=layers)
    graph, shapes = abstract_model(config)
    arranged, layout = arrange_layers(name, config, graph, shapes)
    loss = lambda p: negative_log_likelihood(arranged, p, batch_of(), attention='blocks')[0]  # noqa: E731
    lowered = jax.jit(jax.grad(loss)).lower(jax.eval_shape(layout.stack, shapes))
    return len(lowered.as_text())

  assert size('scan', 12) == pytest.approx(size('scan', 4), rel=0.02)
  assert size('unrolled', 12) > 2 * size('unrolled', 4)


def test_layers_with_and_without_adapters_are_in_different_stacks():
  config = dataclasses.replace(CONFIG, layers='scan', lora_rank=2, lora_modules='layers/[01]/mlp')
  _, layout, shapes = trained_graph(dataclasses.replace(MODEL, num_layers=5), config)
  assert layout.runs == (Run(0, 1, 2), Run(2, 1, 3))
  stacked = jax.eval_shape(layout.stack, shapes)
  assert stacked['stacks'][0]['mlp']['up']['adapter']['a'].shape == (2, 16, 2)
  assert 'adapter' not in stacked['stacks'][1]['mlp']['up']
  assert jax.eval_shape(layout.unstack, stacked) == shapes


def test_a_stack_is_split_as_its_layers_are():
  _, shapes = abstract_model(DEEP)
  _, layout = arrange_layers('scan', DEEP, *abstract_model(DEEP))
  mesh = make_mesh(2, 2, 2)
  separate = flatten_params(param_shardings(shapes, mesh))
  stacked = flatten_params(param_shardings(jax.eval_shape(layout.stack, shapes), mesh))
  assert len(stacked) < len(separate)
  for path, sharding in stacked.items():
    if path.startswith('stacks/'):
      layer = path.replace('stacks/0', 'layers/1')
      assert sharding.spec == jax.sharding.PartitionSpec(None, *separate[layer].spec)
    else:
      assert sharding == separate[path]


FIT = dataclasses.replace(CONFIG, checkpoint_every=2, keep=9, ema=0.5)


def fit(workdir, layers, mesh, **changes):
  config = dataclasses.replace(FIT, layers=layers, **changes)
  params = init_params(DEEP, jax.random.key(0))
  return loop.fit(DEEP, params, EXAMPLES, config, mesh, workdir, (packing.Bucket(32, 8),))


@pytest.mark.slow
@pytest.mark.parametrize('sizes', [(1, 1, 1), (2, 2, 2)], ids=['one', 'eight'])
def test_runs_resume_each_others_checkpoints(tmp_path, sizes):
  """The result of a scanned training, its files, and its resumption."""
  mesh = make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])
  unrolled, _ = fit(tmp_path / 'unrolled', 'unrolled', mesh)
  scanned, summary = fit(tmp_path / 'scanned', 'scan', mesh)
  assert summary['steps'] >= 4
  assert_close(scanned, unrolled)
  with killed_before(4):
    fit(tmp_path / 'killed', 'scan', mesh)
  shutil.copytree(tmp_path / 'killed', tmp_path / 'other')
  resumed, summary = fit(tmp_path / 'killed', 'scan', mesh)
  assert summary['resumed_at'] == 2 and bitwise_equal(resumed, scanned)
  other, summary = fit(tmp_path / 'other', 'unrolled', mesh)
  assert summary['resumed_at'] == 2
  assert_close(other, unrolled)
  names = [
    sorted(str(p.relative_to(tmp_path / run)) for p in (tmp_path / run / 'checkpoints').rglob('*'))
    for run in ('scanned', 'unrolled')
  ]
  assert [n for n in names[0] if 'layers' in n] == [n for n in names[1] if 'layers' in n]


def assert_close(actual, expected):
  """Trained parameters have equal paths and shardings, and values that agree to 1e-6."""
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    assert x.sharding == y.sharding
    np.testing.assert_allclose(x, y, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_scanned_adapters_are_merged_into_their_layers(tmp_path):
  changes = dict(lora_rank=2, lora_modules='layers/1/')
  results = [fit(tmp_path / n, n, one_device(), **changes)[0] for n in ('scan', 'unrolled')]
  assert_close(*results)
  initial = init_params(DEEP, jax.random.key(0))
  changed = [not bitwise_equal(results[0]['layers'][i], initial['layers'][i]) for i in range(2)]
  assert changed == [False, True]


@pytest.mark.slow
@pytest.mark.parametrize('weights', ['int8', 'nf4'])
def test_quantized_kernels_are_stacked(tmp_path, weights):
  results = []
  for name in ('scan', 'unrolled'):
    params = init_params(DEEP, jax.random.key(0))
    params = jax.jit(lambda p: quantize_params(p, DEEP, weights))(params)
    config = dataclasses.replace(FIT, layers=name, lora_rank=2, base_weights=weights)
    buckets = (packing.Bucket(32, 8),)
    trained, _ = loop.fit(DEEP, params, EXAMPLES, config, one_device(), tmp_path / name, buckets)
    results.append(map_params(dequantize, trained))
  assert_close(*results)


def test_an_unknown_name_is_refused():
  with pytest.raises(UserError, match="train.layers='loop' is not one of .'unrolled', 'scan'"):
    dataclasses.replace(CONFIG, layers='loop')
