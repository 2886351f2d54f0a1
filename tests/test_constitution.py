"""The constitution: reading both forms, errors that point at the fault, and drawing."""

import collections
import json
import os
import pathlib
import subprocess
import sys

import pytest

from cai_jax import constitution as c

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


def write(tmp_path, text, name='c.yaml'):
  path = tmp_path / name
  path.write_text(text)
  return str(path)


def principles(weights):
  return c.Constitution(tuple(c.Principle(f'p{i}', 'c', 'r', w) for i, w in enumerate(weights)))


def test_yaml_fields_arrive(tmp_path):
  text = GOOD.replace('id: true', 'id: truth')
  loaded = c.load(write(tmp_path, text))
  assert loaded.principles == (
    c.Principle('kind', 'What is unkind?', 'Be kind.', 1.0, ('tone',)),
    c.Principle('truth', 'What is false?', 'Be true.', 3, ()),
  )
  assert [p.id for p in c.load(write(tmp_path, text), tags=('tone',)).principles] == ['kind']
  with pytest.raises(ValueError, match=r"tags \['tune'\]; there are \['tone'\]"):
    c.load(write(tmp_path, text), tags=('tune',))


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    (GOOD, r'principle 1 \(True\): id must be a text'),
    (
      GOOD.replace('    revision_request: Be kind.\n', ''),
      r"0 \('kind'\) lacks \['revision_request",
    ),
    (GOOD.replace('tags', 'tag'), r"0 \('kind'\) has unknown \['tag'\]; the fields are \['id'"),
    (GOOD.replace('id: true', 'id: kind'), "principles 0 and 1 share the id 'kind'"),
    (
      GOOD.replace('id: true', 'id: t').replace('3', '0'),
      r"1 \('t'\): weight .* above 0, .* got 0",
    ),
    (GOOD.replace('id: true', 'id: t').replace('3', '.nan'), 'finite number above 0'),
    (GOOD.replace('id: true', 'id: t').replace('3', 'true'), 'weight must be a number'),
    (GOOD.replace('[tone]', 'tone'), 'tags must be a list'),
    (GOOD.replace('Be kind.', '" "'), 'revision_request must be a text that is not blank'),
    ('principles: []', 'at least one principle'),
    ('principles: {a: 1}', "'principles' must be a list"),
    ('principles:\n  - hello', 'principle 0 must be a mapping'),
    ('', "must be a mapping with 'principles'"),
    ('rules: []', r"found \['rules'\]"),
    ('principles: [\n  {id: a\n', 'not readable: (.|\n)*line 3'),
    (GOOD + 'principles: []', "the key 'principles' twice(.|\n)*line 8"),
    (
      GOOD.replace('id: true', 'id: t') + 'demonstrations: [[{role: user, content: hi}]]',
      'end with a reply',
    ),
    (
      GOOD.replace('id: true', 'id: t') + 'demonstrations: [[{role: assistant, content: hi}]]',
      'take turns',
    ),
  ],
)
def test_faults_are_named_with_file_and_place(tmp_path, text, message):
  path = write(tmp_path, text)
  with pytest.raises(ValueError, match=message) as error:
    c.load(path)
  assert path in str(error.value)


def test_missing_file_and_unknown_kind(tmp_path):
  with pytest.raises(ValueError, match='nowhere.yaml: no such constitution'):
    c.load(str(tmp_path / 'nowhere.yaml'))
  with pytest.raises(ValueError, match='is a .yaml, .yml or .json'):
    c.load(write(tmp_path, GOOD, 'c.txt'))
  with pytest.raises(ValueError, match='holds no CritiqueRevisionInstructions.json'):
    c.load(str(tmp_path))


def test_shipped_constitution():
  shipped = c.load(c.GENERAL)
  assert len(shipped.principles) >= 16
  assert len({p.critique_request for p in shipped.principles}) == len(shipped.principles)
  assert all(p.tags for p in shipped.principles)
  assert len(shipped.demonstrations) >= 2
  for dialogue in shipped.demonstrations:
    assert [m['role'] for m in dialogue] == [
      'user', 'assistant', 'critique_request', 'critique', 'revision_request', 'revision',
    ]  # fmt: skip


def test_plain_dialogue_round_trip_and_labels_only_after_an_empty_line():
  text = (
    '\n\nHuman: Say "Assistant: hi"\nAssistant: no\n\nAssistant:  Human: two spaces\n\nRevision:'
  )
  messages = c.split_plain(text)
  assert [m['role'] for m in messages] == ['user', 'assistant', 'revision']
  assert messages[0]['content'] == 'Say "Assistant: hi"\nAssistant: no'
  assert messages[1]['content'] == ' Human: two spaces'
  assert c.join_plain(messages) == text + ' '
  with pytest.raises(ValueError, match='begins with one of the labels'):
    c.split_plain('Human: hi')


