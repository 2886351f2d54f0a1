"""Baselines change the prompts of M_θ, or choose among its answers, and nothing else."""

import json
import shutil

import numpy as np
import pytest

from cai_jax import pipeline
from cai_jax.constitution import Constitution, Principle
from cai_jax.data import d_cai
from cai_jax.data.prompts import Prompt
from cai_jax.evaluation.baselines import BASELINES
from cai_jax.evaluation.config import EvaluationConfig
from cai_jax.pipeline.checks import check_run
from cai_jax.runtime.errors import UserError
from cai_jax.scoring.judge import Comparison
from cai_jax.tiny.files import model_path
from configs import tiny

pytestmark = pytest.mark.usefixtures('single_device')

CONSTITUTION = Constitution(
  (
    Principle('a', 'Critique it.', 'Remove insults.'),
    Principle('b', 'Criticise it.', 'Remove lies.'),
    Principle('c', 'Say what is rude.', 'Remove insults.'),
  )
)
USER = {'role': 'user', 'content': 'Hello'}


def test_the_constitution_stands_once_in_the_system_message():
  plain, instructed = BASELINES['constitution_prompt'](
    CONSTITUTION,
    [Prompt('1', (USER,)), Prompt('2', ({'role': 'system', 'content': 'Be brief.'}, USER))],
  )
  assert plain.id == '1' and plain.messages[1:] == (USER,) == instructed.messages[1:]
  system = plain.messages[0]
  assert system['role'] == 'system'
  assert system['content'].count('Remove insults.') == system['content'].count('Remove lies.') == 1
  assert instructed.messages[0]['content'] == 'Be brief.\n\n' + system['content']


@pytest.mark.parametrize('names', ['constitution_prompt', ('none',), ('constitution_prompt',) * 2])
def test_unknown_baselines_are_rejected(names):
  with pytest.raises(UserError, match='baselines=.*constitution_prompt'):
    EvaluationConfig(baselines=names)


def rows(*texts, kind='harmful'):
  prompt = [{'role': 'user', 'content': 'Hello'}]
  return [{'id': 'x', 'kind': kind, 'prompt': prompt, 'initial': {'text': t}} for t in texts]


def longer(matches):
  """A judge that prefers the longer response."""
  return [
    Comparison(m.prompt, m.players, (float(len(m.responses[0]) - len(m.responses[1])),) * 2)
    for m in matches
  ]


@pytest.mark.parametrize(
  'texts, best, asked',
  [
    (('a', 'bb', 'ccc', 'd', 'eeee'), 4, 4),
    (('aa', 'bb', 'cc'), 0, 2),  # ties keep the first
    (('a', 'a', 'a'), 0, 0),  # equal responses are not compared
    ((' ', 'a', ''), 1, 0),  # nor blank ones
    (('a',), 0, 0),
  ],
)
def test_best_of_n_chooses_by_the_judge_in_a_knock_out(texts, best, asked):
  principles = {'harmful': ('p',), 'helpful': ('q',)}
  seen = []
  judge = lambda matches: seen.extend(matches) or longer(matches)  # noqa: E731
  choose = BASELINES['best_of_n'].choose
  (first, second), comparisons = choose(
    judge, [rows(*texts), rows(*texts, kind='helpful')], principles, np.random.default_rng(0)
  )
  assert first == second == best
  assert len(seen) == len(comparisons) == 2 * asked <= 2 * (len(texts) - 1)
  assert {(m.principle, m.criterion) for m in seen} <= {('p', 'harmlessness'), ('q', 'helpfulness')}


def tiny_run(workdir, names):
  config = tiny.get_config()
  for name, limit in (('harmful', 8), ('helpful', 6), ('eval_harmful', 24), ('eval_helpful', 4)):
    config.prompts[name].limit = limit
  config.feedback.rounds = 1
  config.model.aligned = 'tiny'
  config.evaluation.baselines = names
  config.evaluation.judge = 'tiny-oracle'
  return config


def test_best_of_n_by_the_oracle_breaks_fewer_rules(tmp_path):
  config = tiny_run(tmp_path, ('best_of_n',))
  pipeline.run_stages(pipeline.build(config, tmp_path), ['evaluate', 'report'])
  summary = json.loads((tmp_path / 'evaluation' / 'summary.json').read_text())
  rates = {name: row['violation_rate'] for name, row in summary['models'].items()}
  assert rates['best_of_n'] < rates['base']
  assert set(summary['benign']) == {'base', 'aligned', 'best_of_n'}
  result = json.loads((tmp_path / 'evaluation' / 'models.json').read_text())['best_of_n']
  assert result['answers'] == 3 and set(result['chosen'].values()) == {1, 2, 3}
  candidates = {r['id']: r for r in d_cai.read_rows(tmp_path / 'evaluation/candidates/best_of_n')}
  chosen = {r['id']: r for r in d_cai.read_rows(tmp_path / 'evaluation' / 'best_of_n')}
  base = {r['id']: r for r in d_cai.read_rows(tmp_path / 'evaluation' / 'base')}
  assert len(candidates) == 3 * 28 and set(chosen) == set(base)
  for name, number in result['chosen'].items():
    source = candidates[name if number == 1 else f'{name}/{number}']
    assert chosen[name]['initial'] == source['initial']
    assert candidates[name]['initial'] == base[name]['initial']  # a draw that the run has anyway
    assert candidates[name]['initial'] != candidates[f'{name}/2']['initial']
  assert 'this judge is unvalidated' in (tmp_path / 'report.html').read_text()


@pytest.mark.parametrize(
  'fields, message',
  [
    ({'evaluation.best_of_n': 1}, 'best_of_n=1 must be 0 or at least 2'),
    ({'sampling.initial.temperature': 0.0}, 'best_of_n.*all the same'),
    ({'evaluation.baselines': ()}, 'best_of_n=4 has no effect'),
  ],
)
def test_settings_with_which_nothing_can_be_chosen_are_refused(fields, message, tmp_path):
  config = tiny_run(tmp_path, ('best_of_n',))
  if fields == {'evaluation.baselines': ()}:
    config.evaluation.best_of_n = 4
  config.update_from_flattened_dict(fields)
  with pytest.raises(UserError, match=message):
    check_run(pipeline.build(config, tmp_path), ['evaluate'])


def test_a_template_without_system_messages_is_refused_before_the_run(tmp_path):
  folder = tmp_path / 'model'
  shutil.copytree(model_path('tiny'), folder)
  template = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
  )
  for path in folder.glob('*.jinja'):
    path.unlink()
  path = folder / 'tokenizer_config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | {'chat_template': template}))
  config = tiny_run(tmp_path, ('constitution_prompt',))
  config.model.base = str(folder)
  with pytest.raises(UserError, match="baselines: 'constitution_prompt'.*system"):
    check_run(pipeline.build(config, tmp_path / 'run'), ['evaluate'])


def test_a_constitution_that_does_not_fit_is_refused_before_the_run(tmp_path):
  config = tiny_run(tmp_path, ('constitution_prompt',))
  long = {'id': 'long', 'critique_request': 'Critique.', 'revision_request': 'please ' * 2000}
  (tmp_path / 'long.json').write_text(json.dumps({'principles': [long]}))
  config.constitution.path = str(tmp_path / 'long.json')
  config.feedback.demonstrations = False
  with pytest.raises(UserError, match="baselines: 'constitution_prompt'.*context"):
    check_run(pipeline.build(config, tmp_path / 'run'), ['evaluate'])
