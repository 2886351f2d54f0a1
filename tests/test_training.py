"""Training runs: exact resumption after any interruption, the log, and errors before step one."""

import dataclasses
import math
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from cai_jax.data import packing
from cai_jax.dialogue import Dialogue
from cai_jax.model.lm import LM
from cai_jax.model.transformer import abstract_model, init_params
from cai_jax.runtime.errors import NonFiniteError, UserError
from cai_jax.runtime.mesh import batch_sharding, make_mesh
from cai_jax.training import checkpoints, loop
from cai_jax.training.log import TrainingLog
from cai_jax.training.state import abstract_state
from cai_jax.training.step import place_batch
from cai_jax.training.supervised import fine_tune
from cai_jax.training.workload import Workload
from tests.training_setup import (
  CONFIG,
  MODEL,
  bitwise_equal,
  initial_params,
  killed_before,
  one_device,
  random_examples,
  read_rows,
)
from tests.training_setup import compile_once as compile_once

EXAMPLES = random_examples()
CHECKPOINTED = dataclasses.replace(CONFIG, checkpoint_every=2, keep=2)
BUCKETS = (packing.Bucket(12, 8), packing.Bucket(32, 8))


def fit(mesh, workdir, config=CHECKPOINTED, buckets=BUCKETS, examples=EXAMPLES):
  return loop.fit(MODEL, initial_params(), examples, config, mesh, workdir, buckets)


def test_a_killed_run_ends_with_bitwise_the_same_parameters(tmp_path, compile_once, monkeypatch):
  mesh = make_mesh(1, 2, 1, devices=jax.devices()[:2])
  whole, summary = fit(mesh, tmp_path / 'whole')
  assert summary['steps'] > 7 and summary['resumed_at'] == 0
  for step in (2, 6):  # before the first checkpoint, and between two
    with killed_before(step):
      fit(mesh, tmp_path / f'killed{step}')
  with killed_before(8):  # a second time
    fit(mesh, tmp_path / 'killed6')
  for step, resumed_at in ((2, 0), (6, 6)):
    again, again_summary = fit(mesh, tmp_path / f'killed{step}')
    assert again_summary['resumed_at'] == resumed_at
    assert bitwise_equal(again, whole)
    assert read_rows(tmp_path / f'killed{step}') == read_rows(tmp_path / 'whole')
  assert [row['step'] for row in read_rows(tmp_path / 'whole')] == list(
    range(1, summary['steps'] + 1)
  )
  kept = sorted(int(p.name) for p in (tmp_path / 'whole/checkpoints').iterdir())
  assert len(kept) == 2 and kept[-1] == summary['steps']
  # A complete run returns its result without a step, and without a second state in memory.
  with monkeypatch.context() as patch:
    patch.setattr(loop, 'init_state', None)
    loaded, loaded_summary = fit(mesh, tmp_path / 'whole')
  assert loaded_summary['resumed_at'] == summary['steps'] and bitwise_equal(loaded, whole)
  assert len(read_rows(tmp_path / 'whole')) == summary['steps']
  assert list((tmp_path / 'whole/tensorboard').iterdir())
  # The checkpoints of another run are refused.
  with pytest.raises(UserError, match='another run.*learning_rate: was 0.01, is 0.02'):
    fit(mesh, tmp_path / 'whole', dataclasses.replace(CHECKPOINTED, learning_rate=0.02))
  with pytest.raises(UserError, match='another run.*data: was'):
    fit(mesh, tmp_path / 'whole', examples=EXAMPLES[::-1])
  with pytest.raises(UserError, match='another run.*buckets: was .*12, 8.*, is .*14, 8'):
    fit(mesh, tmp_path / 'whole', buckets=(packing.Bucket(14, 8), packing.Bucket(32, 8)))


def test_a_setting_that_an_older_checkpoint_lacks_counts_as_its_default(tmp_path, monkeypatch):
  describe = loop._describe_run

  def describe_without_loss(*args):
    return {name: value for name, value in describe(*args).items() if name != 'loss'}

  with monkeypatch.context() as patch:
    patch.setattr(loop, '_describe_run', describe_without_loss)
    trained, summary = fit(one_device(), tmp_path, CONFIG, buckets=())
  again, again_summary = fit(one_device(), tmp_path, CONFIG, buckets=())
  assert again_summary['resumed_at'] == summary['steps'] and bitwise_equal(again, trained)
  with monkeypatch.context() as patch:
    patch.setattr(loop, '_describe_run', lambda *args: describe(*args) | {'loss': 'dpo'})
    with pytest.raises(UserError, match="another run.*loss: was 'nll', is 'dpo'"):
      fit(one_device(), tmp_path, CONFIG, buckets=())