@needs_published
def test_published_form():
  loaded = c.load(str(PUBLISHED))
  raw = json.loads((PUBLISHED / 'CritiqueRevisionInstructions.json').read_text())
  assert [p.id for p in loaded.principles] == list(raw)
  for principle in loaded.principles:
    source = raw[principle.id]
    chain = [
      {'role': 'critique_request', 'content': principle.critique_request},
      {'role': 'critique', 'content': ''},
    ]
    assert c.join_plain(chain).rstrip() == ''.join(source['prompt'])
    assert 'Request:' not in principle.revision_request and 'Revision:' not in source['prompt']
    assert (
      source['edit_request'] == f'\n\nRevisionRequest: {principle.revision_request}\n\nRevision:'
    )
  texts = json.loads((PUBLISHED / 'CritiqueRevisionFewShotPrompts.json').read_text())
  assert len(loaded.demonstrations) == len(texts) == 5
  for dialogue, text in zip(loaded.demonstrations, texts, strict=True):
    assert c.join_plain(dialogue) == text.removesuffix('\n\nHuman:')
    assert dialogue[-1]['role'] == 'revision'
  alone = c.load(str(PUBLISHED / 'CritiqueRevisionInstructions.json'))
  assert alone.principles == loaded.principles and not alone.demonstrations


def test_published_form_faults(tmp_path):
  good = {'prompt': ['\n\nCritiqueRequest: a', '\n\nCritique:'], 'edit_request': 'x'}
  path = write(tmp_path, json.dumps({'h0': good}), 'i.json')
  with pytest.raises(ValueError, match=r"principle 0 \('h0'\): edit_request .*RevisionRequest"):
    c.load(path)
  path = write(tmp_path, json.dumps({'h0': {'prompt': []}}), 'i.json')
  with pytest.raises(ValueError, match=r"must have the fields \['prompt', 'edit_request'\]"):
    c.load(path)
  with pytest.raises(ValueError, match='not readable: .*line 1'):
    c.load(write(tmp_path, '{"a":', 'i.json'))


def test_rounds_are_nested_and_depend_on_seed_and_id():
  many = principles([1] * 20)
  for replace in (True, False):
    full = c.draw(many, 7, 'a', 12, replace)
    assert all(c.draw(many, 7, 'a', n, replace) == full[:n] for n in range(12))
    assert full != c.draw(many, 8, 'a', 12, replace) and full != c.draw(many, 7, 'b', 12, replace)


def test_draws_without_repetition():
  many = principles([1, 5, 2, 9])
  for i in range(50):
    assert len(set(c.draw(many, 0, str(i), 4, replace=False))) == 4
  with pytest.raises(ValueError, match='5 rounds without repetition .* has 4'):
    c.draw(many, 0, 'x', 5, replace=False)
  with pytest.raises(ValueError, match='0 or more'):
    c.draw(many, 0, 'x', -1)


def test_draws_follow_the_weights_and_rounds_are_independent():
  many = principles([1, 2, 7])
  n = 6000
  draws = [[p.id for p in c.draw(many, 1, f'prompt {i}', 2)] for i in range(n)]
  for round_index in (0, 1):
    counts = collections.Counter(draw[round_index] for draw in draws)
    for name, share in zip(('p0', 'p1', 'p2'), (0.1, 0.2, 0.7), strict=True):
      assert abs(counts[name] / n - share) < 5 * (share * (1 - share) / n) ** 0.5
  pairs = collections.Counter(map(tuple, draws))
  assert abs(pairs['p1', 'p2'] / n - 0.14) < 5 * (0.14 * 0.86 / n) ** 0.5


def test_draw_and_fingerprint_do_not_depend_on_the_hash_seed():
  code = (
    'from cai_jax import constitution as c; k = c.load(c.GENERAL);'
    'print([p.id for p in c.draw(k, 3, "some prompt", 8)], k.fingerprint())'
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


def test_fingerprint_sees_every_field():
  base = c.Principle('a', 'b', 'c')
  variants = [
    base,
    c.Principle('x', 'b', 'c'),
    c.Principle('a', 'x', 'c'),
    c.Principle('a', 'b', 'x'),
    c.Principle('a', 'b', 'c', 2.0),
    c.Principle('a', 'b', 'c', 1.0, ('t',)),
  ]
  dialogue = ({'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'a'})
  whole = [c.Constitution((p,)) for p in variants] + [c.Constitution((base,), (dialogue,))]
  assert len({x.fingerprint() for x in whole}) == len(whole)
