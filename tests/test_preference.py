"""Training on preferences: any division of the work, resumption, and errors before step one."""

import dataclasses
import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from cai_jax.data import packing
from cai_jax.data.unit_table import stack_units
from cai_jax.data.units import Example, Unit, share_prompt
from cai_jax.model import lora, peft
from cai_jax.model.lm import LM
from cai_jax.model.transformer import abstract_model
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.mesh import batch_sharding, make_mesh, token_sharding
from cai_jax.training import loop, reference
from cai_jax.training.held_out import HeldOut
from cai_jax.training.losses import register_loss, whole_of
from cai_jax.training.losses.comparisons import comparison_mask, sides
from cai_jax.training.losses.logprobs import sequence_logprobs
from cai_jax.training.prefer_config import PreferConfig
from cai_jax.training.preference import group_by_prompt, prefer
from cai_jax.training.state import init_state, place_frozen
from cai_jax.training.step import make_eval_step, make_train_step, place_batch
from tests.preference_setup import PREFER, random_units, with_reference
from tests.training_setup import (
  MODEL,
  Killed,
  bitwise_equal,
  initial_params,
  killed_before,
  one_device,
  read_rows,
)

GRAPH, SHAPES = abstract_model(MODEL)
UNITS = with_reference(random_units(40))
DPO = dataclasses.replace(PREFER, options=(('beta', 0.5),))


def run_steps(config, mesh, count=3, units=UNITS):
  """Return the trained parameters after `count` steps, and the metrics of each."""
  graph, params, frozen = GRAPH, initial_params(), None
  if config.lora is not None:
    graph, _ = lora.abstract_model(MODEL, config.lora)
    frozen = place_frozen(jax.device_get(params), config, mesh)
    params = lora.init(MODEL, config.lora, jax.random.key(0))
    # The second factor starts at 0, and then the first has no gradient.
    params = jax.tree.map(lambda x: jnp.where(x == 0, 0.1, x), jax.device_get(params))
  steps = packing.plan([u.length for u in units], [packing.Bucket(48, 8)], 4, 0)
  batches = packing.Batches(units, steps)
  train_step = make_train_step(graph, params, config, len(steps), mesh, frozen)
  state = dataclasses.replace(init_state(params, config, mesh), frozen=frozen)
  metrics = []
  for i in range(count):
    state, row = train_step(state, place_batch(batches[i], token_sharding(mesh)))
    metrics.append(jax.device_get(row))
  return jax.device_get(state.params), metrics


@pytest.fixture(scope='module')
def three_steps():
  return run_steps(DPO, one_device())


def assert_agree(actual, expected, tolerance=1e-5):
  for row, expected_row in zip(actual[1], expected[1], strict=True):
    assert row.keys() == expected_row.keys()
    for name in row:
      assert row[name] == pytest.approx(expected_row[name], rel=tolerance, abs=1e-6), name
  for a, b in zip(jax.tree.leaves(actual[0]), jax.tree.leaves(expected[0]), strict=True):
    np.testing.assert_allclose(a, b, atol=tolerance)


@pytest.mark.slow
def test_accumulation_equals_one_batch(three_steps):
  config = dataclasses.replace(DPO, accumulation=4)
  assert_agree(run_steps(config, make_mesh(2, devices=jax.devices()[:2])), three_steps)


@pytest.mark.parametrize(
  ('sizes', 'accumulation'),
  [pytest.param(sizes, 1, marks=pytest.mark.slow) for sizes in ((8, 1, 1), (1, 8, 1), (1, 2, 4))]
  + [((2, 2, 2), 2)],
)
def test_eight_devices_equal_one(three_steps, sizes, accumulation):
  """Axes are data, fsdp and tensor."""
  config = dataclasses.replace(DPO, accumulation=accumulation)
  assert_agree(run_steps(config, make_mesh(*sizes)), three_steps)
  assert {'accuracy', 'margin', 'chosen_log_ratio', 'loss', 'grad_norm'} <= set(three_steps[1][0])


@pytest.mark.slow
def test_micro_batches_of_split_rows_equal_one_batch(three_steps):
  config = dataclasses.replace(DPO, attention='blocks', accumulation=2)
  assert_agree(run_steps(config, make_mesh(data=4, sequence=2)), three_steps)


@pytest.mark.slow
def test_adapters_on_eight_devices_equal_one():
  config = dataclasses.replace(DPO, lora_rank=2)
  assert_agree(run_steps(config, make_mesh(2, 2, 2)), run_steps(config, one_device()))


