"""How long does training on a million rows of D_CAI take to its first step, and in what memory?

Command:   python -m experiments.bench.many_rows --count=1000000 --tokenizer=FOLDER --folder=FOLDER
           (--count may be several numbers, --texts a file of hh-rlhf, and --training=simpo trains
           a policy on the pairs that the rows imply, without a reference)
Hardware:  any; RESULTS.md has results of two CPU cores
Method:    D_CAI of that many rows is written once: prompts of one or three messages, two rounds,
           turns of about 250 bytes. Sentences are drawn from a file of hh-rlhf, or else from the
           embedded world. A model of two layers and 64 channels with the given tokenizer is then
           trained by `launch.py --stages=train`, or `--stages=prefer` for SimPO, and
           stopped after its first step. It is started again, to see how long a resumed run takes to
           its next step. The memory is that of all processes of the command, and shared pages count
           once (PSS). Pages of the files that are mapped belong to it, but can be given back, so
           memory without files is reported too.

Prints a line of JSON for each start: seconds to the first step, of which those before the stage
begins, and the peaks of memory in MiB.
"""

import argparse
import concurrent.futures
import dataclasses
import gzip
import json
import multiprocessing
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
from array_record.python import array_record_module
from tensorflow_datasets.proto import tf_example_pb2

from cai_jax.data import d_cai
from cai_jax.model import lm as models
from cai_jax.model.transformer import init_params
from cai_jax.runtime.files import replacing
from cai_jax.tiny.prompts import make_prompts

ROOT = pathlib.Path(__file__).parents[2]
SHARD_ROWS, ROUNDS, TURN_BYTES = 10_000, 2, 250
_SIMPO = {'data': 'implied', 'init': 'aligned', 'max_length': 2048, 'objective': 'simpo'}
# Stage, section of the config, folder in the workdir, and settings of each training.
TRAININGS = {
  'train': ('train', 'train', '', {'helpfulness_share': 0.0}),
  'simpo': ('prefer', 'prefer', 'prefer/policy', _SIMPO),
}


def read_sentences(texts: str) -> list[str]:
  """Return the sentences of a file of hh-rlhf, or of the embedded world's prompts.

  Args:
    texts: the file, `.jsonl.gz`; '' means the embedded world.
  """
  if not texts:
    prompts = make_prompts('pretrain', 2000, 0)
    return sorted({message['content'] for prompt in prompts for message in prompt.messages})
  with gzip.open(texts, 'rt', encoding='utf-8') as file:
    dialogues = [json.loads(line)['chosen'] for line in file]
  turns = [turn for text in dialogues for turn in re.split(r'\n\n(?:Human|Assistant):', text)]
  return sorted({s for turn in turns for s in re.split(r'(?<=[.!?])\s+', turn.strip()) if s})


def make_rows(sentences: list[str], begin: int, end: int) -> Iterator[dict[str, Any]]:
  """Yield rows of D_CAI, each of which depends on its number only.

  Args:
    sentences: what texts consist of.
    begin, end: range of numbers.
  """
  for number in range(begin, end):
    rng = random.Random(f'many rows/{number}')

    def text(rng: random.Random = rng) -> str:
      size, chosen = rng.expovariate(1 / TURN_BYTES), [rng.choice(sentences)]
      while sum(map(len, chosen)) < size:
        chosen.append(rng.choice(sentences))
      return ' '.join(chosen)

    def turn(rng: random.Random = rng) -> dict[str, Any]:
      written = text()
      length = len(written) // 4
      return {
        'text': written,
        'finish_reason': 'stop' if rng.random() < 0.98 else 'length',
        'logprob': -1.0 * length,
        'num_tokens': length,
      }

    roles = ('user', 'assistant', 'user') if rng.random() < 0.3 else ('user',)
    initial = turn()
    rounds = [{'principle': 'p', 'critique': turn(), 'revision': turn()} for _ in range(ROUNDS)]
    turns = [initial, *(step[name] for step in rounds for name in ('critique', 'revision'))]
    yield {
      'id': f'many/{number}',
      'kind': 'harmful',
      'prompt': [{'role': role, 'content': text()} for role in roles],
      'metadata': '{}',
      'initial': initial,
      'rounds': rounds,
      'logprobs': [-1.0] * sum(t['num_tokens'] for t in turns),
      'seed': 0,
      **dict.fromkeys(('model', 'critique_model', 'revision_model', 'constitution'), 'many rows'),
    }


def write_one(folder: str, index: int, count: int, texts: str) -> int:
  """Write one shard, and return the number of its rows.

  It has the bytes that `d_cai.write_shard` writes, which takes six times as long.
  """
  begin, end = index * SHARD_ROWS, min((index + 1) * SHARD_ROWS, count)
  with replacing(d_cai.shard_path(folder, index)) as temporary:
    writer = array_record_module.ArrayRecordWriter(str(temporary), 'group_size:1')
    for row in make_rows(read_sentences(texts), begin, end):
      example = tf_example_pb2.Example()
      for name, values in flatten_row(row):
        feature = example.features.feature[name]
        if isinstance(values[0], str):
          feature.bytes_list.value.extend(text.encode() for text in values)
        elif isinstance(values[0], float):
          feature.float_list.value.extend(values)
        else:
          feature.int64_list.value.extend(values)
      writer.write(example.SerializeToString(deterministic=True))
    writer.close()
  return end - begin


def flatten_row(value: Any, name: str = '') -> Iterator[tuple[str, list[Any]]]:
  """Yield the path and the values of each field of a row."""
  if isinstance(value, list) and isinstance(value[0], dict):
    for key in value[0]:
      parts = [dict(flatten_row(item[key], f'{name}/{key}')) for item in value]
      for path in parts[0]:
        yield path, [x for part in parts for x in part[path]]
  elif isinstance(value, dict):
    for key, item in value.items():
      yield from flatten_row(item, f'{name}/{key}' if name else key)
  else:
    yield name, value if isinstance(value, list) else [value]


