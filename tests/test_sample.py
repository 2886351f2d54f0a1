"""Drawing tokens: the kept set and the distribution are those of the plain definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from transformers import TopKLogitsWarper, TopPLogitsWarper

from cai_jax.sampling.sample import inverse_cdf, keep_mask, sample, uniforms

KEEP, SAMPLE = jax.jit(keep_mask), jax.jit(sample)


def arrays(rows, temperature=1.0, top_k=0, top_p=1.0):
  full = lambda x, dtype: jnp.full(rows, x, dtype)  # noqa: E731
  return full(temperature, jnp.float32), full(top_k, jnp.int32), full(top_p, jnp.float32)


@pytest.mark.parametrize('top_k', [1, 5, 40, 1000])
@pytest.mark.parametrize('top_p', [0.1, 0.5, 0.9, 0.999])
def test_the_kept_set_is_that_of_transformers(top_k, top_p):
  logits = np.random.default_rng(top_k).normal(0, 3, (8, 300)).astype(np.float32)
  scores = TopKLogitsWarper(top_k)(None, torch.tensor(logits))
  scores = TopPLogitsWarper(top_p)(None, scores)
  _, k, p = arrays(8, top_k=top_k, top_p=top_p)
  differ = np.array(KEEP(logits, k, p)) != torch.isfinite(scores).numpy()
  # Where the mass before a token is p to within f32 rounding, either answer is right.
  probs = torch.softmax(TopKLogitsWarper(top_k)(None, torch.tensor(logits).double()), -1).numpy()
  before = np.array([[row[row > x].sum() for x in row] for row in probs])
  assert (np.abs(before[differ] - top_p) < 1e-5).all()


def test_rows_are_filtered_each_by_its_own_setting():
  logits = np.random.default_rng(0).normal(0, 3, (4, 300)).astype(np.float32)
  kept = KEEP(logits, jnp.array([0, 3, 0, 7]), jnp.array([1.0, 1.0, 1e-6, 1.0]))
  assert np.array(kept.sum(-1)).tolist() == [300, 3, 1, 7]


def test_inverse_cdf_is_the_plain_one():
  rng = np.random.default_rng(1)
  weights = (rng.random((500, 333)) ** 4).astype(np.float32)
  weights[rng.random((500, 333)) < 0.5] = 0
  u = rng.random(500).astype(np.float32)
  u[:3] = 0.0, np.nextafter(np.float32(1), np.float32(0)), 0.5
  got = np.array(inverse_cdf(jnp.array(weights), jnp.array(u)))
  ends = np.cumsum(weights.astype(np.float64), -1)
  expected = (ends <= u[:, None] * ends[:, -1:]).sum(-1)
  rows = np.arange(500)
  assert (weights[rows, got] > 0).all()
  # In f32 a number within rounding of a boundary may fall on its other side.
  assert (got == expected).mean() > 0.99
  ends = ends / ends[:, -1:]
  low = np.where(got > 0, ends[rows, np.maximum(got - 1, 0)], 0)
  assert ((low - 1e-5 <= u) & (u <= ends[rows, got] + 1e-5)).all()


def test_a_token_without_weight_is_not_drawn_even_on_a_boundary():
  rng = np.random.default_rng(4)
  weights = rng.random((4000, 300)).astype(np.float32)
  weights[rng.random(weights.shape) < 0.7] = 0
  ends = np.cumsum(weights, -1, dtype=np.float32)
  u = (ends / ends[:, -1:])[np.arange(4000), rng.integers(0, 300, 4000)]
  u = np.minimum(u, np.nextafter(np.float32(1), np.float32(0)))
  drawn = np.array(inverse_cdf(jnp.array(weights), jnp.array(u)))
  assert (weights[np.arange(4000), drawn] > 0).all()


@pytest.mark.parametrize(
  'settings',
  [
    {},
    {'temperature': 0.7},
    {'top_k': 9},
    {'top_p': 0.8},
    {'temperature': 1.3, 'top_k': 20, 'top_p': 0.9},
  ],
)
def test_draws_follow_the_distribution(settings):
  """A chi-square test at a fixed seed of 20,000 draws against the plainly defined probabilities."""
  draws, vocab = 20_000, 150
  logits = np.random.default_rng(2).normal(0, 1.5, vocab).astype(np.float32)
  temperature, k, p = arrays(draws, **settings)
  keys = jnp.stack([jnp.arange(draws, dtype=jnp.uint32), jnp.full(draws, 7, jnp.uint32)], -1)
  u = uniforms(keys, jnp.zeros(draws, jnp.int32))
  tokens, logprobs = SAMPLE(jnp.tile(logits, (draws, 1)), u, temperature, k, p)
  scores = torch.tensor(logits[None] / settings.get('temperature', 1.0))
  if 'top_k' in settings:
    scores = TopKLogitsWarper(settings['top_k'])(None, scores)
  if 'top_p' in settings:
    scores = TopPLogitsWarper(settings['top_p'])(None, scores)
  expected = torch.softmax(scores, -1)[0].numpy() * draws
  counts = np.bincount(tokens, minlength=vocab)
  assert counts[expected == 0].sum() == 0
  common = expected > 5
  statistic = ((counts - expected)[common] ** 2 / expected[common]).sum()
  degrees = common.sum() - 1
  assert statistic < degrees + 4 * np.sqrt(2 * degrees)
  model = torch.log_softmax(torch.tensor(logits), -1).numpy()
  np.testing.assert_allclose(logprobs, model[np.array(tokens)], atol=1e-5)


def test_temperature_zero_is_greedy_beside_rows_that_are_not():
  logits = np.random.default_rng(3).normal(0, 1, (64, 50)).astype(np.float32)
  temperature = jnp.where(jnp.arange(64) % 2, 0.0, 1.0)
  _, k, p = arrays(64)
  u = jax.random.uniform(jax.random.key(0), (64,))
  tokens, _ = SAMPLE(logits, u, temperature, k, p)
  greedy = logits.argmax(-1)
  assert (np.array(tokens)[1::2] == greedy[1::2]).all()
  assert (np.array(tokens)[::2] != greedy[::2]).any()


def test_uniforms_are_a_function_of_key_and_index_alone():
  keys = jnp.array([[1, 2], [3, 4], [1, 2]], jnp.uint32)
  u = uniforms(keys, jnp.array([5, 5, 5]))
  assert u[0] == u[2] != u[1]
  assert uniforms(keys[:1], jnp.array([5]))[0] == u[0]
  assert uniforms(keys[:1], jnp.array([6]))[0] != u[0]


def plain_kept(logits, top_k, top_p):
  """What is kept of logits f32[V] by the definition: sorted, in f64; and each token's margin.

  The margin is the distance from p of the mass before a token, and before the next smaller one: a
  token nearer than rounding may go either way.
  """
  x = logits.astype(np.float64)
  order = np.argsort(-x, kind='stable')
  kept = np.isfinite(x)
  if 0 < top_k < len(x):
    kept &= x >= x[order[top_k - 1]]
  if top_p >= 1:
    return kept, np.inf
  probs = np.where(kept, np.exp(x - x.max()), 0)
  probs /= probs.sum()
  values, place = np.unique(x, return_inverse=True)
  masses = np.bincount(place, probs)
  before = (np.cumsum(masses[::-1])[::-1] - masses)[place]
  before_own = np.where(kept, before, np.inf)
  first = before_own <= 0
  # Of equal logits some may be past p and stay all the same: their first decides.
  return kept & ((before < top_p) | first), np.abs(before[kept & ~first] - top_p).min(
    initial=np.inf
  )


def kinds_of_rows(vocab):
  """One row of each kind that could trip a search: flat, peaked, tied, cut, one-hot, far out."""
  rng = np.random.default_rng(vocab)
  normal = rng.normal(0, 2, vocab)
  one_hot = np.full(vocab, -np.inf)
  one_hot[vocab // 3] = -4.0
  zipf = -1.2 * np.log(1 + rng.permutation(vocab)) + rng.normal(0, 0.2, vocab)
  rows = [
    normal,
    8 * normal,
    zipf,
    np.round(normal),
    np.round(4 * normal) / 4,
    np.zeros(vocab),
    np.where(rng.random(vocab) < 0.7, -np.inf, normal),
    one_hot,
    np.where(np.arange(vocab) == 5, 200.0, normal),
    normal * 1e-6,
    normal - 3e4,
    np.where(rng.random(vocab) < 0.5, -0.0, 0.0),
    np.where(np.arange(vocab) < 70, 3.0, zipf),
  ]
  return np.stack(rows).astype(np.float32)


@pytest.mark.parametrize('vocab', [60, 1000, 9_000])
@pytest.mark.parametrize('top_k', [0, 1, 64, 700, 10**6])
def test_the_kept_set_is_the_plain_one(vocab, top_k):
  logits = kinds_of_rows(vocab)
  for top_p in (1e-30, 0.03, 0.5, 0.9, 0.999, float(np.nextafter(np.float32(1), 0)), 1.0):
    top_p = float(np.float32(top_p))
    _, k, p = arrays(len(logits), top_k=top_k, top_p=top_p)
    got = np.array(KEEP(logits, k, p))
    for row, mask in zip(logits, got, strict=True):
      kept, margin = plain_kept(row, top_k, top_p)
      if margin > 1e-6:
        assert (mask == kept).all(), (vocab, top_k, top_p, mask.sum(), kept.sum())
      else:  # p to within f32 rounding: some threshold, and near enough
        assert mask[np.isfinite(row)].any() and not mask[~np.isfinite(row)].any()
        assert row[mask].min() > row[~mask].max(initial=-np.inf)


@pytest.fixture(scope='module', params=[60, 9_000])
def mixed(request):
  """Arguments of `sample`: 24 rows, each with its own setting; every other one has no filter."""
  rng = np.random.default_rng(request.param)
  logits = rng.normal(0, 3, (24, request.param)).astype(np.float32)
  logits[8:] *= np.linspace(0.1, 3, 16, dtype=np.float32)[:, None]
  temperature = np.tile([1.0, 0.7, 0.0, 1.4], 6).astype(np.float32)
  top_k = np.tile([0, 0, 0, 5, 0, 100], 4).astype(np.int32)
  top_p = np.repeat([1.0, 0.9], 12).astype(np.float32)
  top_p[::2] = 1.0
  return logits, rng.random(24).astype(np.float32), temperature, top_k, top_p


def test_a_row_is_the_same_to_the_last_bit_in_any_batch(mixed):
  tokens, logprobs = map(np.array, SAMPLE(*mixed))
  kept = np.array(KEEP(mixed[0], *mixed[3:]))
  order = np.random.default_rng(0).permutation(24)
  for rows in ([16], [2, 9, 21], order):
    some = [x[np.array(rows)] for x in mixed]
    same = map(np.array, SAMPLE(*some))
    assert all((x == y[rows]).all() for x, y in zip(same, (tokens, logprobs), strict=True))
    assert (np.array(KEEP(some[0], *some[3:])) == kept[rows]).all()


def test_logits_sharded_over_the_vocabulary_give_the_same_tokens(mixed):
  mesh = jax.make_mesh((2, 4), ('data', 'tensor'), axis_types=(AxisType.Auto,) * 2)
  over = lambda x: NamedSharding(mesh, P(*('data', 'tensor')[: x.ndim]))  # noqa: E731
  tokens, logprobs = SAMPLE(*[jax.device_put(x, over(x)) for x in mixed])
  expected, plain = SAMPLE(*mixed)
  assert (np.array(tokens) == np.array(expected)).all()
  np.testing.assert_allclose(logprobs, plain, atol=1e-5)


def test_what_is_drawn_was_kept(mixed):
  """Over many numbers u, sample draws all of a row's kept set that has weight, and nothing else."""
  logits, _, temperature, top_k, top_p = mixed
  u = np.arange(240, dtype=np.float32) / 240
  for row in (3, 13, 15, 23):
    many = lambda x: np.repeat(x[row : row + 1], len(u), 0)  # noqa: B023, E731
    tokens, _ = SAMPLE(many(logits), u, many(temperature), many(top_k), many(top_p))
    scaled = logits[row] / temperature[row]
    kept, margin = plain_kept(scaled, top_k[row], top_p[row])
    assert margin > 1e-6
    probs = np.where(kept, np.exp(scaled - scaled.max()), 0)
    sure = probs / probs.sum() > 1 / 120
    assert kept[np.array(tokens)].all()
    assert set(np.flatnonzero(sure)) <= set(np.array(tokens).tolist())


