"""The forward with a paged cache equals the forward of whole texts."""

import numpy as np
import pytest

from tests.paged_rows import STALE, TOKENS, B, PagedRows, T


@pytest.mark.parametrize('name', ['llama3', 'mistral', 'qwen2_windows'])
def test_cached_decode_equals_the_full_forward(load, name):
  """The prompt comes in two chunks, then token by token. Pages are in no order, and stale."""
  lm = load(name)
  full = np.asarray(lm.logits(TOKENS))
  rows = PagedRows(lm)
  for start in (0, 7):
    parts = [(row, start, start + 7) for row in range(B)]
    for row, logits in enumerate(rows.prefill(parts)):
      np.testing.assert_allclose(logits, full[row, start : start + 7], atol=1e-4, rtol=0)
  for at in range(14, T):
    logits = rows.decode(range(B), [at] * B)
    np.testing.assert_allclose(logits[:, 0], full[:, at], atol=1e-4, rtol=0)


@pytest.mark.parametrize('name', ['llama3', 'mistral', 'qwen2_windows'])
def test_rows_decode_several_tokens_at_once_beside_prefill(load, name):
  """Two rows continue with four tokens each, while a third is prefilled in the same step."""
  lm = load(name)
  full = np.asarray(lm.logits(TOKENS))
  rows = PagedRows(lm)
  rows.prefill([(0, 0, 9), (1, 0, 3)])
  decoded, (prefilled,) = rows.step([0, 1], [9, 3], [(2, 0, 13)], tokens=4)
  np.testing.assert_allclose(decoded[0], full[0, 9:13], atol=1e-4, rtol=0)
  np.testing.assert_allclose(decoded[1], full[1, 3:7], atol=1e-4, rtol=0)
  np.testing.assert_allclose(prefilled, full[2, :13], atol=1e-4, rtol=0)
  logits = rows.decode(range(B), [13, 7, 13])
  np.testing.assert_allclose(logits[:, 0], full[range(B), [13, 7, 13]], atol=1e-4, rtol=0)


def test_cached_rows_of_different_lengths_equal_the_full_forward(load):
  """Rows are prefilled together, and each continues at its own position."""
  lm = load('llama3')
  full = np.asarray(lm.logits(TOKENS))
  lengths = np.array([9, 4, 1])
  rows = PagedRows(lm)
  for row, logits in enumerate(rows.prefill([(row, 0, n) for row, n in enumerate(lengths)])):
    np.testing.assert_allclose(logits, full[row, : lengths[row]], atol=1e-4, rtol=0)
  for row, length in enumerate(lengths):  # nothing beyond a row's own tokens is written
    values = rows.values(row)
    assert not (values[:length] == STALE).any()
    np.testing.assert_array_equal(values[length:], STALE)
  for step in range(6):
    logits = rows.decode(range(B), lengths + step)
    np.testing.assert_allclose(logits[:, 0], full[range(B), lengths + step], atol=1e-4, rtol=0)


@pytest.mark.parametrize('name', [pytest.param('llama3', marks=pytest.mark.slow), 'mistral'])
def test_packed_tokens_of_several_rows_equal_separate_rows(load, name):
  """Rows differ in length and progress; one takes two pieces, and there is padding at the end."""
  lm = load(name)
  full = np.asarray(lm.logits(TOKENS))
  rows = PagedRows(lm, rows=4)
  calls = [[(2, 0, 11), (0, 0, 3)], [(0, 3, 9), (3, 0, 7)], [(2, 11, T), (3, 7, T), (0, 9, T)]]
  for parts in calls:
    for (row, a, b), logits in zip(parts, rows.prefill(parts), strict=True):
      np.testing.assert_allclose(logits, full[row % B, a:b], atol=1e-4, rtol=0)
  np.testing.assert_array_equal(rows.values(1), STALE)  # row 1 had no token
