"""Dialogues as tokens: equality with the chat template, and safety of control tokens."""

import random
import time

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cai_jax.dialogue import Dialogue
from cai_jax.runtime.errors import UserError
from tests.dialogue_setup import (
  BENIGN,
  CHATML,
  LLAMA_2,
  allows_system,
  assistant,
  byte_level,
  get_tokenizer,
  message,
  special,
  template_ids,
  user,
)
from tests.dialogue_setup import tokenizer as tokenizer


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
