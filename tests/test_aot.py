"""Test ahead-of-time compilation for TPUs: reading HLO, and a tiny model on a real slice."""

import dataclasses
import itertools
import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from cai_jax.model.families.family import config_from_hf
from cai_jax.runtime.hardware import Device
from cai_jax.runtime.mesh import make_mesh
from cai_jax.sampling import auto
from cai_jax.sampling.config import EngineConfig
from cai_jax.training.config import TrainConfig
from cai_jax.training.losses.cross_entropy import MIN_SLICES
from experiments.aot import __main__, hlo, slices
from experiments.aot.flops import traced_flops
from experiments.aot.models import find_model, first_layers
from experiments.aot.program import TooLarge
from experiments.aot.sampler import Sampler, abstract_lm
from experiments.aot.slices import find_slice
from experiments.aot.train import Training, shapes_of

ROOT = pathlib.Path(__file__).resolve().parents[1]
TINY = {
  'model_type': 'llama',
  'vocab_size': 512,
  'hidden_size': 256,
  'intermediate_size': 512,
  'num_hidden_layers': 2,
  'num_attention_heads': 8,
  'num_key_value_heads': 4,
  'max_position_embeddings': 1024,
}
HLO = """\
HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%beside.1 (p: bf16[8,4]) -> bf16[16,4] {
  ROOT %gather.1 = bf16[16,4]{1,0} all-gather(%p), channel_id=3, replica_groups=[8,2]<=[16]
}

%beside.2 (p: bf16[8,4]) -> bf16[16,4] {
  ROOT %gather.2 = bf16[16,4]{1,0} all-gather(%p), channel_id=3, replica_groups=[8,2]<=[16]
}

%all-reduce-scatter.1 (p: f32[8,4]) -> f32[2,4] {
  %whole = f32[8,4]{1,0} all-reduce(%p), channel_id=6, replica_groups={{0,2,4,6},{1,3,5,7}}, \
to_apply=%add
  ROOT %slice = f32[2,4]{1,0} dynamic-slice(%whole, %i, %j), dynamic_slice_sizes={2,4}
}

%filter (p: f32[4]) -> f32[4] {
  ROOT %max = f32[4]{0} all-reduce(%p), channel_id=4, replica_groups=mesh['a'=4,'b'=2] {'b'}, \
to_apply=%add
}

%nothing (p: f32[4]) -> f32[4] {
  ROOT %same = f32[4]{0} negate(%p)
}

%body (s: (f32[4], f32[512,1024])) -> (f32[4], f32[512,1024]) {
  %moved = (f32[4]{0}, f32[4]{0}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=5, \
source_target_pairs={{0,1},{1,0}}
  %f.1 = bf16[16,4]{1,0} fusion(%x), kind=kCustom, calls=%beside.1
  %f.2 = bf16[16,4]{1,0} fusion(%x), kind=kCustom, calls=%beside.2
  %copy.1 = f32[512,1024]{0,1} copy(%y)
  %small = f32[4]{0} copy(%x)
  %c = f32[4]{0} conditional(%i, %x, %x), branch_computations={%nothing, %filter}
  ROOT %t = (f32[4]{0}, f32[512,1024]{1,0}) tuple(%c, %y)
}

%going (s: (f32[4], f32[512,1024])) -> pred[] {
  %turns = u32[]{:T(128)} constant(5)
  %turn = u32[] get-tuple-element(%s), index=2
  ROOT %less = pred[]{:T(512)} compare(%turn, %turns), direction=LT, metadata={op_name="lt"}
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %sum.1 = (f32[4]{0}, f32[2]{0}) all-reduce(%x, %z), channel_id=1, \
replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add, metadata={op_name="jit(step)/sum"}
  %loop = (f32[4]{0}, f32[512,1024]{1,0}) while(%t), condition=%going, body=%body
  %part = f32[2,4]{1,0} fusion(%w), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %y = f32[4]{0} get-tuple-element(%loop), index=0
}
"""


def test_each_collective_is_found_once_with_its_bytes_group_and_place():
  by_kind = {c.kind: c for c in hlo.find_collectives(HLO, hlo.find_places(HLO)) if c.depth < 2}
  assert {k: (c.bytes, c.group, c.depth, c.runs) for k, c in by_kind.items()} == {
    'all-reduce': (24, 4, 0, 1),
    'collective-permute': (16, 2, 1, 5),
    'all-gather': (128, 2, 1, 5),
    'reduce-scatter': (32, 4, 0, 1),
  }
  assert by_kind['all-reduce'].source == 'jit(step)/sum'
  assert by_kind['all-reduce'].sent == 2 * 24 * 3 / 4
  assert by_kind['all-gather'].sent == 128 / 2
  assert by_kind['reduce-scatter'].sent == 32 * 3


