"""Any bytes in a constitution give principles or a UserError that names the file."""

import json
import pathlib

import pytest
from harness import Fault, Reader, check_reader

import cai_jax.constitution
from cai_jax.constitution import ConstitutionConfig, load_constitution

ROLES = ('user', 'assistant', 'critique_request', 'critique', 'revision_request', 'revision')
DIALOGUE = [{'role': role, 'content': f'a {role}'} for role in ROLES]
OWN = {
  'principles': [
    {'id': 'kind', 'critique_request': 'What is unkind?', 'revision_request': 'Be kind.'},
    {
      'id': 'true', 'critique_request': 'What is false?', 'revision_request': 'Be true.',
      'weight': 2.5, 'tags': ['a', 'b'],
    },
  ],
  'demonstrations': [DIALOGUE],
}  # fmt: skip
RECIPE = {
  'constitutions': [{'critic': 'Name it.', 'revision': 'Mend it.'}],
  'system_chat': [[{**m, 'role': r} for m, r in zip(DIALOGUE, ROLES[:2] * 3, strict=True)]],
}
PUBLISHED = {
  name: {
    'prompt': [f'\n\nCritiqueRequest: {name}', '\n\nCritique:'],
    'edit_request': f'\n\nRevisionRequest: not {name}\n\nRevision:',
  }
  for name in ('harmful0', 'harmful1')
}
FEW_SHOT = ['\n\nHuman: a\n\nAssistant: b\n\nCritiqueRequest: c\n\nCritique: d\n\nHuman:']
YAML = """
principles:
  - &first {id: a, critique_request: What?, revision_request: &be Be., tags: &tags [x]}
  - {id: b, critique_request: Who?, revision_request: *be, weight: 3}
  - {<<: *first, id: c, critique_request: Why?}
demonstrations:
  - - {role: user, content: hi}
    - {role: assistant, content: hello}
"""
GENERAL = pathlib.Path(cai_jax.constitution.__file__).parents[1] / 'constitution.yaml'


def check(files, constitution):
  ids = [p.id for p in constitution.principles]
  assert ids and len(set(ids)) == len(ids)
  assert len({(p.critique_request, p.revision_request) for p in constitution.principles}) == len(
    ids
  )
  for principle in constitution.principles:
    for text in (principle.id, principle.critique_request, principle.revision_request):
      assert text.strip() and '\0' not in text
      text.encode()
    assert 0 < principle.weight < float('inf') and principle.weight is not True
    assert all(isinstance(tag, str) and tag for tag in principle.tags)
  for dialogue in constitution.demonstrations:
    assert dialogue and len(dialogue) % 2 == 0
    for i, message in enumerate(dialogue):
      assert message['content'].strip() and message['role'] in ROLES[i % 2 :: 2]
      message['content'].encode()
  constitution.fingerprint()


def reader(name, *inputs):
  def read(folder):
    return load_constitution(ConstitutionConfig(str(folder / name)))

  return Reader(inputs, read, check)


def texts(name, *contents):
  return [{name: content.encode()} for content in contents]


JSON = reader(
  'constitution.json', *texts('constitution.json', *map(json.dumps, (OWN, RECIPE, PUBLISHED)))
)
YAML_FILES = reader(
  'constitution.yaml',
  *texts('constitution.yaml', YAML, json.dumps(OWN, indent=1), GENERAL.read_text()),
)
FOLDER = reader(
  'published',
  {
    'published/CritiqueRevisionInstructions.json': json.dumps(PUBLISHED).encode(),
    'published/CritiqueRevisionFewShotPrompts.json': json.dumps(FEW_SHOT).encode(),
  },
)


# Small inputs, of which a mutation more often hits the place of a planted fault.
SMALL = reader(
  'constitution.json',
  *texts(
    'constitution.json',
    json.dumps(
      {'principles': [{'id': 'a', 'critique_request': 'b', 'revision_request': 'c', 'weight': 2}]}
    ),
  ),
)
SMALL_RECIPE = reader(
  'constitution.json',
  *texts('constitution.json', json.dumps({'constitutions': [{'critic': 'a', 'revision': 'b'}]})),
)


@pytest.mark.parametrize('name', ['JSON', 'YAML_FILES', 'FOLDER', 'SMALL', 'SMALL_RECIPE'])
def test_constitutions(name):
  check_reader(f'{__name__}:{name}')


FILES, LOADING = 'cai_jax.constitution.files', 'cai_jax.constitution.loading'
PRINCIPLES = 'cai_jax.constitution.principles'
FAULTS = [
  Fault(f'{__name__}:{reader}', module, old, new)
  for reader, module, old, new in [
    ('JSON', FILES, 'ValueError,\n    KeyError,', 'KeyError,'),
    ('SMALL', PRINCIPLES, 'or not isinstance(weight, int | float)', ''),
    ('SMALL_RECIPE', FILES, "or set(entry) != {'critic', 'revision'}", ''),
    ('SMALL_RECIPE', LOADING, 'if first != i:', 'if first > i:'),
    (
      'YAML_FILES',
      FILES,
      'if not isinstance(entry, dict):\n    raise',
      'if entry == 3:\n    raise',
    ),
    ('FOLDER', FILES, 'or not all(isinstance(text, str) for text in texts)', ''),
  ]
]
