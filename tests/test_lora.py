"""Adapters: they alone learn, and merged they give what they gave apart, in torch too."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from cai_jax.data import examples, packing
from cai_jax.model import lm as lm_lib
from cai_jax.model import lora
from cai_jax.model.sharding import path_str
from cai_jax.runtime.mesh import batch_sharding, make_mesh
from cai_jax.training import loop, step
from cai_jax.training.config import TrainConfig

TOKENS = np.random.default_rng(0).integers(0, 300, (2, 12))
CONFIG = TrainConfig(
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
    examples.Example(rng.integers(0, 300, n).astype(np.int32), np.arange(n) >= n // 2)
    for n in rng.integers(4, 25, 70)
  ]


def drawn(config, settings):
  """Adapters whose B is not zero."""
  first = lora.init(config, settings, jax.random.key(0))
  keys = jax.random.split(jax.random.key(1), 100)
  leaves, tree = jax.tree.flatten(first)
  return jax.tree.unflatten(
    tree, [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=False)]
  )


def test_merged_adapters_give_the_logits_of_unmerged_ones_in_torch_too(tiny_hf_folder, tmp_path):
  lm = lm_lib.load(tiny_hf_folder('qwen2'), mesh=one_device())
  settings = CONFIG.lora
  adapters = drawn(lm.config, settings)
  graph, shapes = lora.abstract_model(lm.config, settings)
  assert jax.tree.structure(lora.split(shapes)[0]) == jax.tree.structure(adapters)
  place = np.broadcast_to(np.arange(12), TOKENS.shape).astype(np.int32)
  apart = lm_lib.compute_logits(graph, lora.join(adapters, lm.params), TOKENS, place, None)
  merged = dataclasses.replace(lm, params=lora.merge(lm.params, adapters, settings))
  assert jax.tree.structure(merged.params) == jax.tree.structure(lm.params)
  scale = np.abs(apart).max()
  np.testing.assert_allclose(merged.logits(TOKENS), apart, atol=1e-5 * scale)
  assert np.abs(lm.logits(TOKENS) - apart).max() > 0.1  # the adapters do something
  lm_lib.save(merged, tmp_path / 'merged')
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'merged').float()
  with torch.no_grad():
    np.testing.assert_allclose(model(torch.tensor(TOKENS)).logits, apart, atol=1e-5 * scale)


def test_first_adapters_change_nothing(tiny_hf_folder):
  lm = lm_lib.load(tiny_hf_folder('llama3'), mesh=one_device())
  merged = lora.merge(lm.params, lora.init(lm.config, CONFIG.lora, jax.random.key(0)), CONFIG.lora)
  jax.tree.map(np.testing.assert_array_equal, merged, lm.params)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_adapters_alone_learn_and_are_all_that_is_saved(tiny_hf_folder, items, tmp_path, dtype):
  lm = lm_lib.load(tiny_hf_folder('qwen2'), mesh=one_device())
  config = dataclasses.replace(CONFIG, dtype=dtype)
  params, summary = loop.fit(lm.config, lm.params, items, config, lm.mesh, tmp_path)
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
  assert saved < 4 * lm.config.num_params  # not even the parameters once
  again, found = loop.fit(lm.config, lm.params, items, config, lm.mesh, tmp_path)
  assert found['resumed_at'] == summary['steps']
  jax.tree.map(np.testing.assert_array_equal, again, params)


def test_adapters_on_eight_devices_learn_what_they_do_on_one(tiny_hf_folder, items):
  lm = lm_lib.load(tiny_hf_folder('llama3'), mesh=one_device())
  config = dataclasses.replace(CONFIG, eps=1e-2, warmup=0.0)
  graph, _ = lora.abstract_model(lm.config, config.lora)
  first = drawn(lm.config, config.lora)
  steps = packing.plan([len(i.tokens) for i in items], [packing.Bucket(32, 8)], 1, 0)
  batches, ends = packing.Batches(items, steps), []
  for mesh in (one_device(), make_mesh(2, 2, 2)):
    frozen = step.place_frozen(jax.device_get(lm.params), config, mesh)
    train_step = step.make_train_step(graph, first, config, 10, mesh, frozen)
    state = dataclasses.replace(step.init_state(first, config, mesh), frozen=frozen)
    for i in range(3):
      state, _ = train_step(state, loop._place(batches[i], batch_sharding(mesh)))
    ends.append(jax.device_get(state.params))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *ends)


def test_settings_that_adapt_nothing_are_refused(tiny_hf_folder):
  config = lm_lib.inspect_model(tiny_hf_folder('llama3')).config
  with pytest.raises(ValueError, match="modules='mpl/' matches none.*layers/0/mlp/up"):
    lora.abstract_model(config, lora.LoraConfig(2, 16.0, 'mpl/'))
  for fields, match in (
    ({'lora_alpha': 0.0}, 'alpha=0.0 positive'),
    ({'lora_modules': '('}, 'not a valid regular expression'),
    ({'lora_rank': -1}, 'train.lora_rank=-1 is too small'),
  ):
    with pytest.raises(ValueError, match=match):
      dataclasses.replace(CONFIG, **fields)


def test_half_precision_adapters_have_gradients_of_their_own(tiny_hf_folder, items):
  """In bf16 the frozen half is bf16 and the adapters f32, and gradients agree with f32's."""
  lm = lm_lib.load(tiny_hf_folder('llama3'), mesh=one_device())
  first = drawn(lm.config, CONFIG.lora)
  batch = packing.Batches(items, [packing.Step(packing.Bucket(32, 2), ((0,), (1,)))])[0]
  found = []
  for dtype in ('float32', 'bfloat16'):
    config = dataclasses.replace(CONFIG, dtype=dtype)
    graph, _ = lora.abstract_model(lm.config, config.lora, dtype)
    frozen = step.place_frozen(lm.params, config, lm.mesh)
    assert {x.dtype for x in jax.tree.leaves(frozen)} == {jnp.dtype(dtype)}
    loss = step._loss(graph, config, batch_sharding(lm.mesh))
    found.append(jax.jit(jax.grad(lambda p, loss=loss, f=frozen: loss(p, f, batch)[0]))(first))
  for exact, half in zip(*map(jax.tree.leaves, found), strict=True):
    assert half.dtype == jnp.float32
    alike = np.vdot(exact, half) / (np.linalg.norm(exact) * np.linalg.norm(half))
    assert alike > 0.9
