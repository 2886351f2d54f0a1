"""Replicas: whose prompts are whose, and how the processes of one stay together."""

import itertools
import types

import jax
import pytest
from jax._src import distributed

from cai_jax import pipeline
from cai_jax.pipeline import checks, engine_sizes, launches, models, stages
from cai_jax.pipeline.sections import MeshConfig, SamplingMesh
from cai_jax.runtime import interruption, lock, replicas
from cai_jax.runtime.errors import SampledError, StoppedError, UserError
from cai_jax.runtime.replicas import (
  ALONE,
  LockStep,
  Replica,
  ReplicaStopped,
  exit_alone,
  find_replica,
  replica_of,
)
from cai_jax.sampling import journal as journals
from cai_jax.sampling.journal import Journal
from cai_jax.sampling.types import Completion
from tests.pipeline_setup import set_fields, small


class Store:
  """The key-value store of some processes."""

  def __init__(self):
    self.values = {}

  def key_value_set(self, key, value, allow_overwrite=False):
    if key in self.values:
      raise RuntimeError('ALREADY_EXISTS')
    self.values[key] = value

  def key_value_try_get(self, key):
    if key not in self.values:
      raise RuntimeError('NOT_FOUND')
    return self.values[key]

  def blocking_key_value_get(self, key, milliseconds):
    return self.values[key]


@pytest.fixture
def store(monkeypatch):
  store = Store()
  monkeypatch.setattr(distributed.global_state, 'client', store)
  return store


@pytest.fixture
def process(monkeypatch):
  """`process(i)` makes this process that with index i of two."""

  shares = itertools.count(), itertools.count()

  def become(index):
    monkeypatch.setattr(jax, 'process_index', lambda: index)
    monkeypatch.setattr(replicas, '_shares', shares[index])

  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  return become


PAIR = Replica(0, 1, (0, 1))


def run_with(mesh=None, sampling=None):
  config = types.SimpleNamespace(
    mesh=MeshConfig(**mesh or {}), mesh_sampling=SamplingMesh(**sampling or {})
  )
  return types.SimpleNamespace(config=config)


@pytest.mark.parametrize(
  ('mesh', 'sampling', 'sizes'),
  [
    ({}, {}, (8, 1, 1)),
    ({'data': 2, 'fsdp': 2, 'tensor': 2}, {}, (2, 2, 2)),
    ({'fsdp': 8}, {'tensor': 8}, (1, 1, 8)),
    ({'data': 1, 'fsdp': -1}, {'fsdp': 2, 'tensor': 4}, (1, 2, 4)),
    ({'tensor': 2}, {'processes': -1}, (4, 1, 2)),
  ],
)
def test_the_mesh_of_sampling_follows_that_of_training(mesh, sampling, sizes):
  shape = models.sampling_mesh(run_with(mesh, sampling)).shape
  assert (shape['data'], shape['fsdp'], shape['tensor']) == sizes


@pytest.mark.parametrize(
  ('sampling', 'message'),
  [
    ({'processes': 3}, 'mesh_sampling.processes=3 does not divide the 1 processes'),
    ({'tensor': 3}, 'mesh_sampling: mesh data=-1, fsdp=1, tensor=3 does not fit 8 devices'),
  ],
)
def test_a_replica_that_does_not_fit_is_refused(sampling, message):
  with pytest.raises(UserError, match=message):
    models.sampling_mesh(run_with(sampling=sampling))


@pytest.mark.parametrize(('name', 'value'), [('processes', 0), ('tensor', -2)])
def test_sizes_of_a_replica_are_checked(name, value):
  with pytest.raises(UserError, match=f'mesh_sampling.{name}={value} must be'):
    SamplingMesh(**{name: value})


def test_a_process_alone_is_a_replica(monkeypatch):
  assert replica_of(None) == ALONE and ALONE.leads and not ALONE.is_split
  monkeypatch.setenv('CAI_JAX_REPLICA', '1')
  monkeypatch.setenv('CAI_JAX_NUM_REPLICAS', '3')
  assert find_replica([object()]) == Replica(1, 3, (0,)) and replica_of(None) == ALONE


