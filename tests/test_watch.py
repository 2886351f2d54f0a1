"""What a training run looks at and tells beside training: held-out loss, probes, costs, signals."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from cai_jax.data import packing
from cai_jax.data.examples import Example, hold_out
from cai_jax.model.config import ModelConfig
from cai_jax.model.transformer import init_params
from cai_jax.runtime import hardware
from cai_jax.runtime.mesh import make_mesh
from cai_jax.training import log, loop, objective
from cai_jax.training.config import TrainConfig

MODEL = ModelConfig('llama', 48, 16, 32, 1, 4, 2, 8, 64)
CONFIG = TrainConfig(epochs=4, batch_size=8, max_length=32, learning_rate=1e-2, eps=1e-2)


@pytest.fixture(scope='module')
def params():
  return init_params(MODEL, jax.random.key(0))


def examples(count, seed=0):
  rng = np.random.default_rng(seed)
  return [
    Example(rng.integers(0, 48, n).astype(np.int32), np.arange(n) >= n // 2, f'row {i}')
    for i, n in enumerate(rng.integers(4, 25, count))
  ]


def mesh():
  return make_mesh(devices=jax.devices()[:1])


def fit(params, workdir, config=CONFIG, watch=loop.Watch(), items=None):  # noqa: B008
  items = examples(70) if items is None else items
  return loop.fit(MODEL, params, items, config, mesh(), workdir, watch=watch)


def test_the_held_out_loss_is_the_objective_of_these_examples(params, tmp_path):
  held_out = examples(30, seed=1)
  config = dataclasses.replace(CONFIG, eval_share=0.3, eval_every=5)
  trained, summary = fit(params, tmp_path, config, loop.Watch(held_out))
  rows = log.read(tmp_path / log.HELD_OUT)
  steps = summary['steps']
  assert [row['step'] for row in rows] == [*range(5, steps, 5), steps]
  bucket = packing.Bucket(24, len(held_out))
  step = packing.Step(bucket, tuple((i,) for i in range(len(held_out))))  # a row each, unpacked
  graph = loop.abstract_model(MODEL)[0]
  nll, sums = objective.loss_and_metrics(graph, trained, packing.Batches(held_out, [step])[0])
  assert rows[-1]['loss'] == pytest.approx(float(nll / sums['num_sequences']), rel=1e-5)
  assert rows[-1]['nll_per_token'] == pytest.approx(float(nll / sums['num_tokens']), rel=1e-5)
  assert summary['held_out_loss'] == rows[-1]['loss'] and not summary['stopped_early']
  # To look changes nothing.
  plain, _ = fit(params, tmp_path / 'plain')
  jax.tree.map(np.testing.assert_array_equal, trained, plain)


def test_training_stops_when_the_held_out_loss_no_longer_falls(params, tmp_path):
  """Random tokens cannot be learnt: their held-out loss rises once they are memorised."""
  config = dataclasses.replace(CONFIG, epochs=40, eval_share=0.3, eval_every=4, patience=3)
  watch = loop.Watch(examples(30, seed=1))
  trained, summary = fit(params, tmp_path, config, watch)
  losses = [row['loss'] for row in log.read(tmp_path / log.HELD_OUT)]
  assert summary['stopped_early'] and summary['steps_taken'] == 4 * len(losses) < summary['steps']
  assert min(losses[-3:]) >= min(losses[:-3])
  assert all(min(losses[n - 3 : n]) < min(losses[: n - 3]) for n in range(4, len(losses)))
  # A run that stopped is done.
  again, found = fit(params, tmp_path, config, watch)
  assert found['resumed_at'] == found['steps_taken'] == summary['steps_taken']
  jax.tree.map(np.testing.assert_array_equal, again, trained)


def test_probes_see_the_parameters_as_they_are(params, tmp_path):
  seen = []

  def probe(params):
    seen.append(jax.device_get(params))
    return [{'id': 'a', 'prompt': 'x', 'text': f'answer {len(seen)}'}]

  config = dataclasses.replace(CONFIG, eval_share=0.3, eval_every=6, ema=0.9)
  trained, summary = fit(params, tmp_path, config, loop.Watch((), probe))
  rows = log.read(tmp_path / log.PROBES)
  assert [row['step'] for row in rows] == [*range(6, summary['steps'], 6), summary['steps']]
  assert [row['text'] for row in rows] == [f'answer {i + 1}' for i in range(len(seen))]
  jax.tree.map(np.testing.assert_array_equal, seen[-1], trained)
  assert not np.array_equal(seen[0]['embed']['table'], seen[1]['embed']['table'])


def test_rows_of_one_prompt_are_on_one_side():
  items = [item._replace(id=f'row {i // 3}') for i, item in enumerate(examples(90))]
  kept, held_out = hold_out(items, 0.2, 0)
  assert len(held_out) == 18 and len(kept) == 72
  names = lambda items: {item.id for item in items}  # noqa: E731
  assert not names(kept) & names(held_out)
  assert names(hold_out(items, 0.2, 0)[1]) == names(held_out)
  assert names(hold_out(items, 0.2, 1)[1]) != names(held_out)
  assert len(hold_out(items, 0.0, 0)[0]) == 90
  with pytest.raises(ValueError, match='eval_share=0.9 of 1 rows leaves none'):
    hold_out(items[:3], 0.9, 0)


def test_a_moving_average_is_the_result(params, tmp_path):
  """The average is taken again here, of the parameters of runs that end after each step."""
  items = [item for item in examples(200) if len(item.tokens) > 16][:8]  # a row each, a step
  config = dataclasses.replace(CONFIG, epochs=3, schedule='constant', ema=0.75)
  plain = [dataclasses.replace(config, epochs=n, ema=0.0) for n in (1, 2, 3)]
  ends = [fit(params, tmp_path / str(c.epochs), c, items=items)[0] for c in plain]
  averaged, summary = fit(params, tmp_path / 'ema', config, items=items)
  assert summary['steps'] == 3
  expected = params
  for end in ends:
    expected = jax.tree.map(lambda e, p: 0.75 * e + 0.25 * p, expected, end)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), averaged, expected)


def test_costs_are_told(params, tmp_path):
  _, summary = fit(params, tmp_path, dataclasses.replace(CONFIG, log_every=5))
  rows = log.read(tmp_path / log.COSTS)
  assert [row['step'] for row in rows][:2] == [5, 10] and rows[-1]['step'] == summary['steps']
  tokens = 4 * sum(len(item.tokens) for item in examples(70))
  steps = np.diff([0, *(row['step'] for row in rows)])
  told = sum(
    n * row['seconds_per_step'] * row['tokens_per_second']
    for n, row in zip(steps, rows, strict=True)
  )
  assert told == pytest.approx(tokens, rel=1e-6)
  for row in rows:
    assert 0 < row['utilization'] < 1 and row['memory_bytes'] > 10**7
  assert 0 < summary['utilization'] < 1
  # FLOPs by the compiler's count of the products, where all pairs are computed, causal or not.
  lengths = np.full(8, 32)
  forward = jax.jit(lambda p, t: loop.abstract_model(MODEL)[0] and _hidden(p, t))
  counted = forward.lower(params, np.zeros((8, 32), np.int32)).compile().cost_analysis()['flops']
  products = MODEL.training_flops(lengths) / 3
  assert 0.75 * counted < products < 1.05 * counted


def _hidden(params, tokens):
  from flax import nnx

  model = nnx.merge(loop.abstract_model(MODEL)[0], params)
  place = jax.numpy.broadcast_to(jax.numpy.arange(tokens.shape[1]), tokens.shape)
  return model.unembed(model(tokens, place)[0])


def test_a_number_that_is_not_finite_names_the_examples(params, tmp_path):
  broken = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(np.nan), params)
  with pytest.raises(
    FloatingPointError, match=r'loss is nan at step 1.*: row \d+, row \d+'
  ) as error:
    fit(broken, tmp_path, items=examples(5))
  assert all(f'row {i}' in str(error.value) for i in range(5))


def test_a_trace_is_written(params, tmp_path):
  fit(params, tmp_path, watch=loop.Watch(profile=2))
  assert list((tmp_path / 'profile').rglob('*.xplane.pb'))


def test_known_devices_have_their_peak():
  class Device:
    platform, device_kind = 'gpu', 'NVIDIA H200'

  assert hardware.peak_flops([Device()] * 4, 'bfloat16') == 4 * 989e12
  Device.device_kind = 'TPU v5 lite'
  assert hardware.peak_flops([Device()], 'bfloat16') == 197e12
  Device.device_kind = 'something new'
  assert hardware.peak_flops([Device()], 'bfloat16') is None


RUN = """
import sys, jax, numpy as np
from cai_jax.model.transformer import init_params
from cai_jax.training import loop
from tests import test_watch as t
params = init_params(t.MODEL, jax.random.key(0))
config = t.dataclasses.replace(t.CONFIG, epochs=1, checkpoint_every=1000)
try:
  trained, _ = t.fit(params, sys.argv[1], config, items=t.examples(6000))
