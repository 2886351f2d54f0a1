"""Drafts: looked up in a row's own text, and without effect on what is sampled."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cai_jax.sampling.config import EngineConfig
from cai_jax.sampling.draft_choice import DraftChoice
from cai_jax.sampling.drafts import KEY, count_kept, find_drafts
from cai_jax.sampling.engine import Engine
from cai_jax.sampling.journal import Journal
from cai_jax.sampling.stats import describe
from cai_jax.sampling.types import SamplingConfig
from tests.engine_setup import LENGTH, PREFIXES, SIZES, assert_close, chain, contexts, run
from tests.engine_setup import lm as lm

pytestmark = pytest.mark.usefixtures('full_optimization')


def reference(text, count):
  """Return what `find_drafts` should return for one row, without undefined entries."""
  best, best_score = len(text) - 2, 0
  for index in range(len(text) - 1):
    score = 0
    while score < KEY and score <= index and text[index - score] == text[-1 - score]:
      score += 1
    if score and score >= best_score:
      best, best_score = index, score
  if not best_score:
    return [text[-1]] * count
  for _ in range(count):
    text = [*text, text[best + 1]]
    best += 1
  return text[len(text) - count :]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=20), min_size=1, max_size=4))
def test_a_draft_follows_the_latest_longest_match(texts):
  count, length = 5, 24
  rows = np.full((4, length), 1, np.int32)  # undefined entries could match as well
  for row, text in zip(rows, texts, strict=False):
    row[: len(text)] = text
  position = np.array([len(text) - 1 for text in texts] + [0] * (4 - len(texts)), np.int32)
  drafts = np.asarray(jax.jit(find_drafts, static_argnums=2)(rows, position, count))
  for draft, text in zip(drafts, texts, strict=False):
    assert draft.tolist() == reference(text, count)


@pytest.mark.parametrize(
  ('draft', 'sampled', 'kept'),
  [
    ([1, 2, 3], [1, 2, 3, 9], 4),  # all agree, and the step gives one token more
    ([1, 2, 3], [1, 5, 3, 9], 2),  # what was sampled after a wrong token does not count
    ([1, 2, 3], [4, 2, 3, 9], 1),
    ([], [4], 1),
  ],
)
def test_a_step_keeps_the_tokens_that_agree(draft, sampled, kept):
  draft = np.array(draft, np.int32).reshape(1, -1)
  assert count_kept(draft, np.array([sampled], np.int32)).tolist() == [kept]


@pytest.fixture(scope='module')
def repetitive(lm):
  """A model whose distributions are so far from uniform that its replies repeat themselves."""
  params = lm.params | {'head': {'table': lm.params['head']['table'] * 4}}
  return dataclasses.replace(lm, params=params)


SETTINGS = (
  {'temperature': 0.0},
  {'temperature': 0.7, 'top_p': 0.9},
  {'repetition_penalty': 1.1},
  {'presence_penalty': 0.5, 'frequency_penalty': 0.1, 'logit_bias': ((5, 4.0),)},
)


def repeated_items(count, settings=SETTINGS):
  """Return (id, chain) pairs whose contexts repeat themselves, with settings in turn."""
  starts, lengths = ([], *PREFIXES), (3, 9, 25)
  return [
    (
      str(i),
      chain(
        [*starts[i % 3], *c[:12], *c[:12]],
        sampling=SamplingConfig(max_tokens=lengths[i % 2 + i % 3 // 2], **settings[i % 4]),
      ),
    )
    for i, c in enumerate(contexts(count))
  ]


@pytest.mark.slow
@pytest.mark.parametrize(
  ('windows', 'dtype', 'numbers'),
  [
    ((), 'float32', (3, 7)),
    ((), 'bfloat16', (3, 7)),
    ((None, 40), 'float32', (3, 7)),
    ((None, 40), 'bfloat16', (3, 7)),
  ],
)
def test_drafts_change_no_bit(repetitive, windows, dtype, numbers):
  """Of rows with all settings, shared prefixes, stop tokens and stop texts."""
  params = jax.tree.map(lambda x: x.astype(dtype), repetitive.params)
  config = dataclasses.replace(repetitive.config, windows=windows)
  model = dataclasses.replace(repetitive, config=config, params=params, dtype=dtype)
  same = dict(prefixes={'base': PREFIXES}, stops=(7, 11), texts=('e a',), page_tokens=16, slots=64)
  plain, stats = run(model, repeated_items(12), **same)
  for drafts in numbers:
    drafted, faster = run(model, repeated_items(12), **same, draft_tokens=drafts)
    assert drafted == plain  # tokens, text and every bit of the log-probabilities
    assert faster.sampled_tokens == stats.sampled_tokens
    assert faster.draft_tokens > 1.1 * faster.draft_steps  # else nothing was tested
    assert f'{faster.draft_tokens / faster.draft_steps:.2f} tokens' in describe(faster.summary())


@pytest.mark.slow
def test_drafts_of_few_slots_change_no_token(repetitive):
  plain, _ = run(repetitive, repeated_items(6), slots=4)
  for slots, drafts in ((4, 7), (1, 2)):
    assert_close(run(repetitive, repeated_items(6), slots=slots, draft_tokens=drafts)[0], plain)


def test_a_resumed_run_with_drafts_has_the_bits_of_an_uninterrupted_one(repetitive, tmp_path):
  sizes = SIZES | {'draft_tokens': 3}
  uninterrupted, _ = run(repetitive, repeated_items(6), **sizes)
  journal = Journal(tmp_path)
  engine = Engine(
    {'base': repetitive}, length=LENGTH, seed=0, config=EngineConfig(**sizes), journal=journal
  )
  list(itertools.islice(engine.run(repeated_items(6)), 2))  # loses the chains in flight
  journal.close()
  resumed, stats = run(repetitive, repeated_items(6), journal=Journal(tmp_path), **sizes)
  assert resumed == uninterrupted
  assert 0 < stats.replayed_turns < 18


def bursts(choice, active, count, speed):
  """Run `count` bursts and return the drafts of each; `speed` has a row's tokens per second."""
  used = []
  for _ in range(count):
    drafts = choice.next(active)
    compiled = drafts not in used
    choice.record(active, drafts, 5.0 if compiled else 1.0, speed[drafts], compiled)
    used.append(drafts)
  return used


def test_drafts_are_tried_when_few_rows_are_active_and_kept_where_they_win():
  assert set(bursts(DraftChoice(64), 33, 50, {0: 1})) == {0}
  for active, drafts in ((32, 1), (16, 3), (9, 3), (8, 7), (1, 7)):
    fast = bursts(DraftChoice(64), active, 100, {0: 10, drafts: 15})
    assert set(fast[:6]) == {0}  # as long as a compilation would take
    assert 85 < fast.count(drafts) < 94  # of the last 94, a few are run without to compare
    slow = bursts(DraftChoice(64), active, 100, {0: 10, drafts: 8})
    assert 2 <= slow.count(drafts) < 9


def test_drafts_change_sides_only_for_a_clear_gain():
  choice = DraftChoice(64)
  assert bursts(choice, 8, 100, {0: 10, 7: 10.5}).count(7) < 9
  assert bursts(choice, 8, 200, {0: 10, 7: 20})[-20:].count(7) >= 19
  assert bursts(choice, 8, 200, {0: 10, 7: 9.5})[-20:].count(7) >= 19
  assert bursts(choice, 8, 200, {0: 10, 7: 5})[-20:].count(7) <= 1