def test_a_collective_in_a_branch_is_deeper_than_the_loop_around_it():
  collectives = list(hlo.find_collectives(HLO, hlo.find_places(HLO)))
  assert len(collectives) == 5
  (branch,) = (c for c in collectives if c.depth == 2)
  assert (branch.kind, branch.bytes, branch.group, branch.runs) == ('all-reduce', 16, 2, 5)


def test_large_copies_are_summed_by_depth_over_loop_iterations():
  assert hlo.large_copies(HLO, hlo.find_places(HLO)) == {1: 5 * 4 * 512 * 1024}


def test_reads_of_main_memory_leave_out_kernels_updates_in_place_and_vector_memory():
  text = """\
ENTRY %main (table: f32[100,8]) -> f32[4,8] {
  %table = f32[100,8]{1,0} parameter(0)
  %near = f32[50,8]{1,0:S(1)} parameter(1)
  %new = f32[4,8]{1,0} parameter(2)
  %gather_fusion = f32[4,8]{1,0} fusion(%table, %near), kind=kCustom, calls=%f
  %scatter_fusion = f32[100,8]{1,0} fusion(%table, %new), kind=kCustom, calls=%f
  %slice-start = (f32[100,8]{1,0}, f32[25,8]{1,0:S(1)}, s32[]) slice-start(%table), slice={[0:25]}
  %sum = f32[4,8]{1,0} add(%new, %near)
  ROOT %kernel = f32[4,8]{1,0} custom-call(%scatter_fusion, %table), custom_call_target="k"
}
"""
  read = hlo.memory_reads(text, hlo.find_places(text), 0)
  assert read == 4 * 8 * (4 + 4 + 25 + 4)  # the rows gathered, scattered, sliced and added
  assert hlo.memory_reads(text, hlo.find_places(text), 1) == 0


def test_a_loop_of_unknown_length_counts_as_one_iteration():
  text = HLO.replace('compare(%turn, %turns)', 'compare(%turn, %other)')
  assert {c.runs for c in hlo.find_collectives(text, hlo.find_places(text))} == {1}


def test_unknown_replica_groups_are_an_error():
  with pytest.raises(ValueError, match='replica groups'):
    hlo.group_size('%x = f32[4] all-reduce(%y), replica_groups=?')


def test_memory_needed_is_read_from_the_compilers_message():
  error = TooLarge(
    'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries '
    '(34.27G) exceeds available HBM (15.75G).'
  )
  assert (error.used, error.limit) == (34.27 * 2**30, 15.75 * 2**30)


@pytest.mark.parametrize('name', ['v9z:4x4', 'v5e', 'v5e:4by4'])
def test_an_unknown_topology_is_an_error(name):
  with pytest.raises(ValueError, match='topology'):
    find_slice(name)


@pytest.mark.parametrize(
  ('name', 'params'),
  [
    ('meta-llama/Meta-Llama-3-8B-Instruct', 8_030_261_248),
    ('meta-llama/Meta-Llama-3-70B-Instruct', 70_553_706_496),
    ('Qwen/Qwen3-0.6B', 596_049_920),
    ('Qwen/Qwen3-30B-A3B', 30_532_122_624),
  ],
)
def test_listed_models_have_the_published_number_of_parameters(name, params):
  assert find_model(name).num_params == params


def test_first_layers_keep_what_differs_between_layers():
  model = find_model('google/gemma-3-27b-it')
  short = first_layers(model, 7)
  assert (short.num_layers, short.windows) == (7, (*[1024] * 5, None, 1024))
  assert short.kinds == model.kinds[:7] and short.ropes == model.ropes[:7]
  mixture = first_layers(find_model('Qwen/Qwen3-30B-A3B'), 2)
  assert mixture.sparse(1) and mixture.windows == ()


def test_a_decode_step_reads_the_experts_that_its_tokens_use():
  model = first_layers(find_model('Qwen/Qwen3-30B-A3B'), 2)
  lm = abstract_lm(model, make_mesh(1, devices=jax.devices()[:1]), 'bfloat16')
  engine = auto.resolve(EngineConfig(slots=4), Device('tpu', 'v5e', 2**34), auto.Load())
  job = Sampler(lm, engine, 4, 64, ())
  few, many = (job.bytes_read(4, tokens, has_logits=True) for tokens in (1, 10**6))
  # One token uses 8 of 128 experts of each layer, and many tokens use all.
  assert many - few == pytest.approx(2 * model.num_expert_params * (1 - 8 / 128), rel=1e-6)