@pytest.mark.parametrize(
  ('index', 'count', 'message'),
  [('1', '', 'set both'), ('x', '2', 'set both'), ('2', '2', 'less than the other')],
)
def test_variables_that_name_no_replica_are_refused(monkeypatch, index, count, message):
  monkeypatch.setenv('CAI_JAX_REPLICA', index)
  monkeypatch.setenv('CAI_JAX_NUM_REPLICAS', count)
  with pytest.raises(UserError, match=message):
    replicas.launched_replica()


def test_the_leader_decides_for_its_replica(store, process):
  process(0)
  assert PAIR.share(lambda: {'slots': 8}) == {'slots': 8}
  process(1)
  assert PAIR.share(lambda: {'slots': 4}) == {'slots': 8}


def test_an_error_of_the_leader_reaches_its_replica(store, process):
  process(0)
  with pytest.raises(ZeroDivisionError):
    PAIR.share(lambda: 1 / 0)
  process(1)
  with pytest.raises(ReplicaStopped, match='Process 0 has failed'):
    PAIR.share(lambda: 1)


class Exited(BaseException):
  """What `os._exit` raises in the next test."""


@pytest.mark.parametrize(
  ('error', 'replica', 'raised'),
  [
    (SampledError('NaN'), PAIR, SampledError),
    (ReplicaStopped('process 0'), PAIR, ReplicaStopped),
    (UserError('no file of the rater'), PAIR, Exited),
    (StoppedError('the disk is full'), PAIR, Exited),
    (UserError('no file of the rater'), ALONE, UserError),
  ],
)
def test_a_process_of_a_split_replica_exits_unless_all_of_them_fail(
  monkeypatch, capsys, error, replica, raised
):
  def leave(status):
    raise Exited(status)

  monkeypatch.setattr(replicas.os, '_exit', leave)
  with pytest.raises(raised), exit_alone(replica):
    raise error
  assert (str(error) in capsys.readouterr().err) == (raised is Exited)


def test_a_journal_that_its_leader_cannot_open_stops_the_replica(tmp_path, store, process):
  (tmp_path / 'journal').write_text('not a folder')
  process(0)
  with pytest.raises((OSError, UserError), match='journal'):
    Journal(tmp_path / 'journal', 0, PAIR)
  process(1)
  with pytest.raises(ReplicaStopped, match='Process 0 has failed'):
    Journal(tmp_path / 'journal', 0, PAIR)


def test_sizes_that_no_leader_can_choose_stop_its_replica(tmp_path, store, process, monkeypatch):
  def fail(run):
    raise UserError('no such folder')

  run = pipeline.build(small('tiny'), tmp_path)
  monkeypatch.setattr(engine_sizes, 'sampling_models', fail)
  monkeypatch.setattr(engine_sizes, 'sampling_mesh', lambda run: object())
  monkeypatch.setattr(engine_sizes, 'replica_of', lambda mesh: PAIR)
  process(0)
  with pytest.raises(UserError, match='no such folder'):
    engine_sizes.resolve_engine(run, samples=True)
  process(1)
  with pytest.raises(ReplicaStopped, match='Process 0 has failed'):
    engine_sizes.resolve_engine(run, samples=True)


def test_processes_agree_where_to_stop(store):
  """One proposes to stop at its step 3 while the other is a step ahead."""
  ahead = [interruption.stop_together('key', step, 0) for step in (1, 2, 3, 4)]
  behind = [interruption.stop_together('key', step, 15 * (step == 3)) for step in (1, 2, 3, 4, 5)]
  assert ahead == [0] * 4 and behind == [0, 0, 0, 0, 15]
  assert interruption.stop_together('key', 5, 0) == 15


def test_an_error_of_the_leader_stops_all_at_the_same_step(store, process, monkeypatch):
  def fail():
    raise StoppedError('the disk is full')

  steps = {}
  for index in (0, 1):
    process(index)
    monkeypatch.setattr(replicas, '_runs', iter([0]))
    lock_step = LockStep(PAIR)
    lock_step.lead(fail)  # the other process writes nothing
    for step in range(1, 10):
      steps[index] = step
      try:
        lock_step.check()
      except ReplicaStopped as error:
        message = str(error)
        break
    assert ('the disk is full' in message) == (index == 0)
  assert steps == {0: 3, 1: 3}


