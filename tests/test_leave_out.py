"""Leaving principles out: who draws what, and what stays as it was."""

import collections
import dataclasses
import itertools

import pytest

from cai_jax.constitution import (
  Constitution,
  ConstitutionConfig,
  Principle,
  draw_principles,
  load_constitution,
)
from cai_jax.runtime.errors import UserError

WEIGHTS = {'a': 1.0, 'b': 2.0, 'c': 3.0, 'd': 0.5}


def ids(drawn):
  return [principle.id for principle in drawn]


@pytest.fixture
def load(tmp_path):
  """`load(*left_out)` returns the constitution of four principles without those."""
  path = tmp_path / 'c.yaml'
  path.write_text(
    'principles:\n'
    + ''.join(
      f'  - {{id: {name}, critique_request: What {name}?, revision_request: r, weight: {weight}}}\n'
      for name, weight in WEIGHTS.items()
    )
  )
  return lambda *names, **selection: load_constitution(
    ConstitutionConfig(str(path), leave_out=names, **selection)
  )


@pytest.mark.parametrize('replace', [True, False])
def test_prompts_that_do_not_draw_it_keep_all_their_principles(load, replace):
  whole, without = load(), load('b')
  changed = 0
  for number in range(300):
    before = ids(draw_principles(whole, 5, f'p{number}', 3, replace))
    after = ids(draw_principles(without, 5, f'p{number}', 3, replace))
    first = before.index('b') if 'b' in before else 3
    assert after[:first] == before[:first] and 'b' not in after
    assert replace or len({*after}) == 3
    changed += first < 3
    shorter = draw_principles(without, 5, f'p{number}', 2, replace)
    assert ids(shorter) == after[:2]
  assert 0 < changed < 300


@pytest.mark.parametrize('replace', [True, False])
def test_the_others_are_drawn_in_proportion_to_their_weights(load, replace):
  """Two rounds without 'c' have the probabilities of a constitution that never had it."""
  without, count = load('c'), 6000
  drawn = collections.Counter(
    tuple(ids(draw_principles(without, 0, str(number), 2, replace))) for number in range(count)
  )
  rest = {name: weight for name, weight in WEIGHTS.items() if name != 'c'}
  for first, second in itertools.product(rest, rest):
    left = rest if replace else {n: w for n, w in rest.items() if n != first}
    p = rest[first] / sum(rest.values()) * left.get(second, 0) / sum(left.values())
    deviation = 4.5 * (p * (1 - p) / count) ** 0.5
    assert drawn[first, second] / count == pytest.approx(p, abs=deviation or 1e-12)


def test_the_kept_principles_are_those_of_the_constitution(load):
  without = load('a', 'd')
  assert ids(without.principles) == ['b', 'c'] and ids(without.drawn_from) == [*WEIGHTS]
  assert ids(load('a', ids=('a', 'c')).principles) == ['c']
  chosen = load(ids=('b', 'c'))
  assert chosen.principles == without.principles
  assert len({c.fingerprint() for c in (load(), without, chosen, load('a'))}) == 4


def test_a_constitution_without_left_out_principles_keeps_its_old_fingerprint():
  principle = Principle('kind', 'What is unkind?', 'Be kind.', 1.0, ('tone',))
  # As version 0.1.0 computes it.
  assert Constitution((principle,)).fingerprint() == '0e5aca999c43bf27'


def test_unknown_ids_and_an_empty_rest_are_refused(load):
  with pytest.raises(UserError, match=r"no principle has the ids \['x'\]. Available are"):
    load('x')
  with pytest.raises(UserError, match='leaves no principle'):
    load(*WEIGHTS)


def test_comparison_requests_change_what_labels_read_and_no_chain():
  principle = Principle('kind', 'What is unkind?', 'Be kind.', 1.0, ('tone',))
  asked = dataclasses.replace(principle, comparison_request='Choose the kinder one.')
  plain, with_request = Constitution((principle,)), Constitution((asked,))
  assert with_request.fingerprint() == plain.fingerprint()
  assert with_request.comparisons_fingerprint() != plain.comparisons_fingerprint()
  assert asked.comparison == 'Choose the kinder one.' and '"Be kind."' in principle.comparison
