"""AI feedback: questions, labels, and what is written of them."""

import contextlib
import json
import math
import random

import pytest

from cai_jax.data.preferences import read_comparisons
from cai_jax.dialogue import Dialogue
from cai_jax.feedback.comparisons.asking import LABELS, THINK
from cai_jax.feedback.comparisons.config import LabelConfig
from cai_jax.feedback.comparisons.pairing import PAIRINGS
from cai_jax.runtime.errors import UserError
from cai_jax.sampling.types import Completion, LabelTurn
from cai_jax.scoring.judge import JUDGES
from cai_jax.scoring.judge_questions import build_question
from cai_jax.scoring.likelihood import log_likelihoods
from cai_jax.tiny.judge import make_labelled
from tests.label_setup import (
  PRINCIPLES,
  make_job,
  play,
  run,
  sigmoid,
  write_lines,
)
from tests.label_setup import lm as lm
from tests.label_setup import pairs_file as pairs_file


def test_a_soft_label_is_the_mean_over_both_orders_of_what_the_model_gives(
  lm, pairs_file, tmp_path
):
  job = make_job({'feedback': lm}, LabelConfig(comparisons=(pairs_file,), principles=2))
  summary, rows = run(job, tmp_path)
  dialogue = Dialogue(lm.tokenizer, 'chat', lm.eos_token_ids)
  replies = [dialogue.reply(text) for text in LABELS]
  split = next(i for i in range(99) if replies[0][i] != replies[1][i])
  assert dialogue.decode(replies[0][:split]) == 'The answer is: ('
  for row, texts in zip(
    rows, (('I like rain.', 'No.'), ('A friend.', 'Nobody at all.')), strict=True
  ):
    probabilities = []
    for principle in PRINCIPLES:
      for options in (texts, texts[::-1]):
        question = build_question(row['prompt'], principle.comparison, *options)
        context = dialogue.prompt([{'role': 'user', 'content': question}]) + replies[0][:split]
        log_p = log_likelihoods(lm, [context] * 2, [[reply[split]] for reply in replies])
        of_a = sigmoid(log_p[0] - log_p[1])
        probabilities.append(of_a if options == texts else 1 - of_a)
    first = sum(probabilities) / 4
    chosen, rejected = texts if first >= 0.5 else texts[::-1]
    assert (row['chosen'][0]['content'], row['rejected'][0]['content']) == (chosen, rejected)
    assert row['probability'] == pytest.approx(max(first, 1 - first), abs=1e-4)
    assert {r['principle'] for r in row['readings']} == {'kind', 'brief'}
    assert [r['option_a'] for r in row['readings']].count('chosen') == 2
  right = sum(row['chosen'][0]['content'] in ('I like rain.', 'A friend.') for row in rows)
  accuracy = summary['accuracy'][pairs_file]
  assert (accuracy['count'], accuracy['right'], accuracy['accuracy']) == (2, right, right / 2)
  assert [row['id'] for row in rows] == ['one', 'two']


def scripted(lm, pairs_file, logprobs, text='Well.', **config):
  """Return the turns and the first label of a job whose model gives these log-probabilities."""
  job = make_job({'feedback': lm}, LabelConfig(comparisons=(pairs_file,), **config))
  turns, outcome = play(job.chain(job.items[0]), logprobs, text)
  return turns, outcome.labels[0]


def test_a_preference_for_an_option_cancels(lm, pairs_file):
  turns, always_a = scripted(lm, pairs_file, lambda name: (-0.1, -3.0))
  assert len(turns) == 4 and always_a.probability == pytest.approx(0.5)
  odds = {'order_1': (-0.5, -1.5), 'order_2': (-2.0, -1.0)}
  _, agreeing = scripted(lm, pairs_file, lambda name: next(odds[o] for o in odds if o in name))
  assert agreeing.probability == pytest.approx(sigmoid(1))
  assert [r.answer.mass for r in agreeing.readings] == [
    pytest.approx(math.exp(-0.5) + math.exp(-1.5)),
    pytest.approx(math.exp(-2.0) + math.exp(-1.0)),
  ]


def test_probabilities_after_thoughts_are_clamped(lm, pairs_file):
  def sure_of_the_first(name):
    return (-0.01, -5.0) if 'order_1' in name else (-5.0, -0.01)

  turns, thinking = scripted(lm, pairs_file, sure_of_the_first, thoughts=8)
  assert thinking.probability == pytest.approx(0.6)
  assert {r.answer.text for r in thinking.readings} == {'Well.'}
  assert thinking.readings[0].answer.probability == pytest.approx(sigmoid(4.99))
  assert len(turns) == 6 and all(r.answer.is_cut for r in thinking.readings)
  # The thoughts continue the opening, and the label follows them in the same reply.
  dialogue = Dialogue(lm.tokenizer, 'chat', lm.eos_token_ids)
  assert dialogue.show(turns[0].context).endswith(f'assistant\n{THINK}')
  thought = turns[0].context[-3:]
  assert turns[1].context[: len(turns[0].context) + 3] == [*turns[0].context, *thought]
  assert dialogue.show(turns[1].context).endswith('\n\nThe answer is: (')
  _, free = scripted(lm, pairs_file, sure_of_the_first, thoughts=8, clamp=(0.0, 1.0))
  _, silent = scripted(lm, pairs_file, sure_of_the_first)
  assert free.probability == silent.probability == pytest.approx(sigmoid(4.99))
  turns, several = scripted(lm, pairs_file, sure_of_the_first, thoughts=8, samples=3)
  assert len(several.readings) == 6 and len({turn.name for turn in turns}) == 18


