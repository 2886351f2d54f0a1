"""Runs the chains of a job over the engine and writes the shards of D_CAI as they fill."""

import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from cai_jax.data import d_cai
from cai_jax.data import quality as quality
from cai_jax.data.prompts import Prompt
from cai_jax.feedback.job import Job, each_stage, shortest_context
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import write_json
from cai_jax.sampling.engine import Engine, EngineConfig, Stats
from cai_jax.sampling.journal import Journal
from cai_jax.sampling.types import Chain


def run(
  job: Job,
  folder: str | os.PathLike,
  journal: Journal,
  engine: EngineConfig,
  progress: Callable[[int, int, int], None] = lambda done, total, tokens: None,
) -> dict[str, Any]:
  """Writes D_CAI to `folder`, and returns counts and speeds for the manifest.

  Shards that are there already are kept. Several processes call this together: the shards that
  are missing are dealt out evenly among those that started this time, however many had worked on
  the others, and every process reads the journals of all. So a lost process leaves nothing that
  the next start cannot finish. This needs a `folder` and a journal that all processes share. All
  bytes of the shards depend on the job alone.

  Args:
    job: what to sample.
    folder: of the dataset; `preferences.jsonl` is written beside it.
    journal: of finished turns.
    engine: sizes of the compiled programs.
    progress: called with rows done, rows in all (of this process), and tokens sampled.

  Raises:
    ValueError: if the folder is another job's, or this process does not share it.
  """
  folder = pathlib.Path(folder)
  size = job.config.shard_rows
  count = -(-len(job.prompts) // size)
  mine = _missing(folder, job, count)[jax.process_index() :: jax.process_count()]
  lengths = {index: min(size, len(job.prompts) - index * size) for index in mine}
  total = sum(lengths.values())
  stats = Stats()
  if total:
    running = Engine(
      {stage.model: job.models[stage.model] for stage in each_stage(job.stages)},
      length=min(job.length + engine.spare_tokens, shortest_context(job)),
      seed=job.seed,
      config=engine,
      journal=journal,
      stops={
        s.model: (s.dialogue.stop_token_ids, s.dialogue.stop_strings)
        for s in each_stage(job.stages)
      },
      prefixes=job.prefixes,
    )
    stats = running.stats
    numbers = (i for index in mine for i in range(index * size, index * size + lengths[index]))
    rows: dict[int, dict[int, dict]] = {}  # of the shards that are begun: number → row
    for done, (_, (number, row)) in enumerate(running.run(_rows(job, numbers)), 1):
      index = number // size
      rows.setdefault(index, {})[number] = row
      if len(rows[index]) == lengths[index]:
        whole = rows.pop(index)
        d_cai.write_shard(folder, index, [whole[number] for number in sorted(whole)])
      progress(done, total, stats.sampled_tokens)
  return {'rows': len(job.prompts), 'sampled_rows': total, **stats.summary()}


def _rows(job: Job, numbers: Iterable[int]) -> Iterator[tuple[str, Chain]]:
  """(id, chain) of the prompts with these numbers; a chain returns (number, row of D_CAI)."""

  def chain(number: int, prompt: Prompt, kind: str) -> Chain:
    record = yield from job.chain(prompt, kind)
    return number, job.row(record, kind)

  for number in numbers:
    prompt, kind = job.prompts[number]
    yield prompt.id, chain(number, prompt, kind)


def _missing(folder: pathlib.Path, job: Job, count: int) -> list[int]:
  """Which of the `count` shards are not there: the same list in every process.

  Process 0 looks, before any process writes, and tells the others: one that looked for itself, a
  little later, would miss shards that quicker ones have written, and deal otherwise than they do.
  """
  there, mark = np.zeros(count, np.int32), {'digest': job.digest()}
  if jax.process_index() == 0:
    _claim(folder, mark)
    there[:] = [d_cai.shard_path(folder, index).exists() for index in range(count)]
  if jax.process_count() > 1:
    there = multihost_utils.broadcast_one_to_all(there)
  _check_claim(folder, mark)
  return np.flatnonzero(there == 0).tolist()


def _claim(folder: pathlib.Path, mark: dict[str, str]) -> None:
  """Marks a folder as a job's, unless it has a mark."""
  path = folder / 'job.json'
  if not path.exists():
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, mark)


def _check_claim(folder: pathlib.Path, mark: dict[str, str]) -> None:
  """ValueError unless the folder has this job's mark: no shard of another is taken over."""
  path = folder / 'job.json'
  if not path.exists():
    raise UserError(
      f'process {jax.process_index()} does not see {path}, which process 0 has written: all '
      'processes need the same workdir on a filesystem that they share.'
    )
  if json.loads(path.read_text()) != mark:
    raise UserError(
      f'{folder} holds shards of another job: a model, prompt, principle or setting has changed '
      'since. Delete the folder, or use another workdir.'
    )


def finish(job: Job, folder: str | os.PathLike) -> None:
  """Makes the shards of all processes one TFDS dataset. Called by one process, after all others."""
  size, count = job.config.shard_rows, len(job.prompts)
  d_cai.write_metadata(folder, [min(size, count - i) for i in range(0, count, size)])
