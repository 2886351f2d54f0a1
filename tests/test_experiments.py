"""Experiments: their files, what runs they need, what they share, and a small one end to end."""

import argparse
import json
import pathlib

import pytest

from cai_jax.experiment import collect, estimate
from cai_jax.experiment import define as experiments
from cai_jax.experiment import run as runner
from cai_jax.experiment.define import Arm, Experiment

FILES = (
  'revisions',
  'principles',
  'critique_vs_direct',
  'sl_cai_n',
  'helpfulness_mix',
  'control_initial',
  'model_size',
  'temperature',
)
SMALL = """
from experiments.experiment import Arm, Experiment


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


def options(**given):
  return argparse.Namespace(
    **{'arms': None, 'seeds': None, 'config': None, 'dry_run': False} | given
  )


@pytest.mark.parametrize('name', FILES)
def test_every_shipped_experiment_can_be_run(name, tmp_path):
  """All its runs are built and checked, and its docstring tells what it must."""
  found, docstring, experiment = experiments.load(experiments.ROOT / 'experiments' / f'{name}.py')
  assert found == name and docstring.splitlines()[0].endswith(('.', '?'))
  for told in ('Paper:', 'Command:', 'Hardware:', 'Arms:', 'Expected:'):
    assert told in docstring
  assert f'--experiment=experiments/{name}.py' in docstring
  assert experiment.figures
  config = experiments.base_config(experiment.base)
  runs = runner.planned(experiment, config, tmp_path)
  assert len(experiment.seeds) <= len(runs) <= len(experiment.seeds) * len(experiment.arms)
  for run, _ in runs.values():
    assert run.journal == tmp_path / 'journal'


def test_arms_of_equal_settings_have_one_run(tmp_path):
  _, _, experiment = experiments.load(experiments.ROOT / 'experiments' / 'revisions.py')
  runs = runner.planned(experiment, experiments.base_config(experiment.base), tmp_path)
  assert len(runs) == len(experiment.seeds)
  assert all(stages == ('generate',) for _, stages in runs.values())


def test_turns_that_runs_have_in_common_have_one_name(tmp_path):
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
  runs = runner.planned(experiment, experiments.base_config(experiment.base), tmp_path)
  two, four, direct, hot = (estimate.turns(run, stages) for run, stages in runs.values())
  assert set(two) < set(four)
  assert sum(t.count for t in four.values()) == 700 * 9 + 400
  for other in (direct, hot):  # only the answers to both kinds of prompts
    assert sum(four[name].count for name in set(four) & set(other)) == 700 + 400


def test_bad_experiments_are_refused(tmp_path):
  with pytest.raises(ValueError, match='scores initial'):
    Arm(response='reviewed')
  with pytest.raises(ValueError, match="reference='b' is none"):
    Experiment(arms={'a': Arm()}, reference='b')
  with pytest.raises(ValueError, match=r"draws \['b'\]"):
    Experiment({'a': Arm()}, 'a', ({'kind': 'arms', 'arms': ['a', 'b']},))
  with pytest.raises(ValueError, match='has a comma'):
    Experiment({'a, b': Arm()}, 'a, b')
  with pytest.raises(ValueError, match=r'no such file; there is .*revisions\.py'):
    experiments.load('experiments/nothing.py')
  (tmp_path / 'x.py').write_text('a = 1')
  with pytest.raises(ValueError, match='no get_experiment'):
    experiments.load(tmp_path / 'x.py')
  with pytest.raises(ValueError, match='takes no text'):
    experiments.load(f'{experiments.ROOT}/experiments/revisions.py:a')
  experiment = Experiment({'a': Arm({'feedback.round': 2})}, 'a')
  with pytest.raises(ValueError, match=r"no field 'feedback.round'"):
    runner.planned(experiment, experiments.base_config('configs/tiny.py'), tmp_path)
  experiment = Experiment({'a': Arm({'feedback.rounds': 0})}, 'a')
  with pytest.raises(ValueError, match=r"arm 'a': feedback: rounds=0"):
    runner.planned(experiment, experiments.base_config('configs/tiny.py'), tmp_path)
  with pytest.raises(ValueError, match='unknown arm c; there is a'):
    Experiment({'a': Arm()}, 'a').only(['c'])


def test_the_text_after_a_colon_reaches_the_experiment():
  path = experiments.ROOT / 'experiments' / 'model_size.py'
  _, _, experiment = experiments.load(f'{path}:one,two,three')
  models = [arm.overrides['model.base'] for arm in experiment.arms.values()]
  assert list(dict.fromkeys(models)) == ['one', 'two', 'three']


@pytest.fixture(scope='module')
def done(tmp_path_factory):
  """A small experiment that has been run, and what it printed."""
  folder = tmp_path_factory.mktemp('lab')
  file = folder / 'small.py'
  file.write_text(f'"""Does it run?\n\nPaper: none\n"""\n{SMALL}')
  runner.run(str(file), folder / 'work', options())
  return file, folder / 'work'


def test_an_experiment_leaves_its_results_figures_and_report(done):
  _, workdir = done
  found = json.loads((workdir / 'small' / 'results.json').read_text())
  assert list(found['arms']) == ['initial', 'revised', 'direct']
  assert found['arms']['revised']['groups']['harmful']['count'] == 6
  assert 'differences' not in found['arms']['initial']['groups']['harmful']
  difference = found['arms']['revised']['groups']['harmful']['differences']['violation_rate']
  assert difference['interval'][0] <= difference['value'] <= difference['interval'][1]
  assert found['config_differences']['feedback.variant']['direct'] == 'direct'
  page = (workdir / 'small' / 'report.html').read_text()
  assert 'Does it run?' in page and '<svg' in page
  assert list((workdir / 'small').glob('*.svg'))


def test_arms_share_what_they_have_in_common(done):
  """The direct arm takes all its answers from the journal and samples its revisions alone."""
  _, workdir = done
  found = json.loads((workdir / 'small' / 'results.json').read_text())
  by_turns = {row['turns']: row['reused_turns'] for row in found['costs']}
  assert by_turns == {6 * 3 + 2: 0, 6: 6 + 2}


def test_a_second_start_samples_nothing(done, capsys):
  file, workdir = done
  runner.run(str(file), workdir, options())
  told = capsys.readouterr().out
  assert '0 of 2 runs had work left: 0 turns sampled' in told


def test_another_experiment_samples_only_what_differs(done, tmp_path, capsys):
  _, workdir = done
  other = tmp_path / 'other.py'
  other.write_text('"""Another."""\n' + SMALL.replace("'direct'}", "'empty'}"))
  runner.run(str(other), workdir, options())
  told = capsys.readouterr().out
  assert '1 of 2 runs had work left: 6 turns sampled, 8 taken from the journal' in told


def test_a_dry_run_tells_what_is_left_and_does_nothing(done, tmp_path, capsys):
  file, workdir = done
  runner.run(str(file), tmp_path, options(dry_run=True))
  told = capsys.readouterr().out
  assert '26 turns to sample' in told and 'minutes here' in told and 'GiB of memory' in told
  assert not list(tmp_path.iterdir())
  runner.run(str(file), workdir, options(dry_run=True, arms=['revised']))
  told = capsys.readouterr().out
  assert 'nothing is left to do' in told


def test_a_response_that_a_run_does_not_have_is_an_error(done):
  _, workdir = done
  folder = next(iter(pathlib.Path(workdir / 'runs').iterdir()))
  with pytest.raises(ValueError, match=r'revision_3 is asked for, and the run has 1 rounds'):
    collect.responses(Arm(response='revision_3'), {0: folder}, 'harmful')


def test_a_held_out_answer_is_revised_where_it_has_rounds():
  turn = lambda text: {'text': text}  # noqa: E731
  row = {'initial': turn('a'), 'rounds': [{'revision': turn('b')}, {'revision': turn('c')}]}
  chosen = {name: collect._response(name, row)['text'] for name in ('base', 'revised', 'last')}
  assert chosen == {'base': 'a', 'revised': 'c', 'last': 'c'}
  assert collect._response('revision_1', row)['text'] == 'b'
  assert collect._response('revised', row | {'rounds': []})['text'] == 'a'


def test_a_figure_of_what_was_not_measured_is_named():
  arms = {'a': {'groups': {'harmful': {'metrics': {'mean_tokens': {}}}}}}
  line = {'kind': 'line', 'group': 'harmful', 'series': [{'metric': 'mean_tokens', 'arms': ['a']}]}
  assert collect._missing(line, arms) == ''
  rates = {'kind': 'arms', 'group': 'harmful', 'metrics': ['violation_rate'], 'arms': ['a']}
  assert collect._missing(rates, arms) == "there is no violation_rate of harmful prompts for 'a'"
  frontier = {
    'kind': 'frontier',
    'x': ['harmful', 'mean_tokens'],
    'y': ['helpful', 'x'],
    'arms': ['a'],
  }
  assert 'x of helpful prompts' in collect._missing(frontier, arms)


def test_two_experiments_do_not_share_a_workdir_at_one_time(tmp_path):
  with (
    runner.alone(tmp_path),
    pytest.raises(ValueError, match='another experiment is running'),
    runner.alone(tmp_path),
  ):
    pass
  with runner.alone(tmp_path):  # and afterwards it is free
    pass
