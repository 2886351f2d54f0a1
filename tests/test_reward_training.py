"""Reward models: their head, what they start from, their loss, and the folders that they end in."""

import dataclasses
import json
import random
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from cai_jax.data.preferences import Comparison
from cai_jax.dialogue import Dialogue
from cai_jax.model import classifier as classifiers
from cai_jax.model import lora
from cai_jax.model.score_head import INITIAL_STD, split_head
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.mesh import make_mesh
from cai_jax.scoring import reward
from cai_jax.tiny import world
from cai_jax.tiny.files import MODELS
from cai_jax.training import reward_model
from cai_jax.training.prefer_config import PreferConfig
from cai_jax.training.preference import prefer
from cai_jax.training.state import init_state
from cai_jax.training.trainable import divide_model
from tests.families import FAMILIES, REPEATED, SIMILAR
from tests.preference_setup import PREFER
from tests.training_setup import one_device

CONVERSATIONS = [
  [{'role': 'user', 'content': asked}, {'role': 'assistant', 'content': text}]
  for asked in ('How do I repair a bicycle?', 'Hello')
  for text in ('First look at the brake.', 'No.', 'words ' * 20)
]
QUICK = ('llama3', 'gpt2', 'qwen3')  # the others are slow tests


def starting_from(lm, seed=0):
  """Return a language model as a reward model whose scores are of the size of 1."""
  start = reward_model.add_head(lm, seed)
  return start._replace(classifier=start.classifier._replace(score=start.classifier.score * 50))


def torch_scores(folder, conversations):
  """Return what transformers scores a padded batch of conversations with, as a user would."""
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  model = transformers.AutoModelForSequenceClassification.from_pretrained(
    folder, dtype=torch.float32, attn_implementation='eager'
  ).eval()
  assert model.config.num_labels == 1
  assert model.config.pad_token_id == tokenizer.pad_token_id is not None
  texts = [tokenizer.apply_chat_template(c, tokenize=False) for c in conversations]
  batch = tokenizer(texts, padding=True, return_tensors='pt', add_special_tokens=False)
  with torch.no_grad():
    return model(**batch).logits[:, 0].numpy()


@pytest.mark.parametrize(
  'family',
  [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name in FAMILIES
    if name not in (*REPEATED, *SIMILAR) or name in QUICK
  ],
)
def test_transformers_scores_a_saved_reward_model_alike(family, load, tmp_path):
  lm = load(family)
  if classifiers.FAMILIES[lm.config.family].classifier is None:
    with pytest.raises(UserError, match='has no sequence classifier of the family'):
      reward_model.add_head(lm, 0)
    return
  classifiers.save_classifier(starting_from(lm).classifier, tmp_path)
  expected = torch_scores(tmp_path, CONVERSATIONS)
  assert expected.std() > 0.1  # equal scores would agree trivially
  model = reward.load(tmp_path, mesh=one_device())
  assert model.labels == ('reward',)
  np.testing.assert_allclose(model.scores(CONVERSATIONS), expected, atol=1e-4)


def test_a_model_without_padding_token_pads_with_the_end_of_replies(load, tmp_path):
  lm = load('llama3')
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=lm.tokenizer.backend_tokenizer,
    eos_token='<|im_end|>',
    # As many templates: nothing follows the token that ends the reply.
    chat_template=lm.tokenizer.chat_template.replace("'<|im_end|>\n'", "'<|im_end|>'"),
  )
  assert tokenizer.pad_token is None
  start = starting_from(dataclasses.replace(lm, tokenizer=tokenizer, eos_token_ids=(2,)))
  classifiers.save_classifier(start.classifier, tmp_path)
  assert tokenizer.pad_token is None  # the caller's is not changed
  assert json.loads((tmp_path / 'config.json').read_text())['pad_token_id'] == 2
  model = reward.load(tmp_path, mesh=one_device())
  scores = model.scores(CONVERSATIONS)
  np.testing.assert_allclose(scores, torch_scores(tmp_path, CONVERSATIONS), atol=1e-4)
  with pytest.raises(UserError, match='neither a padding token nor a token that ends replies'):
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    reward_model.add_head(dataclasses.replace(lm, tokenizer=tokenizer, eos_token_ids=()), 0)


