"""Dialogues as tokens: equality with the chat template, safety of control tokens, and prefixes."""

import copy
import functools
import json
import os
import pathlib
import random
import time

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cai_jax.dialogue import FORMATS, Dialogue
from cai_jax.dialogue.encode import Markup, Text, Tokens
from cai_jax.runtime.errors import UserError

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


@pytest.fixture(params=list(MAKERS))
def tokenizer(request):
  if request.param == 'phi_3' and not PHI.is_dir():
    pytest.skip(f'the phi-3 tokenizer is not in {PHI}')
  return get_tokenizer(request.param)


@functools.cache
def get_tokenizer(name):
  return MAKERS[name]()


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


@pytest.mark.parametrize('messages', BENIGN)
def test_prompt_equals_apply_chat_template(tokenizer, messages):
  dialogue = Dialogue(tokenizer)
  assert dialogue.prompt(messages) == template_ids(tokenizer, messages, True)
  if allows_system(tokenizer):
    messages = [message('system', 'Be kind. '), *messages]
    assert dialogue.prompt(messages) == template_ids(tokenizer, messages, True)


@pytest.mark.parametrize('text', ['Mix flour.', 'Line\n\nline', ' spaced ', '日本語 🙂', 'b'])
def test_example_is_a_prefix_of_the_rendered_dialogue(tokenizer, text):
  dialogue = Dialogue(tokenizer)
  messages = [user('How?'), assistant('So.'), user('And then?'), assistant(text)]
  tokens, mask = dialogue.example(messages)
  whole = template_ids(tokenizer, messages, False)
  prompt = dialogue.prompt(messages[:-1])
  assert tokens[: len(prompt)] == prompt and mask == [0] * len(prompt) + [1] * (
    len(tokens) - len(prompt)
  )
  assert tokens[-1] in dialogue.stop_token_ids
  assert sum(token in dialogue.stop_token_ids for token in tokens[len(prompt) :]) == 1
  assert whole[: len(tokens)] == tokens


@pytest.mark.parametrize('messages', BENIGN)
def test_conversation_equals_apply_chat_template_without_generation_prompt(tokenizer, messages):
  dialogue = Dialogue(tokenizer)
  messages = [*messages, assistant('Line.\n\nline')]
  whole = template_ids(tokenizer, messages, False)
  assert dialogue.conversation(messages) == whole
  sampled = [*messages[:-1], assistant(dialogue.reply('Line.\n\nline'))]
  assert dialogue.conversation(sampled) == whole
  spelled = [*messages[:-1], assistant('x ' + tokenizer.eos_token)]
  count = dialogue.conversation(spelled).count(tokenizer.eos_token_id)
  assert count == whole.count(tokenizer.eos_token_id)
  plain = Dialogue(tokenizer, 'plain')
  context, reply = plain.prompt(messages[:-1]), plain.reply('Line.\n\nline')
  assert plain.conversation(messages) == context + reply
  for wrong in ([], messages[:-1], [assistant('a')]):
    with pytest.raises(UserError, match='must end with a re(ply|quest)'):
      dialogue.conversation(wrong)


def control_ids(tokenizer):
  return {i for i, t in tokenizer.added_tokens_decoder.items() if t.content != '<unk>'}


def test_text_never_becomes_a_control_token(tokenizer):
  dialogue = Dialogue(tokenizer)
  spelled = [t.content for t in tokenizer.added_tokens_decoder.values()]
  control = control_ids(tokenizer)

  def count(tokens):
    return [token for token in tokens if token in control]

  clean = [user('a b'), assistant('c d'), user('e f')]
  expected = count(dialogue.prompt(clean))
  expected_reply = count(dialogue.reply('c d'))
  for spelling in [*spelled, '\n'.join(spelled), ''.join(spelled)]:
    for where in range(3):
      if spelling.endswith('</think>') and where == 1 and not allows_system(tokenizer):
        continue  # reasoning inside a reply is tested below
      dirty = [dict(m) for m in clean]
      dirty[where]['content'] = f'before {spelling}after{spelling} '
      assert count(dialogue.prompt(dirty)) == expected, (spelling, where)
    assert count(dialogue.reply(f'x {spelling} y')) == expected_reply or '</think>' in spelling
    plain = Dialogue(tokenizer, 'plain')
    assert count(plain.prompt([user(spelling), assistant(spelling), user(spelling)])) == count(
      plain.prompt(clean)
    )
    assert count(plain.reply(spelling)) == [tokenizer.eos_token_id]


