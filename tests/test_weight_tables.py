"""Weight tables whose tensors hold several of our parameters, or parts of one."""

import dataclasses

import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from cai_jax.model import checkpoint, checkpoint_checks
from cai_jax.model.config import ModelConfig
from cai_jax.model.families import llama, shared
from cai_jax.model.families.family import FAMILIES, Family
from cai_jax.model.families.weight_table import Weight, find_weights, join_parts
from cai_jax.model.transformer import abstract_model
from cai_jax.model.weight_files import INDEX
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import read_json
from cai_jax.runtime.mesh import make_mesh

QKV = ('query', 'key', 'value')


def qkv(name, kernel, bias, prefix='model.layers.{}.'):
  """Return the rows of query, key and value in one tensor, with the letter N for their heads."""
  rows = []
  for part in QKV:
    heads = 'N' if part == 'query' else 'K'
    rows.append(Weight(f'attention/{part}/kernel', f'{name}.weight', kernel.replace('N', heads)))
    rows.append(Weight(f'attention/{part}/bias', f'{name}.bias', bias.replace('N', heads)))
  return shared.per_layer(*rows, prefix=prefix)


OUTPUT = shared.ATTENTION[3:]
# The layout of Phi-3, GPT-NeoX and GPT-2: one part after the other, side by side in each head, and
# with the inputs first. A made-up feed-forward layer has gate and up in turn.
TABLES = {
  'joined': (
    *shared.EMBEDDINGS_AND_NORMS,
    *qkv('self_attn.qkv_proj', 'DNH->+NH,D', 'NH->+NH'),
    *OUTPUT,
    *shared.OUTPUT_BIAS,
    *shared.per_layer(
      Weight('mlp/gate/kernel', 'mlp.gate_up_proj.weight', 'DF->+F,D'),
      Weight('mlp/up/kernel', 'mlp.gate_up_proj.weight', 'DF->+F,D'),
      Weight('mlp/down/kernel', 'mlp.down_proj.weight', 'FD->D,F'),
    ),
  ),
  'in_each_head': (
    *shared.EMBEDDINGS_AND_NORMS,
    *qkv('attention.query_key_value', 'DNH->N+H,D', 'NH->N+H', 'neox.layers.{}.'),
    *OUTPUT,
    *shared.OUTPUT_BIAS,
    *shared.per_layer(
      Weight('mlp/gate/kernel', 'mlp.gate_up', 'DF->D,F+'),
      Weight('mlp/up/kernel', 'mlp.gate_up', 'DF->D,F+'),
      Weight('mlp/down/kernel', 'mlp.down', 'FD->F,D'),
    ),
  ),
  'inputs_first': (
    *shared.EMBEDDINGS_AND_NORMS,
    *qkv('attn.c_attn', 'DNH->D,+NH', 'NH->+NH', 'h.{}.'),
    *OUTPUT,
    *shared.OUTPUT_BIAS,
    *shared.GATED_MLP,
  ),
}
CONFIG = ModelConfig(
  'llama', 320, 32, 48, 2, 4, 4, 8, 64, qkv_bias=True, output_bias=True, rope_theta=500.0
)


def one_device():
  return make_mesh(1, devices=jax.devices()[:1])


@pytest.fixture(params=list(TABLES))
def layout(request, restored_registries) -> str:
  """Register a family with each weight table of TABLES in turn, and return its name."""
  return register(request.param, TABLES[request.param])


def register(name, weights, **fields):
  """Register a family that is Llama but for the weight table and other fields."""
  read = lambda hf: dataclasses.replace(llama.read_config(hf), family=name)  # noqa: E731
  family = dataclasses.replace(FAMILIES['llama'], read_config=read, weights=weights, **fields)
  FAMILIES.register(name)(family)
  return name


def random_params(config):
  """Return the parameters of a model as random numbers."""
  random = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: random.normal(size=leaf.shape).astype(np.float32), abstract_model(config)[1]
  )


def save(folder, config, dtype=None, **kwargs):
  params = random_params(config)
  checkpoint.save_params(folder, jax.tree.map(jax.numpy.asarray, params), config, dtype, **kwargs)
  return params


