"""How many chains per second can one host feed, and does its memory stay flat over a million?

Command:   python -m experiments.bench.host --chains=1000000 [--journal] [--mode=turns] [--profile]
Hardware:  any; RESULTS.md has results of one of two CPU cores
Modes:     tokens    five turns of token ids in a growing context, without rendering
           turns     two rounds of critique and revision with the embedded model's dialogue: texts
                     are rendered, tokenized and decoded as in a run
           run       everything that `feedback.generate.generate_shards` does: choose principles,
                     make rows, write shards
Method:    stubs replace the device programs. They cost nothing and end the turn of every active
           slot at once, with a reply of the embedded world in which a few tokens are random, so
           that no reply repeats. Chains come from a generator and results are discarded.

Prints JSON: chains per second of one host, by wall-clock time and by CPU time (which is what counts
on a shared machine), resident memory over the run, and bytes of the journal. With --profile, also
the ten most expensive functions on stderr; the profiler itself doubles the time.
"""

import argparse
import contextlib
import copy
import cProfile
import dataclasses
import json
import os
import pathlib
import pstats
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from unittest import mock

import numpy as np

from cai_jax.constitution import ConstitutionConfig, load_constitution
from cai_jax.data.prompts import Prompt
from cai_jax.dialogue.messages import REPLY_ROLES
from cai_jax.feedback import generate
from cai_jax.feedback import job as jobs
from cai_jax.feedback.config import FeedbackConfig, StageSampling
from cai_jax.model import lm as models
from cai_jax.runtime.mesh import make_mesh
from cai_jax.sampling import caches, device
from cai_jax.sampling.config import EngineConfig
from cai_jax.sampling.engine import Engine
from cai_jax.sampling.journal import Journal
from cai_jax.sampling.step_arrays import Burst
from cai_jax.sampling.types import SamplingConfig, Turn
from cai_jax.tiny import corpus, prompts
from cai_jax.tiny.files import MODELS

LONGEST = 64  # most tokens of a reply, which fit one burst
READY = types.SimpleNamespace(block_until_ready=lambda: None)  # the result of a prefilled chunk
ENGINE = EngineConfig(slots=64, prefill_tokens=512, longest_burst=LONGEST)
ROUNDS = 2
MILESTONES = [n * 10**e for e in range(3, 10) for n in (1, 2, 5)]  # chains


class Stub:
  """Device programs that cost nothing and end every active slot's turn with one of `replies`.

  Args:
    replies: token ids, at most LONGEST each, ending with a stop token.
  """

  def __init__(self, replies: list[list[int]]):
    self._rng = np.random.default_rng(0)
    self._counts = np.array([len(reply) for reply in replies], np.int32)
    self._tokens = np.zeros((len(replies), LONGEST), np.int32)
    for row, reply in zip(self._tokens, replies, strict=True):
      row[: len(reply)] = reply
    self._words = np.unique([token for reply in replies for token in reply[:-1]])
    self._logprobs = -self._rng.exponential(size=(97, LONGEST)).astype(np.float32)

  def run(self, spec, params, cache, prefixes, rows, tables, chunk, *_):
    """Return a random reply for each active row, in place of `device.run`.

    A step with prefill only prefills, so that replies never exceed the pages of their slots.
    """
    if rows is None:
      return READY, cache, ()
    active = np.array(rows.active)
    chosen = self._rng.integers(len(self._counts), size=len(active))
    tokens = self._tokens[chosen]
    tokens[:, :3] = self._rng.choice(self._words, (len(active), 3))
    count = np.where(active & (chunk is None), self._counts[chosen], 0)
    logprobs = self._logprobs[chosen % len(self._logprobs)]
    unfinished = active & (chunk is not None)
    steps = np.int32(count.max())
    return Burst(tokens, logprobs, count, unfinished, steps, count), cache, ()

  @contextlib.contextmanager
  def installed(self):
    """Replace the device programs by the stubs within a `with` block."""
    layers = lambda lm, *_: (None,) * lm.config.num_layers  # noqa: E731
    with (
      mock.patch.object(device, 'run', self.run),
      mock.patch.object(caches, 'allocate_block', layers),
      mock.patch.object(device, 'prefill_prefix', lambda *_: ()),
      mock.patch.object(caches, 'move_pages', lambda target, *_: target),
    ):
      yield


@dataclasses.dataclass(frozen=True)
class Prompts:
  """A sequence of `count` prompts that are made on access, in place of `Job.prompts`."""

  count: int
  base: list[Prompt]

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, at: int) -> tuple[Prompt, str]:
    if not 0 <= at < self.count:
      raise IndexError(at)
    prompt = copy.copy(self.base[at % len(self.base)])  # skips the checks of the constructor
    object.__setattr__(prompt, 'id', f'prompt-{at}')
    return prompt, 'harmful'


