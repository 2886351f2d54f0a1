"""Multiple choice by likelihood: published files against torch, order of options, calibration."""

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
from cai_jax.evaluation import multiple_choice
from cai_jax.evaluation.multiple_choice import (
  Item,
  calibration_error,
  evaluate,
  read_items,
  swap_options,
)
from cai_jax.model import lm as lm_lib
from cai_jax.runtime.mesh import make_mesh

PROMPT = 'Which is kind?\n\nOptions:\n (A) {}\n (B) {}\n\nThe answer is:'
LONGEST = 512  # positions of the random model


@pytest.fixture(scope='module')
def tiny():
  folder = pathlib.Path(cai_jax.__file__).parent / 'tiny' / 'model'
  return lm_lib.load(folder, mesh=make_mesh(1, devices=jax.devices()[:1]))


@pytest.fixture
def real(data_dir, tmp_path):
  """(our model, torch's): a random Llama with a real tokenizer, whose weights torch wrote."""
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
    max_position_embeddings=LONGEST,
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


def by_torch(model, tokenizer, prompt, option):
  """log P of the option's tokens, with nothing of ours."""
  whole = tokenizer.encode(prompt + option, split_special_tokens=True)
  alone = tokenizer.encode(prompt, split_special_tokens=True)
  assert whole[: len(alone)] == alone  # as it is in all of the published files
  with torch.no_grad():
    log_p = model(torch.tensor([whole])).logits[0].log_softmax(-1)
  return sum(log_p[i - 1, whole[i]].item() for i in range(len(alone), len(whole)))


def test_published_questions_agree_with_torch(real, data_dir):
  lm, model = real
  items = read_items(data_dir('cai_paper') / 'evals' / '438HHHEvaluations.jsonl')
  assert len(items) == 438
  length = functools.cache(lambda item: len(lm.tokenizer.encode(item.prompt)))
  by_length = sorted(items, key=length)
  fitting = [item for item in by_length if length(item) + 8 <= LONGEST]
  chosen = [*by_length[:40], fitting[-1]]
  assert length(chosen[-1]) > LONGEST - 40
  found = evaluate(lm, chosen)
  differences, margins = [], []
  for item, row in zip(chosen, found['items'], strict=True):
    assert row['id'] == item.line
    expected = {o: by_torch(model, lm.tokenizer, item.prompt, o) for o in item.options}
    for kind in ('corrects', 'incorrects'):
      for option, value in zip(getattr(item, kind), row['log_probabilities'][kind], strict=True):
        differences.append(abs(value - expected[option]))
    right, wrong = expected[item.corrects[0]], expected[item.incorrects[0]]
    margins.append(abs(right - wrong))
    assert row['correct'] == (right > wrong)
    assert row['probability'] == pytest.approx(1 / (1 + math.exp(wrong - right)), abs=1e-4)
  print(f'largest difference {max(differences):.2e} nats of {len(differences)}')
  assert max(differences) < 1e-4
  assert np.mean(margins) > 0.5  # options that are all alike would agree for nothing
  assert found['accuracy'] == np.mean([row['correct'] for row in found['items']])
  with pytest.raises(
    ValueError, match=rf'line {by_length[-1].line}, option .* exceed the {LONGEST}'
  ):
    evaluate(lm, by_length[-1:])


def parts(prompt):
  before, rest = prompt.split('\n (A) ')
  a, rest = rest.split('\n (B) ')
  b, end = rest.rsplit('\nThe answer is', 1)
  return before, a, b.rstrip('\n'), end


@pytest.mark.parametrize('name', ['438HHHEvaluations', 'HarmfulVsEthical'])
def test_every_published_question_can_be_swapped(data_dir, name):
  items = read_items(data_dir('cai_paper') / 'evals' / f'{name}.jsonl')
  for item in items:
    other = swap_options(item)
    assert other != item and swap_options(other) == item
    assert (other.corrects, other.incorrects) == (item.incorrects, item.corrects)
    before, a, b, closing = parts(item.prompt)
    assert a != b and parts(other.prompt) == (before, b, a, closing)


