"""Layers that keep a state: what the engine reuses, and what it must compute again or refuse."""

import dataclasses

import jax
import numpy as np
import pytest

from cai_jax.model.config import DeltaRule, ModelConfig
from cai_jax.model.lm import LM
from cai_jax.model.sharding import param_shardings
from cai_jax.model.transformer import init_params
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.mesh import make_mesh
from cai_jax.sampling import auto
from cai_jax.sampling.caches import cache_bytes, layer_state_bytes
from cai_jax.sampling.journal import Journal
from cai_jax.sampling.types import SamplingConfig, Turn
from cai_jax.scoring.likelihood import log_likelihoods
from tests.engine_setup import (
  PREFIXES,
  assert_close,
  chain,
  contexts,
  full_logits,
  items,
  run,
  tokens_of,
)

DELTA = DeltaRule((0, 2), 2, 4, 8, 12, 4)
GREEDY = SamplingConfig(temperature=0.0, max_tokens=8)


@pytest.fixture(scope='module')
def lm(tiny_tokenizer):
  """A random model of which one layer has attention and two keep a state."""
  config = ModelConfig('qwen3_5_text', len(tiny_tokenizer), 32, 64, 3, 4, 2, 8, 256)
  config = dataclasses.replace(config, attention_gate=True, norm_eps=1e-2, delta=DELTA)
  params = init_params(config, jax.random.key(0))
  params['head']['table'] = params['head']['table'] * 3  # makes the distributions less uniform
  mesh = make_mesh(devices=jax.devices()[:1])
  return LM(config, params, tiny_tokenizer, mesh, 'float32', 'random', 'random-0')


def on_eight_devices(lm):
  mesh = make_mesh(data=2, fsdp=2, tensor=2)
  params = jax.device_put(lm.params, param_shardings(lm.params, mesh))
  return dataclasses.replace(lm, params=params, mesh=mesh)


def new_items(count=12):
  """Return chains of three turns, some behind shared prefixes, with replies of several lengths."""
  starts, lengths = ([], *PREFIXES), (3, 9, 18)
  return [
    (str(i), chain(starts[i % 3] + c, max_tokens=lengths[i % 2 + i % 3 // 2]))
    for i, c in enumerate(contexts(count))
  ]


@pytest.mark.parametrize('dtype', ['float32', pytest.param('bfloat16', marks=pytest.mark.slow)])
def test_every_bit_is_independent_of_other_slots(lm, dtype):
  """A chain that runs alone has other chunks, bursts and pages."""
  params = jax.tree.map(lambda x: x.astype(dtype), lm.params)
  model = dataclasses.replace(lm, params=params, dtype=dtype)
  options = dict(prefixes={'base': PREFIXES}, page_tokens=16)
  batch, stats = run(model, new_items(), **options)
  assert stats.reused_tokens > 0 and stats.shared_tokens > 0
  for number in (0, 1, 5):  # each prefix and each length; the others have the same
    item = new_items()[number]
    alone, _ = run(model, [item], **options)
    assert alone[item[0]] == batch[item[0]]


def test_chunks_and_prefixes_change_no_token(lm):
  """With a prefix, its tokens are computed by another program."""
  batch, _ = run(lm, new_items(), prefixes={'base': PREFIXES})
  other, stats = run(lm, new_items(), slots=1, prefill_tokens=64, prefill_width=16)
  assert stats.shared_tokens == 0
  assert_close(batch, other)


def test_a_killed_run_continues_with_the_same_bits(lm, tmp_path):
  whole, _ = run(lm, new_items())
  journal = Journal(tmp_path / 'journal')
  with pytest.MonkeyPatch.context() as patch:
    finished = []
    put = Journal.put

    def stop_after_four(self, turns):
      put(self, turns)
      finished.append(turns)
      if len(finished) == 4:
        raise KeyboardInterrupt

    patch.setattr(Journal, 'put', stop_after_four)
    with pytest.raises(KeyboardInterrupt):
      run(lm, new_items(), journal=journal)
  again, stats = run(lm, new_items(), journal=journal)
  assert stats.replayed_turns == sum(map(len, finished)) > 0
  assert again == whole


@pytest.mark.slow
def test_eight_devices_give_the_tokens_of_one(lm):
  prefixes = {'base': PREFIXES}
  one, _ = run(lm, new_items(6), prefixes=prefixes)
  eight, _ = run(on_eight_devices(lm), new_items(6), prefixes=prefixes)
  assert tokens_of(one) == tokens_of(eight)


@pytest.mark.parametrize('keep', [-1, 30, 20, 1, 0])
def test_a_context_that_goes_back_starts_over(lm, keep):
  """The second turn keeps so many tokens of what the slot holds; -1 keeps all."""
  context = contexts(4)[3] + [7] * 25

  def edited():
    first = yield Turn('first', context, GREEDY)
    held = context + first.tokens[:-1]
    kept = held if keep < 0 else held[:keep]
    second = yield Turn('second', [*kept, 11, 12, 13], GREEDY)
    return [*kept, 11, 12, 13], second

  def fresh(context):
    return [(yield Turn('second', context, GREEDY))]

  for prefixes in (None, {'base': [context[:15]]}):
    results, stats = run(lm, [('a', edited())], prefixes=prefixes)
    second_context, second = results['a']
    assert (stats.reused_tokens > 0) == (keep < 0)
    expected, _ = run(lm, [('a', fresh(second_context))], prefixes=prefixes)
    assert_close({'a': [second]}, expected)
    assert keep < 0 or expected['a'] == [second]


def test_after_a_stop_text_a_slot_starts_over(lm):
  """The device has decoded beyond it, by a number of tokens that depends on the burst."""
  (first,) = run(lm, items(1, turns=1))[0].values()
  text = first[0].text[3:5]
  results, stats = run(lm, items(1, turns=2), texts=[text])
  (completions,) = results.values()
  assert completions[0].finish_reason == 'stop_text' and stats.reused_tokens == 0
  whole, _ = run(lm, items(1, turns=2), texts=[text], longest_burst=1)
  assert whole == results


def test_drafts_are_refused(lm):
  with pytest.raises(UserError, match=r'engine\.draft_tokens is 2, but qwen3_5_text models have'):
    run(lm, items(1), draft_tokens=2)
  drafted, stats = run(lm, items(3), slots=64, draft_tokens='auto')
  assert stats.draft_steps == 0
  assert_close(drafted, run(lm, items(3))[0])


def test_continuations_that_share_a_context_are_scored(lm):
  rng = np.random.default_rng(0)
  context = rng.integers(3, 300, 40).tolist()
  continuations = [rng.integers(3, 300, n).tolist() for n in (1, 4, 9, 9)]
  values = log_likelihoods(lm, [context] * 4, continuations)
  for value, continuation in zip(values, continuations, strict=True):
    logits = full_logits(lm, context + continuation).astype(np.float64)[39:-1]
    log_p = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    assert value == pytest.approx(log_p[np.arange(len(continuation)), continuation].sum(), abs=1e-4)


def test_the_cache_of_a_slot_has_a_state_for_each_layer_that_keeps_one(lm):
  state = 4 * (2 * 2 * 8 * 12 + 3 * (2 * 2 * 8 + 4 * 12))  # f32, with the inputs of convolutions
  assert layer_state_bytes(DELTA, np.dtype('float32')) == state
  token = 2 * 2 * 8 * 4  # keys and values of one layer
  assert cache_bytes(lm, 100, 0) == 2 * state + 100 * token
  load = auto.measure_load([(lm.config, 'float32')], lm.mesh)
  assert load.slot_bytes(100, 0) == 2 * state + 100 * token
