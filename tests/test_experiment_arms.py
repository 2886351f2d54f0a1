"""Arms that depend on the config, on a principle, on another response, or on another arm."""

import argparse
import collections
import dataclasses
import json
import pathlib
import types

import numpy as np
import pytest

from cai_jax import pipeline
from cai_jax.constitution import draw_principles
from cai_jax.data import d_cai
from cai_jax.evaluation import diversity
from cai_jax.evaluation.baselines import BASELINES
from cai_jax.experiment import Arm, Experiment, collect, define, plan, responses
from cai_jax.experiment import run as runner
from cai_jax.experiment.responses import read_responses
from cai_jax.report import experiment_table
from cai_jax.report.experiment_figures import draw_figures
from cai_jax.runtime.errors import UserError
from cai_jax.tiny import oracle

pytestmark = pytest.mark.usefixtures('single_device')

DESIGNS = (
  'leave_one_out',
  'principle_drawn',
  'principle_alone',
  'swap_models',
  'equal_tokens',
  'self_training',
)
SMALL = """
from configs import tiny

def get_config():
  config = tiny.get_config()
  for name, limit in (('harmful', 24), ('helpful', 12), ('eval_harmful', 8), ('eval_helpful', 4)):
    config.prompts[name].limit = limit
  config.constitution.ids = ('people', 'things', 'law')
  config.feedback.rounds = 2
  config.train.epochs = 1
  config.engine.slots = 8
  return config
"""
LAB = '''"""Which principle changes what?"""
from cai_jax.experiment import Arm, Design, Experiment, load_principles, rate_differences


def define(config):
  ids = [principle.id for principle in load_principles(config)]
  arms = {'all': Arm({}, 'revision_2', against='revision_1')}
  arms |= {
    name: Arm({}, 'revision_2', against='revision_1', principle=name) for name in ids
  }
  arms['without law'] = Arm({'constitution.leave_out': ('law',)}, 'revision_2')
  return Experiment(
    arms, 'all', (rate_differences('By principle', ['all', *ids]),), seeds=(0,), spent=True,
    diversity=('distinct_2', 'self_bleu'), overrides={'prompts.helpful.limit': 1},
  )


def get_experiment():
  return Design(define, 'nowhere.py')
'''


def options(**changes):
  names = dict.fromkeys(('arms', 'seeds', 'config', 'shared_model', 'dry_run'))
  return argparse.Namespace(**names | changes)


@pytest.fixture(scope='module')
def small(tmp_path_factory):
  """The path of a small config of the embedded world."""
  path = tmp_path_factory.mktemp('config') / 'small.py'
  path.write_text(SMALL)
  return str(path)


@pytest.fixture(scope='module')
def lab(tmp_path_factory, small):
  """Run an experiment with arms by principle; return its results and its workdir."""
  folder = tmp_path_factory.mktemp('lab')
  (folder / 'lab.py').write_text(LAB)
  runner.run_experiment(str(folder / 'lab.py'), folder / 'work', options(config=small))
  return json.loads((folder / 'work' / 'lab' / 'results.json').read_text()), folder / 'work'


@pytest.mark.parametrize('name', DESIGNS)
def test_every_design_documents_itself_and_plans_runs_of_any_config(name, tmp_path, small):
  file = define.ROOT / 'experiments' / f'{name}.py'
  stem, docstring, experiment = define.load_experiment(file, small)
  assert stem == name and docstring.splitlines()[0].endswith(('.', '?'))
  for heading in ('Paper:', 'Command:', 'Hardware:', 'Arms:', 'Expected:'):
    assert heading in docstring
  assert f'--experiment=experiments/{name}.py' in docstring
  assert experiment.figures and experiment.base == small
  few = dataclasses.replace(experiment.select(list(experiment.arms)[:4]), seeds=(0,))
  runs = runner.plan_runs(few, define.load_config(small), tmp_path)
  assert 1 <= len(runs) <= 5
  assert all(stages for _, stages in runs.values())


def rows_of(workdir, leaves_out):
  """Return the rows of the run with or without the left-out principle."""
  for folder in (workdir / 'runs').iterdir():
    values = json.loads((folder / 'config.json').read_text())
    if bool(values['constitution']['leave_out']) == leaves_out:
      return [dict(row) for row in d_cai.read_rows(folder / 'd_cai') if row['rounds']]
  raise AssertionError('no such run')


