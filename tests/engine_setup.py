"""A tiny model, and chains and runs of an engine, that the tests of the engine share."""

import jax
import numpy as np
import pytest

from cai_jax.model.config import ModelConfig
from cai_jax.model.lm import LM
from cai_jax.model.transformer import init_params
from cai_jax.runtime.mesh import make_mesh
from cai_jax.sampling.config import EngineConfig
from cai_jax.sampling.engine import Engine
from cai_jax.sampling.types import SamplingConfig, Turn

LENGTH = 128


SIZES = dict(slots=4, prefill_tokens=16, prefill_width=8, longest_burst=5)


@pytest.fixture(scope='module')
def lm(tiny_tokenizer):
  config = ModelConfig('llama', len(tiny_tokenizer), 32, 64, 2, 4, 2, 8, 256)
  mesh = make_mesh(devices=jax.devices()[:1])
  params = init_params(config, jax.random.key(0))
  params['head']['table'] = params['head']['table'] * 3  # makes the distributions less uniform
  return LM(config, params, tiny_tokenizer, mesh, 'float32', 'random', 'random-0')


def chain(context, turns=3, model='base', max_tokens=12, sampling=None):
  """Sample turns in one growing context and return all completions."""
  sampling = sampling or SamplingConfig(max_tokens=max_tokens)
  completions = []
  for number in range(turns):
    completion = yield Turn(f'turn_{number}', context, sampling, model)
    completions.append(completion)
    context = context + completion.tokens + [5 + number, 9]
  return completions


def contexts(count):
  """Return `count` random contexts of 1 to 39 tokens."""
  rng = np.random.default_rng(0)
  return [rng.integers(1, 60, rng.integers(1, 40)).tolist() for _ in range(count)]


def run(lm, items, slots=4, seed=0, stops=(), texts=(), journal=None, prefixes=None, **sizes):
  """Run chains on a new engine and return its results by chain id, and its stats."""
  engine = Engine(
    {'base': lm},
    length=LENGTH,
    seed=seed,
    config=EngineConfig(**SIZES | {'slots': slots} | sizes),
    journal=journal,
    stops={'base': (tuple(stops), tuple(texts))},
    prefixes=prefixes,
  )
  return dict(engine.run(items)), engine.stats


def items(count, **kwargs):
  """Return (id, chain) pairs, one chain per context."""
  return [(f'chain {i}', chain(c, **kwargs)) for i, c in enumerate(contexts(count))]


def full_logits(lm, tokens):
  """Return the logits [T,V] of a text, from a program for all texts of up to LENGTH tokens."""
  padded = [*tokens, *[0] * (LENGTH - len(tokens))]  # later tokens change nothing
  return np.asarray(lm.logits([padded]))[0, : len(tokens)]


def tokens_of(results):
  """Return the tokens of each completion, without text and log-probabilities."""
  return {name: [c.tokens for c in completions] for name, completions in results.items()}


def assert_close(results, expected):
  """Assert equal tokens, and log-probabilities that are equal to rounding."""
  assert tokens_of(results) == tokens_of(expected)
  for name, completions in results.items():
    for completion, other in zip(completions, expected[name], strict=True):
      np.testing.assert_allclose(completion.logprobs, other.logprobs, atol=1e-4)


PREFIXES = [[7, 8, 9] * 6, list(range(40, 65))]


def prefixed(count, **kwargs):
  """Return (id, chain) pairs; a third starts with the first prefix, a third with the second."""
  starts = ([], *PREFIXES)
  return [
    (f'chain {i}', chain(starts[i % 3] + context, **kwargs))
    for i, context in enumerate(contexts(count))
  ]
