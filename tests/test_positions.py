"""Log-probabilities of single tokens against the logits, and their sums against `likelihood`."""

import jax
import numpy as np
import pytest

import cai_jax
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.mesh import make_mesh
from cai_jax.scoring import likelihood
from cai_jax.scoring.positions import score_tokens
from cai_jax.tiny.files import MODELS

ROWS = [[7, 9, 11, 4, 5], [3], [8, 6] * 20, [5, 5, 5]]


@pytest.fixture(scope='module')
def lm():
  return cai_jax.load(MODELS['tiny-small'], mesh=make_mesh(1, devices=jax.devices()[:1]))


@pytest.fixture(scope='module')
def scored(lm):
  return score_tokens(lm, ROWS, 3)


def test_log_probabilities_are_those_of_the_logits(lm, scored):
  for row, result in zip(ROWS, scored, strict=True):
    padded = np.pad(row, (0, 40 - len(row)))
    log_p = np.asarray(jax.nn.log_softmax(lm.logits([padded])[0]))[: len(row)]
    assert np.isnan(result.logprobs[0]) and result.logprobs.shape == (len(row),)
    expected = [log_p[t, row[t + 1]] for t in range(len(row) - 1)]
    np.testing.assert_allclose(result.logprobs[1:], expected, atol=2e-5)
    np.testing.assert_array_equal(result.top_ids, np.argsort(-log_p, axis=1)[:, :3])
    np.testing.assert_allclose(result.top_logprobs, -np.sort(-log_p, axis=1)[:, :3], atol=2e-5)


def test_sums_are_the_log_likelihoods(lm, scored):
  splits = [(i, split) for i, row in enumerate(ROWS) for split in range(1, len(row))]
  contexts, continuations = zip(*((ROWS[i][:n], ROWS[i][n:]) for i, n in splits), strict=True)
  expected = likelihood.log_likelihoods(lm, contexts, continuations)
  sums = [scored[i].logprobs[n:].sum(dtype=np.float64) for i, n in splits]
  np.testing.assert_allclose(sums, expected, atol=1e-4)


def test_the_most_likely_token_has_one_log_probability(lm, scored):
  greedy = [[*row, int(result.top_ids[-1, 0])] for row, result in zip(ROWS, scored, strict=True)]
  for again in score_tokens(lm, greedy, 3):
    assert again.logprobs[-1] == again.top_logprobs[-2, 0]  # equal bits, as clients compare them


def test_a_row_does_not_depend_on_the_others(lm, scored):
  (alone,) = score_tokens(lm, ROWS[:1], 3)
  np.testing.assert_allclose(alone.logprobs, scored[0].logprobs, atol=1e-5)


@pytest.mark.parametrize(
  ('row', 'message'), [([], 'no token'), ([-1], 'vocabulary'), ([1] * 10_000, 'positions')]
)
def test_rows_that_cannot_be_scored_are_errors(lm, row, message):
  with pytest.raises(UserError, match=message):
    score_tokens(lm, [[1], row])
