"""Shapes in which people keep dialogues: each is read correctly, or refused with row and form."""

import json

import pytest

from cai_jax.data.prompts import Prompt, PromptSource, load_prompts
from cai_jax.pipeline.prompt_sets import load_prompt_sets
from cai_jax.pipeline.sections import PromptSets
from cai_jax.runtime.errors import UserError

U = {'role': 'user', 'content': 'hi'}
A = {'role': 'assistant', 'content': 'hello'}
S = {'role': 'system', 'content': 'be kind'}


def read(tmp_path, row, **settings):
  """Return the messages of a row in the second line of a file."""
  path = tmp_path / 'p.jsonl'
  path.write_text(json.dumps({'prompt': 'fine'}) + '\n' + json.dumps(row) + '\n')
  settings = {'field': '', **settings}
  if settings['field']:
    path.write_text('\n' + json.dumps(row) + '\n')
  return list(load_prompts(PromptSource(str(path), **settings))[-1].messages)


def user(text):
  return [{'role': 'user', 'content': text}]


@pytest.mark.parametrize(
  ('row', 'expected'),
  [
    # Transcripts: the first label follows an empty line, other white space, or nothing.
    ({'prompt': '\n\nHuman: hi\n\nAssistant:'}, [U]),
    ({'prompt': 'Human: hi\n\nAssistant:'}, [U]),
    ({'prompt': ' \n\nHuman: hi\n\nAssistant:'}, [U]),
    ({'prompt': '\ufeff\n\n\n\nHuman: hi\n\nAssistant: \n'}, [U]),
    ({'prompt': '\r\n\r\nHuman: hi\r\n\r\nAssistant:'}, [U]),
    ({'prompt': '\r\rHuman: hi\r\rAssistant: hello\r\rHuman: hi'}, [U, A, U]),
    ({'prompt': 'Human: hi\n \nAssistant: hello\n\t\nHuman: hi\n\nAssistant:'}, [U, A, U]),
    ({'prompt': 'Human: hi'}, [U]),
    ({'prompt': '\n\nHuman: say\nAssistant: x\n\nAssistant:'}, user('say\nAssistant: x')),
    ({'chosen': 'Human: hi\n\nAssistant: hello'}, [U]),
    ({'chosen': '\n\nHuman: Human: hi\n\nAssistant: hello'}, user('Human: hi')),  # as in HH-RLHF
    # Texts that are not transcripts.
    ({'prompt': 'A human: what is it?\nThe assistant: unclear.'}, None),
    ({'prompt': 'Who is the user: me or you?'}, None),
    ({'prompt': 'Q: what is 2+2?\nA:'}, None),
    ({'prompt': 'H: the enthalpy\nand T'}, None),
    ({'prompt': '[1, 2, 3] is a list'}, None),
    ({'prompt': '{"role": "user"} is an object'}, None),
    ({'prompt': 'Name one\nassistant'}, None),
    # Messages.
    ({'messages': [{'role': 'developer', 'content': 'be kind'}, U]}, [S, U]),
    ({'messages': [{'role': 'User', 'content': 'hi'}]}, [U]),
    ({'messages': [{**U, 'name': None}]}, [U]),
    ({'messages': [{**U, 'weight': 0}]}, [U]),  # Axolotl
    ({'conversation': [{**U, 'header': {'x': 'y'}, 'toxic': False, 'redacted': False}]}, [U]),
    ({'prompt': 'Write a class\nAssistant'}, None),
    ({'prompt': 'What does "Assistant:" mean?'}, None),
    ({'messages': [U, {**A, 'tool_calls': [], 'refusal': None}, U]}, [U, A, U]),
    ({'messages': [{'role': 'user', 'content': [{'type': 'text', 'text': 'hi'}]}]}, [U]),
    (
      {'messages': [{'role': 'user', 'content': [{'type': 'text', 'text': t} for t in 'ab']}]},
      user('a\nb'),
    ),
    ({'messages': [U], 'system': 'be kind'}, [S, U]),
    ({'messages': [S, U], 'system': 'be kind'}, [S, U]),
    ({'messages': [U], 'system': None}, [U]),
    ({'prompt': json.dumps([S, U])}, [S, U]),
    ({'messages': json.dumps([U])}, [U]),
    # ShareGPT.
    ({'conversations': [{'from': 'human', 'value': 'hi'}]}, [U]),
    (
      {
        'conversations': [
          {'from': 'system', 'value': 'be kind'},
          {'from': 'human', 'value': 'hi'},
          {'from': 'gpt', 'value': 'hello'},
          {'from': 'human', 'value': 'hi'},
        ]
      },
      [S, U, A, U],
    ),
    ({'conversation': [U, A, U]}, [U, A, U]),
    # Rows with several fields.
    ({'prompt': 'hi', 'messages': [U, A]}, [U]),
    ({'prompt': 'hi', 'messages': [S, U, A]}, [S, U]),
    ({'prompt': [U], 'messages': [U]}, [U]),
    ({'prompt': 'hi', 'messages': None}, [U]),
    ({'prompt': 'hi', 'chosen': [U, A], 'rejected': [U, A], 'messages': [U, A]}, [U]),
  ],
)
def test_shapes_are_read(tmp_path, row, expected):
  assert read(tmp_path, row) == (user(row['prompt']) if expected is None else expected)


