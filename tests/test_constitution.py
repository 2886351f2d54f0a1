"""The constitution: both file formats, errors that name the place, and draws."""

import collections
import json
import os
import pathlib
import subprocess
import sys

import pytest

from cai_jax.constitution import (
  Constitution,
  ConstitutionConfig,
  Principle,
  draw_principles,
  load_constitution,
)
from cai_jax.dialogue.plain import join_plain, split_plain
from cai_jax.runtime.errors import UserError

DATA = pathlib.Path(
  os.environ.get('CAI_JAX_DATA', pathlib.Path(__file__).parents[1] / '../shared/data')
)
PUBLISHED = DATA / 'cai_paper' / 'prompts'
needs_published = pytest.mark.skipif(
  not PUBLISHED.is_dir(), reason=f'the published prompts of Bai et al. are not in {PUBLISHED}'
)

GOOD = """
principles:
  - id: kind
    critique_request: What is unkind?
    revision_request: Be kind.
    tags: [tone]
  - {id: true, critique_request: 'What is false?', revision_request: Be true., weight: 3}
"""


def load(path, **selection):
  return load_constitution(ConstitutionConfig(str(path), **selection))


def write(tmp_path, text, name='c.yaml'):
  path = tmp_path / name
  path.write_text(text)
  return str(path)


def principles(weights):
  return Constitution(tuple(Principle(f'p{i}', 'c', 'r', w) for i, w in enumerate(weights)))


def test_yaml_fields_are_loaded_and_selected(tmp_path):
  text = GOOD.replace('id: true', 'id: truth')
  loaded = load(write(tmp_path, text))
  assert loaded.principles == (
    Principle('kind', 'What is unkind?', 'Be kind.', 1.0, ('tone',)),
    Principle('truth', 'What is false?', 'Be true.', 3, ()),
  )
  assert [p.id for p in load(write(tmp_path, text), tags=('tone',)).principles] == ['kind']
  with pytest.raises(UserError, match=r"tags \['tune'\]. Available are \['tone'\]"):
    load(write(tmp_path, text), tags=('tune',))


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    (GOOD, r'principle 1 \(True\): id must be non-blank text'),
    (
      GOOD.replace('    revision_request: Be kind.\n', ''),
      r"0 \('kind'\) lacks the fields \['revision_request",
    ),
    (
      GOOD.replace('tags', 'tag'),
      r"0 \('kind'\) has the unknown fields \['tag'\]. Allowed fields are \['id'",
    ),
    (GOOD.replace('id: true', 'id: kind'), "Principles 0 and 1 share the id 'kind'"),
    (
      GOOD.replace('id: true', 'id: t').replace('3', '0'),
      r"1 \('t'\): weight .* above 0 .* got 0",
    ),
    (GOOD.replace('id: true', 'id: t').replace('3', '.nan'), 'above 0 and at most 1e.100'),
    (GOOD.replace('id: true', 'id: t').replace('3', 'true'), 'weight must be a number'),
    (GOOD.replace('[tone]', 'tone'), 'tags must be a list'),
    (GOOD.replace('Be kind.', '" "'), 'revision_request must be non-blank text'),
    ('principles: []', 'at least one principle'),
    ('principles: {a: 1}', "'principles' must be a list"),
    ('principles:\n  - hello', 'principle 0 must be a mapping'),
    ('', "must be a mapping with 'principles'"),
    ('rules: []', r"got \['rules'\]"),
    (GOOD.replace('id: true', 'id: 2023-13-45'), 'cannot be parsed: month must be in 1..12'),
    (GOOD.replace('id: true', 'id: !!bool x'), 'cannot be parsed'),
    ('principles: [\n  {id: a\n', 'cannot be parsed: (.|\n)*line 3'),
    (GOOD + 'principles: []', "the key 'principles' occurs twice(.|\n)*line 8"),
    (
      GOOD.replace('id: true', 'id: t') + 'demonstrations: [[{role: user, content: hi}]]',
      'end with a reply',
    ),
    (
      GOOD.replace('id: true', 'id: t') + 'demonstrations: [[{role: assistant, content: hi}]]',
      'must alternate',
    ),
  ],
)
def test_errors_name_the_file_and_the_principle(tmp_path, text, message):
  path = write(tmp_path, text)
  with pytest.raises(UserError, match=message) as error:
    load(path)
  assert path in str(error.value)


def test_missing_files_and_unknown_suffixes_are_errors(tmp_path):
  with pytest.raises(UserError, match='nowhere.yaml: there is no such constitution'):
    load(tmp_path / 'nowhere.yaml')
  with pytest.raises(UserError, match='must be a .yaml, .yml, .json or .md'):
    load(write(tmp_path, GOOD, 'c.txt'))
  with pytest.raises(UserError, match='does not contain CritiqueRevisionInstructions.json'):
    load(tmp_path)


def test_shipped_constitution_is_complete():
  shipped = load('general')
  assert len(shipped.principles) >= 16
  assert len({p.critique_request for p in shipped.principles}) == len(shipped.principles)
  assert all(p.tags for p in shipped.principles)
  assert len(shipped.demonstrations) >= 2
  for dialogue in shipped.demonstrations:
    assert [m['role'] for m in dialogue] == [
      'user', 'assistant', 'critique_request', 'critique', 'revision_request', 'revision',
    ]  # fmt: skip


