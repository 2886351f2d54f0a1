"""Every family's logits agree with torch: padded, packed, saved again, and on eight devices."""

import math

import jax
import numpy as np
import pytest
import torch

import cai_jax
from cai_jax.model import lm as lm_lib
from cai_jax.model.families.family import config_from_hf
from cai_jax.model.sharding import flatten_params, partition_spec
from cai_jax.runtime.files import read_json
from cai_jax.runtime.mesh import make_mesh
from tests.families import REPEATED, SIMILAR, load_in_torch, mark_slow

B, T = 4, 40
TOKENS = np.random.default_rng(0).integers(3, 300, (B, T))
LENGTHS = np.array([33, 5, 40, 17])  # real tokens of padded rows
PACKED = (20, 5, 13)  # tokens of the texts of a packed row


@pytest.fixture(params=mark_slow(REPEATED + SIMILAR))
def various(request) -> str:
  """Each key of FAMILIES in turn. Lines that resemble another one are slow tests."""
  return request.param


def torch_logits(folder, tokens, **inputs):
  """Return the logits f32[B,T,V] of torch."""
  inputs = {name: torch.tensor(x) for name, x in inputs.items()}
  with torch.no_grad():
    return load_in_torch(folder)(torch.tensor(tokens), **inputs).logits.numpy()


@pytest.fixture(scope='module')
def reference(tiny_hf_folder):
  """`reference(family)` returns torch's logits of TOKENS, which are computed once."""
  cached = {}

  def get(family):
    if family not in cached:
      cached[family] = torch_logits(tiny_hf_folder(family), TOKENS)
    return cached[family]

  return get


def assert_close(ours, theirs):
  np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)


def test_logits_agree_with_torch(load, reference, family):
  """Rows are longer than all windows that three layers reach back to."""
  lm = load(family)
  logits = lm.logits(TOKENS)
  assert logits.shape == (B, T, lm.config.vocab_size) and logits.dtype == np.float32
  assert_close(logits, reference(family))
  assert reference(family).std() > 0.5  # flat logits would agree trivially
  changed = TOKENS.copy()
  changed[:, 20:] = changed[:, 20:][:, ::-1]
  after = lm.logits(changed)
  np.testing.assert_array_equal(logits[:, :20], after[:, :20])  # later tokens change nothing
  assert np.abs(logits[:, 20:] - after[:, 20:]).max() > 0.1


def test_logits_of_padded_rows_agree_with_torch(load, reference, tiny_hf_folder, various):
  """Two rows are padded on the left and two on the right."""
  family = various
  mask = np.arange(T) < LENGTHS[:, None]
  mask[:2] = mask[:2, ::-1]
  tokens = np.zeros_like(TOKENS)
  for row, length in enumerate(LENGTHS):
    tokens[row, mask[row]] = TOKENS[row, :length]
  theirs = torch_logits(
    tiny_hf_folder(family),
    tokens,
    attention_mask=mask.astype(np.int64),
    position_ids=np.maximum(np.cumsum(mask, axis=1) - 1, 0),
  )
  for nonzero in (mask, mask * 7):  # any nonzero value marks a real token
    ours = np.asarray(load(family).logits(tokens, nonzero))
    assert_close(ours[mask], theirs[mask])
  for row, length in enumerate(LENGTHS):  # padding changes nothing
    assert_close(ours[row, mask[row]], reference(family)[row, :length])


def test_logits_of_packed_texts_agree_with_torch(load, reference, various):
  """The first row holds three texts, each with positions from 0, and padding at the end."""
  lm = load(various)
  tokens, positions, segments = np.zeros((3, B, T), np.int32)
  ends = np.cumsum(PACKED)
  for text, (end, n) in enumerate(zip(ends, PACKED, strict=True)):
    tokens[0, end - n : end] = TOKENS[text, :n]
    positions[0, end - n : end] = np.arange(n)
    segments[0, end - n : end] = text + 1
  logits = lm_lib.compute_logits(lm.graph, lm.params, tokens, positions, segments)
  for text, (end, n) in enumerate(zip(ends, PACKED, strict=True)):
    assert_close(logits[0, end - n : end], reference(various)[text, :n])


def test_saved_models_load_here_and_in_torch(load, reference, family, tmp_path):
  lm = load(family)
  cai_jax.save(lm, tmp_path / 'out')
  assert config_from_hf(read_json(tmp_path / 'out' / 'config.json')) == lm.config
  again = cai_jax.load(tmp_path / 'out', mesh=lm.mesh)
  assert again.config == lm.config and again.eos_token_ids == lm.eos_token_ids == (2, 0)
  jax.tree.map(np.testing.assert_array_equal, again.params, lm.params)
  assert_close(torch_logits(tmp_path / 'out', TOKENS), reference(family))
  assert not list((tmp_path / 'out').glob('*partial*'))


@pytest.mark.slow
def test_bfloat16_is_as_close_to_float32_as_in_torch(tiny_hf_folder, reference, family):
  """Torch computes on the CPU. The median is unmoved by a token that changes its experts."""
  folder, model = tiny_hf_folder(family), load_in_torch(tiny_hf_folder(family))
  with torch.no_grad():
    theirs = model.to(torch.bfloat16)(torch.tensor(TOKENS)).logits.float().numpy()
  lm = cai_jax.load(folder, 'bfloat16', make_mesh(1, devices=jax.devices()[:1]))
  expected = reference(family)
  error, torch_error = (np.median(np.abs(x - expected)) for x in (lm.logits(TOKENS), theirs))
  print(f'{family}: median error {error:.4f}, of torch {torch_error:.4f}')
  assert 0 < error < 1.2 * torch_error


@pytest.mark.skipif('len(jax.devices()) < 8')
def test_eight_devices_equal_one(load, tiny_hf_folder, various):
  one = load(various)
  tensor = math.gcd(2, one.config.num_kv_heads)
  mesh = make_mesh(2, 4 // tensor, tensor)
  eight = cai_jax.load(tiny_hf_folder(various), mesh=mesh)
  ours, single = flatten_params(eight.params), flatten_params(one.params)
  assert ours.keys() == single.keys()
  for path, leaf in ours.items():
    assert leaf.sharding.is_equivalent_to(jax.NamedSharding(mesh, partition_spec(path)), leaf.ndim)
    np.testing.assert_array_equal(leaf, single[path])
  assert_close(eight.logits(TOKENS), one.logits(TOKENS))
