"""How long do a million comparisons take on their way into batches, and how much memory?

Command:   python -m experiments.bench.many_comparisons --count=1000000
Hardware:  any; RESULTS.md has results of one of two CPU cores
Method:    a file of TRL's conversational form is written, with prompts of 8 to 24 words of the
           embedded world and a number, responses of 4 to 20 words, and four comparisons of each
           prompt. It is then checked with all filters, compared with 200 held-out prompts,
           digested, rendered by the embedded model's dialogue, grouped by near-duplicate prompts,
           split and packed, by the functions that a run calls. Nothing is trained.

Prints a line of JSON for each step: its seconds, and the peak of resident memory so far in MiB.
"""

import argparse
import json
import os
import pathlib
import random
import resource
import tempfile
import time
from collections.abc import Callable
from typing import TypeVar

from cai_jax.data import packing
from cai_jax.data.examples import hold_out
from cai_jax.data.fingerprints import fingerprint
from cai_jax.data.preferences import find_held_out, group_comparisons, judge_both, read_comparisons
from cai_jax.data.preferences.reading import FILTERS
from cai_jax.data.preferences.units import build_comparison_units, build_judged_units
from cai_jax.data.units import unit_lengths
from cai_jax.dialogue import Dialogue
from cai_jax.model import lm as models
from cai_jax.pipeline.pairs import Pairs
from cai_jax.tiny.files import MODELS
from cai_jax.tiny.prompts import make_prompts

T = TypeVar('T')
LENGTH, ROWS = 2048, 32  # tokens of a row, rows of a batch
FOR_EACH_PROMPT = 4


def write_file(path: pathlib.Path, count: int, seed: int = 0) -> None:
  """Write a file of comparisons.

  Args:
    path: the file.
    count: number of comparisons.
    seed: chooses the words.
  """
  rng = random.Random(seed)
  messages = [m['content'] for p in make_prompts('pretrain', 2000, seed) for m in p.messages]
  words = sorted({word for text in messages for word in text.split()})

  def text(low: int, high: int) -> str:
    return ' '.join(rng.choices(words, k=rng.randint(low, high)))

  with open(path, 'w', encoding='utf-8') as file:
    for number in range(count):
      if number % FOR_EACH_PROMPT == 0:
        prompt = [{'role': 'user', 'content': f'{text(8, 24)} {number}'}]
      sides = {
        side: [{'role': 'assistant', 'content': text(4, 20)}] for side in ('chosen', 'rejected')
      }
      file.write(json.dumps({'id': str(number), 'prompt': prompt, **sides}) + '\n')


def peak_mib() -> float:
  """Return the peak of this process's resident memory."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(name: str, work: Callable[[], T]) -> T:
  """Return the result of some work, and print its seconds and the peak of memory."""
  start = time.perf_counter()
  result = work()
  line = {'step': name, 'seconds': round(time.perf_counter() - start, 1)}
  print(json.dumps(line | {'peak_mib': round(peak_mib())}), flush=True)
  return result


def main() -> None:
  """Write the file, and measure each step."""
  parser = argparse.ArgumentParser()
  parser.add_argument('--count', type=int, default=1_000_000)
  parser.add_argument('--objective', choices=('comparison', 'judged'), default='comparison')
  count, objective = (arguments := parser.parse_args()).count, arguments.objective
  lm = models.describe(MODELS['tiny'], 'float32', None)
  dialogue = Dialogue(lm.tokenizer, 'chat', lm.eos_token_ids)
  held_out = [prompt.messages for prompt in make_prompts('eval', 200, 0)]
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'comparisons.jsonl'
    measure('write', lambda: write_file(path, count))
    print(json.dumps({'mib': round(os.path.getsize(path) / 2**20)}))
    found = measure('read', lambda: read_comparisons(path, filters=FILTERS))
    measure('find held-out prompts', lambda: find_held_out(found, held_out))
    pairs = Pairs(found)
    measure('digest', lambda: pairs.digest)
    groups = measure('group', lambda: group_comparisons(pairs))
    if objective == 'comparison':
      build = lambda: build_comparison_units(pairs, dialogue, max_length=LENGTH)  # noqa: E731
    else:
      judged = list(judge_both(pairs))
      groups = {item.id: groups[item.id.rpartition('/')[0]] for item in judged}
      build = lambda: build_judged_units(judged, dialogue, max_length=LENGTH)  # noqa: E731
    units = measure('units', build).units
    training, _ = measure('split', lambda: hold_out(units, 0.01, 0, groups))
    bucket = packing.Bucket(LENGTH, ROWS)
    steps = measure('pack', lambda: packing.plan(unit_lengths(training), [bucket], 1, 0))
    measure('fingerprint', lambda: fingerprint(training))
    print(json.dumps({'kept': len(units), 'steps': len(steps), **found.counts['dropped']}))


if __name__ == '__main__':
  main()
