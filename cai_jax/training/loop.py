"""The training loop: host side, thin; every number is made in `step` and `data`."""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import tensorboardX
from flax import nnx
from jax.sharding import Mesh

from cai_jax import parallel
from cai_jax.manifest import check_workdir
from cai_jax.model.weights import structure
from cai_jax.progress import Progress
from cai_jax.training import checkpoints, data
from cai_jax.training.config import FREE, TrainConfig
from cai_jax.training.step import abstract_state, init_state, make_optimizer, make_train_step


def fit(
  graph: nnx.GraphDef,
  params: Any,
  items: Sequence[data.Example],
  config: TrainConfig,
  mesh: Mesh,
  workdir: str | os.PathLike,
  buckets: Sequence[data.Bucket] = (),
  identity: str = '',
) -> tuple[Any, dict[str, Any]]:
  """(parameters after training on `items`, f32 on the mesh; summary of the run).

  Continues from the newest checkpoint in `workdir`, to bitwise the same end as a run that was never
  stopped; a run that is done only reads its result. Writes metrics.jsonl, tensorboard/ and
  checkpoints/ there.

  Args:
    graph, params: the model's halves; params are copied.
    items: what to train on.
    config: `batch_size` and `max_length` give the shape of the batches where `buckets` is empty.
    mesh: devices; batch rows are split over data × fsdp.
    workdir: folder, made where it is absent.
    buckets: shapes of batches, an example going to the shortest rows that hold it.
    identity: names `params`, so that a run is not gone on with from others, such as a fingerprint.

  Raises:
    ValueError: before the first step: nothing to train on, rows that the mesh does not divide, a
      workdir that cannot be written or holds another run.
    FloatingPointError: a loss or gradient norm that is not finite, naming the step.
  """
  buckets = buckets or (data.Bucket(config.max_length, config.batch_size),)
  for bucket in buckets:
    if bucket.rows % config.accumulation:
      raise ValueError(
        f'{bucket.rows} rows are not divided by train.accumulation={config.accumulation}.'
      )
    name = 'train.batch_size / train.accumulation'
    parallel.check_batch(bucket.rows // config.accumulation, mesh, name)
  steps = data.plan([len(item.tokens) for item in items], buckets, config.epochs, config.seed)
  workdir = pathlib.Path(workdir)
  check_workdir(workdir)
  meta = {
    **{k: v for k, v in dataclasses.asdict(config).items() if k not in FREE},
    'steps': len(steps),
    'data': fingerprint(items),
    'buckets': [list(bucket) for bucket in buckets],
    'init': identity,
  }

  train_step = make_train_step(graph, params, config, len(steps), mesh)
  optimizer = make_optimizer(config, len(steps))
  sharding = parallel.batch_sharding(mesh)
  iterator = data.iterate(data.Batches(items, steps), lambda b: _place(b, sharding))
  summary = {
    'steps': len(steps),
    'examples': len(items),
    'padding_share': data.padding_share(items, steps),
  }
  with checkpoints.make_checkpointer(workdir / 'checkpoints', config.keep) as checkpointer:
    abstract = abstract_state(params, optimizer, mesh)
    found = checkpoints.restore(checkpointer, abstract, iterator, meta)
    state, first = found or (init_state(params, optimizer, mesh), 0)
    with Log(workdir, first, len(steps), config.log_every) as log:
      for step in range(first, len(steps)):
        state, metrics = train_step(state, next(iterator))
        log.add(step, metrics)
        every = config.checkpoint_every
        if step + 1 == len(steps) or (every and (step + 1) % every == 0):
          log.flush()  # which refuses numbers that are not finite: they are never saved
          checkpoints.save(checkpointer, step + 1, state, iterator, meta)
      summary |= log.summary()
  return state.params, summary


def train(
  lm,
  rows: Sequence[dict[str, Any]],
  dialogue,
  config: TrainConfig,
  workdir: str | os.PathLike,
) -> tuple[Any, dict[str, Any]]:
  """(parameters of `lm` fine-tuned on D_CAI, summary with the examples' counts); see `fit`.

  Args:
    lm: LM to start from; it is left as it is.
    rows: of D_CAI, such as `data.read_rows` gives.
    dialogue: Dialogue of the tokenizer.
    config: settings.
    workdir: folder for metrics, events and checkpoints.

  Raises:
    ValueError: as `fit` and `data.examples`, and for rows longer than the model's context.
  """
  if config.max_length > lm.config.max_positions:
    raise ValueError(
      f'train.max_length={config.max_length} is more than the {lm.config.max_positions} tokens of '
      f'the context of {lm.name}.'
    )
  found = data.examples(
    rows,
    dialogue,
    target=config.target,
    helpfulness_share=config.helpfulness_share,
    max_length=config.max_length,
    drop_truncated=config.drop_truncated,
    seed=config.seed,
  )
  graph, _ = structure(lm.config, config.dtype)
  params, summary = fit(
    graph, lm.params, found.items, config, lm.mesh, workdir, identity=lm.fingerprint
  )
  return params, {**found.counts, **summary}


def fingerprint(items: Sequence[data.Example]) -> str:
  """Hex digest of the examples, in their order."""
  digest = hashlib.sha256()
  for tokens, mask in items:
    digest.update(np.int64(len(tokens)).tobytes() + tokens.tobytes() + mask.tobytes())
  return digest.hexdigest()[:32]


def _place(batch: dict[str, np.ndarray], sharding) -> dict[str, jax.Array]:
  """The batch as global arrays; each host gives its devices their rows of it."""
  return {
    name: jax.make_array_from_callback(x.shape, sharding, lambda index, x=x: x[index])
    for name, x in batch.items()
  }


class Log:
  """Metrics of a run: one row a logged step in metrics.jsonl, TensorBoard events, progress.

  Numbers are fetched a step late, so that the device never waits for the host. On a resumed run
  the rows at and after the first step are cut away: no step stands there twice.
  """

  def __init__(self, workdir: pathlib.Path, first: int, total: int, every: int):
    self._first, self._total, self._every = first, total, every
    self._waiting = None
    self._last = {}
    self._tokens = 0.0
    self._began = time.monotonic()
    self._speaks = jax.process_index() == 0
    if not self._speaks:
      return
    path = workdir / 'metrics.jsonl'
    _cut(path, first)
    self._file = path.open('a')
    # Events at and after the purge step are hidden; step `first`, counted from 1, is done.
    self._events = tensorboardX.SummaryWriter(str(workdir / 'tensorboard'), purge_step=first + 1)
    self._progress = Progress('train', 'step', first)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    if self._speaks:
      self._file.close()
      self._events.close()
      self._progress.close()

  def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
    """Takes the metrics of step 0, 1, ..., and writes those of the step before."""
    waiting, self._waiting = self._waiting, (step, metrics)
    self._write(waiting)

  def flush(self) -> None:
    """Writes what is waiting.

    Raises:
      FloatingPointError: as `add`.
    """
    waiting, self._waiting = self._waiting, None
    self._write(waiting)

  def summary(self) -> dict[str, float]:
    """Seconds, target tokens and last metrics of what this process did of the run."""
    seconds = time.monotonic() - self._began
    return {
      'resumed_at': self._first,
      'seconds': seconds,
      'target_tokens': self._tokens,
      'target_tokens_per_second': self._tokens / max(seconds, 1e-9),
      **{f'last_{k}': v for k, v in self._last.items() if k in ('loss', 'grad_norm')},
    }

  def _write(self, waiting) -> None:
    if waiting is None:
      return
    step, metrics = waiting
    row = {name: float(value) for name, value in jax.device_get(metrics).items()}
    for name in ('loss', 'grad_norm'):
      if not math.isfinite(row[name]):
        raise FloatingPointError(
          f'{name} is {row[name]} at step {step + 1}: lower train.learning_rate, set '
          'train.clip_norm, or look at the data. The checkpoints before it are kept.'
        )
    self._tokens += row['num_tokens']
    self._last = row
    if not self._speaks:
      return
    last = step + 1 == self._total
    if (step + 1) % self._every == 0 or last:
      self._file.write(json.dumps({'step': step + 1, **row}) + '\n')
      self._file.flush()
      for name, value in row.items():
        self._events.add_scalar(f'train/{name}', value, step + 1)
    self._progress(step + 1, self._total, int(self._tokens), f'loss {row["loss"]:.4g}')


def _cut(path: pathlib.Path, first: int) -> None:
  """Keeps the whole rows of metrics.jsonl up to step `first`."""
  if not path.exists():
    return
  lines = path.read_bytes().split(b'\n')[:-1]
  kept = [line for line in lines if json.loads(line)['step'] <= first]
  scratch = path.with_suffix('.tmp')
  scratch.write_bytes(b''.join(line + b'\n' for line in kept))
  os.replace(scratch, path)
