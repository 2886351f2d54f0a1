"""Sharding of parameters: the rules, and sizes that the mesh does not divide."""

import re

import jax
import pytest
from jax.sharding import PartitionSpec as P

from cai_jax.model import lora, sharding
from cai_jax.model.config import DeltaRule, Experts, ModelConfig
from cai_jax.model.score_head import init_head, join_head
from cai_jax.model.sharding import RULES, flatten_params, param_shardings, partition_spec, path_str
from cai_jax.model.transformer import abstract_model
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.mesh import SHARDS, make_mesh

SIZES = dict(
  vocab_size=8, d_model=16, d_ff=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4
)
CONFIGS = [
  ModelConfig('llama', **SIZES, max_positions=64, qkv_bias=True, output_bias=True),
  ModelConfig('qwen3', **SIZES, max_positions=64, qk_norm=True, tied_embeddings=True),
  ModelConfig(
    'other',
    **SIZES,
    max_positions=64,
    qk_norm=True,
    qk_norm_over_heads=True,
    norm='layer',
    post_norm=True,
    mlp_bias=True,
    learned_positions=True,
  ),
  ModelConfig(
    'other',
    **SIZES,
    max_positions=64,
    head_dims=(4, 8),
    kv_heads=(4, 2),
    values_from_keys=(False, True),
    value_norm=True,
    layer_scalar=True,
    sinks=True,
  ),
  ModelConfig('other', **SIZES, max_positions=64, experts=Experts(4, 2, 16, bias=True)),
  ModelConfig('other', **SIZES, max_positions=64, delta=DeltaRule((0,), 2, 4, 4, 4, 3)),
]


def test_every_parameter_matches_one_rule_and_every_rule_matches_a_parameter():
  adapted = lora.abstract_model(CONFIGS[0], lora.LoraConfig(2, 16.0, 'attention/|mlp/'))[1]
  paths = {path for config in CONFIGS for path in flatten_params(abstract_model(config)[1])}
  head = join_head({}, init_head(16, jax.random.key(0)))
  paths |= flatten_params(adapted).keys() | flatten_params(head).keys()
  for path in paths:
    assert isinstance(partition_spec(path), P)  # raises unless exactly one rule matches
  for pattern, _ in RULES:
    assert any(re.fullmatch(pattern, path) for path in paths), f'no parameter matches {pattern}'


@pytest.mark.parametrize('config', CONFIGS, ids=lambda config: config.family)
def test_specs_have_the_rank_of_their_parameter(config):
  for path, leaf in flatten_params(abstract_model(config)[1]).items():
    spec = partition_spec(path)
    assert len(spec) in (0, leaf.ndim), path
    assert all(not isinstance(axis, tuple) or axis == SHARDS for axis in spec), path
    if leaf.ndim > 1 and path.endswith(('kernel', 'table')):  # large ones are split by both axes
      axes = {SHARDS, 'tensor', *(['expert'] if 'experts' in path else [])}
      axes -= {'tensor'} if 'router' in path else set()  # which has few columns
      axes -= {SHARDS} if '_conv' in path else set()  # a few numbers for each channel
      assert {axis for axis in spec if axis} == axes


def test_parameters_without_exactly_one_rule_are_refused(monkeypatch):
  with pytest.raises(ValueError, match="0 sharding rules match parameter 'layers/0/moe/kernel'"):
    partition_spec('layers/0/moe/kernel')
  monkeypatch.setattr(sharding, 'RULES', (*RULES, (r'norm/.*', P())))
  with pytest.raises(ValueError, match="2 sharding rules match parameter 'norm/scale'"):
    partition_spec('norm/scale')


def test_mesh_axes_must_divide_the_dimensions_that_they_split():
  params = abstract_model(CONFIGS[0])[1]
  with pytest.raises(UserError, match=r'tensor=4 does not divide dimension 2 of .*key.*\[1, 2\]'):
    param_shardings(params, make_mesh(2, 1, 4))
  with pytest.raises(UserError, match=r'fsdp × sequence=8 does not divide dimension 4 of a/mlp/up'):
    up = {'a': {'mlp': {'up': {'kernel': jax.ShapeDtypeStruct((4, 8), 'float32')}}}}
    param_shardings(up, make_mesh(1, 2, sequence=4))
  shardings = param_shardings(params, make_mesh(1, 4, 2))
  kernel = shardings['layers'][1]['attention']['query']['kernel']
  assert kernel.shard_shape((16, 4, 4)) == (4, 2, 4)
  assert jax.tree.structure(shardings) == jax.tree.structure(params)


def test_path_str_joins_keys_and_indices():
  tree = {'a': [1, {'b': 2}]}
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  assert [path_str(path) for path, _ in leaves] == ['a/0', 'a/1/b']
