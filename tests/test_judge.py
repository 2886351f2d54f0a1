"""A language model as judge: both orders, complements; win rates and ratings of known odds."""

import itertools
import json
import math
import pathlib

import jax
import numpy as np
import pytest

import cai_jax
from cai_jax.model import lm as lm_lib
from cai_jax.runtime.mesh import make_mesh
from cai_jax.scoring import judge as judge_lib
from cai_jax.scoring.judge import Comparison, Match, elo, judge, question, win_rate

MESSAGES = [{'role': 'user', 'content': 'How do I bake bread?'}]
PRINCIPLE = 'Choose the response that is more helpful.'
TEXTS = ('With flour, water, salt and time.', 'No.', 'I will not say.', 'Ask a baker.')


def match(a, b, prompt='p', players=('x', 'y'), principle=PRINCIPLE):
  return Match(prompt, MESSAGES, principle, players, (a, b))


def won(prompt, first, second, points):
  """A comparison that gives `points` to the first player."""
  return Comparison(prompt, (first, second), {1.0: (1, 1), 0.5: (1, -1), 0.0: (-1, -1)}[points])


@pytest.fixture(scope='module')
def tiny():
  folder = pathlib.Path(cai_jax.__file__).parent / 'tiny' / 'model'
  return lm_lib.load(folder, mesh=make_mesh(2, devices=jax.devices()[:2]))


def test_question_is_worded_as_told():
  system = {'role': 'system', 'content': 'Be brief.'}
  turns = [MESSAGES[0], {'role': 'assistant', 'content': 'Why?'}, MESSAGES[0]]
  assert question([system, *turns], f'\n{PRINCIPLE} Options:', ' one\n', 'two') == (
    'Be brief.\n\nHere is a conversation between a human and an assistant, whose next answer is to '
    'be chosen from two.\n\nHuman: How do I bake bread?\n\nAssistant: Why?\n\nHuman: How do I bake '
    'bread?\n\nChoose the response that is more helpful. Options:\n (A) one\n (B) two\n\n'
    'The answer is:'
  )
  assert question(turns, PRINCIPLE, 'a', 'b') == question(turns, f'{PRINCIPLE}\nOptions:', 'a', 'b')


def test_published_principles_fit(data_dir):
  path = data_dir('cai_paper') / 'prompts' / 'RLMadisonInstructions.json'
  for principle in json.loads(path.read_text()):
    text = question(MESSAGES, principle, 'a', 'b')
    assert text.count('Options:') == 1
    assert principle.strip().removesuffix('Options:').strip() in text


def test_both_orders_are_asked_and_read_right(tiny, monkeypatch):
  asked = []
  ids = {}  # the tokens of a text stand for it

  def tokenise(tokenizer, context, option):
    asked.append((context, option))
    return [ids.setdefault(context, len(ids))], [(' (A)', ' (B)').index(option)]

  # For each (question, label): 'good' is liked by 3 nats, (A) by 1.
  def log_likelihoods(lm, contexts, options, *, batch_tokens):
    names = {number: context for context, number in ids.items()}
    label = [(' (A)', ' (B)')[option[0]] for option in options]
    return [
      3.0 * (f'{x} good' in names[context[0]]) + (x == ' (A)')
      for context, x in zip(contexts, label, strict=True)
    ]

  monkeypatch.setattr(judge_lib.likelihood, 'tokenise', tokenise)
  monkeypatch.setattr(judge_lib.likelihood, 'log_likelihoods', log_likelihoods)
  found = judge(tiny, [match('good', 'bad'), match('bad', 'good'), match('bad', 'worse')])
  wanted = [
    (question(MESSAGES, PRINCIPLE, a, b), option)
    for a, b in [('good', 'bad'), ('bad', 'good'), ('bad', 'good'), ('good', 'bad')]
    for option in (' (A)', ' (B)')
  ]
  assert asked[:8] == wanted and len(asked) == 12
  assert [c.log_odds for c in found] == [(4, 2), (-2, -4), (1, -1)]
  assert [c.verdict for c in found] == ['first', 'second', 'tie']
  assert [c.points for c in found] == [1, 0, 0.5]
  assert [c.consistent for c in found] == [True, True, False]
  sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
  assert found[0].probabilities == pytest.approx((sigmoid(4), sigmoid(2)))
  assert found[0].probability == pytest.approx((sigmoid(4) + sigmoid(2)) / 2)
  assert found[2].probability == 0.5


