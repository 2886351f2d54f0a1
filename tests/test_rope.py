"""Rotary positions: every type of scaling, partial and interleaved rotation, ropes by layer."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import cai_jax
from cai_jax.model import cached_forward
from cai_jax.model import lm as models
from cai_jax.model.attention.rotary import rotary_angles, rotate
from cai_jax.model.config import ModelConfig, Rope
from cai_jax.model.families import rope as entries
from cai_jax.model.families.family import config_from_hf, config_to_hf
from cai_jax.model.rope import (
  DynamicRope,
  LinearRope,
  LongRope,
  ProportionalRope,
  YarnRope,
)
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import read_json
from cai_jax.runtime.mesh import make_mesh
from tests.paged_rows import TOKENS, B, PagedRows, T

HEAD = 16  # channels of a head
PARTIAL = entries.RopeEntries(fraction=1.0)
SHORT, LONG = [1.0 + 0.1 * i for i in range(8)], [1.0 + 3.0 * i for i in range(8)]
ORIGINAL = {'original_max_position_embeddings': 32}
LONGROPE = {'rope_type': 'longrope', 'short_factor': SHORT, 'long_factor': LONG, **ORIGINAL}
SCALINGS = {
  'linear': {'rope_type': 'linear', 'factor': 4.0},
  'linear, partial': {'rope_type': 'linear', 'factor': 1.5, 'partial_rotary_factor': 0.5},
  'dynamic': {'rope_type': 'dynamic', 'factor': 2.0},
  'llama3': {
    'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
    **ORIGINAL
  },
  'yarn': {'rope_type': 'yarn', 'factor': 4.0, **ORIGINAL},
  'yarn, whole context': {'rope_type': 'yarn', 'factor': 4.0},
  'yarn, partial': {'rope_type': 'yarn', 'factor': 4.0, **ORIGINAL, 'partial_rotary_factor': 0.75},
  'yarn, betas': {'rope_type': 'yarn', 'factor': 8.0, **ORIGINAL, 'beta_fast': 4, 'beta_slow': 0.5},
  'yarn, narrow': {'rope_type': 'yarn', 'factor': 8.0, **ORIGINAL, 'beta_fast': 2, 'beta_slow': 2,
                   'truncate': False},
  'yarn, factor': {'rope_type': 'yarn', 'factor': 4.0, **ORIGINAL, 'attention_factor': 0.7},
  'yarn, mscale': {'rope_type': 'yarn', 'factor': 40.0, **ORIGINAL, 'mscale': 0.7,
                   'mscale_all_dim': 1.2, 'truncate': False},
  'longrope': LONGROPE,
  'longrope, factor': {**LONGROPE, 'factor': 3.0},
  'longrope, attention factor': {**LONGROPE, 'attention_factor': 1.3},
  'longrope, partial': {**LONGROPE, 'short_factor': SHORT[:4], 'long_factor': LONG[:4],
                        'partial_rotary_factor': 0.5},
  'proportional': {'rope_type': 'proportional', 'partial_rotary_factor': 0.3, 'factor': 2.0},
  'proportional, whole': {'rope_type': 'proportional'},
}  # fmt: skip


def hf_config(rope, theta=500.0, **fields):
  """Return the config.json of a Llama model with rotary positions as in `rope_parameters`."""
  base = config_to_hf(ModelConfig('llama', 8, 64, 32, 2, 4, 2, HEAD, 128))
  return {**base, 'rope_theta': theta, 'rope_parameters': {'rope_theta': theta, **rope}, **fields}


def read(hf):
  """Return the ModelConfig; unlike Llama's, its heads may be rotated in part."""
  fields = entries.read_rope(hf, HEAD, PARTIAL)
  return dataclasses.replace(ModelConfig('llama', 8, 64, 32, 2, 4, 2, HEAD, 128), **fields)


def frequencies(config):
  """Return frequencies [C/2] and amplitude, from the angles at positions 0 and 1."""
  cos, sin = rotary_angles(config.rope(0), HEAD, jnp.arange(2)[None])
  return np.arctan2(sin[0, 1], cos[0, 1]), cos[0, 0, 0]


