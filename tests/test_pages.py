"""The pages that a slot owns."""

import pytest

from cai_jax.sampling.caches import pages_of
from cai_jax.sampling.config import EngineConfig
from cai_jax.sampling.pages import PagePool


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
