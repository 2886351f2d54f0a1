"""Chat templates, tokenizers and messages that the tests of dialogues share."""

import functools
import json
import os
import pathlib

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

DATA = pathlib.Path(
  os.environ.get('CAI_JAX_DATA', pathlib.Path(__file__).parents[1] / '../shared/data')
)
PHI = DATA / 'tokenizers' / 'phi-3-mini'
CHATML = (
  "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
  "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_2 = (
  "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
  '{% set turns = messages[1:] %}{% else %}{% set turns = messages %}{% endif %}'
  "{% for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
  "{{ raise_exception('roles must alternate') }}{% endif %}"
  '{% if loop.index0 == 0 and system is defined %}'
  "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m.content %}"
  '{% else %}{% set content = m.content %}{% endif %}'
  "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
  "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
  '{{ bos_token }}{% for m in messages %}'
  "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}"
  '{% endfor %}{% if add_generation_prompt %}'
  "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# Like many reasoning templates, this one drops the reasoning of earlier replies, writes an empty
# reasoning block into a last reply that has none, and rejects system messages.
REASONING = (
  "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}"
  "{% endif %}{% set content = m.content %}{% set thought = '' %}"
  "{% if m.role == 'assistant' and '</think>' in content %}"
  "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
  "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
  "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}"
  "{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ content + '<|im_end|>\n' }}"
  "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = [
  'Human: How do I bake bread? Assistant: Mix flour, water and salt, then wait. user system\n\n',
  "That's a good question! I'm sorry, I can't help you with that; here is something else.\n",
  '<|im_start|> is a mark, <|im_end|> too. [INST] and [/INST] <<SYS>> 1 2 3 4 5 6 7 8 9 0',
] * 4
WORDS = r"'s|'t|'m| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def special(text, **flags):
  return AddedToken(text, special=True, normalized=False, **flags)


def byte_level(template, eos, bos=None, marks=()):
  """Return a byte-level BPE tokenizer, as used by GPT-2, Qwen and Llama 3."""
  t = Tokenizer(models.BPE())
  t.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(Regex(WORDS), 'isolated'),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  t.decoder = decoders.ByteLevel()
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  t.train_from_iterator(CORPUS, BpeTrainer(vocab_size=420, initial_alphabet=alphabet))
  t.add_tokens([mark for mark in marks if not mark.special])
  t.add_special_tokens([mark for mark in marks if mark.special])
  return PreTrainedTokenizerFast(
    tokenizer_object=t, eos_token=eos, bos_token=bos, chat_template=template
  )


def sentencepiece_like(prepend, template=LLAMA_2):
  """Return a BPE tokenizer with byte fallback that prepends a space, as used by Llama 2.

  Args:
    prepend: 'always' (before each part of a text, by a normalizer) or 'first' (once, at its start).
    template: the chat template.
  """
  t = Tokenizer(models.BPE(byte_fallback=True, unk_token='<unk>', fuse_unk=True))
  space = '\u2581'
  if prepend == 'always':
    t.normalizer = normalizers.Sequence(
      [normalizers.Prepend(space), normalizers.Replace(' ', space)]
    )
  else:
    t.pre_tokenizer = pre_tokenizers.Metaspace(space, prepend_scheme='first', split=False)
  t.decoder = decoders.Sequence(
    [
      decoders.Replace(space, ' '),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(' ', 1, 0),
    ]
  )
  specials = ['<unk>', '<s>', '</s>', *(f'<0x{i:02X}>' for i in range(256))]
  trained = Tokenizer(models.BPE(unk_token='<unk>'))  # its pieces do not span word boundaries
  trained.pre_tokenizer = pre_tokenizers.Metaspace(space, prepend_scheme='always')
  words = [line.replace('\n', ' ') for line in CORPUS]
  trained.train_from_iterator(words, BpeTrainer(vocab_size=600, special_tokens=specials[:3]))
  spec = {**json.loads(t.to_str()), 'added_tokens': json.loads(trained.to_str())['added_tokens']}
  spec['model'] |= {
    name: json.loads(trained.to_str())['model'][name] for name in ('vocab', 'merges')
  }
  vocab = spec['model']['vocab']
  for byte in specials[3:]:
    vocab[byte] = len(vocab)
  t = Tokenizer.from_str(json.dumps(spec))
  return PreTrainedTokenizerFast(
    tokenizer_object=t, bos_token='<s>', eos_token='</s>', unk_token='<unk>', chat_template=template
  )


MAKERS = {
  'chatml': lambda: byte_level(
    CHATML,
    '<|endoftext|>',
    marks=[special('<|endoftext|>'), special('<|im_start|>'), special('<|im_end|>')],
  ),
  'llama_2_first': lambda: sentencepiece_like('first'),
  'llama_2_always': lambda: sentencepiece_like('always'),
  'llama_3': lambda: byte_level(
    LLAMA_3,
    '<|end_of_text|>',
    bos='<|begin_of_text|>',
    marks=[
      special(f'<|{name}|>')
      for name in ('begin_of_text', 'end_of_text', 'start_header_id', 'end_header_id', 'eot_id')
    ],
  ),
  'reasoning': lambda: byte_level(
    REASONING,
    '<|im_end|>',
    marks=[
      special('<|im_start|>'),
      special('<|im_end|>'),
      AddedToken('<think>', special=False, normalized=False),
      AddedToken('</think>', special=False, normalized=False),
    ],
  ),
  'strips': lambda: byte_level(
    CHATML.replace('\n', ''),
    '<|im_end|>',
    marks=[special('<|im_start|>', lstrip=True, rstrip=True), special('<|im_end|>', rstrip=True)],
  ),
  'phi_3': lambda: AutoTokenizer.from_pretrained(PHI),
}


@functools.cache
def get_tokenizer(name):
  return MAKERS[name]()


@pytest.fixture(params=list(MAKERS))
def tokenizer(request):
  if request.param == 'phi_3' and not PHI.is_dir():
    pytest.skip(f'the phi-3 tokenizer is not in {PHI}')
  return get_tokenizer(request.param)


def user(content):
  return {'role': 'user', 'content': content}


def assistant(content):
  return {'role': 'assistant', 'content': content}


def message(role, content):
  return {'role': role, 'content': content}


BENIGN = [
  [user('How do I bake bread?')],
  [user('  two  spaces \n\n and lines \n')],
  [user("I'm asking; naïve 日本語 🙂?"), assistant('Mix flour.\n\nThen wait. '), user('\n123 go')],
  [user('a'), assistant(' b'), user('c '), assistant('d\n'), user('e')],
  [user('x = [1, 2] < 3 > {{ y }} {% z %}'), assistant('\tok'), user('.')],
]


def template_ids(tokenizer, messages, generate):
  ids = tokenizer.apply_chat_template(messages, add_generation_prompt=generate, tokenize=True)
  return list(ids['input_ids'] if not isinstance(ids, list) else ids)


def allows_system(tokenizer):
  return 'no system here' not in tokenizer.chat_template
