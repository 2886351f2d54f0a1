"""Drafts: looked up in a row's own text, and without effect on what is sampled."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cai_jax.sampling.drafts import KEY, count_kept, find_drafts


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