def test_arms_of_a_principle_are_the_revisions_that_drew_it(lab):
  results, workdir = lab
  rows = rows_of(workdir, leaves_out=False)
  for name in ('people', 'things', 'law'):
    own = [row for row in rows if row['rounds'][1]['principle'] == name]
    before, after = (
      [
        bool(oracle.judge(row['prompt'], row['rounds'][n]['revision']['text']).violations)
        for row in own
      ]
      for n in (0, 1)
    )
    group = results['arms'][name]['groups']['harmful']
    assert group['count'] == len(own)
    assert group['metrics']['violation_rate']['value'] == pytest.approx(np.mean(after))
    change = np.mean(np.subtract(after, before, dtype=float))
    assert group['differences']['violation_rate']['value'] == pytest.approx(change)
    texts = [[row['rounds'][n]['revision']['text'] for row in own] for n in (1, 0)]
    rewritten = np.mean(diversity.text_changes(*texts))
    assert group['metrics']['rewritten']['value'] == pytest.approx(rewritten)
    assert results['arms'][name]['facts'] == {'compared with': 'revision 1'}
  counts = collections.Counter(row['rounds'][1]['principle'] for row in rows)
  assert sum(counts.values()) == results['arms']['all']['groups']['harmful']['count'] == 24


def test_p_values_are_adjusted_over_all_arms_that_are_compared(lab):
  results, _ = lab
  entries = [
    arm['groups']['harmful']['differences']['violation_rate'] for arm in results['arms'].values()
  ]
  assert len(entries) == 5  # the reference too, which has something that it is compared with
  smallest = min(entries, key=lambda entry: entry['p_value'])
  assert smallest['adjusted_p_value'] == pytest.approx(min(1, 5 * smallest['p_value']))


def test_a_left_out_principle_changes_only_the_chains_that_drew_it(lab):
  results, workdir = lab
  before, after = (rows_of(workdir, leaves_out) for leaves_out in (False, True))
  changed = 0
  for old, new in zip(before, after, strict=True):
    drew = 'law' in [done['principle'] for done in old['rounds']]
    assert 'law' not in [done['principle'] for done in new['rounds']]
    if not drew:
      assert {**old, 'constitution': ''} == {**new, 'constitution': ''}
    changed += drew
  assert 0 < changed < 24
  (cost,) = [row for row in results['costs'] if row['reused_turns']]
  assert cost['turns'] <= 4 * changed  # two critiques and two revisions


def test_the_tokens_of_a_response_are_those_of_its_chain(lab):
  results, workdir = lab
  turns = [
    turn['num_tokens']
    for row in rows_of(workdir, leaves_out=False)
    for turn in (
      row['initial'],
      *(done[name] for done in row['rounds'] for name in ('critique', 'revision')),
    )
  ]
  metrics = results['arms']['all']['groups']['harmful']['metrics']
  assert metrics['tokens_spent']['value'] == pytest.approx(sum(turns) / 24)


def test_diversity_is_measured_over_all_texts_of_an_arm(lab):
  results, workdir = lab
  texts = [row['rounds'][1]['revision']['text'] for row in rows_of(workdir, leaves_out=False)]
  metrics = results['arms']['all']['groups']['harmful']['metrics']
  pairs = [pair for text in texts for pair in zip(text.split(), text.split()[1:], strict=False)]
  assert metrics['distinct_2']['value'] == pytest.approx(len(set(pairs)) / len(pairs))
  assert metrics['self_bleu']['value'] == pytest.approx(np.mean(diversity.self_bleu(texts)))


def test_the_table_and_the_figure_say_what_is_compared(lab):
  results, _ = lab
  assert 'to what the column "compared with" names' in experiment_table(results)
  (drawing,) = draw_figures(results)
  assert drawing.description == 'By principle'


def test_an_arm_of_the_grammar_has_the_truth_of_its_principle_in_the_first_round_only(lab):
  results, _ = lab
  columns = {name: arm['groups']['harmful']['metrics'] for name, arm in results['arms'].items()}
  assert 'grammar_violation_rate' in columns['all']
  assert 'grammar_violation_rate' not in columns['people']  # round 2 depends on round 1


