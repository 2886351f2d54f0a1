"""Units from preferences: token ids, masks, values, and the mismatched responses of KTO."""

import numpy as np
import pytest

from cai_jax.data.preferences import Comparison, JudgedResponse, judge_both
from cai_jax.data.preferences import units as unit_files
from cai_jax.data.preferences.units import build_comparison_units, build_judged_units
from cai_jax.data.units import check_units
from cai_jax.dialogue import Dialogue
from cai_jax.runtime.errors import UserError


@pytest.fixture(scope='module')
def dialogue(tiny_tokenizer):
  return Dialogue(tiny_tokenizer)


def ask(text):
  return ({'role': 'user', 'content': text},)


def pair(name, chosen='yes', rejected='no', **fields):
  return Comparison(name, ask(f'question {name}'), chosen, rejected, **fields)


def expected(dialogue, prompt, text):
  """Return what supervised training makes of a response."""
  tokens, mask = dialogue.example([*prompt, {'role': 'assistant', 'content': text}])
  return tokens, [bool(m) for m in mask]


def found(segment):
  return segment.tokens.tolist(), segment.loss_mask.tolist()


@pytest.mark.parametrize('style', ['chat', 'plain'])
def test_both_sides_of_a_comparison_are_rendered_as_supervised_examples(tiny_tokenizer, style):
  dialogue = Dialogue(tiny_tokenizer, style)
  pairs = [pair('a', 'yes, it is', 'no', probability=0.75), pair('b', scores=(2.0, 0.5))]
  built = build_comparison_units(pairs, dialogue)
  assert built.counts == {'rows': 2, 'kept': 2, 'dropped': {}}
  for unit, one in zip(built.units, pairs, strict=True):
    assert unit.id == one.id
    for segment, text in zip(unit.segments, (one.chosen, one.rejected), strict=True):
      assert found(segment) == expected(dialogue, one.prompt, text)
  assert [unit.values for unit in built.units] == [
    {'probability': (0.75, 0.25)},
    {'probability': (1, 0)},
  ]
  check_units(built.units, 'comparison', ['probability'])


def test_margins_are_those_of_the_scores_and_needed_if_asked_for(dialogue):
  (unit,) = build_comparison_units([pair('b', scores=(2.0, 0.5))], dialogue, margins=True).units
  assert unit.values['margin'] == (1.5, -1.5)
  with pytest.raises(UserError, match="comparison 'a' has no margin"):
    build_comparison_units([pair('a')], dialogue, margins=True)


def test_truncated_and_long_comparisons_are_dropped_and_counted(dialogue):
  pairs = [
    pair('a'),
    pair('b', truncated=(False, True)),
    pair('c', chosen='long ' * 200),
    pair('d', rejected='long ' * 200),
  ]
  (fits,) = build_comparison_units(pairs[:1], dialogue).units
  limit = fits.length
  built = build_comparison_units(pairs, dialogue, max_length=limit)
  assert built.counts == {'rows': 4, 'kept': 1, 'dropped': {'too_long': 2, 'truncated': 1}}
  kept = build_comparison_units(pairs, dialogue, max_length=limit, drop_truncated=False)
  assert [unit.id for unit in kept.units] == ['a', 'b']
  with pytest.raises(UserError, match="No preference remains of 4 rows.*'too_long': 3"):
    build_comparison_units(pairs, dialogue, max_length=limit - 1)


def test_a_judged_response_stands_beside_a_response_to_another_prompt(dialogue):
  judged = list(judge_both(pair(str(i), f'yes {i}', f'no {i}') for i in range(6)))
  built = build_judged_units(judged, dialogue, seed=3)
  check_units(built.units, 'judged', ['desirable'])
  partners = []
  for unit, one in zip(built.units, judged, strict=True):
    assert unit.id == one.id
    assert unit.values == {'desirable': (float(one.desirable), 0.0)}
    assert found(unit.segments[0]) == expected(dialogue, one.prompt, one.response)
    others = [other for other in judged if other.prompt != one.prompt]
    match = [
      other
      for other in others
      if found(unit.segments[1]) == expected(dialogue, one.prompt, other.response)
    ]
    assert len(match) == 1
    partners.append(match[0].id)
  again = build_judged_units(judged, dialogue, seed=3)
  assert [found(u.segments[1]) for u in again.units] == [found(u.segments[1]) for u in built.units]
  other = build_judged_units(judged, dialogue, seed=4)
  assert [found(u.segments[1]) for u in other.units] != [found(u.segments[1]) for u in built.units]
  assert len(set(partners)) > 6  # most responses are used, and none by all


def test_judged_units_fit_and_the_others_are_counted(dialogue):
  judged = [
    JudgedResponse('a', ask('x'), 'yes', True),
    JudgedResponse('b', ask('y'), 'no', False),
    JudgedResponse('c', ask('z'), 'long ' * 200, True),
    JudgedResponse('d', ask('w'), 'cut', True, truncated=True),
  ]
  built = build_judged_units(judged, dialogue, max_length=64)
  assert [unit.id for unit in built.units] == ['a', 'b']
  assert max(unit.length for unit in built.units) <= 64
  assert built.counts == {'rows': 4, 'kept': 2, 'dropped': {'too_long': 1, 'truncated': 1}}
  same = [JudgedResponse(str(i), ask('x'), f'yes {i}', True) for i in range(3)]
  with pytest.raises(UserError, match='All 3 judged responses answer the same prompt'):
    build_judged_units(same, dialogue)


def test_the_response_to_another_prompt_is_the_next_one_that_fits(monkeypatch):
  """Blocks of responses that do not fit are skipped, which changes no choice."""
  monkeypatch.setattr(unit_files, '_BLOCK', 4)
  rng = np.random.default_rng(0)
  lengths = np.stack([rng.integers(1, 9, 50), rng.integers(1, 30, 50)], axis=1).astype(np.int32)
  prompts = rng.integers(5, size=50)
  order = np.random.default_rng([7, 3]).permutation(50).tolist()
  expected = []
  for i, (context, target) in enumerate(lengths.tolist()):
    place, room = order.index(i), 32 - 2 * context - target
    following = order[place + 1 :] + order[:place]
    fitting = [k for k in following if prompts[k] != prompts[i] and lengths[k, 1] <= room]
    expected.append(fitting[0] if fitting else -1)
  found = unit_files._find_mismatches(lengths, prompts, 32, 7)
  assert found.tolist() == expected and 5 < (found < 0).sum() < 45
