"""The estimated KL divergence equals torch's log-ratios, and is zero for equal models."""

import math

import jax
import numpy as np
import pytest
import scipy.stats
import torch
import transformers

import cai_jax
from cai_jax.evaluation.config import EvaluationConfig
from cai_jax.evaluation.measures.kl_divergence import create_kl, describe, measure_kl
from cai_jax.evaluation.registries import Policy
from cai_jax.runtime.mesh import make_mesh
from cai_jax.scoring.likelihood import log_likelihoods
from cai_jax.scoring.loader import ModelLoader

RNG = np.random.default_rng(0)


@pytest.fixture(scope='module')
def models(tiny_hf_folder):
  """M_θ, and a "fine-tuned" model of the same vocabulary."""
  mesh = make_mesh(1, devices=jax.devices()[:1])
  return [cai_jax.load(tiny_hf_folder(name), mesh=mesh) for name in ('smollm2', 'qwen3')]


def make_replies(lm, count=6):
  contexts = [RNG.integers(3, 300, 5).tolist() for _ in range(count)]
  tokens = [RNG.integers(3, 300, 3 + i).tolist() for i in range(count)]
  replies = []
  for context, reply in zip(contexts, tokens, strict=True):
    steps = [
      log_likelihoods(lm, [context + reply[:i]], [[token]])[0] for i, token in enumerate(reply)
    ]
    replies.append({'context': context, 'tokens': reply, 'logprobs': steps})
  return replies


def test_kl_equals_log_ratios_of_torch(models, tiny_hf_folder):
  replies = make_replies(models[1])
  result = measure_kl(models[0], replies)
  ratios = []
  for reply in replies:
    sums = []
    for name in ('qwen3', 'smollm2'):
      model = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_hf_folder(name), dtype=torch.float32
      ).eval()
      with torch.no_grad():
        log_p = model(torch.tensor([reply['context'] + reply['tokens']])).logits[0].log_softmax(-1)
      picked = log_p[len(reply['context']) - 1 : -1].gather(
        1, torch.tensor(reply['tokens'])[:, None]
      )
      sums.append(picked.sum().item())
    ratios.append(sums[0] - sums[1])
  assert result['per_response'] == pytest.approx(np.mean(ratios), abs=1e-4)
  tokens = sum(len(reply['tokens']) for reply in replies)
  assert result['tokens'] == tokens and result['responses'] == len(replies)
  assert result['per_token'] == pytest.approx(sum(ratios) / tokens, abs=1e-5)
  low, high = result['per_token_interval']
  assert low < result['per_token'] < high
  assert 'nats per response' in describe(result)[0]


def test_kl_of_equal_models_is_zero(models):
  result = measure_kl(models[0], make_replies(models[0]))
  assert result['per_response'] == pytest.approx(0, abs=1e-4)


def test_small_log_ratios_are_no_rates(models):
  replies = make_replies(models[0])
  shifts = np.linspace(0.2, 0.8, len(replies))  # all in [0, 1] nats
  for reply, shift in zip(replies, shifts, strict=True):
    reply['logprobs'][0] += shift
  result = measure_kl(models[0], replies)
  half = scipy.stats.t(len(shifts) - 1).ppf(0.975) * shifts.std(ddof=1) / len(shifts) ** 0.5
  expected = [shifts.mean() - half, shifts.mean() + half]
  assert result['per_response_interval'] == pytest.approx(expected, abs=1e-4)


def test_kl_is_the_expectation_over_samples(models):
  """One-token responses drawn from the model: the estimate agrees with the exact sum."""
  base, aligned = models
  context = [5, 9, 17]
  log_p, log_q = (
    jax.nn.log_softmax(np.asarray(lm.logits(np.array([context])))[0, -1]) for lm in (aligned, base)
  )
  exact = float(np.sum(np.exp(log_p) * (log_p - log_q)))
  tokens = np.random.default_rng(1).choice(
    log_p.size, 4000, p=np.exp(np.float64(log_p)) / np.exp(np.float64(log_p)).sum()
  )
  kinds, counts = np.unique(tokens, return_counts=True)
  replies = [
    {'context': context, 'tokens': [int(t)], 'logprobs': [float(log_p[t])]}
    for t, n in zip(kinds, counts, strict=True)
    for _ in range(n)
  ]
  result = measure_kl(base, replies[::4])
  assert exact > 0
  low, high = result['per_response_interval']
  assert low - 0.5 * (high - low) < exact < high + 0.5 * (high - low)


def test_kl_is_unknown_without_the_models_or_tokens(models, tiny_hf_folder):
  comparison = create_kl(EvaluationConfig())
  served = ModelLoader('float32', models[0].mesh, {})
  rows = [{'id': 'a', 'reply': make_replies(models[0], 1)[0]}]
  assert comparison.compare(served, [], rows, 0) is None
  loader = ModelLoader('float32', models[0].mesh, {'base': str(tiny_hf_folder('smollm2'))})
  assert comparison.compare(loader, [], [{}], 0) is None
  policies = {'policy': Policy('base', rows), 'silent': Policy('base', [{}])}
  found = comparison.compare_policies(loader, [], [{}], 0, policies)
  assert found.keys() == {'policies'} and found['policies'].keys() == {'policy'}
  assert [line.split(':')[0] for line in comparison.describe(found)] == ['KL of policy from base']
  result = comparison.compare(loader, [], rows, 0)
  assert math.isclose(result['per_response'], 0, abs_tol=1e-4)
  assert create_kl(EvaluationConfig(scorer='tiny')) is None
