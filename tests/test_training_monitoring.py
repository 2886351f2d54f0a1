"""What a training run observes: held-out loss, probes, costs, traces and SIGTERM."""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from flax import nnx

from cai_jax.data import packing
from cai_jax.data.examples import hold_out
from cai_jax.model.config import ModelConfig
from cai_jax.model.transformer import abstract_model, init_params
from cai_jax.runtime import hardware
from cai_jax.runtime.errors import NonFiniteError, UserError
from cai_jax.runtime.interruption import Interrupted
from cai_jax.training import loop
from cai_jax.training.config import TrainConfig
from cai_jax.training.held_out import HeldOut
from cai_jax.training.log import remarks
from cai_jax.training.losses import negative_log_likelihood
from cai_jax.training.metrics import (
  COSTS_FILE,
  HELD_OUT_FILE,
  PROBES_FILE,
  read_rows,
)
from tests.training_setup import compile_once as compile_once
from tests.training_setup import killed_before, one_device, random_examples

pytestmark = pytest.mark.usefixtures('compile_once')

MODEL = ModelConfig('llama', 48, 16, 32, 1, 4, 2, 8, 64)
CONFIG = TrainConfig(epochs=4, batch_size=8, max_length=32, learning_rate=1e-2, eps=1e-2)
EXAMPLES = random_examples(70)
HELD_OUT = random_examples(30, seed=1)


@pytest.fixture(scope='module')
def params():
  return init_params(MODEL, jax.random.key(0))


def fit(params, workdir, config=CONFIG, examples=EXAMPLES, **monitoring):
  monitoring = loop.Monitoring(**monitoring)
  return loop.fit(MODEL, params, examples, config, one_device(), workdir, monitoring=monitoring)


def test_the_held_out_loss_is_the_objective_on_the_held_out_examples(params, tmp_path):
  config = dataclasses.replace(CONFIG, eval_share=0.3, eval_every=5)
  trained, summary = fit(params, tmp_path, config, held_out=HELD_OUT)
  rows = read_rows(tmp_path / HELD_OUT_FILE)
  steps = summary['steps']
  assert [row['step'] for row in rows] == [*range(5, steps, 5), steps]
  bucket = packing.Bucket(24, len(HELD_OUT))
  step = packing.Step(bucket, tuple((i,) for i in range(len(HELD_OUT))))  # unpacked: one per row
  graph, _ = abstract_model(MODEL)
  nll, sums = negative_log_likelihood(graph, trained, packing.Batches(HELD_OUT, [step])[0])
  assert rows[-1]['loss'] == pytest.approx(float(nll / sums['num_sequences']), rel=1e-5)
  assert rows[-1]['nll_per_token'] == pytest.approx(float(nll / sums['num_tokens']), rel=1e-5)
  assert summary['held_out_loss'] == rows[-1]['loss'] and not summary['stopped_early']
  # Evaluation does not change the parameters.
  without_evaluation, _ = fit(params, tmp_path / 'plain')
  jax.tree.map(np.testing.assert_array_equal, trained, without_evaluation)


def test_training_stops_when_the_held_out_loss_no_longer_falls(params, tmp_path):
  """Random tokens cannot be learned: their held-out loss rises once they are memorized."""
  config = dataclasses.replace(CONFIG, epochs=40, eval_share=0.3, eval_every=4, patience=3)
  trained, summary = fit(params, tmp_path, config, held_out=HELD_OUT)
  losses = [row['loss'] for row in read_rows(tmp_path / HELD_OUT_FILE)]
  assert summary['stopped_early'] and summary['steps_taken'] == 4 * len(losses) < summary['steps']
  assert min(losses[-3:]) >= min(losses[:-3])
  assert all(min(losses[n - 3 : n]) < min(losses[: n - 3]) for n in range(4, len(losses)))
  # A run that stopped early is complete.
  again, again_summary = fit(params, tmp_path, config, held_out=HELD_OUT)
  assert again_summary['resumed_at'] == again_summary['steps_taken'] == summary['steps_taken']
  jax.tree.map(np.testing.assert_array_equal, again, trained)


