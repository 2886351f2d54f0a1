"""Drawing tokens: kept sets and distributions equal those of the plain definitions."""

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
  """Return temperature, top_k and top_p as arrays of `rows` equal entries."""
  full = lambda x, dtype: jnp.full(rows, x, dtype)  # noqa: E731
  return full(temperature, jnp.float32), full(top_k, jnp.int32), full(top_p, jnp.float32)


@pytest.mark.parametrize('top_k', [1, 5, 40, 1000])
@pytest.mark.parametrize('top_p', [0.1, 0.5, 0.9, 0.999])
def test_the_kept_set_equals_that_of_transformers(top_k, top_p):
  logits = np.random.default_rng(top_k).normal(0, 3, (8, 300)).astype(np.float32)
  scores = TopKLogitsWarper(top_k)(None, torch.tensor(logits))
  scores = TopPLogitsWarper(top_p)(None, scores)
  _, k, p = arrays(8, top_k=top_k, top_p=top_p)
  differ = np.array(KEEP(logits, k, p)) != torch.isfinite(scores).numpy()
  # If the mass before a token equals p to within f32 rounding, either answer is right.
  probs = torch.softmax(TopKLogitsWarper(top_k)(None, torch.tensor(logits).double()), -1).numpy()
  before = np.array([[row[row > x].sum() for x in row] for row in probs])
  assert (np.abs(before[differ] - top_p) < 1e-5).all()


def test_each_row_is_filtered_by_its_own_setting():
  logits = np.random.default_rng(0).normal(0, 3, (4, 300)).astype(np.float32)
  kept = KEEP(logits, jnp.array([0, 3, 0, 7]), jnp.array([1.0, 1.0, 1e-6, 1.0]))
  assert np.array(kept.sum(-1)).tolist() == [300, 3, 1, 7]


def test_inverse_cdf_equals_the_plain_definition():
  rng = np.random.default_rng(1)
  weights = (rng.random((500, 333)) ** 4).astype(np.float32)
  weights[rng.random((500, 333)) < 0.5] = 0
  u = rng.random(500).astype(np.float32)
  u[:3] = 0.0, np.nextafter(np.float32(1), np.float32(0)), 0.5
  drawn = np.array(inverse_cdf(jnp.array(weights), jnp.array(u)))
  ends = np.cumsum(weights.astype(np.float64), -1)
  expected = (ends <= u[:, None] * ends[:, -1:]).sum(-1)
  rows = np.arange(500)
  assert (weights[rows, drawn] > 0).all()
  # In f32, a number within rounding of a boundary may fall on either side.
  assert (drawn == expected).mean() > 0.99
  ends = ends / ends[:, -1:]
  low = np.where(drawn > 0, ends[rows, np.maximum(drawn - 1, 0)], 0)
  assert ((low - 1e-5 <= u) & (u <= ends[rows, drawn] + 1e-5)).all()


def test_a_token_of_weight_zero_is_never_drawn_even_on_a_boundary():
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
  """Chi-square test of 20,000 draws with a fixed seed against the defined probabilities."""
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


def test_temperature_zero_is_greedy_next_to_other_rows():
  logits = np.random.default_rng(3).normal(0, 1, (64, 50)).astype(np.float32)
  temperature = jnp.where(jnp.arange(64) % 2, 0.0, 1.0)
  _, k, p = arrays(64)
  u = jax.random.uniform(jax.random.key(0), (64,))
  tokens, _ = SAMPLE(logits, u, temperature, k, p)
  greedy = logits.argmax(-1)
  assert (np.array(tokens)[1::2] == greedy[1::2]).all()
  assert (np.array(tokens)[::2] != greedy[::2]).any()


def test_uniforms_depend_on_key_and_index_alone():
  keys = jnp.array([[1, 2], [3, 4], [1, 2]], jnp.uint32)
  u = uniforms(keys, jnp.array([5, 5, 5]))
  assert u[0] == u[2] != u[1]
  assert uniforms(keys[:1], jnp.array([5]))[0] == u[0]
  assert uniforms(keys[:1], jnp.array([6]))[0] != u[0]