def test_what_is_written_is_read_with_the_same_bits(layout, tmp_path):
  heads = 2 if layout == 'joined' else 4  # parts of different sizes where the layout has them
  config = dataclasses.replace(CONFIG, family=layout, num_kv_heads=heads)
  params = save(tmp_path, config)
  names = safetensors.numpy.load_file(tmp_path / 'model.safetensors').keys()
  assert len(names) == len(checkpoint_checks.stored_weights(config)) - 8 - 2 * (
    layout != 'inputs_first'
  )
  jax.tree.map(
    np.testing.assert_array_equal, checkpoint.load_params(tmp_path, config, one_device()), params
  )
  save(tmp_path / 'half', config, 'bfloat16', max_shard_bytes=20_000)
  index = read_json(tmp_path / 'half' / INDEX)
  assert index['weight_map'].keys() == names and len({*index['weight_map'].values()}) > 3
  size = sum(x.size * 2 for x in params_of(tmp_path / 'half').values())
  assert index['metadata']['total_size'] == size == 2 * sum(x.size for x in jax.tree.leaves(params))
  assert checkpoint.stored_dtype(tmp_path / 'half', config) == 'bfloat16'


def params_of(folder):
  return {
    name: x
    for file in folder.glob('*.safetensors')
    for name, x in safetensors.numpy.load_file(file).items()
  }


def test_blocks_on_eight_devices_equal_the_whole(layout, tmp_path):
  config = dataclasses.replace(CONFIG, family=layout)
  params = save(tmp_path, config)
  mesh = make_mesh(2, 2, 2)
  loaded = checkpoint.load_params(tmp_path, config, mesh)
  jax.tree.map(np.testing.assert_array_equal, loaded, params)
  query = loaded['layers'][0]['attention']['query']['kernel']
  assert query.addressable_shards[0].data.shape == (16, 2, 8)  # it is split over the mesh


def test_parts_are_where_the_table_says():
  """Numbers that say which element they are, against slices that are written out."""
  shapes = {f'layers/0/attention/{part}/kernel': (6, 4, 2) for part in QKV}
  x = {path: 1000 * number + np.arange(48.0).reshape(6, 4, 2) for number, path in enumerate(shapes)}
  query, key, value = x.values()
  transposed = [array.transpose(1, 2, 0) for array in (query, key, value)]  # [N,H,D]
  expected = {
    'DNH->+NH,D': np.concatenate([array.reshape(8, 6) for array in transposed]),
    'DNH->N+H,D': np.stack(transposed, axis=1).reshape(24, 6),
    'DNH->NH+,D': np.stack(transposed, axis=2).reshape(24, 6),
    'DNH->D,+1,NH': np.stack([array.reshape(6, 8) for array in (query, key, value)], axis=1),
    'DNH->D,+NH': np.concatenate([array.reshape(6, 8) for array in (query, key, value)], axis=1),
    'DNH->D+,HN': np.stack([a.transpose(0, 2, 1) for a in (query, key, value)], 1).reshape(18, 8),
  }
  for axes, tensor in expected.items():
    rows = shared.per_layer(*(Weight(f'attention/{part}/kernel', 'qkv', axes) for part in QKV))
    stored = find_weights(rows, shapes)
    written = join_parts([(stored[path], x[path]) for path in shapes])
    np.testing.assert_array_equal(written, tensor)
    assert written.flags.c_contiguous
    for path in shapes:
      block = stored[path].read_block(lambda _, t=tensor: t, (1, 2, 0), (5, 4, 1))
      np.testing.assert_array_equal(block, x[path][1:5, 2:4, :1])


def test_a_tensor_may_have_axes_of_one_element():
  """The kernel of a convolution over each channel, and a number."""
  rows = (Weight('conv', 'conv.weight', 'DW->D,1,W'), Weight('factor', 'factor', '->1'))
  sizes = {'W': 'conv_kernel'}
  family = Family(llama.read_config, llama.write_config, rows, '', '', sizes=sizes)
  assert family.describe_shape('conv') == 'hidden_size, 1, conv_kernel'
  stored = family.find_weights({'conv': (6, 4), 'factor': ()})
  x = np.arange(24.0).reshape(6, 4)
  tensor = join_parts([(stored['conv'], x)])
  np.testing.assert_array_equal(tensor, x[:, None])
  block = stored['conv'].read_block(lambda _: tensor, (1, 2), (4, 4))
  np.testing.assert_array_equal(block, x[1:4, 2:4])
  number = join_parts([(stored['factor'], np.asarray(3.0))])
  assert number.shape == (1,)
  assert stored['factor'].read_block(lambda _: number, (), ()) == 3.0