def test_other_models_are_read_from_a_folder(tmp_path):
  (tmp_path / 'config.json').write_text(json.dumps(TINY))
  assert find_model('another', str(tmp_path)).num_layers == 2
  with pytest.raises(ValueError, match='--model_config'):
    find_model('another')


def test_command_line_settings_keep_the_types_of_the_config():
  config = __main__.load_config(str(ROOT / 'configs' / 'llama3_8b_v5e.py'))
  settings = 'train.accumulation=2,mesh.tensor=1,train.dtype=float32'
  changed = __main__.override_config(config, settings)
  assert (changed.train.accumulation, changed.mesh.tensor, changed.train.dtype) == (2, 1, 'float32')
  assert config.train.dtype == 'bfloat16'
  for wrong in ('train.acumulation=2', 'train=2', 'train.accumulation=two'):
    with pytest.raises(ValueError, match='--settings'):
      __main__.override_config(config, wrong)


def count_flops(config, **settings):
  """Return the FLOPs of the train step's products, and its number of tokens."""
  train = TrainConfig(**{'attention': 'blocks', **settings}, batch_size=8, max_length=32)
  mesh = make_mesh(devices=jax.devices()[:1])
  job = Training(config, train, mesh)
  return traced_flops(shapes_of(job).trace().jaxpr.jaxpr), job.tokens


