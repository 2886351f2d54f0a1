"""What an experiment will take, told before it runs: turns, tokens, time and memory."""

import dataclasses
import hashlib
import json
import pathlib
import tempfile
import time
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cai_jax import pipeline
from cai_jax.feedback import generate
from cai_jax.feedback.variants import VARIANTS
from cai_jax.model import lm as models
from cai_jax.model.lm import LM
from cai_jax.runtime.files import write_json
from cai_jax.runtime.manifest import Manifest
from cai_jax.sampling import device
from cai_jax.sampling.journal import Journal

PROBED = 64  # chains that are sampled to learn how fast it goes
STARTING = 3.0  # seconds that a run takes beside sampling and training: loading, compiling, writing
REACHED = 0.35  # share of its products' bare speed that a train step of ours reaches; RESULTS.md
PROCESS_GIB = 1.0  # of a process that has done nothing but import and compile


@dataclasses.dataclass(frozen=True)
class Turns:
  """Turns of one kind: how many, and how long they can be."""

  count: int
  max_tokens: int


def turns(run: pipeline.Run, stages: Sequence[str]) -> dict[str, Turns]:
  """The turns that a run needs, under names that are equal for equal turns of other runs.

  A name is a digest of all that the texts depend on, as far as a config tells it: of the rounds
  before a turn, but not of those after it.
  """
  found = _chains(run, ('harmful', 'helpful'), 'base')
  if 'evaluate' in stages:
    found |= _chains(run, ('eval_harmful', 'eval_helpful'), 'base')
    found |= _chains(run, ('eval_harmful', 'eval_helpful'), _digest(run.settings('train')))
  return found


def _chains(run: pipeline.Run, names: Sequence[str], model: str) -> dict[str, Turns]:
  """Turns of the chains over two prompt sets by M_θ ('base'), or by a model that only answers."""
  settings = run.settings('evaluate')
  feedback = {k: v for k, v in settings['feedback'].items() if k not in ('rounds', 'shard_rows')}
  answered = [
    settings['seed'],
    model,
    settings['model']['base'] if model == 'base' else '',
    settings['sampling']['initial'],
    [feedback[k] for k in ('style', 'template_options')],
  ]
  revised = [
    answered,
    settings['model'] | {'init': ''},
    settings['sampling'],
    feedback,
    settings['constitution'],
    settings.get('remote'),
  ]
  found = {}
  for name in names:
    samples = run.feedback.helpful_samples if name == 'helpful' else 1
    count, prompts = samples * len(run.prompts[name]), [settings['prompts'][name], samples]
    found[_digest([answered, prompts])] = Turns(count, run.sampling.initial.max_tokens)
    if model != 'base' or name.endswith('helpful'):
      continue
    for turn, stage in VARIANTS[run.feedback.variant].turns(run.feedback.rounds):
      if turn != 'initial':  # counted above, since runs with other variants share it
        limit = getattr(run.sampling, stage).max_tokens
        found[_digest([revised, prompts, turn])] = Turns(count, limit)
  return found


class Known:
  """Names of turns that the journal of a workdir holds already, kept in a file beside it."""

  def __init__(self, workdir: pathlib.Path):
    self._path = workdir / 'journal' / 'known.json'
    self.names = set(json.loads(self._path.read_text())) if self._path.exists() else set()

  def add(self, names: Mapping[str, Turns]) -> None:
    """Adds the turns of a run that is done."""
    self.names |= set(names)
    write_json(self._path, sorted(self.names))