EARLY = dataclasses.replace(
  CONFIG,
  epochs=40,
  eval_share=0.3,
  eval_every=4,
  patience=3,
  keep=1,
  checkpoint_every=3,
)


def held_out_loss(params):
  step = packing.Step(packing.Bucket(24, len(HELD_OUT)), tuple((i,) for i in range(len(HELD_OUT))))
  graph, _ = abstract_model(MODEL)
  nll, sums = negative_log_likelihood(graph, params, packing.Batches(HELD_OUT, [step])[0])
  return float(nll / sums['num_sequences'])


def test_early_stopping_exports_the_best_step(params, tmp_path):
  """With one checkpoint kept, the best one is kept beside the last."""
  trained, summary = fit(params, tmp_path, EARLY, held_out=HELD_OUT)
  rows = read_rows(tmp_path / HELD_OUT_FILE)
  best = min(rows, key=lambda row: row['loss'])
  assert summary['stopped_early'] and best['step'] < rows[-1]['step'] == summary['steps_taken']
  assert summary['exported_step'] == best['step']
  assert held_out_loss(trained) == pytest.approx(best['loss'], rel=1e-5)
  assert abs(held_out_loss(trained) / rows[-1]['loss'] - 1) > 1e-3
  saved = sorted(int(path.name) for path in (tmp_path / 'checkpoints').iterdir())
  assert saved == [best['step'], rows[-1]['step']]
  remark = remarks(summary, EARLY)[0]
  assert f'that of step {best["step"]}, which has the lowest held-out loss' in remark
  # The checkpoint that is to be exported is gone: nothing else is exported in its place.
  shutil.rmtree(tmp_path / 'checkpoints' / str(best['step']))
  with pytest.raises(UserError, match=rf'checkpoints/{best["step"]} is missing'):
    fit(params, tmp_path, EARLY, held_out=HELD_OUT)