def write_dataset(folder: pathlib.Path, count: int, texts: str) -> None:
  """Write a D_CAI with all cores, unless it is there.

  Args:
    folder: the folder of the dataset.
    count: number of rows.
    texts: as for `read_sentences`.
  """
  if (folder / d_cai.CHECKSUMS).exists():
    return
  folder.mkdir(parents=True, exist_ok=True)
  context = multiprocessing.get_context('spawn')
  with concurrent.futures.ProcessPoolExecutor(mp_context=context) as pool:
    shards = range(-(-count // SHARD_ROWS))
    jobs = [pool.submit(write_one, str(folder), i, count, texts) for i in shards]
    lengths = [job.result() for job in jobs]
  d_cai.write_metadata(folder, lengths)
  d_cai.write_checksums(folder)


def write_model(folder: pathlib.Path, tokenizer: str) -> None:
  """Save a small model with random weights, unless it is there.

  Args:
    folder: where to save it.
    tokenizer: folder of a model of the family llama, whose tokenizer and vocabulary it gets.
  """
  if (folder / 'config.json').exists():
    return
  lm = models.describe(tokenizer)
  sizes = {'num_layers': 2, 'd_model': 64, 'd_ff': 128, 'num_heads': 2, 'num_kv_heads': 1}
  config = dataclasses.replace(lm.config, **sizes, head_dim=32)
  params = init_params(config, jax.random.key(0))
  models.save(dataclasses.replace(lm, config=config, params=params), folder)


def sample_memory(root: int) -> tuple[float, float]:
  """Return the PSS of a process and all that it started, and its part without files, in MiB."""
  parents = {}
  for path in pathlib.Path('/proc').glob('[0-9]*/stat'):
    try:
      parents[int(path.parent.name)] = int(path.read_text().rpartition(')')[2].split()[1])
    except OSError:
      continue
  tree = {root}
  while more := {pid for pid, parent in parents.items() if parent in tree} - tree:
    tree |= more
  total = anonymous = 0
  for pid in tree:
    try:
      text = pathlib.Path(f'/proc/{pid}/smaps_rollup').read_text()
    except OSError:
      continue
    sizes = dict(re.findall(r'^(\w+): +(\d+) kB', text, re.MULTILINE))
    total += int(sizes.get('Pss', 0))
    anonymous += int(sizes.get('Pss_Anon', 0))
  return total / 1024, anonymous / 1024


def time_start(
  workdir: pathlib.Path, data: pathlib.Path, model: pathlib.Path, training: str
) -> dict[str, Any]:
  """Start a training, stop it after its first step, and return what it took.

  Args:
    workdir: folder of the run; if it has a checkpoint, the run resumes.
    data: the folder of D_CAI.
    model: the folder of the model.
    training: a key of `TRAININGS`.
  """
  stage, section, folder, options = TRAININGS[training]
  metrics, log = workdir / folder / 'metrics.jsonl', workdir.with_suffix('.log')
  seen = metrics.read_text().count('\n') if metrics.exists() else 0
  command = [sys.executable, '-u', str(ROOT / 'launch.py'), f'--stages={stage}']
  command += [f'--config={ROOT}/configs/tiny.py', f'--workdir={workdir}']
  role = 'init' if stage == 'train' else 'aligned'
  command += [f'--config.data.d_cai={data}', f'--config.model.{role}={model}']
  settings = {'epochs': 1, 'max_length': 1024, 'log_every': 1, 'checkpoint_every': 100000}
  settings |= options
  command += [f'--config.{section}.{name}={value}' for name, value in settings.items()]
  start, begun, peak, anonymous = time.perf_counter(), 0.0, 0.0, 0.0
  with open(log, 'w', encoding='utf-8') as output:
    process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
  while process.poll() is None:
    time.sleep(0.25)
    sizes = sample_memory(process.pid)
    peak, anonymous = max(peak, sizes[0]), max(anonymous, sizes[1])
    if not begun and f'{stage} ...' in log.read_text():
      begun = time.perf_counter() - start
    if metrics.exists() and metrics.read_text().count('\n') > seen:
      break
  seconds = time.perf_counter() - start
  process.send_signal(signal.SIGTERM)
  process.wait()
  if not begun:
    raise RuntimeError(log.read_text())
  return {
    'seconds': round(seconds, 1),
    'before_stage': round(begun, 1),
    'peak_mib': round(peak),
    'peak_without_files_mib': round(anonymous),
  }


def main() -> None:
  """Write the data sets, and time two starts of a training on each."""
  parser = argparse.ArgumentParser()
  parser.add_argument('--count', type=int, nargs='+', default=[1_000_000])
  parser.add_argument('--folder', type=pathlib.Path, required=True)
  parser.add_argument('--tokenizer', required=True)
  parser.add_argument('--texts', default='')
  parser.add_argument('--training', choices=TRAININGS, default='train')
  arguments = parser.parse_args()
  model = arguments.folder / 'model'
  write_model(model, arguments.tokenizer)
  for count in arguments.count:
    data = arguments.folder / f'd_cai_{count}'
    write_dataset(data, count, arguments.texts)
    workdir = arguments.folder / f'run_{count}'
    shutil.rmtree(workdir, ignore_errors=True)
    for start in ('new', 'resumed'):
      print(
        json.dumps(
          {'rows': count, 'start': start, **time_start(workdir, data, model, arguments.training)}
        )
      )
      sys.stdout.flush()


if __name__ == '__main__':
  main()
