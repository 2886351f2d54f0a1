"""Dialogues in each format: reasoning, roles, labels of plain text, and formats of plugins."""

import copy
import os

import pytest

from cai_jax.dialogue import FORMATS, Dialogue
from cai_jax.dialogue.encode import Markup, Text, Tokens
from cai_jax.runtime.errors import UserError
from tests.dialogue_setup import (
  MAKERS,
  REASONING,
  allows_system,
  assistant,
  byte_level,
  get_tokenizer,
  message,
  template_ids,
  user,
)
from tests.dialogue_setup import tokenizer as tokenizer


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
    for turn in messages:
      label = 'Response' if turn['role'] == 'assistant' else 'Instruction'
      pieces.append(Markup(f'\n\n### {label}:'))
      content = turn['content']
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
