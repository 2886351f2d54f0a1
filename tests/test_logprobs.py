"""Log-probabilities of tokens and sequences: values, gradients, and what is never in memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from cai_jax.data import packing
from cai_jax.model.logits import LogitTransform
from cai_jax.model.transformer import abstract_model
from cai_jax.training.losses import negative_log_likelihood
from cai_jax.training.losses.logprobs import sequence_logprobs, sum_segments, token_logprobs
from tests.preference_setup import random_units
from tests.training_setup import MODEL, initial_params

GRAPH, _ = abstract_model(MODEL)


def output_layer(rows=3, length=6):
  """Return random hidden states, table, targets and weights for a vocabulary of 11 tokens."""
  keys = jax.random.split(jax.random.key(1), 4)
  hidden = jax.random.normal(keys[0], (rows, length, 7))
  table = jax.random.normal(keys[1], (11, 7))
  targets = jax.random.randint(keys[2], (rows, length), 0, 11)
  return hidden, table, targets, (jax.random.uniform(keys[3], (rows, length)) > 0.4) * 1.0


def plain(transform, hidden, table, targets, weights):
  logits = hidden @ table.T / transform.divisor
  logits = logits if transform.cap is None else transform.cap * jnp.tanh(logits / transform.cap)
  logprobs = jax.nn.log_softmax(logits)
  return jnp.take_along_axis(logprobs, targets[..., None], -1)[..., 0] * weights


@pytest.mark.parametrize(
  ('num_slices', 'transform'),
  [
    pytest.param(1, LogitTransform(), marks=pytest.mark.slow),
    (4, LogitTransform(0.5, 3.0)),
  ],
)
def test_the_gradient_agrees_with_automatic_differentiation(num_slices, transform):
  hidden, table, targets, weights = output_layer()
  factors = jax.random.normal(jax.random.key(2), weights.shape)

  def objective(logprobs, hidden, table):
    values = logprobs(hidden, table, targets, weights)
    return jnp.sum(jnp.sin(values) * factors), values  # not linear: cotangents depend on values

  ours = functools.partial(objective, lambda *x: token_logprobs(num_slices, *x, transform))
  theirs = functools.partial(objective, functools.partial(plain, transform))

  def differentiate(function):
    return jax.jit(jax.value_and_grad(function, (0, 1), has_aux=True))(hidden, table)

  (actual, values), gradients = differentiate(ours)
  (expected, right), exact = differentiate(theirs)
  np.testing.assert_allclose(actual, expected, rtol=1e-5)
  np.testing.assert_allclose(values, right, atol=1e-6)
  for a, b in zip(gradients, exact, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-6)
  alone = jax.jit(jax.grad(lambda hidden: ours(hidden, table)[0]))(hidden)  # as with adapters
  np.testing.assert_allclose(alone, exact[0], atol=2e-6)


def test_slices_without_targets_are_skipped():
  hidden, table, targets, _ = output_layer(length=8)
  weights = jnp.zeros((3, 8)).at[0, 5].set(1).at[0, 2].set(1).at[2, 7].set(1)
  # The first slice has two positions per row: those with weight, then others in their order.
  used = jnp.zeros((3, 8), bool).at[0, (2, 5)].set(True).at[1, (0, 1)].set(True)
  used = used.at[2, (7, 0)].set(True)
  hidden = jnp.where(used[..., None], hidden, jnp.nan)
  total = lambda *x: jnp.sum(token_logprobs(4, *x, targets, weights))  # noqa: E731
  value, gradients = jax.jit(jax.value_and_grad(total, (0, 1)))(hidden, table)
  assert jnp.isfinite(value) and all(jnp.isfinite(g).all() for g in gradients)


def test_no_array_has_the_logits_of_all_positions():
  """Neither the forward nor the backward pass, in any of their computations."""
  hidden, table, targets, weights = output_layer(rows=4, length=40)

  def total(hidden, table):
    return jnp.sum(token_logprobs(8, hidden, table, targets, weights) ** 2)

  largest = max(_sizes(jax.make_jaxpr(jax.grad(total, (0, 1)))(hidden, table).jaxpr))
  assert largest == hidden.size > 4 * 5 * 11  # the logits of a slice; those of all are 1,760


def _sizes(jaxpr):
  """Yield the size of each array that a program computes, in its loops and functions as well."""
  for equation in jaxpr.eqns:
    yield from (variable.aval.size for variable in equation.outvars)
    for inner in jaxprs_in_params(equation.params):
      yield from _sizes(inner)


def test_sums_are_those_of_each_segment():
  segments = jnp.array([[1, 1, 2, 3, 3, 0], [1, 2, 2, 2, 0, 0]])
  x = jnp.arange(12.0).reshape(2, 6)
  np.testing.assert_array_equal(
    sum_segments(x, segments), [[1, 2, 7, 0, 0, 0], [6, 24, 0, 0, 0, 0]]
  )


def test_sequences_sum_to_the_supervised_loss():
  units = random_units(6)
  steps = packing.plan([u.length for u in units], [packing.Bucket(48, 8)], 1, 0)
  assert len(steps) == 1
  batch = packing.Batches(units, steps)[0]
  compute = jax.jit(lambda p: sequence_logprobs(nnx.merge(GRAPH, p), batch, attention='xla'))
  result = compute(initial_params())
  nll, sums = jax.jit(lambda p: negative_log_likelihood(GRAPH, p, batch, attention='xla'))(
    initial_params()
  )
  assert float(-result.sums.sum()) == pytest.approx(float(nll), rel=1e-6)
  assert result.counts.sum() == sums['num_tokens']
  order = [i for row in steps[0].rows for i in row]
  counts = [int(s.loss_mask.sum()) for i in order for s in units[i].segments]
  assert [int(x) for x in np.ravel(result.counts) if x] == counts