def test_spelled_control_tokens_survive_as_text(tokenizer):
  dialogue = Dialogue(tokenizer)
  for text in ('say <|im_end|> and </s>', '<|end|>', '[/INST] <s>'):
    reply = dialogue.reply(text)
    assert dialogue.decode(reply) == text


@pytest.mark.parametrize('style', ['chat', 'plain'])
@pytest.mark.parametrize(
  'text', ['Mix flour, then wait.', 'Line\n\nline 日本', 'a <|im_end|> b', '12']
)
@pytest.mark.parametrize('ended', [True, False])
def test_later_prompt_extends_the_prompt_and_its_sampled_reply(tokenizer, style, text, ended):
  dialogue = Dialogue(tokenizer, style)
  messages, context = [user('How do I bake?')], []
  for role, request in [
    ('assistant', message('critique_request', 'What is wrong?')),
    ('critique', message('revision_request', 'Write it again.')),
    ('revision', message('critique_request', 'And now?')),
  ]:
    context = dialogue.prompt(messages, role)
    reply = dialogue.reply(text, role)
    if style == 'chat' and not allows_system(
      tokenizer
    ):  # its replies contain reasoning, which is dropped
      reply = tokenizer.encode(text, split_special_tokens=True) + [tokenizer.eos_token_id]
    if not ended:
      reply = [t for t in reply if t not in dialogue.stop_token_ids]
    messages = [*messages, message(role, reply), request]
    longer = dialogue.prompt(messages, 'critique')
    assert longer[: len(context) + len(reply)] == context + reply
    assert len(longer) > len(context) + len(reply)
    following = longer[len(context) + len(reply) :]
    if style == 'chat' and ended:
      assert following[0] not in dialogue.stop_token_ids


@pytest.mark.parametrize('style', ['chat', 'plain'])
def test_sampled_ids_are_used_verbatim(tokenizer, style):
  """An untrained model samples any ids, including broken characters and control tokens."""
  dialogue = Dialogue(tokenizer, style)
  rng = random.Random(0)
  end_of_thought = tokenizer.get_vocab().get('</think>')  # the template drops what precedes it
  allowed = [i for i in range(len(tokenizer)) if i != end_of_thought]
  for _ in range(30):
    replies = [rng.choices(allowed, k=rng.randint(0, 30)) for _ in range(2)]
    if any('\n\n' in tokenizer.decode(reply) for reply in replies):
      continue  # could contain a label
    messages = [user('hi')]
    for reply in replies:
      context = dialogue.prompt(messages)
      messages = [*messages, assistant(reply), user(rng.choice(['go', ' <s>', '\n<|im_end|>']))]
      longer = dialogue.prompt(messages)
      assert longer[: len(context) + len(reply)] == context + reply
      assert max(longer) < len(tokenizer)


def test_random_dialogues_equal_apply_chat_template(tokenizer):
  dialogue = Dialogue(tokenizer)
  rng = random.Random(1)
  letters = [
    'a',
    'B',
    ' ',
    '  ',
    '\n',
    '\n\n',
    '1',
    '.',
    "'s",
    'é',
    '語',
    '🙂',
    '<',
    '|',
    '[',
    'Human:',
  ]
  for _ in range(60):
    contents = [''.join(rng.choices(letters, k=rng.randint(1, 12))) for _ in range(5)]
    roles = ['user', 'assistant'] * 3
    messages = [message(role, text) for role, text in zip(roles, contents, strict=False)]
    assert dialogue.prompt(messages) == template_ids(tokenizer, messages, True), contents


