"""Convert published lists of principles into a constitution: requests of each kind.

  python -m cai_jax.constitution.convert --form=choose --input=public.txt --output=public.yaml

Some constitutions are published as rules for choosing between two responses, or as statements about
how an AI should behave. A critique and a revision need requests instead, so each rule is quoted in
one of each. A rule for choosing is itself the request for a comparison. Nothing else of a rule is
changed. The published texts are not part of this package: you convert your own copy.
docs/constitutions.md says where each is published, and in which form.

Read the result before you use it, and delete rules that say nothing about a single response.
"""

import argparse
import csv
import dataclasses
import hashlib
import io
import json
import pathlib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import yaml

from cai_jax.constitution.files import MAX_SIZE
from cai_jax.runtime.errors import UserError, show
from cai_jax.runtime.files import replacing
from cai_jax.runtime.registry import Registry
from cai_jax.runtime.terminal import say
from cai_jax.runtime.text_files import read_text

CONSENSUS = 0.5  # share of agreeing votes in each group of participants, by default
_START = r'(?:Please )?choose the (?:\w+ )?response that '
_CHOOSE = re.compile(rf'{_START}.*?(?={_START}|\n\s*\n|\Z)', re.IGNORECASE | re.DOTALL)
_END = re.compile(r'[.?!][”"’\']*')
_COLUMNS = ('comment-id', 'moderated', 'comment-body', 'group_0_consensus', 'group_1_consensus')

Rule = tuple[str, str]  # id and text


@dataclasses.dataclass(frozen=True)
class Form:
  """A form of published lists.

  Attributes:
    read: maps a file's text and the least consensus to the rules.
    critique: the critique request, with {} in place of the rule.
    revision: the revision request, with {} in place of the rule.
    comparison: the comparison request, with {} in place of the rule.
  """

  read: Callable[[str, float], list[Rule]]
  critique: str
  revision: str
  comparison: str


FORMS: Registry[Form] = Registry('form of a published constitution')


def read_choices(text: str, consensus: float = CONSENSUS) -> list[Rule]:
  """Return the rules of a list for choosing between responses.

  Text is searched for "Choose the response that …", the form of the public constitution of
  Collective Constitutional AI when it is copied from its PDF. A rule ends at the next one, or at an
  empty line. In a JSON list of texts each text is a rule, as in the principles for reinforcement
  learning of Bai et al. 2022. What follows the last sentence of a rule, such as a heading or
  "Options:", is dropped.

  Args:
    text: text or a JSON list of texts.
    consensus: not used.

  Raises:
    UserError: if there is no such rule.
  """
  del consensus
  if text.lstrip().startswith('['):
    found = _read_list(text)
  else:
    found = [match[0] for match in _CHOOSE.finditer(text)]
  if not found:
    raise UserError('the file has no rule that begins with "Choose the response that".')
  return [(f'rule_{number}', _whole_sentences(rule)) for number, rule in enumerate(found, 1)]


def _read_list(text: str) -> list[str]:
  """Return the texts of a JSON list."""
  try:
    texts = json.loads(text)
  except ValueError as error:
    raise UserError(f'the file begins like a JSON list and is none: {error}') from error
  if not all(isinstance(rule, str) and rule.strip() for rule in texts):
    raise UserError('the JSON list must have non-blank texts only.')
  return texts


def _whole_sentences(rule: str) -> str:
  """Return a text on one line, up to the end of its last sentence if one ends."""
  rule = ' '.join(rule.split())
  ends = [end.end() for end in _END.finditer(rule)]
  return rule[: ends[-1]] if ends else rule


def read_statements(text: str, consensus: float = CONSENSUS) -> list[Rule]:
  """Return the statements of a Polis export on which the groups of participants agree.

  This is the form of clean_comments.csv in the data of Collective Constitutional AI (repository
  saffronh/ccai): one statement per row, with the share of each of the two groups that agrees.

  Args:
    text: CSV with the columns `_COLUMNS`; others are ignored.
    consensus: least share of both groups, in [0, 1].

  Raises:
    UserError: if a column is missing, a share is no number, or no statement has that consensus.
  """
  rows = csv.DictReader(io.StringIO(text))
  missing = [name for name in _COLUMNS if name not in (rows.fieldnames or ())]
  if missing:
    raise UserError(f'the file has no columns {missing}. It needs {list(_COLUMNS)}.')
  rules = []
  for number, row in enumerate(rows, 2):
    try:
      shares = [float(row[f'group_{group}_consensus'] or 0) for group in (0, 1)]
    except (TypeError, ValueError):
      raise UserError(f'row {number} has no shares of the two groups: {show(row)}.') from None
    if row['moderated'] == '1' and min(shares) >= consensus and row['comment-body'].strip():
      rules.append((f'statement_{row["comment-id"]}', ' '.join(row['comment-body'].split())))
  if not rules:
    raise UserError(f'no statement has a consensus of {consensus} in both groups. Lower it.')
  return rules


FORMS.register('choose')(
  Form(
    read_choices,
    'This rule chooses between responses: "{}" Identify everything in your last response for which '
    'the rule would prefer another one.',
    'Rewrite your last response so that this rule would choose it: "{}"',
    '{}',
  )
)
FORMS.register('statements')(
  Form(
    read_statements,
    'Many people agree with this statement: "{}" Identify everything in your last response that '
    'does not fit it.',
    'Rewrite your last response so that it fits this statement: "{}"',
    'Many people agree with this statement: "{}" Choose the response that fits it better.',
  )
)


def convert(text: str, form: str, consensus: float = CONSENSUS) -> list[dict[str, Any]]:
  """Return the principles of a published list, in our form. Equal rules become one.

  Args:
    text: the text of the file.
    form: a name of `FORMS`.
    consensus: least share of both groups that agrees, for statements with votes.

  Raises:
    UserError: if the file does not have the form.
  """
  by_text: dict[str, str] = {}
  for name, rule in FORMS[form].read(text, consensus):
    by_text.setdefault(rule, name)
  return [
    {
      'id': name,
      'critique_request': FORMS[form].critique.format(rule),
      'revision_request': FORMS[form].revision.format(rule),
      'comparison_request': FORMS[form].comparison.format(rule),
    }
    for rule, name in by_text.items()
  ]


def main(arguments: Sequence[str] | None = None) -> None:
  """Convert the file that the command line names."""
  parser = argparse.ArgumentParser(
    prog='python -m cai_jax.constitution.convert',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--form', required=True, choices=sorted(FORMS), help='form of the input')
  parser.add_argument('--input', required=True, type=pathlib.Path, help='your copy of the list')
  parser.add_argument('--output', required=True, type=pathlib.Path, help='the YAML file to write')
  parser.add_argument(
    '--consensus',
    type=float,
    default=CONSENSUS,
    help='least share of each group of participants that agrees, for --form=statements',
  )
  options = parser.parse_args(arguments)
  try:
    text = read_text(str(options.input), MAX_SIZE)
    principles = convert(text, options.form, options.consensus)
  except (OSError, UserError) as error:
    sys.exit(f'error: {options.input}: {error}')
  digest = hashlib.sha256(options.input.read_bytes()).hexdigest()
  header = f'# Converted from {options.input.name} (SHA-256 {digest}), --form={options.form}.\n'
  body = yaml.safe_dump({'principles': principles}, sort_keys=False, allow_unicode=True, width=96)
  with replacing(options.output) as temporary:
    temporary.write_text(header + body, encoding='utf-8')
  say(f'{options.output}: {len(principles)} principles')


if __name__ == '__main__':
  main()
