"""The engine's sizes: chunks, pages, programs and memory change no result, or by rounding."""

import dataclasses

import jax
import pytest

from cai_jax.model.sharding import param_shardings
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.mesh import make_mesh
from cai_jax.sampling import page_cache, pages, programs
from cai_jax.sampling.caches import cache_bytes
from cai_jax.sampling.config import EngineConfig
from cai_jax.sampling.engine import Engine
from cai_jax.sampling.types import SamplingConfig, Turn
from tests.engine_setup import (
  LENGTH,
  PREFIXES,
  SIZES,
  assert_close,
  chain,
  contexts,
  items,
  prefixed,
  run,
)
from tests.engine_setup import lm as lm

pytestmark = pytest.mark.usefixtures('full_optimization')


@pytest.mark.parametrize('windows', [pytest.param((), marks=pytest.mark.slow), (None, 40)])
def test_sizes_of_chunks_change_no_bit_and_those_of_pages_no_token(lm, windows):
  """This holds on CPUs in f32, if the number of rows is the same or at least 64."""
  model = dataclasses.replace(lm, config=dataclasses.replace(lm.config, windows=windows))
  default, _ = run(model, prefixed(9), prefixes={'base': PREFIXES})
  for sizes in ({'prefill_tokens': 128}, {'longest_burst': 3}):
    other, _ = run(model, prefixed(9), prefixes={'base': PREFIXES}, **sizes)
    assert other == default
  other, _ = run(model, prefixed(9), prefixes={'base': PREFIXES}, page_tokens=24)
  assert_close(other, default)  # pages are merged one by one, so their size rounds differently


def small_pool(monkeypatch, share):
  """Let engines have pages for a share of what their slots need at their largest size."""
  fit = EngineConfig.fit
  monkeypatch.setattr(EngineConfig, 'fit', lambda *args: (fit(*args)[0], share))
  monkeypatch.setattr(page_cache, 'MIN_BLOCK', 4)


def test_a_small_pool_changes_no_token_and_the_first_chain_never_waits(lm, monkeypatch):
  """The pool holds about one slot's largest cache, and chains need several times as much."""
  options = dict(turns=3, max_tokens=20)
  expected, _ = run(lm, items(9, **options), slots=6, page_tokens=8)
  small_pool(monkeypatch, 0.3)
  waits = []

  def extend(cache, slot, tokens, original=page_cache.PageCache.extend):
    extended = original(cache, slot, tokens)
    oldest = min(started for started in cache.started if started >= 0)
    waits.append((cache.started[slot] == oldest, extended))
    return extended

  monkeypatch.setattr(page_cache.PageCache, 'extend', extend)
  results, _ = run(lm, items(9, **options), slots=6, page_tokens=8)
  assert_close(results, expected)  # pools of other sizes round differently
  assert (False, False) in waits and (True, False) not in waits


@pytest.mark.parametrize('windows', [pytest.param((), marks=pytest.mark.slow), (None, 40)])
def test_moving_pages_changes_no_bit(lm, monkeypatch, windows):
  model = dataclasses.replace(lm, config=dataclasses.replace(lm.config, windows=windows))
  monkeypatch.setattr(page_cache, 'MIN_BLOCK', 2)
  monkeypatch.setattr(page_cache, 'MAX_BLOCKS', 99)
  moves, compact = [], pages.PagePool.compact
  uneven = lambda: [(str(i), chain(c, 1 + i % 4)) for i, c in enumerate(contexts(9))]  # noqa: E731

  def record(pool):
    moves.append(compact(pool))
    return moves[-1]

  options = dict(slots=6, page_tokens=8)
  with monkeypatch.context() as still:
    still.setattr(pages.PagePool, 'compact', lambda pool: {})
    expected, _ = run(model, uneven(), **options)
  monkeypatch.setattr(pages.PagePool, 'compact', record)
  results, _ = run(model, uneven(), **options)
  assert results == expected
  assert sum(map(len, moves)) > 5


def test_chains_of_two_models_do_not_wait_for_each_other_for_ever(lm, monkeypatch):
  """Half of the chains begin in each model, so each model is the first that some chain asks."""
  small_pool(monkeypatch, 0.3)
  models = {'base': lm, 'critic': dataclasses.replace(lm, fingerprint='critic')}

  def alternating(context, first):
    for number in range(4):
      model = ('base', 'critic')[(first + number) % 2]
      sampling = SamplingConfig(max_tokens=15)
      completion = yield Turn(f'turn_{number}', context, sampling, model)
      context = context + completion.tokens
    return context

  def new_items():
    return [(str(i), alternating(c, i)) for i, c in enumerate(contexts(10))]

  def engine(**sizes):
    return Engine(models, length=LENGTH, seed=0, config=EngineConfig(**SIZES | sizes))

  few = dict(engine(slots=6, page_tokens=8).run(new_items()))
  monkeypatch.undo()
  assert few == dict(engine(slots=6, page_tokens=8).run(new_items()))