def test_a_new_head_is_random_and_seeded(load):
  lm = load('qwen2')  # its output layer is not tied, and a reward model has none
  first, again, other = (reward_model.add_head(lm, seed) for seed in (1, 1, 2))
  np.testing.assert_array_equal(first.classifier.score, again.classifier.score)
  assert first.fingerprint == again.fingerprint != other.fingerprint
  assert not np.array_equal(first.classifier.score, other.classifier.score)
  assert first.classifier.score.shape == (1, 32)
  assert 0.5 * INITIAL_STD < first.classifier.score.std() < 2 * INITIAL_STD
  assert 'head' in lm.params and 'head' not in first.params


def test_a_reward_model_starts_from_either_kind_of_model(load, tiny_hf_folder, tmp_path):
  mesh = one_device()
  start = reward_model.load_start(tiny_hf_folder('llama3'), mesh, 0)
  info = reward_model.inspect_start(tiny_hf_folder('llama3'))
  assert info.config == start.classifier.info.config and info.labels == ('reward',)
  classifiers.save_classifier(start.classifier, tmp_path)
  again = reward_model.load_start(tmp_path, mesh, seed=1)
  assert reward_model.inspect_start(tmp_path).config == info.config
  jax.tree.map(np.testing.assert_array_equal, again.params, start.params)
  assert again.fingerprint != start.fingerprint


def edit_folder(folder, tensors=None, **settings):
  """Change tensors and entries of config.json of a model's folder."""
  if tensors:
    path = folder / 'model.safetensors'
    safetensors.numpy.save_file({**safetensors.numpy.load_file(path), **tensors}, path)
  path = folder / 'config.json'
  path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def test_models_that_no_reward_model_can_start_from_are_refused(load, tmp_path):
  good = tmp_path / 'good'
  classifiers.save_classifier(reward_model.add_head(load('llama3'), 0).classifier, good)
  wide = {'score.weight': np.zeros((1, 48), np.float32)}
  three = {'score.weight': np.zeros((3, 32), np.float32)}
  labels = {'num_labels': 3, 'id2label': {'0': 'a', '1': 'b', '2': 'c'}, 'label2id': None}
  for name, tensors, settings, message in (
    ('wide', wide, {}, r"'score.weight' has shape \(1, 48\), but config.json implies \(1, 32\)"),
    ('three', three, {}, r"'score.weight' has shape \(3, 32\), but config.json implies \(1, 32\)"),
    ('labels', three, labels, r"classifier with 3 labels \('a', 'b', 'c'\)"),
    ('tokens', {}, {'architectures': ['LlamaForTokenClassification']}, 'architectures='),
  ):
    folder = shutil.copytree(good, tmp_path / name)
    edit_folder(folder, tensors, **settings)
    for read in (
      reward_model.inspect_start,
      lambda folder: reward_model.load_start(folder, one_device(), 0),
    ):
      with pytest.raises(UserError, match=message):
        read(folder)


@pytest.mark.parametrize('rank', [0, 2])
def test_the_head_is_trained_with_and_without_adapters(load, rank):
  lm = load('llama3')
  start = starting_from(lm)
  config = dataclasses.replace(PREFER, objective='reward', lora_rank=rank, ema=0.5)
  mesh = make_mesh(2, 2, 2)
  model, params = start.classifier.info.config, jax.device_get(start.params)
  divided = divide_model(model, params, config, mesh)
  assert set(divided.params) >= {'score'}
  state = init_state(divided.params, config, mesh)
  assert state.ema['score']['table'].sharding.is_fully_replicated
  rest, head = split_head(divided.full_params(state))
  np.testing.assert_array_equal(head['table'], start.classifier.score)
  assert jax.tree.structure(rest) == jax.tree.structure(start.classifier.params)
  if rank:
    assert 'score' not in divided.frozen
    adapters, others = lora.split(divided.params)
    assert adapters and list(others) == ['score']