@pytest.mark.parametrize(('tied', 'dtype'), [(False, 'float32'), (True, 'bfloat16')])
def test_traced_flops_equal_the_formula_with_and_without_accumulation(tied, dtype):
  config = config_from_hf(TINY | {'tie_word_embeddings': tied})
  flops, tokens = count_flops(config, dtype=dtype)
  formula = config.training_flops([32] * 8)
  # The formula counts 6 FLOPs for each scale of a norm and token. A norm's gradient has three sums
  # of products, which also take 6; that of attention has one more sum over the output's channels.
  formula += 2 * config.num_layers * config.d_model * tokens
  # Plain attention computes all pairs of positions; the formula counts only causal pairs.
  formula += 12 * config.num_layers * config.d_model * 8 * (32 * 31 // 2)
  formula += 2 * config.num_layers * config.d_model * 32 * tokens  # scores, again backward
  # The loop over slices of targets has a data-dependent length, so it counts as one iteration.
  head = 6 * config.vocab_size * config.d_model * tokens
  formula -= head - head // MIN_SLICES
  assert flops == formula
  assert count_flops(config, dtype=dtype, accumulation=4) == (flops, tokens)


@pytest.mark.parametrize('section', ['prefer', 'reward'])
def test_steps_on_preferences_are_traced_with_their_values_and_head(section):
  config = __main__.load_config(str(ROOT / 'configs' / 'bai2022_rl_cai_feedback.py'))
  config[section].update(batch_size=8, max_length=32, accumulation=1, attention='blocks')
  config.mesh.update(data=1, fsdp=1, tensor=1)
  chips = types.SimpleNamespace(devices=jax.devices()[:1])
  job = __main__.training_job(config, config_from_hf(TINY), chips, section)
  shapes = shapes_of(job)
  assert ('score' in shapes.state.params) == (section == 'reward')
  assert ('reference' in shapes.batch) == (section == 'prefer')
  assert shapes.batch['probability'].dtype == jnp.float32
  flops = traced_flops(shapes.trace().jaxpr.jaxpr)
  head = 6 * TINY['vocab_size'] * TINY['hidden_size'] * job.tokens  # of logits
  least = job.model_flops - (head if section == 'prefer' else 0)
  assert least < flops < 2 * least


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_rematerialized_products_count_twice(dtype):
  config = config_from_hf(TINY)
  flops, tokens = count_flops(config, dtype=dtype)
  scores = 4 * config.num_layers * config.d_model * tokens * 32  # and the values that they weigh
  dots, full = (
    count_flops(config, dtype=dtype, remat=name)[0] - flops for name in ('dots', 'full')
  )
  # The gradient does not need the result of the last product in a block, only its factors.
  again = config.num_params - 2 * config.vocab_size * config.d_model
  again -= config.num_layers * config.d_ff * config.d_model
  assert dots == scores
  assert full == pytest.approx(2 * tokens * again + scores, rel=0.01)


def test_a_scan_counts_its_length_and_a_conditional_its_most_expensive_branch():
  def repeated(x):
    return jax.lax.scan(lambda x, _: (x @ x, None), x, length=5)[0]

  def chosen(x):
    return jax.lax.cond(x[0, 0] > 0, repeated, lambda x: x @ x, x)

  x = jnp.ones((4, 4))
  assert traced_flops(jax.make_jaxpr(repeated)(x).jaxpr) == 5 * 2 * 4**3
  assert traced_flops(jax.make_jaxpr(jax.jit(chosen))(x).jaxpr) == 5 * 2 * 4**3


@pytest.fixture(scope='module')
def compiled(tmp_path_factory):
  """Compile a tiny model in another process, so that libtpu is not loaded into this one.

  Returns:
    The JSON that the command writes, and what it prints.
  """
  folder = tmp_path_factory.mktemp('aot')
  (folder / 'config.json').write_text(json.dumps(TINY))
  command = [sys.executable, '-m', 'experiments.aot', '--topology=v5e:2x2']
  command += ['--config=configs/llama3_8b_v5e.py', f'--model_config={folder}', '--length=128']
  command += ['--slots=16', '--no-search', '--prefixes', '64', f'--output={folder / "result.json"}']
  command += ['--settings', 'train.accumulation=4,mesh.tensor=2']
  environment = {k: v for k, v in os.environ.items() if k not in ('JAX_PLATFORMS', 'XLA_FLAGS')}
  done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
  if 'libtpu, which compiles for TPUs, is not installed' in done.stderr:
    pytest.skip("no libtpu here: pip install 'jax[tpu]' brings it")
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads((folder / 'result.json').read_text()), done.stdout


def test_a_tiny_model_compiles_for_a_slice(compiled):
  results, text = compiled
  sampling = results['sampler']
  assert sampling['mesh'] == {'data': 1, 'fsdp': 1, 'tensor': 4, 'expert': 1, 'sequence': 1}
  assert [p['name'] for p in sampling['programs']] == ['decode', 'prefill 1024']
  assert not sampling['too_large'] and 'NO' not in text
  for program in sampling['programs']:
    memory, sizes = program['memory'], sampling['bytes']
    assert memory['argument'] >= sizes['cache'] + sizes['prefixes']
    assert memory['alias'] >= sizes['cache']  # donated, so it exists once
    assert program['flops'] > 0 and all(t > 0 for t in program['times'].values())


def test_each_layer_sums_attention_and_feed_forward_over_tensor(compiled):
  decode = compiled[0]['sampler']['programs'][0]
  sums = [c for c in decode['collectives'] if c['kind'] == 'all-reduce' and c['depth'] == 1]
  assert len([c for c in sums if c['bytes'] >= 16 * 256 * 2]) >= 2 * 2
  assert {c['group'] for c in sums} <= {2, 4}


def test_the_train_step_compiles_with_each_of_the_settings(compiled):
  results, text = compiled
  config, other = results['train']
  assert (config['settings'], other['settings']) == ('', 'train.accumulation=4,mesh.tensor=2')
  assert other['mesh'] == {'data': 1, 'fsdp': 2, 'tensor': 2, 'expert': 1, 'sequence': 1}
  assert '| train.accumulation=4,mesh.tensor=2 |' in text
  for result in results['train']:
    program, sizes = result['program'], result['bytes']
    assert result['fits'] and result['used'] == program['memory']['total']
    state = sizes['parameters'] + sizes['optimizer']
    assert state <= program['memory']['alias'] <= 1.1 * state  # donated
    assert program['memory']['argument'] >= state + sizes['batch']
    assert sizes['optimizer'] >= 2 * sizes['parameters']
    assert all(t > 0 for t in program['times'].values())


def test_flops_of_the_train_step_count_all_loop_iterations(compiled):
  whole, split = (result['program'] for result in compiled[0]['train'])
  # Four micro-batches do the same work as one, recomputation included.
  assert split['flops'] == pytest.approx(whole['flops'], rel=0.01)
  assert split['counted'] < 0.5 * split['flops']  # the compiler counts one micro-batch
  assert 4 in {c['runs'] for c in split['collectives']}


@pytest.mark.parametrize(
  ('hosts', 'part'), [(1, 'v5e:2x2'), (2, 'v5e:2x4'), (4, 'v5e:4x4'), (16, 'v5e:8x8')]
)
def test_a_replica_is_compiled_for_as_many_chips_as_its_hosts_have(hosts, part, monkeypatch):
  """A v5e:8x8 slice has 16 hosts of 2x2 chips, which are numbered along its rows."""

  def chip(x, y):
    return types.SimpleNamespace(process_index=y // 2 * 4 + x // 2, coords=(x, y, 0))

  places = itertools.product(range(8), range(8))
  whole = slices.Slice('v5e:8x8', slices.CHIPS['v5e'], (*itertools.starmap(chip, places),))
  monkeypatch.setattr(slices, 'find_slice', lambda name: dataclasses.replace(whole, name=name))
  assert whole.first_hosts(hosts).name == part