except loop.Preempted as ended:
  sys.exit(f'preempted: {ended}')
np.savez(sys.argv[1] + '/end.npz', *jax.tree.leaves(trained))
"""


def test_sigterm_saves_and_the_next_start_goes_on_exactly(tmp_path):
  root = pathlib.Path(__file__).parents[1]

  def start(name):
    (tmp_path / name).mkdir(exist_ok=True)
    environment = {**os.environ, 'PYTHONPATH': str(root), 'XLA_FLAGS': ''}
    command = [sys.executable, '-c', RUN, str(tmp_path / name)]
    return subprocess.Popen(command, env=environment, cwd=root, stderr=subprocess.PIPE, text=True)

  whole, cut, metrics = start('whole'), start('cut'), tmp_path / 'cut' / log.METRICS
  while not metrics.exists() or metrics.read_bytes().count(b'\n') < 3:
    assert cut.poll() is None
    time.sleep(0.01)
  cut.send_signal(signal.SIGTERM)
  told = cut.communicate()[1]
  assert cut.returncode == 1 and 'preempted: ended after step' in told
  saved = [int(p.name) for p in (tmp_path / 'cut/checkpoints').iterdir() if p.name.isdigit()]
  assert len(saved) == 1 and f'after step {saved[0]} of' in told
  assert start('cut').wait() == whole.wait() == 0
  with np.load(tmp_path / 'whole/end.npz') as one, np.load(tmp_path / 'cut/end.npz') as other:
    assert all(np.array_equal(one[name], other[name]) for name in one)
  rows = [json.loads(line)['step'] for line in metrics.open()]
  assert rows == [*range(1, len(rows) + 1)] and rows[-1] > saved[0]
