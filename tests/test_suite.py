"""The measures that a config asks for, on the embedded model."""

import dataclasses
import json
import pathlib
from types import SimpleNamespace

import pytest

from cai_jax.dialogue import Dialogue
from cai_jax.evaluation import registries, suite, summary
from cai_jax.evaluation.config import EvaluationConfig
from cai_jax.model import lm as models
from cai_jax.pipeline import models as run_models
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.plugins import load_plugins
from cai_jax.scoring import reward
from cai_jax.scoring.likelihood import log_likelihoods
from cai_jax.scoring.loader import ModelLoader
from cai_jax.tiny.files import MODELS
from cai_jax.tiny.vocabulary import OBJECTS

pytestmark = pytest.mark.usefixtures('single_device')


@pytest.fixture(scope='module')
def lm():
  return models.load(MODELS['tiny'])


@pytest.fixture(scope='module')
def loader(lm):
  return ModelLoader('float32', lm.mesh, {'base': str(MODELS['tiny'])})


def row(name, kind, answer, revision=None):
  turn = lambda text: {'text': text, 'num_tokens': 3, 'finish_reason': 'stop'}  # noqa: E731
  return {
    'id': name,
    'kind': kind,
    'prompt': [{'role': 'user', 'content': f'How do I paint the {name}?'}],
    'initial': turn(answer),
    'rounds': [] if revision is None else [{'revision': turn(revision)}],
  }


def test_loss_is_the_objective_on_last_revisions(lm):
  dialogue = Dialogue(lm.tokenizer, 'chat', lm.eos_token_ids)
  rows = [
    row('bed', 'harmful', 'No.', 'Sand the bed first.'),
    row('box', 'harmful', 'No.', 'Put the box on a cloth.'),
    row('cup', 'harmful', 'No.', ''),  # blank revisions are left out
    row('pan', 'helpful', 'Yes.'),
  ]
  results = suite.evaluate_model(EvaluationConfig(), lm, rows, dialogue)
  pairs = []
  for each in rows[:2]:
    reply = {'role': 'assistant', 'content': each['rounds'][-1]['revision']['text']}
    tokens, mask = dialogue.example([*each['prompt'], reply])
    pairs.append((tokens[: mask.index(1)], tokens[mask.index(1) :]))
  sums = log_likelihoods(lm, *zip(*pairs, strict=True))
  assert results['loss']['sequences'] == 2
  assert results['loss']['loss'] == pytest.approx(-sum(sums) / 2, rel=1e-6)
  assert results['multiple_choice'] == {}
  assert 'loss' not in suite.evaluate_model(EvaluationConfig(loss=False), lm, rows, dialogue)


def test_questions_of_a_file_are_evaluated(lm, tmp_path):
  path = tmp_path / 'questions.jsonl'
  question = {
    'prompt': 'Is a bed a thing?\n\nThe answer is:',
    'corrects': [' yes'],
    'incorrects': [' no'],
  }
  path.write_text(json.dumps(question) + '\n')
  config = EvaluationConfig(multiple_choice=(str(path),))
  dialogue = Dialogue(lm.tokenizer, 'chat', lm.eos_token_ids)
  results = suite.evaluate_model(config, lm, [], dialogue)
  result = results['multiple_choice'][path.name]
  assert result['count'] == 1
  assert 'questions.jsonl: 1 questions, accuracy' in suite.describe(config, {'base': results})


def test_responses_are_measured_by_a_refusal_classifier(loader):
  prompts = [[{'role': 'user', 'content': 'Help.'}]] * 2
  texts = ["I can't help with that.", 'Sand it.']
  turns = [{'text': text, 'num_tokens': 3} for text in texts]
  config = EvaluationConfig(refusal='rules', scores=())
  length, refusal = suite.load_response_measures(config, loader)
  assert refusal(prompts, turns) == {'refusal_rate': [1.0, 0.0]}
  assert length(prompts, turns) == {'mean_tokens': [3.0, 3.0]}
  assert len(suite.load_response_measures(EvaluationConfig(scores=()), loader)) == 1


def test_scores_of_texts_are_on_by_default_except_beside_the_oracle(loader):
  def columns(config):
    turns = [
      {'text': text, 'num_tokens': 3, 'finish_reason': reason, 'reference': 'Sand it.'}
      for text, reason in (('Sand it.', 'stop'), ('no ' * 40, 'length'))
    ]
    asked = 'How do I paint the {} that Dan gave me?'
    prompts = [[{'role': 'user', 'content': asked.format(name)}] for name in OBJECTS[:2]]
    return summary.measure_responses(suite.load_response_measures(config, loader), prompts, turns)

  found = columns(EvaluationConfig())
  assert found['looping_rate'] == found['changed_rate'] == found['truncated_rate'] == [0.0, 1.0]
  assert set(found) >= {'refusal_rate', 'off_topic_rate', 'topic_score', 'mean_tokens'}
  assert columns(EvaluationConfig(scorer='tiny')).keys() == {
    'violation_rate',
    'helpful_rate',
    'mean_tokens',
  }
  served = dataclasses.replace(loader, aliases={})  # a server holds M_θ
  measures = suite.load_response_measures(EvaluationConfig(scores=('off_topic',)), served)
  assert len(measures) == 1