def test_exchanged_responses_give_the_complement_exactly(tiny):
  pairs = list(itertools.combinations(TEXTS, 2))
  matches = [match(a, b, f'p{i}') for i, (a, b) in enumerate(pairs)]
  back = [match(b, a, f'p{i}', ('y', 'x')) for i, (a, b) in enumerate(pairs)]
  forth, back = judge(tiny, matches), judge(tiny, back)
  complement = {'first': 'second', 'second': 'first', 'tie': 'tie'}
  for one, other in zip(forth, back, strict=True):
    assert other.log_odds == (-one.log_odds[1], -one.log_odds[0])
    assert other.verdict == complement[one.verdict]
    assert other.points == 1 - one.points
    assert one.probability + other.probability == pytest.approx(1, abs=1e-15)
    assert one.log_odds[0] != one.log_odds[1]  # the order does matter to a model
  assert win_rate(forth, 'x') == win_rate(back, 'x')
  assert elo(forth) == elo(back)


def test_same_responses_are_a_tie(tiny):
  (found,) = judge(tiny, [match(TEXTS[0], TEXTS[0])])
  assert found.log_odds[0] == -found.log_odds[1] != 0
  assert found.verdict == 'tie' and found.probability == pytest.approx(0.5, abs=1e-15)


def test_comparisons_are_the_models_own(tiny):
  """The odds are those of the labels after the question, by the logits of the whole text."""
  one, other = TEXTS[:2]
  (found,) = judge(tiny, [match(one, other)])
  for odds, sign, texts in zip(found.log_odds, (1, -1), ((one, other), (other, one)), strict=True):
    log_p = []
    text = question(MESSAGES, PRINCIPLE, *texts)
    context = tiny.tokenizer.encode(text)
    for option in (' (A)', ' (B)'):
      whole = tiny.tokenizer.encode(text + option)
      assert whole[: len(context)] == context
      logits = jax.nn.log_softmax(tiny.logits(np.array([whole]))[0])
      places = range(len(context), len(whole))
      log_p.append(sum(float(logits[i - 1, whole[i]]) for i in places))
    assert odds == pytest.approx(sign * (log_p[0] - log_p[1]), abs=1e-4)


@pytest.mark.parametrize(
  ('bad', 'message'),
  [
    (match('a', ' '), r"match 1 \(prompt 'p'\): the response \(B\) is ' '"),
    (match('a', 'b', principle='Options:'), 'match 1 .*the principle is'),
    (Match('q', MESSAGES, PRINCIPLE, ('x', 'y'), ('a ' * 2000, 'b')), 'match 1 .*exc'),
    (Match('q', [], PRINCIPLE, ('x', 'y'), ('a', 'b')), r"match 1 \(prompt 'q'\): .*roles \[\]"),
    (
      Match('q', [*MESSAGES, {'role': 'assistant', 'content': 'x'}], PRINCIPLE, 'xy', 'ab'),
      'match 1 .*the last is the "user"',
    ),
  ],
)
def test_refused_matches(tiny, bad, message):
  with pytest.raises(ValueError, match=message):
    judge(tiny, [match('a', 'b'), bad])


def test_win_rate_counts_ties_as_halves():
  comparisons = [
    won('p1', 'x', 'y', 1.0),
    won('p2', 'y', 'x', 1.0),
    won('p3', 'x', 'y', 0.5),
    won('p4', 'y', 'x', 0.0),
  ]
  found = win_rate(comparisons)
  assert (found['player'], found['rate'], found['prompts']) == ('x', 0.625, 4)
  assert (found['wins'], found['ties'], found['losses']) == (2, 1, 1)
  assert found['consistency'] == 0.75
  low, high = found['interval']
  assert low < 0.625 < high
  other = win_rate(comparisons, 'y')
  assert other['rate'] == 0.375 and (other['wins'], other['losses']) == (1, 2)