@pytest.mark.parametrize(
  'shapes',
  [((2, 1, 1), (1, 2, 1)), pytest.param(((2, 2, 2), (1, 8, 1)), marks=pytest.mark.slow)],
  ids=['two', 'eight'],
)
def test_a_checkpoint_resumes_exactly_on_another_mesh(tmp_path, shapes, compile_once):
  """Saved on one mesh and resumed on another, a run takes the steps that the other one takes."""
  meshes = [make_mesh(*shape, devices=jax.devices()[: math.prod(shape)]) for shape in shapes]
  with killed_before(6):
    fit(meshes[0], tmp_path, buckets=())
  _, abstract = abstract_model(MODEL)
  with checkpoints.make_checkpointer(tmp_path / 'checkpoints', CHECKPOINTED.keep) as checkpointer:
    first_step = checkpointer.latest.step
    saved = [
      checkpointer.load_checkpointables(
        first_step, {'state': abstract_state(abstract, CHECKPOINTED, mesh), 'data': None}
      )['state']
      for mesh in meshes
    ]
  assert bitwise_equal(*saved) and 0 < first_step <= 5
  assert saved[1].params['embed']['table'].sharding.mesh.shape['fsdp'] == shapes[1][1]
  steps = packing.plan(
    [len(e.tokens) for e in EXAMPLES],
    [packing.Bucket(32, 8)],
    CHECKPOINTED.epochs,
    CHECKPOINTED.seed,
  )
  graph, _ = abstract_model(MODEL)
  train_step = loop.make_train_step(graph, abstract, CHECKPOINTED, len(steps), meshes[1], None)
  state, batches = saved[1], packing.Batches(EXAMPLES, steps)
  for i in range(first_step, len(steps)):
    state, _ = train_step(state, place_batch(batches[i], batch_sharding(meshes[1])))
  trained, summary = fit(meshes[1], tmp_path, buckets=())
  assert summary['resumed_at'] == first_step and bitwise_equal(trained, state.params)
  whole, _ = fit(meshes[0], tmp_path / 'whole', buckets=())
  for a, b in zip(jax.tree.leaves(trained), jax.tree.leaves(whole), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_events_of_repeated_steps_are_purged(tmp_path):
  """After a resume from step 2, TensorBoard hides the events from the purge step on."""
  metrics = dict.fromkeys(('loss', 'grad_norm', 'num_tokens'), jnp.ones(()))
  workload = Workload(np.ones(4), np.ones(4), None, lambda index: [])
  with TrainingLog(tmp_path, 2, 4, 1, workload) as log:
    for step in (3, 4):
      log.log_step(step, metrics)
    log.write_pending()
  (path,) = (tmp_path / 'tensorboard').iterdir()
  content, events = path.read_bytes(), []
  while content:  # records: u64 length, its checksum, an event, its checksum
    size = int.from_bytes(content[:8], 'little')
    events.append(event_pb2.Event.FromString(content[12 : 12 + size]))
    content = content[16 + size :]
  (purge,) = (event.step for event in events if event.HasField('session_log'))
  assert purge == min(event.step for event in events if event.HasField('summary')) == 3


def test_invalid_settings_are_refused_before_the_first_step(tmp_path):
  mesh = make_mesh(8, 1, 1)
  with pytest.raises(UserError, match='accumulation=4 is not a multiple of data × fsdp = 8'):
    config = dataclasses.replace(CONFIG, batch_size=16, accumulation=4)
    fit(mesh, tmp_path, config, buckets=())
  with pytest.raises(UserError, match='no example'):
    fit(mesh, tmp_path, CONFIG, buckets=(), examples=[])
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='is not writable'):
    fit(mesh, tmp_path / 'file' / 'run', CONFIG, buckets=())
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
  ):
    with pytest.raises(UserError, match=f'train.{name}={value}|train.{name}={value!r}'):
      dataclasses.replace(CONFIG, **{name: value})
  with pytest.raises(UserError, match='batch_size=8 must be a multiple of train.accumulation=3'):
    dataclasses.replace(CONFIG, accumulation=3)
  with pytest.raises(UserError, match="no loss named 'square'. The registered names are .*nll"):
    dataclasses.replace(CONFIG, loss='square')


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
  broken = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), initial_params())
  with pytest.raises(NonFiniteError, match='loss is nan at step 1'):
    loop.fit(MODEL, broken, EXAMPLES, CONFIG, one_device(), tmp_path)
  assert not [p for p in (tmp_path / 'checkpoints').iterdir() if p.name.isdigit()]
  assert issubclass(NonFiniteError, FloatingPointError)


