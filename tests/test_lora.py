"""LoRA: only adapters are trained and saved, and merging them keeps the logits, in torch too."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from cai_jax.data import packing, units
from cai_jax.model import lm as lm_lib
from cai_jax.model import lora
from cai_jax.model.sharding import path_str
from cai_jax.model.transformer import abstract_model
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.mesh import batch_sharding, make_mesh
from cai_jax.training.config import TrainConfig
from cai_jax.training.loop import fit
from cai_jax.training.losses.logprobs import sequence_logprobs
from cai_jax.training.prefer_config import PreferConfig
from cai_jax.training.state import init_state, place_frozen
from cai_jax.training.step import make_loss, make_train_step, place_batch
from cai_jax.training.trainable import divide_model
from tests.preference_setup import random_units, with_reference

TOKENS = np.random.default_rng(0).integers(0, 300, (2, 12))
CONFIG = TrainConfig(
  attention='blocks',
  batch_size=8,
  max_length=32,
  learning_rate=1e-2,
  weight_decay=0.1,
  lora_rank=3,
  lora_alpha=6.0,
  lora_modules='attention/(query|value|output)|mlp/down',
)


def one_device():
  return make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope='module')
def items():
  rng = np.random.default_rng(0)
  return [
    units.Example(rng.integers(0, 300, n).astype(np.int32), np.arange(n) >= n // 2)
    for n in rng.integers(4, 25, 70)
  ]


def random_adapters(config, lora_config):
  """Return adapters whose B is not zero."""
  initial = lora.init(config, lora_config, jax.random.key(0))
  keys = jax.random.split(jax.random.key(1), 100)
  leaves, tree = jax.tree.flatten(initial)
  return jax.tree.unflatten(
    tree, [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=False)]
  )


def test_merged_adapters_keep_the_logits_here_and_in_torch(tiny_hf_folder, tmp_path):
  lm = lm_lib.load(tiny_hf_folder('qwen2'), mesh=one_device())
  adapters = random_adapters(lm.config, CONFIG.lora)
  graph, shapes = lora.abstract_model(lm.config, CONFIG.lora)
  assert jax.tree.structure(lora.split(shapes)[0]) == jax.tree.structure(adapters)
  positions = np.broadcast_to(np.arange(12), TOKENS.shape).astype(np.int32)
  logits = lm_lib.compute_logits(graph, lora.join(adapters, lm.params), TOKENS, positions, None)
  merged = dataclasses.replace(lm, params=lora.merge(lm.params, adapters, CONFIG.lora))
  assert jax.tree.structure(merged.params) == jax.tree.structure(lm.params)
  scale = np.abs(logits).max()
  np.testing.assert_allclose(merged.logits(TOKENS), logits, atol=1e-5 * scale)
  assert np.abs(lm.logits(TOKENS) - logits).max() > 0.1  # the adapters have an effect
  lm_lib.save(merged, tmp_path / 'merged')
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'merged').float()
  with torch.no_grad():
    np.testing.assert_allclose(model(torch.tensor(TOKENS)).logits, logits, atol=1e-5 * scale)


def train_adapters(lm, units, config):
  """Return the adapters beside the frozen model, and all parameters merged, after four steps."""
  divided = divide_model(lm.config, lm.params, config, lm.mesh)
  lengths = [unit.length for unit in units]
  steps = packing.plan(lengths, [packing.Bucket(config.max_length, config.batch_size)], 1, 0)[:4]
  batches = packing.Batches(units, steps)
  arguments = divided.graph, divided.params, config, len(steps), lm.mesh, divided.frozen
  train_step = make_train_step(*arguments)
  state = init_state(divided.params, config, lm.mesh)
  state = dataclasses.replace(state, frozen=divided.frozen)
  for i in range(len(steps)):
    state, _ = train_step(state, place_batch(batches[i], batch_sharding(lm.mesh)))
  return divided.graph, lora.join(state.params, lm.params), divided.full_params(state)


@pytest.mark.slow
def test_the_export_of_adapters_trained_by_dpo_has_their_log_probabilities(
  tiny_hf_folder, tmp_path
):
  lm = lm_lib.load(tiny_hf_folder('qwen2'), mesh=one_device())
  units = with_reference(random_units(40, vocab_size=300))
  config = PreferConfig(
    attention='blocks', batch_size=8, max_length=48, learning_rate=3e-2, warmup=0.0,
    lora_rank=3, lora_alpha=6.0, lora_modules=CONFIG.lora_modules,
  )  # fmt: skip
  graph, unmerged, merged = train_adapters(lm, units, config)
  lm_lib.save(dataclasses.replace(lm, params=merged), tmp_path / 'merged')
  exported = lm_lib.load(tmp_path / 'merged', mesh=one_device())
  batch = packing.Batches(units, [packing.Step(packing.Bucket(48, 8), ((0,), (1,), (2,)))])[0]

  def compute(graph, params):  # a program for each structure
    model = nnx.merge(graph, params)
    positions = np.broadcast_to(np.arange(12), TOKENS.shape)
    hidden = model(TOKENS, positions)
    return sequence_logprobs(model, batch).sums[:3, :2], model.unembed(hidden)

  program = jax.jit(compute, static_argnums=0)
  plain, _ = abstract_model(lm.config)
  logprobs, logits = program(plain, exported.params)
  expected, exact = program(graph, unmerged)
  np.testing.assert_allclose(logprobs, expected, rtol=1e-5)
  np.testing.assert_allclose(logits, exact, atol=1e-5 * np.abs(exact).max())
  before, _ = program(plain, lm.params)
  assert np.abs(logprobs - before).max() > 1  # the training has an effect


def test_initial_adapters_change_nothing(tiny_hf_folder):
  lm = lm_lib.load(tiny_hf_folder('llama3'), mesh=one_device())
  merged = lora.merge(lm.params, lora.init(lm.config, CONFIG.lora, jax.random.key(0)), CONFIG.lora)
  jax.tree.map(np.testing.assert_array_equal, merged, lm.params)


@pytest.mark.parametrize('dtype', ['float32', pytest.param('bfloat16', marks=pytest.mark.slow)])
def test_only_adapters_are_trained_and_saved(tiny_hf_folder, items, tmp_path, dtype):
  lm = lm_lib.load(tiny_hf_folder('qwen2'), mesh=one_device())
  config = dataclasses.replace(CONFIG, dtype=dtype)
  params, summary = fit(lm.config, lm.params, items, config, lm.mesh, tmp_path)
  changed = {
    path_str(path): not np.array_equal(x, y)
    for (path, x), y in zip(
      jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(lm.params), strict=True
    )
  }
  adapted = {
    path for path in changed if 'kernel' in path and ('attention' in path or 'down' in path)
  }
  adapted = {path for path in adapted if '/key/' not in path}
  assert {path for path, differs in changed.items() if differs} == adapted and adapted
  saved = sum(f.stat().st_size for f in (tmp_path / 'checkpoints').rglob('*') if f.is_file())
  assert saved < 4 * lm.config.num_params  # less than one copy of the parameters
  resumed, resumed_summary = fit(lm.config, lm.params, items, config, lm.mesh, tmp_path)
  assert resumed_summary['resumed_at'] == summary['steps']
  jax.tree.map(np.testing.assert_array_equal, resumed, params)


@pytest.mark.slow
def test_training_adapters_on_eight_devices_equals_one_device(tiny_hf_folder, items):
  lm = lm_lib.load(tiny_hf_folder('llama3'), mesh=one_device())
  config = dataclasses.replace(CONFIG, eps=1e-2, warmup=0.0)
  graph, _ = lora.abstract_model(lm.config, config.lora)
  initial = random_adapters(lm.config, config.lora)
  steps = packing.plan([len(i.tokens) for i in items], [packing.Bucket(32, 8)], 1, 0)
  batches, results = packing.Batches(items, steps), []
  for mesh in (one_device(), make_mesh(2, 2, 2)):
    frozen = place_frozen(jax.device_get(lm.params), config, mesh)
    train_step = make_train_step(graph, initial, config, 10, mesh, frozen)
    state = dataclasses.replace(init_state(initial, config, mesh), frozen=frozen)
    for i in range(3):
      state, _ = train_step(state, place_batch(batches[i], batch_sharding(mesh)))
    results.append(jax.device_get(state.params))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *results)


def test_invalid_lora_settings_are_refused(tiny_hf_folder):
  config = lm_lib.inspect_model(tiny_hf_folder('llama3')).config
  with pytest.raises(UserError, match="modules='mpl/' matches none.*layers/0/mlp/up"):
    lora.abstract_model(config, lora.LoraConfig(2, 16.0, 'mpl/'))
  for fields, match in (
    ({'lora_alpha': 0.0}, 'alpha=0.0 positive'),
    ({'lora_modules': '('}, 'not a valid regular expression'),
    ({'lora_rank': -1}, 'train.lora_rank=-1 must be at least 0'),
  ):
    with pytest.raises(UserError, match=match):
      dataclasses.replace(CONFIG, **fields)


@pytest.mark.slow
def test_bf16_gradients_of_adapters_agree_with_f32(tiny_hf_folder, items):
  """With a bf16 compute dtype the frozen parameters are bf16 and the adapters stay f32."""
  lm = lm_lib.load(tiny_hf_folder('llama3'), mesh=one_device())
  initial = random_adapters(lm.config, CONFIG.lora)
  batch = packing.Batches(items, [packing.Step(packing.Bucket(32, 2), ((0,), (1,)))])[0]
  gradients = []
  for dtype in ('float32', 'bfloat16'):
    config = dataclasses.replace(CONFIG, dtype=dtype)
    graph, _ = lora.abstract_model(lm.config, config.lora, dtype)
    frozen = place_frozen(lm.params, config, lm.mesh)
    assert {x.dtype for x in jax.tree.leaves(frozen)} == {jnp.dtype(dtype)}
    loss = make_loss(graph, config, batch_sharding(lm.mesh))
    gradients.append(
      jax.jit(jax.grad(lambda p, loss=loss, f=frozen: loss(p, f, batch)[0]))(initial)
    )
  for exact, half in zip(*map(jax.tree.leaves, gradients), strict=True):
    assert half.dtype == jnp.float32
    cosine = np.vdot(exact, half) / (np.linalg.norm(exact) * np.linalg.norm(half))
    assert cosine > 0.9
