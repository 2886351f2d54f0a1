"""Reward models agree with torch, whatever the batches and the mesh."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from cai_jax.dialogue import Dialogue
from cai_jax.model import lm
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.mesh import make_mesh
from cai_jax.scoring import reward
from tests.conftest import SPECIAL
from tests.families import FAMILIES, SHAPE

B, T = 3, 24
TOKENS = np.random.default_rng(0).integers(3, 300, (B, T))  # the pad token is 0
LENGTHS = np.array([24, 17, 5])
ASKED = [
  [{'role': 'user', 'content': 'How do I repair a bicycle?'}],
  [{'role': 'user', 'content': 'x ' * 50}],
  [
    {'role': 'system', 'content': 'Be plain.'},
    {'role': 'user', 'content': 'Hello'},
    {'role': 'assistant', 'content': 'Hello.'},
    {'role': 'user', 'content': 'Which cable?'},
  ],
]
CONVERSATIONS = [
  [*asked, {'role': 'assistant', 'content': text}]
  for asked in ASKED
  for text in ('Look at the brake.', 'No.', 'First look ' * 12, '')
]


@pytest.fixture(scope='module')
def make(tmp_path_factory, tiny_tokenizer):
  """`make(family, labels)` returns the folder of a tiny random classifier that torch saved."""
  folders = {}

  def get(family, labels=1, **names):
    if (key := (family, labels, *names)) in folders:
      return folders[key]
    kind, options = FAMILIES[family]
    pad, _, eos = tiny_tokenizer.convert_tokens_to_ids(list(SPECIAL))
    ids = {'pad_token_id': pad, 'bos_token_id': None, 'eos_token_id': eos}
    config = transformers.AutoConfig.for_model(
      kind, **{**SHAPE, **options, **ids}, num_labels=labels
    )
    for name, value in names.items():
      setattr(config, name, value)
    model = transformers.AutoModelForSequenceClassification.from_config(config).float()
    draw = torch.Generator().manual_seed(labels)
    with torch.no_grad():
      for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=draw)
        if weight.ndim == 2:
          weight.copy_(noise * 2 / weight.shape[1] ** 0.5)
        else:
          weight.copy_(noise * 0.5 if name.endswith('bias') else 1 + 0.2 * noise)
    folder = tmp_path_factory.mktemp('classifiers') / family
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    folders[key] = folder
    return folder

  return get


def one_device():
  return make_mesh(1, devices=jax.devices()[:1])


def torch_model(folder):
  return transformers.AutoModelForSequenceClassification.from_pretrained(
    folder, dtype=torch.float32, attn_implementation='eager'
  ).eval()


@pytest.mark.parametrize(
  ('family', 'labels'),
  [
    ('llama3', 1),
    ('qwen2', 3),
    ('gpt2', 1),
    *(
      pytest.param(*case, marks=pytest.mark.slow)  # their forwards have tests of their own
      for case in (('qwen3', 1), ('mistral', 2), ('gpt_neox', 2), ('phi3', 1), ('olmo3', 1))
    ),
  ],
)
def test_logits_agree_with_torch(make, family, labels):
  model, theirs = (f(make(family, labels)) for f in (load, torch_model))
  with torch.no_grad():
    reference = theirs(torch.tensor(TOKENS)).logits.numpy()
  values = model.logits(TOKENS)
  assert values.shape == (B, labels) and values.dtype == np.float32
  np.testing.assert_allclose(values, reference, atol=1e-4, rtol=0)
  assert np.abs(reference).max() > 0.5  # values near 0 would agree trivially
  assert (reference.std(0) > 0.1).all()
  for side in ('right', 'left'):
    mask = np.arange(T)[None] < LENGTHS[:, None]
    mask = mask if side == 'right' else mask[:, ::-1]
    tokens = np.zeros_like(TOKENS)
    for row, length in enumerate(LENGTHS):
      tokens[row, mask[row]] = TOKENS[row, :length]
    # Torch counts padding as positions, which matters where positions are learned.
    positions = torch.tensor(np.maximum(mask.cumsum(1) - 1, 0))
    inputs = {'attention_mask': torch.tensor(mask * 1), 'position_ids': positions}
    with torch.no_grad():
      reference = theirs(torch.tensor(tokens), **inputs).logits.numpy()
    np.testing.assert_allclose(model.logits(tokens, mask), reference, atol=1e-4, rtol=0)
  for row, length in enumerate(LENGTHS):  # padding does not change a value
    with torch.no_grad():
      alone = theirs(torch.tensor(TOKENS[row : row + 1, :length])).logits.numpy()
    values = model.logits(tokens, mask)[row]
    np.testing.assert_allclose(values, alone[0], atol=1e-4, rtol=0)


def load(folder, **options):
  return reward.load(folder, mesh=one_device(), **options)


def test_scores_agree_with_transformers_chat_rendering(make, tiny_tokenizer):
  model, theirs = load(make('qwen3')), torch_model(make('qwen3'))
  expected = []
  for messages in CONVERSATIONS:
    tokens = tiny_tokenizer.apply_chat_template(messages, return_dict=False)
    with torch.no_grad():
      expected.append(float(theirs(torch.tensor([tokens])).logits))
  values = model.scores(CONVERSATIONS)
  assert np.std(expected) > 0.1
  np.testing.assert_allclose(values, expected, atol=1e-4, rtol=0)
  # Batches and order do not matter.
  np.testing.assert_allclose(model.scores(CONVERSATIONS, batch_tokens=1), values, atol=1e-4)
  np.testing.assert_allclose(model.scores(CONVERSATIONS[::-1]), values[::-1], atol=1e-4)
  assert model.scores([]) == []


def test_scores_do_not_depend_on_the_mesh(make):
  mesh = make_mesh(2, 2, 2)
  model = reward.load(make('llama3', 3), mesh=mesh)
  np.testing.assert_allclose(
    model.conversation_logits(CONVERSATIONS),
    load(make('llama3', 3)).conversation_logits(CONVERSATIONS),
    atol=1e-4,
  )
  np.testing.assert_allclose(  # three rows over four shards
    model.logits(TOKENS), load(make('llama3', 3)).logits(TOKENS), atol=1e-4
  )


def test_rows_of_many_lengths_compile_few_programs(make):
  model = load(make('qwen2'))
  program = reward.logits_program('cpu')
  before = program._cache_size()
  texts = ['word ' * n for n in range(1, 50)]
  model.scores([[ASKED[0][0], {'role': 'assistant', 'content': text}] for text in texts], None, 512)
  assert program._cache_size() - before <= 3  # rows of 64, 128 and 256 tokens


def test_trailing_pad_tokens_are_ignored(make, tiny_tokenizer):
  """transformers does the same with a checkpoint whose pad token ends a conversation."""
  folder = make('mistral')
  model = load(folder)
  tokenizer = model.dialogue.tokenizer
  tokenizer.chat_template = '{{ messages[0].content }}|{{ messages[1].content }}<|endoftext|>'
  model = dataclasses.replace(model, dialogue=Dialogue(tokenizer, has_replies=False))
  messages = [ASKED[0][0], {'role': 'assistant', 'content': 'Look.'}]
  ids = model.dialogue.conversation(messages)
  assert ids[-1] == model.pad_token_id == 0
  with torch.no_grad():
    batch = torch.tensor([ids, [*ids[:-1], 0]])
    theirs = torch_model(folder)(batch, (batch != 0) * 1).logits.numpy()
  np.testing.assert_allclose(model.scores([messages])[0], theirs[0, 0], atol=1e-4)


def test_plain_style_renders_human_and_assistant_labels(make):
  model = load(make('llama3'), style='plain')
  row = model.tokenize(CONVERSATIONS[:1])[0]
  text = model.dialogue.tokenizer.decode(row)
  expected = '\n\nHuman: How do I repair a bicycle?\n\nAssistant: Look at the brake.<|im_end|>'
  assert text == expected
  np.testing.assert_allclose(model.scores(CONVERSATIONS[:1]), model.logits([row])[0], atol=1e-4)


def test_labels_are_selected_by_name_or_index(make):
  model = load(make('qwen2', 3, id2label={0: 'bad', 1: 'good', 2: 'odd'}))
  assert model.labels == ('bad', 'good', 'odd')
  logits = model.conversation_logits(CONVERSATIONS)
  for label in ('good', 1):
    assert model.scores(CONVERSATIONS, label) == logits[:, 1].tolist()
  for label in (None, 'fine', 3, -1):
    with pytest.raises(UserError, match=r"label=.* is not one of the 3 labels .*'good'"):
      model.scores(CONVERSATIONS, label)
  assert load(make('qwen2', 2)).labels == ('LABEL_0', 'LABEL_1')


def test_bfloat16_logits_are_close_to_float32(make):
  exact = load(make('qwen3')).logits(TOKENS)
  values = load(make('qwen3'), dtype='bfloat16').logits(TOKENS)
  assert values.dtype == np.float32
  assert 0 < np.abs(values - exact).max() < 0.2 * np.abs(exact).max()


def test_rows_and_conversations_that_cannot_be_scored_are_rejected(make):
  model = load(make('llama3'))
  hole = np.ones((B, T))
  hole[1, 3] = 0
  empty = np.ones((B, T))
  empty[2] = 0
  for tokens, mask, message in (
    (TOKENS[0], None, r'tokens \(24,\)'),
    (TOKENS, np.ones((B, T - 1)), r'mask \(3, 23\)'),
    (np.full((1, 2), 384), None, r'384\.\.384, but the vocabulary is 0\.\.383'),
    (TOKENS, hole, 'row 1: .* 2 runs'),
    (TOKENS, empty, 'row 2: .* 0 runs'),
  ):
    with pytest.raises(ValueError, match=message):
      model.logits(tokens, mask)
  with pytest.raises(UserError, match='Conversation 1: The dialogue must end with a reply'):
    model.scores([CONVERSATIONS[0], ASKED[0]])
  long = [ASKED[0][0], {'role': 'assistant', 'content': 'word ' * 400}]
  with pytest.raises(UserError, match=r'Conversation 0 has \d+ tokens, but .* reads 1 to 256'):
    model.scores([long])
  with pytest.raises(ValueError, match='batch_tokens=0'):
    model.scores(CONVERSATIONS, batch_tokens=0)


@pytest.mark.parametrize(
  ('weights', 'settings', 'message'),
  [
    ({'score.bias': np.zeros(1, np.float32)}, {}, "'score.bias' does not belong"),
    ({'lm_head.weight': np.zeros((384, 32), np.float32)}, {}, "'lm_head.weight' does not belong"),
    ({'score.weight': None}, {}, "'score.weight' is missing"),
    ({'model.norm.weight': None}, {}, "'model.norm.weight' is missing"),
    ({}, {'id2label': {'0': 'a', '1': 'b'}}, r"'score.weight' has shape \(1, 32\), .* \(2, 32\)"),
    ({}, {'id2label': {'1': 'a'}}, 'id2label='),
    ({}, {'architectures': ['LlamaForCausalLM']}, r"LlamaForCausalLM.*'LlamaForSequenceClass"),
    ({}, {'architectures': None}, 'architectures=None'),
    ({}, {'model_type': 'gptj'}, "'gptj' is not supported"),
  ],
)
def test_checkpoints_with_wrong_weights_or_settings_are_rejected(
  make, tmp_path, weights, settings, message
):
  source = make('llama3')
  for file in source.iterdir():
    (tmp_path / file.name).write_bytes(file.read_bytes())
  tensors = {**safetensors.numpy.load_file(source / 'model.safetensors'), **weights}
  tensors = {name: x for name, x in tensors.items() if x is not None}
  safetensors.numpy.save_file(tensors, tmp_path / 'model.safetensors')
  config = json.loads((source / 'config.json').read_text())
  (tmp_path / 'config.json').write_text(json.dumps({**config, **settings}))
  with pytest.raises(UserError, match=message):
    load(tmp_path)


def test_a_language_model_is_not_loaded_as_a_reward_model(make, tiny_hf_folder):
  with pytest.raises(UserError, match=r"LlamaForCausalLM.*'LlamaForSequenceClassification'"):
    load(tiny_hf_folder('llama3'))
  with pytest.raises(UserError, match='SequenceClassification.*LlamaForCausalLM'):
    lm.load(make('llama3'), mesh=one_device())
