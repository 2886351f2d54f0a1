"""The pool of pages: each page has one owner, and low pages go first."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from cai_jax.sampling.caches import pages_of
from cai_jax.sampling.config import EngineConfig
from cai_jax.sampling.pages import PagePool

PAGE, BLOCK, BLOCKS, ROW = 4, 3, 4, 6  # tokens of a page; pages of a block; blocks; pages of a slot


def make_pool(window=None, slots=4, groups=2):
  return PagePool(slots, groups, ROW, BLOCK, BLOCKS, PAGE, window, lambda *_: None)


def test_slots_get_the_lowest_free_pages_of_their_group():
  pool = make_pool()
  pool.extend(0, 9)
  pool.extend(1, 1)
  pool.extend(2, 5)  # the other group has pages of its own
  assert pool.table[:3, :3].tolist() == [[0, 1, 2], [3, -1, -1], [0, 1, -1]]
  assert pool.blocks == pool.used_blocks() == 2
  pool.shorten(0, 4)
  pool.extend(1, 9)
  assert pool.table[1, :3].tolist() == [3, 1, 2]
  pool.shorten(1, 0)
  assert pool.used_blocks() == 1 and pool.blocks == 2 and pool.count.tolist() == [1, 0, 2, 0]
  assert pool.select([2, -1], 99).tolist() == [[0, 1, *[99] * 4], [99] * 6]
  assert [pool.free_pages(slot) for slot in range(4)] == [11, 11, 10, 10]


def test_windowed_slots_give_back_pages_that_no_later_token_sees():
  pool = make_pool(window=6)
  pool.extend(0, 24)
  pool.forget(0, 19, 4)  # token 19 sees 14 to 19; four more are kept, so from 9, which is in page 2
  assert (pool.first[0], pool.count[0]) == (2, 4)
  assert pool.table[0].tolist() == [2, 3, 4, 5, -1, -1]
  assert pool.missing(0, 24) == 0 and pool.missing(0, 25) == 1
  pool.extend(0, 25)
  assert pool.table[0].tolist() == [2, 3, 4, 5, 0, -1]
  pool.shorten(0, 9)
  assert pool.table[0].tolist() == [2, *[-1] * 5]
  pool.shorten(0, 0)
  assert pool.first[0] == 0 and pool.missing(0, 1) == 1


def test_programs_are_compiled_for_a_few_numbers_of_blocks():
  for most, sizes in ((12, (1, 2, 3, 4, 6, 9, 12)), (8, (1, 2, 3, 4, 6, 8)), (1, (1,))):
    assert PagePool(1, 1, ROW, BLOCK, most, PAGE, None, lambda: None).block_sizes == sizes


def test_pages_move_to_fewer_blocks_once_a_block_less_is_enough():
  pool = make_pool(groups=1)
  for slot in range(3):
    pool.extend(slot, 3 * PAGE)
  pool.shorten(1, PAGE)
  assert pool.compact() == {}  # seven pages need three blocks of three
  pool.shorten(0, 0)
  assert pool.table[1:3, :3].tolist() == [[3, -1, -1], [6, 7, 8]]
  assert pool.compact() == {6: 0, 7: 1, 8: 2}  # four pages, and room for two
  assert pool.table[1:3, :3].tolist() == [[3, -1, -1], [0, 1, 2]]
  assert pool.used_blocks() == 2 and pool.free_pages(0) == BLOCK * BLOCKS - 4
  assert pool.compact() == {}
  pool.extend(0, 5 * PAGE)
  assert pool.table[0].tolist() == [4, 5, 6, 7, 8, -1]


operations = strategies.lists(
  strategies.tuples(
    strategies.sampled_from(['extend', 'shorten', 'forget']),
    strategies.integers(0, 3),
    strategies.integers(0, ROW * PAGE),
  ),
  max_size=40,
)


@hypothesis.given(operations)
@hypothesis.settings(max_examples=100, deadline=None)
def test_a_pool_agrees_with_a_plain_model_under_random_operations(operations):
  pool, owned = make_pool(window=6), [dict() for _ in range(4)]  # number of a page → page
  for name, slot, tokens in operations:
    pages, first = owned[slot], int(pool.first[slot])
    group = slice(slot // 2 * 2, slot // 2 * 2 + 2)
    if name == 'extend':
      new = [n for n in range(first, -(-tokens // PAGE)) if n not in pages]
      assert pool.missing(slot, tokens) == len(new)
      if len(new) > pool.free_pages(slot) or len(pages) + len(new) > ROW:
        continue
      taken = {page for other in owned[group] for page in other.values()}
      free = iter(n for n in range(BLOCK * BLOCKS) if n not in taken)
      pages.update((n, next(free)) for n in new)
      pool.extend(slot, tokens)
    elif name == 'shorten':
      owned[slot] = {n: page for n, page in pages.items() if n * PAGE < tokens}
      pool.shorten(slot, tokens)
    else:
      end = max(pages, default=-1) + 1
      tokens = min(tokens, end * PAGE)
      owned[slot] = {n: page for n, page in pages.items() if n >= (tokens - 6 - 4) // PAGE}
      pool.forget(slot, tokens, 4)
    for index, pages in enumerate(owned):
      expected = [pages[n] for n in sorted(pages)]
      assert pool.table[index, : pool.count[index]].tolist() == expected
      assert (pool.table[index, pool.count[index] :] == -1).all()
    last = max((page for pages in owned for page in pages.values()), default=-1)
    assert pool.used_blocks() == max(-(-(last + 1) // BLOCK), 1)
    assert pool.free_pages(slot) == BLOCK * BLOCKS - sum(map(len, owned[group]))
    np.testing.assert_array_equal(pool.count, [len(pages) for pages in owned])


@pytest.mark.parametrize('burst', [5, 32])
@pytest.mark.parametrize('window', [None, 7, 40])
def test_a_slot_has_room_for_every_step(burst, window):
  """It grows by bursts and chunks, and windowed layers keep what a stop text may undo."""
  config = EngineConfig(prefill_tokens=16, longest_burst=burst, page_tokens=16)
  row_pages = pages_of(2000, window, config.slack, config.page_tokens)
  pool = PagePool(1, 1, row_pages, 64, 8, config.page_tokens, window, lambda *_: None)
  tokens = 0
  for step in [burst] * 30 + [64, burst, 1] * 10:  # 64 is the smallest chunk on CPUs
    assert pool.free_pages(0) >= pool.missing(0, tokens + step)
    pool.extend(0, tokens + step)
    tokens += step
    pool.forget(0, tokens, config.undo)
    needed = tokens if window is None else window + config.undo
    assert int(pool.count[0]) * config.page_tokens >= min(needed, tokens)
  assert tokens < 2000