def test_win_rate_resamples_prompts():
  # Ten comparisons of each of two prompts are two observations, not twenty.
  comparisons = [won(f'p{p}', 'x', 'y', float(p)) for p in (0, 1) for _ in range(10)]
  assert win_rate(comparisons)['interval'] == [0.0, 1.0]
  with pytest.raises(ValueError, match=r"'z' is in no comparison; the players are \['x', 'y'\]"):
    win_rate(comparisons, 'z')
  with pytest.raises(ValueError, match='no comparison'):
    win_rate([])
  with pytest.raises(ValueError, match='meets itself'):
    win_rate([won('p', 'x', 'x', 1.0)])


@pytest.mark.parametrize(('wins', 'losses', 'ties'), [(30, 10, 0), (5, 0, 0), (0, 0, 4), (6, 2, 3)])
def test_two_players_have_the_odds_of_their_points(wins, losses, ties):
  results = [1.0] * wins + [0.0] * losses + [0.5] * ties
  comparisons = [won(f'p{i}', 'x', 'y', r) for i, r in enumerate(results)]
  ratings = elo(comparisons)['ratings']
  # Half a draw is a quarter of a point for each.
  lead = 400 * math.log10((wins + ties / 2 + 0.25) / (losses + ties / 2 + 0.25))
  assert ratings['x'] - ratings['y'] == pytest.approx(lead, abs=1e-6)
  assert ratings['x'] + ratings['y'] == pytest.approx(0, abs=1e-9)
  anchored = elo(comparisons, anchor='y')
  assert anchored['ratings'] == {'x': pytest.approx(lead, abs=1e-6), 'y': 0}
  assert anchored['intervals']['y'] == [0, 0]


TRUE = {'a': 250.0, 'b': 40.0, 'c': -60.0, 'd': -230.0}


def simulated(prompts, seed, ties=0.0):
  """Every pair meets once on each prompt, with the odds of `TRUE` ratings."""
  rng = np.random.default_rng(seed)
  comparisons = []
  for prompt in range(prompts):
    for one, other in itertools.combinations(TRUE, 2):
      chance = 1 / (1 + 10 ** ((TRUE[other] - TRUE[one]) / 400))
      # A tie with the same expected points leaves less for wins; only near-even pairs tie here.
      share = 2 * ties * min(chance, 1 - chance)
      points = 0.5 if rng.random() < share else None
      if points is None:
        points = float(rng.random() < (chance - share / 2) / (1 - share))
      comparisons.append(won(str(prompt), one, other, points))
  return comparisons


@pytest.mark.parametrize('ties', [0.0, 0.4])
def test_ratings_find_known_odds(ties):
  found = elo(simulated(3000, 1, ties), samples=200)
  assert list(found['ratings']) == list(TRUE)  # best first
  for player, rating in TRUE.items():
    assert found['ratings'][player] == pytest.approx(rating, abs=15)
  assert (found['prompts'], found['comparisons']) == (3000, 18000)


def test_intervals_cover_the_truth():
  covered = []
  for seed in range(40):
    found = elo(simulated(60, seed), samples=200)
    for player, (low, high) in found['intervals'].items():
      covered.append(low <= TRUE[player] <= high)
      assert low < found['ratings'][player] < high
  assert 0.87 <= np.mean(covered) <= 0.99


def test_who_wins_everything_has_a_finite_rating():
  comparisons = [
    won(f'p{i}', one, other, 1.0)
    for i in range(200)
    for one, other in itertools.combinations('abcde', 2)
  ]
  found = elo(comparisons, samples=50)
  ratings = list(found['ratings'].values())
  assert list(found['ratings']) == list('abcde') and np.all(np.diff(ratings) < -100)
  assert np.all(np.abs(ratings) < 4000)
  single = elo([won('p', 'a', 'b', 1.0)], samples=10)['ratings']
  assert single['a'] == pytest.approx(200 * math.log10(1.25 / 0.25))


def test_ratings_refuse_what_cannot_be_rated():
  with pytest.raises(ValueError, match='no comparison'):
    elo([])
  with pytest.raises(ValueError, match=r"no player of \['a', 'b'\] met one of \['c', 'd'\]"):
    elo([won('p', 'a', 'b', 1.0), won('p', 'c', 'd', 1.0)])
  with pytest.raises(ValueError, match="anchor='z' is no player"):
    elo([won('p', 'a', 'b', 1.0)], anchor='z')
  with pytest.raises(ValueError, match='meets itself'):
    elo([won('p', 'a', 'a', 1.0)])