@pytest.mark.parametrize('lora_rank', [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_run_exports_the_same_best_step(params, tmp_path, lora_rank):
  """The run is killed after its best step, before and after the next checkpoint."""
  config = dataclasses.replace(EARLY, lora_rank=lora_rank, epochs=20, ema=0.5)
  whole, summary = fit(params, tmp_path / 'whole', config, held_out=HELD_OUT)
  best, last = summary['exported_step'], summary['steps_taken']
  assert best < last
  for step in (best + 1, best + 3, last):
    with killed_before(step):
      fit(params, tmp_path / 'killed', config, held_out=HELD_OUT)
  again, again_summary = fit(params, tmp_path / 'killed', config, held_out=HELD_OUT)
  assert 0 < again_summary['resumed_at'] < last
  assert again_summary['exported_step'] == best
  jax.tree.map(np.testing.assert_array_equal, again, whole)
  for file in (HELD_OUT_FILE, 'metrics.jsonl'):
    assert read_rows(tmp_path / 'killed' / file) == read_rows(tmp_path / 'whole' / file)


def test_of_equal_losses_the_first_is_the_best():
  config = dataclasses.replace(CONFIG, eval_share=0.3, eval_every=4, patience=2)
  held_out = HeldOut(None, [], [], config, None)
  assert held_out.best_step is None
  for step, loss in ((4, 3.0), (8, 2.0), (12, 2.0)):
    held_out.losses[step] = loss
    assert held_out.best_step == min(step, 8) and not held_out.should_stop
  held_out.losses[16] = 2.0
  assert held_out.best_step == 8 and held_out.should_stop
  without = HeldOut(None, [], [], dataclasses.replace(config, patience=0), None)
  without.losses = held_out.losses
  assert without.best_step is None


def test_a_held_out_loss_that_is_not_a_number_stops_with_the_step(params, tmp_path, monkeypatch):
  evaluate_batch = loop.make_eval_step

  def make_broken(*args):
    step, calls = evaluate_batch(*args), []

    def broken(*batch):
      calls.append(None)
      sums = step(*batch)
      return sums | {'loss_sum': sums['loss_sum'] * (np.nan if len(calls) > 2 else 1)}

    return broken

  monkeypatch.setattr(loop, 'make_eval_step', make_broken)
  with pytest.raises(NonFiniteError, match=r'held-out examples is nan after step \d+'):
    fit(params, tmp_path, EARLY, held_out=HELD_OUT)
  assert [path.name for path in (tmp_path / 'checkpoints').iterdir()]


def test_steps_that_are_mostly_clipped_are_remarked(params, tmp_path):
  config = dataclasses.replace(CONFIG, epochs=1, clip_norm=1e-3)
  _, summary = fit(params, tmp_path, config)
  assert summary['clipped_share'] == 1.0
  (remark,) = remarks(summary, config)
  assert 'Warning: the gradient was clipped in 100 % of the steps' in remark
  assert [row['clipped_share'] for row in read_rows(tmp_path / 'metrics.jsonl')][-1] == 1.0
  again, again_summary = fit(params, tmp_path, config)  # is only loaded
  assert again_summary['clipped_share'] == 1.0
  assert remarks(summary | {'clipped_share': 0.5}, config) == []


def test_a_warm_up_that_takes_the_whole_run_is_refused_before_it_starts(params, tmp_path):
  config = dataclasses.replace(CONFIG, epochs=1, warmup=0.95)
  with pytest.raises(UserError, match=r'train.warmup=0.95 takes all \d+ steps'):
    fit(params, tmp_path / 'run', config)
  assert not (tmp_path / 'run').exists()


def test_checkpoints_of_an_older_arithmetic_are_refused(params, tmp_path, monkeypatch):
  config = dataclasses.replace(CONFIG, epochs=1)
  describe = loop._describe_run

  def describe_as_before(*args):
    return {name: value for name, value in describe(*args).items() if name != 'arithmetic'}

  with monkeypatch.context() as patch:
    patch.setattr(loop, '_describe_run', describe_as_before)
    fit(params, tmp_path, config)
  with pytest.raises(UserError, match='checkpoints of another version of cai_jax'):
    fit(params, tmp_path, config)


def test_probes_receive_the_current_parameters(params, tmp_path):
  received = []

  def probe(params):
    received.append(jax.device_get(params))
    return [{'id': 'a', 'prompt': 'x', 'text': f'answer {len(received)}'}]

  config = dataclasses.replace(CONFIG, eval_share=0.3, eval_every=6, ema=0.9)
  trained, summary = fit(params, tmp_path, config, probe=probe)
  rows = read_rows(tmp_path / PROBES_FILE)
  assert [row['step'] for row in rows] == [*range(6, summary['steps'], 6), summary['steps']]
  assert [row['text'] for row in rows] == [f'answer {i + 1}' for i in range(len(received))]
  jax.tree.map(np.testing.assert_array_equal, received[-1], trained)
  assert not np.array_equal(received[0]['embed']['table'], received[1]['embed']['table'])


def test_all_examples_of_a_row_are_on_the_same_side():
  examples = [e._replace(id=f'row {i // 3}') for i, e in enumerate(random_examples(90))]
  kept, held_out = hold_out(examples, 0.2, 0)
  assert len(held_out) == 18 and len(kept) == 72
  ids = lambda examples: {e.id for e in examples}  # noqa: E731
  assert not ids(kept) & ids(held_out)
  assert ids(hold_out(examples, 0.2, 0)[1]) == ids(held_out)
  assert ids(hold_out(examples, 0.2, 1)[1]) != ids(held_out)
  assert len(hold_out(examples, 0.0, 0)[0]) == 90
  with pytest.raises(UserError, match='eval_share=0.9 of 1 rows leaves none'):
    hold_out(examples[:3], 0.9, 0)


def test_the_moving_average_is_the_result(params, tmp_path):
  """Computes the average from the parameters of three runs that end after one, two, three steps."""
  examples = [e for e in random_examples(200) if len(e.tokens) > 16][:8]  # one per row, one step
  config = dataclasses.replace(CONFIG, epochs=3, schedule='constant', ema=0.75)
  without_average = [dataclasses.replace(config, epochs=n, ema=0.0) for n in (1, 2, 3)]
  results = [fit(params, tmp_path / str(c.epochs), c, examples)[0] for c in without_average]
  averaged, summary = fit(params, tmp_path / 'ema', config, examples)
  assert summary['steps'] == 3
  expected = params
  for result in results:
    expected = jax.tree.map(lambda e, p: 0.75 * e + 0.25 * p, expected, result)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), averaged, expected)