@pytest.mark.parametrize('theta', [500.0, 1e6])
@pytest.mark.parametrize('rope', SCALINGS.values(), ids=SCALINGS)
def test_frequencies_and_amplitudes_are_those_of_transformers(rope, theta):
  hf = hf_config(rope, theta)
  theirs = transformers.LlamaConfig(**json.loads(json.dumps(hf)))
  expected, amplitude = ROPE_INIT_FUNCTIONS[rope['rope_type']](theirs)
  config = read(hf)
  ours, factor = frequencies(config)
  np.testing.assert_allclose(ours, expected.numpy(), rtol=2e-6, atol=1e-9)
  np.testing.assert_allclose(factor, amplitude, rtol=1e-6)
  if rope['rope_type'] == 'longrope':
    assert config.max_positions == 32
    ours, factor = frequencies(config.with_long_context())
    expected, amplitude = ROPE_INIT_FUNCTIONS['longrope'](theirs, seq_len=33)
    np.testing.assert_allclose(ours, expected.numpy(), rtol=2e-6)
    np.testing.assert_allclose(factor, amplitude, rtol=1e-6)


@pytest.mark.parametrize('rope', SCALINGS.values(), ids=SCALINGS)
def test_reading_and_writing_are_inverse(rope):
  """Also for the entries of each transformers alone, and no given entry is lost."""
  config = read(hf_config(rope))
  written = entries.write_rope(config, PARTIAL)
  hf = hf_config(rope) | written
  assert read(hf) == config
  assert rope.items() <= written['rope_parameters'].items()
  assert hf['max_position_embeddings'] == 128
  newer = hf_config(rope) | {'rope_parameters': written['rope_parameters']}
  assert read({k: v for k, v in newer.items() if k not in ('rope_scaling', 'rope_theta')}) == config
  assert read({k: v for k, v in hf.items() if k != 'rope_parameters'}) == config


def test_llama_models_write_each_scaling_that_they_read():
  for rope in SCALINGS.values():
    if 'partial_rotary_factor' in rope and rope['rope_type'] != 'proportional':
      with pytest.raises(UserError, match='partial_rotary_factor=0'):
        config_from_hf(hf_config(rope))
      continue
    config = config_from_hf(hf_config(rope))
    assert config_from_hf(config_to_hf(config)) == config
    assert transformers.LlamaConfig(**config_to_hf(config)).rope_parameters.items() >= rope.items()


def test_the_choice_of_a_long_context_is_not_written():
  config = config_from_hf(hf_config(LONGROPE))
  longer = config.with_long_context()
  assert (config.max_positions, longer.max_positions) == (32, 128)
  assert longer.long_context and not config.long_context
  assert config_to_hf(longer) == config_to_hf(config)
  with pytest.raises(UserError, match='holds 128 tokens, and its config.json has no longrope'):
    config_from_hf(hf_config(SCALINGS['linear'])).with_long_context()
  whole = hf_config({**LONGROPE, 'original_max_position_embeddings': 128})
  with pytest.raises(UserError, match='Set model.long_context to False'):
    config_from_hf(whole).with_long_context()