class Recorder:
  """A tensor of a file that records what was read of it."""

  def __init__(self, x):
    self.x, self.shapes = x, []

  def __getitem__(self, region):
    self.shapes.append(self.x[region].shape)
    return self.x[region]


@pytest.mark.parametrize(
  ('axes', 'read'),
  [
    ('DNH->+NH,D', (4, 3)),  # two heads of one part
    ('DNH->N+H,D', (12, 3)),  # two heads, with all parts
    ('DNH->D,+NH', (3, 4)),
  ],
)
def test_only_the_rows_of_a_block_are_read(axes, read):
  shapes = {f'layers/0/attention/{part}/kernel': (6, 4, 2) for part in QKV}
  rows = shared.per_layer(*(Weight(f'attention/{part}/kernel', 'qkv', axes) for part in QKV))
  stored = find_weights(rows, shapes)['layers/0/attention/key/kernel']
  tensor = Recorder(np.zeros(stored.stored_shape))
  assert stored.read_block(lambda _: tensor, (0, 1, 0), (3, 3, 2)).shape == (3, 2, 2)
  assert tensor.shapes == [read]


# Experts: one parameter of ours for all of them.

EXPERTS = {f'layers/1/mlp/{part}/kernel': (8, 6, 4) for part in ('gate', 'up')}  # [E,D,F]
EXPERT_TABLES = {
  'stacked': ('experts.{E}.{part}_proj.weight', 'EDF->F,D'),
  'stacked_and_joined': ('experts.{E}.gate_up_proj.weight', 'EDF->+F,D'),
  'joined': ('experts.gate_up_proj', 'EDF->E,+F,D'),
  'in_turn': ('experts.gate_up_proj', 'EDF->E,D,F+'),
}


def expert_rows(name, axes):
  return shared.per_layer(
    *(
      Weight(f'mlp/{part}/kernel', f'mlp.{name.replace("{part}", part)}', axes)
      for part in ('gate', 'up')
    )
  )


@pytest.mark.parametrize('kind', list(EXPERT_TABLES))
def test_experts_are_a_stack_of_tensors_or_one_tensor(kind):
  name, axes = EXPERT_TABLES[kind]
  rows = expert_rows(name, axes)
  random = np.random.default_rng(0)
  x = {path: random.normal(size=shape) for path, shape in EXPERTS.items()}
  stored = find_weights(rows, EXPERTS)
  tensors = {}
  for tensor, (paths, index) in checkpoint._list_parts(stored).items():
    tensors[tensor] = Recorder(join_parts([(stored[path], x[path]) for path in paths], index))
  gate, up = x.values()
  expected = {
    'stacked': lambda: (16, 'experts.3.up_proj.weight', up[3].T),
    'stacked_and_joined': lambda: (
      8,
      'experts.3.gate_up_proj.weight',
      np.concatenate([gate[3], up[3]], 1).T,
    ),
    'joined': lambda: (
      1,
      'experts.gate_up_proj',
      np.concatenate([gate, up], 2).transpose(0, 2, 1),
    ),
    'in_turn': lambda: (1, 'experts.gate_up_proj', np.stack([gate, up], 3).reshape(8, 6, 8)),
  }[kind]
  count, name, value = expected()
  assert len(tensors) == count
  np.testing.assert_array_equal(tensors[f'model.layers.1.mlp.{name}'].x, value)
  path = 'layers/1/mlp/up/kernel'
  np.testing.assert_array_equal(
    stored[path].read_block(tensors.__getitem__, (2, 0, 1), (5, 6, 3)), x[path][2:5, :, 1:3]
  )
  opened = [name for name, tensor in tensors.items() if tensor.shapes]
  assert len(opened) == (3 if kind.startswith('stacked') else 1)  # only experts 2, 3 and 4
  if kind == 'joined':
    assert tensors[opened[0]].shapes == [(3, 2, 6)]


