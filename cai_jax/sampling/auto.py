"""The engine's sizes that suit a device and models, in place of 'auto'.

Everything here is a pure function of its arguments, so the sizes for any device can be computed
without having one.
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from cai_jax.model import cached_forward  # noqa: F401  # registers every attention to the cache
from cai_jax.model.attention.cached import CACHED, choose_cached
from cai_jax.model.config import ModelConfig
from cai_jax.model.lm import LM
from cai_jax.model.quantized.kernel import FULL
from cai_jax.model.quantized_params import param_bytes
from cai_jax.runtime.hardware import Device, describe_device
from cai_jax.runtime.mesh import batch_shards
from cai_jax.sampling.caches import layer_state_bytes
from cai_jax.sampling.config import AUTO, EngineConfig

GIB = 2**30
# Tokens that a slot's cache holds on average, for a choice of slots. A chain with replies of 256
# to 512 tokens ends with 1,000 to 2,000, and pages are given out as it grows.
SLOT_TOKENS = 1024
# Tokens of a prefill chunk on a CPU for each slot, at most: a few slots rarely have more to
# prefill at a time, and a chunk takes as long when it is half empty.
CPU_SLOT_CHUNK = 4


class Sizes(NamedTuple):
  """The sizes for a kind of device.

  Attributes:
    least_slots: the fewest slots of a batch shard. If their caches do not fit, the engine lowers
      the number once it knows how long they are.
    most_slots: the most slots of a batch shard.
    cache_share: share for caches of the memory that the parameters leave. The rest is for logits,
      activations and what else the process holds.
    prefill_tokens: tokens of a prefill chunk of a batch shard.
    prefill_width: tokens of one slot that attention processes together.
    page_tokens: tokens of a page of the cache.
    longest_burst: decode steps before the host looks at the tokens.
  """

  least_slots: int
  most_slots: int
  cache_share: float
  prefill_tokens: int
  prefill_width: int
  page_tokens: int
  longest_burst: int


# The time of a step on a CPU grows with its rows from 64 rows and prefilled tokens on, the smallest
# step (`cai_jax.sampling.programs`), so more slots gain little, and chains that start together wait
# for each other's prefill. A chunk that is mixed with 64 decoded rows is as long as a few requests.
# The host has no delay that longer bursts would hide. Half of the memory is left to the process
# itself, to training and to other programs. Devices that are no GPU and no TPU get these sizes,
# too.
CPU = Sizes(
  least_slots=64,
  most_slots=64,
  cache_share=0.5,
  prefill_tokens=256,
  prefill_width=32,
  page_tokens=64,
  longest_burst=32,
)
# On an accelerator a decode step of a small batch takes as long as reading the parameters. On one
# H200 (1B parameters, bf16), 256 slots sampled in 10.1 s what 64 slots sampled in 22.3 s, and more
# than 256 were not tried. There, a chunk of 128 tokens took 2.0 ms and one of 1,024 took 8.0 ms,
# and a burst cost 3.5 to 7 ms on the host beside steps of 2 to 5 ms. So chunks and bursts are long;
# a burst ends early when enough turns have ended. Requests have up to about 128 tokens. Compiled
# for v5e, Llama 3 8B's programs fit beside caches of 81 % of the memory that its parameters leave
# (experiments/RESULTS.md, 9.75 of 12.0 GiB).
ACCELERATOR = Sizes(
  least_slots=64,
  most_slots=256,
  cache_share=0.8,
  prefill_tokens=1024,
  prefill_width=128,
  page_tokens=64,
  longest_burst=64,
)


@dataclasses.dataclass(frozen=True)
class Load:
  """What the models that sample together take on each device.

  Attributes:
    parameters: bytes of all parameters.
    token: bytes of a cached token, in all layers of all models; 0 if no model is in memory.
    shards: number of batch shards of the mesh.
    attention: name of the attention to the cache, for pages of a size that it supports.
    windowed: each attention window in tokens, with the bytes of a cached token in its layers. They
      are part of `token`.
    state: bytes of what the layers with a state keep of a slot.
  """

  parameters: int = 0
  token: int = 0
  shards: int = 1
  attention: str = 'pages'
  windowed: tuple[tuple[int, int], ...] = ()
  state: int = 0

  def slot_bytes(self, tokens: int, slack: int) -> int:
    """Return the bytes of the cache of a slot.

    Args:
      tokens: number of tokens in the slot.
      slack: number of tokens that a layer keeps beyond its window.
    """
    left = sum(token * max(tokens - window - slack, 0) for window, token in self.windowed)
    return self.token * tokens - left + self.state


class Held(NamedTuple):
  """A model and how it is held.

  Attributes:
    config: the shape of the model.
    dtype: dtype of parameters and cache.
    weights: format of the linear layers' kernels.
  """

  config: ModelConfig
  dtype: str
  weights: str = FULL

  def param_bytes(self, mesh: Mesh) -> int:
    """Return the bytes of the parameters on each device of a mesh."""
    shards = mesh.shape['fsdp'] * mesh.shape['tensor']
    if self.weights != FULL:
      return param_bytes(*self) // shards
    experts = self.config.num_expert_params
    split = self.config.num_params - experts + experts / mesh.shape['expert']
    return int(split * jnp.dtype(self.dtype).itemsize / shards)


def measure_load(
  models: Sequence[tuple[ModelConfig, str] | tuple[ModelConfig, str, str]],
  mesh: Mesh,
  page_tokens: int = ACCELERATOR.page_tokens,
) -> Load:
  """Return what models take on each device of a mesh.

  Args:
    models: shape and dtype of each model, and its format if it is quantized; see `Held`.
    mesh: the mesh that holds them.
    page_tokens: number of tokens of a page of the cache.
  """
  parameters = token = state = 0
  windowed: collections.Counter[int] = collections.Counter()
  held = [Held(*model) for model in models]
  for model in held:
    config, width = model.config, jnp.dtype(model.dtype).itemsize
    parameters += model.param_bytes(mesh)
    cached: collections.Counter[int | None] = collections.Counter()
    for kind in config.kinds:
      cached[kind.window] += kind.cached
    token += cached.total() * width // mesh.shape['tensor']
    for window, numbers in cached.items():
      if window:
        windowed[window] += numbers * width // mesh.shape['tensor']
    if config.delta:
      states = len(config.delta.layers) * layer_state_bytes(config.delta, jnp.dtype(model.dtype))
      state += states // mesh.shape['tensor']
  names = {choose_cached(AUTO, x.config, x.dtype, page_tokens, mesh) for x in held}
  attention = names.pop() if len(names) == 1 else 'pages'
  shards, by_window = batch_shards(mesh), tuple(sorted(windowed.items()))
  return Load(parameters, token, shards, attention, by_window, state)


def page_of(config: EngineConfig) -> int:
  """Return the number of tokens of a page; if it is 'auto', that of accelerators."""
  return ACCELERATOR.page_tokens if 'page_tokens' in config.unresolved else config.page_tokens


def resolve(config: EngineConfig, device: Device, load: Load) -> EngineConfig:
  """Return the config with a number in place of each 'auto'. Given numbers stay.

  Args:
    config: the config.
    device: each device of the mesh.
    load: what the models take on it.
  """
  accelerated = device.platform in ('gpu', 'tpu')
  sizes, groups = (ACCELERATOR, load.shards) if accelerated else (CPU, 1)
  cache_gib = config.cache_gib
  if 'cache_gib' in config.unresolved:
    free = max(device.memory - load.parameters, 0) / GIB
    # Steps of a quarter of a GiB, since the free memory differs a little between starts.
    cache_gib = max(int(4 * free * sizes.cache_share) / 4, 0.25)
  page = sizes.page_tokens if 'page_tokens' in config.unresolved else config.page_tokens
  burst = sizes.longest_burst if 'longest_burst' in config.unresolved else config.longest_burst
  # A layer keeps a page more than its window, and what can be undone (`EngineConfig.undo`).
  slack = burst + config.most_drafts + config.rewind + page
  slots = _count_slots(sizes, cache_gib * GIB, load.slot_bytes(SLOT_TOKENS, slack)) * groups
  prefill_tokens = sizes.prefill_tokens * groups
  if not accelerated and 'slots' not in config.unresolved:
    prefill_tokens = min(prefill_tokens, CPU_SLOT_CHUNK * config.slots)
  values: dict[str, Any] = {
    'slots': -(-slots // load.shards) * load.shards,
    'cache_gib': cache_gib,
    'prefill_tokens': prefill_tokens,
    'prefill_width': sizes.prefill_width,
    'page_tokens': page,
    'attention': load.attention if CACHED[load.attention].takes_pages(page) else 'pages',
    'longest_burst': sizes.longest_burst,
  }
  return dataclasses.replace(config, **{name: values[name] for name in config.unresolved})


def _count_slots(sizes: Sizes, cache: float, slot: int) -> int:
  """Return the largest power of two of slots, within the limits, that a shard's cache holds.

  Args:
    sizes: the limits.
    cache: bytes of the cache.
    slot: bytes of the cache of a slot; 0 if no model is in memory.
  """
  slots = sizes.least_slots
  while slot and 2 * slots <= min(sizes.most_slots, cache / slot):
    slots *= 2
  return slots


def resolve_for(config: EngineConfig, models: Sequence[LM]) -> EngineConfig:
  """Return the config with a number in place of each 'auto', for models in memory.

  Args:
    config: the config.
    models: the models, on meshes of the same devices; without any, servers hold them all.
  """
  if not config.unresolved:
    return config
  if not models:
    return resolve(config, describe_device(jax.local_devices()[0]), Load())
  mesh = models[0].mesh
  held = [Held(lm.config, lm.dtype, lm.weights) for lm in models]
  load = measure_load(held, mesh, page_of(config))
  return resolve(config, describe_device(mesh.local_devices[0]), load)
