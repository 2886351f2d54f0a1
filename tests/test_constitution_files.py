"""Constitutions in other forms, and files that would take long or say two things."""

import json
import os
import time

import pytest

from cai_jax.constitution import ConstitutionConfig, load_constitution
from cai_jax.runtime.errors import UserError

ENTRY = {'id': 'kind', 'critique_request': 'What is unkind?', 'revision_request': 'Be kind.'}
PUBLISHED = {
  'rule1': {
    'prompt': ['\n\nCritiqueRequest: a\n\nCritique:'],
    'edit_request': '\n\nRevisionRequest: b\n\nRevision:',
  }
}
RECIPE = {'critic': 'Name what is rude.', 'revision': 'Make it polite.'}


def write(tmp_path, content, name='c.json'):
  path = tmp_path / name
  content = content if isinstance(content, str | bytes) else json.dumps(content)
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return path


def load(path):
  return load_constitution(ConstitutionConfig(str(path)))


def chat(*contents):
  roles = ('user', 'assistant') * len(contents)
  return [{'role': r, 'content': c} for r, c in zip(roles, contents, strict=False)]


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16'])
@pytest.mark.parametrize('document', [{'principles': [ENTRY]}, PUBLISHED])
def test_json_is_read_in_any_encoding(tmp_path, document, encoding):
  loaded = load(write(tmp_path, json.dumps(document).encode(encoding)))
  assert loaded.principles[0].id in ('kind', 'rule1')


def test_a_yaml_file_may_begin_with_a_byte_order_mark(tmp_path):
  text = json.dumps({'principles': [ENTRY]})  # JSON is YAML
  assert load(write(tmp_path, text.encode('utf-8-sig'), 'c.yaml')).principles[0].id == 'kind'


def test_the_form_of_the_hugging_face_recipe_is_read(tmp_path):
  chain = chat('hi', 'go away', 'Name what is rude.', 'It is rude.', 'Make it polite.', 'Hello.')
  document = {
    'constitutions': [RECIPE, {'critic': 'x', 'revision': 'y'}],
    'system_chat': [chat('Hi', 'Hello'), chain],
  }
  loaded = load(write(tmp_path, document))
  assert [(p.id, p.critique_request, p.revision_request) for p in loaded.principles] == [
    ('principle_0', 'Name what is rude.', 'Make it polite.'),
    ('principle_1', 'x', 'y'),
  ]
  assert loaded.demonstrations[0] == tuple(chat('Hi', 'Hello'))
  assert [m['role'] for m in loaded.demonstrations[1]] == [
    'user', 'assistant', 'critique_request', 'critique', 'revision_request', 'revision',
  ]  # fmt: skip
  flat = load(write(tmp_path, {'constitutions': [RECIPE], 'system_chat': chain}))
  assert flat.demonstrations == loaded.demonstrations[1:]
  assert load(write(tmp_path, {'constitutions': [RECIPE]}, 'c.yml')).demonstrations == ()


def test_anchors_are_read(tmp_path):
  text = """
principles:
  - &first {id: a, critique_request: What?, revision_request: &be Be., tags: &tags [x]}
  - {id: b, critique_request: Who?, revision_request: *be, tags: *tags}
  - {<<: *first, id: c, critique_request: Why?}
"""
  loaded = load(write(tmp_path, text, 'c.yaml'))
  assert [p.revision_request for p in loaded.principles] == ['Be.'] * 3
  assert loaded.principles[2].tags == ('x',)


def test_keys_may_hold_only_anchors_and_demonstrations_may_be_left_empty(tmp_path):
  text = """
x-requests: &requests {critique_request: What?, revision_request: Be.}
principles:
  - {<<: *requests, id: a}
demonstrations:
"""
  loaded = load(write(tmp_path, text, 'C.YAML'))
  assert loaded.principles[0].revision_request == 'Be.'
  assert loaded.demonstrations == ()
  text = text.replace('x-requests', 'requests')
  with pytest.raises(UserError, match='Keys for anchors only may begin with "x-"'):
    load(write(tmp_path, text, 'c.yaml'))


def bomb(start, line, count=40):
  return '\n'.join([start] + [line.format(n=n, last=n - 1) for n in range(1, count)])


