"""Run the benchmark's chains with `cai_jax.sampling.engine.Engine`."""

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


def generate_turns(chain: Chain, prefix: list[int], temperature: float = 1.0):
  """Yield the turns of a chain for the engine, and return the token ids of the replies."""
  replies: list[list[int]] = []
  for name, limit in zip(chains_lib.turn_names(len(chain.limits) // 2), chain.limits, strict=True):
    sampling = SamplingConfig(temperature=temperature, max_tokens=limit)
    completion = yield Turn(name, chain.context(prefix, replies), sampling)
    replies.append(completion.tokens)
  return replies


class System:
  """Our engine with one model.

  Args:
    folder: the model's folder.
    dtype: 'float32' or 'bfloat16', of parameters, computation and cache.
    platform: ignored.
    engine: fields of EngineConfig other than `slots`.
  """

  def __init__(self, folder: pathlib.Path, dtype: str, platform: str, engine: dict[str, Any]):
    del platform  # JAX_PLATFORMS selects it
    self.lm = lm_lib.load(folder, dtype)
    self.engine = engine

  def prepare(self, batch: int, length: int) -> None:
    """Prepare nothing: a run makes its own engine."""

  def run(
    self, chains: list[Chain], prefix: list[int], batch: int, seed: int, warm: bool = False
  ) -> tuple[list[list[list[int]]], dict]:
    """Run all chains. This includes making the engine, its cache and the prefix's cache.

    Args:
      chains: the chains.
      prefix: token ids at the start of every context.
      batch: number of slots.
      seed: of sampling.
      warm: ignored; a warm-up is a whole run, so that it compiles every program.

    Returns:
      The token ids of each chain's replies, and the engine's statistics.
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
      raise ValueError(f'{slots} slots of {length} tokens do not fit; raise cache_gib.')
    source = ((chain.id, generate_turns(chain, prefix, temperature)) for chain in chains)
    results = dict(engine.run(source))
    return [results[chain.id] for chain in chains], engine.stats.summary()

  def logits(self, tokens: np.ndarray) -> np.ndarray:
    """Return the logits f32[B,V] after the last of tokens i32[B,T]."""
    return np.asarray(self.lm.logits(tokens)[:, -1])

  def greedy(self, tokens: np.ndarray, count: int) -> list[list[int]]:
    """Return `count` greedily decoded tokens after each row of tokens i32[B,T]."""
    chains = [Chain(str(i), row.tolist(), [], [count]) for i, row in enumerate(tokens)]
    length = tokens.shape[1] + count
    return [r[0] for r in self._run(chains, [], len(chains), 0, 0.0, length)[0]]

  def device_peak_bytes(self) -> int | None:
    """Return the peak memory of the accelerator in bytes, or None on a CPU."""
    stats = jax.devices()[0].memory_stats()
    return None if stats is None else stats['peak_bytes_in_use']

  def roofline(self, batches: list[int], repetitions: int) -> dict:
    """Measure the machine's limits and the time of a decode step.

    The time of a step is the difference between two runs that differ only in the length of replies,
    8 and 120 tokens after a prompt of 128, divided by the 112 steps. It contains everything that a
    user waits for except prefill. On average 192 tokens are live.

    Args:
      batches: numbers of rows to measure.
      repetitions: measurements of each.
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
    token_bytes = sum(kind.cached for kind in config.kinds) * width
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
