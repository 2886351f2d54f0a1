"""Any bytes in manifest.json give a manifest whose stages can be compared, or an error."""

import json

from harness import Fault, Reader, check_reader

from cai_jax.experiment.collect import stage_costs
from cai_jax.runtime.manifest import Manifest

SETTINGS = {
  'seed': 0,
  'model': {'base': 'tiny'},
  'contents': {'model.base': {'weights': 'ab', 'tokenizer': 'cd'}},
  'plugins': [],
}
STAGE = {'settings': SETTINGS, 'seconds': 1.5, 'peak_memory_bytes': 7, 'finished': 'now'}
CONTENT = {
  'version': 2,
  'stages': {
    'generate': STAGE | {'turns': 3, 'replayed_turns': 1, 'tokens': 9, 'd_cai': 'ef'},
    'train': STAGE | {'model': {'weights': 'ab'}},
    'evaluate': STAGE | {'base': {'turns': 3, 'sampled_tokens': 2}},
  },
}
OLD = {'stages': {'generate': STAGE | {'settings': {'seed': 0, 'model': {'base': 'tiny'}}}}}
NAMES = ('generate', 'train', 'evaluate')


def read(folder):
  manifest = Manifest(folder, writes=False)
  for name in NAMES:
    manifest.check(name, SETTINGS, {'plugins': []})
  return stage_costs(folder, 0, NAMES) if (folder / 'manifest.json').exists() else []


def check(files, value):
  if not files:
    return
  stages = json.loads(files['manifest.json'])['stages']
  assert len(value) == sum('finished' in stages[name] for name in NAMES if name in stages)
  for row in value:
    settings = stages[row['stage']].get('settings')
    assert settings is None or (settings['seed'], settings['model']) == (0, {'base': 'tiny'})
    known = (settings or {}).get('contents', {}).get('model.base')
    assert known is None or known == SETTINGS['contents']['model.base']


MANIFEST = Reader(
  inputs=[{'manifest.json': json.dumps(content).encode()} for content in (CONTENT, OLD)],
  read=read,
  check=check,
  names_file=False,  # changed settings are an error of the folder
)


def test_manifests():
  check_reader(f'{__name__}:MANIFEST')


FAULTS = [
  Fault(f'{__name__}:MANIFEST', 'cai_jax.runtime.manifest', old, new)
  for old, new in (
    ('or not all(map(_is_stage, stages.values()))', ''),
    ('if not isinstance(stages, dict) or', 'if'),
    ('if not all(isinstance(value, dict) for value in objects):', 'if not objects:'),
    ('return all(isinstance(value, int | float) for value in values)', 'return True'),
    ('<= entry.keys():', '<= {*_NUMBERS}:'),
    ("any(name.startswith(f'contents.{field}.') for field in known)", 'not known'),
  )
]
