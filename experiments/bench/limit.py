"""Compute the time that the benchmark's chains need on a machine at its measured rates.

The limit is the sum of two times:

- Products, at the best rate measured for the model's own shapes with hundreds of rows or more:
  - the matrices of all layers, for every token that passes through them. These are the shared
    prefix, once for all chains; the prompts and requests, each token once; and every sampled token
    except the last of each chain, which nothing follows.
  - the output layer, for sampled tokens only.
- Reading keys and values, at the best measured rate of reading memory: the step that samples the
  second or a later token of a reply reads the keys and values of all earlier tokens of its chain.

It does not contain

- the reading of weights and of the shared prefix's keys and values, because a step can share it
  among any number of rows;
- what the first token of a reply reads, because it belongs to prefill;
- the arithmetic of attention, norms, activations and sampling, writing, and the host's work.

The rates are those that JAX reaches. A program with faster products, or one that overlaps its
products with its reads, could exceed the limit.
"""

import dataclasses
from collections.abc import Sequence

from experiments.bench.chains import Chain

WIDTHS = {'float32': 4, 'bfloat16': 2}  # bytes


@dataclasses.dataclass(frozen=True)
class Work:
  """What the chains need at least.

  Attributes:
    layer_tokens: tokens that pass through the layers.
    sampled_tokens: tokens that the output layer is computed for.
    read_tokens: tokens whose keys and values are read, summed over all decode steps of all rows.
  """

  layer_tokens: int
  sampled_tokens: int
  read_tokens: int


def count_work(chains: Sequence[Chain], prefix: int) -> Work:
  """Count what the chains need, behind a shared prefix of `prefix` tokens."""
  sampled = sum(sum(chain.limits) for chain in chains)
  given = sum(len(chain.prompt) + sum(map(len, chain.requests)) for chain in chains)
  # The step that samples token j of a reply, from 0, feeds token j - 1 and reads all before it.
  read = sum(
    chain.context_length(turn, 0) + j - 1
    for chain in chains
    for turn, limit in enumerate(chain.limits)
    for j in range(1, limit)
  )
  return Work(prefix + given + sampled - len(chains), sampled, read)


def layer_shapes(hf: dict) -> list[tuple[int, int]]:
  """Return (inputs, outputs) of the matrices of a layer.

  Args:
    hf: the content of the model's config.json.
  """
  d, ff, width = hf['hidden_size'], hf['intermediate_size'], hf['head_dim']
  q, kv = hf['num_attention_heads'] * width, hf['num_key_value_heads'] * width
  return [(d, q), (d, kv), (d, kv), (q, d), (d, ff), (d, ff), (ff, d)]


def token_bytes(hf: dict, dtype: str) -> int:
  """Return the bytes of a token's keys and values in all layers."""
  heads = 2 * hf['num_hidden_layers'] * hf['num_key_value_heads']
  return heads * hf['head_dim'] * WIDTHS[dtype]


def limit(work: Work, hf: dict, dtype: str, rates: dict[str, float]) -> dict:
  """Return the least seconds of the work and what they consist of.

  Args:
    work: of the chains.
    hf: the content of the model's config.json.
    dtype: of the products and of keys and values.
    rates: `layer_flops_per_second`, `output_flops_per_second` and `bytes_per_second`, as
      `roofline.rates` measures them.
  """
  matrices = sum(rows * columns for rows, columns in layer_shapes(hf)) * hf['num_hidden_layers']
  layer_flops = 2 * matrices * work.layer_tokens
  output_flops = 2 * hf['hidden_size'] * hf['vocab_size'] * work.sampled_tokens
  read = token_bytes(hf, dtype) * work.read_tokens
  seconds = {
    'layer_seconds': layer_flops / rates['layer_flops_per_second'],
    'output_seconds': output_flops / rates['output_flops_per_second'],
    'read_seconds': read / rates['bytes_per_second'],
  }
  return {
    'seconds': sum(seconds.values()),
    **seconds,
    **dataclasses.asdict(work),
    'layer_flops': layer_flops,
    'output_flops': output_flops,
    'read_bytes': read,
    'rates': rates,
  }
