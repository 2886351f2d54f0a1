"""Mixtures of prompt sets: components, counts, conditions and repeated dialogues."""

import dataclasses
from fractions import Fraction

import pytest

from cai_jax.data.mixtures import count_draws, parse_mixture
from cai_jax.data.prompt_sources import PromptSource
from cai_jax.data.prompts import load_prompts
from cai_jax.data.sets import PROMPT_SETS
from cai_jax.runtime.errors import UserError
from tests.prompt_set_files import FILES, last, load, read, write


def mix(*parts, seed=0, **settings):
  texts = tuple(f'{name}={FILES[name.split("/")[0]]}:{weight}' for name, weight in parts)
  return load_prompts(PromptSource(mixture=texts, **settings), seed)


def count(prompts):
  return {
    s: sum(p.metadata['set'] == s for p in prompts) for s in {p.metadata['set'] for p in prompts}
  }


def test_a_mixture_draws_by_weight():
  drawn = mix(('xstest', 1), ('advbench', 3), limit=8)
  assert count(drawn) == {'xstest': 2, 'advbench': 6}
  assert mix(('xstest', 1), ('advbench', 3), limit=8) == drawn
  other = mix(('xstest', 1), ('advbench', 3), limit=8, seed=1)
  assert [p.id for p in other] != [p.id for p in drawn] and count(other) == count(drawn)
  assert count(mix(('xstest', 1), ('advbench', 3))) == {'xstest': 3, 'advbench': 7}
  alone = {p.id: p for p in load('advbench')}
  assert all(alone[p.id] == p for p in drawn if p.metadata['set'] == 'advbench')


def test_a_prompt_that_two_components_have_is_drawn_once(capsys):
  drawn = mix(('do_not_answer', 2), ('wildjailbreak', 1))
  assert 'wildjailbreak: 4 of 8 prompts are left out' in capsys.readouterr().out
  assert count(drawn) == {'do_not_answer': 8, 'wildjailbreak': 4}
  assert len({last(p) for p in drawn}) == 12


def test_files_and_conditions_take_part_in_a_mixture(tmp_path):
  one = write(
    tmp_path / 'one.jsonl', [{'id': i, 'prompt': f'Where is door {i}?'} for i in range(6)]
  )
  rows = [
    {'id': i, 'prompt': f'Who is guest {i}?', 'metadata': {'label': 'safe'}} for i in range(6)
  ]
  two = write(tmp_path / 'two.jsonl', rows)
  source = PromptSource(mixture=(f'{one}:0.5', f'{two}:0.25', f'xstest={FILES["xstest"]}:0.25'))
  drawn = load_prompts(source)
  assert count(drawn) == {'one': 6, 'two': 3, 'xstest': 3}
  assert {p.id for p in drawn if p.metadata['set'] == 'one'} == {f'one/{i}' for i in range(6)}
  with pytest.raises(UserError, match="no prompt of 'one' is left"):
    load_prompts(dataclasses.replace(source, where=('label=safe',)))
  safe = load_prompts(
    dataclasses.replace(source, mixture=source.mixture[1:], where=('label=safe',))
  )
  assert {p.metadata['label'] for p in safe} == {'safe'}
  assert count(safe) == {'two': 4, 'xstest': 4}


def test_turns_take_part_in_a_mixture_as_prompts():
  drawn = mix(('hh_harmless', 3), ('hh_helpful', 1), expand='every_turn')
  assert count(drawn) == {'hh_harmless': 12, 'hh_helpful': 4}


def test_a_mixture_has_no_dialogue_twice(tmp_path, capsys):
  rows = [{'prompt': text} for text in ('Where is it?', 'where  is it?', 'Where is it?', 'Who?')]
  one = write(tmp_path / 'one.jsonl', rows)
  drawn = load_prompts(PromptSource(mixture=(one,)))
  assert sorted(map(last, drawn)) == ['Where is it?', 'Who?']
  assert 'one: 2 of 4 prompts are left out' in capsys.readouterr().out
  with pytest.raises(UserError, match="earlier components have all 1 prompts of 'two'"):
    load_prompts(PromptSource(mixture=(one, write(tmp_path / 'two.jsonl', rows[1:2]))))
  opening = [{'role': 'user', 'content': 'Hello'}, {'role': 'assistant', 'content': 'Hi.'}]
  talks = [{'messages': [*opening, {'role': 'user', 'content': text}]} for text in ('Who?', 'Why?')]
  turns = write(tmp_path / 'turns.jsonl', talks)
  assert len(load_prompts(PromptSource(source=turns, expand='every_turn'))) == 4
  assert len(load_prompts(PromptSource(mixture=(turns,), expand='every_turn'))) == 3


def test_repeats_are_left_out_of_what_the_conditions_keep(tmp_path):
  def rows(label, *texts):
    return [{'prompt': text, 'metadata': {'label': label}} for text in texts]

  one = write(tmp_path / 'one.jsonl', rows('old', 'Who?') + rows('new', 'Why?', 'How?'))
  two = write(tmp_path / 'two.jsonl', rows('new', 'Who?', 'Why?'))
  drawn = load_prompts(PromptSource(mixture=(f'{one}:2', f'{two}:1'), where=('label=new',)))
  assert sorted((p.metadata['set'], last(p)) for p in drawn) == [
    ('one', 'How?'),
    ('one', 'Why?'),
    ('two', 'Who?'),
  ]