@pytest.mark.slow
@pytest.mark.parametrize('sizes', [{'data': 2, 'fsdp': 2, 'tensor': 2}, {'data': 4, 'sequence': 2}])
def test_shared_prompts_on_eight_devices_equal_one(sizes):
  config = dataclasses.replace(DPO, attention='blocks', share_prompts=True, accumulation=2)
  units = list(map(share_prompt, UNITS))
  assert_agree(
    run_steps(config, make_mesh(**sizes), units=units),
    run_steps(dataclasses.replace(config, accumulation=1), one_device(), units=units),
  )


def centred(graph, params, batch, sharding=None, remat='none', attention='xla', whole=None):
  """Σ (d - mean of d over the whole batch)², where d is a difference of log-probabilities."""
  model = nnx.merge(graph, params)
  logprobs = sequence_logprobs(model, batch, sharding, remat, attention)
  mask = comparison_mask(batch)
  chosen, rejected = sides(logprobs.sums)
  sums = {
    'num_tokens': logprobs.counts.sum(),
    'num_comparisons': mask.sum(),
    'difference': jnp.sum((chosen - rejected) * mask),
  }
  mean = whole_of(whole, sums)['difference'] / whole_of(whole, sums)['num_comparisons']
  return jnp.sum((chosen - rejected - mean) ** 2 * mask) / 100, sums


@pytest.fixture
def centred_loss(restored_registries):
  register_loss('centred', {'comparison': 'num_comparisons'}, units='comparison', needs_whole=True)(
    centred
  )
  return dataclasses.replace(PREFER, objective='centred')


@pytest.mark.slow  # tests/test_preference_losses.py has the same for KTO
def test_micro_batches_know_the_sums_of_the_whole_batch(centred_loss):
  expected = run_steps(centred_loss, one_device(), 1)
  actual = run_steps(dataclasses.replace(centred_loss, accumulation=4), one_device(), 1)
  assert_agree(actual, expected)


@pytest.mark.slow
def test_a_held_out_loss_knows_the_sums_of_all_held_out_units(centred_loss):
  state = init_state(initial_params(), centred_loss, one_device())
  losses = []
  for rows in (2, 16):  # several batches, and one
    config = dataclasses.replace(centred_loss, batch_size=rows)
    evaluate = make_eval_step(GRAPH, config, one_device())
    buckets, sharding = (packing.Bucket(48, rows),), batch_sharding(one_device())
    held_out = HeldOut(evaluate, UNITS[:12], buckets, config, sharding)
    losses.append(held_out.evaluate(1, state)['loss'])
  assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def make_lm(vocabulary=('a', 'b')):
  tokens = {token: i for i, token in enumerate(vocabulary)}
  tokenizer = types.SimpleNamespace(get_vocab=lambda: tokens)
  return LM(MODEL, initial_params(), tokenizer, one_device(), 'float32', 'tiny', 'tiny')


MAKERS = {'make_train_step': loop.make_train_step, 'make_eval_step': loop.make_eval_step}


@pytest.fixture(scope='module')
def _compile_once():
  """Lets the runs of this module share their programs, which have no state."""
  with pytest.MonkeyPatch.context() as patch:
    for name, make in MAKERS.items():
      patch.setattr(loop, name, _remember(make))
    yield


def _remember(make):
  """Return `make` with a memory; settings that change no step are no part of its key.

  The other arguments count: the number of steps, the mesh, and the structure of parameters.
  """
  made = {}

  def remembered(graph, *args):
    parts = []
    for x in args:
      if isinstance(x, PreferConfig):
        x = dataclasses.replace(x, checkpoint_every=0, init='aligned', reference='')
      is_plain = isinstance(x, PreferConfig | int | Mesh)
      parts.append(x if is_plain else jax.tree.structure(x))
    key = graph, *parts
    if key not in made:
      made[key] = make(graph, *args)
    return made[key]

  return remembered


@pytest.fixture(scope='module')
def whole_run(tmp_path_factory, _compile_once):
  """Return the folder, parameters and summary of a run that was not interrupted."""
  workdir = tmp_path_factory.mktemp('whole')
  config = dataclasses.replace(
    PREFER, batch_size=4, eval_share=0.2, eval_every=3, patience=9, ema=0.5
  )
  return workdir, config, *prefer(make_lm(), random_units(40), config, workdir)


