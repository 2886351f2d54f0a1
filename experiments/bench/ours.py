"""The benchmark's chains through `cai_jax.sampling.Engine`."""

import gc
import pathlib
import time
from typing import Any

import jax
import numpy as np

from cai_jax.model import lm as lm_lib
from cai_jax.sampling.config import EngineConfig
from cai_jax.sampling.engine import Engine
from cai_jax.sampling.types import SamplingConfig, Turn
from experiments.bench import chains as chains_lib
from experiments.bench import roofline as roofline_lib
from experiments.bench.chains import Chain

PACKAGES = ('jax', 'jaxlib', 'flax')


def generator(chain: Chain, prefix: list[int], temperature: float = 1.0):
  """A chain as the engine takes it; its result is the replies' token ids."""
  replies: list[list[int]] = []
  for name, limit in zip(chains_lib.turn_names(len(chain.limits) // 2), chain.limits, strict=True):
    sampling = SamplingConfig(temperature=temperature, max_tokens=limit)
    completion = yield Turn(name, chain.context(prefix, replies), sampling)
    replies.append(completion.tokens)
  return replies


class System:
  """Our engine with one model.

  Args:
    folder: of the model.
    dtype: 'float32' or 'bfloat16', of parameters, computation and cache.
    engine: fields of EngineConfig other than `slots`.
  """

  def __init__(self, folder: pathlib.Path, dtype: str, platform: str, engine: dict[str, Any]):
    del platform  # JAX_PLATFORMS has chosen it
    self.lm = lm_lib.load(folder, dtype)
    self.engine = engine

  def run(
    self, chains: list[Chain], prefix: list[int], batch: int, seed: int, warm: bool = False
  ) -> tuple[list[list[list[int]]], dict]:
    """(replies of each chain, what the engine counted), with `batch` slots.

    Making the engine, and so its cache and the prefix's, is part of the run. Warming up is a whole
    run, whatever the programs compile for.
    """
    del warm
    return self._run(chains, prefix, batch, seed, 1.0, chains_lib.longest(chains, 0))

  def _run(self, chains, prefix, slots, seed, temperature, length):
    gc.collect()
    engine = Engine(
      {'base': self.lm},
      length=length,
      seed=seed,
      config=EngineConfig(slots=slots, **self.engine),
      prefixes={'base': [prefix]} if prefix else None,
    )
    if engine.slots != slots:
      raise ValueError(f'{slots} slots of {length} tokens do not fit cache_gib; raise it.')
    source = ((chain.id, generator(chain, prefix, temperature)) for chain in chains)
    results = dict(engine.run(source))
    return [results[chain.id] for chain in chains], engine.stats.summary()

  def logits(self, tokens: np.ndarray) -> np.ndarray:
    """f32[B,V] after the last of tokens i32[B,T]."""
    return np.asarray(self.lm.logits(tokens)[:, -1])

  def greedy(self, tokens: np.ndarray, count: int) -> list[list[int]]:
    """The `count` most likely tokens after each row of tokens i32[B,T], one after the other."""
    chains = [Chain(str(i), row.tolist(), [], [count]) for i, row in enumerate(tokens)]
    length = tokens.shape[1] + count
    return [r[0] for r in self._run(chains, [], len(chains), 0, 0.0, length)[0]]

  def device_peak_bytes(self) -> int | None:
    """Most memory of the accelerator in use so far; None on a CPU."""
    stats = jax.devices()[0].memory_stats()
    return None if stats is None else stats['peak_bytes_in_use']

  def roofline(self, batches: list[int], repetitions: int) -> dict:
    """Memory and arithmetic limits here and now, and a decode step's time against them.

    A step's time is the difference of two runs that differ in nothing but their replies' lengths,
    8 and 120 tokens after a prompt of 128, divided by the 112 steps: all that the user waits for
    is in it, and prefill is not. On average 192 tokens are live then.
    """
    dtype, config = self.lm.dtype, self.lm.config
    prompt, short, long = 128, 8, 120
    live, allocated = prompt + (short + long) // 2, prompt + long
    rng = np.random.default_rng(0)
    limits = [roofline_lib.limits(dtype)]
    steps: dict[int, list[float]] = {}
    for batch in batches:
      rows = rng.integers(chains_lib.FIRST_ID, config.vocab_size, (batch, prompt)).tolist()

      def seconds(count, rows=rows):
        chains = [Chain(str(i), row, [], [count]) for i, row in enumerate(rows)]
        start = time.perf_counter()
        self._run(chains, [], len(rows), 0, 1.0, allocated)
        return time.perf_counter() - start

      seconds(short), seconds(long)
      steps[batch] = [(seconds(long) - seconds(short)) / (long - short) for _ in range(repetitions)]
      limits.append(roofline_lib.limits(dtype))
    best = {name: max(limit[name] for limit in limits) for name in limits[0]}
    width = 4 if dtype == 'float32' else 2
    token_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_dim * width
    return {
      'limits': best,
      'live_tokens': live,
      'allocated_tokens': allocated,
      'decode': {
        batch: roofline_lib.shares(
          times, config.num_params, width, batch, token_bytes * live, token_bytes * allocated, best
        )
        for batch, times in steps.items()
      },
    }