def test_reply_as_ids_equals_reply_as_text(tokenizer):
  dialogue = Dialogue(tokenizer)
  text = 'Mix flour, then wait.'
  by_text = dialogue.prompt([user('a'), assistant(text), user('b')])
  by_ids = dialogue.prompt([user('a'), assistant(dialogue.reply(text)), user('b')])
  if not allows_system(tokenizer):
    return  # its replies contain an empty reasoning block, which earlier turns drop
  assert by_text == by_ids


def test_decode_inverts_reply(tokenizer):
  for style in ('chat', 'plain'):
    dialogue = Dialogue(tokenizer, style)
    for text in ('Mix flour.', 'Line\n\nline', '日本語 🙂', 'a  b'):
      assert dialogue.decode(dialogue.reply(text)) == text
      assert dialogue.decode(dialogue.reply(f' {text}\n')) == text


def test_reasoning_is_dropped_from_earlier_replies():
  tokenizer = get_tokenizer('reasoning')
  dialogue = Dialogue(tokenizer)
  think, unthink, end = tokenizer.convert_tokens_to_ids(['<think>', '</think>', '<|im_end|>'])
  words = tokenizer.encode
  reply = [think, *words('\nI ponder <|im_x|>\n'), unthink, *words('\n\nMix flour.'), end]
  messages = [user('How?'), assistant(reply), user('Why <think>?')]
  as_text = [user('How?'), assistant('Mix flour.'), user('Why <think>?')]
  assert dialogue.prompt(messages) == dialogue.prompt(as_text)
  assert think not in dialogue.prompt(messages)
  assert dialogue.decode(reply) == 'Mix flour.'
  # A reply without reasoning stays verbatim next to one that is rewritten.
  plain_reply = [*words('Wait <'), *words('|im_start|>', split_special_tokens=True), end]
  context = dialogue.prompt(messages)
  longer = dialogue.prompt([*messages, assistant(plain_reply), user('<|im_end|>')])
  assert longer[: len(context) + len(plain_reply)] == context + plain_reply
  start = tokenizer.convert_tokens_to_ids('<|im_start|>')
  assert longer.count(start) == 6 and longer.count(end) == 5
  # In the reply to learn, <think> stays a token, but a spelled control token stays text.
  target = dialogue.reply('<think>\nhm <|im_start|>\n</think>\n\nSo.')
  assert target[0] == think and target.count(unthink) == 1 and start not in target
  assert tokenizer.decode(target) == '<think>\nhm <|im_start|>\n</think>\n\nSo.<|im_end|>'


def test_decode_drops_unfinished_reasoning():
  tokenizer = get_tokenizer('reasoning')
  think, unthink = tokenizer.convert_tokens_to_ids(['<think>', '</think>'])
  words = tokenizer.encode('Mix flour.')
  dialogue = Dialogue(tokenizer)
  assert dialogue.decode([think, *words]) == ''
  assert dialogue.decode([*words, think, *words]) == 'Mix flour.'
  assert dialogue.decode([think, unthink, *words]) == dialogue.decode(words) == 'Mix flour.'
  # Some templates open the reasoning in their generation prompt.
  opening = copy.deepcopy(tokenizer)
  prompt = "{{ '<|im_start|>assistant\n' }}"
  opening.chat_template = REASONING.replace(prompt, "{{ '<|im_start|>assistant\n<think>\n' }}")
  assert opening.chat_template != REASONING
  dialogue = Dialogue(opening)
  assert dialogue.decode(words) == ''
  assert dialogue.decode([*words, unthink, *words]) == 'Mix flour.'
  assert Dialogue(opening, 'plain').decode(words) == 'Mix flour.'


