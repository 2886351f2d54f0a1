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
from cai_jax.scoring.judge import Comparison, Match, mean_label_mass, mean_position_bias
from cai_jax.scoring.judge_local import Reasoning, judge_dialogue, local_judge, tokenize_question
from cai_jax.scoring.judge_questions import OPENING, OPTIONS, build_question

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
    'bread?\n\nChoose the response that is more helpful. Options:\n (A) one\n (B) two'
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


def dialogue_of(lm):
  return judge_dialogue(lm.tokenizer, lm.eos_token_ids)


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
      3.0 * (f'{x} good' in names[context[0]]) + (x == ' (A)') - 6
      for context, x in zip(contexts, label, strict=True)
    ]

  monkeypatch.setattr(likelihood, 'tokenize_pair', tokenize_pair)
  monkeypatch.setattr(likelihood, 'log_likelihoods', log_likelihoods)
  comparisons = local_judge(tiny)(
    [match('good', 'bad'), match('bad', 'good'), match('bad', 'worse')]
  )
  expected = [
    (f'{build_question(MESSAGES, PRINCIPLE, a, b)}\n\nThe answer is:', option)
    for a, b in [('good', 'bad'), ('bad', 'good'), ('bad', 'good'), ('good', 'bad')]
    for option in (' (A)', ' (B)')
  ]
  assert asked[:8] == expected and len(asked) == 12
  assert [c.log_odds for c in comparisons] == [(4, 2), (-2, -4), (1, -1)]
  assert [c.mean_log_odds for c in comparisons] == [3, -3, 0]
  assert [c.verdict for c in comparisons] == ['first', 'second', 'tie']
  assert [c.points for c in comparisons] == [1, 0, 0.5]
  assert [c.consistent for c in comparisons] == [True, True, False]
  assert [c.position_bias for c in comparisons] == [1, 1, 1]
  assert mean_position_bias(comparisons) == 1
  assert comparisons[0].probability == pytest.approx(1 / (1 + math.exp(-3)))
  assert comparisons[2].probability == 0.5
  both = math.exp(-5) + math.exp(-6)
  assert comparisons[2].label_mass == pytest.approx((both, both))
  expected_mass = (math.exp(-2) + math.exp(-6) + math.exp(-5) + math.exp(-3)) / 2
  assert mean_label_mass(comparisons[:1]) == pytest.approx(expected_mass)


def test_a_preference_for_a_label_does_not_hide_the_verdict():
  # Favours (A) by 2 nats, and the first response by 1: the two orders disagree.
  comparison = Comparison('p', ('x', 'y'), (3.0, -1.0))
  assert not comparison.consistent and comparison.position_bias == 2
  assert comparison.verdict == 'first' and comparison.points == 1
  assert mean_label_mass([comparison]) is None
  assert Comparison('p', ('x', 'y'), (0.0, 0.0)).consistent
  assert not Comparison('p', ('x', 'y'), (0.0, 1.0)).consistent


@pytest.mark.parametrize('chat', [False, True])
def test_exchanging_responses_gives_the_exact_complement(tiny, chat):
  judge = local_judge(tiny, dialogue_of(tiny) if chat else None)
  pairs = list(itertools.combinations(TEXTS, 2))
  matches = [match(a, b, f'p{i}') for i, (a, b) in enumerate(pairs)]
  exchanged = [match(b, a, f'p{i}', ('y', 'x')) for i, (a, b) in enumerate(pairs)]
  forward, backward = judge(matches), judge(exchanged)
  complement = {'first': 'second', 'second': 'first', 'tie': 'tie'}
  for a, b in zip(forward, backward, strict=True):
    assert b.log_odds == (-a.log_odds[1], -a.log_odds[0])
    assert b.label_mass == a.label_mass[::-1] and 0 < min(a.label_mass) <= max(a.label_mass) < 1
    assert b.verdict == complement[a.verdict]
    assert b.points == 1 - a.points
    assert a.probability + b.probability == pytest.approx(1, abs=1e-15)
    assert a.log_odds[0] != a.log_odds[1]  # the order matters to this model
  assert win_rate(forward, 'x') == win_rate(backward, 'x')
  assert elo_ratings(forward) == elo_ratings(backward)


