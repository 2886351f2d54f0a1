"""Write a page with a chain browser as one HTML file that loads nothing else.

Models that were asked to misbehave wrote some of the texts, so no text may become markup. The
chains are JSON in a script element that is not executed, with every `<`, `>` and `&` escaped. The
script of the page displays them only as text nodes. A Content Security Policy allows the template's
one script and one style sheet, by their hashes, and no network request.
"""

import base64
import collections
import hashlib
import json
import os
import pathlib
import re
from typing import Any

from cai_jax.report.elements import escape, finite_json
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import replacing

TEMPLATE = pathlib.Path(__file__).with_name('page.html')
MARKER = re.compile(r'@@([a-z_]+)@@')


def write_page(
  path: str | os.PathLike,
  *,
  title: str,
  head: str,
  results: str,
  sections: str,
  chains: list[dict[str, Any]],
  opening: str = '',
) -> None:
  """Write a page atomically.

  Args:
    path: the HTML file; its folder must exist.
    title: title of the page, as plain text.
    head: HTML below the title.
    results: HTML of the section of results.
    sections: HTML of the sections between the results and the chains, each made by `section`.
    chains: the chains, in the form that `write_report` describes. If they have an `arm`, readers
      can filter by it. Those with `answers` make a view of their own.
    opening: HTML of the sections before the results, each made by `section`.

  Raises:
    UserError: if a chain lacks a field or two chains have the same id.
  """
  for number, chain in enumerate(chains):
    _check_chain(chain, number)
  counts = collections.Counter(('answers' in chain, chain['id']) for chain in chains)
  duplicates = [name for (_, name), count in counts.items() if count > 1]
  if duplicates:
    raise UserError(
      f'Several chains have the same id: {duplicates[:5]}. Give each chain its own id.'
    )
  template = TEMPLATE.read_text('utf-8')
  page = fill_template(
    template,
    policy=security_policy(template),
    title=escape(title),
    head=head,
    opening=opening,
    results=results,
    sections=sections,
    chains=embedded_json(chains),
  )
  with replacing(path) as temporary:
    # A lone surrogate, half a character from a token that was cut off, has no UTF-8 encoding.
    temporary.write_bytes(page.encode('utf-8', errors='backslashreplace'))


def fill_template(template: str, **values: str) -> str:
  """Return the template with each `@@name@@` replaced. Markers inside values are left as they are.

  Raises:
    ValueError: if the names of the markers and of the values differ.
  """
  markers = set(MARKER.findall(template))
  if markers != set(values):
    raise ValueError(f'The template has the markers {sorted(markers)}, not {sorted(values)}.')
  return MARKER.sub(lambda match: values[match[1]], template)


def security_policy(template: str) -> str:
  """Return a Content-Security-Policy that allows only the template's script and style sheet."""
  hashes = {}
  for tag in ('script', 'style'):
    (body,) = re.findall(rf'<{tag}>(.*?)</{tag}>', template, re.DOTALL)
    digest = hashlib.sha256(body.encode('utf-8')).digest()
    hashes[tag] = f"'sha256-{base64.b64encode(digest).decode()}'"
  return (
    f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; "
    "base-uri 'none'; form-action 'none'"
  )


def embedded_json(value: Any) -> str:
  """Return JSON that is safe inside a `<script>` element and parses back to the same value.

  NaN and infinities, which JSON lacks, become the strings 'NaN', 'Infinity' and '-Infinity'.
  """
  text = json.dumps(finite_json(value), ensure_ascii=True, allow_nan=False, separators=(',', ':'))
  for character in '<>&':
    text = text.replace(character, f'\\u{ord(character):04x}')
  return text


def _check_chain(chain: dict[str, Any], number: int) -> None:
  where = f'chain {number} (id {chain.get("id")!r})'
  for key in ('id', 'prompt', 'initial', 'rounds'):
    if key not in chain:
      raise UserError(f'{where} has no {key!r}. A chain needs id, prompt, initial and rounds.')
  for i, step in enumerate(chain['rounds'], 1):
    for key in ('principle', 'critique', 'revision'):
      if key not in step:
        raise UserError(
          f'{where}, round {i} has no {key!r}. If the round has no critique, set it to None.'
        )
  if 'answers' in chain and 'aligned' not in chain['answers']:
    raise UserError(
      f"{where} has answers without those of 'aligned'. Give that of M_aligned first."
    )
  num_responses = 1 + len(chain['rounds'])
  violations = chain.get('violations')
  if violations is not None and len(violations) != num_responses:
    raise UserError(
      f'{where} has {num_responses} responses and {len(violations)} lists of violations. Give one '
      'list per response.'
    )
