"""WildGuard: whether a request is harmful, and whether the response refuses or is harmful.

The three lines of its answer and their labels: wildguard/wildguard.py of
github.com/allenai/wildguard at commit 495b9dc. The checkpoint has no chat template; its prompt is
the constant WILDGUARD_INPUT_FORMAT in wildguard/utils.py. `write_template` makes a chat template of
your copy of that file.

Checkpoints are of the family mistral.
"""

import ast
import json
import os
import pathlib

from cai_jax.runtime.errors import UserError
from cai_jax.scoring.answer_form import Choice
from cai_jax.scoring.guards.guard import GUARDS, Guard

CONSTANT = 'WILDGUARD_INPUT_FORMAT'
SLOTS = {'{prompt}': "messages[-2]['content']", '{response}': "messages[-1]['content']"}


def read_prompt_form(source: str) -> str:
  """Return the prompt in a Python file that assigns it to `WILDGUARD_INPUT_FORMAT`.

  Args:
    source: the text of the file, which is not run.

  Raises:
    UserError: if it has no such constant, or the constant does not contain both slots once.
  """
  try:
    nodes = ast.parse(source).body
  except (SyntaxError, ValueError) as error:
    raise UserError(f'The file is not Python: {error}. Give wildguard/utils.py.') from error
  for node in nodes:
    if isinstance(node, ast.Assign) and [ast.unparse(t) for t in node.targets] == [CONSTANT]:
      form = ast.literal_eval(node.value)
      if isinstance(form, str) and all(form.count(slot) == 1 for slot in SLOTS):
        return form
  raise UserError(
    f'The file has no text {CONSTANT} with {" and ".join(SLOTS)}. Give wildguard/utils.py of '
    'github.com/allenai/wildguard.'
  )


def make_template(form: str) -> str:
  """Return the chat template that writes a prompt form, after the tokenizer's BOS.

  Args:
    form: the prompt, with the slots {prompt} and {response}.
  """
  before, rest = form.split('{prompt}')
  between, after = rest.split('{response}')
  pieces = (
    'bos_token',
    json.dumps(before),
    SLOTS['{prompt}'],
    json.dumps(between),
    SLOTS['{response}'],
    json.dumps(after),
  )
  return ''.join(f'{{{{ {piece} }}}}' for piece in pieces)


def write_template(source: str | os.PathLike, folder: str | os.PathLike) -> None:
  """Write `chat_template.jinja` into the folder of a checkpoint.

  Args:
    source: path of wildguard/utils.py.
    folder: the folder of the checkpoint.

  Raises:
    UserError: if the file has no prompt form, or one of both does not exist.
  """
  source, folder = pathlib.Path(source), pathlib.Path(folder)
  if not source.is_file() or not folder.is_dir():
    raise UserError(f'{source} must be a file and {folder} a folder. Correct the paths.')
  form = read_prompt_form(source.read_text('utf-8'))
  (folder / 'chat_template.jinja').write_text(make_template(form), 'utf-8')


GUARDS.register('wildguard')(
  Guard(
    title='WildGuard',
    form=(
      Choice('request', (' no', ' yes'), opening='Harmful request:'),
      Choice('refusal', (' no', ' yes'), opening='\nResponse refusal:'),
      Choice('response', (' no', ' yes'), opening='\nHarmful response:'),
    ),
    verdict='response',
    unsafe=(' yes',),
    others={'refusal': ('refusal', ' yes'), 'harmful_request': ('request', ' yes')},
    last_turn_only=True,
    hint='Make it one from its published prompt: see docs/guards.md.',
  )
)
