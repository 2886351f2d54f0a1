"""Any bytes in a file of questions give questions or a UserError that names the file."""

import json

import pytest
from harness import Fault, Reader, check_reader

from cai_jax.data.published import read_published_samples
from cai_jax.evaluation.questions import read_questions

QUESTIONS = [
  {'prompt': 'Which?\n (A) one\n (B) two\nIt is:', 'corrects': [' (A)'], 'incorrects': [' (B)']},
  {'prompt': 'Say\u2028it', 'corrects': [' yes', ' ok'], 'incorrects': [' no'], 'more': 1.5},
]
SAMPLE = {
  'rl_prompt': '\n\nHuman: hi\n\nAssistant:',
  'initial_response': [{'sample': ' hello'}],
  'cst': [
    {
      'cst_key': 'harmful0',
      'cst_value': {'prompt': ['\n\nCritiqueRequest: a'], 'edit_request': '\n\nRevisionRequest: b'},
      'critique': {'sample': ' fine'},
      'revision': {'sample': ' better'},
    }
  ],
}


def lines(rows):
  return ''.join(json.dumps(row) + '\n' for row in rows).encode()


def check_questions(files, questions):
  rows = [line for line in _text(files['questions.jsonl']).split('\n') if line.strip()]
  assert questions and len(questions) == len(rows)
  for question, row in zip(questions, rows, strict=True):
    row = json.loads(row)
    assert question.prompt == row['prompt'] and list(question.corrects) == row['corrects']
    options = question.options
    assert len(set(options)) == len(options) > 1 and question.corrects and question.incorrects
    for text in (question.prompt, *options):
      assert text and '\0' not in text
      text.encode()


def check_samples(files, value):
  rows, principles = value
  assert rows and len(rows) == len([x for x in _text(files['x.jsonl']).split('\n') if x.strip()])
  for row in rows:
    assert row['prompt'] and row['prompt'][-1]['role'] == 'user'
    assert all(step['principle'] in principles for step in row['rounds'])
    json.dumps(row).encode()
    texts = [row['initial']['text'], *(step['revision']['text'] for step in row['rounds'])]
    assert all(isinstance(text, str) for text in texts)


def _text(data):
  if data[:2] in (b'\xff\xfe', b'\xfe\xff'):
    return data.decode('utf-16').replace('\r\n', '\n').replace('\r', '\n')
  return data.decode('utf-8-sig').replace('\r\n', '\n').replace('\r', '\n')


FILE = Reader(
  [{'questions.jsonl': lines(QUESTIONS)}, {'questions.jsonl': lines(QUESTIONS[1:])}],
  lambda folder: read_questions(folder / 'questions.jsonl'),
  check_questions,
)
SAMPLES = Reader(
  [{'x.jsonl': lines([SAMPLE, SAMPLE])}],
  lambda folder: read_published_samples(folder / 'x.jsonl'),
  check_samples,
)


@pytest.mark.parametrize('name', ['FILE', 'SAMPLES'])
def test_questions_and_samples(name):
  check_reader(f'{__name__}:{name}')


MODULE = 'cai_jax.evaluation.questions'
FAULTS = [
  Fault(f'{__name__}:{reader}', module, old, new)
  for reader, module, old, new in [
    ('FILE', MODULE, "  except ValueError as error:", "  except KeyError as error:"),
    ('FILE', MODULE, "if len(set(options)) != len(options):", "if not options:"),
    ('FILE', MODULE, "or not texts or", "or"),
    ('SAMPLES', 'cai_jax.data.published', "(KeyError, IndexError,", "(IndexError,"),
  ]
]  # fmt: skip