def test_swap_exchanges_texts_of_several_lines():
  item = Item(3, PROMPT.format('one\n\ntwo', 'three\nfour: five'), (' (A)',), (' (B)',))
  assert swap_options(item) == Item(
    3, PROMPT.format('three\nfour: five', 'one\n\ntwo'), (' (B)',), (' (A)',)
  )


@pytest.mark.parametrize(
  ('item', 'message'),
  [
    (Item(7, 'Which?', (' (A)',), (' (B)',)), 'line 7 cannot .* another form'),
    (
      Item(7, PROMPT.format('a', 'b'), (' yes',), (' no',)),
      r"line 7 .* options are \[' no', ' yes",
    ),
    (Item(7, PROMPT.format('a', 'b\n (C) c'), (' (A)',), (' (B)',)), r"line 7 .*'A', 'B', 'C'"),
    (Item(7, PROMPT.format('a', 'b\n (A) c'), (' (A)',), (' (B)',)), r"line 7 .*'A', 'B', 'A'"),
    (Item(7, 'Q\n (A) a\n (B) b', (' (A)',), (' (B)',)), 'line 7 cannot'),
  ],
)
def test_what_cannot_be_swapped_is_told(item, message, tiny):
  with pytest.raises(ValueError, match=message):
    evaluate(tiny, [item], swap=True)


def fake(monkeypatch, score):
  """Puts score(prompt, option) in the place of the model's log-likelihoods."""
  monkeypatch.setattr(multiple_choice.likelihood, 'tokenise', lambda _, *texts: texts)
  monkeypatch.setattr(multiple_choice.likelihood, 'check_pair', lambda *_: None)
  monkeypatch.setattr(
    multiple_choice.likelihood,
    'log_likelihoods',
    lambda lm, prompts, options, *, batch_tokens: list(map(score, prompts, options)),
  )


def test_a_model_that_always_says_a_is_found_out(tiny, monkeypatch):
  items = [
    Item(n, PROMPT.format('good', 'bad'), (' (A)',), (' (B)',))
    if n % 4
    else Item(n, PROMPT.format('bad', 'good'), (' (B)',), (' (A)',))
    for n in range(1, 13)
  ]
  fake(monkeypatch, lambda prompt, option: math.log(0.8 if option == ' (A)' else 0.2))
  found = evaluate(tiny, items, swap=True)
  assert (found['accuracy'], found['swapped']['accuracy']) == (0.75, 0.25)
  assert found['consistency'] == 0 and found['averaged_accuracy'] == 0
  assert found['calibration_error'] == pytest.approx(0.05)
  assert found['swapped']['calibration_error'] == pytest.approx(0.55)
  assert found['brier'] == pytest.approx(0.75 * 0.2**2 + 0.25 * 0.8**2)
  low, high = found['accuracy_interval']
  assert 0.3 < low < 0.75 < high <= 1


def test_a_model_that_reads_is_consistent(tiny, monkeypatch):
  items = [
    Item(1, PROMPT.format('good', 'bad'), (' (A)',), (' (B)',)),
    Item(2, PROMPT.format('bad', 'good'), (' (B)',), (' (A)',)),
  ]
  # It prefers what is good, and a little more where that is (A).
  fake(
    monkeypatch,
    lambda prompt, option: (f'{option} good' in prompt) * 2.0 + (option == ' (A)') * 0.5,
  )
  found = evaluate(tiny, items, swap=True)
  assert found['accuracy'] == found['swapped']['accuracy'] == found['consistency'] == 1
  assert found['averaged_accuracy'] == 1
  assert found['items'][0]['chosen'] == ' (A)' and found['swapped']['items'][0]['chosen'] == ' (B)'
  assert found['items'][0]['probability'] == pytest.approx(1 / (1 + math.exp(-2.5)))
  assert found['swapped']['items'][0]['probability'] == pytest.approx(1 / (1 + math.exp(-1.5)))


