"""Multiple choice by likelihood: agreement with torch, order of options, calibration."""

import functools
import json
import math
import pathlib

import jax
import numpy as np
import pytest
import torch
import transformers

import cai_jax
from cai_jax.evaluation.calibration import calibration_error
from cai_jax.evaluation.measures import multiple_choice
from cai_jax.evaluation.measures.multiple_choice import evaluate_questions
from cai_jax.evaluation.questions import Question, read_questions, swap_options
from cai_jax.model import lm as lm_lib
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.mesh import make_mesh

PROMPT = 'Which is kind?\n\nOptions:\n (A) {}\n (B) {}\n\nThe answer is:'
MAX_POSITIONS = 512  # of the random model


@pytest.fixture(scope='module')
def tiny():
  folder = pathlib.Path(cai_jax.__file__).parent / 'tiny' / 'model'
  return lm_lib.load(folder, mesh=make_mesh(1, devices=jax.devices()[:1]))


@pytest.fixture
def real(data_dir, tmp_path):
  """A random Llama with a real tokenizer, as our model and as the torch model that saved it."""
  tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(
    data_dir('tokenizers') / 'phi-3-mini'
  )
  config = transformers.LlamaConfig(
    vocab_size=32064,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=MAX_POSITIONS,
    bos_token_id=1,
    eos_token_id=32000,
    pad_token_id=32000,
  )
  torch.manual_seed(0)
  model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation='eager').float()
  with torch.no_grad():
    for weight in model.parameters():
      if weight.ndim == 2:
        weight.copy_(torch.randn(weight.shape) * 2 / weight.shape[1] ** 0.5)
  model.save_pretrained(tmp_path)
  tokenizer.save_pretrained(tmp_path)
  mesh = make_mesh(1, devices=jax.devices()[:1])
  return lm_lib.load(tmp_path, mesh=mesh), model.eval()


def reference_value(model, tokenizer, prompt, option):
  """Return log P(option | prompt) from torch and the tokenizer alone."""
  whole = tokenizer.encode(prompt + option, split_special_tokens=True)
  alone = tokenizer.encode(prompt, split_special_tokens=True)
  assert whole[: len(alone)] == alone  # true of all published questions
  with torch.no_grad():
    log_p = model(torch.tensor([whole])).logits[0].log_softmax(-1)
  return sum(log_p[i - 1, whole[i]].item() for i in range(len(alone), len(whole)))


def test_published_questions_agree_with_torch(real, data_dir):
  lm, model = real
  questions = read_questions(data_dir('cai_paper') / 'evals' / '438HHHEvaluations.jsonl')
  assert len(questions) == 438
  length = functools.cache(lambda question: len(lm.tokenizer.encode(question.prompt)))
  by_length = sorted(questions, key=length)
  fitting = [question for question in by_length if length(question) + 8 <= MAX_POSITIONS]
  chosen = [*by_length[:40], fitting[-1]]
  assert length(chosen[-1]) > MAX_POSITIONS - 40
  result = evaluate_questions(lm, chosen)
  differences, margins = [], []
  for question, row in zip(chosen, result['items'], strict=True):
    assert row['id'] == question.line
    expected = {
      o: reference_value(model, lm.tokenizer, question.prompt, o) for o in question.options
    }
    for kind in ('corrects', 'incorrects'):
      for option, value in zip(
        getattr(question, kind), row['log_probabilities'][kind], strict=True
      ):
        differences.append(abs(value - expected[option]))
    right, wrong = expected[question.corrects[0]], expected[question.incorrects[0]]
    margins.append(abs(right - wrong))
    assert row['correct'] == (right > wrong)
    assert row['probability'] == pytest.approx(1 / (1 + math.exp(wrong - right)), abs=1e-4)
  print(f'largest difference {max(differences):.2e} nats of {len(differences)}')
  assert max(differences) < 1e-4
  assert np.mean(margins) > 0.5  # options with equal values would agree trivially
  assert result['accuracy'] == np.mean([row['correct'] for row in result['items']])
  with pytest.raises(
    UserError, match=rf'line {by_length[-1].line}, option .* exceed the {MAX_POSITIONS}'
  ):
    evaluate_questions(lm, by_length[-1:])


def split_prompt(prompt):
  before, rest = prompt.split('\n (A) ')
  a, rest = rest.split('\n (B) ')
  b, end = rest.rsplit('\nThe answer is', 1)
  return before, a, b.rstrip('\n'), end


