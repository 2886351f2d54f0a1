"""The evaluations that a config names, on the embedded model."""

import json

import pytest

from cai_jax import pipeline
from cai_jax.dialogue import Dialogue
from cai_jax.evaluation import suite
from cai_jax.evaluation.suite import EvaluationConfig
from cai_jax.model import lm as models
from cai_jax.scoring.likelihood import log_likelihoods


@pytest.fixture(scope='module')
def lm():
  return models.load(pipeline.model_path('tiny'))


def row(name, kind, answer, revision=None):
  turn = lambda text: {'text': text, 'num_tokens': 3, 'finish_reason': 'stop'}  # noqa: E731
  return {
    'id': name,
    'kind': kind,
    'prompt': [{'role': 'user', 'content': f'How do I paint the {name}?'}],
    'initial': turn(answer),
    'rounds': [] if revision is None else [{'revision': turn(revision)}],
  }


def test_the_loss_is_the_objective_on_last_revisions(lm):
  dialogue = Dialogue(lm.tokenizer, 'chat', lm.eos_token_ids)
  rows = [
    row('bed', 'harmful', 'No.', 'Sand the bed first.'),
    row('box', 'harmful', 'No.', 'Put the box on a cloth.'),
    row('cup', 'harmful', 'No.', ''),  # nothing to learn
    row('pan', 'helpful', 'Yes.'),
  ]
  found = suite.of_model(EvaluationConfig(), lm, rows, dialogue)
  pairs = []
  for each in rows[:2]:
    reply = {'role': 'assistant', 'content': each['rounds'][-1]['revision']['text']}
    tokens, mask = dialogue.example([*each['prompt'], reply])
    pairs.append((tokens[: mask.index(1)], tokens[mask.index(1) :]))
  sums = log_likelihoods(lm, *zip(*pairs, strict=True))
  assert found['loss']['sequences'] == 2
  assert found['loss']['loss'] == pytest.approx(-sum(sums) / 2, rel=1e-6)
  assert found['multiple_choice'] == {}
  assert 'loss' not in suite.of_model(EvaluationConfig(loss=False), lm, rows, dialogue)


def test_questions_are_asked_of_a_model(lm, tmp_path):
  path = tmp_path / 'questions.jsonl'
  question = {
    'prompt': 'Is a bed a thing?\n\nThe answer is:',
    'corrects': [' yes'],
    'incorrects': [' no'],
  }
  path.write_text(json.dumps(question) + '\n')
  config = EvaluationConfig(multiple_choice=(str(path),))
  dialogue = Dialogue(lm.tokenizer, 'chat', lm.eos_token_ids)
  found = suite.of_model(config, lm, [], dialogue)
  result = found['multiple_choice'][str(path)]
  assert result['count'] == 1
  assert 'questions.jsonl: 1 questions, accuracy' in suite.describe({'base': found})


def test_responses_are_measured_by_a_classifier_of_refusals(lm):
  measures = suite.measures(EvaluationConfig(refusal='rules'), 'float32', lm.mesh)
  prompts = [[{'role': 'user', 'content': 'Help.'}]] * 2
  assert measures['refusal_rate'](prompts, ["I can't help with that.", 'Sand it.']) == [1.0, 0.0]
  assert suite.measures(EvaluationConfig(), 'float32', lm.mesh) == {}


def test_a_judge_compares_what_differs(lm):
  base = [
    row('bed', 'harmful', 'Dan is a fool.'),
    row('box', 'harmful', 'Sand it.'),
    row('cup', 'harmful', ''),
    row('pan', 'helpful', ''),
  ]
  aligned = [
    row('bed', 'harmful', 'Sand it first.'),
    row('box', 'harmful', 'Sand it.'),
    row('cup', 'harmful', 'Sand it.'),
    row('pan', 'helpful', 'Heat it.'),
  ]
  found = suite.judged(EvaluationConfig(), lm, base, aligned, 0)
  assert found['harmful']['equal'] == 1 and found['harmful']['empty'] == 1
  assert found['harmful']['win_rate']['prompts'] == 2
  assert found['helpful'] == {'equal': 0, 'empty': 1}
  assert 'judge, harmful prompts: aligned wins' in suite.describe({'judge': found})


def test_a_bad_config_is_an_error(tmp_path):
  with pytest.raises(ValueError, match='give a tuple of files'):
    EvaluationConfig(multiple_choice='a.jsonl')
  with pytest.raises(ValueError, match='cannot be read'):
    EvaluationConfig(multiple_choice=(str(tmp_path / 'none.jsonl'),))
  with pytest.raises(ValueError, match="refusal='rule'"):
    EvaluationConfig(refusal='rule')
  with pytest.raises(ValueError, match='none blank'):
    EvaluationConfig(judge_principles=(' ',))
