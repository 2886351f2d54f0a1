"""Test experiments: their files, the runs they plan, the turns they share, and one end to end."""

import argparse
import dataclasses
import functools
import json
import pathlib
import re

import pytest

from cai_jax import pipeline
from cai_jax.experiment import collect, define, estimate, figures, responses
from cai_jax.experiment import run as runner
from cai_jax.experiment.define import Arm, Experiment
from cai_jax.pipeline import prompt_sets
from cai_jax.report import experiment_table
from cai_jax.runtime import lock
from cai_jax.runtime.errors import UserError

pytestmark = pytest.mark.usefixtures('single_device')

FILES = (
  'revisions',
  'principles',
  'critique_vs_direct',
  'sl_cai_n',
  'helpfulness_mix',
  'control_initial',
  'model_size',
  'temperature',
  'variants',
)
SMALL = """
from cai_jax.experiment import Arm, Experiment


def get_experiment():
  return Experiment(
    arms={
      'initial': Arm(response='initial'),
      'revised': Arm(response='last'),
      'direct': Arm({'feedback.variant': 'direct'}, 'last'),
    },
    reference='initial',
    overrides={'prompts.harmful.limit': 6, 'prompts.helpful.limit': 2, 'feedback.rounds': 1},
    seeds=(0,),
    figures=(
      {'kind': 'arms', 'caption': 'Rates', 'group': 'harmful', 'metrics': ['violation_rate'],
       'arms': ['initial', 'revised', 'direct']},
    ),
  )
"""


def options(**changes):
  return argparse.Namespace(
    **{'arms': None, 'seeds': None, 'config': None, 'shared_model': False, 'dry_run': False}
    | changes
  )


@pytest.fixture(scope='module')
def prompts_once():
  """Lets runs share the prompts of equal sources, instead of drawing them again."""
  load = functools.cache(prompt_sets.load_prompts)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(prompt_sets, 'load_prompts', lambda *args: list(load(*args)))
    yield


@pytest.mark.usefixtures('prompts_once')
@pytest.mark.parametrize('name', FILES)
def test_every_shipped_experiment_builds_its_runs_and_documents_itself(name, tmp_path):
  stem, docstring, experiment = define.load_experiment(define.ROOT / 'experiments' / f'{name}.py')
  assert stem == name and docstring.splitlines()[0].endswith(('.', '?'))
  for heading in ('Paper:', 'Command:', 'Hardware:', 'Arms:', 'Expected:'):
    assert heading in docstring
  assert f'--experiment=experiments/{name}.py' in docstring
  assert experiment.figures
  config = define.load_config(experiment.base)
  runs = runner.plan_runs(experiment, config, tmp_path)
  assert len(experiment.seeds) <= len(runs) <= len(experiment.seeds) * len(experiment.arms)
  for run, _ in runs.values():
    assert run.journal == tmp_path / 'journal'


def test_arms_with_equal_settings_share_a_run(tmp_path):
  _, _, experiment = define.load_experiment(define.ROOT / 'experiments' / 'revisions.py')
  runs = runner.plan_runs(experiment, define.load_config(experiment.base), tmp_path)
  assert len(runs) == len(experiment.seeds)
  assert all(stages == ('generate',) for _, stages in runs.values())


def test_shared_turns_have_equal_digests(tmp_path):
  experiment = Experiment(
    arms={
      'two': Arm({'feedback.rounds': 2}, 'last'),
      'four': Arm({'feedback.rounds': 4}, 'last'),
      'direct': Arm({'feedback.rounds': 2, 'feedback.variant': 'direct'}, 'last'),
      'hot': Arm({'feedback.rounds': 2, 'sampling.critique.temperature': 2.0}, 'last'),
    },
    reference='two',
    seeds=(0,),
  )
  runs = runner.plan_runs(experiment, define.load_config(experiment.base), tmp_path)
  two, four, direct, hot = (estimate.count_turns(run, stages) for run, stages in runs.values())
  assert set(two) < set(four)
  assert sum(t.count for t in four.values()) == 700 * 9 + 400
  for other in (direct, hot):  # only the answers to both kinds of prompts
    assert sum(four[name].count for name in set(four) & set(other)) == 700 + 400