@pytest.mark.parametrize(
  'name',
  ['llama2', *(pytest.param(n, marks=pytest.mark.slow) for n in ('mistral', 'qwen2', 'qwen3'))],
)
@pytest.mark.parametrize('scaling', ['linear', 'dynamic', 'yarn', 'longrope'])
def test_scaled_models_agree_with_transformers(tiny_hf_folder, tmp_path, name, scaling):
  """With longrope, transformers takes the long factors for texts beyond the original context."""
  folder = shutil.copytree(tiny_hf_folder(name), tmp_path / 'model')
  hf = read_json(folder / 'config.json')
  half = (hf.get('head_dim') or hf['hidden_size'] // hf['num_attention_heads']) // 2
  rope = {'rope_theta': 500.0, **SCALINGS[scaling]}
  rope |= {k: v[:half] for k, v in rope.items() if isinstance(v, list)}
  (folder / 'config.json').write_text(
    json.dumps(hf | {'rope_theta': 500.0, 'rope_parameters': rope})
  )
  theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval().double()
  assert theirs.config.rope_parameters.items() >= rope.items()
  lm = cai_jax.load(folder, mesh=make_mesh(1, devices=jax.devices()[:1]))
  assert lm.max_positions == (32 if scaling == 'longrope' else 256)

  def check(lm, tokens):
    with torch.no_grad():
      expected = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(lm.logits(tokens), expected, atol=1e-4, rtol=0)

  check(lm, TOKENS)
  if scaling == 'longrope':
    with pytest.raises(UserError, match='row of 48 tokens is longer .* 32: the context is 32 of'):
      lm.logits(np.concatenate([TOKENS, TOKENS], axis=1))
    longer = cai_jax.load(folder, mesh=lm.mesh, long_context=True)
    assert longer.max_positions == 256 and longer.fingerprint != lm.fingerprint
    check(longer, np.concatenate([TOKENS, TOKENS], axis=1))


def test_rotation_of_leading_channels_and_of_neighbours():
  x = np.random.default_rng(0).normal(size=(1, 5, 2, HEAD)).astype(np.float32)
  positions = jnp.arange(5)[None]
  cos, sin = (np.asarray(a)[0, :, None] for a in rotary_angles(Rope(channels=6), HEAD, positions))

  def turned(first, second):
    a, b = x[0, ..., first], x[0, ..., second]
    return a * cos - b * sin, b * cos + a * sin

  angles = rotary_angles(Rope(channels=6), HEAD, positions)
  halves, neighbours = np.asarray(rotate(x, angles))[0], np.asarray(rotate(x, angles, True))[0]
  for out in (halves, neighbours):
    np.testing.assert_array_equal(out[..., 6:], x[0, ..., 6:])
  low, high = turned(slice(0, 3), slice(3, 6))
  np.testing.assert_allclose(halves[..., :6], np.concatenate([low, high], -1), atol=1e-6)
  even, odd = turned(slice(0, 6, 2), slice(1, 6, 2))
  np.testing.assert_allclose(neighbours[..., 0:6:2], even, atol=1e-6)
  np.testing.assert_allclose(neighbours[..., 1:6:2], odd, atol=1e-6)
  assert rotate(x, None) is x
  full = transformers.models.glm4.modeling_glm4.apply_rotary_pos_emb(
    *(torch.tensor(x).transpose(1, 2),) * 2,
    *(torch.tensor(np.array(a)).repeat(1, 1, 2) for a in angles),
  )[0]
  np.testing.assert_allclose(neighbours, full.transpose(1, 2)[0].numpy(), atol=1e-6)


LOCAL, GLOBAL = Rope(500.0), Rope(1e4, YarnRope(4.0, 32), 4)
CHANGES = {
  'partial': {'rope_channels': 4},
  'interleaved': {'rope_interleaved': True, 'rope_channels': 6},
  'no positions in one layer': {'ropes': (GLOBAL, None, GLOBAL)},
  'no positions': {'ropes': (None,) * 3},
  'two bases': {'ropes': (LOCAL, GLOBAL, LOCAL), 'windows': (4, None, 4)},
  'two bases, one window': {'ropes': (LOCAL, Rope(1e6), LOCAL), 'rope_interleaved': True},
}


SLOW = ('partial', 'no positions in one layer', 'no positions', 'two bases, one window')


@pytest.mark.parametrize(
  'change',
  [
    pytest.param(change, id=name, marks=[pytest.mark.slow] if name in SLOW else [])
    for name, change in CHANGES.items()
  ],
)
def test_cached_decode_equals_the_full_forward(load, change):
  lm = load('llama2')
  plain = np.asarray(lm.logits(TOKENS))
  lm = dataclasses.replace(lm, config=dataclasses.replace(lm.config, **change))
  full = np.asarray(lm.logits(TOKENS))
  assert np.abs(full - plain).max() > 0.1
  rows = PagedRows(lm)
  for start in (0, 7):
    parts = [(row, start, start + 7) for row in range(B)]
    for row, logits in enumerate(rows.prefill(parts)):
      np.testing.assert_allclose(logits, full[row, start : start + 7], atol=1e-4, rtol=0)
  for at in range(14, T):
    logits = rows.decode(range(B), [at] * B)
    np.testing.assert_allclose(logits[:, 0], full[:, at], atol=1e-4, rtol=0)


def test_a_layer_sees_no_order_if_nothing_is_rotated(load):
  """The last token of one unrotated layer does not depend on the order of the others."""
  lm = load('llama2')
  config = dataclasses.replace(lm.config, num_layers=1, ropes=(None,))
  params = lm.params | {'layers': {0: lm.params['layers'][0]}}
  lm = dataclasses.replace(lm, config=config, params=params)
  tokens = TOKENS[:1]
  swapped = np.concatenate([tokens[:, -2::-1], tokens[:, -1:]], axis=1)
  np.testing.assert_allclose(lm.logits(tokens)[:, -1], lm.logits(swapped)[:, -1], atol=1e-5)
  rotated = dataclasses.replace(lm, config=dataclasses.replace(config, ropes=()))
  assert np.abs(rotated.logits(tokens) - rotated.logits(swapped))[:, -1].max() > 0.1


def test_layers_with_the_same_window_and_shape_of_angles_share_a_program(load):
  """The bases are arguments of it. A layer that rotates nothing has a program of its own."""
  lm = load('llama2')

  def count(ropes):
    cached_forward._layer.clear_cache()
    config = dataclasses.replace(lm.config, ropes=ropes)
    arguments = PagedRows(dataclasses.replace(lm, config=config)).arguments([0], [0], [])[0]
    spec, params, tokens, positions, cache, step = arguments
    cache = tuple(jax.tree.map(jnp.copy, layer) for layer in cache)  # each layer donates its own
    cached_forward.forward_cached(spec, params, tokens, positions, cache, step)
    return cached_forward._layer._cache_size()

  assert count(()) == count((LOCAL, Rope(1e6), LOCAL)) < count((LOCAL, None, LOCAL))


def test_angles_are_computed_once_for_each_rope(load):
  lm = load('llama2')
  config = dataclasses.replace(lm.config, ropes=(LOCAL, None, GLOBAL))
  arguments = PagedRows(dataclasses.replace(lm, config=config)).arguments([0, 1], [0, 0], [])[0]
  compiled = jax.jit(cached_forward.forward_cached, static_argnums=0).lower(*arguments).compile()
  assert compiled.as_text().count(' cosine(') == 2


# Layers of two types, and layers without rotary positions.

KINDS = ['sliding_attention', 'full_attention', 'sliding_attention']
GEMMA3 = {
  'full_attention': entries.RopeEntries(theta=1e6),
  'sliding_attention': entries.RopeEntries(theta_key='rope_local_base_freq', objects=()),
}
BASE = ModelConfig('llama', 8, 64, 32, 3, 4, 2, HEAD, 128)


def read_kinds(hf, kinds=KINDS):
  hf = {'max_position_embeddings': 128, **hf}
  return dataclasses.replace(BASE, **entries.read_layer_ropes(hf, HEAD, kinds, GEMMA3))


@pytest.mark.parametrize('scaling', ['linear', 'yarn', 'longrope', 'llama3'])
def test_ropes_of_two_types_of_layers_are_read_and_written(scaling):
  """Both as transformers 4 wrote them for Gemma 3, and as transformers 5 does."""
  rope = SCALINGS[scaling]
  old = {'rope_theta': 1e6, 'rope_local_base_freq': 5e4, 'rope_scaling': rope}
  config = read_kinds(old)
  assert [r.theta for r in config.ropes] == [5e4, 1e6, 5e4]
  assert config.ropes[0].scaling is None and config.ropes[1].scaling is not None
  assert config.max_positions == (32 if scaling == 'longrope' else 128)
  written = entries.write_layer_ropes(config, KINDS, GEMMA3)
  assert read_kinds(written) == config
  assert read_kinds({'rope_parameters': written['rope_parameters']}) == config
  assert read_kinds({k: v for k, v in written.items() if k != 'rope_parameters'}) == config
  theirs = transformers.Gemma3TextConfig(
    head_dim=HEAD, num_hidden_layers=3, layer_types=KINDS, max_position_embeddings=128, **old
  )
  assert read_kinds({'rope_parameters': theirs.rope_parameters}) == config
  again = (
    transformers.Gemma3TextConfig(
      head_dim=HEAD,
      num_hidden_layers=3,
      layer_types=KINDS,
      **{'max_position_embeddings': 128},
      **written,
    )
    if scaling != 'longrope'
    else theirs
  )
  assert again.rope_parameters == theirs.rope_parameters


def test_layers_of_one_type_have_one_rope():
  config = read_kinds({}, KINDS[1:2] * 3)
  assert config.ropes == () and config.rope_theta == 1e6
  assert read_kinds({}).rope(0).theta == 1e4


def test_layers_without_rotary_positions_are_read_and_written():
  rope = Rope(5e6)
  assert entries.read_no_rope_layers({}, rope, 5) == ()
  assert entries.read_no_rope_layers({}, rope, 5, 4) == (rope, rope, rope, None, rope)
  hf = {'no_rope_layers': [1, 0, 1]}
  ropes = entries.read_no_rope_layers(hf, rope, 3, 4)
  assert entries.read_no_rope_layers({'no_rope_layers': [1, 0, 1, 0]}, rope, 3, 4) == ropes
  assert ropes == (rope, None, rope)
  assert entries.write_no_rope_layers(dataclasses.replace(BASE, ropes=ropes)) == hf
  theirs = transformers.SmolLM3Config(num_hidden_layers=9)
  ours = entries.read_no_rope_layers({}, rope, 9, 4)
  assert [int(r is not None) for r in ours] == theirs.no_rope_layers
  for wrong in ([1, 0], [1, 2, 0], 'none', [1, 0, None]):
    with pytest.raises(UserError, match='no_rope_layers is .*3 entries'):
      entries.read_no_rope_layers({'no_rope_layers': wrong}, rope, 3)


def test_names_of_other_families_are_read_and_written():
  neox = entries.RopeEntries(theta_key='rotary_emb_base', fraction=0.25, fraction_key='rotary_pct')
  hf = {'rotary_emb_base': 1e5, 'rotary_pct': 0.5}
  fields = entries.read_rope(hf, HEAD, neox)
  assert (fields['rope_theta'], fields['rope_channels']) == (1e5, 8)
  assert entries.read_rope({}, HEAD, neox)['rope_channels'] == 4
  written = entries.write_rope(dataclasses.replace(BASE, **fields), neox)
  assert hf.items() <= written.items() and 'rope_theta' not in written
  assert entries.read_rope(written, HEAD, neox) == fields
  theirs = transformers.GPTNeoXConfig(**written).rope_parameters
  assert entries.read_rope({'rope_parameters': theirs}, HEAD, neox) == fields
  phi3 = entries.RopeEntries(fraction=1.0, aliases={'su': 'longrope', 'yarn': 'longrope'})
  su = {k: v for k, v in LONGROPE.items() if k not in ('rope_type', *ORIGINAL)} | {'type': 'su'}
  hf = {'rope_scaling': su, 'max_position_embeddings': 128, **ORIGINAL}
  scaling = entries.read_rope(hf, HEAD, phi3)['rope_scaling']
  assert scaling == LongRope(tuple(SHORT), tuple(LONG), 32, 128)


@pytest.mark.parametrize('head_dim', [2, 6, 16, 80, 96, 98, 128, 256])
def test_every_number_of_rotated_channels_is_written_exactly(head_dim):
  for channels in range(2, head_dim + 1, 2):
    rope_channels = None if channels == head_dim else channels
    config = dataclasses.replace(BASE, head_dim=head_dim, rope_channels=rope_channels)
    written = entries.write_rope(config, PARTIAL)
    assert entries.read_rope(written, head_dim, PARTIAL)['rope_channels'] == rope_channels


@pytest.mark.parametrize(
  ('rope', 'message'),
  [
    ({'rope_type': 'ntk'}, "'ntk', which is not supported; 'default', 'linear', 'dynamic', "),
    ({'rope_type': 'yarn', **ORIGINAL}, "'yarn' needs factor, original.*; factor is missing"),
    ({'rope_type': 'linear'}, "'linear' needs factor; factor is missing in rope_parameters"),
    ({'rope_type': 'linear', 'factor': 0.5}, 'rope_parameters: factor is 0.5. It must be at least'),
    ({'rope_type': 'linear', 'factor': 2.0, 'beta_fast': 1.0}, 'entries are factor, partial_rot'),
    ({**SCALINGS['yarn'], 'beta_fast': 0.5}, 'beta_fast=0.5 is less than beta_slow=1.0'),
    ({**SCALINGS['yarn'], 'truncate': 1}, 'rope_parameters.truncate is 1; it must be true or'),
    ({**SCALINGS['yarn'], 'mscale': -1}, 'mscale is -1; it must be a positive number'),
    ({**SCALINGS['yarn'], 'rope_theta': 0.5}, 'rope_theta is 0.5; for rope_type .yarn. it must'),
    ({**LONGROPE, 'short_factor': SHORT[:3]}, 'short_factor has 3 numbers for 8 frequencies'),
    ({**LONGROPE, 'long_factor': [0.0] * 8}, 'long_factor is .*list of positive numbers'),
    ({**LONGROPE, 'long_factor': None}, 'long_factor is missing in rope_parameters'),
    ({**LONGROPE, 'original_max_position_embeddings': 1}, 'must be at least 2'),
    ({'rope_type': 'proportional', 'partial_rotary_factor': 1.5}, '1.5. It must be between 0 and'),
    ({'partial_rotary_factor': 2.0}, 'partial_rotary_factor=2.0 rotates 32'),
    ({'partial_rotary_factor': 0.2}, 'partial_rotary_factor=0.2 rotates 3 of the 16 channels'),
  ],
)  # fmt: skip
def test_wrong_rotary_positions_are_refused(rope, message):
  hf = hf_config({})
  del hf['rope_theta']
  with pytest.raises(UserError, match=message):
    entries.read_rope({**hf, 'rope_parameters': rope}, HEAD, PARTIAL)


@pytest.mark.parametrize(
  ('hf', 'message'),
  [
    ({'rope_parameters': {'rope_type': 'default'}}, 'rope_parameters.rope_type is not supported'),
    ({'rope_parameters': [1]}, 'object for each of full_attention, sliding_attention'),
    (
      {'rope_parameters': {'full_attention': {'rope_type': 'x'}}},
      "rope_parameters.full_attention has rope_type 'x'",
    ),
    (
      {'rope_parameters': {'sliding_attention': {'rope_theta': 1.0}}, 'rope_local_base_freq': 2.0},
      'rope_local_base_freq=2.0, rope_parameters.sliding_attention.rope_theta=1.0',
    ),
  ],
)
def test_wrong_ropes_of_types_of_layers_are_refused(hf, message):
  with pytest.raises(UserError, match=message):
    read_kinds(hf)


def test_models_without_a_longer_context_are_refused_where_one_is_asked_for(tiny_hf_folder):
  for read_model in (cai_jax.load, models.inspect_model, models.describe):
    with pytest.raises(UserError, match=r'config\.json: .*256 tokens.*no longrope'):
      read_model(tiny_hf_folder('llama2'), long_context=True)


def test_a_limit_of_the_context_is_logged_once(tiny_hf_folder, tmp_path, caplog):
  folder = shutil.copytree(tiny_hf_folder('llama2'), tmp_path / 'model')
  hf = read_json(folder / 'config.json')
  rope = {'rope_theta': 1e4, **SCALINGS['dynamic']}
  (folder / 'config.json').write_text(json.dumps(hf | {'rope_parameters': rope}))
  for _ in range(2):
    assert models.inspect_model(folder).config.max_positions == 256
  assert caplog.text.count('Longer contexts are refused') == 1


def test_scalings_say_how_they_limit_the_context():
  longrope = config_from_hf(hf_config(LONGROPE)).rope_scaling
  assert 'the context is 32 of 128 tokens' in longrope.remark
  assert dataclasses.replace(longrope, long=True).remark is None
  assert 'beyond max_position_embeddings' in DynamicRope(2.0).remark
  assert LinearRope(2.0).remark is ProportionalRope().remark is YarnRope(2.0, 8).remark is None
