"""Run the benchmark's chains with the sampler of Tunix, stage by stage.

google-tunix 0.1.7 needs some care. Its rotary embedding ignores the config's base and uses 1e6.
`temperature` without `top_p` decodes greedily. Without `max_prompt_length`, prompts are padded to a
power of two and each new size compiles. The mesh needs Auto axes.
"""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tunix.generate import sampler as sampler_lib
from tunix.models.llama3 import model as model_lib
from tunix.models.llama3 import params as params_lib

from experiments.bench import chains as chains_lib
from experiments.bench.chains import Chain

PACKAGES = ('google-tunix', 'jax', 'jaxlib', 'flax')
PAD = 0


class _Ids:
  """A tokenizer whose texts are lists of token ids, with the methods that Tunix calls."""

  def encode(self, ids: list[int]) -> list[int]:
    return list(ids)

  def decode(self, ids: list[int]) -> str:
    del ids
    return ''

  def bos_id(self) -> int:
    return 0  # encode adds none

  def eos_id(self) -> int:
    return -1

  def pad_id(self) -> int:
    return PAD


class System:
  """Tunix's Llama 3 and its samplers, one per stage.

  All batches of a stage use the stage's longest context as `max_prompt_length`, and a cache for
  that context and the longest reply. So each stage compiles once, with as little padding as
  possible. A batch decodes until its longest reply has ended, as it would with natural replies.
  """

  def __init__(self, folder: pathlib.Path, dtype: str, platform: str, engine: dict[str, Any]):
    del platform, engine
    hf = json.loads((pathlib.Path(folder) / 'config.json').read_text())
    self.config = model_lib.ModelConfig(
      num_layers=hf['num_hidden_layers'],
      vocab_size=hf['vocab_size'],
      embed_dim=hf['hidden_size'],
      hidden_dim=hf['intermediate_size'],
      num_heads=hf['num_attention_heads'],
      head_dim=hf['head_dim'],
      num_kv_heads=hf['num_key_value_heads'],
      rope_theta=hf['rope_theta'],
      norm_eps=hf['rms_norm_eps'],
      weight_tying=hf['tie_word_embeddings'],
    )
    model_lib.apply_rope = functools.partial(model_lib.apply_rope, rope_theta=hf['rope_theta'])
    auto = (jax.sharding.AxisType.Auto,) * 2
    self.mesh = jax.make_mesh((1, 1), ('fsdp', 'tp'), axis_types=auto)
    self.model = params_lib.create_model_from_safe_tensors(
      str(folder), self.config, self.mesh, dtype=jnp.dtype(dtype)
    )
    self.samplers: dict[tuple[int, int], sampler_lib.Sampler] = {}
    self.steps = 0  # decode steps of the next call, prompt included

  def prepare(self, batch: int, length: int) -> None:
    """Prepare nothing: a run makes its own samplers."""

  def run(
    self, chains: list[Chain], prefix: list[int], batch: int, seed: int, warm: bool = False
  ) -> tuple[list[list[list[int]]], dict]:
    """Run all chains.

    Args:
      chains: the chains.
      prefix: token ids at the start of every context.
      batch: rows per batch.
      seed: of sampling.
      warm: only warm up: run one batch of each size through every stage.

    Returns:
      The token ids of each chain's replies, and an empty dict of statistics.
    """
    turns = range(len(chains[0].limits))
    widths = [max(c.context_length(turn, len(prefix)) for c in chains) for turn in turns]
    longest = max(limit for chain in chains for limit in chain.limits)
    split = chains_lib.batches(chains, batch)
    if warm:
      split = [split[0], split[-1]] if len(split[-1]) < batch < len(chains) else split[:1]
    replies: dict[str, list[list[int]]] = {c.id: [] for rows in split for c in rows}
    for turn in turns:
      for number, rows in enumerate(split):
        contexts = [chain.context(prefix, replies[chain.id]) for chain in rows]
        limits = [chain.limits[turn] for chain in rows]
        sampled = self._sample(
          contexts,
          widths[turn],
          longest,
          max(limits),
          temperature=1.0,
          top_p=1.0,
          seed=seed * 1_000_003 + turn * 10_007 + number,
        )
        for chain, tokens, limit in zip(rows, sampled, limits, strict=True):
          # In the next context, Tunix would treat a sampled padding token as padding.
          replies[chain.id].append([t if t != PAD else PAD + 1 for t in tokens[:limit]])
    return [reply for reply in replies.values()], {}

  def _sample(
    self, contexts: list[list[int]], width: int, longest: int, count: int, **options
  ) -> list[list[int]]:
    """Sample `count` tokens after each context.

    Args:
      contexts: token ids.
      width: tokens that contexts are padded to.
      longest: most tokens of a reply; with `width`, it determines the compiled shapes.
      count: number of tokens to sample.
      **options: of Tunix's sampler.
    """
    key = width, longest
    if key not in self.samplers:
      self.samplers[key] = self._sampler(width, width + longest)
    self.steps = width + count
    with jax.set_mesh(self.mesh):
      out = self.samplers[key](
        contexts,
        max_generation_steps=longest,
        max_prompt_length=width,
        eos_tokens=[-1],  # lengths are forced
        **options,
      )
    return [np.asarray(tokens)[:count].tolist() for tokens in out.tokens]

  def _sampler(self, width: int, length: int) -> sampler_lib.Sampler:
    config = self.config
    cache = sampler_lib.CacheConfig(
      cache_size=length,
      num_layers=config.num_layers,
      num_kv_heads=config.num_kv_heads,
      head_dim=config.head_dim,
    )
    sampler = sampler_lib.Sampler(self.model, _Ids(), cache)
    decode = sampler._compiled_decode_fn

    def until_longest(params, state):
      # Stop after self.steps steps, as if every row had sampled its stop token by then.
      return decode(params, dataclasses.replace(state, total_sampling_steps=self.steps - 1))

    sampler._compiled_decode_fn = until_longest
    return sampler

  def logits(self, tokens: np.ndarray) -> np.ndarray:
    """Return the logits f32[B,V] after the last of tokens i32[B,T]."""
    b, t = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(t), (b, t))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((t, t), bool)), (b, t, t))
    logits, _ = self.model(jnp.asarray(tokens), positions, None, mask)
    return np.asarray(logits[:, -1], np.float32)

  def greedy(self, tokens: np.ndarray, count: int) -> list[list[int]]:
    """Return `count` greedily decoded tokens after each row of tokens i32[B,T]."""
    return self._sample(tokens.tolist(), tokens.shape[1], count, count)

  def device_peak_bytes(self) -> int | None:
    """Return the peak memory of the accelerator in bytes, or None on a CPU."""
    stats = jax.devices()[0].memory_stats()
    return None if stats is None else stats['peak_bytes_in_use']