def test_invalid_experiments_are_rejected(tmp_path):
  with pytest.raises(UserError, match='not a response that an arm can score'):
    Arm(response='reviewed')
  with pytest.raises(UserError, match="reference='b' is not an arm"):
    Experiment(arms={'a': Arm()}, reference='b')
  figure = {'kind': 'arms', 'caption': '', 'group': 'harmful', 'metrics': ['mean_tokens']}
  figure['arms'] = ['a', 'b']
  with pytest.raises(UserError, match=r"shows \['b'\], which are not arms"):
    Experiment({'a': Arm()}, 'a', (figure,))
  with pytest.raises(UserError, match='contains a comma'):
    Experiment({'a, b': Arm()}, 'a, b')
  with pytest.raises(UserError, match=r'There is no file .*, such as .*revisions\.py'):
    define.load_experiment('experiments/nothing.py')
  (tmp_path / 'x.py').write_text('a = 1')
  with pytest.raises(UserError, match=r'does not define get_experiment\(\)'):
    define.load_experiment(tmp_path / 'x.py')
  with pytest.raises(UserError, match='takes no text'):
    define.load_experiment(f'{define.ROOT}/experiments/revisions.py:a')
  experiment = Experiment({'a': Arm({'feedback.round': 2})}, 'a')
  with pytest.raises(UserError, match=r"no field 'feedback.round'"):
    runner.plan_runs(experiment, define.load_config('configs/tiny.py'), tmp_path)
  experiment = Experiment({'a': Arm({'feedback.rounds': 0})}, 'a')
  with pytest.raises(UserError, match=r"arm 'a': feedback: rounds=0"):
    runner.plan_runs(experiment, define.load_config('configs/tiny.py'), tmp_path)
  with pytest.raises(UserError, match='There is no arm c. The arms are a'):
    Experiment({'a': Arm()}, 'a').select(['c'])


def test_text_after_a_colon_is_passed_to_the_experiment():
  path = define.ROOT / 'experiments' / 'model_size.py'
  _, _, experiment = define.load_experiment(f'{path}:one,two,three')
  models = [arm.overrides['model.base'] for arm in experiment.arms.values()]
  assert list(dict.fromkeys(models)) == ['one', 'two', 'three']


def test_arms_whose_config_replaces_stages_plan_only_the_others(tmp_path):
  arms = {
    'trained': Arm(),
    'other data': Arm({'data.d_cai': str(tmp_path)}),
    'checkpoint': Arm({'model.aligned': 'tiny-small'}),
  }
  config = define.load_config('configs/tiny.py')
  runs = list(runner.plan_runs(Experiment(arms, 'trained', seeds=(0,)), config, tmp_path).values())
  stages = [stages for _, stages in runs]
  assert stages == [
    ('generate', 'train', 'evaluate', 'report'),
    ('train', 'evaluate', 'report'),
    ('evaluate', 'report'),
  ]
  whole, *others = (estimate.count_turns(*run) for run in runs)
  for turns in others:  # only the answers of M_aligned are not those of the first arm
    assert len(set(turns) - set(whole)) == 2
  arm = Arm({'data.d_cai': str(tmp_path)}, 'last')
  with pytest.raises(UserError, match="arm 'a': it scores the response 'last' of D_CAI"):
    runner.plan_runs(Experiment({'a': arm}, 'a'), config, tmp_path)


def test_estimate_of_a_default_loss_has_the_digest_of_version_1(tmp_path):
  run = pipeline.build(define.load_config('configs/tiny.py'), tmp_path)
  settings = run.settings('train')
  del settings['train']['loss']
  assert estimate._aligned_model(run) == estimate._digest(settings)