def describe(
  name: str,
  runs: Mapping[pathlib.Path, tuple[pipeline.Run, Sequence[str]]],
  known: Known,
) -> str:
  """Lines of text: each run's turns, and what all of them will take.

  To learn the speed, 64 chains of the first run that is left are sampled twice, into a folder that
  is then removed, and its model's products are timed.

  Raises:
    ValueError: if that run's models cannot be loaded.
  """
  lines = [f'{name}: {len(runs)} runs']
  seen = set(known.names)
  total, tokens, left = 0, 0, {}
  for folder, (run, stages) in runs.items():
    needed = turns(run, stages)
    new = {k: v for k, v in needed.items() if k not in seen}
    seen |= set(needed)
    count, whole = sum(t.count for t in new.values()), sum(t.count for t in needed.values())
    total += count
    tokens += sum(t.count * t.max_tokens for t in new.values())
    manifest = Manifest(folder, writes=False)
    waiting = [stage for stage in stages if not manifest.done(stage)]
    if waiting:
      left[folder] = run, waiting
    told = ', '.join(waiting) if waiting else 'done before'
    lines.append(
      f'  {folder.name}\n    {told}; {count:,} turns to sample, {whole - count:,} shared'
    )
  if not left:
    return '\n'.join([*lines, 'nothing is left to do but the report'])
  lines.append(f'{total:,} turns to sample, of {tokens:,} tokens at most')
  lines.append(_cost(left, total))
  return '\n'.join(lines)


def _cost(left: Mapping[pathlib.Path, tuple[pipeline.Run, Sequence[str]]], count: int) -> str:
  """A line of the time and memory that the runs which are left take, by a probe of the first."""
  run = next(iter(left.values()))[0]
  with pipeline.loaded_models(run) as loaded:
    speed, length, slot_length = _probe(run, loaded)
    base = loaded['base']
  sampling = count / speed
  trained = [(run, s) for run, s in left.values() if 'train' in s]
  training = sum(_training_seconds(run, length) for run, _ in trained)
  seconds = sampling + training + STARTING * len(left)
  memory = PROCESS_GIB
  if isinstance(base, LM):
    caches = run.engine.slots * device.cache_bytes(base, slot_length, run.engine.slack)
    memory += min(caches / 2**30, run.engine.cache_gib)
    copies = 7 if trained else 1  # result, initial, two moments, gradient, and two while saved
    memory += 4 * base.config.num_params * copies / 2**30
  return (
    f'about {seconds / 60:.1f} minutes here: {sampling / 60:.1f} sampling ({speed:,.0f} turns a '
    f'second, by {PROBED} chains), {training / 60:.1f} training ({len(trained)} times); about '
    f'{memory:.1f} GiB of memory'
  )


def _probe(run: pipeline.Run, loaded) -> tuple[float, float, int]:
  """(turns a second, tokens of a prompt with its reply, tokens of a slot), by sampling some."""
  harmful = run.prompts['harmful']
  more = harmful[PROBED : 2 * PROBED]
  halves = harmful[:PROBED], more if len(more) == PROBED else harmful[:PROBED]
  with tempfile.TemporaryDirectory() as folder:
    for number, prompts in enumerate(halves):  # the first compiles
      job = pipeline.prepare_job(run, loaded, prompts, [])
      where = pathlib.Path(folder) / str(number)
      journal = Journal(where / 'journal')
      began = time.perf_counter()
      counts = generate.generate_shards(job, where / 'd_cai', journal, run.engine)
      seconds = time.perf_counter() - began
      journal.close()
  prompt = np.mean([len(job.stages.initial.dialogue.prompt(p.messages)) for p, _ in job.prompts])
  return counts['turns'] / seconds, prompt + counts['sampled_tokens'] / counts['turns'], job.length


def _training_seconds(run: pipeline.Run, length: float) -> float:
  """About how long fine-tuning takes: its floating-point operations at the speed of products."""
  section = run.config['model']
  config = models.check(pipeline.model_path(section['init'] or section['base'])).config
  examples = len(run.prompts['harmful'])
  examples *= run.feedback.rounds if run.train.target == 'all' else 1
  examples /= 1 - run.train.helpfulness_share
  work = config.training_flops([round(length)]) * examples * run.train.epochs
  x, w = jnp.ones((2048, config.d_model)), jnp.ones((config.d_model, config.d_ff))
  product = jax.jit(lambda x, w: x @ w)
  product(x, w).block_until_ready()
  began, times = time.perf_counter(), 20
  for _ in range(times):
    product(x, w).block_until_ready()
  flops = 2 * times * x.size * config.d_ff / (time.perf_counter() - began)
  return work / (REACHED * flops * len(jax.devices()))


def _digest(value) -> str:
  content = json.dumps(value, sort_keys=True, default=str)
  return hashlib.sha256(content.encode()).hexdigest()[:16]
