"""Chat templates that lose, move, merge or rewrite messages are refused; hostile ones stop."""

import ast
import pathlib
import time

import pytest
from tokenizers import AddedToken

import cai_jax
from cai_jax.dialogue import Dialogue
from cai_jax.runtime.errors import UserError
from tests.dialogue_setup import CHATML, assistant, byte_level, message, special, user

MARKS = ('<|im_start|>', '<|im_end|>', '<|start|>', '<|message|>', '<|end|>', '<|x|>')
THINK = ('<think>', '</think>')


def load(template, *more, **kwargs):
  """Return the dialogue of a ChatML tokenizer with another template and further control tokens."""
  marks = [special(mark) for mark in MARKS]
  marks += [AddedToken(mark, special=False, normalized=False) for mark in more]
  return Dialogue(byte_level(template, '<|im_end|>', marks=marks), **kwargs)


def with_content(expression):
  """Return ChatML with another expression in place of a message's content."""
  return CHATML.replace('m.content', f'({expression})')


LOST = {
  'parts only': (
    with_content("m.content|selectattr('text')|map(attribute='text')|join"),
    r'loses message 1 of 1 \(user\)',
  ),
  'only the last': (CHATML.replace('in messages', 'in messages[-1:]'), 'loses message 1 of 2'),
  'reversed': (CHATML.replace('in messages', 'in messages|reverse'), 'moves message 1 of 2'),
  'doubled': (with_content('m.content + m.content'), 'doubles message 1 of 1'),
  'merged': ("{% for m in messages %}{{ m.content + '\n' }}{% endfor %}", 'merges message 2 of 2'),
  'lower case': (with_content('m.content|lower'), 'changes the content of message 1'),
  'cut': (with_content('m.content[:1000]'), 'changes the content of message 1'),
  'escaped': (with_content('m.content|e'), 'changes the content of message 1'),
  'one line': (with_content("m.content.split('\n')[0]"), 'changes the content of message 1'),
  'no generation prompt': (CHATML.split('{% if add_gen')[0], 'is read back as'),
  'another generation prompt': (
    CHATML.replace('}}{% endif', "+ 'Hm. ' }}{% endif"),
    'ends a prompt',
  ),
}


@pytest.mark.parametrize('name', LOST)
def test_templates_that_do_not_keep_messages_are_refused(name):
  template, error = LOST[name]
  with pytest.raises(UserError, match=error):
    load(template)


