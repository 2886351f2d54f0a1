"""The engine: sampled text is a function of the seed, the chain and the turn alone."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from cai_jax.model.sharding import param_shardings
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.mesh import make_mesh
from cai_jax.sampling import device
from cai_jax.sampling.config import EngineConfig
from cai_jax.sampling.engine import Engine, turn_key
from cai_jax.sampling.journal import Journal
from cai_jax.sampling.planning import longest_context
from cai_jax.sampling.types import SamplingConfig, Turn
from tests.engine_setup import (
  LENGTH,
  PREFIXES,
  SIZES,
  assert_close,
  chain,
  contexts,
  full_logits,
  items,
  run,
  tokens_of,
)
from tests.engine_setup import lm as lm

pytestmark = pytest.mark.usefixtures('full_optimization')


def test_sampled_chains_are_independent_of_batch_mates_and_order(lm):
  batch, _ = run(lm, items(11))
  reversed_batch, _ = run(lm, items(11)[::-1])
  assert batch == reversed_batch
  for item in (items(11)[3], items(11)[10]):
    alone, _ = run(lm, [item])
    assert alone[item[0]] == batch[item[0]]  # tokens, text and every bit of the log-probabilities


@pytest.mark.parametrize('dtype', ['float32', pytest.param('bfloat16', marks=pytest.mark.slow)])
@pytest.mark.parametrize('windows', [pytest.param((), marks=pytest.mark.slow), (None, 40)])
def test_every_bit_is_independent_of_other_slots(lm, dtype, windows):
  """A chain that runs alone has other chunks, bursts, pages and numbers of rows."""
  params = jax.tree.map(lambda x: x.astype(dtype), lm.params)
  config = dataclasses.replace(lm.config, windows=windows)
  model = dataclasses.replace(lm, config=config, params=params, dtype=dtype)
  starts = ([], *PREFIXES)
  lengths = (3, 9, 25)

  def new_items():
    return [
      (str(i), chain(starts[i % 3] + c, max_tokens=lengths[i % 2 + i % 3 // 2]))
      for i, c in enumerate(contexts(12))
    ]

  prefixes = {'base': PREFIXES}
  batch, _ = run(model, new_items(), prefixes=prefixes, page_tokens=16)
  for number in (0, 1, 5):  # each prefix and each length; the others have the same
    item = new_items()[number]
    alone, _ = run(model, [item], prefixes=prefixes, page_tokens=16)
    assert alone[item[0]] == batch[item[0]]


def test_tokens_are_independent_of_slots_chunks_and_bursts(lm):
  four_slots, _ = run(lm, items(7))
  config = EngineConfig(slots=1, prefill_tokens=16)
  one_slot = Engine({'base': lm}, length=256, seed=0, config=config)
  assert_close(dict(one_slot.run(items(7))), four_slots)


@pytest.mark.slow  # the test with a shared prefix has chains without one too
def test_eight_devices_give_the_tokens_of_one(lm):
  mesh = make_mesh(data=2, fsdp=2, tensor=2)
  shardings = param_shardings(lm.params, mesh)
  sharded = dataclasses.replace(lm, params=jax.device_put(lm.params, shardings), mesh=mesh)
  one, _ = run(lm, items(6))
  eight, _ = run(sharded, items(6))
  assert tokens_of(one) == tokens_of(eight)


def test_greedy_tokens_and_log_probabilities_equal_the_full_forward(lm):
  sampling = SamplingConfig(temperature=0.0, max_tokens=10)
  results, stats = run(lm, items(5, turns=2, sampling=sampling))
  for i, context in enumerate(contexts(5)):
    for number, completion in enumerate(results[f'chain {i}']):
      logits = full_logits(lm, context + completion.tokens)[len(context) - 1 : -1]
      assert completion.tokens == logits.argmax(-1).tolist()
      expected = jax.nn.log_softmax(logits)[np.arange(10), completion.tokens]
      np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)
      context = context + completion.tokens + [5 + number, 9]
  assert stats.reused_tokens > 0


def test_only_new_tokens_are_prefilled(lm):
  _, stats = run(lm, items(6))
  # Decode feeds the last token of a context. For a later context, the cache holds everything but
  # the last sampled token and the two tokens after it.
  first_turns = sum(len(c) - 1 for c in contexts(6))
  assert stats.prefilled_tokens == first_turns + 6 * 2 * 2
  assert stats.turns == 18 and stats.sampled_tokens == 18 * 12


def test_slots_wait_to_share_prefill_chunks(lm, monkeypatch):
  chunk_tokens = []

  def run_step(*args, program=device.run):
    if args[6] is not None:
      chunk_tokens.append(int((args[6].positions >= 0).sum()))
    return program(*args)

  monkeypatch.setattr(device, 'run', run_step)
  _, stats = run(lm, items(24), slots=8)
  assert sum(chunk_tokens) == stats.prefilled_tokens
  assert 0 < max(chunk_tokens) <= 64
  filled = [count for count in chunk_tokens if count]
  assert len(filled) < stats.turns * 3 / 4  # without sharing, at least one chunk per turn


def test_stop_tokens_and_stop_texts_end_a_turn(lm):
  unstopped, _ = run(lm, items(6, turns=1, max_tokens=30))
  completion = unstopped['chain 2'][0]
  assert completion.finish_reason == 'length' and len(completion.tokens) == 30
  stop = completion.tokens[17]
  first = completion.tokens.index(stop)
  stopped, _ = run(lm, items(6, turns=1, max_tokens=30), stops=[stop])
  assert stopped['chain 2'][0].tokens == completion.tokens[: first + 1]
  assert stopped['chain 2'][0].finish_reason == 'stop'
  assert stopped['chain 2'][0].logprobs == completion.logprobs[: first + 1]

  text = completion.text
  piece = text[len(text) // 2 : len(text) // 2 + 3]
  cut, _ = run(lm, items(6, turns=1, max_tokens=30), texts=[piece])
  assert cut['chain 2'][0].text == text[: text.index(piece)]
  assert cut['chain 2'][0].finish_reason == 'stop_text'
  assert cut['chain 2'][0].tokens == completion.tokens[: len(cut['chain 2'][0].tokens)]


def test_the_random_key_depends_on_seed_chain_and_turn():
  keys = [turn_key(*parts).tolist() for parts in itertools.product((0, 1), 'ab', ('x', 'y'))]
  assert len({tuple(k) for k in keys}) == 8
  assert turn_key(0, 'a', 'x').tolist() == turn_key(0, 'a', 'x').tolist()


def test_a_journal_replays_finished_turns(lm, tmp_path):
  journal = Journal(tmp_path)
  first, stats = run(lm, items(6), journal=journal)
  journal.close()
  assert stats.replayed_turns == 0
  again, stats = run(lm, items(6), journal=Journal(tmp_path))
  assert again == first and stats.turns == 0 and stats.replayed_turns == 18
  longer, stats = run(lm, items(6, turns=4), journal=Journal(tmp_path))
  assert stats.turns == 6 and stats.replayed_turns == 18
  assert all(longer[name][:3] == first[name] for name in first)
  other, stats = run(lm, items(6), seed=1, journal=Journal(tmp_path))
  assert stats.replayed_turns == 0 and other != first


def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(lm, tmp_path):
  uninterrupted, _ = run(lm, items(9))
  journal = Journal(tmp_path)
  engine = Engine(
    {'base': lm},
    length=LENGTH,
    seed=0,
    config=EngineConfig(**SIZES),
    journal=journal,
  )
  list(itertools.islice(engine.run(items(9)), 4))  # loses the chains in flight
  journal.close()
  file = next(tmp_path.glob('*.jsonl'))
  file.write_bytes(file.read_bytes()[:-40])  # as if killed while writing a chain's turns
  resumed, stats = run(lm, items(9), journal=Journal(tmp_path))
  assert resumed == uninterrupted
  assert 0 < stats.replayed_turns < 27


def test_a_chain_can_use_two_models(lm):
  other = dataclasses.replace(lm, params=jax.tree.map(lambda x: -x, lm.params), fingerprint='-')

  def mixed(context):
    first = yield Turn('a', context, SamplingConfig(max_tokens=6), 'base')
    second = yield Turn('b', context + first.tokens, SamplingConfig(max_tokens=6), 'critic')
    third = yield Turn('c', context + first.tokens + [3], SamplingConfig(max_tokens=6), 'base')
    return [first, second, third]

  def engine():
    models = {'base': lm, 'critic': other}  # with the programs of the other tests
    return Engine(models, length=LENGTH, seed=0, config=EngineConfig(**SIZES))

  batch = dict(engine().run([(str(i), mixed(c)) for i, c in enumerate(contexts(7))]))
  alone = dict(engine().run([('5', mixed(contexts(7)[5]))]))
  assert alone['5'] == batch['5']


def test_more_chains_compile_no_further_programs(lm):
  run(lm, items(3))
  _, stats = run(lm, items(12, turns=2, max_tokens=7))
  assert stats.compilations == 0


def test_turns_that_do_not_fit_are_refused(lm):
  with pytest.raises(UserError, match='do not fit into a cache of 128'):
    run(lm, [('long', chain([1] * 120))])
  with pytest.raises(UserError, match="no model 'judge'"):
    run(lm, [('x', chain([1], model='judge'))])
  with pytest.raises(UserError, match='context is empty'):
    run(lm, [('x', chain([]))])
  with pytest.raises(UserError, match='longer than the 256'):
    Engine({'base': lm}, length=257, seed=0)


def test_settings_out_of_range_are_refused():
  with pytest.raises(UserError, match='slots=0'):
    EngineConfig(slots=0)
  for settings in ({'temperature': -1}, {'top_p': 0.0}, {'top_k': -1}, {'max_tokens': 0}):
    with pytest.raises(UserError, match=next(iter(settings))):
      SamplingConfig(**settings)


def test_a_chain_after_a_stop_text_is_independent_of_batch_mates(lm):
  unstopped, _ = run(lm, items(6, turns=1, max_tokens=30))
  text = unstopped['chain 2'][0].text
  sampling = SamplingConfig(max_tokens=30, stop=(text[len(text) // 2 : len(text) // 2 + 3],))

  def continued(context):
    first = yield Turn('turn_0', context, sampling)
    # The next context includes the tokens after the stop text. Depending on where the burst ended,
    # they were decoded or not; they must not be reused in either case.
    return [first, (yield Turn('next', context + unstopped['chain 2'][0].tokens, sampling))]

  mixed = items(6, turns=2, max_tokens=9)
  mixed[2] = ('chain 2', continued(contexts(6)[2]))
  batch, _ = run(lm, mixed)
  alone, _ = run(lm, [('chain 2', continued(contexts(6)[2]))])
  assert batch['chain 2'][0].finish_reason == 'stop_text'
  assert alone['chain 2'] == batch['chain 2']


def test_longest_context_is_exact_for_a_chain_that_never_stops():
  whole = 10 + 12 * 3 + 2 * 2
  assert longest_context(chain([1] * 10, turns=3, max_tokens=12)) == {'base': (whole, whole)}
  prefixes = {'base': [[2], [1] * 4]}
  longest = longest_context(chain([1] * 10, turns=3, max_tokens=12), prefixes)
  assert longest == {'base': (whole, whole - 4)}


def test_slots_that_the_mesh_does_not_divide_are_refused_before_a_run(lm):
  mesh = make_mesh(data=2, devices=jax.devices()[:2])
  params = jax.device_put(lm.params, param_shardings(lm.params, mesh))
  split = dataclasses.replace(lm, params=params, mesh=mesh)
  with pytest.raises(UserError, match='engine.slots=3'):
    Engine({'base': split}, length=LENGTH, seed=0, config=EngineConfig(slots=3))


def test_stats_report_times_and_compilations(lm):
  run(lm, items(3))
  _, stats = run(lm, items(20, turns=2))
  summary = stats.summary()
  assert 0 < stats.occupied <= stats.slot_steps == 4 * stats.decode_steps
  for name in ('prefill', 'decode', 'host'):
    assert 0 < summary[f'{name}_seconds'] < summary['seconds']
  assert summary['compilations'] == 0 and summary['chains'] == 20
  assert 0.3 < summary['occupancy'] <= 1


def test_an_engine_can_run_again_after_an_abandoned_run(lm):
  engine = Engine({'base': lm}, length=LENGTH, seed=0, config=EngineConfig(**SIZES))
  expected, _ = run(lm, items(7))
  list(itertools.islice(engine.run(items(7)), 2))
  assert dict(engine.run(items(7))) == expected


def test_dropped_chains_do_not_change_the_others(lm, tmp_path):
  expected, _ = run(lm, items(7))
  engine = Engine(
    {'base': lm}, length=LENGTH, seed=0, config=EngineConfig(**SIZES), journal=Journal(tmp_path)
  )
  pairs, bursts = items(7), itertools.count()
  # The first is dropped before its context is in the cache, the other one within its reply.
  dropped = {0: [pairs[0][1]], 2: [pairs[2][1]]}
  results = dict(engine.run(pairs, lambda: dropped.get(next(bursts), [])))
  names = [f'chain {i}' for i in (1, 3, 4, 5, 6)]
  assert results == {name: expected[name] for name in names}
  assert engine.stats.chains == 5 and pairs[0][1].gi_frame is pairs[2][1].gi_frame is None
  assert dict(engine.run(items(7))) == expected
  assert engine.stats.replayed_turns == 15  # those of the chains that finished


def test_nan_logits_end_the_run(lm):
  broken = dataclasses.replace(lm, params=jax.tree.map(lambda x: x * np.nan, lm.params))
  with pytest.raises(UserError, match='NaN'):
    run(broken, items(2))


def test_prefixes_and_stops_of_unknown_models_are_refused(lm):
  for arguments, message in (
    ({'prefixes': {'bse': PREFIXES}}, "'bse'"),
    ({'stops': {'bse': ((), ())}}, "'bse'"),
    ({'prefixes': {'base': [[]]}}, 'has 0 tokens'),
    ({'prefixes': {'base': [[1] * 256]}}, 'has 256 tokens'),
  ):
    with pytest.raises(ValueError, match=message):
      Engine({'base': lm}, length=LENGTH, seed=0, **arguments)


def test_a_replayed_run_reports_its_time(lm, tmp_path):
  run(lm, items(3), journal=Journal(tmp_path))
  _, stats = run(lm, items(3), journal=Journal(tmp_path))
  assert stats.turns == 0 and stats.seconds > 0
