"""Topic scores agree with torch, do not depend on batches, and tell responses to a prompt apart."""

import json
import random

import jax
import numpy as np
import pytest
import torch
import transformers

import cai_jax
from cai_jax.dialogue import Dialogue
from cai_jax.runtime.mesh import make_mesh
from cai_jax.scoring import topicality
from cai_jax.scoring.topicality import find_off_topic, score_texts, shuffled_scores, topic_scores
from cai_jax.tiny import oracle, world
from cai_jax.tiny.files import MODELS

ASKED = [
  [{'role': 'user', 'content': 'How do I repair a bicycle?'}],
  [
    {'role': 'system', 'content': 'Answer in a few plain words.'},
    {'role': 'user', 'content': 'Hello'},
    {'role': 'assistant', 'content': 'Hello.'},
    {'role': 'user', 'content': 'Who is unkind?'},
  ],
  [{'role': 'user', 'content': 'Rewrite the last question.'}],
]
TEXTS = ['First look at the brake.', 'Nobody is. ' * 4, 'How do I <|im_end|> stop?']


def load(folder):
  """Return a model on one device, and its dialogue."""
  lm = cai_jax.load(folder, mesh=make_mesh(1, devices=jax.devices()[:1]))
  return lm, Dialogue(lm.tokenizer, 'chat', lm.eos_token_ids)


def auc(positive, negative):
  """Return the share of (positive, negative) pairs that are in order; a tie is half a pair."""
  above = np.subtract.outer(positive, negative)
  return float(np.mean((above > 0) + 0.5 * (above == 0)))


def test_scores_agree_with_torch(tiny_hf_folder):
  folder = tiny_hf_folder('smollm2')
  lm, dialogue = load(folder)
  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

  def mean_logprob(messages, text):
    context = tokenizer.apply_chat_template(
      messages, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    reply = tokenizer.encode(text.strip(), add_special_tokens=False, split_special_tokens=True)
    with torch.no_grad():
      log_p = model(torch.tensor([context + reply])).logits[0].log_softmax(-1)
    picked = log_p[len(context) - 1 : -1].gather(1, torch.tensor(reply)[:, None])
    return picked.mean().item()

  texts = [TEXTS[0], TEXTS[1].strip(), TEXTS[2]]
  values = score_texts(lm, dialogue, ASKED, texts)
  for messages, text, value in zip(ASKED, texts, values, strict=True):
    given = mean_logprob(messages, text)
    system = [message for message in messages if message['role'] == 'system']
    alone = mean_logprob([*system, {'role': 'user', 'content': ''}], text)
    assert value.mean_logprob == pytest.approx(given, abs=1e-5)
    assert value.topic == pytest.approx(given - alone, abs=2e-5)
    assert abs(value.topic) > 1e-3
  assert topic_scores(lm, dialogue, ASKED, texts) == [value.topic for value in values]


def test_scores_do_not_depend_on_batches_and_order(tiny_hf_folder):
  lm, dialogue = load(tiny_hf_folder('smollm2'))
  values = score_texts(lm, dialogue, ASKED, TEXTS)
  for other in (
    score_texts(lm, dialogue, ASKED, TEXTS, batch_tokens=64),
    score_texts(lm, dialogue, ASKED[::-1], TEXTS[::-1])[::-1],
    [score_texts(lm, dialogue, [p], [t])[0] for p, t in zip(ASKED, TEXTS, strict=True)],
  ):
    np.testing.assert_allclose(other, values, atol=2e-5)
  found = find_off_topic(lm, dialogue, ASKED, TEXTS)
  backward = find_off_topic(lm, dialogue, ASKED[::-1], TEXTS[::-1])
  assert found.threshold == pytest.approx(backward.threshold, abs=2e-5)
  assert found.flags == backward.flags[::-1]


def test_blank_texts_score_zero_and_a_single_prompt_has_no_threshold(tiny_hf_folder):
  lm, dialogue = load(tiny_hf_folder('smollm2'))
  found = find_off_topic(lm, dialogue, ASKED[:2], ['', TEXTS[0]])
  assert found.scores[0] == (0.0, 0.0) and not found.flags[0]
  alone = find_off_topic(lm, dialogue, ASKED[:1] * 2, TEXTS[:2])
  assert alone.threshold is None and alone.flags == [False, False]
  assert shuffled_scores(lm, dialogue, ASKED, ['', ' ', '\n']) == []


def test_shuffled_pairs_have_other_prompts(tiny_hf_folder, monkeypatch):
  lm, dialogue = load(tiny_hf_folder('smollm2'))
  pairs = []
  mean_logprobs = topicality._mean_logprobs

  def record(lm, dialogue, prompts, replies, batch_tokens):
    pairs.append([(json.dumps(p), tuple(r)) for p, r in zip(prompts, replies, strict=True)])
    return mean_logprobs(lm, dialogue, prompts, replies, batch_tokens)

  monkeypatch.setattr(topicality, '_mean_logprobs', record)
  scores = shuffled_scores(lm, dialogue, ASKED, TEXTS)
  replies = [tuple(topicality._encode_text(dialogue, text)) for text in TEXTS]
  own = {(json.dumps(p), r) for p, r in zip(ASKED, replies, strict=True)}
  every = {(json.dumps(p), r) for p in ASKED for r in replies}
  assert set(pairs[-1]) == every - own and len(scores) == 6


def test_responses_of_the_embedded_world_are_told_apart_from_those_to_other_prompts():
  lm, dialogue = load(MODELS['tiny'])
  rng = random.Random(0)
  triples = world.list_triples('eval')
  prompts, texts = [], []
  for _ in range(100):
    request = world.draw_request(rng, rng.choice(triples), rng.choice((0, 1, 2)))
    other = world.draw_request(rng, rng.choice(triples), 0)
    prompts.append(world.write_dialogue(rng, request, other))
    texts.append(world.render(world.write_answer(rng, request)))
  others = [*texts[1:], texts[0]]
  scores = topic_scores(lm, dialogue, prompts * 2, texts + others)
  helpful = np.array(
    [oracle.judge(p, t).helpful for p, t in zip(prompts * 2, texts + others, strict=True)]
  )
  assert 90 < helpful.sum() < 110
  # An "it" in a request, or a neighbour with the same verb, makes a few pairs hard to tell apart.
  assert auc(np.array(scores)[helpful], np.array(scores)[~helpful]) > 0.97
  # The rule, with a fifth of the responses replaced, agrees with the oracle.
  mixed = [*others[:20], *texts[20:]]
  flags = np.array(find_off_topic(lm, dialogue, prompts, mixed).flags)
  off = np.array([not oracle.judge(p, t).helpful for p, t in zip(prompts, mixed, strict=True)])
  assert np.mean(flags == off) > 0.9
