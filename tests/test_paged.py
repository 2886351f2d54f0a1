"""Attention to pages as accelerators compute it, tested on a CPU."""

import dataclasses

import jax
import pytest

from cai_jax.model.attention import paged
from cai_jax.sampling import config
from tests.engine_setup import PREFIXES, assert_close, chain, contexts, run
from tests.engine_setup import lm as lm

pytestmark = pytest.mark.usefixtures('full_optimization')


@pytest.mark.parametrize('windows', [pytest.param((), marks=pytest.mark.slow), (None, 40)])
def test_the_attention_of_accelerators_gives_the_tokens_of_cpus(lm, monkeypatch, windows):
  """Accelerators gather pages in place of loops, and never mix prefill with decoding."""
  model = dataclasses.replace(lm, config=dataclasses.replace(lm.config, windows=windows))
  starts, lengths = ([], *PREFIXES), (3, 9, 25)

  def items():
    for i, context in enumerate(contexts(12)):
      yield str(i), chain(starts[i % 3] + context, max_tokens=lengths[i % 3])

  sizes = dict(prefixes={'base': PREFIXES}, page_tokens=16)
  expected, _ = run(model, items(), **sizes)
  attend = paged._attend_local
  calls = []

  def attend_as_accelerator(*args, on_cpu, **kwargs):
    calls.append(on_cpu)
    return attend(*args, on_cpu=False, **kwargs)

  monkeypatch.setattr(paged, '_attend_local', attend_as_accelerator)
  monkeypatch.setattr(config, 'on_cpu', lambda mesh: False)
  jax.clear_caches()
  try:
    results, _ = run(model, items(), **sizes)
    alone, _ = run(model, list(items())[:1], **sizes)
  finally:
    jax.clear_caches()
  assert calls
  assert_close(results, expected)
  assert alone['0'] == results['0']  # one size of each program, so the same bits
