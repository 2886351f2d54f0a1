"""Measure quantized kernels on a model: bytes, distance from full precision, and speed.

  python -m experiments.bench.quantized --model=FOLDER --texts=harmless-base-test.jsonl.gz
  python -m experiments.bench.quantized --model=FOLDER --texts=... --measures=training --rounds=3

The texts are transcripts in the form of HH-RLHF. `distance` prints the divergence
KL(full ‖ quantized) of the next token, in nats, averaged over all their positions, from the model
in f32 and in bf16. `sampling` prints tokens per second, and `training` the seconds and the loss of
train steps with adapters. There, each system has a process of its own, and so a peak memory.
"""

import argparse
import dataclasses
import gzip
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from cai_jax.data import packing
from cai_jax.data.units import Example
from cai_jax.model import lm as lm_lib
from cai_jax.model.lm import LM
from cai_jax.model.quantized.kernel import dequantize, map_params
from cai_jax.model.quantized_params import param_bytes
from cai_jax.runtime.mesh import batch_sharding, make_mesh
from cai_jax.sampling.completions import generate
from cai_jax.sampling.config import EngineConfig
from cai_jax.sampling.types import SamplingConfig
from cai_jax.training.config import TrainConfig
from cai_jax.training.state import init_state
from cai_jax.training.step import make_train_step, place_batch
from cai_jax.training.trainable import divide_model

SYSTEMS = (
  *(('float32', 'full'), ('float32', 'int8'), ('float32', 'nf4')),
  *(('bfloat16', 'full'), ('bfloat16', 'int8'), ('bfloat16', 'nf4')),
)
REFERENCES = (('float32', 'full'), ('bfloat16', 'full'))


def read_tokens(lm: LM, path: str, count: int, length: int) -> list[list[int]]:
  """Return the first tokens of the first transcripts of a file, `length` of each."""
  found: list[list[int]] = []
  with gzip.open(path, 'rt', encoding='utf-8') as lines:
    for line in lines:
      tokens = lm.tokenizer.encode(json.loads(line)['chosen'].strip())
      if len(tokens) >= length:
        found.append(tokens[:length])
      if len(found) == count:
        return found
  raise SystemExit(f'{path} has only {len(found)} transcripts of {length} tokens.')


def load(args: argparse.Namespace, dtype: str, weights: str, param_dtype: str | None = None) -> LM:
  """Return the model on one device."""
  mesh = make_mesh(devices=jax.devices()[:1])
  return lm_lib.load(args.model, dtype, mesh, param_dtype, weights=weights)


def measure_distances(args: argparse.Namespace) -> dict[tuple[str, str], dict[str, float]]:
  """Return the mean divergence of each model from both references, and their equal top tokens.

  The kernels are dequantized first, so the programs of the references compute all logits.
  """
  lms = {}
  for dtype, weights in SYSTEMS:
    if weights == 'full' or dtype == 'float32':
      lm = load(args, dtype, weights)
      lms[dtype, weights] = dataclasses.replace(lm, params=map_params(dequantize, lm.params))
  rows = read_tokens(lm, args.texts, args.count, args.length)
  results: dict[tuple[str, str], dict[str, float]] = {}
  logits = {name: [log_softmax(lm.logits([row])[0]) for row in rows] for name, lm in lms.items()}
  for name in lms:
    numbers = {'parameters, MB': param_bytes(lm.config, *name) / 1e6}
    for reference in REFERENCES:
      sums = np.zeros(2)
      for p, q in zip(logits[reference], logits[name], strict=True):
        sums += (np.exp(p) * (p - q)).sum(), (p.argmax(-1) == q.argmax(-1)).sum()
      kl, same = sums / (len(rows) * args.length)
      numbers |= {f'KL from {reference[0]}': kl, f'same top token as {reference[0]}': same}
    results[name] = numbers
  return results


def log_softmax(logits: jax.Array) -> np.ndarray:
  """Return log-probabilities in the memory of the host."""
  return np.asarray(jax.nn.log_softmax(logits))


def measure_sampling(args: argparse.Namespace, dtype: str, weights: str) -> dict[str, float]:
  """Return the tokens per second of sampling; the fastest of some rounds, without compilation."""
  lm = load(args, dtype, weights)
  prompts = [row[:24] for row in read_tokens(lm, args.texts, args.slots, args.length)]
  sampling = SamplingConfig(max_tokens=args.tokens, stop_token_ids=())
  engine = EngineConfig(slots=args.slots, prefill_tokens=256, prefill_width=32, longest_burst=32)
  speeds = []
  for seed in range(args.rounds + 1):  # the first round compiles
    start = time.perf_counter()
    replies = generate(lm, prompts, sampling, seed, engine=engine)
    speeds.append(sum(len(x.tokens) for x in replies) / (time.perf_counter() - start))
  return {'tokens/s': max(speeds[1:])}