def test_too_few_prompts_of_a_principle_are_refused_before_any_work(tmp_path, small):
  config = define.load_config(small)
  arms = {'a': Arm({'prompts.harmful.limit': 2}, 'revision_1', principle='law')}
  with pytest.raises(UserError, match="arm 'a': . of 2 prompts draw the principle in round 1"):
    runner.plan_runs(Experiment(arms, 'a', seeds=(0,)), config, tmp_path)
  arms = {'a': Arm({}, 'last', principle='harm')}
  with pytest.raises(UserError, match="arm 'a': the constitution has no principle 'harm'"):
    runner.plan_runs(Experiment(arms, 'a', seeds=(0,)), config, tmp_path)


DOCUMENT = '# Ours\n\n## Honesty\n\nTell the truth.\n\n## Care\n\nBe kind.\n'


@pytest.mark.parametrize('variant', ['all_principles', 'chosen_principle', 'prose'])
def test_variants_that_ignore_draws_have_no_arms_by_principle(variant, tmp_path, small):
  (tmp_path / 'ours.md').write_text(DOCUMENT)
  overrides = {'feedback.variant': variant, 'constitution.ids': ()}
  overrides['constitution.path'] = str(tmp_path / 'ours.md')
  config = define.override_config(define.load_config(small), overrides)
  name = define.load_principles(config)[0].id
  arms = {'all': Arm({}, 'last'), 'one': Arm({}, 'last', principle=name)}
  message = f"arm 'one': it counts .* feedback.variant='{variant}' does not apply the principles"
  with pytest.raises(UserError, match=message):
    runner.plan_runs(Experiment(arms, 'all', seeds=(0,)), config, tmp_path)
  runner.plan_runs(Experiment({'all': arms['all']}, 'all', seeds=(0,)), config, tmp_path)


def test_prompts_whose_response_was_kept_count_for_the_principle_that_they_drew(monkeypatch):
  def row(name, principle, before, after):
    finished = {'principle': principle, 'revised': before != after, 'sampled_tokens': 3}
    finished |= {'critique': turn(1), 'revision': turn(2) | {'text': after}}
    initial = turn(2) | {'text': before}
    return {'id': name, 'kind': 'harmful', 'prompt': [], 'initial': initial, 'rounds': [finished]}

  rows = [
    row('changed', 'law', 'I will help', 'it breaks laws'),
    row('kept', 'law', 'I will not', 'I will not'),
    row('other', 'people', 'I will help', 'it hurts people'),
  ]
  monkeypatch.setattr(responses, '_read_rows', lambda folder: rows)
  arm = Arm({}, 'revision_1', against='initial', principle='law')
  found = read_responses(arm, {0: pathlib.Path('run')}, 'harmful')
  assert found.measure([])['rewritten'] == {0: {'changed': 1.0, 'kept': 0.0}}


def test_the_round_of_a_principle_is_that_of_the_response(tmp_path, small):
  config = define.load_config(small)
  arms = {'a': Arm({}, 'revision_2', principle='law')}
  ((run, _),) = runner.plan_runs(Experiment(arms, 'a', seeds=(0,)), config, tmp_path).values()
  draws: dict = {}
  plan._check_principle(arms['a'], run, draws)
  (counts,) = draws.values()
  second = [draw_principles(run.constitution, 0, p.id, 2)[1].id for p in run.prompts['harmful']]
  assert counts == collections.Counter(second)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'against': 'draft'}, "against='draft' is not a response"),
    ({'response': 'last', 'against': 'base'}, 'answer different prompts'),
    ({'response': 'aligned', 'principle': 'law'}, 'needs a response that a principle revised'),
  ],
)
def test_arms_that_contradict_themselves_are_refused(fields, message):
  with pytest.raises(UserError, match=message):
    Arm(**fields)


