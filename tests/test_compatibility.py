"""Journals of earlier versions replay: the hash of what determines a turn has not changed.

`tests/data/journal_0_1` is the journal and the job digest of this command at version 0.1.0:

  python launch.py --config=configs/tiny.py --workdir=W --stages=generate \\
    --config.prompts.harmful.limit=3 --config.prompts.helpful.limit=2 --config.feedback.rounds=2 \\
    --config.prompts.eval_harmful.source='' --config.prompts.eval_helpful.source='' \\
    --config.engine.slots=4
"""

import json
import pathlib
import shutil

import pytest

from cai_jax import pipeline
from cai_jax.data import d_cai
from configs import tiny

OLD = pathlib.Path(__file__).with_name('data') / 'journal_0_1'


def old_config():
  """Return the config of the command above."""
  config = tiny.get_config()
  config.prompts.harmful.limit = 3
  config.prompts.helpful.limit = 2
  config.prompts.eval_harmful.source = config.prompts.eval_helpful.source = ''
  config.feedback.rounds = 2
  config.engine.slots = 8  # sizes of the programs determine no text
  return config


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """Return the folder of a generate stage that found the old journal."""
  folder = tmp_path_factory.mktemp('replayed')
  (folder / 'journal').mkdir()
  shutil.copy(OLD / 'turns-00000.jsonl', folder / 'journal')
  pipeline.run_stages(pipeline.build(old_config(), folder), ['generate'])
  return folder


def test_a_journal_of_version_0_1_replays_with_no_turn_sampled(workdir):
  stage = json.loads((workdir / 'manifest.json').read_text())['stages']['generate']
  assert (stage['turns'], stage['replayed_turns']) == (0, 3 * 5 + 2)
  assert (workdir / 'd_cai/job.json').read_text() == (OLD / 'job.json').read_text()


def test_rows_hold_the_turns_of_the_old_journal(workdir):
  lines = (OLD / 'turns-00000.jsonl').read_text().splitlines()
  old_texts = {turn['text'].strip() for line in lines for turn in json.loads(line)['turns']}
  rows = d_cai.read_rows(workdir / 'd_cai')
  turns = [
    turn for row in rows for turn in [row['initial'], *(s['revision'] for s in row['rounds'])]
  ]
  assert {turn['text'] for turn in turns} <= old_texts