REASONING = (
  "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content.split('</think>')[-1] + "
  "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
  "{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
CHANNELS = (
  "{% for m in messages %}{{ '<|start|>' + m.role + (MARK if m.role == 'assistant' else '') + "
  "'<|message|>' + m.content + '<|end|>' }}{% endfor %}"
  '{% if add_generation_prompt %}<|start|>assistant{% endif %}'
)


def test_reasoning_and_channels_that_are_not_read_are_refused_with_that_reason():
  with pytest.raises(UserError, match='reasoning that it opens must be in the reply too'):
    load(REASONING, *THINK)
  with pytest.raises(UserError, match="'</think>', a mark of reasoning"):
    load(REASONING)  # the marks would be ordinary text
  with pytest.raises(UserError, match=r"'<\|channel\|>', a mark of reasoning or channels"):
    load(CHANNELS.replace('MARK', "'<|channel|>final'"))
  with pytest.raises(UserError, match="'finalMix flour, then wait.'.*reasoning, channels"):
    load(CHANNELS.replace('MARK', "'<|x|>final'"))
  with pytest.raises(UserError, match=r"'\[THINK\]', a mark of reasoning"):
    load(CHATML + '{% if thinking %}[THINK]{% endif %}')


# Mistral v0.3 writes the system message into the last user turn.
SYSTEM_LAST = (
  "{% if messages[0].role == 'system' %}{% set s = messages[0].content %}"
  '{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}'
  "{% for m in rest %}{% if m.role == 'user' %}"
  "{{ '[INST] ' + (s + '\n\n' if loop.last and s is defined else '') + m.content + '[/INST]' }}"
  "{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"
)


def test_a_system_message_that_moves_is_refused_where_a_run_has_one():
  dialogue = load(SYSTEM_LAST)
  sampled = [user('A joke?'), assistant(dialogue.reply('Here is one.')), user('Why?')]
  as_text = [user('A joke?'), assistant('Here is one.'), user('Why?')]
  assert dialogue.prompt(sampled) == dialogue.prompt(as_text)
  system = message('system', 'Be nice.')
  for messages in (sampled, as_text):
    with pytest.raises(UserError, match=r'moves message 1 of 4 \(system\)'):
      dialogue.prompt([system, *messages])
  dropped = load(CHATML.replace('in messages', "in messages if m.role != 'system'"))
  with pytest.raises(UserError, match=r'loses message 1 of 2 \(system\)'):
    dropped.prompt([system, user('hi')])


def test_contents_that_a_template_singles_out_are_kept_or_refused():
  skips = load(CHATML.replace('in messages', 'in messages if m.content'))
  with pytest.raises(UserError, match=r'loses message 2 of 3 \(assistant\), which is empty'):
    skips.prompt([user('a'), assistant([]), user('b')])
  cuts = load(with_content("m.content.split('STOP')[0]"))
  assert cuts.prompt([user('a b')])
  with pytest.raises(UserError, match="changes the content of message 3.*begins 'one STOP two'"):
    cuts.prompt([user('a'), assistant('b'), user('one STOP two')])


TOO_MUCH = (
  '{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}',
  '{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}',
  "{% set n = namespace(a='aaaa') %}{% for i in range(99) %}{% set n.a = n.a ~ n.a %}{% endfor %}",
  "{{ 'a' * 10**10 }}",
  "{{ 'a'.center(10**10) }}",
  '{{ 10 ** (10 ** 10) }}',
)


@pytest.mark.parametrize('start', TOO_MUCH)
def test_templates_have_limits_on_time_memory_and_output(start):
  with pytest.raises(UserError, match='cannot be used: it (took|wrote) more than .* Correct'):
    load(start + CHATML)


def test_a_template_that_loops_for_some_contents_is_stopped():
  loop = "{% if 'bed' in messages[-1].content %}" + TOO_MUCH[0] + '{% endif %}'
  dialogue = load(loop + CHATML)
  assert dialogue.prompt([user('chair')])
  start = time.process_time()
  with pytest.raises(UserError, match='TimeUpError: it took more than 2 s'):
    dialogue.prompt([user('bed')])
  assert time.process_time() - start < 4


@pytest.mark.parametrize(
  'start',
  [
    '{{ 1 / 0 }}',
    '{{ messages + 1 }}',
    '{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}',
    '{{ ' + '(' * 3000 + '1' + ')' * 3000 + ' }}',
    '{{ messages.a.b }}',
    '{% for m in messages %}',
    "{{ ''.__class__.__mro__ }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{% include 'x' %}",
    r"{{ '\ud800' }}",
    "{{ raise_exception('\x1b[31m\n' ~ 'no' * 1000) }}",
  ],
)
def test_any_exception_of_a_template_is_an_error_of_the_template(start):
  with pytest.raises(UserError, match='The chat template rejects a dialogue') as caught:
    load(start + CHATML)
  assert len(str(caught.value)) < 800 and str(caught.value).isprintable()


def test_unpaired_surrogates_are_refused():
  dialogue = load(CHATML)
  for style in ('chat', 'plain'):
    dialogue = load(CHATML, style=style)
    with pytest.raises(UserError, match='unpaired surrogate'):
      dialogue.prompt([user('a \ud800')])
    with pytest.raises(UserError, match='unpaired surrogate'):
      dialogue.reply('a \udfff')
    with pytest.raises(UserError, match='unpaired surrogate'):
      dialogue.conversation([user('a'), assistant('\udfff')])


def test_every_dialogue_of_the_library_is_given_the_options_of_the_template():
  root = pathlib.Path(cai_jax.__file__).parent
  found = 0
  for path in root.rglob('*.py'):
    if path.parent.name == 'dialogue' or path == root / 'tiny' / 'pretrain.py':
      continue
    for node in ast.walk(ast.parse(path.read_text())):
      name = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ''
      keywords = {keyword.arg for keyword in node.keywords} if name else set()
      is_sampling = name == 'generate' and path.parent.name == 'pipeline'
      if name == 'Dialogue' or is_sampling:
        found += 1
        assert 'template_options' in keywords or (name == 'Dialogue' and len(node.args) >= 4), path
  assert found >= 5
