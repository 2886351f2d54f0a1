"""Run the benchmark's chains with the continuous batching of Hugging Face transformers."""

import pathlib
from typing import Any

import numpy as np
import torch
import transformers
from transformers.generation import ContinuousBatchingConfig

from experiments.bench import chains as chains_lib
from experiments.bench import hf
from experiments.bench.chains import Chain

PACKAGES = hf.PACKAGES
PAGE = 64  # tokens; the default of 256 is much for contexts of a few hundred


class System:
  """A transformers model behind `ContinuousBatchingManager`, with shared prefixes.

  A chain's next turn is submitted as soon as its reply has ended. Every run has a new manager,
  because an old one keeps the cache of earlier runs. Making it and its warm-up are not timed.
  """

  def __init__(self, folder: pathlib.Path, dtype: str, platform: str, options: dict[str, Any]):
    self.padded = hf.System(folder, dtype, platform, {})
    self.cache_gib = options['cache_gib']
    self.manager = None

  def prepare(self, batch: int, length: int) -> None:
    """Make a manager for `batch` chains of at most `length` tokens."""
    del length
    self._start(batch, do_sample=True)

  def _start(self, batch: int, do_sample: bool) -> None:
    model = self.padded.model
    config = model.config
    width = torch.finfo(model.dtype).bits // 8
    page = 2 * config.num_key_value_heads * config.head_dim * width * PAGE
    self.manager = model.init_continuous_batching(
      transformers.GenerationConfig(
        do_sample=do_sample, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=-1, pad_token_id=0
      ),
      ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=int(self.cache_gib * 2**30 / page / config.num_hidden_layers),
        max_requests_per_batch=batch,
        max_batch_tokens=1024,
      ),
    )
    if self.padded.device != 'cpu':
      self.manager.warmup()
    self.manager.start()

  def run(
    self, chains: list[Chain], prefix: list[int], batch: int, seed: int, warm: bool = False
  ) -> tuple[list[list[list[int]]], dict]:
    """Run all chains, `batch` at a time; see `chains.Run`. Nothing is compiled during a run."""
    torch.manual_seed(seed)
    return self._roll(chains[: chains_lib.WARM] if warm else chains, prefix, batch), {}

  def _roll(self, chains, prefix, batch):
    manager = self.manager

    def submit(request, context, limit):
      manager.add_request(context, request_id=request, max_new_tokens=limit)

    def poll():
      result = manager.get_result(timeout=1)
      if result is None and not manager.is_running():
        raise RuntimeError('the manager of continuous batching has ended.')
      if result is None or not result.is_finished():
        return []
      if result.error:
        raise RuntimeError(f'{result.request_id}: {result.error}')
      return [(result.request_id, result.generated_tokens)]

    try:
      return chains_lib.run_rolling(chains, prefix, batch, submit, poll)
    finally:
      manager.stop(block=True)
      manager.destroy()
      self.manager = None

  def logits(self, tokens: np.ndarray) -> np.ndarray:
    """Return the logits f32[B,V] after the last of tokens i32[B,T], of the model itself."""
    return self.padded.logits(tokens)

  def greedy(self, tokens: np.ndarray, count: int) -> list[list[int]]:
    """Return `count` greedily decoded tokens after each row of tokens i32[B,T]."""
    self._start(len(tokens), do_sample=False)
    chains = [Chain(str(i), row.tolist(), [], [count]) for i, row in enumerate(tokens)]
    return [replies[0] for replies in self._roll(chains, [], len(chains))]

  def device_peak_bytes(self) -> int | None:
    """Return the peak memory of the accelerator in bytes, or None on a CPU."""
    return self.padded.device_peak_bytes()
