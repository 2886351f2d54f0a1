"""DPO and its relatives: formulas, options, and independence of packing."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cai_jax.data import packing
from cai_jax.model.transformer import abstract_model
from cai_jax.runtime.errors import UserError
from cai_jax.training.losses import LOSSES
from cai_jax.training.losses.comparisons import preference_metrics
from cai_jax.training.losses.dpo import DPO, IPO, RobustDPO, dpo, ipo, robust_dpo
from cai_jax.training.losses.logprobs import sequence_logprobs
from cai_jax.training.prefer_config import PreferConfig
from tests.preference_setup import random_units, with_reference
from tests.training_setup import MODEL, initial_params

GRAPH, _ = abstract_model(MODEL)
UNITS = with_reference(random_units(8))
ROWS = {
  'packed': packing.Step(packing.Bucket(64, 8), ((0,), (1,), (2, 3), (4,), (5, 6), (7,))),
  'apart': packing.Step(packing.Bucket(64, 8), tuple((i,) for i in range(8))),
}


def log_sigmoid(x):
  return -math.log1p(math.exp(-x))


def test_a_soft_label_is_the_mean_of_both_hard_labels():
  """As each paper states the loss of a hard label."""
  h, beta = 1.7, 0.4
  right, wrong = -log_sigmoid(beta * h), -log_sigmoid(-beta * h)
  smooth = 0.9 * right + 0.1 * wrong, 0.1 * right + 0.9 * wrong
  robust = (0.9 * right - 0.1 * wrong) / 0.8, (0.9 * wrong - 0.1 * right) / 0.8
  squares = (h - 1 / (2 * beta)) ** 2, (h + 1 / (2 * beta)) ** 2
  for penalty, options, (first, second) in (
    (dpo, DPO(beta=beta), (right, wrong)),
    (dpo, DPO(beta=beta, label_smoothing=0.1), smooth),
    (robust_dpo, RobustDPO(beta=beta, flip_rate=0.1), robust),
    (ipo, IPO(beta=beta), squares),
  ):
    for p in (1.0, 0.0, 0.5, 0.8):
      actual = penalty(jnp.float32(h), jnp.float32(p), options)
      assert float(actual) == pytest.approx(p * first + (1 - p) * second, rel=1e-5)


def test_the_robust_loss_of_flipped_labels_is_the_loss_of_the_true_ones():
  """On average over the flips (Chowdhury et al. 2024)."""
  options = RobustDPO(beta=0.4, flip_rate=0.3)
  clean, flipped = (float(robust_dpo(jnp.float32(2.0), jnp.float32(p), options)) for p in (1, 0))
  expected = float(dpo(jnp.float32(2.0), jnp.float32(1.0), DPO(beta=0.4)))
  assert 0.7 * clean + 0.3 * flipped == pytest.approx(expected, rel=1e-5)


def test_equal_scores_count_half_in_the_accuracy():
  chosen, rejected = jnp.array([[1.0, 0.0, 2.0, 2.0, 5.0]]), jnp.array([[0.0, 1.0, 2.0, 1.0, 0.0]])
  probability, mask = jnp.array([[0.9, 0.8, 1.0, 0.5, 1.0]]), jnp.array([[1.0, 1, 1, 1, 0]])
  sums = preference_metrics(chosen, rejected, probability, mask)
  assert sums['accuracy'] == 1 + 0 + 0.5 + 0.5 and sums['num_comparisons'] == 4


@functools.cache
def batch_of(name):
  return packing.Batches(UNITS, [ROWS[name]])[0]


@functools.cache
def make_program(objective, options, gradient):
  """Return the jitted function of parameters and a batch; both arrangements have one shape."""
  settings = dataclasses.replace(PreferConfig(objective=objective).loss_settings, **dict(options))

  def loss(params, batch):
    return LOSSES[objective].function(GRAPH, params, batch, attention='xla', settings=settings)

  function = jax.value_and_grad(loss, has_aux=True) if gradient else loss
  return jax.jit(function)


def compute(objective, options, name, gradient=True):
  """Return the loss and the sums of all units in one batch, and the gradient."""
  return make_program(objective, options, gradient)(initial_params(), batch_of(name))


@functools.cache
def log_ratios():
  """Return log-ratios [8,2] of the units, and their numbers of tokens."""
  model = lambda params: nnx.merge(GRAPH, params)  # noqa: E731
  batch = batch_of('apart')
  logprobs = jax.jit(lambda p: sequence_logprobs(model(p), batch, attention='xla'))(
    initial_params()
  )
  return np.asarray(logprobs.sums - batch['reference'])[:, :2], np.asarray(logprobs.counts)[:, :2]


@pytest.mark.parametrize('normalized', [False, True])
def test_the_loss_and_metrics_of_a_batch(normalized):
  if normalized:
    loss, sums = compute('dpo', (('length_normalized', True),), 'packed', gradient=False)
  else:  # a program that another test needs as well
    (loss, sums), _ = compute('dpo', (), 'packed')
  ratios, counts = log_ratios()
  rewards = 0.1 * (ratios / counts if normalized else ratios)
  margins = rewards[:, 0] - rewards[:, 1]
  p = np.array([unit.values['probability'][0] for unit in UNITS])
  expected = sum(
    -q * log_sigmoid(m) - (1 - q) * log_sigmoid(-m) for m, q in zip(margins, p, strict=True)
  )
  assert float(loss) == pytest.approx(expected, rel=1e-5)
  correct = np.sum((margins > 0) == (p > 0.5))
  assert sums['num_comparisons'] == 8 and sums['accuracy'] == correct and 0 < correct < 8
  assert sums['num_tokens'] == counts.sum()
  for name, values in (
    ('margin', margins),
    ('chosen_reward', rewards[:, 0]),
    ('rejected_reward', rewards[:, 1]),
    ('chosen_log_ratio', ratios[:, 0]),
    ('rejected_log_ratio', ratios[:, 1]),
  ):
    assert float(sums[name]) == pytest.approx(values.sum(), rel=1e-4), name
  averages = LOSSES['dpo'].averages(sums)
  assert float(averages['accuracy']) == correct / 8 and averages['num_comparisons'] == 8


@pytest.mark.parametrize('objective', ['dpo', pytest.param('ipo', marks=pytest.mark.slow)])
def test_packed_comparisons_equal_unpacked_ones(objective):
  (loss, sums), gradient = compute(objective, (), 'packed')
  (alone, expected), exact = compute(objective, (), 'apart')
  assert float(loss) == pytest.approx(float(alone), rel=1e-6)
  for name in expected:
    assert float(sums[name]) == pytest.approx(float(expected[name]), rel=1e-5), name
  scale = max(np.abs(x).max() for x in jax.tree.leaves(exact))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6 * scale), gradient, exact)


def test_options_that_are_not_allowed_are_refused():
  for objective, options, match in (
    ('dpo', (('beta', 0.0),), r'^prefer.options: beta=0.0 must be a positive number'),
    ('ipo', (('beta', -1),), r'^prefer.options: beta=-1.0 must be'),
    ('dpo', (('beta', 'x'),), r"^prefer.options: beta must be a number, but got 'x'"),
    ('dpo', (('label_smoothing', 0.5),), r'label_smoothing=0.5 must be in \[0, 0.5\)'),
    ('robust_dpo', (('flip_rate', math.nan),), r'flip_rate=nan'),
    ('ipo', (('label_smoothing', 0.1),), r"^prefer.options: 'label_smoothing' is not an option"),
    ('nll', (), r"^prefer.objective='nll' trains on units of the kind 'sequence'.*'dpo'"),
    ('dop', (), "no loss named 'dop'"),
  ):
    with pytest.raises(UserError, match=match):
      PreferConfig(objective=objective, options=options)
