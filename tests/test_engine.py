"""The engine: a text depends on seed, chain and turn alone, and on nothing else."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from cai_jax.model import cache as cache_lib
from cai_jax.model.config import ModelConfig
from cai_jax.model.lm import LM
from cai_jax.model.sharding import param_shardings
from cai_jax.model.transformer import init_params
from cai_jax.runtime.mesh import make_mesh
from cai_jax.sampling import config as config_lib
from cai_jax.sampling import device
from cai_jax.sampling.config import EngineConfig
from cai_jax.sampling.engine import Engine, longest_context, turn_key
from cai_jax.sampling.journal import Journal
from cai_jax.sampling.types import SamplingConfig, Turn

LENGTH = 128
SIZES = dict(slots=4, prefill_tokens=16, prefill_width=8, longest_burst=5)


@pytest.fixture(scope='module')
def lm(tiny_tokenizer):
  config = ModelConfig('llama', len(tiny_tokenizer), 32, 64, 2, 4, 2, 8, 256)
  mesh = make_mesh(devices=jax.devices()[:1])
  params = init_params(config, jax.random.key(0))
  params['head']['table'] = params['head']['table'] * 3  # so that tokens differ in likelihood
  return LM(config, params, tiny_tokenizer, mesh, 'float32', 'random', 'random-0')


def chain(context, turns=3, model='base', max_tokens=12, sampling=None):
  """Turns in one growing context; returns all completions."""
  sampling = sampling or SamplingConfig(max_tokens=max_tokens)
  done = []
  for number in range(turns):
    completion = yield Turn(f'turn_{number}', context, sampling, model)
    done.append(completion)
    context = context + completion.tokens + [5 + number, 9]
  return done


def contexts(count):
  rng = np.random.default_rng(0)
  return [rng.integers(1, 60, rng.integers(1, 40)).tolist() for _ in range(count)]


def run(lm, items, slots=4, seed=0, stops=(), texts=(), journal=None, prefixes=None, **sizes):
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
  return [(f'chain {i}', chain(c, **kwargs)) for i, c in enumerate(contexts(count))]


def test_a_chain_is_the_same_alone_in_a_batch_and_in_any_order(lm):
  together, _ = run(lm, items(11))
  backwards, _ = run(lm, items(11)[::-1])
  assert together == backwards
  for item in (items(11)[3], items(11)[10]):
    alone, _ = run(lm, [item])
    assert alone[item[0]] == together[item[0]]  # tokens, texts and every bit of the log-probs


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('windows', [(), (None, 40)])
def test_not_a_bit_hangs_on_what_other_slots_come_to(lm, monkeypatch, dtype, windows):
  """Alone a chain is in other chunks and bursts than beside others, and comes to fewer spans."""
  monkeypatch.setattr(cache_lib, 'SPAN', 32)
  params = jax.tree.map(lambda x: x.astype(dtype), lm.params)
  config = dataclasses.replace(lm.config, windows=windows)
  model = dataclasses.replace(lm, config=config, params=params, dtype=dtype)
  begins = ([], *PREFIXES)
  replies = (3, 9, 25)
  made = lambda: [  # noqa: E731
    (str(i), chain(begins[i % 3] + c, max_tokens=replies[i % 2 + i % 3 // 2]))
    for i, c in enumerate(contexts(12))
  ]
  prefixes = {'base': PREFIXES}
  together, _ = run(model, made(), prefixes=prefixes)
  for item in made():
    alone, _ = run(model, [item], prefixes=prefixes)
    assert alone[item[0]] == together[item[0]]


def test_tokens_do_not_depend_on_slots_chunks_and_bursts(lm):
  base, _ = run(lm, items(7))
  one = Engine({'base': lm}, length=256, seed=0, config=EngineConfig(slots=1, prefill_tokens=16))
  for name, completions in one.run(items(7)):
    for mine, other in zip(completions, base[name], strict=True):
      assert mine.tokens == other.tokens
      np.testing.assert_allclose(mine.logprobs, other.logprobs, atol=1e-4)


def test_eight_devices_give_the_tokens_of_one(lm):
  mesh = make_mesh(data=2, fsdp=2, tensor=2)
  shardings = param_shardings(lm.params, mesh)
  sharded = dataclasses.replace(lm, params=jax.device_put(lm.params, shardings), mesh=mesh)
  one, _ = run(lm, items(6))
  eight, _ = run(sharded, items(6))
  assert {k: [c.tokens for c in v] for k, v in one.items()} == {
    k: [c.tokens for c in v] for k, v in eight.items()
  }


def test_greedy_tokens_and_log_probabilities_are_those_of_the_full_forward(lm):
  sampling = SamplingConfig(temperature=0.0, max_tokens=10)
  done, stats = run(lm, items(5, turns=2, sampling=sampling))
  for i, context in enumerate(contexts(5)):
    for number, completion in enumerate(done[f'chain {i}']):
      logits = np.array(lm.logits([context + completion.tokens]))[0, len(context) - 1 : -1]
      assert completion.tokens == logits.argmax(-1).tolist()
      expected = jax.nn.log_softmax(logits)[np.arange(10), completion.tokens]
      np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)
      context = context + completion.tokens + [5 + number, 9]
  assert stats.reused_tokens > 0


def test_only_new_tokens_are_prefilled(lm):
  _, stats = run(lm, items(6))
  # The last token of a context is fed by decode. Of a second context, all but the last sampled
  # token and the two new ones lies in the cache.
  first = sum(len(c) - 1 for c in contexts(6))
  assert stats.prefilled_tokens == first + 6 * 2 * 2
  assert stats.turns == 18 and stats.sampled_tokens == 18 * 12


def test_slots_wait_to_be_prefilled_together(lm, monkeypatch):
  filled = []

  def prefill(kind, params, cache, entries, chunk, program=device.prefill):
    filled.append(int((chunk.positions >= 0).sum()))
    return program(kind, params, cache, entries, chunk)

  monkeypatch.setattr(device, 'prefill', prefill)
  _, stats = run(lm, items(24), slots=8)
  assert sum(filled) == stats.prefilled_tokens and 0 < min(filled) <= max(filled) <= 16
  assert len(filled) < stats.turns * 3 / 4  # each turn for itself would be a chunk a turn or more


def test_stop_tokens_and_stop_texts_end_a_turn(lm):
  free, _ = run(lm, items(6, turns=1, max_tokens=30))
  completion = free['chain 2'][0]
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


def test_seed_chain_and_turn_each_change_the_randomness():
  keys = [turn_key(*parts).tolist() for parts in itertools.product((0, 1), 'ab', ('x', 'y'))]
  assert len({tuple(k) for k in keys}) == 8
  assert turn_key(0, 'a', 'x').tolist() == turn_key(0, 'a', 'x').tolist()


def test_a_journal_replays_what_was_done(lm, tmp_path):
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


def test_a_run_that_was_cut_off_ends_with_the_same_bits(lm, tmp_path):
  whole, _ = run(lm, items(9))
  journal = Journal(tmp_path)
  engine = Engine(
    {'base': lm},
    length=LENGTH,
    seed=0,
    config=EngineConfig(**SIZES),
    journal=journal,
  )
  list(itertools.islice(engine.run(items(9)), 4))  # and the rest is lost in mid-air
  journal.close()
  file = next(tmp_path.glob('*.jsonl'))
  file.write_bytes(file.read_bytes()[:-40])  # a kill while a chain's turns were being written
  resumed, stats = run(lm, items(9), journal=Journal(tmp_path))
  assert resumed == whole
  assert 0 < stats.replayed_turns < 27


def test_a_damaged_journal_is_an_error_that_names_the_line(tmp_path):
  (tmp_path / 'turns-00000.jsonl').write_text('{"keys": ["a"], "turns": []}\nnot json\n')
  with pytest.raises(ValueError, match='line 2'):
    Journal(tmp_path)


def test_two_models_share_a_chain(lm):
  other = dataclasses.replace(lm, params=jax.tree.map(lambda x: -x, lm.params), fingerprint='-')

  def mixed(context):
    first = yield Turn('a', context, SamplingConfig(max_tokens=6), 'base')
    second = yield Turn('b', context + first.tokens, SamplingConfig(max_tokens=6), 'critic')
    third = yield Turn('c', context + first.tokens + [3], SamplingConfig(max_tokens=6), 'base')
    return [first, second, third]

  def engine():
    return Engine(
      {'base': lm, 'critic': other}, length=LENGTH, seed=0, config=EngineConfig(slots=3)
    )

  together = dict(engine().run([(str(i), mixed(c)) for i, c in enumerate(contexts(7))]))
  alone = dict(engine().run([('5', mixed(contexts(7)[5]))]))
  assert alone['5'] == together['5']


def test_the_number_of_programs_does_not_grow_with_the_chains(lm):
  run(lm, items(3))
  _, stats = run(lm, items(12, turns=2, max_tokens=7))
  assert stats.compilations == 0


def test_what_does_not_fit_is_an_error(lm):
  with pytest.raises(ValueError, match='do not fit into a cache of 128'):
    run(lm, [('long', chain([1] * 120))])
  with pytest.raises(ValueError, match="no model 'judge'"):
    run(lm, [('x', chain([1], model='judge'))])
  with pytest.raises(ValueError, match='context is empty'):
    run(lm, [('x', chain([]))])
  with pytest.raises(ValueError, match='longer than the 256'):
    Engine({'base': lm}, length=257, seed=0)
  with pytest.raises(ValueError, match='slots=0'):
    EngineConfig(slots=0)
  for wrong in ({'temperature': -1}, {'top_p': 0.0}, {'top_k': -1}, {'max_tokens': 0}):
    with pytest.raises(ValueError, match=next(iter(wrong))):
      SamplingConfig(**wrong)


def test_a_stop_text_leaves_nothing_that_hangs_on_other_chains(lm):
  """A chain that goes on after a stop text has the same bits alone and beside others."""
  free, _ = run(lm, items(6, turns=1, max_tokens=30))
  text = free['chain 2'][0].text
  sampling = SamplingConfig(max_tokens=30, stop=(text[len(text) // 2 : len(text) // 2 + 3],))

  def on(context):
    first = yield Turn('turn_0', context, sampling)
    # As if the model had written on just as it did: what it wrote lies in the cache or does not.
    return [first, (yield Turn('next', context + free['chain 2'][0].tokens, sampling))]

  beside = items(6, turns=2, max_tokens=9)
  beside[2] = ('chain 2', on(contexts(6)[2]))
  together, _ = run(lm, beside)
  alone, _ = run(lm, [('chain 2', on(contexts(6)[2]))])
  assert together['chain 2'][0].finish_reason == 'stop_text'
  assert alone['chain 2'] == together['chain 2']


def test_longest_context_is_exact_for_a_chain_that_never_stops():
  whole = 10 + 12 * 3 + 2 * 2
  assert longest_context(chain([1] * 10, turns=3, max_tokens=12)) == {'base': (whole, whole)}
  shared = {'base': [[2], [1] * 4]}
  found = longest_context(chain([1] * 10, turns=3, max_tokens=12), shared)
  assert found == {'base': (whole, whole - 4)}


PREFIXES = [[7, 8, 9] * 6, list(range(40, 65))]


def prefixed(count, **kwargs):
  """Chains of which a third begins with the first prefix, a third with the second."""
  begins = ([], *PREFIXES)
  return [
    (f'chain {i}', chain(begins[i % 3] + context, **kwargs))
    for i, context in enumerate(contexts(count))
  ]


def test_a_shared_prefix_changes_no_token_and_is_prefilled_once(lm):
  apart, before = run(lm, prefixed(9))
  shared, stats = run(lm, prefixed(9), prefixes={'base': PREFIXES})
  for name, completions in apart.items():
    for one, other in zip(completions, shared[name], strict=True):
      assert one.tokens == other.tokens
      np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
  tokens = sum(map(len, PREFIXES))
  assert stats.prefix_tokens == tokens
  assert before.prefilled_tokens - stats.prefilled_tokens == 3 * tokens
  assert stats.shared_tokens == 3 * 3 * tokens  # three chains each, of three turns


def test_a_chain_behind_a_prefix_is_the_same_alone_and_in_a_batch(lm):
  together, _ = run(lm, prefixed(9), prefixes={'base': PREFIXES})
  for item in (prefixed(9)[4], prefixed(9)[8]):
    alone, _ = run(lm, [item], prefixes={'base': PREFIXES})
    assert alone[item[0]] == together[item[0]]


def test_the_longest_prefix_that_leaves_a_token_is_taken(lm):
  prefix = list(range(20))
  engine = Engine(
    {'base': lm}, length=64, seed=0, prefixes={'base': [prefix[:10], prefix, prefix[:5]]}
  )
  assert engine._local['base'].prefix_of(prefix + [1]) == (1, 20)
  assert engine._local['base'].prefix_of(prefix) == (0, 10)
  assert engine._local['base'].prefix_of(prefix[:7]) == (2, 5)
  assert engine._local['base'].prefix_of([1, *prefix]) == (-1, 0)


def test_a_chain_may_change_prefix_and_history_from_turn_to_turn(lm):
  def wander(context):
    done = []
    for number, begin in enumerate((PREFIXES[0], PREFIXES[1], PREFIXES[1], [], PREFIXES[0])):
      asked = begin + context + [number]
      done.append((yield Turn(f'turn_{number}', asked, SamplingConfig(max_tokens=9))))
      context = context[number:] + done[-1].tokens[:5]
    return done

  def made():
    return [(str(i), wander(c)) for i, c in enumerate(contexts(6))]

  apart, _ = run(lm, made())
  shared, _ = run(lm, made(), prefixes={'base': PREFIXES})
  assert {k: [c.tokens for c in v] for k, v in apart.items()} == {
    k: [c.tokens for c in v] for k, v in shared.items()
  }


def test_eight_devices_behind_a_prefix_give_the_tokens_of_one(lm):
  mesh = make_mesh(data=2, fsdp=2, tensor=2)
  shardings = param_shardings(lm.params, mesh)
  sharded = dataclasses.replace(lm, params=jax.device_put(lm.params, shardings), mesh=mesh)
  one, _ = run(lm, prefixed(6), prefixes={'base': PREFIXES})
  eight, _ = run(sharded, prefixed(6), prefixes={'base': PREFIXES})
  assert {k: [c.tokens for c in v] for k, v in one.items()} == {
    k: [c.tokens for c in v] for k, v in eight.items()
  }


@pytest.mark.parametrize('prefixes', [{}, {'base': PREFIXES}])
def test_windowed_layers_keep_a_window_and_give_the_tokens_of_the_full_forward(
  lm, monkeypatch, prefixes
):
  """Turns of more tokens than the ring has, then one that takes back more than it can."""
  monkeypatch.setattr(config_lib, 'REWIND', 2)
  config = dataclasses.replace(lm.config, windows=(None, 6))
  windowed = dataclasses.replace(lm, config=config)
  greedy = SamplingConfig(temperature=0.0, max_tokens=20)

  def back(context):
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

  begins = ([], *PREFIXES)
  made = [(str(i), back(begins[i % 3] + c)) for i, c in enumerate(contexts(6))]
  done, _ = run(windowed, made, prefixes=prefixes)
  for turns in done.values():
    for context, completion in turns:
      logits = np.array(windowed.logits([context + completion.tokens]))[0, len(context) - 1 : -1]
      assert completion.tokens == logits.argmax(-1).tolist()
  lengths = cache_lib.cache_lengths(config, LENGTH, EngineConfig(**SIZES).slack)
  assert lengths == ((LENGTH,), (6 + 16 + 5 + 2,))


def test_a_ring_that_is_taken_back_again_and_again_loses_no_token(lm, monkeypatch):
  """Each turn takes back less than REWIND, all together more than the ring keeps."""
  monkeypatch.setattr(config_lib, 'REWIND', 10)
  windowed = dataclasses.replace(lm, config=dataclasses.replace(lm.config, windows=(6, 6)))
  assert cache_lib.cache_lengths(windowed.config, LENGTH, 8 + 5 + 10) == ((29,), (29,))
  greedy = SamplingConfig(temperature=0.0, max_tokens=1)

  def back(context):
    done = []
    for number in range(4):
      completion = yield Turn(f'turn_{number}', context, greedy)
      done.append((context, completion))
      context = context[: len(context) - 10] + [number + 3]
    return done

  ((_, done),) = run(windowed, [('chain', back(list(range(1, 61))))], prefill_tokens=8)[0].items()
  for context, completion in done:
    assert completion.tokens == [int(np.array(windowed.logits([context]))[0, -1].argmax())]


def test_slots_that_the_mesh_does_not_divide_are_an_error_before_a_run(lm):
  mesh = make_mesh(data=2, devices=jax.devices()[:2])
  params = jax.device_put(lm.params, param_shardings(lm.params, mesh))
  split = dataclasses.replace(lm, params=params, mesh=mesh)
  with pytest.raises(ValueError, match='engine.slots=3'):
    Engine({'base': split}, length=LENGTH, seed=0, config=EngineConfig(slots=3))


@pytest.mark.parametrize('windows', [(), (None, 40)])
def test_spans_change_no_token(lm, monkeypatch, windows):
  monkeypatch.setattr(cache_lib, 'SPAN', 32)
  model = dataclasses.replace(lm, config=dataclasses.replace(lm.config, windows=windows))
  whole, _ = run(model, prefixed(9), prefixes={'base': PREFIXES})
  parts, _ = run(model, prefixed(9), prefixes={'base': PREFIXES}, spans=4)
  for name, completions in whole.items():
    for one, other in zip(completions, parts[name], strict=True):
      assert one.tokens == other.tokens
      np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


def test_a_budget_of_memory_sets_the_slots(lm):
  of_slot = device.cache_bytes(lm, LENGTH, 0)
  assert of_slot == 2 * 2 * 2 * 8 * LENGTH * 4  # layers, k and v, kv heads, head, tokens, bytes

  def slots(gib, prefixes=None):
    config = EngineConfig(slots=30, cache_gib=gib)
    return Engine({'base': lm}, length=LENGTH, seed=0, config=config, prefixes=prefixes).slots

  assert slots(30.5 * of_slot / 2**30) == 30
  assert slots(29.5 * of_slot / 2**30) == 24  # in steps of eight
  assert slots(5.5 * of_slot / 2**30) == 5
  assert slots(5.5 * of_slot / 2**30, {'base': PREFIXES}) == 4  # two prefixes, half a slot each
  with pytest.raises(ValueError, match='cache_gib'):
    slots(0.5 * of_slot / 2**30)


def test_sizes_of_chunks():
  config = EngineConfig(prefill_tokens=128, prefill_width=32)
  one = make_mesh(devices=jax.devices()[:1])
  assert config.chunk(64, one) == (128, 32)
  assert config.chunk(1, one) == (64, 32)  # one slot seldom has more at once
  four = make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])
  assert config.chunk(64, four) == (32, 32)  # tokens of each batch shard
  assert EngineConfig(prefill_tokens=9, prefill_width=3).chunk(4, four) == (8, 3)
  for name in ('prefill_tokens', 'prefill_width'):
    with pytest.raises(ValueError, match=name):
      EngineConfig(**{name: 0})
  with pytest.raises(ValueError, match='cache_gib'):
    EngineConfig(cache_gib=float('nan'))


def test_stats_tell_where_time_went_and_what_was_compiled(lm):
  run(lm, items(3))
  _, stats = run(lm, items(20, turns=2))
  summary = stats.summary()
  for name in ('prefill', 'decode', 'host'):
    assert 0 < summary[f'{name}_seconds'] < summary['seconds']
  assert summary['compilations'] == 0 and summary['chains'] == 20
  assert 0.3 < summary['occupancy'] <= 1


def test_an_engine_whose_run_was_left_can_run_again(lm):
  engine = Engine({'base': lm}, length=LENGTH, seed=0, config=EngineConfig(**SIZES))
  whole, _ = run(lm, items(7))
  list(itertools.islice(engine.run(items(7)), 2))
  assert dict(engine.run(items(7))) == whole


def test_logits_that_are_no_numbers_end_the_run(lm):
  broken = dataclasses.replace(lm, params=jax.tree.map(lambda x: x * np.nan, lm.params))
  with pytest.raises(ValueError, match='NaN'):
    run(broken, items(2))


def test_prefixes_and_stops_of_no_model_are_errors(lm):
  for wrong, said in (
    ({'prefixes': {'bse': PREFIXES}}, "'bse'"),
    ({'stops': {'bse': ((), ())}}, "'bse'"),
    ({'prefixes': {'base': [[]]}}, 'has 0 tokens'),
    ({'prefixes': {'base': [[1] * 256]}}, 'has 256 tokens'),
  ):
    with pytest.raises(ValueError, match=said):
      Engine({'base': lm}, length=LENGTH, seed=0, **wrong)


def test_a_run_from_the_journal_takes_time_too(lm, tmp_path):
  run(lm, items(3), journal=Journal(tmp_path))
  _, stats = run(lm, items(3), journal=Journal(tmp_path))
  assert stats.turns == 0 and stats.seconds > 0