def test_arms_start_from_earlier_arms_that_train():
  one, two = Arm({}, 'aligned'), Arm({}, 'aligned', start='one')
  with pytest.raises(UserError, match="'two' starts from 'one', which is not an arm before it"):
    Experiment({'two': two, 'one': one}, 'one')
  with pytest.raises(UserError, match="whose response 'last' needs no training"):
    Experiment({'one': Arm({}, 'last'), 'two': two}, 'one')
  with pytest.raises(UserError, match=r"diversity=\('x',\) must be a tuple of names"):
    Experiment({'one': one}, 'one', diversity=('x',))
  three = Experiment({'zero': one, 'one': one, 'two': two}, 'zero').select(['two'])
  assert list(three.arms) == ['zero', 'one', 'two']


def chain(config=types.MappingProxyType({})):
  arms = {'one': Arm(config, 'aligned'), 'two': Arm({}, 'aligned', start='one')}
  return Experiment(arms, 'one', seeds=(1,))


def test_a_run_is_planned_before_the_model_that_it_starts_from_exists(tmp_path, small):
  config = define.load_config(small)
  runs = runner.plan_runs(chain(), config, tmp_path)
  (first, (one, _)), (second, (two, _)) = runs.items()
  assert two.values['model']['base'] == str(first / 'model')  # what its turns are known by
  assert two.config.model.base == one.config.model.base == 'tiny-1'  # what it is checked with
  for run, stages in runs.values():
    pipeline.check_run(run, stages)
  folders = collect.run_folders(chain(), tmp_path / 'other' / 'runs', config)
  assert folders['two'][1].name == second.name  # wherever the workdir is
  assert collect.start_models(chain(), collect.run_folders(chain(), tmp_path / 'runs', config)) == {
    second: first / 'model'
  }


def test_a_run_cannot_start_from_a_model_that_the_config_replaces(tmp_path, small):
  experiment = chain({'model.aligned': 'tiny-small'})
  with pytest.raises(UserError, match="'two' starts from the M_aligned of 'one', but"):
    runner.plan_runs(experiment, define.load_config(small), tmp_path)


def test_a_model_that_cannot_embed_is_refused_before_any_work(tmp_path, small):
  config = define.override_config(define.load_config(small), {'model.base': str(tmp_path)})
  arms = {'a': Arm({}, 'initial')}
  experiment = Experiment(arms, 'a', seeds=(0,), diversity=('self_bleu', 'embedding_spread'))
  (run, _) = next(iter(runner.plan_runs(experiment, config, tmp_path).values()))
  with pytest.raises(UserError, match="diversity, 'embedding_spread'"):
    runner._check_diversity(experiment, run)
  runner._check_diversity(dataclasses.replace(experiment, diversity=('self_bleu',)), run)


def test_an_arm_of_a_baseline_needs_it_in_the_config(tmp_path, small):
  arms = {'a': Arm({}, 'best_of_tokens')}
  with pytest.raises(UserError, match=r"arm 'a': it scores the baseline 'best_of_tokens', but"):
    runner.plan_runs(Experiment(arms, 'a'), define.load_config(small), tmp_path)


def turn(tokens):
  return {'num_tokens': tokens}


@pytest.mark.parametrize(
  ('rounds', 'candidates', 'expected'),
  [
    ([(5, 10), (5, 10)], [10, 10, 10, 10, 10], 4),  # 40 tokens
    ([(5, 10), (5, 9)], [10, 10, 10, 10, 10], 3),  # 39
    ([(5, 10)], [10, 5], 2),
    ([], [10, 10], 1),
    ([(1, 1)], [20, 1], 1),  # the first is the initial response, whatever it takes
  ],
)
def test_best_of_tokens_takes_as_many_answers_as_the_chain_can_pay(rounds, candidates, expected):
  row = {
    'initial': turn(10),
    'rounds': [{'critique': turn(c), 'revision': turn(r)} for c, r in rounds],
  }
  answers = [{'initial': turn(count)} for count in candidates]
  assert BASELINES['best_of_tokens'].count(row, answers) == expected
  assert BASELINES['best_of_n'].count(row, answers) == len(answers)


