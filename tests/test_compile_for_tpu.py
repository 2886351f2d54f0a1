"""Ahead-of-time compilation for TPUs: what is read from HLO, and a tiny model for a real slice."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from experiments import compile_for_tpu as aot

ROOT = pathlib.Path(__file__).resolve().parents[1]
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
  ROOT %any = pred[] constant(true)
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %sum.1 = (f32[4]{0}, f32[2]{0}) all-reduce(%x, %z), channel_id=1, \
replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add, metadata={op_name="jit(step)/sum"}
  %loop = (f32[4]{0}, f32[512,1024]{1,0}) while(%t), condition=%going, body=%body
  ROOT %y = f32[4]{0} get-tuple-element(%loop), index=0
}
"""


def test_collectives_are_found_once_with_bytes_group_and_depth():
  found = {c.kind: c for c in aot.find_collectives(HLO, aot.loop_depths(HLO)) if c.depth < 2}
  assert {k: (c.bytes, c.group, c.depth) for k, c in found.items()} == {
    'all-reduce': (24, 4, 0),
    'collective-permute': (16, 2, 1),
    'all-gather': (128, 2, 1),
  }
  assert found['all-reduce'].source == 'jit(step)/sum'
  assert found['all-reduce'].sent == 2 * 24 * 3 / 4
  assert found['all-gather'].sent == 128 / 2


def test_what_stands_in_a_branch_is_deeper_than_the_loop():
  found = list(aot.find_collectives(HLO, aot.loop_depths(HLO)))
  assert len(found) == 4
  (branch,) = (c for c in found if c.depth == 2)
  assert (branch.kind, branch.bytes, branch.group) == ('all-reduce', 16, 2)


def test_large_copies_are_summed_by_depth():
  assert aot.large_copies(HLO, aot.loop_depths(HLO)) == {1: 4 * 512 * 1024}


def test_unknown_groups_are_an_error():
  with pytest.raises(ValueError, match='replica groups'):
    aot.group_size('%x = f32[4] all-reduce(%y), replica_groups=?')


def test_what_would_be_used_is_read_from_the_compilers_message():
  error = aot.TooLarge(
    'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries '
    '(34.27G) exceeds available HBM (15.75G).'
  )
  assert (error.used, error.limit) == (34.27 * 2**30, 15.75 * 2**30)


@pytest.mark.parametrize('name', ['v9z:4x4', 'v5e', 'v5e:4by4'])
def test_a_topology_that_is_none_is_an_error(name):
  with pytest.raises(ValueError, match='topology'):
    aot.find_slice(name)


def test_models_are_known_by_name_or_by_folder(tmp_path):
  name = 'meta-llama/Meta-Llama-3-8B-Instruct'
  assert aot.find_model(name).num_params == 8_030_261_248
  hf = aot.MODELS[name] | {'num_hidden_layers': 2}
  (tmp_path / 'config.json').write_text(json.dumps(hf))
  assert aot.find_model('another', str(tmp_path)).num_layers == 2
  with pytest.raises(ValueError, match='--model_config'):
    aot.find_model('another')


@pytest.fixture(scope='module')
def compiled(tmp_path_factory):
  """What the command writes for a tiny model, in a process of its own: libtpu stays out of here."""
  folder = tmp_path_factory.mktemp('aot')
  shape = dict(vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2)
  shape |= dict(num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=256)
  (folder / 'config.json').write_text(json.dumps({'model_type': 'llama', **shape}))
  command = [sys.executable, '-m', 'experiments.compile_for_tpu', '--topology=v5e:2x2']
  command += ['--config=configs/llama3_8b_v5e.py', f'--model_config={folder}', '--length=128']
  command += ['--slots=16', '--no-search', '--prefixes', '64', f'--output={folder / "found.json"}']
  environment = {k: v for k, v in os.environ.items() if k not in ('JAX_PLATFORMS', 'XLA_FLAGS')}
  done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
  if 'libtpu, which compiles for TPUs, is not installed' in done.stderr:
    pytest.skip("no libtpu here: pip install 'jax[tpu]' brings it")
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads((folder / 'found.json').read_text()), done.stdout


def test_a_tiny_model_compiles_for_a_slice(compiled):
  found, text = compiled
  assert found['mesh'] == {'data': 1, 'fsdp': 1, 'tensor': 4}
  assert [p['name'] for p in found['programs']] == ['decode', 'prefill 1024']
  assert not found['too_large'] and 'NO' not in text
  for program in found['programs']:
    memory, sizes = program['memory'], found['bytes']
    assert memory['argument'] >= sizes['cache'] + sizes['prefixes']
    assert memory['alias'] >= sizes['cache']  # donated, so that it is there once
    assert program['flops'] > 0 and all(t > 0 for t in program['times'].values())


def test_heads_and_ffw_are_summed_over_tensor_each_layer(compiled):
  decode = compiled[0]['programs'][0]
  sums = [c for c in decode['collectives'] if c['kind'] == 'all-reduce' and c['depth'] == 1]
  assert len([c for c in sums if c['bytes'] >= 16 * 256 * 2]) >= 2 * 2
  assert {c['group'] for c in sums} <= {2, 4}
