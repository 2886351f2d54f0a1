"""The objectives of preference training agree with their papers' formulas in plain PyTorch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from cai_jax.data import packing
from cai_jax.data.units import unit_lengths
from cai_jax.runtime.errors import UserError
from cai_jax.training.losses import dpo, reward
from cai_jax.training.prefer_config import PreferConfig
from tests import preference_oracles as oracles
from tests import preference_steps
from tests.families import load_in_torch
from tests.preference_setup import with_reference
from tests.preference_steps import CONFIG, load

STEPS = 10


def on_pairs(oracle, **options):
  """Return a function from a model and units to an oracle's losses."""
  return lambda model, units: oracle(preference_steps.pair_inputs(model, units), **options)


# Name → objective, its options, and the losses of the same units in torch.
SAME = {
  'dpo': ('dpo', dict(beta=0.2), on_pairs(oracles.dpo, beta=0.2)),
  'orpo': ('orpo', dict(weight=0.5), on_pairs(oracles.orpo, weight=0.5)),
  'simpo': ('simpo', dict(beta=2.0, gamma=0.6), on_pairs(oracles.simpo, beta=2.0, gamma=0.6)),
  'kto': (
    'kto',
    dict(beta=0.2, undesirable_weight=1.5),
    functools.partial(preference_steps.judged_losses, beta=0.2, undesirable_weight=1.5),
  ),
}
SIMILAR = {
  'robust_dpo': (
    'robust_dpo',
    dict(beta=0.2, flip_rate=0.15),
    on_pairs(oracles.dpo, beta=0.2, flip_rate=0.15),
  ),
  'length_normalized_dpo': (
    'dpo',
    dict(beta=2.0, length_normalized=True),
    on_pairs(oracles.length_normalized_dpo, beta=2.0),
  ),
  'ipo': ('ipo', dict(beta=0.2), on_pairs(oracles.ipo, beta=0.2)),
  'length_normalized_ipo': (
    'ipo',
    dict(beta=0.5, length_normalized=True),
    on_pairs(oracles.ipo, beta=0.5, normalized=True),
  ),
}
NAMES = [*SAME, *(pytest.param(name, marks=pytest.mark.slow) for name in SIMILAR)]


@pytest.fixture(scope='module')
def folder(tmp_path_factory, tiny_tokenizer):
  path = tmp_path_factory.mktemp('model')
  preference_steps.save_model(path, tiny_tokenizer)
  return path


@pytest.fixture(scope='module')
def reward_folder(folder, tmp_path_factory):
  path = tmp_path_factory.mktemp('reward')
  preference_steps.save_reward_model(path, folder)
  return path


@functools.cache
def plan_steps():
  """Return units of two segments, which serve every objective, and the first steps."""
  units = with_reference(preference_steps.make_units(200))
  desirable = [
    {**unit.values, 'desirable': (float(i % 3 > 0), 0.0)} for i, unit in enumerate(units)
  ]
  units = [unit._replace(values=v) for unit, v in zip(units, desirable, strict=True)]
  plan = packing.plan(unit_lengths(units), [packing.Bucket(48, 8)], 1, 0)
  assert len(plan) >= STEPS and max(len(row) for step in plan for row in step.rows) > 1
  return units, plan[:STEPS]


def near_policy(units, plan, folder):
  """Return the units with references near the model, so that KTO's reference point is positive."""
  with torch.no_grad():
    segments = [segment for unit in units for segment in unit.segments]
    sums, _ = preference_steps.sequence_logprobs(load_in_torch(folder), segments)
  ratios = np.random.default_rng(0).normal(1.5, 2.0, (len(units), 2))
  differences = []
  for step in plan:  # the micro-batches take turns with the rows
    parts = [[ratios[i, 1] for row in step.rows[first::2] for i in row] for first in (0, 1)]
    differences.append(abs(np.mean(parts[0]) - np.mean(parts[1])))
  assert np.mean(differences) > 0.3  # so the estimate of one micro-batch would show
  references = sums.numpy().reshape(-1, 2) - ratios
  return [
    unit._replace(values={**unit.values, 'reference': tuple(map(float, numbers))})
    for unit, numbers in zip(units, references, strict=True)
  ]


@pytest.mark.parametrize('name', NAMES)
def test_ten_steps_agree_with_torch(name, folder):
  """KTO is split into micro-batches, whose reference point is still that of the whole batch."""
  objective, options, compute_losses = (SAME | SIMILAR)[name]
  config = dataclasses.replace(
    CONFIG, objective=objective, options=tuple(options.items()), accumulation=1 + (name == 'kto')
  )
  units, plan = plan_steps()
  if name == 'kto':
    units = near_policy(units, plan, folder)
  batches = [[units[i] for row in step.rows for i in row] for step in plan]
  theirs, their_norms, _ = preference_steps.train_in_torch(folder, batches, compute_losses)
  ours, our_norms, _ = preference_steps.train(load(folder), units, plan, config)
  np.testing.assert_allclose(ours, theirs, rtol=1e-4)
  np.testing.assert_allclose(our_norms, their_norms, rtol=1e-4)