@pytest.mark.slow
def test_a_small_pool_in_each_batch_shard_is_enough(lm, monkeypatch):
  mesh = make_mesh(data=2, devices=jax.devices()[:2])
  params = jax.device_put(lm.params, param_shardings(lm.params, mesh))
  split = dataclasses.replace(lm, params=params, mesh=mesh)
  options = dict(turns=2, max_tokens=20)
  expected, _ = run(split, items(9, **options), slots=8, page_tokens=8)
  small_pool(monkeypatch, 0.3)
  results, _ = run(split, items(9, **options), slots=8, page_tokens=8)
  assert_close(results, expected)


def test_the_memory_budget_limits_the_slots(lm):
  """As many slots as fit at half of their largest size."""
  slot_bytes = cache_bytes(lm, LENGTH, 0)
  # layers, k and v, kv heads, head size, tokens, bytes
  assert slot_bytes == 2 * 2 * 2 * 8 * LENGTH * 4

  def budget(largest):
    sizes = dict(slots=30, page_tokens=64, cache_gib=largest * slot_bytes / 2**30)
    return SIZES | sizes

  def fit(largest, prefix_tokens=0):
    config = EngineConfig(**budget(largest))
    return config.fit([lm], LENGTH, [prefix_tokens])

  assert fit(30.5) == (30, 1.0)
  assert fit(15.5) == (30, pytest.approx(15.5 / 30))
  assert fit(14.5) == (24, pytest.approx(14.5 / 24))  # a multiple of eight
  assert fit(2.5) == (5, pytest.approx(0.5))
  assert fit(2.5, LENGTH // 2) == (4, pytest.approx(0.5))  # prefixes take half a slot
  with pytest.raises(UserError, match='cache_gib'):
    fit(0.5)
  config = EngineConfig(**budget(2.5))
  assert Engine({'base': lm}, length=LENGTH, seed=0, config=config).slots == 5


def test_a_chunk_is_divided_over_batch_shards_and_has_a_few_sizes(lm):
  one, four = lm.mesh, make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])
  assert EngineConfig(prefill_tokens=200).chunk_sizes(64, one) == (32, 64, 96, 128, 192, 208)
  assert EngineConfig(prefill_tokens=512).chunk_sizes(64, four) == (64, 128)  # per batch shard
  assert EngineConfig(prefill_tokens=9).chunk_sizes(4, four) == (64,)
  assert EngineConfig(prefill_tokens=128, prefill_width=3).piece_width(4, one) == 3
  assert EngineConfig().row_sizes(4, lm) == (4,)  # below 64 rows, bits depend on their number
  assert EngineConfig().row_sizes(300, lm) == (80, 160, 240, 300)
  assert EngineConfig().row_sizes(64, lm) == (16, 32, 48, 64)
  sharded = dataclasses.replace(lm, mesh=four)  # a step is one program, which compiles slowly
  assert EngineConfig().row_sizes(300, sharded) == (64, 75, 150, 300)
  for name in ('prefill_tokens', 'prefill_width'):
    with pytest.raises(UserError, match=name):
      EngineConfig(**{name: 0})
  with pytest.raises(UserError, match='cache_gib'):
    EngineConfig(cache_gib=float('nan'))


@pytest.mark.parametrize('dtype', ['float32', pytest.param('bfloat16', marks=pytest.mark.slow)])
def test_the_number_of_blocks_and_of_rows_changes_no_bit(lm, monkeypatch, dtype):
  """Which programs run depends on measured times, so their bits must not differ."""
  params = jax.tree.map(lambda x: x.astype(dtype), lm.params)
  model = dataclasses.replace(lm, params=params, dtype=dtype)
  seen = []

  def choose(self, rows, tokens, blocks, drafts=0, method=programs.Programs.choose):
    size = method(self, rows, tokens, blocks, drafts)
    seen.append(size)
    return size

  monkeypatch.setattr(programs.Programs, 'choose', choose)

  def run_anew():
    programs.find_programs.cache_clear()
    results, _ = run(model, items(150, turns=1), slots=130, page_tokens=16)
    programs.find_programs.cache_clear()
    return results

  with monkeypatch.context() as exact:  # a program for every size
    exact.setattr(programs.Programs, '_general', lambda self, size: size)
    exact.setattr(programs.Size, 'holds', lambda self, other: self == other)
    results = [run_anew()]
  monkeypatch.setattr(programs, 'GENERAL_SHARES', (1,))
  results.append(run_anew())
  assert results[0] == results[1]
  assert len({size.blocks for size in seen}) > 1
  assert len({size.rows for size in seen if size.rows}) > 1
  assert min(size.rows for size in seen if size.rows) < 64  # beside prefilled tokens