def test_the_answer_of_a_dialogue_is_left_out_on_request(tmp_path):
  rows = [
    {'messages': [U, A]},
    {'conversations': [{'from': 'human', 'value': 'hi'}, {'from': 'gpt', 'value': ''}]},
    {'transcript': 'Human: hi\n\nAssistant: hello'},
    {'prompt': [U, A]},
    {'chosen': [U, A]},
  ]
  for row in rows:
    assert read(tmp_path, row, drop_answer=True, field=next(iter(row))) == [U]
  for row in rows[:-1]:
    with pytest.raises(UserError, match='p.jsonl, line 2: .*[Ss]et drop_answer=True|non-blank'):
      read(tmp_path, row, field=next(iter(row)))


@pytest.mark.parametrize(
  ('row', 'message'),
  [
    ({'prompt': 'Human: hi\nAssistant:'}, 'does not follow an empty line'),
    ({'prompt': '\n\nHuman: hi\nAssistant: hello\nHuman: hi'}, 'does not follow an empty line'),
    ({'prompt': 'Human: hi\n\nassistant:'}, 'does not follow an empty line'),
    ({'prompt': 'H: hi\n\nA:'}, 'transcript with other labels'),
    ({'prompt': 'User: hi'}, 'transcript with other labels'),
    ({'prompt': 'USER: hi ASSISTANT:'}, 'transcript with other labels'),
    ({'prompt': '\n\n**Human:** hi\n\n**Assistant:**'}, 'transcript with other labels'),
    ({'prompt': 'human: hi\n\nassistant:'}, 'transcript with other labels'),
    ({'prompt': 'Human\uff1a hi'}, 'transcript with other labels'),
    ({'prompt': '\\n\\nHuman: hi\\n\\nAssistant:'}, 'transcript with other labels'),
    ({'prompt': '### Instruction:\nhi\n\n### Response:'}, 'transcript with other labels'),
    ({'prompt': 'Below is a task.\n\n### Response:\n'}, 'transcript with other labels'),
    ({'prompt': 'Be kind.\n\nHuman: hi\n\nAssistant:'}, 'transcript with other labels'),
    ({'prompt': 'Be kind.\n\nHuman: hi\n\nAssistant: hello\n\nHuman: b'}, 'with other labels'),
    ({'prompt': '<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n'}, 'with other labels'),
    ({'prompt': '<s>[INST] hi [/INST]'}, 'transcript with other labels'),
    # The label of the reply ends a line that has other text.
    ({'prompt': 'A chat. USER: hi ASSISTANT:'}, 'transcript with other labels'),
    ({'prompt': 'GPT4 Correct User: hi<|end_of_turn|>GPT4 Correct Assistant:'}, 'other labels'),
    ({'prompt': '<|prompter|>hi<|endoftext|><|assistant|>'}, 'transcript with other labels'),
    ({'prompt': '<s>Human: hi\n</s><s>Assistant: '}, 'transcript with other labels'),
    ({'prompt': '<<SYS>>\nbe kind\n<</SYS>>\nhi [/INST]'}, 'transcript with other labels'),
    ({'prompt': '<|START_OF_TURN_TOKEN|><|USER_TOKEN|>hi'}, 'transcript with other labels'),
    ({'prompt': 'Human: hi Assistant:'}, 'does not follow an empty line'),
    ({'prompt': 'Human: hi\n</s>Assistant:'}, 'does not follow an empty line'),
    ({'prompt': 'Assistant: hello\n\nHuman: hi'}, r"roles \['assistant', 'user'\]"),
    ({'prompt': "[{'role': 'user', 'content': 'hi'}]"}, 'not valid JSON'),
    ({'prompt': '\n\nHuman: \n\nAssistant:'}, 'non-blank text'),
    ({'messages': [U, {'role': 'tool', 'content': 'x'}, U]}, 'Tools are not supported'),
    ({'messages': [U, {**A, 'tool_calls': [{'id': 'x'}]}, U]}, r"1 has the fields .*'tool_calls'"),
    ({'messages': [{**U, 'name': 'Ann'}]}, r"has the fields \['name'\]"),
    ({'messages': [{'role': 'user', 'content': None}]}, 'must be non-blank text, but got None'),
    ({'messages': [{**U, 'from': 'human', 'value': 'hi'}]}, "has the fields .*'from', 'value'"),
    (
      {'messages': [{'role': 'user', 'content': [{'type': 'image_url', 'image_url': 'x'}]}]},
      'content of message 0 has the part .*image_url',
    ),
    ({'messages': [S, {'role': 'developer', 'content': 'x'}, U]}, 'alternating'),
    ({'messages': [S, U], 'system': 'be rude'}, 'and another system message'),
    ({'messages': {'role': ['user'], 'content': ['hi']}}, 'must be text or a list of messages'),
    ({'prompt': 'other', 'messages': [U, A]}, "'messages' and 'prompt' are different prompts"),
    ({'conversations': [U], 'messages': [U, A, U]}, 'are different prompts'),
    ({'prompt': 'a\0b'}, 'NUL'),
    ({'prompt': 'a', 'metadata': {'x': '\ud800'}}, 'unpaired surrogate'),
    ({'prompt': 'a', 'id': 'x' * 2000}, 'at most 1000 characters'),
    ({'prompt': 'a', 'id': 10**2000}, 'at most 1000 characters'),
    ({'prompt': 'a', 'id': 1.5}, 'id must be an integer or non-empty text'),
    ({'prompt': 'a', 'id': True}, 'id must be an integer or non-empty text'),
    ({'prompt': 'a', 'id': 'a\x1b[2Jb'}, 'must be printable'),
    ({'prompt': 'a', 'metadata': {'x': ['y']}}, "must be texts, but 'x' is"),
    ({'prompt': 'a', 'metadata': 'x'}, 'metadata must be an object'),
  ],
)
def test_other_shapes_are_refused_with_the_row_and_the_form(tmp_path, row, message):
  with pytest.raises(UserError, match=message) as error:
    read(tmp_path, row)
  assert f'{tmp_path}/p.jsonl, line 2: ' in str(error.value)
  assert 'A row needs {"messages": [{"role": "user", "content": "Hi"}' in str(error.value)