def test_template_options_reach_the_template():
  tokenizer = copy.deepcopy(get_tokenizer('chatml'))
  option = '{% if enable_thinking is false %}{{ "No." }}{% endif %}'
  tokenizer.chat_template = option + tokenizer.chat_template
  messages = [user('hi')]
  without, options = Dialogue(tokenizer), (('enable_thinking', False),)
  prompt = Dialogue(tokenizer, template_options=options).prompt(messages)
  assert prompt == tokenizer.encode('No.') + without.prompt(messages)
  for style, name in (('chat', 'enable_thinkin'), ('chat', 'messages'), ('plain', options[0][0])):
    with pytest.raises(UserError, match=f"template_options: .*'{name}'.* Remove it"):
      Dialogue(tokenizer, style, template_options=((name, False),))


def test_dialogues_that_the_template_rejects_are_errors():
  with pytest.raises(UserError, match='no system here.*no system message'):
    Dialogue(get_tokenizer('reasoning')).prompt([message('system', 'Be kind.'), user('hi')])
  with pytest.raises(UserError, match="roles must alternate.*style='plain'"):
    Dialogue(get_tokenizer('llama_2_first')).prompt([user('a'), user('b')])


def test_misplaced_roles_and_missing_targets_are_errors():
  for style in ('chat', 'plain'):
    dialogue = Dialogue(get_tokenizer('chatml'), style)
    with pytest.raises(UserError, match='must end with a request'):
      dialogue.prompt([user('a'), assistant('b')])
    with pytest.raises(UserError, match='must end with a request'):
      dialogue.prompt([])
    with pytest.raises(UserError, match=r"unknown roles \['tool'\]"):
      dialogue.prompt([message('tool', 'x'), user('a')])
    with pytest.raises(UserError, match='can only come first'):
      dialogue.prompt([user('a'), message('system', 'b'), user('c')])
    with pytest.raises(UserError, match="reply_role must be one of .* got 'user'"):
      dialogue.prompt([user('a')], 'user')
    with pytest.raises(UserError, match='reply_role must be one of'):
      dialogue.reply('a', 'user')
    for empty in ('', ' \n', []):
      with pytest.raises(UserError, match='no target token'):
        dialogue.example([user('a'), assistant(empty)])
    with pytest.raises(UserError, match='must end with a reply'):
      dialogue.example([user('a')])


def test_unsuitable_tokenizers_are_errors():
  bare = byte_level(None, None)
  with pytest.raises(UserError, match="Use style='plain'"):
    Dialogue(bare)
  with pytest.raises(UserError, match='eos token, but it has none'):
    Dialogue(bare, 'plain')
  with pytest.raises(
    UserError, match="no prompt format named 'alpacca'. The registered names are .*chat, plain"
  ):
    Dialogue(get_tokenizer('chatml'), 'alpacca')

  class Slow:
    is_fast = False

  with pytest.raises(UserError, match='Slow is a slow tokenizer'):
    Dialogue(Slow())


def test_chat_turns_end_with_tokens_and_plain_turns_also_with_labels():
  def stops(name, **kwargs):
    tokenizer = get_tokenizer(name)
    return set(tokenizer.convert_ids_to_tokens(Dialogue(tokenizer, **kwargs).stop_token_ids))

  assert stops('chatml') == {'<|endoftext|>', '<|im_end|>'}
  assert stops('llama_2_first') == {'</s>'}
  assert stops('llama_3') == {'<|end_of_text|>', '<|eot_id|>'}
  assert stops('llama_3', style='plain') == {'<|end_of_text|>'}
  start = get_tokenizer('chatml').convert_tokens_to_ids('<|im_start|>')
  assert stops('chatml', eos_token_ids=(start,)) == {'<|endoftext|>', '<|im_end|>', '<|im_start|>'}
  assert not Dialogue(get_tokenizer('chatml')).stop_strings
  assert '\n\nCritiqueRequest:' in Dialogue(get_tokenizer('chatml'), 'plain').stop_strings


