"""Checkpoints that are damaged, or cannot be written: never silently another result."""

import dataclasses
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cai_jax.runtime.errors import StoppedError, UserError
from cai_jax.training import checkpoints
from cai_jax.training.loop import fit
from tests.training_setup import CONFIG, MODEL, initial_params, one_device, random_examples

SHORT = dataclasses.replace(CONFIG, epochs=1, checkpoint_every=1, keep=2)
EXAMPLES = random_examples(40)


def train(workdir):
  return fit(MODEL, initial_params(), EXAMPLES, SHORT, one_device(), workdir)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """Folder, parameters and number of steps of an undisturbed run."""
  workdir = tmp_path_factory.mktemp('whole')
  params, summary = train(workdir)
  return workdir, jax.device_get(params), summary['steps']


def copy(whole, tmp_path):
  """Return a copy of the run's folder, and the folder of its newest checkpoint."""
  workdir = shutil.copytree(whole[0], tmp_path / 'run')
  return workdir, workdir / 'checkpoints' / str(whole[2])


def flip(path, byte):
  content = bytearray(path.read_bytes())
  content[byte] ^= 1
  path.write_bytes(content)


def largest(folder):
  return max((folder / 'state').rglob('*'), key=lambda path: path.stat().st_size * path.is_file())


DAMAGES = {
  'flipped': lambda folder: flip(largest(folder), largest(folder).stat().st_size // 2),
  'missing': lambda folder: largest(folder).unlink(),
  'cut': lambda folder: largest(folder).write_bytes(b''),
  'no state': lambda folder: shutil.rmtree(folder / 'state'),
  'no metadata': lambda folder: (folder / '_CHECKPOINT_METADATA').unlink(),
  'no data': lambda folder: (folder / 'data' / '_METADATA').write_bytes(b'{'),
  'empty': lambda folder: (shutil.rmtree(folder), folder.mkdir()),
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in [*DAMAGES][1:]]


@pytest.mark.parametrize('damage', ['flipped', *SLOW])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(whole, tmp_path, capfd, damage):
  workdir, newest = copy(whole, tmp_path)
  DAMAGES[damage](newest)
  params, summary = train(workdir)
  assert summary['resumed_at'] == whole[2] - 1
  jax.tree.map(np.testing.assert_array_equal, params, whole[1])
  errors = capfd.readouterr().err
  assert f'{newest} is damaged' in errors and f'step {whole[2] - 1}.' in errors
  assert 'Traceback' not in errors
  # The step was saved again, and the run is as complete as before.
  assert train(workdir)[1]['resumed_at'] == whole[2]


def test_the_state_of_another_step_is_not_taken_for_the_newest(whole, tmp_path):
  workdir, newest = copy(whole, tmp_path)
  shutil.rmtree(newest / 'state')
  shutil.copytree(newest.with_name(str(whole[2] - 1)) / 'state', newest / 'state')
  params, summary = train(workdir)
  assert summary['resumed_at'] == whole[2] - 1
  jax.tree.map(np.testing.assert_array_equal, params, whole[1])


@pytest.mark.parametrize('later', [1, 7])
def test_a_checkpoint_under_the_name_of_another_step_is_damaged(whole, tmp_path, later):
  workdir, newest = copy(whole, tmp_path)
  shutil.rmtree(newest.with_name(str(whole[2] - 1)))
  newest.rename(newest.with_name(str(whole[2] - 2 + later)))
  with pytest.raises(UserError, match=f'damaged: it is the checkpoint of step {whole[2]}'):
    train(workdir)


def test_a_run_without_a_whole_checkpoint_is_refused(whole, tmp_path):
  workdir, newest = copy(whole, tmp_path)
  for folder in newest.parent.iterdir():
    shutil.rmtree(folder / 'state')
  with pytest.raises(UserError, match=r'checkpoints/\d+ is damaged: .* Restore it, or delete it'):
    train(workdir)


def test_the_checksum_sees_every_bit():
  state = {'a': jax.numpy.arange(6.0), 'b': jax.numpy.zeros((2, 3), 'bfloat16')}
  checksum = checkpoints._checksum(state)
  assert checksum == checkpoints._checksum(jax.tree.map(jax.numpy.copy, state))
  for name, bit in (('a', 1), ('a', 1 << 31), ('b', 1)):
    bits = np.array(state[name]).view(np.uint32 if name == 'a' else np.uint16)
    bits.flat[3] ^= bits.dtype.type(bit)
    changed = state | {name: jax.numpy.asarray(bits.view(state[name].dtype))}
    assert checkpoints._checksum(changed) != checksum


def test_an_error_of_a_save_in_the_background_is_a_stopped_error(tmp_path, monkeypatch):
  make = checkpoints.ocp.training.Checkpointer

  def fail(*args, **kwargs):
    raise ValueError('RESOURCE_EXHAUSTED: write failed: No space left on device [28]')

  monkeypatch.setattr(make, 'save_checkpointables_async', fail)
  with pytest.raises(StoppedError, match='checkpoints cannot be used: No space left on device'):
    train(tmp_path)


def test_sigterm_and_sigint_are_no_fault_of_a_checkpoint(monkeypatch, whole, tmp_path):
  """An interruption while a checkpoint is loaded is not taken for damage."""
  workdir, newest = copy(whole, tmp_path)
  from cai_jax.runtime.interruption import Interrupted

  def interrupt(*args, **kwargs):
    raise Interrupted(signal.SIGTERM)

  make = checkpoints.ocp.training.Checkpointer
  monkeypatch.setattr(make, 'load_checkpointables', interrupt)
  with pytest.raises(Interrupted):
    train(workdir)
  assert newest.exists()


def test_sums_of_bits_are_the_same_on_the_host_and_on_devices():
  arrays = [jnp.arange(7.0) - 3, jnp.arange(6, dtype=jnp.bfloat16) - 2, jnp.int32(-1)]
  on_host = [checkpoints._sum_bits_on_host(np.asarray(x)) for x in arrays]
  assert on_host == [int(total) for total in checkpoints._sum_bits(arrays)]