def plain_kept(logits, top_k, top_p):
  """Filter logits f32[V] by the definition: sorted, in f64.

  Returns:
    The kept tokens bool[V], and the margin: the smallest distance between p and the mass before any
    token. If it is smaller than f32 rounding, the decision may go either way.
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
  # Equal logits are kept or dropped together, even if some of them are beyond p.
  return kept & ((before < top_p) | first), np.abs(before[kept & ~first] - top_p).min(
    initial=np.inf
  )


def hard_rows(vocab):
  """Return rows that are hard to search: flat, peaked, tied, masked, one-hot, shifted."""
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
def test_the_kept_set_equals_the_plain_definition(vocab, top_k):
  logits = hard_rows(vocab)
  for top_p in (1e-30, 0.03, 0.5, 0.9, 0.999, float(np.nextafter(np.float32(1), 0)), 1.0):
    top_p = float(np.float32(top_p))
    _, k, p = arrays(len(logits), top_k=top_k, top_p=top_p)
    for row, mask in zip(logits, np.array(KEEP(logits, k, p)), strict=True):
      kept, margin = plain_kept(row, top_k, top_p)
      if margin > 1e-6:
        assert (mask == kept).all(), (vocab, top_k, top_p, mask.sum(), kept.sum())
      else:  # within f32 rounding of p: any threshold, but a consistent one
        assert mask[np.isfinite(row)].any() and not mask[~np.isfinite(row)].any()
        assert row[mask].min() > row[~mask].max(initial=-np.inf)


@pytest.fixture(scope='module', params=[60, 9_000])
def mixed(request):
  """Return the arguments of `sample` for 24 rows with different settings, half without top-p."""
  rng = np.random.default_rng(request.param)
  logits = rng.normal(0, 3, (24, request.param)).astype(np.float32)
  logits[8:] *= np.linspace(0.1, 3, 16, dtype=np.float32)[:, None]
  temperature = np.tile([1.0, 0.7, 0.0, 1.4], 6).astype(np.float32)
  top_k = np.tile([0, 0, 0, 5, 0, 100], 4).astype(np.int32)
  top_p = np.repeat([1.0, 0.9], 12).astype(np.float32)
  top_p[::2] = 1.0
  return logits, rng.random(24).astype(np.float32), temperature, top_k, top_p


def test_every_bit_of_a_row_is_independent_of_its_batch(mixed):
  tokens, logprobs = map(np.array, SAMPLE(*mixed))
  kept = np.array(KEEP(mixed[0], *mixed[3:]))
  order = np.random.default_rng(0).permutation(24)
  for rows in ([16], [2, 9, 21], order):
    subset = [x[np.array(rows)] for x in mixed]
    subset_tokens, subset_logprobs = map(np.array, SAMPLE(*subset))
    assert (subset_tokens == tokens[rows]).all()
    assert (subset_logprobs == logprobs[rows]).all()
    assert (np.array(KEEP(subset[0], *subset[3:])) == kept[rows]).all()


def test_logits_sharded_over_the_vocabulary_give_the_same_tokens(mixed):
  mesh = jax.make_mesh((2, 4), ('data', 'tensor'), axis_types=(AxisType.Auto,) * 2)
  shard = lambda x: NamedSharding(mesh, P(*('data', 'tensor')[: x.ndim]))  # noqa: E731
  tokens, logprobs = SAMPLE(*[jax.device_put(x, shard(x)) for x in mixed])
  expected_tokens, expected_logprobs = SAMPLE(*mixed)
  assert (np.array(tokens) == np.array(expected_tokens)).all()
  np.testing.assert_allclose(logprobs, expected_logprobs, atol=1e-5)


def test_draws_cover_exactly_the_kept_set(mixed):
  """Over many u, a row draws every kept token that is likely enough, and nothing else."""
  logits, _, temperature, top_k, top_p = mixed
  u = np.arange(240, dtype=np.float32) / 240
  for row in (3, 13, 15, 23):
    repeat = lambda x: np.repeat(x[row : row + 1], len(u), 0)  # noqa: B023, E731
    tokens, _ = SAMPLE(repeat(logits), u, repeat(temperature), repeat(top_k), repeat(top_p))
    scaled = logits[row] / temperature[row]
    kept, margin = plain_kept(scaled, top_k[row], top_p[row])
    assert margin > 1e-6
    probs = np.where(kept, np.exp(scaled - scaled.max()), 0)
    likely = probs / probs.sum() > 1 / 120
    assert kept[np.array(tokens)].all()
    assert set(np.flatnonzero(likely)) <= set(np.array(tokens).tolist())


def test_log_probabilities_are_the_models_own_under_any_settings(mixed):
  tokens, logprobs = SAMPLE(*mixed)
  model = torch.log_softmax(torch.tensor(mixed[0]).double(), -1).numpy()
  np.testing.assert_allclose(logprobs, model[np.arange(24), tokens], rtol=1e-6, atol=2e-6)


def test_filters_search_all_blocks_if_the_candidates_do_not_suffice():
  """With wide kept sets over 80 blocks, the result still equals the plain definition."""
  logits = np.random.default_rng(5).normal(0, 0.3, (3, 10_240)).astype(np.float32)
  top_k, top_p = np.array([0, 6000, 500]), np.array([0.95, 0.7, 0.999], np.float32)
  masks = np.array(KEEP(logits, jnp.array(top_k, jnp.int32), top_p))
  for row, k, p, mask in zip(logits, top_k, top_p, masks, strict=True):
    kept, margin = plain_kept(row, k, float(p))
    differ = (kept != mask).sum()
    assert differ == 0 or (margin < 1e-6 and differ <= 1)


def test_draws_follow_the_distribution_over_many_blocks():
  """Chi-square test over blocks or kept tokens of 4,000 draws from one row of 9,000 logits."""
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


def test_jax_settings_do_not_change_the_generator():
  keys = jnp.array([[1, 2], [3, 4]], jnp.uint32)
  plain = uniforms(keys, jnp.array([5, 6]))
  with jax.default_prng_impl('rbg'), jax.threefry_partitionable(False):
    np.testing.assert_array_equal(uniforms(keys, jnp.array([5, 6])), plain)
