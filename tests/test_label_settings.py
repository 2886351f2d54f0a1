"""AI feedback: settings and jobs that are refused, and what a digest covers."""

import dataclasses

import pytest

from cai_jax.constitution import Constitution
from cai_jax.feedback.comparisons.config import LabelConfig
from cai_jax.feedback.comparisons.job import check_label
from cai_jax.feedback.config import FeedbackConfig
from cai_jax.runtime.errors import UserError
from cai_jax.sampling.types import SamplingConfig
from tests.label_setup import (
  CONSTITUTION,
  PRINCIPLES,
  PROMPTS,
  SHORT,
  make_job,
)
from tests.label_setup import lm as lm
from tests.label_setup import pairs_file as pairs_file


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'responses': 1}, 'responses=1 must be 0, or between 2 and'),
    ({'pairs': 'some'}, "pairs='some' must be one of"),
    ({'clamp': (0.6, 0.4)}, 'clamp=.* must be two numbers in'),
    ({'verdict': 'guess'}, "verdict='guess' must be one of"),
    ({'model': ''}, "model='' names no feedback model"),
    ({'form': 'odd'}, "form='odd' must be one of"),
    ({'responses': 2, 'comparisons': ('x',)}, 'Set one of them'),
    ({'samples': 2}, 'would ask the same question 2 times'),
    ({'labelled_limit': 0}, 'labelled_limit=0 must be'),
  ],
)
def test_wrong_settings_are_refused(fields, message):
  with pytest.raises(UserError, match=f'label: .*{message}'):
    LabelConfig(**fields)


@pytest.mark.parametrize(
  ('fields', 'changes', 'message'),
  [
    ({}, {}, 'nothing to label'),
    ({'responses': 2}, {'prompts': []}, 'no prompt to sample responses to'),
    ({'responses': 2}, {'prompts': [PROMPTS[0]] * 2}, "two prompts have the id 'id-0'"),
    ({'responses': 2}, {'sampling': SamplingConfig(temperature=0)}, 'would be equal'),
    ({'responses': 2, 'principles': 3}, {}, '3 rounds without repetition|principles'),
    (
      {'responses': 2},
      {'sampling': SamplingConfig(max_tokens=1500)},
      r'can reach \d+ tokens, but random holds 2048',
    ),
  ],
)
def test_what_cannot_be_labelled_is_refused_before_work(lm, fields, changes, message):
  with pytest.raises(UserError, match=message):
    make_job({'responses': lm, 'feedback': lm}, LabelConfig(**fields), **changes)


def test_the_digest_covers_what_labels_depend_on(lm, tmp_path, pairs_file):
  base = LabelConfig(comparisons=(pairs_file,))

  def digest(config=base, constitution=CONSTITUTION):
    job = check_label({'feedback': lm}, [], constitution, config, FeedbackConfig(), SHORT, 0)
    return job.digest()

  copied = tmp_path / 'copy.jsonl'
  copied.write_bytes((tmp_path / 'pairs.jsonl').read_bytes())
  assert digest(dataclasses.replace(base, comparisons=(str(copied),))) == digest()
  other = dataclasses.replace(PRINCIPLES[0], comparison_request='Choose one.')
  others = [
    digest(constitution=Constitution((other, PRINCIPLES[1]))),
    digest(dataclasses.replace(base, thoughts=4)),
    digest(dataclasses.replace(base, principles=2)),
  ]
  copied.write_text(copied.read_text().replace('rain', 'snow'))
  others.append(digest(dataclasses.replace(base, comparisons=(str(copied),))))
  assert len({digest(), *others}) == 5