@pytest.mark.parametrize('content', ['[', '{}', '1' * 5000])
def test_damaged_list_of_sampled_turns_is_refused(tmp_path, content):
  (tmp_path / 'journal').mkdir()
  (tmp_path / 'journal' / 'known.json').write_text(content)
  with pytest.raises(UserError, match='known.json'):
    estimate.SampledTurns(tmp_path)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """Run a small experiment; return its file and its workdir."""
  folder = tmp_path_factory.mktemp('lab')
  file = folder / 'small.py'
  file.write_text(f'"""Does it run?\n\nPaper: none\n"""\n{SMALL}')
  runner.run_experiment(str(file), folder / 'work', options())
  return file, folder / 'work'


def test_an_experiment_writes_results_figures_and_report(finished):
  _, workdir = finished
  results = json.loads((workdir / 'small' / 'results.json').read_text())
  assert list(results['arms']) == ['initial', 'revised', 'direct']
  assert results['arms']['revised']['groups']['harmful']['count'] == 6
  assert 'differences' not in results['arms']['initial']['groups']['harmful']
  difference = results['arms']['revised']['groups']['harmful']['differences']['violation_rate']
  assert difference['interval'][0] <= difference['value'] <= difference['interval'][1]
  assert results['config_differences']['feedback.variant']['direct'] == 'direct'
  page = (workdir / 'small' / 'report.html').read_text()
  assert 'Does it run?' in page and '<svg' in page
  assert list((workdir / 'small').glob('*.svg'))


def test_results_have_p_values_adjusted_over_the_arms(finished):
  _, workdir = finished
  results = json.loads((workdir / 'small' / 'results.json').read_text())
  differences = [
    results['arms'][arm]['groups']['harmful']['differences'] for arm in ('revised', 'direct')
  ]
  assert differences[0].keys() == differences[1].keys() and differences[0]
  for measure in differences[0]:
    low, high = sorted((d[measure] for d in differences), key=lambda entry: entry['p_value'])
    assert low['adjusted_p_value'] == pytest.approx(min(1, 2 * low['p_value']))
    assert high['adjusted_p_value'] == max(low['adjusted_p_value'], high['p_value'])


def test_an_arm_samples_only_the_turns_that_no_other_arm_has(finished):
  """The direct arm reads its answers from the journal and samples only its revisions."""
  _, workdir = finished
  results = json.loads((workdir / 'small' / 'results.json').read_text())
  by_turns = {row['turns']: row['reused_turns'] for row in results['costs']}
  assert by_turns == {6 * 3 + 2: 0, 6: 6 + 2}


def test_a_second_start_samples_nothing(finished, capsys):
  file, workdir = finished
  runner.run_experiment(str(file), workdir, options())
  output = capsys.readouterr().out
  assert '0 of 2 runs had work left: 0 turns sampled' in output


def test_a_second_experiment_samples_only_new_turns(finished, tmp_path, capsys):
  _, workdir = finished
  other = tmp_path / 'other.py'
  other.write_text('"""Another."""\n' + SMALL.replace("'direct'}", "'empty'}"))
  runner.run_experiment(str(other), workdir, options())
  output = capsys.readouterr().out
  assert '1 of 2 runs had work left: 6 turns sampled, 8 taken from the journal' in output


def test_a_dry_run_prints_an_estimate_and_writes_nothing(finished, tmp_path, capsys):
  file, workdir = finished
  runner.run_experiment(str(file), tmp_path, options(dry_run=True))
  output = capsys.readouterr().out
  assert 'harmful prompts: smallest paired difference' in output
  assert '26 turns to sample' in output and 'minutes here' in output and 'GiB of memory' in output
  assert re.search(r'disk space, at most: journal .* MB, D_CAI and evaluation .* MB', output)
  assert not list(tmp_path.iterdir())
  runner.run_experiment(str(file), workdir, options(dry_run=True, arms=['revised']))
  output = capsys.readouterr().out
  assert 'nothing is left to do' in output


