"""Training: the same parameters in any partition of the work, and after any interruption."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tensorboardX.proto import event_pb2

from cai_jax.data import packing
from cai_jax.data.examples import Example
from cai_jax.dialogue import Dialogue
from cai_jax.model.config import ModelConfig
from cai_jax.model.lm import LM
from cai_jax.model.sharding import path_str
from cai_jax.model.transformer import abstract_model, init_params
from cai_jax.runtime.mesh import batch_sharding, make_mesh
from cai_jax.training import checkpoints, log, loop, objective, step
from cai_jax.training.config import TrainConfig

MODEL = ModelConfig('qwen2', 48, 16, 32, 1, 4, 4, 8, 64, qkv_bias=True)
GRAPH, SHAPES = abstract_model(MODEL)
# Adam divides a gradient that is next to nothing by its own size; with a large eps its rounding
# error stays one, and parameters can be compared.
CONFIG = TrainConfig(
  epochs=2,
  batch_size=8,
  max_length=32,
  learning_rate=1e-2,
  warmup=0.2,
  weight_decay=0.1,
  eps=1e-2,
)


@pytest.fixture(scope='module')
def params():
  return init_params(MODEL, jax.random.key(0))


@pytest.fixture(scope='module')
def items():
  rng = np.random.default_rng(0)
  return [
    Example(rng.integers(0, 48, n).astype(np.int32), np.arange(n) >= n // 2)
    for n in rng.integers(4, 25, 70)
  ]


def one_device():
  return make_mesh(devices=jax.devices()[:1])


def same(a, b):
  """Bitwise."""
  return all(
    np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )


def run_steps(params, items, config, mesh, count=4):
  """(params, metrics of each step) after the first `count` steps."""
  steps = packing.plan([len(i.tokens) for i in items], [packing.Bucket(32, 8)], 6, 0)
  batches = packing.Batches(items, steps)
  train_step = step.make_train_step(GRAPH, SHAPES, config, len(steps), mesh)
  state = step.init_state(params, config, mesh)
  metrics = []
  for i in range(count):
    state, got = train_step(state, loop._place(batches[i], batch_sharding(mesh)))
    metrics.append(jax.device_get(got))
  return state, metrics


@pytest.fixture(scope='module')
def reference(params, items):
  state, metrics = run_steps(params, items, CONFIG, one_device())
  return jax.device_get(state.params), metrics


def agree(found, reference, tolerance=1e-5):
  (state, metrics), (params, expected) = found, reference
  for got, want in zip(metrics, expected, strict=True):
    for name in want:
      assert got[name] == pytest.approx(want[name], rel=tolerance), name
  for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True):
    np.testing.assert_allclose(a, b, atol=tolerance)


@pytest.fixture(scope='module')
def twenty(params, items):
  state, metrics = run_steps(params, items, CONFIG, one_device(), count=20)
  return jax.device_get(state.params), metrics


@pytest.mark.parametrize('sizes', [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)])
def test_eight_devices_equal_one_after_twenty_steps(params, items, twenty, sizes):
  mesh = make_mesh(*sizes)
  state, metrics = run_steps(params, items, CONFIG, mesh, count=20)
  agree((state, metrics), twenty)
  # Moments lie as their parameters do.
  for moments in (state.opt_state[1][0].mu, state.opt_state[1][0].nu):
    jax.tree.map(lambda m, p: m.sharding == p.sharding or pytest.fail(), moments, state.params)
  kernel = state.params['layers'][0]['mlp']['up']['kernel']
  assert kernel.addressable_shards[0].data.size * sizes[1] * sizes[2] == kernel.size


def compiled_step(config, mesh):
  steps = step.make_train_step(GRAPH, SHAPES, config, 4, mesh)
  shapes = step.abstract_state(SHAPES, config, mesh)
  names = ('tokens', 'positions', 'segment_ids', 'loss_mask')
  batch = {name: jax.ShapeDtypeStruct((8, 32), jnp.int32) for name in names}
  return steps.lower(shapes, batch).compile().as_text()


def test_no_device_holds_the_activations_of_all_rows():
  """Rows stay split where parameters are: logits [8,32,48] of the batch stand nowhere whole."""
  text = compiled_step(CONFIG, make_mesh(1, 8, 1))
  assert 'f32[1,32,48]' in text and 'f32[8,32,48]' not in text


def test_remat_keeps_less_and_changes_nothing(params, items, reference):
  """Residual bytes by shapes, since XLA for CPUs computes a thing once that is asked for twice."""
  batch = packing.Batches(items, [packing.Step(packing.Bucket(32, 8), ((0,), (1,)))])[0]

  def residual_bytes(remat):
    f = lambda p: objective.loss_and_metrics(GRAPH, p, batch, remat=remat)[0]  # noqa: E731
    residuals = jax.eval_shape(lambda p: jax.vjp(f, p)[1], SHAPES)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(residuals))

  assert residual_bytes('full') < 0.9 * residual_bytes('dots')
  assert residual_bytes('dots') < 0.9 * residual_bytes('none')
  for remat in ('dots', 'full'):
    config = dataclasses.replace(CONFIG, remat=remat)
    agree(run_steps(params, items, config, one_device(), count=4), reference)


@pytest.mark.parametrize('normalization', ['sequence', 'token'])
def test_accumulation_equals_one_batch(params, items, reference, normalization):
  config = dataclasses.replace(CONFIG, loss_normalization=normalization)
  mesh = make_mesh(2, 1, 1, devices=jax.devices()[:2])
  whole = reference
  if normalization == 'token':
    state, metrics = run_steps(params, items, config, one_device())
    whole = state.params, metrics
  agree(run_steps(params, items, dataclasses.replace(config, accumulation=4), mesh), whole)


def test_loss_is_the_mean_over_sequences_or_tokens(params, items, reference):
  first = reference[1][0]
  _, (token, *_) = run_steps(
    params, items, dataclasses.replace(CONFIG, loss_normalization='token'), one_device(), 1
  )
  assert first['loss'] * first['num_sequences'] == pytest.approx(
    token['loss'] * token['num_tokens'], rel=1e-6
  )
  assert 3.5 < token['loss'] < 5.5  # about log 48 in a random model


def test_norms_and_biases_do_not_decay(params):
  mask = {
    path_str(path): decays
    for path, decays in jax.tree_util.tree_leaves_with_path(step.decays(params))
  }
  assert mask['layers/0/attention/query/kernel'] and mask['embed/table'] and mask['head/table']
  assert not mask['layers/0/attention/query/bias']  # [N,H]: as many axes as a matrix
  assert not mask['norm/scale'] and not mask['layers/0/mlp_norm/scale']
  config = dataclasses.replace(CONFIG, warmup=0.0, schedule='constant', weight_decay=0.5)
  optimizer = step.make_optimizer(config, 10)
  ones = jax.tree.map(jnp.ones_like, params)
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = jax.jit(lambda p: optimizer.update(zeros, optimizer.init(p), p))(ones)
  for path, update in jax.tree_util.tree_leaves_with_path(updates):
    expected = -1e-2 * 0.5 if mask[path_str(path)] else 0.0
    np.testing.assert_allclose(update, expected, rtol=1e-6)


def test_schedules():
  def values(steps, **options):
    config = TrainConfig(learning_rate=1.0, **options)
    schedule = step.make_schedule(config, steps)
    return [float(schedule(i)) for i in range(steps)]

  np.testing.assert_allclose(values(5, schedule='constant', warmup=0.0), 1.0)
  np.testing.assert_allclose(values(5, schedule='linear', warmup=0.0), [1, 0.75, 0.5, 0.25, 0])
  np.testing.assert_allclose(
    values(8, schedule='linear', warmup=0.375, final_share=0.2),
    [0.25, 0.5, 0.75, 1.0, 0.8, 0.6, 0.4, 0.2],
    rtol=1e-6,
  )
  cosine = values(5, schedule='cosine', warmup=0.0, final_share=0.5)
  expected = [0.5 + 0.5 * (1 + np.cos(np.pi * i / 4)) / 2 for i in range(5)]
  np.testing.assert_allclose(cosine, expected, rtol=1e-6)
  assert values(1, schedule='cosine', warmup=0.1) == [1.0]
  np.testing.assert_allclose(
    values(10, schedule='wsd', warmup=0.2, decay=0.4, final_share=0.2),
    [1 / 3, 2 / 3, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2],
    rtol=1e-6,
  )
  np.testing.assert_allclose(
    values(4, schedule='wsd', warmup=0.0, decay=0.9), [1, 2 / 3, 1 / 3, 0], atol=1e-6
  )


def test_the_optimizer_is_clipped_adamw(params):
  config = dataclasses.replace(CONFIG, clip_norm=0.5, warmup=0.0, schedule='constant')
  grads = jax.tree.map(jnp.ones_like, params)
  norm = optax.tree.norm(grads)
  plain = step.make_optimizer(dataclasses.replace(config, clip_norm=0.0), 10)
  clipped = step.make_optimizer(config, 10)
  scaled = jax.tree.map(lambda g: g * 0.5 / norm, grads)
  ours, _ = jax.jit(lambda p: clipped.update(grads, clipped.init(p), p))(params)
  theirs, _ = jax.jit(lambda p: plain.update(scaled, plain.init(p), p))(params)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5)


def metrics_of(workdir):
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


class Stopped(Exception):
  """Stands for the kill of a run."""


@pytest.fixture
def stop_after(monkeypatch):
  """`stop_after(n)`: the next run is stopped before its step n (counted from 0) is logged."""

  def arrange(count):
    add = log.Log.add

    def stopping(self, at, metrics):
      if at == count:
        raise Stopped
      add(self, at, metrics)

    monkeypatch.setattr(log.Log, 'add', stopping)
    return lambda: monkeypatch.setattr(log.Log, 'add', add)

  return arrange


@pytest.fixture
def compile_once(monkeypatch):
  """Runs share their train step, which keeps no state, instead of compiling it again."""
  made = {}

  def make(graph, params, config, num_steps, mesh, frozen):
    key = graph, config, num_steps, mesh
    if key not in made:
      made[key] = step.make_train_step(graph, params, config, num_steps, mesh, frozen)
    return made[key]

  monkeypatch.setattr(loop, 'make_train_step', make)


FIT = dataclasses.replace(CONFIG, checkpoint_every=2, keep=2)
BUCKETS = (packing.Bucket(12, 8), packing.Bucket(32, 8))


def test_a_stopped_run_goes_on_to_bitwise_the_same_end(
  params, items, tmp_path, stop_after, compile_once, monkeypatch
):
  mesh = make_mesh(2, 2, 1, devices=jax.devices()[:4])
  fit = lambda workdir: loop.fit(MODEL, params, items, FIT, mesh, workdir, BUCKETS)  # noqa: E731
  whole, summary = fit(tmp_path / 'whole')
  assert summary['steps'] > 7 and summary['resumed_at'] == 0
  for count in (1, 5):  # before the first checkpoint, and between two
    go_on = stop_after(count)
    with pytest.raises(Stopped):
      fit(tmp_path / f'cut{count}')
    go_on()
  with pytest.raises(Stopped):  # stopped a second time
    stop_after(7)
    fit(tmp_path / 'cut5')
  go_on()
  for count, resumed_at in ((1, 0), (5, 6)):
    again, found = fit(tmp_path / f'cut{count}')
    assert found['resumed_at'] == resumed_at
    assert same(again, whole)
    assert metrics_of(tmp_path / f'cut{count}') == metrics_of(tmp_path / 'whole')
  assert [row['step'] for row in metrics_of(tmp_path / 'whole')] == list(
    range(1, summary['steps'] + 1)
  )
  kept = sorted(int(p.name) for p in (tmp_path / 'whole/checkpoints').iterdir())
  assert len(kept) == 2 and kept[-1] == summary['steps']
  # A run that is done gives its result and trains no more. Only what was saved is in memory.
  with monkeypatch.context() as patch:
    patch.setattr(loop, 'init_state', None)
    done, found = fit(tmp_path / 'whole')
  assert found['resumed_at'] == summary['steps'] and same(done, whole)
  assert len(metrics_of(tmp_path / 'whole')) == summary['steps']
  assert list((tmp_path / 'whole/tensorboard').iterdir())
  # Another run's checkpoints are not gone on with.
  with pytest.raises(ValueError, match='another run.*learning_rate: was 0.01, is 0.02'):
    other = dataclasses.replace(FIT, learning_rate=0.02)
    loop.fit(MODEL, params, items, other, mesh, tmp_path / 'whole', BUCKETS)
  with pytest.raises(ValueError, match='another run.*data: was'):
    loop.fit(MODEL, params, items[::-1], FIT, mesh, tmp_path / 'whole', BUCKETS)
  with pytest.raises(ValueError, match='another run.*buckets: was .*12, 8.*, is .*14, 8'):
    other = (packing.Bucket(14, 8), packing.Bucket(32, 8))
    loop.fit(MODEL, params, items, FIT, mesh, tmp_path / 'whole', other)


def test_a_checkpoint_goes_on_exactly_on_another_mesh(params, items, tmp_path, stop_after):
  """Saved on 2×2×2 and gone on with on 1×8×1: step for step what 1×8×1 does from that state."""
  meshes = make_mesh(2, 2, 2), make_mesh(1, 8, 1)
  go_on = stop_after(5)
  with pytest.raises(Stopped):
    loop.fit(MODEL, params, items, FIT, meshes[0], tmp_path)
  go_on()
  with checkpoints.make_checkpointer(tmp_path / 'checkpoints', FIT.keep) as checkpointer:
    at = checkpointer.latest.step
    saved = [
      checkpointer.load_checkpointables(
        at, {'state': step.abstract_state(SHAPES, FIT, mesh), 'data': None}
      )['state']
      for mesh in meshes
    ]
  assert same(*saved) and 0 < at <= 5
  assert saved[1].params['embed']['table'].sharding.mesh.shape['fsdp'] == 8
  steps = packing.plan(
    [len(i.tokens) for i in items], [packing.Bucket(32, 8)], FIT.epochs, FIT.seed
  )
  train_step = step.make_train_step(GRAPH, SHAPES, FIT, len(steps), meshes[1])
  state, batches = saved[1], packing.Batches(items, steps)
  for i in range(at, len(steps)):
    state, _ = train_step(state, loop._place(batches[i], batch_sharding(meshes[1])))
  trained, summary = loop.fit(MODEL, params, items, FIT, meshes[1], tmp_path)
  assert summary['resumed_at'] == at and same(trained, state.params)
  whole, _ = loop.fit(MODEL, params, items, FIT, meshes[0], tmp_path / 'whole')
  for a, b in zip(jax.tree.leaves(trained), jax.tree.leaves(whole), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_events_of_steps_that_are_done_again_are_purged(tmp_path):
  """After step 3 was logged and step 2 saved: TensorBoard hides events at and after the purge."""
  metrics = dict.fromkeys(('loss', 'grad_norm', 'num_tokens'), jnp.ones(()))
  work = log.Work(np.ones(4), np.ones(4), None, lambda step: [])
  with log.Log(tmp_path, 2, 4, 1, work) as writer:
    for at in (2, 3):
      writer.add(at, metrics)
    writer.flush()
  (path,) = (tmp_path / 'tensorboard').iterdir()
  content, events = path.read_bytes(), []
  while content:  # records: u64 length, its checksum, an event, its checksum
    size = int.from_bytes(content[:8], 'little')
    events.append(event_pb2.Event.FromString(content[12 : 12 + size]))
    content = content[16 + size :]
  (purge,) = (event.step for event in events if event.HasField('session_log'))
  assert purge == min(event.step for event in events if event.HasField('summary')) == 3


def test_errors_before_the_first_step(params, items, tmp_path):
  mesh = make_mesh(8, 1, 1)
  fit = lambda config, items=items, workdir=tmp_path: loop.fit(  # noqa: E731
    MODEL, params, items, config, mesh, workdir
  )
  with pytest.raises(ValueError, match='accumulation=4 is not a multiple of data × fsdp = 8'):
    fit(dataclasses.replace(CONFIG, batch_size=16, accumulation=4))
  with pytest.raises(ValueError, match='no example'):
    fit(CONFIG, items=[])
  (tmp_path / 'file').write_text('')
  with pytest.raises(ValueError, match='cannot be written'):
    fit(CONFIG, workdir=tmp_path / 'file' / 'run')
  for name, value in (
    ('epochs', 0),
    ('schedule', 'square'),
    ('target', 'first'),
    ('loss_normalization', 'batch'),
    ('dtype', 'float8'),
    ('learning_rate', 0.0),
    ('helpfulness_share', 1.0),
    ('warmup', -0.1),
    ('final_share', 2.0),
    ('accumulation', 3),
  ):
    with pytest.raises(ValueError, match=f'train.{name}={value}|train.{name}={value!r}'):
      dataclasses.replace(CONFIG, **{name: value})


def test_a_loss_that_is_not_finite_stops_the_run(params, items, tmp_path):
  broken = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), params)
  with pytest.raises(FloatingPointError, match='loss is nan at step 1'):
    loop.fit(MODEL, broken, items, CONFIG, one_device(), tmp_path)
  assert not [p for p in (tmp_path / 'checkpoints').iterdir() if p.name.isdigit()]


def test_train_learns_the_revisions(tmp_path, tiny_tokenizer):
  config = dataclasses.replace(MODEL, vocab_size=384)
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), init_params(config, jax.random.key(1)))
  lm = LM(config, params, tiny_tokenizer, one_device(), 'bfloat16', 'random', 'abc')
  rows = [
    {
      'kind': 'harmful',
      'id': str(i),
      'prompt': [{'role': 'user', 'content': f'question {i}'}],
      'initial': {'text': 'no', 'finish_reason': 'stop'},
      'rounds': [{'revision': {'text': 'the assistant', 'finish_reason': 'stop'}}] * (i > 0),
    }
    for i in range(20)
  ]
  settings = dataclasses.replace(CONFIG, epochs=8, max_length=64, batch_size=4, dtype='bfloat16')
  trained, summary = loop.train(lm, rows, Dialogue(tiny_tokenizer), settings, tmp_path)
  assert summary['kept'] == 19 and summary['dropped'] == {'no_revision': 1}
  rows_ = metrics_of(tmp_path)
  assert rows_[-1]['loss'] < 0.6 * rows_[0]['loss']
  assert {x.dtype for x in jax.tree.leaves(trained)} == {jnp.dtype('float32')}
  assert {x.dtype for x in jax.tree.leaves(lm.params)} == {jnp.dtype('bfloat16')}
  with pytest.raises(ValueError, match='another run.*init: was .abc., is .def.'):
    other = dataclasses.replace(lm, fingerprint='def')
    loop.train(other, rows, Dialogue(tiny_tokenizer), settings, tmp_path)
  with pytest.raises(ValueError, match='max_length=65 is more than the 64 tokens'):
    too_long = dataclasses.replace(settings, max_length=65)
    loop.train(lm, rows, Dialogue(tiny_tokenizer), too_long, tmp_path)


KILLED = """
import sys, jax, numpy as np
from cai_jax.data.examples import Example
from cai_jax.model.transformer import init_params
from cai_jax.runtime.mesh import make_mesh
from cai_jax.training import loop
from tests import test_training as t
rng = np.random.default_rng(0)
items = [Example(rng.integers(0, 48, n).astype(np.int32), np.arange(n) >= n // 2)
         for n in rng.integers(4, 25, 3000)]
params = init_params(t.MODEL, jax.random.key(0))
mesh = make_mesh(2, 1, 1, devices=jax.devices()[:2])
config = t.dataclasses.replace(t.FIT, checkpoint_every=7)
trained, _ = loop.fit(t.MODEL, params, items, config, mesh, sys.argv[1])
np.savez(sys.argv[1] + '/end.npz', *jax.tree.leaves(trained))
"""


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_in_the_same_parameters(tmp_path):
  """At moments drawn from the steps, and ten of them once a save is seen under way."""
  root = pathlib.Path(__file__).parents[1]
  environment = {**os.environ, 'PYTHONPATH': str(root)}

  def start(name):
    (tmp_path / name).mkdir(exist_ok=True)
    command = [sys.executable, '-c', KILLED, str(tmp_path / name)]
    return subprocess.Popen(command, env=environment, cwd=root)

  assert start('whole').wait() == 0
  total = metrics_of(tmp_path / 'whole')[-1]['step']
  rng, during = np.random.default_rng(7), 0
  log, folder = tmp_path / 'killed/metrics.jsonl', tmp_path / 'killed/checkpoints'
  for number, kill_at in enumerate(sorted(rng.integers(1, total - 30, 20))):
    process = start('killed')

    def wait_for(condition, process=process):
      while not condition():
        assert process.poll() is None
        time.sleep(0.001)

    wait_for(lambda: log.exists() and log.read_bytes().count(b'\n') >= kill_at)  # noqa: B023
    if number % 2:  # names of steps that are not yet whole have a suffix
      wait_for(lambda: any(not path.name.isdigit() for path in folder.iterdir()))
      during += 1
    process.send_signal(signal.SIGKILL)
    process.wait()
  assert during == 10
  assert start('killed').wait() == 0
  with np.load(tmp_path / 'whole/end.npz') as whole, np.load(tmp_path / 'killed/end.npz') as again:
    assert sorted(whole) == sorted(again)
    assert all(np.array_equal(whole[name], again[name]) for name in whole)
  assert metrics_of(tmp_path / 'killed') == metrics_of(tmp_path / 'whole')