def test_errors_in_a_design_name_its_file_and_line(tmp_path, small):
  file = tmp_path / 'mine.py'
  file.write_text(
    'from cai_jax.experiment import Design\n'
    'def define(config):\n  return config.nothing\n'
    'def get_experiment():\n  return Design(define)\n'
  )
  with pytest.raises(UserError, match=r'mine\.py, line 3: AttributeError'):
    define.load_experiment(str(file), small)
  file.write_text(file.read_text().replace('config.nothing', '3'))
  with pytest.raises(UserError, match='returns int. It must return an Experiment or a Design'):
    define.load_experiment(str(file), small)
  one = 'experiments/leave_one_out.py'
  alone = tmp_path / 'alone.py'
  alone.write_text(SMALL.replace("('people', 'things', 'law')", "('law',)"))
  with pytest.raises(UserError, match='To leave one out, it needs at least two'):
    define.load_experiment(str(define.ROOT / one), str(alone))


@pytest.mark.parametrize(
  ('spec', 'message'),
  [
    ('self_training.py:0', 'must be a number of generations'),
    ('principle_drawn.py:last', 'must be a round'),
    ('swap_models.py:tiny', 'at least two different ones'),
    ('swap_models.py:tiny,tiny', 'at least two different ones'),
  ],
)
def test_texts_after_the_colon_are_checked(spec, message, small):
  with pytest.raises(UserError, match=message):
    define.load_experiment(str(define.ROOT / 'experiments' / spec), small)


def test_models_of_equal_names_in_different_folders_keep_their_paths():
  path = define.ROOT / 'experiments' / 'swap_models.py'
  _, _, experiment = define.load_experiment(f'{path}:a/model,b/model')
  assert 'a/model / b/model / a/model' in experiment.arms
  arm = experiment.arms['a/model / b/model / a/model']
  assert dict(arm.overrides) == {
    'model.base': 'a/model', 'model.critique': 'b/model', 'model.revision': '',
  }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
  'spec', ['leave_one_out', 'principle_drawn', 'principle_alone', 'swap_models']
)
def test_designs_without_training_run(spec, tmp_path, small):
  file = str(define.ROOT / 'experiments' / f'{spec}.py')
  runner.run_experiment(file, tmp_path, options(config=small, seeds=[0, 1]))
  results = json.loads((tmp_path / spec / 'results.json').read_text())
  assert len(list((tmp_path / spec).glob('*.svg'))) == len(results['figures']) > 0
  for arm, values in results['arms'].items():
    group = values['groups']['harmful']
    assert group['count'] and ('differences' in group or arm == results['reference'])


@pytest.mark.slow
def test_best_answers_take_no_more_tokens_than_revisions(tmp_path, small):
  file = str(define.ROOT / 'experiments' / 'equal_tokens.py')
  runner.run_experiment(f'{file}:tiny-oracle', tmp_path, options(config=small, seeds=[1]))
  arms = json.loads((tmp_path / 'equal_tokens' / 'results.json').read_text())['arms']
  for n in range(1, 5):
    best, revised = (arms[f'{name} {n}']['groups'] for name in ('best answer for', 'revision'))
    spent = [groups['harmful']['metrics']['tokens_spent']['value'] for groups in (best, revised)]
    assert spent[0] <= spent[1]
    assert best['harmful']['differences']['tokens_spent']['value'] <= 0


@pytest.mark.slow
def test_generations_start_from_each_other_and_continue(tmp_path, small, capsys):
  file = str(define.ROOT / 'experiments' / 'self_training.py:2')
  runner.run_experiment(file, tmp_path, options(config=small, seeds=[0]))
  results = json.loads((tmp_path / 'self_training' / 'results.json').read_text())
  bases = results['config_differences']['model.base']
  assert bases['generation 2'] == 'M_aligned of generation 1'
  texts = []
  _, _, experiment = define.load_experiment(file, small)
  experiment = dataclasses.replace(experiment, seeds=(0,))
  folders = collect.run_folders(experiment, tmp_path / 'runs', define.load_config(small))
  for name in ('M_θ', 'generation 1', 'generation 2', 'control 2'):
    responses = read_responses(experiment.arms[name], folders[name], 'harmful')
    texts.append([turn['text'] for turn in responses.turns[0].values()])
  assert len({tuple(text) for text in texts}) == 4
  first = json.loads((folders['generation 2'][0] / 'config.json').read_text())
  assert first['model']['base'] == str(folders['generation 1'][0] / 'model')
  capsys.readouterr()
  runner.run_experiment(file, tmp_path, options(config=small, seeds=[0]))
  assert '0 of 4 runs had work left: 0 turns sampled' in capsys.readouterr().out