def test_scoring_a_missing_revision_is_an_error(finished):
  _, workdir = finished
  folder = next(iter(pathlib.Path(workdir / 'runs').iterdir()))
  with pytest.raises(UserError, match=r'scores revision_3, but its run has 1 rounds'):
    responses.read_responses(Arm(response='revision_3'), {0: folder}, 'harmful')


def test_an_arm_that_scores_a_missing_revision_is_refused_before_any_work(tmp_path):
  arms = {'a': Arm(response='revision_3', overrides={'feedback.rounds': 2})}
  experiment = Experiment(arms, reference='a')
  with pytest.raises(UserError, match="arm 'a': it scores revision_3, but feedback.rounds=2"):
    runner.plan_runs(experiment, define.load_config(experiment.base), tmp_path)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'kind': 'pie'}, "figure 1 is of kind 'pie'"),
    ({'series': [{'name': 's', 'metric': 'm', 'arms': ['a']}]}, "figure 1, a series .*'x'"),
    ({'series': [{'name': 's', 'metric': 'm', 'arms': ['a'], 'x': []}]}, 'one number for each arm'),
  ],
)
def test_figure_that_cannot_be_drawn_is_refused_before_any_work(change, message):
  figure = figures.rates_line('caption', ['a'], [1], 'x')
  Experiment({'a': Arm()}, reference='a', figures=(figure,))
  with pytest.raises(UserError, match=message):
    Experiment({'a': Arm()}, reference='a', figures=(figure | change,))


@pytest.mark.parametrize('seeds', [(), (0, 0), (-1,), (1.5,), (True,), 3, None])
def test_seeds_of_an_experiment_are_distinct_integers(seeds):
  with pytest.raises(UserError, match='seeds=.* must be a tuple of one or more distinct'):
    Experiment({'a': Arm()}, reference='a', seeds=seeds)


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('x = 1\n', 'mine.py does not define get_experiment'),
    ('def get_experiment():\n  return 3\n', 'returns int. It must return an Experiment'),
    ('def get_experiment():\n  return 1 / 0\n', 'mine.py, line 2: ZeroDivisionError'),
    ('def get_experiment(\n', 'mine.py, line 1: SyntaxError'),
    ('import nowhere\n', 'mine.py, line 1: ModuleNotFoundError'),
  ],
)
def test_file_that_is_no_experiment_is_refused(text, message, tmp_path):
  (tmp_path / 'mine.py').write_text(text)
  with pytest.raises(UserError, match=message):
    define.load_experiment(str(tmp_path / 'mine.py'))


def test_the_revised_response_is_the_last_revision_if_there_is_one():
  turn = lambda text: {'text': text}  # noqa: E731
  row = {'initial': turn('a'), 'rounds': [{'revision': turn('b')}, {'revision': turn('c')}]}
  chosen = {
    name: responses._select_response(name, row)['text'] for name in ('base', 'revised', 'last')
  }
  assert chosen == {'base': 'a', 'revised': 'c', 'last': 'c'}
  assert responses._select_response('revision_1', row)['text'] == 'b'
  assert responses._select_response('revised', row | {'rounds': []})['text'] == 'a'


