"""AI feedback by a judge that is no language model: it is asked nothing twice."""

import contextlib
import dataclasses
import math

import numpy as np
import pytest

from cai_jax import pipeline
from cai_jax.feedback.comparisons.config import LabelConfig
from cai_jax.feedback.comparisons.judging import journaled_judge
from cai_jax.feedback.comparisons.labelling import label
from cai_jax.pipeline.raters import make_rater
from cai_jax.pipeline.stage_label import label_comparisons
from cai_jax.runtime.errors import UserError
from cai_jax.sampling.journal import Journal
from cai_jax.scoring.judge import JUDGES, Comparison
from tests.feedback_setup import ENGINE
from tests.label_setup import lm as lm
from tests.label_setup import make_job
from tests.label_setup import pairs_file as pairs_file
from tests.pipeline_setup import set_fields, small

GIVEN = ('comparisons.jsonl', 'summary.json')


class KilledError(Exception):
  """Ends a run where a test would kill it."""


class Judge:
  """Prefers the longer response, and remembers what it was asked."""

  def __init__(self):
    self.asked = []

  def __call__(self, matches):
    self.asked += [(m.principle, m.messages[0]['content'], m.responses) for m in matches]
    odds = [math.tanh(len(m.responses[0]) - len(m.responses[1])) for m in matches]
    return [Comparison(m.prompt, m.players, (x, x)) for m, x in zip(matches, odds, strict=True)]


def run(judge, folder, config, models=(), progress=lambda *_: None, identity=('longer',)):
  """Run a job in a folder, with the judge behind the journal of that folder."""
  with contextlib.closing(Journal(folder / 'journal')) as journal:
    remembered = journaled_judge(judge, list(identity), journal)
    job = make_job(dict(models), config, judge=remembered)
    label(job, folder / 'labels', journal, ENGINE, progress)
  return [(folder / 'labels' / name).read_bytes() for name in GIVEN]


def test_a_killed_job_asks_its_judge_nothing_twice(lm, tmp_path):
  config, models = LabelConfig(responses=2, principles=2), {'responses': lm}
  whole = Judge()
  expected = run(whole, tmp_path / 'whole', config, models)
  assert len(set(whole.asked)) == len(whole.asked) >= 2 * 4

  def kill(done, total, tokens):
    if done == 2:
      raise KilledError

  judge = Judge()
  with pytest.raises(KilledError):
    run(judge, tmp_path / 'killed', config, models, kill)
  assert 0 < len(judge.asked) < len(whole.asked)
  assert run(judge, tmp_path / 'killed', config, models) == expected
  assert sorted(judge.asked) == sorted(whole.asked)
  assert run(judge, tmp_path / 'killed', config, models) == expected
  assert len(judge.asked) == len(whole.asked)


def test_given_responses_are_judged_once_for_each_judge(pairs_file, tmp_path):
  # The labelled set has the same pairs, which are the same questions under the same principles.
  config = LabelConfig(comparisons=(pairs_file,), labelled=(pairs_file,), principles=2)
  first, again, other, mended = Judge(), Judge(), Judge(), Judge()
  expected = run(first, tmp_path, config)
  assert len(first.asked) == 2 * 2
  assert run(again, tmp_path, config) == expected and again.asked == []
  assert run(other, tmp_path, config, identity=('another version',)) == expected
  assert sorted(other.asked) == sorted(first.asked)
  path = tmp_path / 'journal' / 'turns-00000.jsonl'
  lines = path.read_bytes().splitlines(keepends=True)
  lines[0] = lines[0].replace(b'0.', b'9.', 1)
  path.write_bytes(b''.join(lines))
  assert run(mended, tmp_path, config) == expected and len(mended.asked) == 2


@pytest.mark.usefixtures('restored_registries')
def test_a_judge_that_reads_another_model_is_asked_again(pairs_file, tmp_path):
  @JUDGES.register('by size')
  def load_by_size(loader):
    odds = 1 / loader.inspect_language_model('base')[1].config.d_model
    return lambda matches: [Comparison(m.prompt, m.players, (odds, odds)) for m in matches]

  options = (('n', 2), ('scorer', 'judge'), ('scorer_model', 'by size'))

  def label_with(base, folder):
    config = small(base)
    given = {'label__model': 'by size', 'label__comparisons': (pairs_file,)}
    set_fields(
      **given, feedback__variant='best_revision', feedback__options=options, feedback__rounds=1
    )(config)
    built = pipeline.build(config, tmp_path / folder)
    built = dataclasses.replace(built, journal=tmp_path / 'journal')
    label_comparisons(built, {})
    labels = (tmp_path / folder / 'labels' / 'comparisons.jsonl').read_bytes()
    return labels, make_rater(built, {}).identity

  first, other = label_with('tiny', 'first'), label_with('tiny-small', 'other')
  assert first[0] != other[0] and first[1] != other[1]
  assert label_with('tiny', 'again') == first


def test_numbers_of_numpy_are_answers(pairs_file, tmp_path):
  config = LabelConfig(comparisons=(pairs_file,), principles=2)

  def in_numpy(number):
    def judge(matches):
      odds, mass = (number(0.1), number(-0.3)), (number(0.9), number(0.7))
      return [Comparison(m.prompt, m.players, odds, mass) for m in matches]

    return judge

  expected = run(in_numpy(lambda x: float(np.float32(x))), tmp_path / 'float', config)
  assert run(in_numpy(np.float32), tmp_path / 'numpy', config) == expected
  assert run(in_numpy(np.float32), tmp_path / 'numpy', config) == expected  # from the journal


@pytest.mark.parametrize(
  'answers',
  [[], [((math.nan, 0.0), None)] * 2, [((1.0,), None)] * 2, [((1.0, 0.0), (math.nan, 1.0))] * 2],
)
def test_answers_that_are_no_comparisons_are_refused(answers, pairs_file, tmp_path):
  def judge(matches):
    return [Comparison('', ('first', 'second'), *answer) for answer in answers]

  config = LabelConfig(comparisons=(pairs_file,), principles=2)
  with pytest.raises(UserError, match='with two finite log-odds.* for each of 2 matches'):
    run(judge, tmp_path, config)
