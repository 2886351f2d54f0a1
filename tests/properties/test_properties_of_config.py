"""Any values in a config give a run that is checked or an error that names the field."""

import dataclasses
import json
import math
import pathlib
from typing import Any

from harness import Fault, Files, Reader, check_reader

from cai_jax import pipeline
from cai_jax.experiment import define
from cai_jax.pipeline import space
from cai_jax.pipeline.run import Run
from cai_jax.runtime.settings import flatten
from configs import tiny

# A config file as users write one whose values come from elsewhere.
SCRIPT = """\
import json, pathlib
from configs import tiny
def change(config, values):
  for name, value in values.items():
    if isinstance(value, dict) and hasattr(config.get(name), 'items'):
      change(config[name], value)
    else:
      config[name] = value
def get_config():
  config = tiny.get_config()
  for prompts in config.prompts.values():
    prompts.limit = 5
  text = pathlib.Path(__file__).with_name('config.json').read_text()
  with config.unlocked(), config.ignore_type():
    change(config, json.loads(text))
  return config
"""
STAGES = ('generate', 'train', 'evaluate', 'report')


def values(**sections: Any) -> Files:
  """Return the files of a config with some fields, such as train={'epochs': 2}."""
  return {'config.json': json.dumps(sections).encode()}


def read(folder: pathlib.Path) -> Run:
  """Load the config, build its run, and check it as before the first stage."""
  (folder / 'config.py').write_text(SCRIPT)
  run = pipeline.build(define.load_config(str(folder / 'config.py')), folder / 'run')
  pipeline.check_run(run, [stage for stage in STAGES if stage in pipeline.default_stages(run)])
  return run


def check(files: Files, run: Run) -> None:
  """Check that every given value is in the run, and that the run's values have their types."""
  given, got = flatten(json.loads(files['config.json'])), flatten(dict(run.values))
  for name, value in given.items():
    if value == {}:  # a section without a field has its defaults
      continue
    assert name in got, f'{name} was ignored'
    if name != 'version':
      assert got[name] == value, f'{name}={value!r} became {got[name]!r}'
      # A float field may be given as an integer, and nothing else may change its type.
      is_widened = type(value) is int and type(got[name]) is float
      assert is_widened or type(value) is type(got[name]), name
  config = run.config
  check_values(config)
  assert 1 <= config.feedback.rounds <= 1000
  assert config.engine.slots == 'auto' or 1 <= config.engine.slots <= 100_000
  assert 0 <= config.seed < 2**63 and config.train.batch_size % config.train.accumulation == 0
  for stage in dataclasses.fields(config.sampling):
    sampling = getattr(config.sampling, stage.name)
    assert sampling.temperature >= 0 and 0 < sampling.top_p <= 1 and sampling.max_tokens >= 1
  assert not config.evaluation.swap or config.evaluation.multiple_choice
  needs = space.estimate_space(run, STAGES, None)
  assert all(need.bytes >= 0 for need in needs)


def check_values(settings: Any) -> None:
  """Check that no value of a dataclass is None, not finite, or a text that no file can store."""
  for field in dataclasses.fields(settings):
    value = getattr(settings, field.name)
    if dataclasses.is_dataclass(value):
      check_values(value)
    elif isinstance(value, tuple):
      assert all('\0' not in text for text in value if isinstance(text, str)), field.name
    elif field.metadata.get('word') is not None and value == field.metadata['word']:
      continue
    elif field.type in (int, float, bool, str):
      assert type(value) is field.type, f'{field.name}={value!r}'
      assert field.type is not int or field.name == 'seed' or abs(value) < 2**31, field.name
      assert field.type is not float or math.isfinite(value), field.name
      assert field.type is not str or ('\0' not in value and value.encode() is not None), field.name


def check_refusal(files: Files, message: str) -> None:
  """Check that a refusal names a field, a section or the config file."""
  sections = [*tiny.get_config(), 'config', 'stage', 'version', 'prompt', 'mesh', 'sampling']
  assert any(name in message for name in sections), message


CONFIG = Reader(
  inputs=[
    values(**json.loads(tiny.get_config().to_json_best_effort())),
    values(train={'patience': 1, 'eval_every': 1, 'eval_share': 0.5, 'lora_rank': 2, 'warmup': 0}),
    values(sampling={'initial': {'stop': ['a', 'b'], 'top_k': 0, 'temperature': 1}}, seed=0),
    values(feedback={'rounds': 1, 'demonstrations': True}, evaluation={'judge': 'tiny'}),
    values(sampling={'critique': {'stop': ['a', 'b']}}),
    values(train={'checkpoint_every': 0, 'log_every': 1, 'keep': 2, 'epochs': 1}),
    values(
      engine={'slots': 8, 'cache_gib': 'auto', 'spare_tokens': 0},
      prompts={'harmful': {'limit': 3}},
      mesh={},
    ),
    values(model={'base': 'tiny', 'critique': ''}, constitution={'path': 'tiny', 'ids': []}),
  ],
  read=read,
  check=check,
  check_refusal=check_refusal,
  names_file=False,
)


def test_config_values():
  check_reader(f'{__name__}:CONFIG')


VALUES, SCHEMA = 'cai_jax.runtime.values', 'cai_jax.pipeline.schema'
FAULTS = [
  Fault(f'{__name__}:CONFIG', module, old, new)
  for module, old, new in (
    (VALUES, 'int(_check_number(value, name, most or LARGEST[int]))', 'int(value)'),
    (VALUES, 'isinstance(value, numbers.Real) and not isinstance(value, bool)', 'True'),
    (VALUES, "valid = '\\0' not in value", 'valid = True'),
    (VALUES, '  if hint is str and isinstance(value, str):', '  if hint is str:'),
    (SCHEMA, '  if unknown:\n', '  if False:\n'),
    (SCHEMA, 'if not isinstance(value, Mapping | ConfigDict):', 'if False:'),
  )
]