def test_a_figure_without_its_measures_is_left_out_with_a_note():
  arms = {'a': {'groups': {'harmful': {'metrics': {'mean_tokens': {}}}}}}
  line = {'kind': 'line', 'group': 'harmful', 'series': [{'metric': 'mean_tokens', 'arms': ['a']}]}
  assert collect._missing_measure(line, arms) == ''
  rates = {'kind': 'arms', 'group': 'harmful', 'metrics': ['violation_rate'], 'arms': ['a']}
  assert (
    collect._missing_measure(rates, arms) == "there is no violation_rate of harmful prompts for 'a'"
  )
  frontier = {
    'kind': 'frontier',
    'x': ['harmful', 'mean_tokens'],
    'y': ['helpful', 'x'],
    'arms': ['a'],
  }
  assert 'x of helpful prompts' in collect._missing_measure(frontier, arms)
  shown, notes = collect._select_figures([line, rates | {'caption': 'Rates'}], arms)
  assert shown == [line]
  assert notes == [
    'The figure "Rates" is left out: there is no violation_rate of harmful prompts for \'a\'.'
  ]


def test_two_experiments_cannot_use_a_workdir_at_the_same_time(tmp_path):
  with lock.hold(tmp_path), pytest.raises(UserError, match='belongs to job'):
    runner.run_experiment('experiments/revisions.py', tmp_path, options())


def test_each_seed_of_the_embedded_world_has_its_own_pretrained_model(tmp_path):
  config = define.load_config('configs/tiny.py')
  arms = {'a': Arm(response='last'), 'b': Arm({'model.base': 'tiny-small'}, 'last')}
  experiment = Experiment(arms, 'a', seeds=(0, 1, 2, 3))

  def models(experiment, arm, config=config):
    return [
      experiment.settings(arm, seed, config).get('model.base', 'as configured')
      for seed in experiment.seeds
    ]

  assert models(experiment, 'a') == ['tiny', 'tiny-1', 'tiny-2', 'tiny']
  assert models(experiment, 'b') == ['tiny-small'] * 4  # it exists for one seed only
  shared = dataclasses.replace(experiment, model_by_seed=False)
  assert models(shared, 'a') == ['as configured'] * 4
  real = define.override_config(config, {'model.base': str(tmp_path)})
  assert models(experiment, 'a', real) == ['as configured'] * 4

  runs = runner.plan_runs(experiment, config, tmp_path)
  bases = [run.config.model.base for run, _ in runs.values()]
  assert sorted(bases) == sorted(['tiny', 'tiny-1', 'tiny-2', 'tiny'] + ['tiny-small'] * 4)
  first = runner.plan_runs(dataclasses.replace(shared, seeds=(0,)), config, tmp_path)
  assert set(first) < set(runs)  # the runs of seed 0 are those of a shared model


def test_shared_model_of_the_command_line_is_used_by_every_seed(tmp_path, monkeypatch):
  planned = []
  plan_runs = runner.plan_runs
  monkeypatch.setattr(
    runner, 'plan_runs', lambda *args: planned.append(plan_runs(*args)) or planned[-1]
  )
  monkeypatch.setattr(runner.estimate, 'describe', lambda *args: '')
  file = define.ROOT / 'experiments' / 'revisions.py'
  for shared_model in (False, True):
    chosen = options(dry_run=True, shared_model=shared_model, seeds=[1, 2])
    runner.run_experiment(str(file), tmp_path, chosen)
  bases = [[run.config.model.base for run, _ in runs.values()] for runs in planned]
  assert bases == [['tiny-1', 'tiny-2'], ['tiny', 'tiny']]


def test_an_experiment_prints_the_grammar_beside_the_model_and_claims_recovery_only(finished):
  _, workdir = finished
  results = json.loads((workdir / 'small' / 'results.json').read_text())
  truth = {
    arm: row['groups']['harmful']['metrics']['grammar_violation_rate']['value']
    for arm, row in results['arms'].items()
  }
  assert truth['initial'] > truth['direct'] > truth['revised']
  table = experiment_table(results).splitlines()
  assert re.search(r'breaks a rule +difference +grammar +still answers', table[0])
  assert f'{100 * truth["revised"]:.1f} %' in next(
    line for line in table if line.startswith('  revised')
  )
  page = (workdir / 'small' / 'report.html').read_text()
  assert '>grammar</th>' in page and 'nothing about the method' in page