@pytest.mark.parametrize('name', ['438HHHEvaluations', 'HarmfulVsEthical'])
def test_every_published_question_can_be_swapped(data_dir, name):
  questions = read_questions(data_dir('cai_paper') / 'evals' / f'{name}.jsonl')
  for question in questions:
    other = swap_options(question)
    assert other != question and swap_options(other) == question
    assert (other.corrects, other.incorrects) == (question.incorrects, question.corrects)
    before, a, b, closing = split_prompt(question.prompt)
    assert a != b and split_prompt(other.prompt) == (before, b, a, closing)


def test_swap_exchanges_texts_that_span_several_lines():
  question = Question(3, PROMPT.format('one\n\ntwo', 'three\nfour: five'), (' (A)',), (' (B)',))
  assert swap_options(question) == Question(
    3, PROMPT.format('three\nfour: five', 'one\n\ntwo'), (' (B)',), (' (A)',)
  )


@pytest.mark.parametrize(
  ('question', 'message'),
  [
    (Question(7, 'Which?', (' (A)',), (' (B)',)), 'options of line 7 cannot .* another form'),
    (
      Question(7, PROMPT.format('a', 'b'), (' yes',), (' no',)),
      r"line 7 .* options are \[' no', ' yes",
    ),
    (Question(7, PROMPT.format('a', 'b\n (C) c'), (' (A)',), (' (B)',)), r"line 7 .*'A', 'B', 'C'"),
    (Question(7, PROMPT.format('a', 'b\n (A) c'), (' (A)',), (' (B)',)), r"line 7 .*'A', 'B', 'A'"),
    (Question(7, 'Q\n (A) a\n (B) b', (' (A)',), (' (B)',)), 'options of line 7 cannot'),
  ],
)
def test_questions_of_another_form_cannot_be_swapped(question, message, tiny):
  with pytest.raises(UserError, match=message):
    evaluate_questions(tiny, [question], swap=True)


def replace_model(monkeypatch, score):
  """Replace the model's log-likelihoods by score(prompt, option)."""
  monkeypatch.setattr(multiple_choice.likelihood, 'tokenize_pair', lambda _, *texts: texts)
  monkeypatch.setattr(multiple_choice.likelihood, 'check_pair', lambda *_: None)
  monkeypatch.setattr(
    multiple_choice.likelihood,
    'log_likelihoods',
    lambda lm, prompts, options, *, batch_tokens: list(map(score, prompts, options)),
  )


def test_a_model_that_always_answers_a_is_inconsistent(tiny, monkeypatch):
  questions = [
    Question(n, PROMPT.format('good', 'bad'), (' (A)',), (' (B)',))
    if n % 4
    else Question(n, PROMPT.format('bad', 'good'), (' (B)',), (' (A)',))
    for n in range(1, 13)
  ]
  replace_model(monkeypatch, lambda prompt, option: math.log(0.8 if option == ' (A)' else 0.2))
  result = evaluate_questions(tiny, questions, swap=True)
  assert (result['accuracy'], result['swapped']['accuracy']) == (0.75, 0.25)
  assert result['consistency'] == 0 and result['averaged_accuracy'] == 0
  assert result['calibration_error'] == pytest.approx(0.05)
  assert result['swapped']['calibration_error'] == pytest.approx(0.55)
  assert result['brier'] == pytest.approx(0.75 * 0.2**2 + 0.25 * 0.8**2)
  low, high = result['accuracy_interval']
  assert 0.3 < low < 0.75 < high <= 1


def test_a_model_that_reads_the_options_is_consistent(tiny, monkeypatch):
  questions = [
    Question(1, PROMPT.format('good', 'bad'), (' (A)',), (' (B)',)),
    Question(2, PROMPT.format('bad', 'good'), (' (B)',), (' (A)',)),
  ]
  # The model prefers "good", and slightly prefers label (A).
  replace_model(
    monkeypatch,
    lambda prompt, option: (f'{option} good' in prompt) * 2.0 + (option == ' (A)') * 0.5,
  )
  result = evaluate_questions(tiny, questions, swap=True)
  assert result['accuracy'] == result['swapped']['accuracy'] == result['consistency'] == 1
  assert result['averaged_accuracy'] == 1
  assert (
    result['items'][0]['chosen'] == ' (A)' and result['swapped']['items'][0]['chosen'] == ' (B)'
  )
  assert result['items'][0]['probability'] == pytest.approx(1 / (1 + math.exp(-2.5)))
  assert result['swapped']['items'][0]['probability'] == pytest.approx(1 / (1 + math.exp(-1.5)))