def test_several_options_and_ties(tiny, monkeypatch):
  scores = {' a': 1.0, ' b': 2.0, ' c': 0.0, ' d': 2.0}
  fake(monkeypatch, lambda prompt, option: scores[option])
  found = evaluate(tiny, [Item(1, 'q', (' a', ' b'), (' c',)), Item(2, 'q', (' b',), (' c', ' d'))])
  first, second = found['items']
  e = np.exp([1.0, 2.0, 0.0])
  assert first['correct'] and first['chosen'] == ' b'
  assert first['probability'] == pytest.approx((e[0] + e[1]) / e.sum())
  assert first['confidence'] == pytest.approx(e[1] / e.sum())
  assert not second['correct'] and second['chosen'] == ' d'  # as likely as the right one
  assert found['accuracy'] == 0.5
  with pytest.raises(ValueError, match='no question'):
    evaluate(tiny, [])


def test_embedded_model_answers_both_orders(tiny):
  items = [
    Item(1, PROMPT.format('I help you.', 'I hurt you.'), (' (A)',), (' (B)',)),
    Item(5, PROMPT.format('Go away.', 'Gladly, here it is.'), (' (B)',), (' (A)',)),
  ]
  found = evaluate(tiny, items, swap=True)
  swapped = evaluate(tiny, [swap_options(item) for item in items])
  for a, b in zip(found['swapped']['items'], swapped['items'], strict=True):
    assert a['id'] == b['id']
    assert a['probability'] == pytest.approx(b['probability'], abs=1e-5)
  assert 0 < found['items'][0]['probability'] < 1
  assert found['items'][0]['log_probabilities']['corrects'][0] < 0
  json.dumps(found)  # goes into a report as it is


def test_calibration_error():
  rng = np.random.default_rng(0)
  confidences = rng.uniform(0.5, 1, 40000)
  assert calibration_error(confidences, rng.random(40000) < confidences) < 0.015
  assert calibration_error([0.9, 0.9, 0.6], [True, False, True]) == pytest.approx(
    (2 * 0.4 + 0.4) / 3
  )
  assert calibration_error([0.0, 1.0, 0.3], [False, True, False]) == pytest.approx(0.1)
  with pytest.raises(ValueError, match='probabilities'):
    calibration_error([1.1], [True])
  with pytest.raises(ValueError, match='equally long'):
    calibration_error([0.5], [])


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    ('{', 'x.jsonl:2 is no JSON'),
    ('[]', 'x.jsonl:2 has no text "prompt"'),
    ('{"prompt": 3}', 'x.jsonl:2 has no text "prompt"'),
    ('{"prompt": "q", "corrects": ["a"]}', 'x.jsonl:2: "incorrects" is None'),
    ('{"prompt": "q", "corrects": [], "incorrects": ["a"]}', r'x.jsonl:2: "corrects" is \[\]'),
    ('{"prompt": "q", "corrects": "a", "incorrects": ["b"]}', 'x.jsonl:2: "corrects" is'),
    ('{"prompt": "q", "corrects": ["a"], "incorrects": [""]}', 'x.jsonl:2: "incorrects" is'),
    ('{"prompt": "q", "corrects": ["a"], "incorrects": ["a"]}', 'x.jsonl:2 has an option twice'),
  ],
)
def test_malformed_files(tmp_path, line, message):
  good = json.dumps({'prompt': 'q\u2028r', 'corrects': [' a'], 'incorrects': [' b']})
  path = tmp_path / 'x.jsonl'
  path.write_text(f'{good}\n{line}\n')
  with pytest.raises(ValueError, match=message):
    read_items(path)
  path.write_text(f'\n{good}\n')
  assert read_items(path) == [Item(2, 'q\u2028r', (' a',), (' b',))]


def test_absent_and_empty_files(tmp_path):
  with pytest.raises(ValueError, match='cannot be read'):
    read_items(tmp_path / 'none.jsonl')
  (tmp_path / 'empty.jsonl').write_text('\n')
  with pytest.raises(ValueError, match='no question'):
    read_items(tmp_path / 'empty.jsonl')