def test_costs_are_logged(params, tmp_path):
  _, summary = fit(params, tmp_path, dataclasses.replace(CONFIG, log_every=5))
  rows = read_rows(tmp_path / COSTS_FILE)
  assert [row['step'] for row in rows][:2] == [5, 10] and rows[-1]['step'] == summary['steps']
  steps = np.diff([0, *(row['step'] for row in rows)])
  logged_tokens = sum(
    n * row['seconds_per_step'] * row['tokens_per_second']
    for n, row in zip(steps, rows, strict=True)
  )
  assert logged_tokens == pytest.approx(4 * sum(len(e.tokens) for e in EXAMPLES), rel=1e-6)
  for row in rows:
    assert 0 < row['utilization'] < 1 and row['memory_bytes'] > 10**7
  assert 0 < summary['utilization'] < 1


def test_model_flops_agree_with_the_compilers_count(params):
  """The compiled forward pass computes all pairs in attention, whether causal or not."""
  graph, _ = abstract_model(MODEL)

  def forward(params, tokens):
    model = nnx.merge(graph, params)
    positions = jax.numpy.broadcast_to(jax.numpy.arange(tokens.shape[1]), tokens.shape)
    return model.unembed(model(tokens, positions))

  compiled = jax.jit(forward).lower(params, np.zeros((8, 32), np.int32)).compile()
  counted = compiled.cost_analysis()['flops']
  assert 0.75 * counted < MODEL.training_flops(np.full(8, 32)) / 3 < 1.05 * counted


def test_a_number_that_is_not_finite_names_the_examples(params, tmp_path):
  broken = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(np.nan), params)
  with pytest.raises(NonFiniteError, match=r'loss is nan at step 1.*: row \d+, row \d+') as error:
    fit(broken, tmp_path, examples=random_examples(5))
  assert all(f'row {i}' in str(error.value) for i in range(5))


def test_a_profiler_trace_is_written(params, tmp_path):
  fit(params, tmp_path, profile_steps=2)
  assert list((tmp_path / 'profile').rglob('*.xplane.pb'))


def test_known_devices_have_their_peak():
  class Device:
    platform, device_kind = 'gpu', 'NVIDIA H200'

  assert hardware.peak_flops([Device()] * 4, 'bfloat16') == 4 * 989e12
  Device.device_kind = 'TPU v5 lite'
  assert hardware.peak_flops([Device()], 'bfloat16') == 197e12
  Device.device_kind = 'something new'
  assert hardware.peak_flops([Device()], 'bfloat16') is None


def test_sigterm_saves_a_checkpoint_that_resumes_exactly(params, tmp_path, monkeypatch):
  """The signal arrives between the third step and the fourth."""
  config = dataclasses.replace(CONFIG, epochs=1, checkpoint_every=1000)
  whole, summary = fit(params, tmp_path / 'whole', config)
  log_step = loop.TrainingLog.log_step

  def signalled(self, step, metrics):
    log_step(self, step, metrics)
    if step == 3:
      os.kill(os.getpid(), signal.SIGTERM)

  with monkeypatch.context() as patch, pytest.raises(Interrupted, match='Stopped after') as stop:
    patch.setattr(loop.TrainingLog, 'log_step', signalled)
    fit(params, tmp_path / 'cut', config)
  (saved,) = (int(p.name) for p in (tmp_path / 'cut/checkpoints').iterdir() if p.name.isdigit())
  assert stop.value.status == 128 + signal.SIGTERM
  assert f'after step {saved} of' in str(stop.value) and 3 <= saved < summary['steps']
  again, again_summary = fit(params, tmp_path / 'cut', config)
  assert again_summary['resumed_at'] == saved
  jax.tree.map(np.testing.assert_array_equal, again, whole)
  assert read_rows(tmp_path / 'cut/metrics.jsonl') == read_rows(tmp_path / 'whole/metrics.jsonl')