def test_fine_tuning_learns_the_revisions(tmp_path, tiny_tokenizer):
  model = dataclasses.replace(MODEL, vocab_size=384)
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), init_params(model, jax.random.key(1)))
  lm = LM(model, params, tiny_tokenizer, one_device(), 'bfloat16', 'random', 'abc')
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
  config = dataclasses.replace(CONFIG, epochs=8, max_length=64, batch_size=4, dtype='bfloat16')
  kept = tmp_path / 'examples/0123456789abcdef'  # rows in memory make no files, and delete none
  kept.mkdir(parents=True)
  trained, summary = fine_tune(lm, rows, Dialogue(tiny_tokenizer), config, tmp_path)
  assert kept.exists()
  assert summary['kept'] == 19 and summary['dropped'] == {'no_revision': 1}
  losses = [row['loss'] for row in read_rows(tmp_path)]
  assert losses[-1] < 0.6 * losses[0]
  assert {x.dtype for x in jax.tree.leaves(trained)} == {jnp.dtype('float32')}
  assert {x.dtype for x in jax.tree.leaves(lm.params)} == {jnp.dtype('bfloat16')}
  with pytest.raises(UserError, match='another run.*init: was .abc., is .def.'):
    other = dataclasses.replace(lm, fingerprint='def')
    fine_tune(other, rows, Dialogue(tiny_tokenizer), config, tmp_path)
  with pytest.raises(UserError, match='max_length=65 exceeds the 64 tokens'):
    too_long = dataclasses.replace(config, max_length=65)
    fine_tune(lm, rows, Dialogue(tiny_tokenizer), too_long, tmp_path)


@pytest.mark.parametrize('layers', ['unrolled', pytest.param('scan', marks=pytest.mark.slow)])
def test_training_may_take_over_the_initial_parameters(tmp_path, layers, compile_once):
  """It ends with the same bits, in a new run and in one that is resumed."""
  config = dataclasses.replace(CONFIG, layers=layers, ema=0.9)
  buckets = (packing.Bucket(32, 8),)
  kept = init_params(MODEL, jax.random.key(1))
  expected, _ = loop.fit(MODEL, kept, EXAMPLES, config, one_device(), tmp_path / 'kept', buckets)
  for _ in range(2):
    # Arrays of the host, such as the head of a reward model, stay as they are.
    norm = np.asarray(kept['norm']['scale'])
    given = jax.tree.map(jnp.copy, kept) | {'norm': {'scale': norm}}
    trained, _ = loop.fit(
      MODEL, given, EXAMPLES, config, one_device(), tmp_path / 'taken', buckets, take_over=True
    )
    assert bitwise_equal(trained, expected)
    assert given['embed']['table'].is_deleted() and not kept['embed']['table'].is_deleted()


RUN = """
import dataclasses, sys, jax, numpy as np
from cai_jax.runtime.mesh import make_mesh
from cai_jax.training.loop import fit
from tests.training_setup import CONFIG, MODEL, initial_params, random_examples
mesh = make_mesh(2, 1, 1, devices=jax.devices()[:2])
config = dataclasses.replace(CONFIG, checkpoint_every=7, keep=2)
trained, _ = fit(MODEL, initial_params(), random_examples(3000), config, mesh, sys.argv[1])
np.savez(sys.argv[1] + '/end.npz', *jax.tree.leaves(trained))
"""


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_with_the_same_parameters(tmp_path):
  """The run is killed at random steps, half of the time while a checkpoint is being saved."""
  root = pathlib.Path(__file__).parents[1]
  environment = {**os.environ, 'PYTHONPATH': str(root)}

  def start(name):
    (tmp_path / name).mkdir(exist_ok=True)
    command = [sys.executable, '-c', RUN, str(tmp_path / name)]
    return subprocess.Popen(command, env=environment, cwd=root)

  assert start('whole').wait() == 0
  total = read_rows(tmp_path / 'whole')[-1]['step']
  rng, num_during_save = np.random.default_rng(7), 0
  metrics, folder = tmp_path / 'killed/metrics.jsonl', tmp_path / 'killed/checkpoints'
  for number, kill_at in enumerate(sorted(rng.integers(1, total - 30, 20))):
    process = start('killed')

    def wait_for(condition, process=process):
      while not condition():
        assert process.poll() is None
        time.sleep(0.001)

    wait_for(
      lambda: metrics.exists() and metrics.read_bytes().count(b'\n') >= kill_at  # noqa: B023
    )
    if number % 2:  # the name of an incomplete checkpoint has a suffix
      wait_for(lambda: any(not path.name.isdigit() for path in folder.iterdir()))
      num_during_save += 1
    process.send_signal(signal.SIGKILL)
    process.wait()
  assert num_during_save == 10
  assert start('killed').wait() == 0
  with np.load(tmp_path / 'whole/end.npz') as whole, np.load(tmp_path / 'killed/end.npz') as killed:
    assert sorted(whole) == sorted(killed)
    assert all(np.array_equal(whole[name], killed[name]) for name in whole)
  assert read_rows(tmp_path / 'killed') == read_rows(tmp_path / 'whole')
