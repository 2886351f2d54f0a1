"""How often the experts of a mixture compute a token while it samples.

Every token that the model computes counts: prefilled ones, shared prefixes once, sampled ones that
are fed, and drafts. The counts stay on the device until the end.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from cai_jax.model.cached_forward import Usage
from cai_jax.model.config import ModelConfig
from cai_jax.model.lm import LM
from cai_jax.runtime.mesh import place
from cai_jax.sampling.remote import Remote


def sparse_layers(config: ModelConfig) -> list[int]:
  """Return the numbers of the layers that are mixtures of experts."""
  return [layer for layer in range(config.num_layers) if config.sparse(layer)]


def new_usage(config: ModelConfig, sharding: NamedSharding, groups: int) -> Usage:
  """Return counts of 0; () for a dense model.

  Args:
    config: the shape of the model.
    sharding: of arrays whose first axis are batch shards.
    groups: number of batch shards.
  """
  if config.experts is None:
    return ()
  zeros = np.zeros((groups, config.experts.number), np.int32)
  return tuple(place(zeros, sharding) for _ in sparse_layers(config))


def fetch_usage(config: ModelConfig, *usages: Usage) -> np.ndarray:
  """Return the sum i64[L,E] of counts, over batch shards too.

  Args:
    config: the shape of the model, a mixture of experts.
    *usages: counts on the device.
  """
  assert config.experts is not None
  total = np.zeros((len(sparse_layers(config)), config.experts.number), np.int64)
  for usage in jax.device_get(usages):
    total += np.stack([counts.sum(0, dtype=np.int64) for counts in usage])
  return total


def no_usage(models: Mapping[str, LM | Remote]) -> dict[str, np.ndarray]:
  """Return counts of 0, i64[L,E], for those of the models that are mixtures in memory, by name."""
  mixtures = {
    name: m.config for name, m in models.items() if isinstance(m, LM) and m.config.experts
  }
  return {name: fetch_usage(config) for name, config in mixtures.items()}


def sum_over_processes(usage: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Return the sums of the counts i64[L,E] of all processes, which all have the same models."""
  if jax.process_count() == 1 or not usage:
    return dict(usage)
  # Arrays on devices have 32 bits.
  halves = {
    name: np.stack([x >> 24, x & (2**24 - 1)]).astype(np.int32) for name, x in usage.items()
  }
  summed = jax.tree.map(
    lambda x: x.astype(np.int64).sum(0), multihost_utils.process_allgather(halves)
  )
  return {name: (high << 24) + low for name, (high, low) in summed.items()}


def summarize(config: ModelConfig, counts: np.ndarray) -> dict[str, Any]:
  """Return how evenly the experts of each layer were used, in JSON types.

  Args:
    config: the shape of the model, a mixture of experts.
    counts: i64[L,E].

  Returns:
    `tokens`, the number of tokens that the model computed; and for each of the `layers` with
    experts: `busiest`, the share of the tokens that the busiest expert computed; `effective`, the
    number of experts that would have the same entropy if they were used alike, exp(-Σ p log p);
    and `unused`, the number of experts that computed none.
  """
  assert config.experts is not None
  tokens = int(counts[0].sum()) // config.experts.per_token
  shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
  entropy = -np.sum(shares * np.log(np.where(shares > 0, shares, 1)), 1)
  busiest = counts.max(1) / max(tokens, 1)
  return {
    'tokens': tokens,
    'layers': sparse_layers(config),
    'busiest': [round(float(x), 4) for x in busiest],
    'effective': [round(float(x), 2) for x in np.exp(entropy)],
    'unused': (counts == 0).sum(1).tolist(),
  }


def describe_usage(name: str, config: ModelConfig, summary: Mapping[str, Any]) -> str:
  """Return a `summarize()` as a line of text.

  Args:
    name: the model.
    config: its shape.
    summary: the summary.
  """
  assert config.experts is not None
  layer = int(np.argmax(summary['busiest']))
  even = config.experts.per_token / config.experts.number
  return (
    f'  experts of {name}: the busiest computed {100 * summary["busiest"][layer]:.0f} % of the '
    f'tokens of layer {summary["layers"][layer]} (even: {100 * even:.0f} %); '
    f'{sum(summary["unused"])} of {config.experts.number * len(summary["layers"])} were unused'
  )
