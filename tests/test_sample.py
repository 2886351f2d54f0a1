"""Drawing tokens: kept sets and distributions equal those of the plain definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from cai_jax.sampling import blocks
from cai_jax.sampling.noise import gumbel, gumbel_from_bits, token_keys
from cai_jax.sampling.sample import keep_mask, sample

pytestmark = pytest.mark.usefixtures('full_optimization')

KEEP, SAMPLE, GUMBEL = jax.jit(keep_mask), jax.jit(sample), jax.jit(gumbel_from_bits)


def arrays(rows, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
  """Return temperature, top_k, top_p and min_p as arrays of `rows` equal entries."""
  full = lambda x: jnp.full(rows, x, jnp.float32)  # noqa: E731
  return full(temperature), jnp.full(rows, top_k, jnp.int32), full(top_p), full(min_p)


@pytest.mark.parametrize('top_k', [1, 5, 40, 1000])
@pytest.mark.parametrize('top_p', [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize('min_p', [0.0, 0.02, 0.5, 1.0])
def test_the_kept_set_equals_that_of_transformers(top_k, top_p, min_p):
  logits = np.random.default_rng(top_k).normal(0, 3, (8, 300)).astype(np.float32)
  scores = TopKLogitsWarper(top_k)(None, torch.tensor(logits))
  scores = MinPLogitsWarper(min_p)(None, TopPLogitsWarper(top_p)(None, scores))
  _, *settings = arrays(8, top_k=top_k, top_p=top_p, min_p=min_p)
  differ = np.array(KEEP(logits, *settings)) != torch.isfinite(scores).numpy()
  # If the mass before a token equals p to within f32 rounding, either answer is right.
  probs = torch.softmax(TopKLogitsWarper(top_k)(None, torch.tensor(logits).double()), -1).numpy()
  before = np.array([[row[row > x].sum() for x in row] for row in probs])
  assert (np.abs(before[differ] - top_p) < 1e-5).all()


def test_each_row_is_filtered_by_its_own_setting():
  logits = np.random.default_rng(0).normal(0, 3, (4, 300)).astype(np.float32)
  logits = np.concatenate([logits, logits[:1]])
  top_k, top_p = jnp.array([0, 3, 0, 7, 0]), jnp.array([1.0, 1.0, 1e-6, 1.0, 1.0])
  kept = KEEP(logits, top_k, top_p, jnp.array([0.0, 0.0, 0.0, 0.0, 0.1]))
  likely = (logits[0] >= logits[0].max() + np.log(0.1)).sum()
  assert np.array(kept.sum(-1)).tolist() == [300, 3, 1, 7, likely]


def keys_of(rows, seed=7):
  """Return `rows` different keys of tokens."""
  keys = jnp.stack([jnp.arange(rows, dtype=jnp.uint32), jnp.full(rows, seed, jnp.uint32)], -1)
  return token_keys(keys, jnp.zeros(rows, jnp.int32))


def assert_fits(counts, probs):
  """Check counts of draws against probabilities by a chi-square test at p = 0.001."""
  expected = probs / probs.sum() * counts.sum()
  assert counts[expected == 0].sum() == 0
  rare = expected < 5  # together they are one cell
  counts = np.append(counts[~rare], counts[rare].sum())
  expected = np.append(expected[~rare], expected[rare].sum())
  counts, expected = counts[expected > 0], expected[expected > 0]
  assert scipy.stats.chisquare(counts, expected).pvalue > 1e-3


SETTINGS = [
  {},
  {'temperature': 0.7},
  {'top_k': 9},
  {'top_p': 0.8},
  {'temperature': 0.7, 'top_p': 0.9},
  {'temperature': 1.3, 'top_k': 20, 'top_p': 0.9},
  {'min_p': 0.1},
  {'temperature': 0.7, 'top_p': 0.95, 'min_p': 0.05},
]


@pytest.mark.parametrize('settings', SETTINGS)
def test_draws_follow_the_distribution(settings):
  """Chi-square test of 20,000 draws with a fixed seed against the defined probabilities."""
  draws, vocab = 20_000, 150
  logits = np.random.default_rng(2).normal(0, 1.5, vocab).astype(np.float32)
  own = arrays(draws, **settings)
  tokens, logprobs = SAMPLE(jnp.tile(logits, (draws, 1)), keys_of(draws), *own)
  scores = torch.tensor(logits[None] / settings.get('temperature', 1.0))
  if 'top_k' in settings:
    scores = TopKLogitsWarper(settings['top_k'])(None, scores)
  if 'top_p' in settings:
    scores = TopPLogitsWarper(settings['top_p'])(None, scores)
  if 'min_p' in settings:
    scores = MinPLogitsWarper(settings['min_p'])(None, scores)
  counts = np.bincount(tokens, minlength=vocab)
  assert_fits(counts, torch.softmax(scores.double(), -1)[0].numpy())
  model = torch.log_softmax(torch.tensor(logits), -1).numpy()
  np.testing.assert_allclose(logprobs, model[np.array(tokens)], atol=1e-5)


def test_temperature_zero_is_greedy_next_to_other_rows():
  logits = np.random.default_rng(3).normal(0, 1, (64, 50)).astype(np.float32)
  temperature = jnp.where(jnp.arange(64) % 2, 0.0, 1.0)
  _, *settings = arrays(64)
  tokens, _ = SAMPLE(logits, keys_of(64), temperature, *settings)
  greedy = logits.argmax(-1)
  assert (np.array(tokens)[1::2] == greedy[1::2]).all()
  assert (np.array(tokens)[::2] != greedy[::2]).any()


def noise_at(keys, index, level, count=40):
  """Return the noise of rows as an array."""
  run = jax.jit(lambda keys, index: gumbel(token_keys(keys, index), level, count))
  return np.array(run(keys, index))


def test_noise_depends_on_key_index_level_and_place_alone():
  keys, index = jnp.array([[1, 2], [3, 4], [1, 2], [1, 2]], jnp.uint32), jnp.array([5, 5, 5, 6])
  noise = noise_at(keys, index, 0)
  assert (noise[0] == noise[2]).all()
  assert (noise_at(keys[:1], index[:1], 0, 90)[0, :40] == noise[0]).all()
  different = [*noise[[0, 1, 3]], noise_at(keys, index, 1)[0]]
  assert len(set(np.array(different).ravel().tolist())) == 4 * 40


def noise_of(number):
  """Return the noise of a 64-bit number."""
  words = jnp.array([number >> 32, number & 0xFFFFFFFF], jnp.uint32)
  return float(GUMBEL(*words))


@pytest.mark.parametrize('g', [-3.0, -1.0, 0.0, 3.0, 10.0, 16.0, 20.0, 30.0, 40.0])
def test_the_tail_of_the_noise_is_exact_far_beyond_rare_tokens(g):
  """Bisection counts the 64-bit numbers whose noise exceeds g."""
  low, high = 0, 2**64 - 1  # the noise falls as the number grows
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if noise_of(middle) > g else (low, middle)
  np.testing.assert_allclose((low + 1) / 2**64, -np.expm1(-np.exp(-g)), 5e-6, 2**-64)


def test_the_noise_is_finite_and_falls_as_its_bits_grow():
  numbers = [0, 1, 2**31, 2**32, 2**40, 2**63 - 1, 2**63, 2**63 + 2**39, 2**64 - 2**20, 2**64 - 1]
  noise = [noise_of(n) for n in numbers]
  assert np.isfinite(noise).all() and noise[0] > 44 and noise[-1] < -3.7
  assert (np.diff(noise) <= 0).all()


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
    _, *settings = arrays(len(logits), top_k=top_k, top_p=top_p)
    for row, mask in zip(logits, np.array(KEEP(logits, *settings)), strict=True):
      kept, margin = plain_kept(row, top_k, top_p)
      if margin > 1e-6:
        assert (mask == kept).all(), (vocab, top_k, top_p, mask.sum(), kept.sum())
      else:  # within f32 rounding of p: any threshold, but a consistent one
        assert mask[np.isfinite(row)].any() and not mask[~np.isfinite(row)].any()
        assert row[mask].min() > row[~mask].max(initial=-np.inf)


@pytest.fixture(scope='module', params=[pytest.param(60, marks=pytest.mark.slow), 9_000])
def mixed(request):
  """Return the arguments of `sample` for 24 rows with different settings, half without top-p."""
  rng = np.random.default_rng(request.param)
  logits = rng.normal(0, 3, (24, request.param)).astype(np.float32)
  logits[8:] *= np.linspace(0.1, 3, 16, dtype=np.float32)[:, None]
  temperature = np.tile([1.0, 0.7, 0.0, 1.4], 6).astype(np.float32)
  top_k = np.tile([0, 0, 0, 5, 0, 100], 4).astype(np.int32)
  top_p = np.repeat([1.0, 0.9], 12).astype(np.float32)
  top_p[::2] = 1.0
  min_p = np.where(np.arange(24) % 5 == 4, np.float32(0.05), np.float32(0))
  return logits, np.array(keys_of(24, request.param)), temperature, top_k, top_p, min_p


def test_every_bit_of_a_row_is_independent_of_its_batch(mixed):
  tokens, logprobs = map(np.array, SAMPLE(*mixed))
  kept = np.array(KEEP(mixed[0], *mixed[3:]))
  order = np.random.default_rng(0).permutation(24)
  for rows in ([16], order):
    subset = [x[np.array(rows)] for x in mixed]
    subset_tokens, subset_logprobs = map(np.array, SAMPLE(*subset))
    assert (subset_tokens == tokens[rows]).all()
    assert (subset_logprobs == logprobs[rows]).all()
    assert (np.array(KEEP(subset[0], *subset[3:])) == kept[rows]).all()


def test_logits_sharded_over_the_vocabulary_give_the_same_tokens(mixed):
  mesh = jax.make_mesh((2, 4), ('data', 'tensor'), axis_types=(AxisType.Auto,) * 2)
  specs = [P('data', 'tensor')] + [P('data')] * (len(mixed) - 1)
  sharded = [
    jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(mixed, specs, strict=True)
  ]
  tokens, logprobs = SAMPLE(*sharded)
  expected_tokens, expected_logprobs = SAMPLE(*mixed)
  assert (np.array(tokens) == np.array(expected_tokens)).all()
  np.testing.assert_allclose(logprobs, expected_logprobs, atol=1e-5)


def test_draws_cover_exactly_the_kept_set(mixed):
  """With many keys, a row draws every kept token that is likely enough, and nothing else."""
  logits, _, temperature, top_k, top_p, min_p = mixed
  keys = np.array(keys_of(1000))
  for row in (3, 13, 19, 23):
    repeat = lambda x: np.repeat(x[row : row + 1], len(keys), 0)  # noqa: B023, E731
    settings = (temperature, top_k, top_p, min_p)
    tokens, _ = SAMPLE(repeat(logits), keys, *map(repeat, settings))
    scaled = logits[row] / temperature[row]
    kept, margin = plain_kept(scaled, top_k[row], top_p[row])
    kept &= scaled >= scaled.max() + np.log(max(min_p[row], 1e-30))
    assert margin > 1e-6
    probs = np.where(kept, np.exp(scaled - scaled.max()), 0)
    likely = probs / probs.sum() > 1 / 100
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
  masks = np.array(KEEP(logits, jnp.array(top_k, jnp.int32), top_p, jnp.zeros(3)))
  for row, k, p, mask in zip(logits, top_k, top_p, masks, strict=True):
    kept, margin = plain_kept(row, k, float(p))
    differ = (kept != mask).sum()
    assert differ == 0 or (margin < 1e-6 and differ <= 1)


@jax.jit
def draw_repeatedly(logits, keys, *settings):
  """Draw from one row of logits f32[V] with keys u32[M,B,2], and settings of one row."""
  rows = jnp.broadcast_to(logits, (keys.shape[1], len(logits)))
  settings = [jnp.broadcast_to(x, keys.shape[1]) for x in settings]
  return jax.lax.map(lambda keys: sample(rows, keys, *settings)[0], keys).ravel()


@pytest.mark.parametrize('temperature', [0.7, 1.0])
@pytest.mark.parametrize(('top_k', 'top_p'), [(0, 1.0), (64, 1.0), (0, 0.6), (64, 0.9)])
def test_draws_follow_the_distribution_over_many_blocks(temperature, top_k, top_p):
  """Chi-square test over tokens, and over blocks, of 8,000 draws from one row of 9,000 logits."""
  draws, vocab = 8_000, 9_000
  logits = np.random.default_rng(6).normal(0, 2, vocab).astype(np.float32)
  keys = keys_of(draws).reshape(-1, 100, 2)
  settings = [x[0] for x in arrays(1, temperature, top_k, top_p)]
  tokens = np.array(draw_repeatedly(logits, keys, *settings))
  scaled = logits.astype(np.float64) / temperature
  kept, _ = plain_kept(logits / np.float32(temperature), top_k, top_p)
  probs = np.where(kept, np.exp(scaled - scaled.max()), 0)
  assert kept[tokens].all()
  counts = np.bincount(tokens, minlength=vocab)
  assert_fits(counts, probs)
  blocks = np.arange(vocab) // 128
  assert_fits(np.bincount(blocks, counts), np.bincount(blocks, probs))


@pytest.mark.parametrize(
  'spread', [3.0, *(pytest.param(x, marks=pytest.mark.slow) for x in (1.0, 6.0))]
)
def test_rounding_of_the_logits_changes_few_draws(spread):
  """Noise of 1e-4 changes fewer than 1 in 1,000 of 4,000 draws; one uniform number: up to 4 %."""
  rng = np.random.default_rng(8)
  logits = rng.normal(0, spread, (4_000, 4_096)).astype(np.float32)
  moved = logits + rng.normal(0, 1e-4, logits.shape).astype(np.float32)
  settings = arrays(len(logits))
  draws = [np.array(SAMPLE(x, keys_of(len(x)), *settings)[0]) for x in (logits, moved)]
  assert (draws[0] != draws[1]).mean() < 1e-3


def test_keys_of_tokens_are_those_of_jax():
  key = jax.random.key(3, impl='threefry2x32')
  expected = [jax.random.key_data(jax.random.fold_in(key, i)) for i in (0, 7)]
  keys = jnp.tile(jax.random.key_data(key), (2, 1))
  np.testing.assert_array_equal(jax.jit(token_keys)(keys, jnp.array([0, 7])), expected)


def test_jax_settings_do_not_change_the_generator():
  keys = jnp.array([[1, 2], [3, 4]], jnp.uint32)
  plain = noise_at(keys, jnp.array([5, 6]), 1)
  with jax.default_prng_impl('rbg'), jax.threefry_partitionable(False):
    np.testing.assert_array_equal(noise_at(keys, jnp.array([5, 6]), 1), plain)


def test_gumbel_1_draws_these_tokens():
  """A change here is another sampler: give it another name in `cai_jax/sampling/noise.py`."""
  logits = jnp.asarray(8 * np.sin(np.arange(12 * 500) ** 2).reshape(12, 500), jnp.float32)
  tokens, _ = SAMPLE(logits, keys_of(12), *arrays(12))
  assert np.array(tokens).tolist() == [236, 54, 182, 259, 122, 498, 406, 33, 203, 17, 38, 282]


@pytest.mark.parametrize('vocab_size', [16 * 1028, 16 * 1032, 2 * 8193, 1000])
def test_each_token_of_a_vocabulary_has_its_place_in_the_blocks(vocab_size):
  logits = jax.random.normal(jax.random.key(0), (3, vocab_size))
  flat = jax.jit(blocks.to_blocks)(logits).reshape(3, -1)
  block, entry = jnp.divmod(flat.argmax(1), blocks.BLOCK)
  assert (blocks.token_at(block, entry, vocab_size) == logits.argmax(1)).all()