def test_equal_responses_are_a_tie(tiny):
  (comparison,) = local_judge(tiny)([match(TEXTS[0], TEXTS[0])])
  assert comparison.log_odds[0] == -comparison.log_odds[1] != 0
  assert comparison.verdict == 'tie' and comparison.probability == 0.5
  assert local_judge(tiny)([]) == []


def logits_of_labels(lm, contexts, labels):
  """Return log P of each label from the logits of the whole text."""
  values = []
  for context, label in zip(contexts, labels, strict=True):
    logits = jax.nn.log_softmax(lm.logits(np.array([context + label]))[0])
    positions = range(len(context), len(context + label))
    values.append(sum(float(logits[i - 1, (context + label)[i]]) for i in positions))
  return values


def test_plain_log_odds_agree_with_logits_of_the_whole_text(tiny):
  (comparison,) = local_judge(tiny)([match(*TEXTS[:2])])
  orders = TEXTS[:2], TEXTS[1::-1]
  for order, (odds, sign, texts) in enumerate(
    zip(comparison.log_odds, (1, -1), orders, strict=True)
  ):
    text = f'{build_question(MESSAGES, PRINCIPLE, *texts)}\n\n{OPENING}'
    context = tiny.tokenizer.encode(text)
    labels = []
    for option in OPTIONS:
      whole = tiny.tokenizer.encode(text + option)
      assert whole[: len(context)] == context
      labels.append(whole[len(context) :])
    log_p = logits_of_labels(tiny, [context] * 2, labels)
    assert odds == pytest.approx(sign * (log_p[0] - log_p[1]), abs=1e-4)
    assert comparison.label_mass[order] == pytest.approx(sum(map(math.exp, log_p)), rel=1e-4)


def test_a_chat_model_reads_the_question_through_its_template(tiny):
  question = build_question(MESSAGES, PRINCIPLE, *TEXTS[:2])
  pairs = tokenize_question(tiny.tokenizer, dialogue_of(tiny), question)
  rendered = tiny.tokenizer.apply_chat_template(
    [{'role': 'user', 'content': question}], tokenize=False, add_generation_prompt=True
  )
  for (context, label), option in zip(pairs, OPTIONS, strict=True):
    assert tiny.tokenizer.decode(context + label) == f'{rendered}{OPENING}{option}'
  (a, b) = logits_of_labels(tiny, *zip(*pairs, strict=True))
  (comparison,) = local_judge(tiny, dialogue_of(tiny))([match(*TEXTS[:2])])
  assert comparison.log_odds[0] == pytest.approx(a - b, abs=1e-4)
  assert comparison.label_mass[0] == pytest.approx(math.exp(a) + math.exp(b), rel=1e-4)


@pytest.mark.parametrize('chat', [False, True])
def test_a_judge_may_write_before_its_verdict(tiny, chat, monkeypatch):
  asked = []
  log_likelihoods = likelihood.log_likelihoods

  def record(lm, contexts, labels, **options):
    asked.extend(zip(contexts, labels, strict=True))
    return log_likelihoods(lm, contexts, labels, **options)

  monkeypatch.setattr(likelihood, 'log_likelihoods', record)
  judge = local_judge(tiny, dialogue_of(tiny) if chat else None, reasoning=Reasoning(5))
  pairs = [TEXTS[:2], TEXTS[1::-1]]
  forward, backward = judge([match(*pair) for pair in pairs])
  assert backward.log_odds == (-forward.log_odds[1], -forward.log_odds[0])
  for context, label in asked:
    text = tiny.tokenizer.decode(context + label)
    assert 'Think step by step' in text and text.endswith(f'\n\n{OPENING} (A)') != text.endswith(
      f'\n\n{OPENING} (B)'
    )
  # Both labels follow the same text of the judge, and the two orders have texts of their own.
  assert asked[0][0] == asked[1][0] != asked[2][0] == asked[3][0]
  direct = local_judge(tiny, dialogue_of(tiny) if chat else None)([match(*pairs[0])])
  assert direct[0].log_odds != forward.log_odds


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
    local_judge(tiny)([match('a', 'b'), bad])
