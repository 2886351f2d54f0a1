"""A model replica on several processes samples like one device, and survives kills and signals."""

import json
import signal
import time

import jax
import pytest
from transformers import PreTrainedTokenizerFast

import cai_jax
from cai_jax.data import d_cai
from cai_jax.data.quality import FLAGS
from cai_jax.model.config import ModelConfig
from cai_jax.model.transformer import init_params
from cai_jax.runtime.mesh import make_mesh
from cai_jax.tiny.files import MODELS
from tests.pipeline_setup import launch_tiny, start_group, start_one

pytestmark = pytest.mark.slow
KILLED = -signal.SIGKILL


@pytest.fixture(scope='module')
def wide_model(tmp_path_factory):
  """The folder of a random model that eight devices can split along any axis."""
  tokenizer = PreTrainedTokenizerFast.from_pretrained(MODELS['tiny'])
  size = -(-len(tokenizer) // 8) * 8
  config = ModelConfig('llama', size, 32, 64, 2, 8, 8, 4, 512, tied_embeddings=True)
  params = init_params(config, jax.random.key(0))
  mesh, eos = make_mesh(devices=jax.devices()[:1]), (tokenizer.eos_token_id,)
  path = tmp_path_factory.mktemp('wide')
  cai_jax.save(cai_jax.LM(config, params, tokenizer, mesh, 'float32', '', '', eos), path)
  return path


def command(model, workdir, **mesh):
  """The command that samples 10 shards of two rows."""
  fields = {
    'model.base': model,
    'feedback.rounds': 2,
    'feedback.shard_rows': 2,
    'sampling.initial.max_tokens': 12,
    'sampling.revision.max_tokens': 12,
    'sampling.critique.max_tokens': 12,
    'engine.slots': 4,
    'train.batch_size': 24,
    'prompts.harmful.limit': 16,
    'prompts.helpful.limit': 4,
    'prompts.eval_harmful.limit': 3,
    'prompts.eval_helpful.limit': 2,
    'train.epochs': 1,
    'train.drop_truncated': False,
    **{f'feedback.max_rate.{name}': 1.0 for name in FLAGS},  # a random model
    **{f'mesh_sampling.{name}': value for name, value in mesh.items()},
  }
  return launch_tiny(workdir, 'generate', fields)


def ends(processes):
  return [process.wait() for process in processes]


def texts(workdir):
  """The texts of all rows by prompt."""
  return {
    row['id']: [row['initial']['text'], *(step['revision']['text'] for step in row['rounds'])]
    for row in d_cai.read_rows(workdir / 'd_cai')
  }


def shards(workdir):
  """The bytes of each finished shard."""
  paths = workdir.glob('d_cai/*.array_record-*')
  return {path.name: path.read_bytes() for path in paths if path.suffix != '.tmp'}


def wait_for_shards(workdir, count, group):
  while len(shards(workdir)) < count:
    if any(process.poll() is not None for process in group):
      for process in group:
        process.kill()
      pytest.fail(f'processes ended: {ends(group)}')
    time.sleep(0.005)


@pytest.fixture(scope='module')
def whole(wide_model, tmp_path_factory):
  """The folder of a run on one replica of two processes with a device each.

  A sum over two devices has the same bits in any order, and so at any place of a batch.
  """
  workdir = tmp_path_factory.mktemp('whole')
  assert ends(start_group(command(wide_model, workdir, processes=2, tensor=2), 2, 1)) == [0, 0]
  return workdir


@pytest.fixture(scope='module')
def texts_of_one(wide_model, tmp_path_factory):
  """The texts of a run on one device."""
  workdir = tmp_path_factory.mktemp('one')
  assert start_one(command(wide_model, workdir), 1).wait() == 0
  return texts(workdir)


@pytest.mark.parametrize('axes', [{'tensor': 8}, {'fsdp': 2, 'tensor': 4}])
def test_a_model_split_over_two_processes_gives_the_texts_of_one_device(
  wide_model, texts_of_one, tmp_path, axes
):
  """Each process has four devices."""
  arguments = command(wide_model, tmp_path, processes=-1, **axes)
  assert ends(start_group(arguments, 2, 4)) == [0, 0]
  assert texts(tmp_path) == texts_of_one and len(texts_of_one) == 20
  assert [path.name for path in (tmp_path / 'journal').glob('turns-*')] == ['turns-00000.jsonl']


@pytest.mark.parametrize('weights', ['int8', 'nf4'])
def test_a_quantized_model_split_over_two_processes_gives_the_texts_of_one(
  wide_model, tmp_path, weights
):
  """Two processes of a device each, against one of two devices."""

  def arguments(name):
    own = command(wide_model, tmp_path / name, processes=-1, tensor=2)
    return [*own, f'--config.model.weights={weights}']

  assert start_one(arguments('one'), 2).wait() == 0
  assert ends(start_group(arguments('two'), 2, 1)) == [0, 0]
  one = texts(tmp_path / 'one')
  assert texts(tmp_path / 'two') == one and len(one) == 20


def test_three_replicas_over_six_processes_give_the_same_d_cai(
  wide_model, whole, texts_of_one, tmp_path
):
  arguments = command(wide_model, tmp_path, processes=2, tensor=2)
  assert ends(start_group(arguments, 6, 1)) == [0] * 6
  assert shards(tmp_path) == shards(whole) and texts(tmp_path) == texts_of_one
  names = {path.name for path in (tmp_path / 'journal').glob('turns-*')}
  assert names == {f'turns-{i:05d}.jsonl' for i in range(3)}


@pytest.mark.parametrize('lost', [0, 1])
def test_the_next_start_completes_a_replica_that_lost_a_process(wide_model, whole, tmp_path, lost):
  arguments = command(wide_model, tmp_path, processes=2, tensor=2)
  pair = start_group(arguments, 2, 1)
  wait_for_shards(tmp_path, 3, pair)
  pair[lost].kill()
  status = ends(pair)
  assert status[lost] == KILLED and status[1 - lost] not in (0, KILLED)
  assert 3 <= len(shards(tmp_path)) < 10
  assert ends(start_group(arguments, 2, 1)) == [0, 0]
  assert shards(tmp_path) == shards(whole)


def test_a_signal_to_one_process_stops_its_replica_in_order(wide_model, whole, tmp_path):
  arguments = command(wide_model, tmp_path, processes=2, tensor=2)
  pair = start_group(arguments, 2, 1)
  wait_for_shards(tmp_path, 3, pair)
  pair[1].send_signal(signal.SIGTERM)
  assert ends(pair) == [143, 143]
  assert ends(start_group(arguments, 2, 1)) == [0, 0]
  assert shards(tmp_path) == shards(whole)


def test_all_stages_of_a_split_replica_give_the_results_of_one_device(wide_model, tmp_path):
  """M_θ and M_aligned also score on the mesh that samples; training uses both devices as `data`."""
  question = {'prompt': 'What did you do? I', 'corrects': [' slept'], 'incorrects': [' ran away']}
  file = tmp_path / 'questions.jsonl'
  file.write_text(json.dumps(question))
  questions = f'--config.evaluation.multiple_choice=({str(file)!r},)'
  training = '--config.train.batch_size=4', '--config.train.helpfulness_share=0.2'
  stages = '--stages=generate,train,evaluate', questions, *training
  one, two = tmp_path / 'one', tmp_path / 'two'
  assert start_one([*command(wide_model, one), *stages], 1).wait() == 0
  split = command(wide_model, two, processes=2, tensor=2)
  assert ends(start_group([*split, *stages], 2, 1)) == [0, 0]
  assert texts(two) == texts(one)
  for name, tolerance in {'base': 1e-4, 'aligned': 1e-3}.items():
    numbers = []
    for workdir in (one, two):
      results = json.loads((workdir / 'evaluation' / 'models.json').read_text())
      scored = results[name]['multiple_choice'][file.name]['items'][0]['log_probabilities']
      numbers.append([*scored['corrects'], *scored['incorrects']])
    assert numbers[1] == pytest.approx(numbers[0], abs=tolerance)
  base = [list(d_cai.read_rows(workdir / 'evaluation' / 'base')) for workdir in (one, two)]
  assert len(base[0]) == 5
  assert [row['initial']['text'] for row in base[1]] == [row['initial']['text'] for row in base[0]]


def start_launches(arguments, count):
  """Launches of two processes with a device each; each is a replica with its coordinator."""
  numbers = {'CAI_JAX_NUM_REPLICAS': str(count)}
  return [start_group(arguments, 2, 1, CAI_JAX_REPLICA=str(i), **numbers) for i in range(count)]


def test_a_launch_that_dies_does_not_stop_the_others(wide_model, whole, tmp_path):
  """Of three launches, the second loses a process; then all three are started again."""
  arguments = command(wide_model, tmp_path, processes=2, tensor=2)
  launches = start_launches(arguments, 3)
  wait_for_shards(tmp_path, 3, sum(launches, []))
  launches[1][1].kill()
  assert [ends(launch) for launch in launches[2:]] == [[0, 0]]
  assert 0 not in ends(launches[1])
  assert ends(launches[0]) == [1, 1]  # its shards are complete, and those of the second missing
  left = {name: data for name, data in shards(whole).items() if name not in shards(tmp_path)}
  assert left and all(int(name.split('-')[-1]) % 3 == 1 for name in left)
  assert [ends(launch) for launch in start_launches(arguments, 3)] == [[0, 0]] * 3
  assert shards(tmp_path) == shards(whole)