@pytest.mark.parametrize('kind', list(EXPERT_TABLES))
def test_experts_of_files_go_to_their_devices(kind, monkeypatch, restored_registries, tmp_path):
  """The files are written and read; both halves of the experts are on other devices."""
  name, axes = EXPERT_TABLES[kind]
  rows = expert_rows(name, axes)
  table = tuple(row for row in FAMILIES['llama'].weights if 'mlp/' not in row.path)
  down = shared.per_layer(Weight('mlp/down/kernel', 'mlp.down_proj.weight', 'FD->D,F'))
  config = dataclasses.replace(CONFIG, family=register('experts', (*table, *rows, *down)))

  def with_experts(config, **kwargs):
    graph, params = abstract_model(config, **kwargs)
    for layer in params['layers'].values():
      for part in ('gate', 'up'):
        leaf = layer['mlp'][part]['kernel']
        layer['mlp'][part]['kernel'] = jax.ShapeDtypeStruct((8, 6, 4), leaf.dtype)
    return graph, params

  for module in (checkpoint, checkpoint_checks):
    monkeypatch.setattr(module, 'abstract_model', with_experts)
  params = jax.tree.map(
    lambda leaf: np.random.default_rng(leaf.size).normal(size=leaf.shape).astype(np.float32),
    with_experts(config)[1],
  )
  checkpoint.save_params(
    tmp_path, jax.tree.map(jax.numpy.asarray, params), config, max_shard_bytes=3_000
  )
  assert len(list(tmp_path.glob('*.safetensors'))) > 3
  loaded = checkpoint.load_params(tmp_path, config, make_mesh(2, 2, 2))
  jax.tree.map(np.testing.assert_array_equal, loaded, params)
  kernel = loaded['layers'][0]['mlp']['up']['kernel']
  assert kernel.addressable_shards[0].data.shape == (4, 3, 4)
  bad = next(n for n in params_of(tmp_path) if 'experts' in n and ('.3.' in n or '.E' not in name))
  for file in tmp_path.glob('*.safetensors'):
    tensors = safetensors.numpy.load_file(file)
    if bad in tensors:
      tensors[bad].flat[5] = np.nan
      safetensors.numpy.save_file(tensors, file)
  with pytest.raises(UserError, match=f"{bad}' has a NaN"):
    checkpoint.load_params(tmp_path, config, make_mesh(2, 2, 2))


# What the table says of shapes, and mistakes in tables.


def test_the_entries_that_give_the_shape_of_a_joined_tensor_are_named():
  describe = lambda key, path: Family(  # noqa: E731
    llama.read_config, llama.write_config, TABLES[key], '', ''
  ).describe_shape(path)
  heads = 'num_key_value_heads × head_dim'
  assert describe('joined', 'layers/0/attention/key/kernel') == (
    f'num_attention_heads × head_dim + {heads} + {heads}, hidden_size'
  )
  assert describe('joined', 'layers/0/mlp/up/kernel') == '2 × intermediate_size, hidden_size'
  assert describe('in_each_head', 'layers/0/mlp/up/kernel') == 'hidden_size, intermediate_size × 2'
  family = dataclasses.replace(FAMILIES['llama'], sizes={'D': 'n_embd'})
  assert family.describe_shape('norm/scale') == 'n_embd'


def test_a_tensor_of_another_size_is_refused_with_the_entries(restored_registries, tmp_path):
  config = dataclasses.replace(CONFIG, family=register('joined', TABLES['joined']))
  save(tmp_path, config)
  other = dataclasses.replace(config, num_kv_heads=2)
  with pytest.raises(
    UserError, match=r'qkv_proj.* shape \(96.* implies \(64.*\+ num_key_value_heads × head_dim'
  ):
    checkpoint.check_params(tmp_path, other)


@pytest.mark.parametrize(
  ('rows', 'message'),
  [
    ([('a', 'x', 'DF->F,D'), ('a', 'y', 'DF->F,D')], "2 rows .* path 'a'"),
    ([('a', 'x', 'DF->F,D'), ('b', 'x', 'DF->F,D')], 'need one +'),
    ([('a', 'x', 'DF->+F,D')], 'need one +'),
    ([('a', 'x', 'DF->F')], 'each of our axes once'),
    ([('a', 'x', 'DF->F,DD')], 'each of our axes once'),
    ([('a', 'x.{E}', 'DF->F,D')], 'each of our axes once'),
    ([('a', 'x', 'DQ->Q,D')], "axis 'Q'"),
  ],
)
def test_mistakes_in_a_table_are_found(rows, message):
  with pytest.raises(ValueError, match=message):
    Family(llama.read_config, llama.write_config, tuple(Weight(*row) for row in rows), '', '')