def test_right_options_share_their_probability_and_a_tie_is_wrong(tiny, monkeypatch):
  scores = {' a': 1.0, ' b': 2.0, ' c': 0.0, ' d': 2.0}
  replace_model(monkeypatch, lambda prompt, option: scores[option])
  result = evaluate_questions(
    tiny, [Question(1, 'q', (' a', ' b'), (' c',)), Question(2, 'q', (' b',), (' c', ' d'))]
  )
  first, second = result['items']
  e = np.exp([1.0, 2.0, 0.0])
  assert first['correct'] and first['chosen'] == ' b'
  assert first['probability'] == pytest.approx((e[0] + e[1]) / e.sum())
  assert first['confidence'] == pytest.approx(e[1] / e.sum())
  assert not second['correct'] and second['chosen'] == ' d'  # a tie with the right option
  assert result['accuracy'] == 0.5
  with pytest.raises(UserError, match='no question'):
    evaluate_questions(tiny, [])


def test_swapped_results_equal_those_of_swapped_questions(tiny):
  questions = [
    Question(1, PROMPT.format('I help you.', 'I hurt you.'), (' (A)',), (' (B)',)),
    Question(5, PROMPT.format('Go away.', 'Gladly, here it is.'), (' (B)',), (' (A)',)),
  ]
  result = evaluate_questions(tiny, questions, swap=True)
  swapped = evaluate_questions(tiny, [swap_options(question) for question in questions])
  for a, b in zip(result['swapped']['items'], swapped['items'], strict=True):
    assert a['id'] == b['id']
    assert a['probability'] == pytest.approx(b['probability'], abs=1e-5)
  assert 0 < result['items'][0]['probability'] < 1
  assert result['items'][0]['log_probabilities']['corrects'][0] < 0
  json.dumps(result)  # the result is written to a file


def test_calibration_error_has_the_known_value_in_simple_cases():
  rng = np.random.default_rng(0)
  confidences = rng.uniform(0.5, 1, 40000)
  assert calibration_error(confidences, rng.random(40000) < confidences) < 0.015
  assert calibration_error([0.9, 0.9, 0.6], [True, False, True]) == pytest.approx(
    (2 * 0.4 + 0.4) / 3
  )
  assert calibration_error([0.0, 1.0, 0.3], [False, True, False]) == pytest.approx(0.1)
  with pytest.raises(ValueError, match='probabilities'):
    calibration_error([1.1], [True])
  with pytest.raises(ValueError, match='equal length'):
    calibration_error([0.5], [])


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    ('{', 'x.jsonl:2 is not JSON'),
    ('1' * 5000, 'x.jsonl:2 is not JSON'),
    ('[]', 'x.jsonl:2 has no text "prompt"'),
    ('{"prompt": 3}', 'x.jsonl:2 has no text "prompt"'),
    ('{"prompt": "q", "corrects": ["a"]}', 'x.jsonl:2: "incorrects" is None'),
    ('{"prompt": "q", "corrects": [], "incorrects": ["a"]}', r'x.jsonl:2: "corrects" is \[\]'),
    ('{"prompt": "q", "corrects": "a", "incorrects": ["b"]}', 'x.jsonl:2: "corrects" is'),
    ('{"prompt": "q", "corrects": ["a"], "incorrects": [""]}', 'x.jsonl:2: "incorrects" is'),
    ('{"prompt": "q", "corrects": ["a"], "incorrects": ["a"]}', 'x.jsonl:2 has an option twice'),
  ],
)
def test_malformed_lines_are_rejected(tmp_path, line, message):
  good = json.dumps({'prompt': 'q\u2028r', 'corrects': [' a'], 'incorrects': [' b']})
  path = tmp_path / 'x.jsonl'
  path.write_text(f'{good}\n{line}\n')
  with pytest.raises(UserError, match=message):
    read_questions(path)
  path.write_text(f'\n{good}\n')
  assert read_questions(path) == [Question(2, 'q\u2028r', (' a',), (' b',))]


def test_missing_and_empty_files_are_rejected(tmp_path):
  with pytest.raises(UserError, match='there is no such file'):
    read_questions(tmp_path / 'none.jsonl')
  (tmp_path / 'empty.jsonl').write_text('\n')
  with pytest.raises(UserError, match='no question'):
    read_questions(tmp_path / 'empty.jsonl')
