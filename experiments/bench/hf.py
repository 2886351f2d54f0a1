"""The benchmark's chains through `generate` of Hugging Face transformers, stage by stage."""

import pathlib
from typing import Any

import numpy as np
import torch
import transformers

from experiments.bench import chains as chains_lib
from experiments.bench.chains import Chain

PACKAGES = ('torch', 'transformers')


class System:
  """A model of transformers, used as its users use it.

  A stage goes over all chains in batches, padded on the left. A batch decodes until its longest
  reply has ended, as it does where replies end by themselves; each row is then cut to its own.
  """

  def __init__(self, folder: pathlib.Path, dtype: str, platform: str, engine: dict[str, Any]):
    del engine
    self.device = 'cpu' if platform == 'cpu' else 'cuda'
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    self.model = model.to(self.device).eval()

  def run(
    self, chains: list[Chain], prefix: list[int], batch: int, seed: int, warm: bool = False
  ) -> tuple[list[list[list[int]]], dict]:
    """(replies of each chain, nothing).

    Warming up is the initial answer of the first batch, as nothing is compiled.
    """
    torch.manual_seed(seed)
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
    """The `count` tokens that follow each context."""
    pad = self.model.generation_config.pad_token_id
    width = max(map(len, contexts))
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
    """f32[B,V] after the last of tokens i32[B,T]."""
    with torch.inference_mode():
      out = self.model(torch.tensor(tokens, device=self.device, dtype=torch.int64))
    return out.logits[:, -1].float().cpu().numpy()

  def greedy(self, tokens: np.ndarray, count: int) -> list[list[int]]:
    """The `count` most likely tokens after each row of tokens i32[B,T], one after the other."""
    config = self.model.generation_config
    eos, config.eos_token_id = config.eos_token_id, None  # else min_new_tokens forbids it
    try:
      return self._generate(tokens.tolist(), count, do_sample=False)
    finally:
      config.eos_token_id = eos

  def device_peak_bytes(self) -> int | None:
    """Most memory of the accelerator in use so far; None on a CPU."""
    return None if self.device == 'cpu' else torch.cuda.max_memory_allocated()
