"""Plugins: a file of the user's registers implementations, which a config then names."""

import json

import pytest

from cai_jax import pipeline
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.plugins import load_plugins
from cai_jax.runtime.registry import Registry
from configs import tiny

PLUGIN = """
import dataclasses

from cai_jax.feedback.chain import register_variant, turns_per_round
from cai_jax.feedback.variants.direct import direct_revision
from cai_jax.scoring.scorer import SCORERS


@dataclasses.dataclass(frozen=True)
class Verdict:
  violations: frozenset[str]
  helpful: bool


@SCORERS.register('long-words')
def load_scorer(loader):
  def score(prompts, responses):
    return [Verdict(frozenset({'long'} if len(r) > 40 else ()), True) for r in responses]

  return score


@register_variant('twice', turns_per_round('revision'))
def revise(prompt, principles, stages, growing=False):
  return (yield from direct_revision(prompt, principles, stages, growing))
"""


def test_plugin_scorer_and_variant_run_from_start_to_end(tmp_path):
  path = tmp_path / 'my_plugin.py'
  path.write_text(PLUGIN)
  config = tiny.get_config()
  config.plugins = (str(path),)
  config.evaluation.scorer = 'long-words'
  config.feedback.variant = 'twice'
  config.feedback.rounds = 1
  config.train.epochs = 1
  for name, limit in (('harmful', 10), ('helpful', 6), ('eval_harmful', 4), ('eval_helpful', 2)):
    config.prompts[name].limit = limit
  for stage in config.sampling.values():
    stage.max_tokens = 24
  config.train.drop_truncated = False
  config.engine.slots = 8
  run = pipeline.build(config, tmp_path / 'run')
  pipeline.run_stages(run)
  summary = json.loads((tmp_path / 'run' / 'evaluation' / 'summary.json').read_text())
  assert summary['models']['base']['helpful_rate'] == 1.0
  stages = json.loads((tmp_path / 'run' / 'manifest.json').read_text())['stages']
  assert stages['generate']['turns'] == 10 * 2 + 6
  assert all(
    entry['settings']['plugins'] == list(run.plugins.values()) for entry in stages.values()
  )


def test_settings_without_plugins_do_not_mention_them(tmp_path):
  assert 'plugins' not in pipeline.build(tiny.get_config(), tmp_path).settings('generate')


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('absent.py', None, "absent.py' is not a Python file"),
    ('notes.txt', '', "notes.txt' is not a Python file"),
    ('broken.py', '\n1 / 0\n', r'failed with ZeroDivisionError: .*broken.py, line 2\)'),
  ],
)
def test_plugin_that_cannot_be_imported_is_refused(tmp_path, name, content, message):
  if content is not None:
    (tmp_path / name).write_text(content)
  with pytest.raises(UserError, match=message):
    load_plugins([str(tmp_path / name)])


def test_plugins_given_as_a_string_are_refused():
  with pytest.raises(UserError, match='Give a tuple of paths'):
    load_plugins('my_plugin.py')


def test_plugin_is_imported_once_per_content(tmp_path):
  path = tmp_path / 'counted.py'
  path.write_text(f'open({str(tmp_path / "count")!r}, "a").write("x")\n')
  assert load_plugins([str(path)]) == load_plugins([str(path)])
  assert (tmp_path / 'count').read_text() == 'x'


def test_registry_refuses_unknown_and_repeated_names():
  registry = Registry('fruit')
  registry.register('apple')(1)
  assert dict(registry) == {'apple': 1} and 'pear' not in registry
  with pytest.raises(
    UserError, match=r"no fruit named 'pear'. The registered names are apple.*config.plugins"
  ):
    registry['pear']
  with pytest.raises(UserError, match="fruit 'apple' is registered twice"):
    registry.register('apple')(2)