def test_prompts_know_their_place_which_is_no_part_of_their_identity(tmp_path):
  path = tmp_path / 'p.jsonl'
  path.write_text('\n{"prompt": "hi", "id": "x"}\n')
  (prompt,) = load_prompts(PromptSource(str(path)))
  assert str(prompt) == f'{path}, line 2' and prompt == Prompt('x', (U,))
  assert str(Prompt('x', (U,))) == "prompt 'x'"


@pytest.mark.parametrize(
  'text',
  ['Human:\n' * 10**5, ' ' * 10**6 + 'x', '#' * 10**6, '\n' * 10**6 + 'Assistant', '\\n' * 10**5],
)
def test_long_texts_take_linear_time(tmp_path, text):
  try:
    read(tmp_path, {'prompt': text})
  except UserError:
    pass


def test_errors_about_prompts_name_their_rows(tmp_path):
  def write(name, *rows):
    path = tmp_path / name
    path.write_text('\n'.join(json.dumps(row) for row in rows))
    return PromptSource(str(path))

  def load(**sources):
    return load_prompt_sets(PromptSets(**sources), seed=0)[0]

  none = PromptSource()
  two = write('two.jsonl', {'prompt': 'a'}, {'prompt': 'b'})
  one = write('one.jsonl', {'prompt': 'b'})
  given = write('given.jsonl', {'prompt': 'c', 'id': 'x'})
  other = write('other.jsonl', {'prompt': 'd', 'id': 'x'})
  sets = {'eval_harmful': none, 'eval_helpful': none}
  with pytest.raises(UserError, match=r'two.jsonl, line 2 and .*one.jsonl, line 1. They are the'):
    load(harmful=two, helpful=one, **sets)
  with pytest.raises(UserError, match=r'given.jsonl, line 1 and .*other.jsonl, line 1. Give each'):
    load(harmful=given, helpful=other, **sets)
  with pytest.raises(UserError, match=r'training .*two.jsonl, line 2.* evaluation .*one.jsonl, li'):
    load(harmful=two, helpful=none, eval_harmful=one, eval_helpful=none)
