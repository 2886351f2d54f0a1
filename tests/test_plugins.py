"""Plugins: a file of the user's registers implementations, which a config then names."""

import importlib.metadata
import json
import sys

import pytest

from cai_jax import pipeline
from cai_jax.data import d_cai
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.plugins import load_plugins
from cai_jax.runtime.registry import Registry, temporary_registrations
from configs import tiny
from tests.pipeline_setup import small

pytestmark = pytest.mark.usefixtures('single_device')

PLUGIN = """
import dataclasses

from cai_jax.data.row_form import RowForm
from cai_jax.data.sets import PromptSet, register_set
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


FORM = RowForm(fields=('ask',), plain=True, metadata={'category': ('room',)})
register_set('house', PromptSet('Questions about a house', 'benign', FORM, hub='lab/house'))
"""


def test_plugin_scorer_variant_and_prompt_set_run_from_start_to_end(
  random_model, tmp_path, restored_registries
):
  path = tmp_path / 'my_plugin.py'
  path.write_text(PLUGIN)
  config = small(random_model)
  config.plugins = (str(path),)
  rows = [{'ask': f'How do I clean lamp {i}?', 'room': 'hall'} for i in range(10)]
  (tmp_path / 'house.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  config.prompts.harmful.update(source='house', name='', path=str(tmp_path / 'house.jsonl'))
  config.evaluation.scorer = 'long-words'
  config.feedback.variant = 'twice'
  config.feedback.rounds = 1
  run = pipeline.build(config, tmp_path / 'run')
  pipeline.run_stages(run)
  summary = json.loads((tmp_path / 'run' / 'evaluation' / 'summary.json').read_text())
  assert summary['models']['base']['helpful_rate'] == 1.0
  stages = json.loads((tmp_path / 'run' / 'manifest.json').read_text())['stages']
  assert stages['generate']['turns'] == 10 * 2 + 6
  kinds = [row['metadata'] for row in d_cai.read_rows(tmp_path / 'run' / 'd_cai')]
  assert kinds.count(json.dumps({'category': 'hall', 'set': 'house'})) == 10
  assert all(
    entry['settings']['plugins'] == list(run.plugins.values()) for entry in stages.values()
  )


def test_plugin_may_be_edited_after_the_stages_that_are_done(random_model, tmp_path):
  path = tmp_path / 'my_plugin.py'
  path.write_text('# no scorer yet\n')
  config = small(random_model)
  config.plugins = (str(path),)
  first = pipeline.build(config, tmp_path / 'run')
  pipeline.run_stages(first, ['generate'])
  path.write_text('# edited\n')
  second, lines = pipeline.build(config, tmp_path / 'run'), []
  pipeline.run_stages(second, ['generate', 'train'], lines.append)
  assert 'generate: done before' in lines
  stages = json.loads((tmp_path / 'run' / 'manifest.json').read_text())['stages']
  recorded = [stages[name]['settings']['plugins'] for name in ('generate', 'train')]
  assert recorded == [list(run.plugins.values()) for run in (first, second)]


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


FRUIT = Registry('fruit')
REGISTER = f"""
import sys
sys.modules[{__name__!r}].FRUIT.register({{name!r}})({{value!r}})
"""


def write_plugin(path, **entries):
  path.write_text(
    ''.join(REGISTER.format(name=name, value=value) for name, value in entries.items())
  )
  return [str(path)]


def test_edited_plugin_replaces_its_own_entries(tmp_path, restored_registries):
  load_plugins(write_plugin(tmp_path / 'a.py', apple=1, pear=1))
  load_plugins(write_plugin(tmp_path / 'b.py', fig=1))
  load_plugins(write_plugin(tmp_path / 'a.py', apple=2))
  assert dict(FRUIT) == {'apple': 2, 'fig': 1}
  load_plugins(write_plugin(tmp_path / 'a.py', apple=1, pear=1))  # the first content again
  assert dict(FRUIT) == {'apple': 1, 'pear': 1, 'fig': 1}
  with pytest.raises(UserError, match=r"b\.py': The fruit 'pear' is registered twice"):
    load_plugins(write_plugin(tmp_path / 'b.py', pear=2))
  assert dict(FRUIT) == {'apple': 1, 'pear': 1, 'fig': 1}


def test_plugin_that_fails_leaves_the_registries_as_they_were(tmp_path, restored_registries):
  plugin = write_plugin(tmp_path / 'a.py', apple=1)
  load_plugins(plugin)
  good = (tmp_path / 'a.py').read_text()
  (tmp_path / 'a.py').write_text(good.replace('apple', 'pear') + '1 / 0')
  with pytest.raises(UserError, match='ZeroDivisionError'):
    load_plugins(plugin)
  assert dict(FRUIT) == {'apple': 1}
  (tmp_path / 'a.py').write_text(good.replace('apple', 'pear'))
  load_plugins(plugin)
  assert dict(FRUIT) == {'pear': 1}


def test_entries_of_a_module_that_a_failed_plugin_imported_are_kept(
  tmp_path, monkeypatch, restored_registries
):
  """The module stays imported, so a second import would not register its entries again."""
  monkeypatch.syspath_prepend(tmp_path)
  write_plugin(tmp_path / 'plugin_helper.py', fig=1)
  path = tmp_path / 'a.py'
  path.write_text('import plugin_helper\n1 / 0')
  with pytest.raises(UserError, match='ZeroDivisionError'):
    load_plugins([str(path)])
  path.write_text('import plugin_helper')
  load_plugins([str(path)])
  assert dict(FRUIT) == {'fig': 1}
  monkeypatch.delitem(sys.modules, 'plugin_helper')


def test_broken_entry_point_is_named(monkeypatch):
  class Broken:
    name, value, dist = 'extra', 'absent_package.plugin', None

    def load(self):
      importlib.import_module('absent_package_of_plugins')

  monkeypatch.setattr(importlib.metadata, 'entry_points', lambda group: [Broken()])
  with pytest.raises(UserError, match="entry point 'extra' of .*'absent_package.plugin'.*Module"):
    load_plugins([])


def test_temporary_registrations_end_with_the_block():
  registry = Registry('fruit')
  registry.register('apple')(1)
  with temporary_registrations():
    registry.unregister('apple')
    registry.register('pear')(2)
  assert dict(registry) == {'apple': 1}


def test_registry_get_returns_the_default_of_an_unknown_name():
  registry = Registry('fruit')
  registry.register('apple')(1)
  assert registry.get('apple') == 1
  assert registry.get('pear') is None and registry.get('pear', 3) == 3


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