def make_job(count: int) -> jobs.Job:
  """Return a job of the embedded world with `count` prompts."""
  mesh = make_mesh()
  lm = dataclasses.replace(models.load(MODELS['tiny'], mesh=mesh), name='tiny')
  short = SamplingConfig(max_tokens=LONGEST)
  base = prompts.make_prompts('train', 1000, 0)
  job = jobs.prepare(
    {'base': lm},
    base,
    [],
    load_constitution(ConstitutionConfig('tiny')),
    FeedbackConfig(rounds=ROUNDS),
    StageSampling(short, short, short),
    seed=0,
  )
  return dataclasses.replace(job, prompts=Prompts(count, base))


def replies(job: jobs.Job) -> list[list[int]]:
  """Return replies of the embedded world as token ids."""
  dialogue = job.stages.initial.dialogue
  documents = corpus.make_documents(400, 0)
  texts = (m['content'] for messages in documents for m in messages if m['role'] in REPLY_ROLES)
  return [reply for reply in map(dialogue.reply, texts) if len(reply) <= LONGEST]


def token_chain(context: list[int]):
  """Yield as many turns as a critique chain has, on token ids only."""
  sampling = SamplingConfig(max_tokens=LONGEST)
  for number in range(1 + 2 * ROUNDS):
    completion = yield Turn(f'turn_{number}', context, sampling)
    context = context + completion.tokens + [5, 6, 7, 8] * 4


def chains(mode: str, job: jobs.Job) -> Iterator[tuple[str, object]]:
  """Yield (id, chain) for each prompt."""
  if mode == 'turns':
    yield from ((prompt.id, job.chain(prompt, kind)) for prompt, kind in job.prompts)
  else:
    yield from ((str(i), token_chain([9] * 64)) for i in range(len(job.prompts)))


def resident_mib() -> float:
  """Return the resident memory of this process in MiB."""
  pages = int(pathlib.Path('/proc/self/statm').read_text().split()[1])
  return pages * os.sysconf('SC_PAGE_SIZE') / 2**20


class MemoryWatch:
  """A callable that counts finished chains and reads memory at each of MILESTONES."""

  def __init__(self):
    self.start, self.done, self.resident_mib = time.perf_counter(), 0, {}

  def __call__(self, *_) -> None:
    self.done += 1
    if self.done in MILESTONES:
      self.resident_mib[self.done] = round(resident_mib(), 1)
      seconds = time.perf_counter() - self.start
      print(
        f'{self.done} chains, {self.done / seconds:.0f}/s, {self.resident_mib[self.done]} MiB',
        file=sys.stderr,
        flush=True,
      )


def run_chains(
  mode: str, job: jobs.Job, folder: pathlib.Path, journal: Journal | None
) -> MemoryWatch:
  """Run all chains in one of the modes, and return the watch that counted them.

  Args:
    mode: 'tokens', 'turns' or 'run'.
    job: holds the prompts.
    folder: of the dataset that mode 'run' writes.
    journal: of the sampled turns; mode 'run' needs one.
  """
  watch = MemoryWatch()
  if mode == 'run':
    assert journal is not None, 'mode run needs a journal'
    generate.generate_shards(job, folder / 'd_cai', journal, ENGINE, watch)
    return watch
  dialogue = job.stages.initial.dialogue
  stops = {'base': (dialogue.stop_token_ids, dialogue.stop_strings)}
  engine = Engine(job.models, length=512, seed=0, config=ENGINE, journal=journal, stops=stops)
  for result in engine.run(chains(mode, job)):
    watch(result)
  return watch


def main() -> None:
  """Run one mode and print the result."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments.bench.host',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--chains', type=int, default=20_000)
  parser.add_argument('--mode', choices=('tokens', 'turns', 'run'), default='tokens')
  parser.add_argument('--journal', action='store_true', help='keep one; --mode=run always does')
  parser.add_argument(
    '--folder', default=None, help='for a temporary folder with the journal and the shards'
  )
  parser.add_argument('--profile', action='store_true', help='profile the host code')
  args = parser.parse_args()
  job = make_job(args.chains)
  stub = Stub(replies(job))
  with tempfile.TemporaryDirectory(dir=args.folder) as folder, stub.installed():
    folder = pathlib.Path(folder)
    journal = Journal(folder / 'journal') if args.journal or args.mode == 'run' else None
    profiler = cProfile.Profile()
    start, cpu = time.perf_counter(), time.process_time()
    with profiler if args.profile else contextlib.nullcontext():
      watch = run_chains(args.mode, job, folder, journal)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    turns = args.chains * (1 + 2 * ROUNDS)
    print(
      json.dumps(
        {
          'mode': args.mode,
          'journal': journal is not None,
          'chains': args.chains,
          'seconds': round(seconds, 1),
          'cpu_seconds': round(cpu, 1),
          'chains_per_second': round(args.chains / seconds, 1),
          'chains_per_cpu_second': round(args.chains / cpu, 1),
          'cpu_microseconds_a_turn': round(1e6 * cpu / turns, 1),
          'resident_mib': watch.resident_mib,
          'journal_bytes': sum(p.stat().st_size for p in (folder / 'journal').glob('*')),
        },
        indent=2,
      )
    )
  if args.profile:
    pstats.Stats(profiler, stream=sys.stderr).sort_stats('tottime').print_stats(10)


if __name__ == '__main__':
  main()