def measure_training(args: argparse.Namespace, dtype: str, weights: str) -> dict[str, float]:
  """Return seconds, loss and memory of train steps with adapters on all linear layers."""
  lm = load(args, dtype, weights, 'float32')
  settings = {'loss_normalization': 'token', 'schedule': 'constant', 'warmup': 0.0}
  config = TrainConfig(
    batch_size=args.rows,
    max_length=args.length,
    learning_rate=2e-4,
    lora_rank=16,
    attention='blocks',
    dtype=dtype,
    base_weights=weights,
    **settings,
  )
  rows = read_tokens(lm, args.texts, args.rows * args.steps, args.length)
  items = [Example(np.array(row, np.int32), np.arange(len(row)) > 0) for row in rows]
  plan = packing.plan([args.length] * len(items), [packing.Bucket(args.length, args.rows)], 1, 0)
  batches, sharding = packing.Batches(items, plan), batch_sharding(lm.mesh)
  divided = divide_model(lm.config, lm.params, config, lm.mesh)
  step = make_train_step(divided.graph, divided.params, config, len(plan), lm.mesh, divided.frozen)
  state = init_state(divided.params, config, lm.mesh)
  state = dataclasses.replace(state, frozen=divided.frozen)
  compiled = step.lower(state, place_batch(batches[0], sharding)).compile()
  memory = compiled.memory_analysis()
  losses, seconds = [], []
  for number in range(len(plan)):
    start = time.perf_counter()
    state, metrics = compiled(state, place_batch(batches[number], sharding))
    losses.append(float(metrics['loss']))
    seconds.append(time.perf_counter() - start)
  return {
    's/step': float(np.median(seconds[1:])),
    'first loss': losses[0],
    'last losses': float(np.mean(losses[-4:])),
    'arguments, MB': memory.argument_size_in_bytes / 1e6,
    'temporaries, MB': memory.temp_size_in_bytes / 1e6,
  }


MEASURES: dict[str, Callable[[argparse.Namespace, str, str], dict[str, float]]] = {
  'sampling': measure_sampling,
  'training': measure_training,
}


def measure_one(args: argparse.Namespace) -> None:
  """Print the numbers of one system as JSON."""
  dtype, weights = args.one.split(',')
  numbers = MEASURES[args.measures](args, dtype, weights)
  config = lm_lib.inspect_model(args.model).config
  numbers['parameters, MB'] = param_bytes(config, dtype, weights) / 1e6
  numbers['peak, MB'] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
  print(json.dumps(numbers))


def run_one(argv: list[str], measure: str, dtype: str, weights: str) -> dict[str, Any]:
  """Measure a system in a process of its own."""
  own = [*argv, f'--measures={measure}', f'--one={dtype},{weights}']
  command = [sys.executable, '-m', 'experiments.bench.quantized', *own]
  output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
  return json.loads(output.splitlines()[-1])


def main() -> None:
  """Print a table for each measure."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--model', required=True, help='a folder, or a name on the hub')
  parser.add_argument('--texts', required=True, help='transcripts, a .jsonl.gz file of HH-RLHF')
  parser.add_argument('--measures', default='distance,sampling,training')
  parser.add_argument('--dtypes', default='float32,bfloat16')
  parser.add_argument('--count', type=int, default=32, help='texts of `distance`')
  parser.add_argument('--length', type=int, default=128, help='tokens of a text and of a row')
  parser.add_argument('--slots', type=int, default=32)
  parser.add_argument('--tokens', type=int, default=48, help='tokens of a reply')
  parser.add_argument('--rounds', type=int, default=2, help='rounds of `sampling`')
  parser.add_argument('--rows', type=int, default=4, help='rows of a train step')
  parser.add_argument('--steps', type=int, default=12)
  parser.add_argument('--one', default='', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.one:
    measure_one(args)
    return
  systems = [system for system in SYSTEMS if system[0] in args.dtypes.split(',')]
  for measure in args.measures.split(','):
    if measure == 'distance':
      results = measure_distances(args)
    else:
      results = {system: run_one(sys.argv[1:], measure, *system) for system in systems}
    names = list(next(iter(results.values())))
    print(f'\n| {measure} | ' + ' | '.join(names) + ' |')
    print('|---|' + '---|' * len(names))
    for (dtype, weights), numbers in results.items():
      print(f'| {weights}, {dtype} | ' + ' | '.join(f'{numbers[n]:.4g}' for n in names) + ' |')


if __name__ == '__main__':
  main()