def test_the_log_probability_is_the_models_whatever_the_settings(mixed):
  tokens, logprobs = SAMPLE(*mixed)
  model = torch.log_softmax(torch.tensor(mixed[0]).double(), -1).numpy()
  np.testing.assert_allclose(logprobs, model[np.arange(24), tokens], rtol=1e-6, atol=2e-6)


def test_both_filters_where_the_best_blocks_do_not_suffice():
  """Wide kept sets over 80 blocks: the whole vocabulary is searched, with the plain set as ever."""
  logits = np.random.default_rng(5).normal(0, 0.3, (3, 10_240)).astype(np.float32)
  top_k, top_p = np.array([0, 6000, 500]), np.array([0.95, 0.7, 0.999], np.float32)
  got = np.array(KEEP(logits, jnp.array(top_k, jnp.int32), top_p))
  for row, k, p, mask in zip(logits, top_k, top_p, got, strict=True):
    kept, margin = plain_kept(row, k, float(p))
    differ = (kept != mask).sum()
    assert differ == 0 or (margin < 1e-6 and differ <= 1)


def test_draws_follow_the_distribution_over_many_blocks():
  """Chi-square over blocks, and over the kept tokens, of 4,000 draws from one row of 9,000."""
  draws, vocab = 4_000, 9_000
  logits = np.random.default_rng(6).normal(0, 2, vocab).astype(np.float32)
  run = jax.jit(lambda u, k, p: sample(jnp.broadcast_to(logits, (100, vocab)), u, *k, p)[0])
  for top_k, top_p in ((0, 1.0), (64, 1.0), (0, 0.6), (64, 0.9)):
    temperature, k, p = arrays(100, top_k=top_k, top_p=top_p)
    u = np.random.default_rng(7).random((draws // 100, 100)).astype(np.float32)
    tokens = np.concatenate([run(row, (temperature, k), p) for row in u])
    kept, _ = plain_kept(logits, top_k, top_p)
    probs = np.where(kept, np.exp(logits.astype(np.float64)), 0)
    cells = np.arange(vocab) // 128 if top_k == 0 else np.arange(vocab)
    expected = np.bincount(cells, probs / probs.sum()) * draws
    counts = np.bincount(cells[tokens], minlength=len(expected))
    assert kept[tokens].all()
    common = expected > 5
    statistic = ((counts - expected)[common] ** 2 / expected[common]).sum()
    degrees = common.sum() - 1
    assert statistic < degrees + 4 * np.sqrt(2 * degrees)


def test_the_generator_is_that_of_no_setting():
  keys = jnp.array([[1, 2], [3, 4]], jnp.uint32)
  plain = uniforms(keys, jnp.array([5, 6]))
  with jax.default_prng_impl('rbg'), jax.threefry_partitionable(False):
    np.testing.assert_array_equal(uniforms(keys, jnp.array([5, 6])), plain)
