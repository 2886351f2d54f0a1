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
from ml_collections import ConfigDict
def get_config():
  text = pathlib.Path(__file__).with_name('config.json').read_text()
  return ConfigDict(json.loads(text))
"""
STAGES = ('generate', 'train', 'evaluate', 'report')


def values(**fields: Any) -> Files:
  """Return the files of a small config with some fields set, such as train__epochs=2."""
  config = tiny.get_config()
  for prompts in config.prompts.values():
    prompts.limit = 5
  config.update_from_flattened_dict({k.replace('__', '.'): v for k, v in fields.items()})
  return {'config.json': config.to_json_best_effort().encode()}


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
      # A float field may be given as an integer, but neither is True or False.
      assert got[name] == value, f'{name}={value!r} became {got[name]!r}'
      assert isinstance(value, bool) == isinstance(got[name], bool), name
  config = run.config
  check_values(config)
  assert 1 <= config.feedback.rounds <= 1000 and 1 <= config.engine.slots <= 100_000
  assert 0 <= config.seed < 2**63 and config.train.batch_size % config.train.accumulation == 0
  for sampling in dataclasses.astuple(config.sampling):
    assert sampling[0] >= 0 and 0 < sampling[2] <= 1 and sampling[3] >= 1
  assert not config.evaluation.swap or config.evaluation.multiple_choice
  needs = space.estimate_space(run, STAGES, None)
  assert all(need.bytes >= 0 for need in needs)


def check_values(settings: Any) -> None:
  """Check that no value of a dataclass is None, not finite, or a text that no file can store."""
  for field in dataclasses.fields(settings):
    value = getattr(settings, field.name)
    if dataclasses.is_dataclass(value):
      check_values(value)
    elif field.type in (int, float, bool, str):
      assert type(value) is field.type, f'{field.name}={value!r}'
      assert field.type is not float or math.isfinite(value), field.name
      assert field.type is not str or ('\0' not in value and value.encode() is not None), field.name


def check_refusal(files: Files, message: str) -> None:
  """Check that a refusal names a field, a section or the config file."""
  sections = [*tiny.get_config(), 'config', 'stage', 'version', 'prompt', 'mesh', 'sampling']
  assert any(name in message for name in sections), message


CONFIG = Reader(
  inputs=[
    values(),
    values(train__patience=1, train__eval_every=1, train__eval_share=0.5, train__lora_rank=2),
    values(sampling__initial__stop=('a', 'b'), feedback__rounds=1, evaluation__judge='tiny'),
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
    (VALUES, ' and isinstance(value, numbers.Integral):\n    return int', ':\n    return int'),
    (VALUES, 'isinstance(value, numbers.Real) and not isinstance(value, bool)', 'True'),
    (VALUES, "valid = '\\0' not in value", 'valid = True'),
    (VALUES, '  if hint is str and isinstance(value, str):', '  if hint is str:'),
    (SCHEMA, '  if unknown:\n', '  if False:\n'),
    (SCHEMA, 'if not isinstance(value, Mapping | ConfigDict):', 'if False:'),
  )
]