def test_plain_format_matches_the_paper(tokenizer):
  dialogue = Dialogue(tokenizer, 'plain')
  demonstration = [
    user('q'),
    assistant('a'),
    message('critique_request', 'c?'),
    message('critique', 'c'),
  ]
  messages = [
    message('system', 'Be kind.'),
    user('hi'),
    assistant('yo'),
    message('revision_request', 'r'),
  ]
  text = (
    'Be kind.\n\nHuman: q\n\nAssistant: a\n\nCritiqueRequest: c?\n\nCritique: c'
    '\n\nHuman: hi\n\nAssistant: yo\n\nRevisionRequest: r\n\nRevision:'
  )
  tokens = dialogue.prompt(messages, 'revision', [demonstration])
  assert tokens == tokenizer.encode(text)
  reply = dialogue.reply('ok then', 'revision')
  assert reply[-1] == tokenizer.eos_token_id
  assert tokens + reply[:-1] == tokenizer.encode(text + ' ok then')


def test_plain_reply_ends_before_the_first_label(tokenizer):
  dialogue = Dialogue(tokenizer, 'plain')
  whole = dialogue.reply('Mix flour. \n\nHuman: more')[:-1]
  assert dialogue.decode(whole) == 'Mix flour.'
  request = message('critique_request', 'bad?')
  tokens = dialogue.prompt([user('hi'), assistant(whole), request], 'critique')
  text = tokenizer.decode(tokens)
  assert text.count('\n\nHuman:') == 1
  assert text.endswith('Mix flour. \n\nCritiqueRequest: bad?\n\nCritique:')
  context = dialogue.prompt([user('hi')])
  kept = dialogue.reply('Mix flour.')[:-2]
  assert tokens[: len(context) + len(kept)] == context + kept


def test_plain_adds_bos_if_the_tokenizer_does():
  tokenizer = get_tokenizer('llama_3')
  bos = tokenizer.bos_token_id
  assert bos not in Dialogue(tokenizer, 'plain').prompt([user('hi')])
  from tokenizers.processors import TemplateProcessing

  with_bos = MAKERS['llama_3']()
  with_bos.backend_tokenizer.post_processor = TemplateProcessing(
    single='<|begin_of_text|> $A', special_tokens=[('<|begin_of_text|>', bos)]
  )
  tokens = Dialogue(with_bos, 'plain').prompt([user('hi')])
  assert tokens[0] == bos and bos not in tokens[1:]
  assert tokens == with_bos.encode('\n\nHuman: hi\n\nAssistant:')


def test_chat_demonstrations_become_earlier_turns(tokenizer):
  dialogue = Dialogue(tokenizer)
  demonstration = [
    user('q'),
    assistant('a'),
    message('critique_request', 'c?'),
    message('critique', 'c'),
  ]
  shown = [user('q'), assistant('a'), user('c?'), assistant('c')]
  system = [message('system', 'Be kind.')] if allows_system(tokenizer) else []
  tokens = dialogue.prompt([*system, user('hi')], demonstrations=[demonstration, demonstration])
  assert tokens == template_ids(tokenizer, [*system, *shown, *shown, user('hi')], True)
  begins = dialogue.prompt([*system, user('other')], demonstrations=[demonstration])
  common = os.path.commonprefix([tokens, begins])
  assert len(common) > len(dialogue.prompt([*system, *shown, user('x')])) - 12


def test_templates_see_a_fixed_date():
  dated = byte_level(
    "{{ strftime_now('%d %b %Y') }}" + CHATML,
    '<|im_end|>',
    marks=[special('<|im_start|>'), special('<|im_end|>')],
  )
  text = dated.decode(Dialogue(dated).prompt([user('hi')]))
  assert text.startswith('26 Jul 2024<|im_start|>user')


def test_noncharacters_are_encoded_as_text():
  for name in ('chatml', 'llama_2_first', 'llama_2_always'):
    tokenizer = get_tokenizer(name)
    text = 'odd \ufdd0\ufdd1 and \ufdd3x\ufdd40\ufdd4'
    for style in ('chat', 'plain'):
      dialogue = Dialogue(tokenizer, style)
      assert dialogue.decode(dialogue.reply(text)) == text
      tokens = dialogue.prompt([user(text)])
      assert max(tokens) < len(tokenizer)
      assert text in tokenizer.decode(tokens)