def test_only_the_leader_writes_the_journal_and_all_find_the_same_turns(
  tmp_path, store, process, monkeypatch
):
  monkeypatch.setattr(journals, 'VISIBLE_SECONDS', 0.0)
  turn = lambda text: Completion([1], text, [-0.5], 'stop')  # noqa: E731
  keys = [f'{i:032x}' for i in range(3)]
  process(0)
  leader = Journal(tmp_path, 0, PAIR)
  process(1)
  follower = Journal(tmp_path, 0, PAIR)
  for key in keys[:2]:
    process(0)
    leader.put([(key, turn(key))])
    process(1)
    follower.put([(key, turn(key))])
  process(0)
  leader.refresh()
  leader.put([(keys[2], turn('later'))])  # the follower must not see it yet
  process(1)
  follower.refresh()
  assert [follower.get(key) for key in keys] == [leader.get(key) for key in keys]
  assert follower.get(keys[1]).text == keys[1] and follower.get(keys[2]) is None
  assert len((tmp_path / 'turns-00000.jsonl').read_bytes().splitlines()) == 3


def test_processes_with_folders_of_their_own_index_what_all_of_them_have(
  tmp_path, store, process, monkeypatch
):
  """Another launch has written a turn between the moments in which they fetched its file."""
  monkeypatch.setattr(journals, 'VISIBLE_SECONDS', 0.0)
  keys = [f'{i:032x}' for i in range(4)]
  other = Journal(tmp_path / 'other', 1)
  for key in keys[:2]:
    other.put([(key, Completion([1], key, [-0.5], 'stop'))])
  content = (tmp_path / 'other' / 'turns-00001.jsonl').read_bytes()
  first = content.index(b'\n') + 1
  folders = [tmp_path / 'leader', tmp_path / 'follower']
  for folder, size in zip(folders, (len(content), first), strict=True):
    folder.mkdir()
    (folder / 'turns-00001.jsonl').write_bytes(content[:size])
  sizes = [{'turns-00001.jsonl': len(content)}, {'turns-00001.jsonl': first}]
  monkeypatch.setattr(Replica, 'gather', lambda self, own: sizes)
  monkeypatch.setattr(journals, 'is_private', lambda folder: True)
  process(0)
  leader = Journal(folders[0], 0, PAIR)
  process(1)
  follower = Journal(folders[1], 0, PAIR)
  process(0)
  leader.put([(keys[2], Completion([1], 'own', [-0.5], 'stop'))])
  sizes[0]['turns-00000.jsonl'] = 99  # which the follower has not fetched yet
  leader.refresh()
  process(1)
  follower.refresh()
  for journal in (leader, follower):
    assert [journal.get(key) is not None for key in keys] == [True, False, False, False]


def test_every_process_of_a_replica_gets_the_values_of_all(store, process):
  store.values |= {f'cai_jax/replica/0/0/{i}': str(i) for i in (0, 1)}
  values = store.values.copy()
  for index in (0, 1):
    store.values = {k: x for k, x in values.items() if not k.endswith(f'/{index}')}
    process(index)
    assert PAIR.gather(index) == [0, 1]


def test_replica_0_waits_until_the_others_have_written_their_shards(tmp_path, monkeypatch):
  monkeypatch.setattr(launches, 'launched_replica', lambda: (0, 3))
  monkeypatch.setattr(launches, 'POLL_SECONDS', 0.0)
  missing = iter([[1, 2, 4], [4], []])
  with lock.hold(tmp_path / 'replicas' / '1', replicas=3):
    with lock.hold(tmp_path / 'replicas' / '2', replicas=3):
      launches.wait_for_replicas(tmp_path, lambda: next(missing))


def test_replica_0_does_not_wait_for_itself(tmp_path, monkeypatch):
  monkeypatch.setattr(launches, 'launched_replica', lambda: (0, 3))
  launches.wait_for_replicas(tmp_path, lambda: [0, 3])


def test_replica_0_stops_if_another_ends_before_its_shards(tmp_path, monkeypatch):
  monkeypatch.setattr(launches, 'launched_replica', lambda: (0, 3))
  monkeypatch.setattr(launches, 'POLL_SECONDS', 0.0)
  held = lock.hold(tmp_path / 'replicas' / '1', replicas=3)
  held.__enter__()
  calls = []

  def find_missing():
    calls.append(1)
    if len(calls) == 2:
      held.__exit__(None, None, None)
    return [1, 4]

  with pytest.raises(StoppedError, match='Replica 1 of 3 is not running, and 2 of its shards'):
    launches.wait_for_replicas(tmp_path, find_missing)