HEAD = 'principles: [{id: a, critique_request: b, revision_request: c}]\n'


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('c.yaml', bomb('a0: &a0 [x]', 'a{n}: &a{n} [' + '*a{last}, ' * 9 + ']'), 'nodes, aliases'),
    ('c.yaml', bomb('a0: &a0 {k: v}', 'a{n}: &a{n} {{<<: [' + '*a{last}, ' * 9 + ']}}'), 'nodes'),
    ('c.yaml', 'principles: &a [*a]', 'refers to a node that contains it'),
    ('c.yaml', '[' * 10**5, 'cannot be parsed'),
    ('c.yaml', '{a: ' * 10**5, 'cannot be parsed'),
    ('c.yaml', '? ' * 10**5, 'cannot be parsed'),
    ('c.yaml', HEAD + 'x: ' + '1:' + '59:' * 10**5 + '59', 'a number has'),
    ('c.yaml', HEAD + 'x: 0x' + 'f' * 10**6, 'a number has'),
    ('c.yaml', HEAD + 'x: 0001-01-01T00:00:00+23:59', 'must be a mapping with'),
    ('c.yaml', HEAD + '? [a]\n: b', 'a key is not a short text'),
    ('c.yaml', HEAD + '---\n' + HEAD, 'cannot be parsed: expected a single document'),
    ('c.yaml', HEAD + '!!python/object/apply:os.system ["true"]', 'cannot be parsed'),
    ('c.yaml', 'principles: [{id: a, id: b}]', "the key 'id' occurs twice"),
    ('c.yaml', '#' * (2**20 + 1), 'more than 1048576 characters'),
    ('c.yaml', b'principles: \xff', 'the text is not UTF-8'),
    ('c.yaml', b'principles: \0', 'NUL'),
    ('c.yaml', '', "must be a mapping with 'principles'"),
    ('c.yaml', 'principles:\n  - Be kind.', 'principle 0 must be a mapping, .* has the form'),
    ('c.json', {'principles': [{**ENTRY, 'comparison_request': ''}]}, 'request is blank'),
    ('c.json', {'principles': [{**ENTRY, 'comparison_request': 3}]}, 'must be non-blank text'),
    ('c.json', ['Be kind.'], 'must map ids to principles, but got a list. .* has the form'),
    (
      'c.json',
      {'principles': [{**ENTRY, 'critique_request': '\n\nCritiqueRequest: What?\n\nCritique:'}]},
      'critique_request contains a label: .* Remove the labels',
    ),
    (
      'c.json',
      {'constitutions': [{**RECIPE, 'revision': 'Be polite.\n\nRevision:'}]},
      'revision_request contains a label',
    ),
    ('c.json', {'principles': []}, 'at least one principle'),
    ('c.json', {'principles': [{**ENTRY, 'weight': '1'}]}, "weight must be a number .* got '1'"),
    ('c.json', {'principles': [{**ENTRY, 'weight': 10**400}]}, 'weight must be above 0'),
    ('c.json', {'principles': [{**ENTRY, 'tags': {}}]}, 'tags must be a list of names'),
    ('c.json', {'principles': [{**ENTRY, 'tags': ['']}]}, 'tags must be a list of names'),
    ('c.json', {'principles': [{**ENTRY, 'id': 'a\nb'}]}, 'id must be printable text'),
    ('c.json', {'principles': [{**ENTRY, 'critique_request': 'a\0'}]}, 'NUL character'),
    ('c.json', {'principles': [{**ENTRY, 'critique_request': '\ud800'}]}, 'unpaired surrogate'),
    ('c.json', {'principles': [{'id': 'a', 'critique_request': 'b'}]}, 'lacks the fields .*revis'),
    ('c.json', {'principles': [ENTRY, {**ENTRY, 'id': 'b'}]}, '0 .* and 1 .* the same requests'),
    ('c.json', {'principles': [ENTRY, ENTRY]}, "share the id 'kind'"),
    ('c.json', '{"a": {}, "a": {}}', "the key 'a' occurs twice"),
    ('c.json', {'constitutions': []}, 'at least one principle'),
    ('c.json', {'constitutions': {}}, "must have a list 'constitutions'"),
    ('c.json', {'constitutions': [RECIPE], 'x': 1}, "must have a list 'constitutions'"),
    ('c.json', {'constitutions': [{'critic': 'a'}]}, "principle 0 must have the fields .*'critic'"),
    ('c.json', {'constitutions': [{**RECIPE, 'critic': 3}]}, 'critique_request must be non-blank'),
    ('c.json', {'constitutions': [RECIPE, RECIPE]}, 'the same requests'),
    ('c.json', {'constitutions': [RECIPE], 'system_chat': [[3]]}, 'Demonstration 0: message 0'),
    ('c.json', {'constitutions': [RECIPE], 'system_chat': [3]}, 'a list of lists of messages'),
    ('c.json', {'constitutions': [RECIPE], 'system_chat': [chat('a\0', 'b')]}, 'NUL character'),
    ('c.json', '[' * 10**5, 'nested too deeply'),
    ('c.json', '{"x": NaN}', 'NaN is not a JSON value'),
    ('c.json', '', 'cannot be parsed'),
    ('c.json', '{}', 'at least one principle'),
  ],
)  # fmt: skip
def test_other_files_are_refused_within_seconds(tmp_path, name, content, message):
  path = write(tmp_path, content, name)
  start = time.process_time()
  with pytest.raises(UserError, match=message) as error:
    load(path)
  assert time.process_time() - start < 5
  assert str(error.value).startswith(str(path)) and len(str(error.value)) < 1000


def test_paths_that_are_no_files_are_refused_at_once(tmp_path):
  os.mkfifo(tmp_path / 'pipe.yaml')
  (tmp_path / 'zero.json').symlink_to('/dev/zero')
  (tmp_path / 'loop.yaml').symlink_to('loop.yaml')
  for name, message in [
    ('pipe.yaml', 'is a pipe or a device'),
    ('zero.json', 'is a pipe or a device'),
    ('loop.yaml', 'there is no such constitution'),
    ('no\0.yaml', 'there is no such constitution'),
  ]:
    with pytest.raises(UserError, match=message):
      load(tmp_path / name)
