"""Run the benchmark's chains with `generate` of Hugging Face transformers, stage by stage."""

import pathlib
from typing import Any

import numpy as np
import torch
import transformers

from experiments.bench import chains as chains_lib
from experiments.bench.chains import Chain

PACKAGES = ('torch', 'transformers')


class System:
  """A transformers model, used in the usual way.

  A stage processes all chains in batches with left padding. A batch decodes until its longest reply
  has ended, as it would with natural replies, and each row is then cut to its own length.

  With the option `cache`='static', the cache has a fixed size, and on GPUs `generate` compiles the
  decode step. The size only grows, so that nothing is compiled after a whole run.
  """

  def __init__(self, folder: pathlib.Path, dtype: str, platform: str, options: dict[str, Any]):
    self.static = options.get('cache') == 'static'
    self.device = 'cpu' if platform == 'cpu' else 'cuda'
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    self.model = model.to(self.device).eval()

  def prepare(self, batch: int, length: int) -> None:
    """Prepare nothing: `generate` makes its own cache."""

  def run(
    self, chains: list[Chain], prefix: list[int], batch: int, seed: int, warm: bool = False
  ) -> tuple[list[list[list[int]]], dict]:
    """Run all chains.

    Args:
      chains: the chains.
      prefix: token ids at the start of every context.
      batch: rows per batch.
      seed: of sampling.
      warm: only warm up. Without a static cache nothing is compiled, so this runs one stage of
        the first batch.

    Returns:
      The token ids of each chain's replies, and an empty dict of statistics.
    """
    torch.manual_seed(seed)
    warm = warm and not self.static
    chains = chains[:batch] if warm else chains
    replies: dict[str, list[list[int]]] = {chain.id: [] for chain in chains}
    for stage in range(1 if warm else len(chains[0].limits)):
      for rows in chains_lib.batches(chains, batch):
        contexts = [chain.context(prefix, replies[chain.id]) for chain in rows]
        limits = [chain.limits[stage] for chain in rows]
        sampled = self._generate(
          contexts, max(limits), do_sample=True, temperature=1.0, top_k=0, top_p=1.0
        )
        for chain, tokens, limit in zip(rows, sampled, limits, strict=True):
          replies[chain.id].append(tokens[:limit])
    return [replies[chain.id] for chain in chains], {}

  def _generate(self, contexts: list[list[int]], count: int, **options) -> list[list[int]]:
    """Sample `count` tokens after each context."""
    pad = self.model.generation_config.pad_token_id
    width = max(map(len, contexts))
    if self.static:
      options['cache_implementation'] = 'static'
    ids = torch.tensor([[pad] * (width - len(c)) + c for c in contexts])
    mask = torch.tensor([[0] * (width - len(c)) + [1] * len(c) for c in contexts])
    with torch.inference_mode():
      out = self.model.generate(
        ids.to(self.device),
        attention_mask=mask.to(self.device),
        min_new_tokens=count,
        max_new_tokens=count,
        **options,
      )
    return out[:, width:].tolist()

  def logits(self, tokens: np.ndarray) -> np.ndarray:
    """Return the logits f32[B,V] after the last of tokens i32[B,T]."""
    with torch.inference_mode():
      out = self.model(torch.tensor(tokens, device=self.device, dtype=torch.int64))
    return out.logits[:, -1].float().cpu().numpy()

  def greedy(self, tokens: np.ndarray, count: int) -> list[list[int]]:
    """Return `count` greedily decoded tokens after each row of tokens i32[B,T]."""
    config = self.model.generation_config
    eos, config.eos_token_id = config.eos_token_id, None  # otherwise min_new_tokens masks it
    try:
      return self._generate(tokens.tolist(), count, do_sample=False)
    finally:
      config.eos_token_id = eos

  def device_peak_bytes(self) -> int | None:
    """Return the peak memory of the accelerator in bytes, or None on a CPU."""
    return None if self.device == 'cpu' else torch.cuda.max_memory_allocated()
