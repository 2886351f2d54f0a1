"""Jobs of AI feedback for tests, and answers to their questions."""

import contextlib
import dataclasses
import json
import math

import pytest

from cai_jax.constitution import Constitution, Principle
from cai_jax.data.prompts import Prompt
from cai_jax.feedback.comparisons.job import check_label
from cai_jax.feedback.comparisons.labelling import label
from cai_jax.feedback.config import FeedbackConfig
from cai_jax.sampling.journal import Journal
from cai_jax.sampling.types import Completion, LabelTurn, SamplingConfig
from tests.feedback_setup import ENGINE, make_lm

PRINCIPLES = (
  Principle('kind', 'What is unkind?', 'Be kind.', comparison_request='Choose the kinder one.'),
  Principle('brief', 'What is long?', 'Be brief.', comparison_request='Choose the shorter one.'),
)
CONSTITUTION = Constitution(PRINCIPLES)
SHORT = SamplingConfig(max_tokens=6)
ASKED = ({'role': 'user', 'content': 'Why?'},)
PROMPTS = [Prompt(f'id-{i}', ({'role': 'user', 'content': f'Why {i}?'},)) for i in range(4)]


@pytest.fixture(scope='module')
def lm(tiny_tokenizer):
  """A random model with room for questions."""
  small = make_lm(tiny_tokenizer)
  config = dataclasses.replace(small.config, max_positions=2048)
  return dataclasses.replace(small, config=config)


def write_lines(path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return str(path)


@pytest.fixture
def pairs_file(tmp_path):
  rows = [
    {'id': 'one', 'prompt': 'Why?', 'chosen': 'I like rain.', 'rejected': 'No.'},
    {'id': 'two', 'prompt': 'Who?', 'chosen': 'A friend.', 'rejected': 'Nobody at all.'},
  ]
  return write_lines(tmp_path / 'pairs.jsonl', rows)


def make_job(models, config, prompts=PROMPTS, judge=None, feedback=None, sampling=SHORT):
  return check_label(
    models, prompts, CONSTITUTION, config, feedback or FeedbackConfig(), sampling, 0, judge
  )


def run(job, folder, **options):
  with contextlib.closing(Journal(folder / 'journal')) as journal:
    summary = label(job, folder / 'labels', journal, ENGINE, **options)
  lines = (folder / 'labels' / 'comparisons.jsonl').read_text().splitlines()
  return summary, [json.loads(line) for line in lines]


def play(chain, logprobs, text='Well.'):
  """Run a chain on answers with these log-probabilities of (A) and (B); return its result."""
  turns, completion, tokens = [], None, []
  while True:
    try:
      turn = chain.send(completion)
    except StopIteration as stop:
      return turns, stop.value
    turns.append(turn)
    if isinstance(turn, LabelTurn):
      value = logprobs(turn.name)[int(turn.name[-1]) - 1]
      completion = Completion([turn.labels[0]], '', [value], 'length')
    else:
      tokens = turn.context[-3:]
      completion = Completion(tokens, text, [-1.0] * len(tokens), 'length')


def sigmoid(x):
  return 1 / (1 + math.exp(-x))