def test_plain_dialogue_round_trips_and_needs_an_empty_line_before_labels():
  text = (
    '\n\nHuman: Say "Assistant: hi"\nAssistant: no\n\nAssistant:  Human: two spaces\n\nRevision:'
  )
  messages = split_plain(text)
  assert [m['role'] for m in messages] == ['user', 'assistant', 'revision']
  assert messages[0]['content'] == 'Say "Assistant: hi"\nAssistant: no'
  assert messages[1]['content'] == ' Human: two spaces'
  assert join_plain(messages) == text + ' '
  with pytest.raises(UserError, match='must begin with one of the labels'):
    split_plain('Human: hi')


@needs_published
def test_published_files_are_loaded_completely():
  loaded = load(PUBLISHED)
  raw = json.loads((PUBLISHED / 'CritiqueRevisionInstructions.json').read_text())
  assert [p.id for p in loaded.principles] == list(raw)
  for principle in loaded.principles:
    source = raw[principle.id]
    chain = [
      {'role': 'critique_request', 'content': principle.critique_request},
      {'role': 'critique', 'content': ''},
    ]
    assert join_plain(chain).rstrip() == ''.join(source['prompt'])
    assert 'Request:' not in principle.revision_request and 'Revision:' not in source['prompt']
    assert (
      source['edit_request'] == f'\n\nRevisionRequest: {principle.revision_request}\n\nRevision:'
    )
  texts = json.loads((PUBLISHED / 'CritiqueRevisionFewShotPrompts.json').read_text())
  assert len(loaded.demonstrations) == len(texts) == 5
  for dialogue, text in zip(loaded.demonstrations, texts, strict=True):
    assert join_plain(dialogue) == text.removesuffix('\n\nHuman:')
    assert dialogue[-1]['role'] == 'revision'
  alone = load(PUBLISHED / 'CritiqueRevisionInstructions.json')
  assert alone.principles == loaded.principles and not alone.demonstrations


def test_errors_in_published_files_name_the_principle(tmp_path):
  good = {'prompt': ['\n\nCritiqueRequest: a', '\n\nCritique:'], 'edit_request': 'x'}
  path = write(tmp_path, json.dumps({'h0': good}), 'i.json')
  with pytest.raises(UserError, match=r"principle 0 \('h0'\): edit_request .*RevisionRequest"):
    load(path)
  path = write(tmp_path, json.dumps({'h0': {'prompt': []}}), 'i.json')
  with pytest.raises(UserError, match=r"must have the fields \['prompt', 'edit_request'\]"):
    load(path)
  with pytest.raises(UserError, match='i.json cannot be parsed: .*line 1'):
    load(write(tmp_path, '{"a":', 'i.json'))


def test_draws_are_nested_and_depend_on_seed_and_id():
  many = principles([1] * 20)
  for replace in (True, False):
    full = draw_principles(many, 7, 'a', 12, replace)
    assert all(draw_principles(many, 7, 'a', n, replace) == full[:n] for n in range(12))
    assert full != draw_principles(many, 8, 'a', 12, replace) and full != draw_principles(
      many, 7, 'b', 12, replace
    )


def test_draws_without_replacement_are_distinct():
  many = principles([1, 5, 2, 9])
  for i in range(50):
    assert len(set(draw_principles(many, 0, str(i), 4, replace=False))) == 4
  with pytest.raises(UserError, match='5 rounds without repetition .* has 4'):
    draw_principles(many, 0, 'x', 5, replace=False)
  with pytest.raises(UserError, match='at least 0'):
    draw_principles(many, 0, 'x', -1)


def test_draws_follow_the_weights_and_rounds_are_independent():
  many = principles([1, 2, 7])
  n = 6000
  draws = [[p.id for p in draw_principles(many, 1, f'prompt {i}', 2)] for i in range(n)]
  for round_index in (0, 1):
    counts = collections.Counter(drawn[round_index] for drawn in draws)
    for name, share in zip(('p0', 'p1', 'p2'), (0.1, 0.2, 0.7), strict=True):
      assert abs(counts[name] / n - share) < 5 * (share * (1 - share) / n) ** 0.5
  pairs = collections.Counter(map(tuple, draws))
  assert abs(pairs['p1', 'p2'] / n - 0.14) < 5 * (0.14 * 0.86 / n) ** 0.5


def test_draw_and_fingerprint_do_not_depend_on_the_hash_seed():
  code = (
    'from cai_jax.constitution import ConstitutionConfig, draw_principles, load_constitution\n'
    'constitution = load_constitution(ConstitutionConfig())\n'
    'principles = draw_principles(constitution, 3, "some prompt", 8)\n'
    'print([principle.id for principle in principles], constitution.fingerprint())'
  )
  outputs = {
    subprocess.run(
      [sys.executable, '-c', code],
      env={**os.environ, 'PYTHONHASHSEED': seed},
      capture_output=True,
      text=True,
      check=True,
    ).stdout
    for seed in ('1', '2')
  }
  assert len(outputs) == 1


def test_fingerprint_covers_every_field():
  base = Principle('a', 'b', 'c')
  variants = [
    base,
    Principle('x', 'b', 'c'),
    Principle('a', 'x', 'c'),
    Principle('a', 'b', 'x'),
    Principle('a', 'b', 'c', 2.0),
    Principle('a', 'b', 'c', 1.0, ('t',)),
  ]
  dialogue = ({'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'a'})
  whole = [Constitution((p,)) for p in variants] + [Constitution((base,), (dialogue,))]
  assert len({x.fingerprint() for x in whole}) == len(whole)