def test_a_killed_job_ends_with_the_same_bytes_and_asks_nothing_twice(lm, tmp_path):
  config = LabelConfig(responses=2, thoughts=4)
  job = make_job({'responses': lm, 'feedback': lm}, config)
  summary, rows = run(job, tmp_path / 'whole')
  assert summary['pairs'] == len(rows) == 4 and summary['sampling']['turns'] == 4 * (2 + 2 * 3)

  class KilledError(Exception):
    pass

  def kill(done, total, tokens):
    if done == 2:
      raise KilledError

  with pytest.raises(KilledError):
    run(job, tmp_path / 'killed', progress=kill)
  assert not (tmp_path / 'killed' / 'labels').exists()
  resumed, _ = run(job, tmp_path / 'killed')
  assert 0 < resumed['sampling']['turns'] < summary['sampling']['turns']
  for name in ('comparisons.jsonl', 'summary.json'):
    files = [(tmp_path / folder / 'labels' / name).read_bytes() for folder in ('whole', 'killed')]
    assert files[0] == files[1]
  again, _ = run(job, tmp_path / 'killed')
  assert again['sampling']['turns'] == 0


def test_several_responses_are_paired_as_stated(lm):
  rng = random.Random(0)
  assert PAIRINGS['all'](3, rng) == [(0, 1), (0, 2), (1, 2)]
  assert PAIRINGS['first'](3, rng) == [(0, 1), (0, 2)]
  drawn = {PAIRINGS['random'](3, rng)[0] for _ in range(50)}
  assert drawn == {(0, 1), (0, 2), (1, 2)}
  job = make_job({'responses': lm, 'feedback': lm}, LabelConfig(responses=3, pairs='first'))
  asked = []
  chain = job.chain(job.items[0])
  completion = None
  with contextlib.suppress(StopIteration):
    while True:
      turn = chain.send(completion)
      asked.append(turn.name)
      tokens = list(turn.labels) if isinstance(turn, LabelTurn) else [70 + len(asked)] * 3
      completion = Completion(tokens, '', [-1.0] * len(tokens), 'length')
  assert asked[:3] == ['initial', 'initial_candidate_2', 'initial_candidate_3']
  assert {name[:9] for name in asked[3:]} == {'label_1_2', 'label_1_3'}


def test_equal_and_empty_responses_are_counted_and_not_compared(lm):
  job = make_job({'responses': lm, 'feedback': lm}, LabelConfig(responses=2))
  turns, outcome = play(job.chain(job.items[0]), lambda name: (-1.0, -1.0))
  assert len(turns) == 2 and outcome.left_out == ('identical',) and not outcome.labels


def test_the_oracle_of_the_embedded_world_labels_its_pairs(tmp_path):
  config = LabelConfig(
    comparisons=(_tiny_pairs(tmp_path),), model='tiny-oracle', labelled=('tiny',), labelled_limit=5
  )
  job = make_job({}, config, judge=JUDGES['tiny-oracle'](None))
  summary, rows = run(job, tmp_path)
  assert summary['accuracy']['tiny'] | {'answers': None} == {
    'count': 5,
    'right': 5,
    'ties': 0,
    'accuracy': 1.0,
    'interval': [pytest.approx(0.5655, abs=1e-3), 1.0],
    'ended': 0,
    'answers': None,
  }
  assert len(rows) == 3 and summary['option_a'] == 0.5 and summary['consistent'] == 1.0
  assert rows[0]['probability'] == pytest.approx(sigmoid(10))


def _tiny_pairs(folder):
  rows = [{'id': str(i), **row} for i, row in enumerate(make_labelled(3))]
  return write_lines(folder / 'tiny.jsonl', rows)


def test_the_published_hhh_questions_are_comparisons(data_dir, tmp_path):
  path = data_dir('cai_paper') / 'evals' / '438HHHEvaluations.jsonl'
  pairs = read_comparisons(path, 'hhh')
  assert pairs.counts == {'rows': 438, 'kept': 438, 'dropped': {}}
  row = json.loads(path.read_text().splitlines()[0])
  first = next(iter(pairs))
  assert row['text_correct'].endswith(first.chosen) and first.better == 0
  broken = write_lines(tmp_path / 'broken.jsonl', [row | {'text_correct': 3}])
  with pytest.raises(UserError, match='line 1: .*needs the text text_correct'):
    read_comparisons(broken, 'hhh')