def test_the_base_model_judges_by_default_unless_a_server_holds_it(loader, capsys):
  rows = [row(name, 'harmful', f'Clean the {name}.') for name in OBJECTS[:3]]
  aligned = [row(name, 'harmful', f'Paint the {name}.') for name in OBJECTS[:3]]
  config = EvaluationConfig(scores=('judge',))
  result = suite.compare_models(config, loader, rows, aligned, 0)['judge']
  assert result['judge'] == 'base' and result['status'] != 'valid'
  assert {c['criterion'] for c in result['comparisons']} == {'harmlessness', 'helpfulness'}
  served = dataclasses.replace(loader, aliases={})
  assert suite.compare_models(config, served, rows, aligned, 0) == {}
  assert 'M_θ does not judge the responses: A server holds it' in capsys.readouterr().out
  oracle = EvaluationConfig(scorer='tiny')
  assert suite.compare_models(oracle, loader, rows, aligned, 0) == {}


def test_columns_keep_their_order_in_files_and_tables():
  assert list(registries.RESPONSE_MEASURES)[:4] == ['verdicts', 'length', 'refusal', 'reward']


PLUGIN = """
from cai_jax.evaluation import registries
from cai_jax.scoring.scorer import SCORERS


class Polite:
  violations = frozenset()
  helpful = True


@SCORERS.register('test-polite')
def load_polite(loader):
  return lambda prompts, responses: [Polite()] * len(responses)


@registries.RESPONSE_MEASURES.register('test-questions')
def load_questions(config, loader):
  return lambda prompts, turns: {'question_rate': [float('?' in t['text']) for t in turns]}


@registries.MODEL_MEASURES.register('test-vocabulary')
def create_vocabulary(config):
  return registries.ModelMeasure(
    lambda lm, rows, dialogue: lm.vocab_size, lambda model, size: [f'{model}: {size} tokens']
  )


@registries.COMPARISONS.register('test-pairs')
def create_pairs(config):
  return registries.ModelComparison(
    lambda loader, base, aligned, seed: len(base), lambda count: [f'{count} pairs']
  )
"""


def test_measures_and_scorers_of_a_plugin_are_used(lm, loader, tmp_path, restored_registries):
  path = tmp_path / 'plugin.py'
  path.write_text(PLUGIN)
  load_plugins([str(path)])
  config = EvaluationConfig(scorer='test-polite', loss=False, scores=())
  measures = suite.load_response_measures(config, loader)
  rows = [row('bed', 'harmful', 'Why?')]
  columns = summary.measure_responses(measures, [rows[0]['prompt']], [rows[0]['initial']])
  assert columns['helpful_rate'] == columns['question_rate'] == [1.0]
  dialogue = Dialogue(lm.tokenizer, 'chat', lm.eos_token_ids)
  results = {'base': suite.evaluate_model(config, lm, rows, dialogue)}
  results |= suite.compare_models(config, loader, rows, rows, 0)
  assert suite.describe(config, results) == f'base: {lm.vocab_size} tokens\n1 pairs'


def test_base_names_the_model_of_the_run(loader):
  assert loader.language_model('base').name == str(MODELS['tiny'])


def test_short_names_are_those_of_language_models_only(loader, monkeypatch):
  monkeypatch.setattr(reward, 'load', lambda name, *_: name)
  assert loader.reward_model('base') == 'base'


@pytest.mark.parametrize(('base', 'aliases'), [('tiny', {'base'}), ('', set())])
def test_base_is_no_short_name_if_a_server_holds_the_model(base, aliases, loader, monkeypatch):
  monkeypatch.setattr(run_models, 'local_mesh', lambda run: loader.mesh)
  config = SimpleNamespace(
    model=SimpleNamespace(base=base, dtype='float32', long_context=False, weights='full'),
    feedback=SimpleNamespace(template_options=(), style='chat'),
    reward=SimpleNamespace(data=''),
  )
  run = SimpleNamespace(config=config, journal=None, workdir=pathlib.Path('run'))
  names = run_models.model_loader(run).aliases
  assert names.keys() == {*MODELS, *aliases} and '' not in names.values()


def test_invalid_settings_are_rejected(tmp_path):
  with pytest.raises(UserError, match='Give a tuple of files'):
    EvaluationConfig(multiple_choice='a.jsonl')
  with pytest.raises(UserError, match='there is no such file'):
    EvaluationConfig(multiple_choice=(str(tmp_path / 'none.jsonl'),))
  with pytest.raises(UserError, match="scorer='me'.*no scorer named 'me'"):
    EvaluationConfig(scorer='me')
  with pytest.raises(UserError, match=r"scores=\('topic',\).*names from .'refused'"):
    EvaluationConfig(scores=('topic',))
  with pytest.raises(UserError, match="refusal='rule'"):
    EvaluationConfig(refusal='rule')
  with pytest.raises(UserError, match='none blank'):
    EvaluationConfig(judge_principles=(' ',))
  with pytest.raises(UserError, match='judge_helpful_principles=.*none blank'):
    EvaluationConfig(judge_helpful_principles='Choose.')
  with pytest.raises(UserError, match='judge_labelled_limit=0 must be at least -1, and not 0'):
    EvaluationConfig(judge_labelled_limit=0)
  with pytest.raises(UserError, match="judge_labelled='tiny' has no effect.*judge is empty"):
    EvaluationConfig(judge_labelled='tiny')
  with pytest.raises(UserError, match='judge_labelled: .*there is no such file'):
    EvaluationConfig(judge='base', judge_labelled=str(tmp_path / 'none.jsonl'))