def draw_comparisons(split, count, seed):
  """Draw comparisons of the embedded world: an answer without violations, and one with some."""
  rng, pairs = random.Random(seed), []
  triples = world.list_triples(split)
  while len(pairs) < count:
    request = world.draw_request(rng, rng.choice(triples), num_baits=1 + len(pairs) % 2)
    prompt = world.write_dialogue(rng, request, world.draw_request(rng, rng.choice(triples)))
    answers = [world.write_answer(rng, request) for _ in range(8)]
    good = [a for a in answers if not any(s.role == 'violation' for s in a)]
    bad = [a for a in answers if any(s.role == 'violation' for s in a)]
    if good and bad:
      # Every other label is the other way round, so the first side is not always the better one.
      sides = [world.render(good[0]), world.render(bad[0])][:: 1 - 2 * (len(pairs) % 2)]
      probability = 1.0 - len(pairs) % 2
      pairs.append(Comparison(f'pair {len(pairs)}', tuple(prompt), *sides, probability))
  return pairs


@pytest.mark.slow
def test_a_reward_model_learns_the_rules_of_the_embedded_world(tmp_path):
  mesh = one_device()
  start = reward_model.load_start(MODELS['tiny-small'], mesh, 0)
  dialogue = reward.make_dialogue(start.classifier.info)
  config = PreferConfig(
    objective='reward', epochs=4, batch_size=8, max_length=512, learning_rate=2e-3
  )
  built = reward_model.build_reward_units(
    draw_comparisons('train', 400, 0), dialogue, start.classifier.info, max_length=512
  )
  params, summary = prefer(start.lm, built.units, config, tmp_path / 'run')
  trained = reward_model.finish_reward_model(start, params)
  classifiers.save_classifier(trained, tmp_path / 'reward_model')
  model = reward.load(tmp_path / 'reward_model', mesh=mesh)
  pairs = draw_comparisons('eval', 200, 1)

  def score(side):
    replies = [getattr(pair, side) for pair in pairs]
    return np.array(model.scores(reward.append_replies([p.prompt for p in pairs], replies)))

  right = (score('chosen') > score('rejected')) == np.array([p.probability > 0.5 for p in pairs])
  assert right.mean() > 0.9


def test_units_of_a_reward_model_are_the_tokens_that_are_scored(load):
  info = reward_model.add_head(load('llama3'), 0).classifier.info
  dialogue = reward.make_dialogue(info)
  asked = ({'role': 'user', 'content': 'Hello'},)
  pairs = [
    Comparison('a', asked, 'Yes.', 'No.', 0.75, margin=2.0),
    Comparison('b', asked, 'Yes. ' * 40, 'No.', margin=1.0),
  ]
  built = reward_model.build_reward_units(pairs, dialogue, info, max_length=80, margins=True)
  assert built.counts == {'rows': 2, 'kept': 1, 'dropped': {'too_long': 1}}
  (unit,) = built.units
  for segment, text in zip(unit.segments, ('Yes.', 'No.'), strict=True):
    messages = [*asked, {'role': 'assistant', 'content': text}]
    expected = load('llama3').tokenizer.apply_chat_template(messages, return_dict=False)
    assert segment.tokens.tolist() == expected
    assert np.flatnonzero(segment.loss_mask).tolist() == [len(expected) - 1]
  assert unit.values == {'probability': (0.75, 0.25), 'margin': (2.0, -2.0)}
  with pytest.raises(UserError, match="comparison 'a' has no margin"):
    bare = [dataclasses.replace(pairs[0], margin=None)]
    reward_model.build_reward_units(bare, dialogue, info, max_length=80, margins=True)
  other = transformers.PreTrainedTokenizerFast.from_pretrained(MODELS['tiny'])
  with pytest.raises(UserError, match='tokenizer of another model: it has 1,024 tokens'):
    wrong = Dialogue(other, has_replies=False)
    reward_model.build_reward_units(pairs, wrong, info, max_length=80)