def test_launches_share_a_workdir_only_as_replicas_of_one_run(tmp_path, monkeypatch):
  become = lambda *replica: monkeypatch.setattr(launches, 'launched_replica', lambda: replica)  # noqa: E731
  become(0, 2)
  with launches.hold_run(tmp_path):
    become(1, 2)
    with launches.hold_run(tmp_path):
      pass
    for replica in ((1, 3), (2, 3)):
      become(*replica)
      with pytest.raises(UserError, match='belongs to replica 0 of 2'):
        with launches.hold_run(tmp_path):
          pass
  become(1, 2)
  with launches.hold_run(tmp_path):
    become(0, 1)
    with pytest.raises(UserError, match='belongs to replica 1 of 2'):
      with launches.hold_run(tmp_path):
        pass
  become(0, 1)
  with launches.hold_run(tmp_path):
    pass


def test_every_launch_holds_a_journal_that_runs_share(tmp_path, monkeypatch):
  for name in ('_check_names', 'check_launch', 'check_run'):
    monkeypatch.setattr(stages, name, lambda run, names: None)
  monkeypatch.setattr(launches, 'launched_replica', lambda: (1, 2))
  owners = []
  place = tmp_path / 'journal' / 'replicas' / '1'
  monkeypatch.setattr(stages, '_run_missing', lambda *_: owners.append(lock.find_owner(place)))
  run = types.SimpleNamespace(workdir=tmp_path / 'run', journal=tmp_path / 'journal', notes=())
  stages.run_stages(run, ['generate'])
  assert owners[0]['replicas'] == 2 and not lock.find_owner(place)


@pytest.mark.parametrize(
  ('names', 'remotes', 'rater', 'message'),
  [
    (['generate', 'train'], {}, None, 'share only the stage generate'),
    (['generate'], {'base': 1}, None, 'a server holds a model'),
    (['generate'], {}, 'a judge', 'a server holds a model'),
  ],
)
def test_what_launches_cannot_share_is_refused(monkeypatch, names, remotes, rater, message):
  run = types.SimpleNamespace(workdir='run', remotes=remotes, config=None)
  monkeypatch.setattr(launches, 'find_served_rater', lambda config: rater)
  launches.check_launch(run, names)
  monkeypatch.setattr(launches, 'launched_replica', lambda: (0, 2))
  with pytest.raises(UserError, match=message):
    launches.check_launch(run, names)


def test_a_launch_of_several_replicas_is_refused(monkeypatch, process):
  run = types.SimpleNamespace(remotes={}, config=None)
  monkeypatch.setattr(launches, 'find_served_rater', lambda config: None)
  monkeypatch.setattr(launches, 'sampling_mesh', lambda run: None)
  monkeypatch.setattr(launches, 'launched_replica', lambda: (0, 2))
  process(0)
  with pytest.raises(UserError, match='each launch is one replica, but the 2 processes'):
    launches.check_launch(run, ['generate'])
  monkeypatch.setattr(launches, 'replica_of', lambda mesh: PAIR)
  launches.check_launch(run, ['generate'])


def test_servers_do_not_answer_in_lock_step(tmp_path, monkeypatch):
  """A server may answer two processes in two ways, and then their chains differ."""
  config = small('tiny')
  options = {'n': 2, 'scorer': 'guard', 'scorer_model': 'served', 'scorer_label': 'wildguard'}
  set_fields(
    feedback__variant='best_revision',
    feedback__options=(*options.items(),),
    feedback__rounds=1,
    evaluation__guard_remote__url='http://127.0.0.1:9/v1',
    evaluation__guard_remote__model='served',
  )(config)
  run = pipeline.build(config, tmp_path)
  checks._check_lock_step(run)
  monkeypatch.setattr(checks, 'is_split', lambda mesh: True)
  with pytest.raises(UserError, match='guard_remote.url, which rates candidates: a server'):
    checks._check_lock_step(run)
