"""AI feedback: what the principle of a label depends on, ids over several files, and counts."""

import dataclasses

import pytest

from cai_jax.feedback.comparisons.asking import Answer
from cai_jax.feedback.comparisons.comparing import Reading
from cai_jax.feedback.comparisons.config import LabelConfig
from cai_jax.feedback.comparisons.records import Item, Label, Outcome
from cai_jax.feedback.comparisons.summary import summarize
from cai_jax.runtime.errors import UserError
from cai_jax.sampling.types import Completion
from tests.label_setup import PROMPTS, make_job, write_lines
from tests.label_setup import lm as lm

PAIRS = [(0, 1), (0, 2), (1, 2)]


def write_pairs(path, name):
  rows = [
    {'id': f'{name}-{i}', 'prompt': f'Why {i}?', 'chosen': f'{name}.', 'rejected': 'No.'}
    for i in range(8)
  ]
  return write_lines(path, rows)


def draws(job):
  return {item.name: job.principles(item)[0].id for item in job.items}


def asked_principles(job, item):
  """Return the ids of the principles by which a chain compares three different responses."""
  asked = []

  def compare(name, messages, principles, responses, is_sampled):
    yield from ()
    asked.extend(principle.id for principle in principles)
    return []

  chain, completion = dataclasses.replace(job, compare=compare).chain(item), None
  for token in (71, 72, 73):
    chain.send(completion)
    completion = Completion([token] * 3, '', [-1.0] * 3, 'length')
  with pytest.raises(StopIteration):
    chain.send(completion)
  return asked


def test_each_pair_of_several_responses_draws_its_own_principle(lm):
  models = {'responses': lm, 'feedback': lm}
  prompts = [dataclasses.replace(PROMPTS[0], id=f'id-{i}') for i in range(8)]
  job = make_job(models, LabelConfig(responses=3, labelled=('tiny',)), prompts)
  drawn = [[job.principles(item, pair)[0].id for pair in PAIRS] for item in job.items[:8]]
  assert any(len(set(of_prompt)) == 2 for of_prompt in drawn)
  for item, of_prompt in zip(job.items, drawn[:2], strict=False):
    assert asked_principles(job, item) == of_prompt
  # Two responses, sampled or given, have one draw.
  two = make_job(models, LabelConfig(responses=2), prompts)
  for item, of_item in [*((item, two) for item in two.items), (job.items[8], job)]:
    assert of_item.principles(item, (0, 1)) == of_item.principles(item, (1, 2))


def test_draws_for_given_pairs_do_not_depend_on_the_order_of_files(lm, tmp_path):
  files = [write_pairs(tmp_path / f'{name}.jsonl', name) for name in ('Yes', 'Maybe')]
  jobs = [
    make_job({'feedback': lm}, LabelConfig(comparisons=tuple(order)))
    for order in (files, files[::-1])
  ]
  assert draws(jobs[0]) == draws(jobs[1]) and len(set(draws(jobs[0]).values())) == 2


def test_the_ids_of_several_files_must_differ(lm, tmp_path):
  files = [write_pairs(tmp_path / name, 'Yes') for name in ('a.jsonl', 'b.jsonl')]
  with pytest.raises(UserError, match=r"a\.jsonl and .*b\.jsonl both have the id 'Yes-0'"):
    make_job({'feedback': lm}, LabelConfig(comparisons=tuple(files)))
  # A labelled set is not written, so it may have the pairs that are labelled again.
  job = make_job({'feedback': lm}, LabelConfig(comparisons=(files[0],), labelled=(files[1],)))
  assert len({item.id for item in job.items}) == 16


def test_labelled_pairs_whose_chain_ended_are_counted_beside_the_accuracy():
  item = Item('a', 'a', (), ('x', 'y'), better=0, source='known', is_written=False)
  readings = tuple(Reading('kind', option_a, 0.9, Answer(0.9)) for option_a in (0, 1))
  label = Label(item, (0, 1), ('x', 'y'), (False, False), readings)
  summary = summarize([Outcome(item, (label,)), Outcome(item, ended='It was withheld.')])
  known = summary['accuracy']['known']
  assert (known['count'], known['right'], known['ended']) == (1, 1, 1)