def test_control_tokens_in_the_ordinary_vocabulary_are_safe():
  """A Unigram vocabulary reads "</s>" in a text as the control token, unless it is split."""
  pieces = [('<unk>', 0.0), ('<s>', 0.0), ('</s>', 0.0), ('\u2581', -1.0)]
  pieces += [(c, -2.0) for c in 'abcdefghijklmnopqrstuvwxyzHACR<>/s:[]INST\n' if c != 's'] + [
    ('s', -2.0)
  ]
  t = Tokenizer(models.Unigram([*dict(pieces).items()], unk_id=0))
  t.pre_tokenizer = pre_tokenizers.Metaspace('\u2581', prepend_scheme='first')
  t.decoder = decoders.Metaspace()
  t.add_special_tokens(['<unk>', '<s>', '</s>'])
  tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=t, bos_token='<s>', eos_token='</s>', unk_token='<unk>', chat_template=LLAMA_2
  )
  assert tokenizer.eos_token_id in tokenizer.encode('a</s>b', split_special_tokens=True)
  for style in ('chat', 'plain'):
    dialogue = Dialogue(tokenizer, style)
    eos = tokenizer.eos_token_id
    assert eos not in dialogue.prompt([user('a</s>b <s>')])
    reply = dialogue.reply('a</s>b')
    assert reply.index(eos) == len(reply) - 1
    assert dialogue.decode(reply).replace(' ', '') == 'a</s>b'


class AlpacaFormat:
  """A minimal format, as a user would add it."""

  stop_strings = ('\n\n### Instruction:', '\n\n### Response:')
  prompt_opens_reasoning = False

  def __init__(self, encoder, eos_token_ids, template_options):
    self.eos = encoder.tokenizer.eos_token_id
    self.stop_token_ids = (self.eos, *eos_token_ids)

  def prompt(self, messages, reply_role):
    return [*self._turns(messages), Markup('\n\n### Response:')]

  def reply(self, text, reply_role):
    return [Markup('\n\n### Response:')], [Text('\n' + text), Tokens((self.eos,))]

  def conversation(self, messages):
    return [*self._turns(messages), Tokens((self.eos,))]

  def _turns(self, messages):
    pieces = []
    for message in messages:
      label = 'Response' if message['role'] == 'assistant' else 'Instruction'
      pieces.append(Markup(f'\n\n### {label}:'))
      content = message['content']
      is_text = isinstance(content, str)
      pieces.append(Text('\n' + content) if is_text else Tokens(tuple(content)))
    return pieces


def test_registered_format_is_chosen_by_its_name():
  if 'alpaca' not in FORMATS:
    FORMATS.register('alpaca')(AlpacaFormat)
  tokenizer = get_tokenizer('chatml')
  dialogue = Dialogue(tokenizer, 'alpaca')
  prompt = dialogue.prompt([user('Why?')])
  assert prompt == tokenizer.encode('\n\n### Instruction:\nWhy?\n\n### Response:')
  reply = dialogue.reply('So <|im_end|>.')
  assert reply.count(tokenizer.eos_token_id) == 1 and dialogue.decode(reply) == 'So <|im_end|>.'
  longer = dialogue.prompt([user('Why?'), assistant(reply), user('How?')])
  assert longer[: len(prompt) + len(reply)] == prompt + reply


def test_rendering_is_cheap():
  dialogue = Dialogue(get_tokenizer('chatml'))
  messages = [
    user('How do I bake bread? ' * 10),
    assistant(dialogue.reply('Wait. ' * 60)),
    user('x'),
  ]
  dialogue.prompt(messages)
  start = time.perf_counter()
  for _ in range(50):
    dialogue.prompt(messages)
  assert (time.perf_counter() - start) / 50 < 0.01  # seconds; 0.3 ms on a free core
