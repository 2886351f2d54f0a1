"""The engine's sizes in place of 'auto': their values, and how a run keeps them."""

import dataclasses
import json
import math
import types

import jax
import pytest
from ml_collections import ConfigDict

from cai_jax import pipeline
from cai_jax.model import lm as models
from cai_jax.model.config import Experts, ModelConfig
from cai_jax.model.sharding import flatten_params, param_shardings
from cai_jax.model.transformer import abstract_model
from cai_jax.pipeline import engine_sizes, stages
from cai_jax.pipeline.schema import default_config, from_config
from cai_jax.runtime.errors import StoppedError, UserError
from cai_jax.runtime.hardware import Device, describe_device
from cai_jax.runtime.mesh import make_mesh
from cai_jax.sampling.auto import Load, measure_load, resolve
from cai_jax.sampling.config import SIZES, EngineConfig
from cai_jax.sampling.engine import Engine
from tests.pipeline_setup import small
from tests.test_kernels import A100

GIB = 2**30
CPU = Device('cpu', 'cpu', 24 * GIB)
H100 = Device('gpu', 'NVIDIA H100 80GB HBM3', int(59.4 * GIB))  # jax takes 75 % by default
H200 = Device('gpu', 'NVIDIA H200', int(104.8 * GIB))
V5E = Device('tpu', 'TPU v5 lite', int(15.75 * GIB))
V6E = Device('tpu', 'TPU v6 lite', int(31.25 * GIB))
SMALL_GPU = Device('gpu', 'of another maker', 6 * GIB)
OTHER = Device('npu', 'of another kind', 16 * GIB)
# Llama 3.2 1B, Llama 3 8B over four chips, and Qwen3 0.6B with a copy on each of four chips; bf16.
ONE_B = Load(int(2.5e9), 32 * 1024)
EIGHT_B = Load(int(16e9) // 4, 128 * 1024 // 4)
SPLIT_06B = Load(int(1.2e9), 112 * 1024, 4)
GIVEN = EngineConfig(
  slots=8,
  cache_gib=1.5,
  prefill_tokens=32,
  prefill_width=8,
  page_tokens=16,
  longest_burst=4,
  attention='pages',
)


@pytest.mark.parametrize(
  ('device', 'load', 'sizes'),
  [
    (CPU, ONE_B, (64, 10.75, 256, 32, 64, 32)),
    (H100, ONE_B, (256, 45.5, 1024, 128, 64, 64)),
    (H200, ONE_B, (256, 81.75, 1024, 128, 64, 64)),
    (V5E, ONE_B, (256, 10.5, 1024, 128, 64, 64)),
    (V6E, ONE_B, (256, 23.0, 1024, 128, 64, 64)),
    (V5E, EIGHT_B, (256, 9.5, 1024, 128, 64, 64)),
    (V5E, SPLIT_06B, (256, 11.5, 4096, 128, 64, 64)),  # 64 slots and 1,024 tokens for each chip
    (V6E, SPLIT_06B, (512, 24.0, 4096, 128, 64, 64)),
    (SMALL_GPU, ONE_B, (64, 2.75, 1024, 128, 64, 64)),
    (OTHER, ONE_B, (64, 6.75, 256, 32, 64, 32)),  # as on a CPU
    (H200, Load(), (64, 83.75, 1024, 128, 64, 64)),  # servers hold all models
  ],
)
def test_sizes_for_devices_that_we_know(device, load, sizes):
  config = resolve(EngineConfig(), device, load)
  assert tuple(getattr(config, name) for name in SIZES) == sizes


@pytest.mark.parametrize('device', [CPU, H100, H200, V5E, V6E, SMALL_GPU, OTHER])
@pytest.mark.parametrize('shards', [1, 3, 8])
def test_slots_divide_over_shards_and_caches_fit_beside_the_parameters(device, shards):
  for parameters in (0, device.memory // 2, 2 * device.memory):
    for token in (1024, 512 * 1024):
      config = resolve(EngineConfig(), device, Load(parameters, token, shards))
      assert config.slots % shards == 0 and config.slots >= 64 and not config.unresolved
      assert config.prefill_tokens >= 16 * shards
      if parameters < device.memory:
        assert parameters + config.cache_gib * GIB < 0.95 * device.memory
      if device.platform in ('gpu', 'tpu'):
        per_shard = config.slots // shards
        assert per_shard in (64, 128, 256)
        assert per_shard == 64 or per_shard * token * 1024 <= config.cache_gib * GIB


def test_numbers_that_are_given_win():
  assert resolve(GIVEN, H200, ONE_B) == GIVEN
  for name in SIZES:
    config = resolve(EngineConfig(**{name: getattr(GIVEN, name)}), V5E, ONE_B)
    assert getattr(config, name) == getattr(GIVEN, name) and not config.unresolved
  # The slots are those that the given cache holds.
  assert resolve(EngineConfig(cache_gib=2.0), H200, ONE_B).slots == 64
  assert resolve(EngineConfig(cache_gib=5.0), H200, ONE_B).slots == 128


def test_a_kernel_is_chosen_where_pages_have_its_size():
  load = dataclasses.replace(ONE_B, attention='ragged')
  assert resolve(EngineConfig(), V5E, load).attention == 'ragged'
  assert resolve(EngineConfig(page_tokens=24), V5E, load).attention == 'pages'
  assert resolve(EngineConfig(attention='pages'), V5E, load).attention == 'pages'
  load = dataclasses.replace(ONE_B, attention='triton')
  assert resolve(EngineConfig(), H100, load).attention == 'triton'
  assert resolve(EngineConfig(page_tokens=48), H100, load).attention == 'pages'
  with pytest.raises(UserError, match='flash'):
    EngineConfig(attention='flash')


def test_the_kernel_is_chosen_for_the_pages_that_are_given():
  heads_of_512 = ModelConfig('gemma4_text', 256, 64, 64, 2, 4, 1, 512, 4096)
  mesh = types.SimpleNamespace(
    devices=A100.devices, shape=make_mesh(devices=jax.devices()[:1]).shape
  )
  names = [measure_load([(heads_of_512, 'bfloat16')], mesh, n).attention for n in (64, 128)]
  assert names == ['triton', 'pages']


def test_load_is_what_each_device_holds(random_model):
  info = models.inspect_model(random_model).config
  token = 2 * info.num_layers * info.num_kv_heads * info.head_dim
  mesh = make_mesh(data=2, fsdp=2, tensor=2)
  load = measure_load([(info, 'float32'), (info, 'bfloat16')], mesh)
  assert load.parameters == pytest.approx(info.num_params * (4 + 2) / 4, abs=2)
  assert load.token == token * (4 + 2) // 2 and load.shards == 4


@pytest.mark.parametrize('shape', [(1, 1, 1, 8), (1, 2, 2, 2), (2, 1, 2, 2), (2, 4, 1, 1)])
def test_a_device_holds_its_part_of_the_experts(shape):
  """The estimate is the size of one device's shards, but for routers and norms, which are small."""
  *sizes, expert = shape
  mesh = make_mesh(*sizes, expert=expert)
  experts = Experts(16, 2, 64, dense_layers=(1,))
  config = ModelConfig('mixtral', 256, 64, 128, 3, 4, 2, 16, 64, experts=experts)
  params = abstract_model(config)[1]
  shards = jax.tree.map(
    lambda x, s: math.prod(s.shard_shape(x.shape)), params, param_shardings(params, mesh)
  )
  held = 2 * sum(jax.tree.leaves(shards))
  load = measure_load([(config, 'bfloat16')], mesh)
  assert load.parameters == pytest.approx(held, rel=0.02)
  whole = config.num_params * 2 // (mesh.shape['fsdp'] * mesh.shape['tensor'])
  assert (load.parameters < 0.8 * whole) == (expert > 1)


def test_the_experts_are_counted_by_their_parameters():
  experts = Experts(16, 2, 64, dense_layers=(1,))
  config = ModelConfig('mixtral', 256, 64, 128, 3, 4, 2, 16, 64, experts=experts)
  paths = flatten_params(abstract_model(config)[1])
  assert config.num_expert_params == sum(x.size for path, x in paths.items() if 'experts' in path)
  assert dataclasses.replace(config, experts=None).num_expert_params == 0


def test_layers_with_windows_take_no_more_than_their_window():
  full = ModelConfig('gemma3_text', 256, 64, 64, 6, 4, 1, 256, 4096)
  windows = (512,) * 5 + (None,)
  mesh = make_mesh(devices=jax.devices()[:1])
  plain = measure_load([(full, 'bfloat16')], mesh)
  load = measure_load([(dataclasses.replace(full, windows=windows), 'bfloat16')], mesh)
  layer = 2 * 256 * 2  # bytes of a token: keys and values of 256 channels
  assert load.token == plain.token == 6 * layer
  assert plain.windowed == () and load.windowed == ((512, 5 * layer),)
  assert load.slot_bytes(600, 100) == plain.slot_bytes(600, 100) == 600 * 6 * layer
  assert load.slot_bytes(1024, 100) == (1024 + 5 * 612) * layer
  # A cache that holds 100 slots of 1,024 tokens holds 128 where five of six layers have a window.
  cache = 100 * plain.slot_bytes(1024, 0) / GIB
  small = EngineConfig(cache_gib=cache, longest_burst=32, page_tokens=32, draft_tokens=0)
  assert resolve(small, H200, plain).slots == 64
  assert resolve(small, H200, load).slots == 128


def test_layers_with_heads_of_their_own_are_counted_by_their_heads():
  """Values that are the projected keys are cached as other values are."""
  config = ModelConfig(
    'gemma4_text',
    *(256, 64, 64, 4, 8, 4, 16, 4096),
    windows=(512, None, 512, None),
    head_dims=(16, 32, 16, 32),
    kv_heads=(4, 2, 4, 2),
    values_from_keys=(False, True, False, True),
  )
  load = measure_load([(config, 'bfloat16')], make_mesh(4, tensor=2))
  assert load.windowed == ((512, 2 * 2 * 4 * 16 * 2 // 2),)
  assert load.token == load.windowed[0][1] + 2 * 2 * 2 * 32 * 2 // 2


def test_cpu_devices_of_a_process_share_the_memory():
  devices = jax.devices()
  one = describe_device(devices[0])
  assert one.platform == 'cpu' and len(devices) == 8
  with open('/proc/meminfo') as file:
    total = int(file.readline().split()[1]) * 1024
  assert 0 < 8 * one.memory <= total


def test_an_engine_by_itself_takes_the_sizes_of_its_models(random_model):
  lm = models.load(random_model)
  engine = Engine({'base': lm}, length=64, seed=0)
  load = measure_load([(lm.config, lm.dtype)], lm.mesh)
  expected = resolve(EngineConfig(), describe_device(lm.mesh.local_devices[0]), load)
  assert engine.slots == expected.slots == 64


@pytest.mark.parametrize(
  ('value', 'message'),
  [
    ('automatic', "engine.slots must be an integer or 'auto', but got 'automatic'"),
    (2.5, "engine.slots must be an integer or 'auto', but got 2.5"),
    (None, "engine.slots must be an integer or 'auto', but got None"),
    (0, "engine: slots=0 must be 'auto' or a positive number"),
    (-3, "engine: slots=-3 must be 'auto' or a positive number"),
  ],
)
def test_what_is_neither_auto_nor_a_positive_number_is_refused(value, message):
  config = default_config()
  config.engine.slots = value
  with pytest.raises(UserError) as refused:
    from_config(config)
  assert message in str(refused.value)


def test_a_word_is_no_value_of_other_fields():
  with pytest.raises(UserError, match='spare_tokens must be an integer, but got'):
    EngineConfig(spare_tokens='auto')


@pytest.fixture
def start(random_model, tmp_path, monkeypatch):
  """Return a function that starts a run on a device that it fakes, up to its sampling.

  The function returns the engine that the stage got, what config.json holds, and the lines.
  """

  def start(device, **engine):
    config, seen, lines = small(random_model), [], []
    config.engine.update(dict.fromkeys(SIZES, 'auto') | engine)

    def stage(run, manifest):
      seen.append(run.config.engine)
      raise StoppedError('the run was killed here')

    monkeypatch.setitem(stages.STAGES, 'generate', stage)
    monkeypatch.setattr(engine_sizes, 'describe_device', lambda _: device)
    with pytest.raises(StoppedError):
      pipeline.run_stages(pipeline.build(config, tmp_path), ['generate'], lines.append)
    stored = json.loads((tmp_path / 'config.json').read_text())['engine']
    return seen[0], stored, [line for line in lines if line.startswith('engine')]

  return start


def test_a_run_prints_and_stores_its_sizes_and_continues_with_them_elsewhere(start):
  engine, stored, lines = start(H200)
  assert engine.slots == 8 * 256 and engine.prefill_tokens == 8 * 1024 and not engine.unresolved
  assert stored == dataclasses.asdict(engine)
  values = ', '.join(f'{name}={getattr(engine, name)}' for name in (*SIZES, 'attention'))
  assert lines == [f'engine for NVIDIA H200 with 104.8 GiB: {values}']
  again, stored, (line,) = start(V5E)
  assert again == engine and stored == dataclasses.asdict(engine)
  assert line.startswith(f'engine, as this run began: {values}; this device alone would get cache_')
  assert start(H200)[2] == [f'engine, as this run began: {values}']


def test_a_given_number_replaces_the_stored_one(start):
  first = start(H200)[0]
  engine, stored, _ = start(V5E, slots=64, cache_gib=2.0)
  assert (engine.slots, engine.cache_gib) == (64, 2.0) == (stored['slots'], stored['cache_gib'])
  assert engine == dataclasses.replace(first, slots=64, cache_gib=2.0)
  assert start(CPU, **dataclasses.asdict(GIVEN))[2] == []


def test_an_older_folder_keeps_its_numbers(start, tmp_path):
  old = {'slots': 40, 'cache_gib': 8.0, 'prefill_tokens': 128, 'prefill_width': 16}
  text = json.dumps({'engine': old | {'spans': 4, 'longest_burst': 32, 'spare_tokens': 0}})
  (tmp_path / 'config.json').write_text(text)
  engine, stored, (line,) = start(H200)
  assert {name: getattr(engine, name) for name in old} == old and engine.longest_burst == 32
  assert 'engine for NVIDIA H200 with 104.8 GiB: page_tokens=64, attention=pages' in line
  assert stored == dataclasses.asdict(engine)


def test_slots_of_another_mesh_and_a_damaged_file_are_refused(start, tmp_path):
  (tmp_path / 'config.json').write_text(json.dumps({'engine': {'slots': 12}}))
  with pytest.raises(UserError, match=r'engine.slots=12 is not a multiple of .* = 8'):
    start(H200)
  (tmp_path / 'config.json').write_text(json.dumps({'engine': {'attention': 'ragged'}}))
  with pytest.raises(
    UserError, match=r"began with engine.attention='ragged', .* set engine.attent"
  ):
    start(CPU)
  for engine in ({'slots': -1}, {'slots': 'many'}, []):
    (tmp_path / 'config.json').write_text(json.dumps({'engine': engine}))
    with pytest.raises(UserError, match='config.json is damaged: .*give a number for each'):
      start(H200)


def test_a_run_that_does_not_sample_chooses_nothing(random_model, tmp_path):
  config = small(random_model)
  config.engine.slots = 'auto'
  run = pipeline.build(config, tmp_path)
  same, note = pipeline.resolve_engine(run, samples=False)
  assert same.config.engine.slots == same.values['engine']['slots'] == 'auto' and not note


def test_auto_and_numbers_can_be_given_on_the_command_line():
  config = default_config()
  config.engine.slots = 8
  assert config.engine.get_type('slots') is object  # the command line reads a number or a text
  config.engine.slots = 'auto'
  assert from_config(ConfigDict(config)).engine.slots == 'auto'


def test_few_slots_on_a_cpu_have_smaller_chunks():
  tokens = lambda **sizes: resolve(EngineConfig(**sizes), CPU, Load()).prefill_tokens  # noqa: E731
  assert (tokens(), tokens(slots=24), tokens(slots=24, prefill_tokens=256)) == (256, 96, 256)