@pytest.mark.parametrize('shared', [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_killed_run_ends_with_bitwise_the_same_parameters(
  shared, whole_run, tmp_path, monkeypatch
):
  """Its programs are those of the whole run, or are compiled anew."""
  workdir, config, params, summary = whole_run
  if shared:
    shutil.copy(workdir / 'reference.json', tmp_path)
  else:
    for name, make in MAKERS.items():
      monkeypatch.setattr(loop, name, make)
  config = dataclasses.replace(config, checkpoint_every=2)
  with killed_before(4):
    prefer(make_lm(), random_units(40), config, tmp_path)
  with monkeypatch.context() as patch:
    patch.setattr(reference, 'compute_reference', None)  # the file has its numbers
    table = stack_units(random_units(40), 'comparison')  # as the stage makes them
    again, resumed = prefer(make_lm(), table, config, tmp_path)
  assert 0 < resumed['resumed_at'] < 4 < resumed['steps'] == summary['steps']
  assert bitwise_equal(again, params)
  for file in ('metrics.jsonl', 'held_out.jsonl', 'reference.json'):
    assert (tmp_path / file).read_text() == (workdir / file).read_text(), file


@pytest.mark.slow
def test_a_killed_run_with_shared_prompts_ends_with_bitwise_the_same_parameters(
  tmp_path, monkeypatch
):
  config = dataclasses.replace(PREFER, batch_size=4, share_prompts=True, checkpoint_every=2)
  units = random_units(40)
  table = stack_units(units, 'comparison')
  params, summary = prefer(make_lm(), table, config, tmp_path / 'whole')
  assert summary['shared_tokens'] == sum(share_prompt(unit).shared for unit in units) > 0
  save = loop.save_checkpoint

  def save_and_die(checkpointer, step, *args):
    save(checkpointer, step, *args)
    raise Killed

  with monkeypatch.context() as patch:
    patch.setattr(loop, 'save_checkpoint', save_and_die)
    with pytest.raises(Killed):
      prefer(make_lm(), units, config, tmp_path / 'killed')
  again, resumed = prefer(make_lm(), units, config, tmp_path / 'killed')
  assert resumed['resumed_at'] == 2 < summary['steps'] and bitwise_equal(again, params)


def test_a_run_does_not_begin_to_share_prompts(whole_run):
  """Its checkpoints belong to other steps; those of earlier versions have no such setting."""
  workdir, config, _, _ = whole_run
  with pytest.raises(UserError, match='share_prompts: was False, is True'):
    prefer(make_lm(), random_units(40), dataclasses.replace(config, share_prompts=True), workdir)


def test_metrics_and_held_out_rows_say_how_often_the_policy_agrees(whole_run):
  workdir, _, _, summary = whole_run
  rows, held_out = read_rows(workdir), read_rows(workdir, 'held_out.jsonl')
  assert rows[0]['loss'] == pytest.approx(np.log(2), rel=1e-5)  # the policy is the reference
  assert rows[0]['margin'] == pytest.approx(0, abs=1e-5)
  assert rows[-1]['margin'] > 0.001 and rows[-1]['accuracy'] > 0.6
  assert {'loss', 'accuracy', 'margin', 'chosen_log_ratio'} <= set(held_out[-1])
  assert [row['step'] for row in held_out][-1] == summary['steps'] and summary['held_out'] == 8
  assert summary['least_held_out_loss'] == min(row['loss'] for row in held_out)


def test_reference_log_probabilities_do_not_depend_on_their_batches(whole_run, tmp_path):
  units = random_units(40)
  stored = json.loads((whole_run[0] / 'reference.json').read_text())['logprobs']
  config = dataclasses.replace(PREFER, batch_size=2, accumulation=1, max_length=64)
  ours = reference.compute_reference(make_lm(), units, config)
  np.testing.assert_allclose(ours, stored, rtol=1e-5)
  (tmp_path / 'reference.json').write_text('{"digest": 1, "checksum": 2, "logprobs": []}')
  with pytest.raises(UserError, match='reference.json is damaged. Delete it'):
    prefer(make_lm(), units, PREFER, tmp_path)


def test_a_run_resumes_with_other_names_of_the_same_models(whole_run):
  workdir, config, params, _ = whole_run
  moved = dataclasses.replace(config, init='moved/model', reference='moved/model')
  again, _ = prefer(make_lm(), random_units(40), moved, workdir)
  assert bitwise_equal(again, params)


def test_the_reference_of_another_run_is_not_overwritten(whole_run):
  workdir, config, _, _ = whole_run
  before = (workdir / 'reference.json').read_bytes()
  with pytest.raises(UserError, match='checkpoints of another run.*or choose another workdir'):
    prefer(make_lm(), random_units(40, seed=3), config, workdir)
  assert (workdir / 'reference.json').read_bytes() == before


def test_adapters_to_start_from_belong_to_the_reference(tmp_path):
  """So the policy is the reference at the first step: the loss is log 2."""
  config = dataclasses.replace(PREFER, epochs=1, lora_rank=2, lora_init=str(tmp_path / 'adapter'))
  initial = lora.init(MODEL, config.lora, jax.random.key(0))
  adapters = jax.tree.map(lambda x: np.asarray(x) + np.float32(0.2), initial)
  peft.write_adapters(config.lora_init, adapters, MODEL, config.lora, 'tiny')
  lm = make_lm()
  start = reference.initial_model(lm, config)
  assert np.abs(start.logits([[1, 2, 3]]) - lm.logits([[1, 2, 3]])).max() > 0.01
  names = {reference.initial_id(lm, config), lm.fingerprint}
  peft.write_adapters(config.lora_init, initial, MODEL, config.lora, 'tiny')
  names.add(reference.initial_id(lm, config))
  assert len(names) == 3
  peft.write_adapters(config.lora_init, adapters, MODEL, config.lora, 'tiny')
  prefer(lm, random_units(8), config, tmp_path / 'run')
  assert read_rows(tmp_path / 'run')[0]['margin'] == pytest.approx(0, abs=1e-5)
  assert read_rows(tmp_path / 'run')[0]['loss'] == pytest.approx(np.log(2), rel=1e-5)


def test_comparisons_of_one_prompt_are_held_out_together():
  units = random_units(6)
  first = units[0].segments
  prompt = first[0].tokens[: int(first[0].loss_mask.argmax())]
  reply = np.array([1, 2, 3], np.int32)
  other = Example(np.concatenate([prompt, reply]), np.arange(len(prompt) + 3) >= len(prompt))
  units.append(Unit((other, first[1]), units[0].values, 'other reply'))
  groups = group_by_prompt(units)
  assert groups['other reply'] == groups['pair 0'] and len(set(groups.values())) == 6


def test_what_cannot_be_trained_is_refused_before_the_first_step(tmp_path):
  units = random_units(4)

  def load():
    raise AssertionError('the reference is loaded before everything is checked')

  for options in ({'load_reference': load}, {'reference_id': 'other'}):
    with pytest.raises(ValueError, match='both load_reference and reference_id'):
      prefer(make_lm(), units, PREFER, tmp_path, **options)
  other = {'load_reference': load, 'reference_id': 'other'}
  nan = units[0]._replace(values={'probability': (np.nan, 0.5)})
  long = dataclasses.replace(PREFER, max_length=20)
  for given, config, options, match in (
    (
      units,
      PREFER,
      {'load_reference': lambda: make_lm('abc'), 'reference_id': 'other'},
      'prefer.reference: tiny has another tokenizer than tiny',
    ),
    (units, long, {}, 'pair .* tokens with its 2 sequences, but a row holds prefer.max_length=20'),
    (random_units(4, segments=1), PREFER, {}, "the kind 'comparison', which have 2"),
    ([], PREFER, {}, 'no unit'),
    ([nan, *units], PREFER, {}, r"pair 0: 'probability' is \(nan, 0.5\)"),
    (units, dataclasses.replace(PREFER, warmup=0.99, epochs=1), other, 'prefer.warmup'),
    (units, dataclasses.replace(PREFER, balance_loss=0.1), other, 'prefer.balance_loss'),
    (units, dataclasses.replace(PREFER, attention='cudnn'), other, 'prefer.attention'),
    (units, dataclasses.replace(PREFER, eval_share=0.99), other, 'prefer.eval_share'),
  ):
    with pytest.raises(UserError, match=match):
      prefer(make_lm(), given, config, tmp_path, **options)


def test_the_reference_of_shared_prompts_is_that_of_two_copies():
  units = [unit._replace(values={}) for unit in UNITS[:12]]
  config = dataclasses.replace(PREFER, attention='blocks')
  expected = reference.compute_reference(make_lm(), units, config)
  shared = list(map(share_prompt, units))
  assert sum(unit.shared for unit in shared)
  ours = reference.compute_reference(
    make_lm(), shared, dataclasses.replace(config, share_prompts=True)
  )
  np.testing.assert_allclose(ours, expected, rtol=1e-5)
