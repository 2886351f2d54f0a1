"""A language model as the judge of two responses, in both orders."""

import itertools
import json
import math
import pathlib

import jax
import numpy as np
import pytest

import cai_jax
from cai_jax.evaluation.ratings import elo_ratings, win_rate
from cai_jax.model import lm as lm_lib
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.mesh import make_mesh
from cai_jax.scoring import likelihood
from cai_jax.scoring.judge import Match, build_question, judge_matches

MESSAGES = [{'role': 'user', 'content': 'How do I bake bread?'}]
PRINCIPLE = 'Choose the response that is more helpful.'
TEXTS = ('With flour, water, salt and time.', 'No.', 'I will not say.', 'Ask a baker.')


def match(a, b, prompt='p', players=('x', 'y'), principle=PRINCIPLE):
  return Match(prompt, MESSAGES, principle, players, (a, b))


@pytest.fixture(scope='module')
def tiny():
  folder = pathlib.Path(cai_jax.__file__).parent / 'tiny' / 'model'
  return lm_lib.load(folder, mesh=make_mesh(2, devices=jax.devices()[:2]))


def test_question_has_the_published_form():
  system = {'role': 'system', 'content': 'Be brief.'}
  turns = [MESSAGES[0], {'role': 'assistant', 'content': 'Why?'}, MESSAGES[0]]
  assert build_question([system, *turns], f'\n{PRINCIPLE} Options:', ' one\n', 'two') == (
    'Be brief.\n\nHere is a conversation between a human and an assistant, whose next answer is to '
    'be chosen from two.\n\nHuman: How do I bake bread?\n\nAssistant: Why?\n\nHuman: How do I bake '
    'bread?\n\nChoose the response that is more helpful. Options:\n (A) one\n (B) two\n\n'
    'The answer is:'
  )
  assert build_question(turns, PRINCIPLE, 'a', 'b') == build_question(
    turns, f'{PRINCIPLE}\nOptions:', 'a', 'b'
  )


def test_published_principles_need_no_change(data_dir):
  path = data_dir('cai_paper') / 'prompts' / 'RLMadisonInstructions.json'
  for principle in json.loads(path.read_text()):
    text = build_question(MESSAGES, principle, 'a', 'b')
    assert text.count('Options:') == 1
    assert principle.strip().removesuffix('Options:').strip() in text


def test_log_odds_have_the_right_sign_in_both_orders(tiny, monkeypatch):
  asked = []
  ids = {}  # one token per question

  def tokenize_pair(tokenizer, context, option):
    asked.append((context, option))
    return [ids.setdefault(context, len(ids))], [(' (A)', ' (B)').index(option)]

  # This model prefers 'good' by 3 nats and label (A) by 1.
  def log_likelihoods(lm, contexts, options, *, batch_tokens):
    names = {number: context for context, number in ids.items()}
    label = [(' (A)', ' (B)')[option[0]] for option in options]
    return [
      3.0 * (f'{x} good' in names[context[0]]) + (x == ' (A)')
      for context, x in zip(contexts, label, strict=True)
    ]

  monkeypatch.setattr(likelihood, 'tokenize_pair', tokenize_pair)
  monkeypatch.setattr(likelihood, 'log_likelihoods', log_likelihoods)
  comparisons = judge_matches(
    tiny, [match('good', 'bad'), match('bad', 'good'), match('bad', 'worse')]
  )
  expected = [
    (build_question(MESSAGES, PRINCIPLE, a, b), option)
    for a, b in [('good', 'bad'), ('bad', 'good'), ('bad', 'good'), ('good', 'bad')]
    for option in (' (A)', ' (B)')
  ]
  assert asked[:8] == expected and len(asked) == 12
  assert [c.log_odds for c in comparisons] == [(4, 2), (-2, -4), (1, -1)]
  assert [c.verdict for c in comparisons] == ['first', 'second', 'tie']
  assert [c.points for c in comparisons] == [1, 0, 0.5]
  assert [c.consistent for c in comparisons] == [True, True, False]
  sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
  assert comparisons[0].probabilities == pytest.approx((sigmoid(4), sigmoid(2)))
  assert comparisons[0].probability == pytest.approx((sigmoid(4) + sigmoid(2)) / 2)
  assert comparisons[2].probability == 0.5


def test_exchanging_responses_gives_the_exact_complement(tiny):
  pairs = list(itertools.combinations(TEXTS, 2))
  matches = [match(a, b, f'p{i}') for i, (a, b) in enumerate(pairs)]
  exchanged = [match(b, a, f'p{i}', ('y', 'x')) for i, (a, b) in enumerate(pairs)]
  forward, backward = judge_matches(tiny, matches), judge_matches(tiny, exchanged)
  complement = {'first': 'second', 'second': 'first', 'tie': 'tie'}
  for a, b in zip(forward, backward, strict=True):
    assert b.log_odds == (-a.log_odds[1], -a.log_odds[0])
    assert b.verdict == complement[a.verdict]
    assert b.points == 1 - a.points
    assert a.probability + b.probability == pytest.approx(1, abs=1e-15)
    assert a.log_odds[0] != a.log_odds[1]  # the order matters to this model
  assert win_rate(forward, 'x') == win_rate(backward, 'x')
  assert elo_ratings(forward) == elo_ratings(backward)


def test_equal_responses_are_a_tie(tiny):
  (comparison,) = judge_matches(tiny, [match(TEXTS[0], TEXTS[0])])
  assert comparison.log_odds[0] == -comparison.log_odds[1] != 0
  assert comparison.verdict == 'tie' and comparison.probability == pytest.approx(0.5, abs=1e-15)


def test_log_odds_agree_with_logits_of_the_whole_text(tiny):
  (comparison,) = judge_matches(tiny, [match(*TEXTS[:2])])
  orders = TEXTS[:2], TEXTS[1::-1]
  for odds, sign, texts in zip(comparison.log_odds, (1, -1), orders, strict=True):
    log_p = []
    text = build_question(MESSAGES, PRINCIPLE, *texts)
    context = tiny.tokenizer.encode(text)
    for option in (' (A)', ' (B)'):
      whole = tiny.tokenizer.encode(text + option)
      assert whole[: len(context)] == context
      logits = jax.nn.log_softmax(tiny.logits(np.array([whole]))[0])
      positions = range(len(context), len(whole))
      log_p.append(sum(float(logits[i - 1, whole[i]]) for i in positions))
    assert odds == pytest.approx(sign * (log_p[0] - log_p[1]), abs=1e-4)


@pytest.mark.parametrize(
  ('bad', 'message'),
  [
    (match('a', ' '), r"match 1 \(prompt 'p'\): The response \(B\) is ' '"),
    (match('a', 'b', principle='Options:'), 'match 1 .*The principle is'),
    (Match('q', MESSAGES, PRINCIPLE, ('x', 'y'), ('a ' * 2000, 'b')), 'match 1 .*exc'),
    (Match('q', [], PRINCIPLE, ('x', 'y'), ('a', 'b')), r"match 1 \(prompt 'q'\): .*roles \[\]"),
    (
      Match('q', [*MESSAGES, {'role': 'assistant', 'content': 'x'}], PRINCIPLE, 'xy', 'ab'),
      'match 1 .*the last one must be "user"',
    ),
  ],
)
def test_matches_that_cannot_be_judged_are_rejected(tiny, bad, message):
  with pytest.raises(UserError, match=message):
    judge_matches(tiny, [match('a', 'b'), bad])