def test_ten_steps_of_a_reward_model_agree_with_torch(reward_folder):
  """With soft labels, margins and centering; transformers takes the score of the last token."""
  units, plan = plan_steps()
  units = preference_steps.with_margins(units)
  batches = [[units[i] for row in step.rows for i in row] for step in plan]
  compute = functools.partial(preference_steps.reward_losses, centering=0.1)
  theirs, their_norms, model = preference_steps.train_in_torch(
    reward_folder, batches, compute, preference_steps.load_rewards_in_torch
  )
  options = (('centering', 0.1), ('margins', True))
  config = dataclasses.replace(CONFIG, objective='reward', options=options)
  start = preference_steps.load_reward_model(reward_folder)
  ours, our_norms, params = preference_steps.train(start, units, plan, config)
  np.testing.assert_allclose(ours, theirs, rtol=1e-4)
  np.testing.assert_allclose(our_norms, their_norms, rtol=1e-4)
  head = model.score.weight.detach()
  np.testing.assert_allclose(params['score/table'], head, atol=1e-6)
  assert np.abs(params['score/table'] - start.params['score']['table']).max() > 1e-5


H = np.linspace(-4, 4, 9, dtype=np.float32)
P = np.linspace(0.1, 1, 9, dtype=np.float32)


def ones(h):
  """Return pairs of one token, whose difference of log-ratios is h."""
  zeros, one = torch.zeros(len(H)), torch.ones(len(H))
  return oracles.Pairs(h, zeros, one, one, zeros, zeros, torch.tensor(P))


@pytest.mark.parametrize(
  'penalty, options, oracle',
  [
    (dpo.dpo, dpo.DPO(0.3), lambda h: oracles.dpo(ones(h), 0.3)),
    (dpo.robust_dpo, dpo.RobustDPO(0.3, False, 0.2), lambda h: oracles.dpo(ones(h), 0.3, 0.2)),
    (dpo.ipo, dpo.IPO(0.3), lambda h: oracles.ipo(ones(h), 0.3)),
  ],
)
def test_penalties_and_their_gradients_agree_with_torch(penalty, options, oracle):
  h = torch.tensor(H, requires_grad=True)
  expected = oracle(h)
  expected.sum().backward()
  loss = lambda h: jnp.sum(penalty(h, P, options))  # noqa: E731
  np.testing.assert_allclose(penalty(H, P, options), expected.detach(), rtol=1e-5)
  np.testing.assert_allclose(jax.grad(loss)(H), h.grad, rtol=1e-5, atol=1e-6)


def test_conservative_labels_are_smoothed_labels():
  pairs = dataclasses.replace(ones(torch.tensor(H)), probability=torch.tensor(0.8 * P + 0.1))
  ours = dpo.dpo(H, P, dpo.DPO(0.3, label_smoothing=0.1))
  np.testing.assert_allclose(ours, oracles.dpo(pairs, 0.3), rtol=1e-5)


def test_the_loss_of_a_reward_model_agrees_with_torch():
  scores = torch.tensor(np.stack([H, H[::-1] * 0.3]), requires_grad=True)
  oracles.bradley_terry(*scores, torch.tensor(P), 0.5, 0.1).sum().backward()
  loss = lambda x: jnp.sum(reward.bradley_terry(*x, P, 0.5, 0.1))  # noqa: E731
  np.testing.assert_allclose(
    reward.bradley_terry(*scores.detach().numpy(), P, 0.5, 0.1),
    oracles.bradley_terry(*scores.detach(), torch.tensor(P), 0.5, 0.1),
    rtol=1e-5,
  )
  gradient = jax.grad(loss)(jnp.array(scores.detach().numpy()))
  np.testing.assert_allclose(gradient, scores.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  'objective, options, message',
  [
    ('orpo', dict(weight=0.0), 'weight=0.0 must be a positive number'),
    ('simpo', dict(beta=-1.0), 'beta=-1.0 must be a positive number'),
    ('simpo', dict(gamma=-0.5), 'gamma=-0.5 must be a number of at least 0'),
    ('kto', dict(beta=0.0), 'beta=0.0 must be a positive number'),
    ('kto', dict(undesirable_weight=-1.0), 'undesirable_weight=-1.0 must be a positive number'),
    ('orpo', dict(beta=0.1), "'beta' is not an option"),
  ],
)
def test_options_that_make_no_sense_are_refused(objective, options, message):
  with pytest.raises(UserError, match=message):
    PreferConfig(objective=objective, options=tuple(options.items()))
