"""With full optimization, where pages are and what other rows hold change no bit of a forward."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cai_jax.model.parts import make_norm
from tests.paged_rows import TOKENS, B, PagedRows, T, cached_forward
from tests.test_choices import BASE, MODELS, model_of

pytestmark = pytest.mark.usefixtures('full_optimization')


def test_angles_are_computed_once_for_all_layers(load):
  """Without `compute_once`, XLA for CPUs computes the cosines again in each layer."""
  lm = load('llama3')
  for parts in ([], [(2, 0, 8)]):
    arguments = PagedRows(lm).arguments([0, 1], [0, 0], parts)[0]
    compiled = cached_forward.lower(*arguments).compile()
    assert compiled.as_text().count(' cosine(') == 1


@pytest.mark.parametrize(
  ('name', 'blocks'), [pytest.param('llama3', 3, marks=pytest.mark.slow), ('mistral', 2)]
)
def test_where_pages_are_changes_no_bit(load, name, blocks):
  """Neither their order, nor the number of blocks, nor further pages, nor what they hold."""
  lm = load(name)

  def decode(**options):
    rows = PagedRows(lm, **options)
    logits = [*rows.prefill([(0, 0, 9), (1, 0, 3), (2, 0, 17)]), *rows.prefill([(1, 3, 11)])]
    logits.append(rows.decode(range(B), [9, 11, 17]))
    logits.append(rows.step([0, 2], [10, 18], [(1, 12, 20)])[0])
    return [np.asarray(x) for x in logits]

  expected = decode()
  for options in ({'seed': 1}, {'spare': 9, 'blocks': blocks}, {'stale': -7.0}):
    for ours, theirs in zip(decode(**options), expected, strict=True):
      np.testing.assert_array_equal(ours, theirs)


def check_other_rows(lm):
  """Check the bits of two rows beside a third, which is longer or starts with other tokens."""
  results = []
  for length, shift in ((3, 0), (17, 0), (3, 1)):
    rows = PagedRows(lm)
    first = rows.prefill([(0, 0, 9), (1, 0, 6), (2, shift, shift + length)])[:2]
    results.append([*first, rows.decode(range(B), [9, 6, shift + length])[:2]])
  for result in results[1:]:
    for ours, theirs in zip(result, results[0], strict=True):
      np.testing.assert_array_equal(ours, theirs)


def test_other_rows_do_not_change_a_single_bit(load):
  check_other_rows(load('llama3'))


@pytest.mark.parametrize(
  'name',
  [name if name == 'capped' else pytest.param(name, marks=pytest.mark.slow) for name in MODELS],
)
def test_other_rows_change_no_bit_whatever_a_model_chooses(name):
  check_other_rows(model_of(BASE, **MODELS[name]))


@pytest.mark.parametrize('fields', [{'norm': 'layer'}, {'norm_offset': 1.0}, {}])
def test_ordered_norms_do_not_depend_on_the_number_of_rows(fields):
  norm = make_norm(dataclasses.replace(BASE, **fields), jnp.float32, 576)
  x = jax.random.normal(jax.random.key(0), (1, 200, 576))
  run = jax.jit(lambda x: norm(x, ordered=True))
  whole = run(x)
  for rows in (1, 3, 64):
    np.testing.assert_array_equal(run(x[:, :rows]), whole[:, :rows])
  np.testing.assert_allclose(whole, jax.jit(norm)(x), atol=1e-5)


@pytest.mark.parametrize('name', [pytest.param('mistral', marks=pytest.mark.slow), 'qwen2_windows'])
def test_windowed_layers_need_only_the_pages_of_their_window(load, name):
  """Rows that gave their other pages back have the same bits as rows that did not."""
  lm = load(name)
  results = []
  for forget in (False, True):
    rows = PagedRows(lm, forget=forget)
    logits = [*rows.prefill([(0, 0, 12), (1, 0, 3)]), *rows.prefill([(0, 12, 18), (1, 3, 15)])]
    logits += [rows.decode([0, 1], [18 + step, 15 + step]) for step in range(5)]
    results.append(logits)
  for ours, theirs in zip(*results, strict=True):
    np.testing.assert_array_equal(ours, theirs)
  full = np.asarray(lm.logits(TOKENS))
  np.testing.assert_allclose(results[1][-1][:, 0], full[[0, 1], [22, 19]], atol=1e-4, rtol=0)


@pytest.mark.parametrize('dtype', ['bfloat16', pytest.param('float16', marks=pytest.mark.slow)])
def test_half_precision_decode_equals_the_full_forward(load, dtype):
  """XLA for CPUs does not support some half-precision products with one query per row."""
  lm = dataclasses.replace(load('llama3'), dtype=dtype)
  exact = np.asarray(load('llama3').logits(TOKENS))[:, -1]
  full = np.asarray(lm.logits(TOKENS))[:, -1]
  rows = PagedRows(lm, dtype=jnp.dtype(dtype))
  rows.prefill([(row, 0, T - 1) for row in range(2)])
  rows.prefill([(2, 0, T - 1)])
  logits = np.asarray(rows.decode(range(B), [T - 1] * B))[:, 0]
  # Both round at other places, so they are compared by their distance from the exact logits.
  error, expected = (np.sqrt(np.mean((x - exact) ** 2)) for x in (logits, full))
  print(dtype, error, expected, exact.std())
  assert error < 1.25 * expected < 0.05 * exact.std()