def test_copies_of_two_splits_are_mixed(tmp_path):
  rows = read(FILES['jailbreakbench'])
  benign = [{**row, 'Goal': f'Draw thing {i}'} for i, row in enumerate(rows)]
  copies = {
    'harmful': str(FILES['jailbreakbench']),
    'benign': write(tmp_path / 'benign.jsonl', benign),
  }
  parts = tuple(f'jailbreakbench/{split}={path}' for split, path in copies.items())
  drawn = load_prompts(PromptSource(mixture=parts))
  assert count(drawn) == {'jailbreakbench/harmful': 8, 'jailbreakbench/benign': 8}
  alone = {p.id: s for s, path in copies.items() for p in load('jailbreakbench', path)}
  assert {p.id: p.metadata['set'] for p in drawn} == {
    prompt_id: f'jailbreakbench/{split}' for prompt_id, split in alone.items()
  }


def test_subsets_of_the_hub_are_mixed(monkeypatch):
  import datasets

  def load_dataset(name, subset, split):
    return [{'prompt': f'{subset} {split} {i}', 'category': 'noise'} for i in range(2)]

  monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
  drawn = load_prompts(PromptSource(mixture=('harmbench', 'harmbench/copyright')))
  assert sorted((p.metadata['set'], last(p)) for p in drawn) == [
    ('harmbench', 'standard train 0'),
    ('harmbench', 'standard train 1'),
    ('harmbench/copyright', 'copyright train 0'),
    ('harmbench/copyright', 'copyright train 1'),
  ]


def test_components_are_labelled_by_what_differs():
  mixture = ('a/my.v1.jsonl', 'a/my.v2.JSONL.GZ:2', 'harmbench/copyright/train=c.csv', 'xstest')
  components = parse_mixture(PromptSource(mixture=mixture), PROMPT_SETS)
  assert [(c.label, c.weight) for c in components] == [
    ('my.v1', 1),
    ('my.v2', 2),
    ('harmbench/copyright/train', 1),
    ('xstest', 1),
  ]


@pytest.mark.parametrize(
  ('sizes', 'weights', 'limit', 'counts'),
  [
    ((450, 520), (1, 3), -1, [173, 520]),
    ((450, 520), (1, 3), 100, [25, 75]),
    ((9, 9, 9), (1, 1, 1), 10, [4, 3, 3]),
    ((9, 9, 9), (1, 1, 1), 11, [4, 4, 3]),
    ((10, 10), (1, 9), 5, [1, 4]),
    ((10, 10), (8, 2), 5, [4, 1]),
    ((1000, 3), (0.2, 0.7), -1, [1, 2]),
  ],
)
def test_counts_of_a_mixture(sizes, weights, limit, counts):
  sizes = dict(zip('abc', sizes, strict=False))
  assert count_draws(sizes, [Fraction(str(weight)) for weight in weights], limit) == counts


@pytest.mark.parametrize(
  ('sizes', 'weights', 'limit', 'message'),
  [
    ((5, 4), (100, 1), -1, "'b' would give none of the 5 prompts.* a larger weight, or remove"),
    ((10, 10), (9, 1), 5, "'b' would give none of the 5 prompts.* weight or raise the limit, or"),
    ((1000, 3), (0.1, 0.7), -1, "'a' would give none of the 3 prompts"),
  ],
)
def test_a_component_that_would_give_nothing_is_named(sizes, weights, limit, message):
  sizes = dict(zip('ab', sizes, strict=True))
  with pytest.raises(UserError, match=message):
    count_draws(sizes, [Fraction(str(weight)) for weight in weights], limit)


@pytest.mark.parametrize(
  ('mixture', 'settings', 'message'),
  [
    (('xtest:1',), {}, "'xtest:1' names neither a published set nor a file.*ultrachat"),
    (('xstest:none',), {}, "the weight of 'xstest:none' must be a number above 0"),
    (('xstest:0',), {}, 'must be a number above 0'),
    (('xstest:1', 'xstest:2'), {}, "'xstest:1' and 'xstest:2' are the same prompts. Keep one"),
    (('aya_redteaming', 'aya_redteaming/english'), {}, 'are the same prompts'),
    (('a/p.jsonl', 'b/p.jsonl'), {}, "'b/p.jsonl' would both have the label 'p'. Rename one file"),
    (('xstest', 'b/xstest.csv'), {}, "both have the label 'xstest'. Rename one file"),
    (('xstest=a.csv', 'xstest=b.csv'), {}, "both have the label 'xstest'. Write the split of each"),
    (
      ('jailbreakbench/bening=b.csv',),
      {},
      "no split or subset 'bening'. It has the splits harmful, benign, and the subsets behaviors",
    ),
    (('xstest:1',), {'split': 'test'}, "split='test' has no meaning for a mixture"),
    (('xstest:1',), {'field': 'prompt'}, 'field has no meaning for a mixture'),
    (('aya_redteaming/german:1',), {}, "no split or subset 'german'. It has the splits english"),
    (('no.jsonl:1',), {}, 'no.jsonl: there is no such file'),
    (
      (f'xstest={FILES["xstest"]}',),
      {'limit': 9},
      "needs 9 prompts of 'xstest', which has 8. Lower the limit to 8",
    ),
    (
      (f'xstest={FILES["xstest"]}',),
      {'where': ('set=aya',)},
      "set='aya'. The values are .'xstest'",
    ),
  ],
)
def test_mixtures_of_another_form_are_refused(mixture, settings, message):
  with pytest.raises(UserError, match=message):
    load_prompts(PromptSource(mixture=mixture, **settings))
