"""A tiny model, settings and random examples that the tests of training share."""

import contextlib
import functools
import json

import jax
import numpy as np
import pytest

from cai_jax.data.units import Example
from cai_jax.model.config import ModelConfig
from cai_jax.model.transformer import init_params
from cai_jax.runtime.mesh import make_mesh
from cai_jax.training import loop
from cai_jax.training.config import TrainConfig
from cai_jax.training.log import TrainingLog

MODEL = ModelConfig('qwen2', 48, 16, 32, 1, 4, 4, 8, 64, qkv_bias=True)
# Adam divides a tiny gradient by its own size, which would turn rounding errors into whole steps.
# A large eps keeps them small, so parameters can be compared.
CONFIG = TrainConfig(
  attention='blocks',
  epochs=2,
  batch_size=8,
  max_length=32,
  learning_rate=1e-2,
  warmup=0.2,
  weight_decay=0.1,
  eps=1e-2,
)


class Killed(Exception):
  """Ends a run where a test would kill it."""


@contextlib.contextmanager
def killed_before(step):
  """Expect the training inside to be killed before its row of this step is logged."""
  log_step = TrainingLog.log_step

  def failing(self, current, metrics):
    if current == step:
      raise Killed
    log_step(self, current, metrics)

  with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
    patch.setattr(TrainingLog, 'log_step', failing)
    yield


@pytest.fixture(scope='module')
def compile_once():
  """Lets the runs of a file share their train steps, which have no state."""
  compiled = {}
  make_train_step = loop.make_train_step

  def make(graph, params, config, num_steps, mesh, frozen):
    key = graph, config, num_steps, mesh
    if key not in compiled:
      compiled[key] = make_train_step(graph, params, config, num_steps, mesh, frozen)
    return compiled[key]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, 'make_train_step', make)
    yield


@functools.cache
def initial_params():
  return init_params(MODEL, jax.random.key(0))


def random_examples(count=70, seed=0):
  """Random examples of 4 to 24 tokens, whose second half is to be learned."""
  rng = np.random.default_rng(seed)
  return [
    Example(rng.integers(0, 48, n).astype(np.int32), np.arange(n) >= n // 2, f'row {i}')
    for i, n in enumerate(rng.integers(4, 25, count))
  ]


def one_device():
  return make_mesh(devices=jax.devices()[:1])


def bitwise_equal(a, b):
  return all(
    np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )


def read_rows(workdir, file='metrics.jsonl'):
  return [json.loads(line) for line in (workdir / file).read_text().splitlines()]