RUN = """
import sys, jax, numpy as np
from cai_jax.model.transformer import init_params
from cai_jax.runtime.interruption import Interrupted
from tests import test_training_monitoring as t
params = init_params(t.MODEL, jax.random.key(0))
config = t.dataclasses.replace(t.CONFIG, epochs=1, checkpoint_every=1000)
try:
  trained, _ = t.fit(params, sys.argv[1], config, t.random_examples(6000))
except Interrupted as error:
  sys.exit(f'preempted: {error}')
np.savez(sys.argv[1] + '/end.npz', *jax.tree.leaves(trained))
"""


@pytest.mark.slow
def test_sigterm_at_any_time_saves_a_checkpoint_that_resumes_exactly(tmp_path):
  root = pathlib.Path(__file__).parents[1]

  def start(name):
    (tmp_path / name).mkdir(exist_ok=True)
    environment = {**os.environ, 'PYTHONPATH': str(root), 'XLA_FLAGS': ''}
    command = [sys.executable, '-c', RUN, str(tmp_path / name)]
    return subprocess.Popen(command, env=environment, cwd=root, stderr=subprocess.PIPE, text=True)

  whole, cut, metrics = start('whole'), start('cut'), tmp_path / 'cut' / 'metrics.jsonl'
  while not metrics.exists() or metrics.read_bytes().count(b'\n') < 3:
    assert cut.poll() is None
    time.sleep(0.01)
  cut.send_signal(signal.SIGTERM)
  output = cut.communicate()[1]
  assert cut.returncode == 1 and 'preempted: Stopped after step' in output
  saved = [int(p.name) for p in (tmp_path / 'cut/checkpoints').iterdir() if p.name.isdigit()]
  assert len(saved) == 1 and f'after step {saved[0]} of' in output
  assert start('cut').wait() == whole.wait() == 0
  with np.load(tmp_path / 'whole/end.npz') as a, np.load(tmp_path / 'cut/end.npz') as b:
    assert all(np.array_equal(a[name], b[name]) for name in a)
  steps = [row['step'] for row in read_rows(metrics)]
  assert steps == [*range(1, len(steps) + 1)] and steps[-1] > saved[0]


def test_the_time_of_a_run_does_not_include_the_wait_for_its_last_save(
  params, tmp_path, monkeypatch
):
  make_checkpointer, summarize, events = loop.make_checkpointer, loop.TrainingLog.summarize, []

  @contextlib.contextmanager
  def make_recorded(*args):
    with make_checkpointer(*args) as checkpointer:
      yield checkpointer
      events.append('close the checkpointer')

  def summarize_recorded(log):
    events.append('stop the clock')
    return summarize(log)

  monkeypatch.setattr(loop, 'make_checkpointer', make_recorded)
  monkeypatch.setattr(loop.TrainingLog, 'summarize', summarize_recorded)
  fit(params, tmp_path, dataclasses.replace(CONFIG, epochs=1))
  assert events == ['stop the clock', 'close the checkpointer']


@pytest.mark.slow
def test_training_does_not_import_torch():
  """tensorboardX would, where torch is installed, and every training would hold it in memory."""
  code = "import sys, cai_jax.training.loop, tensorboardX; assert 'torch' not in sys.modules"
  subprocess.run([sys.executable, '-c', code], check=True)
