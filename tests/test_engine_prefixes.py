"""The engine's caches: shared prefixes, windows and rewound contexts change no token."""

import dataclasses

import jax
import pytest

from cai_jax.model.sharding import param_shardings
from cai_jax.runtime.mesh import make_mesh
from cai_jax.sampling import config as config_lib
from cai_jax.sampling.caches import pages_of
from cai_jax.sampling.config import EngineConfig
from cai_jax.sampling.engine import Engine
from cai_jax.sampling.types import SamplingConfig, Turn
from tests.engine_setup import (
  LENGTH,
  PREFIXES,
  SIZES,
  assert_close,
  contexts,
  full_logits,
  prefixed,
  run,
  tokens_of,
)
from tests.engine_setup import lm as lm

pytestmark = pytest.mark.usefixtures('full_optimization')


def test_a_shared_prefix_changes_no_token_and_is_prefilled_once(lm):
  unshared, unshared_stats = run(lm, prefixed(9))
  shared, stats = run(lm, prefixed(9), prefixes={'base': PREFIXES})
  assert_close(shared, unshared)
  tokens = sum(map(len, PREFIXES))
  assert stats.prefix_tokens == tokens
  assert unshared_stats.prefilled_tokens - stats.prefilled_tokens == 3 * tokens
  assert stats.shared_tokens == 3 * 3 * tokens  # three chains per prefix, three turns per chain


def test_a_chain_with_a_shared_prefix_is_independent_of_batch_mates(lm):
  batch, _ = run(lm, prefixed(9), prefixes={'base': PREFIXES})
  for item in (prefixed(9)[4], prefixed(9)[8]):
    alone, _ = run(lm, [item], prefixes={'base': PREFIXES})
    assert alone[item[0]] == batch[item[0]]


def test_the_longest_prefix_that_leaves_a_token_is_used(lm):
  prefix = list(range(20))
  engine = Engine(
    {'base': lm}, length=64, seed=0, prefixes={'base': [prefix[:10], prefix, prefix[:5]]}
  )
  assert engine._local['base'].prefix_of(prefix + [1]) == (1, 20)
  assert engine._local['base'].prefix_of(prefix) == (0, 10)
  assert engine._local['base'].prefix_of(prefix[:7]) == (2, 5)
  assert engine._local['base'].prefix_of([1, *prefix]) == (-1, 0)


def test_a_chain_can_change_prefix_and_history_between_turns(lm):
  def changing(context):
    completions = []
    for number, start in enumerate((PREFIXES[0], PREFIXES[1], PREFIXES[1], [], PREFIXES[0])):
      turn = Turn(f'turn_{number}', start + context + [number], SamplingConfig(max_tokens=9))
      completions.append((yield turn))
      context = context[number:] + completions[-1].tokens[:5]
    return completions

  def new_items():
    return [(str(i), changing(c)) for i, c in enumerate(contexts(6))]

  unshared, _ = run(lm, new_items())
  shared, _ = run(lm, new_items(), prefixes={'base': PREFIXES})
  assert tokens_of(unshared) == tokens_of(shared)


def test_eight_devices_with_a_shared_prefix_give_the_tokens_of_one(lm):
  mesh = make_mesh(data=2, fsdp=2, tensor=2)
  shardings = param_shardings(lm.params, mesh)
  sharded = dataclasses.replace(lm, params=jax.device_put(lm.params, shardings), mesh=mesh)
  one, _ = run(lm, prefixed(6), prefixes={'base': PREFIXES})
  eight, _ = run(sharded, prefixed(6), prefixes={'base': PREFIXES})
  assert tokens_of(one) == tokens_of(eight)


@pytest.mark.parametrize('prefixes', [pytest.param({}, marks=pytest.mark.slow), {'base': PREFIXES}])
def test_windowed_layers_cache_a_window_and_match_the_full_forward(lm, monkeypatch, prefixes):
  """Some turns have more tokens than such a layer keeps; the last rewinds further than it can."""
  monkeypatch.setattr(config_lib, 'REWIND', 2)
  config = dataclasses.replace(lm.config, windows=(None, 6))
  windowed = dataclasses.replace(lm, config=config)
  greedy = SamplingConfig(temperature=0.0, max_tokens=20)

  def rewinding(context):
    first = yield Turn('first', context, greedy)
    second = yield Turn('second', context + first.tokens, greedy)
    little = context + first.tokens + second.tokens[:-1] + [3]
    much = context + first.tokens[:4] + [5, 6]
    return [
      (context, first),
      (context + first.tokens, second),
      (little, (yield Turn('little', little, greedy))),
      (much, (yield Turn('much', much, greedy))),
    ]

  starts = ([], *PREFIXES)
  chains = [(str(i), rewinding(starts[i % 3] + c)) for i, c in enumerate(contexts(6))]
  results, _ = run(windowed, chains, prefixes=prefixes, page_tokens=4)
  for turns in results.values():
    for context, completion in turns:
      logits = full_logits(windowed, context + completion.tokens)[len(context) - 1 : -1]
      assert completion.tokens == logits.argmax(-1).tolist()
  sizes = EngineConfig(**SIZES | {'page_tokens': 4})
  assert (sizes.undo, sizes.slack) == (5 + 2, 5 + 2 + 64)
  assert pages_of(LENGTH, None, sizes.slack, 4) == LENGTH // 4
  assert pages_of(LENGTH, 6, sizes.slack, 4) == 21  # 6 + 71 tokens, and 4 of the first page


def test_repeated_rewinding_loses_no_token(lm, monkeypatch):
  """Each turn rewinds less than REWIND; together they rewind more than a layer keeps."""
  monkeypatch.setattr(config_lib, 'REWIND', 10)
  windowed = dataclasses.replace(lm, config=dataclasses.replace(lm.config, windows=(6, 6)))
  greedy = SamplingConfig(temperature=0.0, max_tokens=1)

  def rewinding(context):
    turns = []
    for number in range(4):
      completion = yield Turn(f'turn_{number}', context, greedy)
      turns.append((context, completion))
      context = context[: len(context) - 10] + [number + 3]
    return turns

  results, _ = run(windowed, [('chain', rewinding(list(range(1, 61))))], page_tokens=4)
  for context, completion in results['chain']:
    assert completion.tokens == [int(full_logits(windowed, context)[-1].argmax())]
