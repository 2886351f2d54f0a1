"""Units of preferences in files are those that one process makes in memory, to the bit."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from cai_jax.data import part_files
from cai_jax.data.fingerprints import fingerprint
from cai_jax.data.preferences import Comparison, judge_both, read_comparisons, write_comparisons
from cai_jax.data.preferences.unit_maker import ComparisonMaker, JudgedMaker
from cai_jax.data.preferences.units import build_comparison_units, build_judged_units
from cai_jax.dialogue import Dialogue
from cai_jax.pipeline.pairs import JudgedPairs, Pairs
from cai_jax.runtime.errors import UserError
from cai_jax.scoring import reward
from cai_jax.tiny.files import MODELS
from cai_jax.training import reward_model

ROOT = pathlib.Path(__file__).parents[1]
COUNT = 30


def write_pairs(path):
  """Write comparisons, of which three each have the same prompt, and some lengths do not fit."""
  rng, pairs = np.random.default_rng(0), []
  for i in range(COUNT):
    prompt = ({'role': 'user', 'content': f'question {i // 3}'},)
    texts = [f'{"yes " * int(rng.integers(1, 30))} {i} {side}' for side in 'ab']
    options = {'probability': (1.0, 0.25, 0.5)[i % 3], 'margin': float(i)}
    pairs.append(Comparison(str(i), prompt, *texts, **options, truncated=(i % 10 == 0, False)))
  write_comparisons(path, pairs)


@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
  path = tmp_path_factory.mktemp('pairs') / 'pairs.jsonl'
  write_pairs(path)
  return Pairs(read_comparisons(path), shuffle_seed=1)


@pytest.fixture(scope='module')
def dialogue(tiny_tokenizer):
  return Dialogue(tiny_tokenizer)


@pytest.fixture(scope='module')
def info():
  return reward_model.inspect_start(MODELS['tiny'])


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
  monkeypatch.setattr(part_files, 'PART_ROWS', 8)


def comparison_units(pairs, dialogue, info, folder=None):
  return build_comparison_units(pairs, dialogue, max_length=90, margins=True, folder=folder)


def judged_units(pairs, dialogue, info, folder=None):
  return build_judged_units(JudgedPairs(pairs), dialogue, max_length=90, seed=2, folder=folder)


def reward_units(pairs, dialogue, info, folder=None):
  whole = reward.make_dialogue(info)
  return reward_model.build_reward_units(pairs, whole, info, max_length=90, folder=folder)


@pytest.mark.parametrize('build', [comparison_units, judged_units, reward_units])
def test_units_in_files_are_those_in_memory(pairs, dialogue, info, tmp_path, build, monkeypatch):
  expected = build(pairs, dialogue, info)
  assert {*expected.counts['dropped']} == {'too_long', 'truncated'}
  built = build(pairs, dialogue, info, tmp_path)
  for _ in range(2):  # the second time, nothing is made
    assert fingerprint(built.units) == fingerprint(expected.units)
    assert built.counts == expected.counts
    assert [unit.id for unit in built.units] == [unit.id for unit in expected.units]
    assert len([*tmp_path.rglob('*.safetensors')]) == 4
    for maker in (ComparisonMaker, JudgedMaker):
      monkeypatch.setattr(maker, 'make_part', None)
    built = build(pairs, dialogue, info, tmp_path)


def test_other_pairs_or_settings_make_other_files(pairs, dialogue, info, tmp_path):
  def key(build, pairs=pairs, dialogue=dialogue, **options):
    build(pairs, dialogue, folder=tmp_path, **options)
    (folder,) = tmp_path.iterdir()  # others are deleted
    return folder.name

  keys = [
    key(build_comparison_units),
    key(build_comparison_units, max_length=100),
    key(build_comparison_units, drop_truncated=False),
    key(build_comparison_units, margins=True),
    key(build_comparison_units, Pairs(pairs.comparisons)),
    key(build_comparison_units, dialogue=Dialogue(dialogue.tokenizer, 'plain')),
    key(build_judged_units, JudgedPairs(pairs)),
    key(build_judged_units, JudgedPairs(pairs), drop_truncated=False),
    key(
      reward_model.build_reward_units,
      dialogue=reward.make_dialogue(info),
      info=info,
      max_length=100,
    ),
  ]
  assert len({*keys}) == len(keys)
  # The length and the order of the others are chosen when all pieces are there.
  assert key(build_judged_units, JudgedPairs(pairs), max_length=90, seed=7) == keys[6]


def test_a_batch_has_the_comparisons_of_its_range(pairs):
  everything = list(pairs)
  batches = pairs.batches([(0, 2), (5, 9), (9, 10)])
  expected = everything[:2] + everything[5:10]
  assert [pair for (batch,) in batches for pair in batch] == expected
  ((judged,),) = JudgedPairs(pairs).batches([(3, 6)])
  assert list(judged) == list(judge_both(everything[3:6])) and len(list(judged)) == 4


def test_a_comparison_without_a_margin_is_named(pairs, dialogue, tmp_path):
  path = tmp_path / 'bare.jsonl'
  prompt = ({'role': 'user', 'content': 'question'},)
  write_comparisons(path, [Comparison('the bare one', prompt, 'yes', 'no')])
  with pytest.raises(UserError, match="comparison 'the bare one' has no margin"):
    bare = Pairs(read_comparisons(path))
    build_comparison_units(bare, dialogue, margins=True, folder=tmp_path / 'parts')


RUN = """
import pathlib, sys
from tests import test_preference_parts as t
from cai_jax.data import part_files
if __name__ == '__main__':
  part_files.PART_ROWS, part_files.POOL_ROWS = 8, 8
  part_files._count_cores = lambda: 2
  folder, pairs = pathlib.Path(sys.argv[2]), t.Pairs(t.read_comparisons(sys.argv[1]), 1)
  info = t.reward_model.inspect_start(t.MODELS['tiny'])
  dialogue = t.Dialogue(info.tokenizer)
  for build in (t.judged_units, t.reward_units):
    print(t.fingerprint(build(pairs, dialogue, info, folder / build.__name__).units), flush=True)
"""


@pytest.mark.slow
def test_worker_processes_make_the_same_units(pairs, info, tmp_path):
  script, path = tmp_path / 'script.py', tmp_path / 'pairs.jsonl'
  script.write_text(RUN)
  write_pairs(path)
  environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}
  command = [sys.executable, str(script), str(path), str(tmp_path / 'parts')]
  printed = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
  dialogue = Dialogue(info.tokenizer)
  expected = [
    fingerprint(build(pairs, dialogue, info).units) for build in (judged_units, reward_units)
  ]
  assert [line for line in printed.stdout.splitlines() if ' ' not in line] == expected
