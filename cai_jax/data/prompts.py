"""Prompts: dialogues that end with the user's turn, made from the rows of any source.

A row contains its dialogue in one of these fields:

  messages  [{"role": ..., "content": ...}, ...], ending with the user's turn; also named
            conversations or conversation, as in ShareGPT
  prompt    the user's text, a transcript, or such a list (TRL's conversational format)
  chosen    a dialogue with its answer (HH-RLHF); the prompt is everything before the last answer

A row may have both messages and a prompt if they are the same. The module dialogues.py describes
the shapes of a dialogue. Two further fields are optional: `id` (by default a hash of the dialogue)
and `metadata` (an object of texts). Beside messages, `system` is the text of a system message.
Other fields are read only if a setting names them.

prompt_files.py reads files and prompt_sources.py other sources; new ones are added there. sets/ has
the published sets, row_form.py reads a row, and mixtures.py counts the prompts of a mixture.
"""

import collections
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from cai_jax.data import prompt_files as prompt_files  # importing it registers the file formats
from cai_jax.data.dialogues import check_prompt
from cai_jax.data.mixtures import Component, count_draws, parse_mixture
from cai_jax.data.prompt_sources import ROW_FORM, PromptSource, read_rows
from cai_jax.data.row_form import MAX_ID, RowForm
from cai_jax.data.sets import PROMPT_SETS
from cai_jax.data.sets.prompt_set import row_form
from cai_jax.runtime.errors import UserError, show
from cai_jax.runtime.terminal import say
from cai_jax.runtime.text_files import check_characters


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A dialogue x that awaits the assistant's response.

  Attributes:
    id: unique within a run; random seeds are derived from it.
    messages: {'role', 'content'} dicts: an optional system message, then user and assistant
      alternating, with the user first and last. Every content is non-blank text.
    metadata: texts stored with the prompt, such as its category.
    place: the file and row from which the prompt was read, for error messages. It is no part of the
      prompt's identity.

  Raises:
    UserError: if an attribute does not have this form.
  """

  id: str
  messages: tuple[dict[str, str], ...]
  metadata: dict[str, str] = dataclasses.field(default_factory=dict)
  place: str = dataclasses.field(default='', compare=False, repr=False)

  def __post_init__(self) -> None:
    if not isinstance(self.id, str) or not self.id or not self.id.isprintable():
      raise UserError(f'A prompt id must be printable text and not empty, but got {show(self.id)}.')
    if len(self.id) > MAX_ID:
      raise UserError(f'A prompt id must have at most {MAX_ID} characters: {show(self.id)}.')
    object.__setattr__(self, 'messages', tuple(self.messages))
    check_prompt(self.messages)
    for name, value in self.metadata.items():
      if not isinstance(value, str):
        raise UserError(f'Prompt metadata must be texts, but {show(name)} is {show(value)}.')
      check_characters('The metadata', name + value)

  def __str__(self) -> str:
    """Return how error messages name the prompt: its place, or its id if it has no place."""
    return self.place or f'prompt {self.id!r}'


def load_prompts(source: PromptSource, seed: int = 0) -> list[Prompt]:
  """Load the prompts of a source or of a mixture, with unique ids, and check every row.

  Rows without an id get a hash of their dialogue as their id. If dialogues repeat, '-1', '-2', ...
  is appended to the hash. With `expand='every_turn'`, the prompt of a dialogue's last turn has this
  id, and that of an earlier turn k, counted from 1, has '/turn-k' appended.

  Args:
    source: where to load from; an empty source gives no prompts.
    seed: shuffles the prompts if `source.shuffle` is set, and draws those of a mixture. Their order
      depends on the seed and their ids only.

  Raises:
    UserError: if the source is missing or empty, a row is not a prompt, or two rows have the same
      id. The message names the line or row.
  """
  if source.mixture:
    return _draw_mixture(source, seed)
  if not source.source:
    return []
  rows = _read_prompts(source, seed)
  prompts = _make_ids_unique(rows)
  if not prompts:
    raise UserError(
      f'{source.name or source.source}: the source is empty; it needs at least one row. {ROW_FORM}'
    )
  if source.expand:
    prompts = [turn for prompt in prompts for turn in _every_turn(prompt)]
    _check_unique(prompts)
  prompts = _select(prompts, source)
  if source.shuffle:
    prompts = _shuffle(prompts, seed)
  return prompts if source.limit == -1 else prompts[: source.limit]


def _read_prompts(source: PromptSource, seed: int) -> list['_Row']:
  """Return the prompts of a source's rows."""
  form = row_form(source)
  rows, reasons = [], []
  for place, row in read_rows(source, seed):
    try:
      rows.append(_parse_row(place, row, form, source.source))
    except UserError as error:
      if source.invalid == 'error':
        raise
      reasons.append(error)
  if reasons:
    say(
      f'{source.source}: {len(reasons):,} of {len(rows) + len(reasons):,} rows are left out, '
      f'because they are no prompts. The first: {reasons[0]}'
    )
  return rows


def _every_turn(prompt: Prompt) -> list[Prompt]:
  """Return a prompt for each turn of the user in a dialogue; the last is the prompt itself."""
  ends = [i + 1 for i, message in enumerate(prompt.messages) if message['role'] == 'user']
  earlier = [
    dataclasses.replace(prompt, id=f'{prompt.id}/turn-{k}', messages=prompt.messages[:end])
    for k, end in enumerate(ends[:-1], 1)
  ]
  return [*earlier, prompt]


def _check_unique(prompts: Sequence[Prompt]) -> None:
  """Check that no id of a row equals that of an earlier turn of another dialogue."""
  seen: dict[str, Prompt] = {}
  for prompt in prompts:
    if prompt.id in seen:
      raise UserError(
        f'{prompt}: the id {show(prompt.id)} is already used at {seen[prompt.id]}. Change that id.'
      )
    seen[prompt.id] = prompt


def _select(prompts: Sequence[Prompt], source: PromptSource) -> list[Prompt]:
  """Return the prompts whose metadata match the conditions of a source.

  Raises:
    UserError: if no prompt has metadata of a condition's name, or its value.
  """
  conditions: dict[str, set[str]] = {}
  for condition in source.where:
    name, _, value = condition.partition('=')
    conditions.setdefault(name, set()).add(value)
  for name, values in conditions.items():
    found = {prompt.metadata[name] for prompt in prompts if name in prompt.metadata}
    if not found:
      names = sorted({name for prompt in prompts for name in prompt.metadata})
      raise UserError(f'where: no prompt has the metadata {name!r}. There are {names}.')
    if missing := values - found:
      raise UserError(
        f'where: no prompt has {name}={sorted(missing)[0]!r}. The values are '
        f'{show(sorted(found), 400)}.'
      )
  kept = [
    prompt
    for prompt in prompts
    if all(prompt.metadata.get(name) in values for name, values in conditions.items())
  ]
  if not kept:
    raise UserError(f'where: no prompt matches all of {list(source.where)}.')
  return kept


def _shuffle(prompts: Sequence[Prompt], seed: int) -> list[Prompt]:
  return sorted(prompts, key=lambda prompt: (_hash([seed, prompt.id]), prompt.id))


def _draw_mixture(source: PromptSource, seed: int) -> list[Prompt]:
  """Return prompts drawn from the components of a mixture, in an order that the seed decides.

  `where` holds for the components together, so it may name metadata that only some of them have.
  A dialogue that occurs earlier in the mixture is left out of those that `where` keeps.
  """
  components = parse_mixture(source, PROMPT_SETS)
  candidates = [prompt for part in components for prompt in _load_component(part, seed)]
  groups: dict[str, list[Prompt]] = {component.label: [] for component in components}
  for prompt in _select(candidates, source):
    groups[prompt.metadata['set']].append(prompt)
  groups = _leave_out_repeats(groups)
  sizes = {label: len(group) for label, group in groups.items()}
  counts = count_draws(sizes, [component.weight for component in components], source.limit)
  drawn = [
    prompt
    for group, count in zip(groups.values(), counts, strict=True)
    for prompt in _shuffle(group, seed)[:count]
  ]
  return _shuffle(drawn, seed)


def _leave_out_repeats(groups: Mapping[str, list[Prompt]]) -> dict[str, list[Prompt]]:
  """Return the prompts of each component without dialogues that occur earlier in the mixture."""
  seen: set[str] = set()
  kept = {}
  for label, group in groups.items():
    if not group:
      raise UserError(f'mixture: no prompt of {label!r} is left. Remove it, or change `where`.')
    first: dict[str, Prompt] = {}
    for prompt in group:
      first.setdefault(_normalize(prompt), prompt)
    kept[label] = [prompt for form, prompt in first.items() if form not in seen]
    seen |= first.keys()
    if not kept[label]:
      raise UserError(
        f'mixture: earlier components have all {len(group):,} prompts of {label!r}. Remove it.'
      )
    if left_out := len(group) - len(kept[label]):
      say(
        f'{label}: {left_out:,} of {len(group):,} prompts are left out, because they occur earlier '
        'in the mixture.'
      )
  return kept


def _load_component(component: Component, seed: int) -> list[Prompt]:
  """Return the prompts of a component, labelled with its name.

  Ids of a published set are hashes, so a prompt has the same id with and without a mixture. Rows of
  two components may have the same id, so ids that come from rows begin with the component's label.

  Args:
    component: the component.
    seed: the seed of the run.
  """
  prompts = load_prompts(dataclasses.replace(component.source, where=()), seed)
  label = {'set': component.label}
  prefix = f'{component.label}/' if row_form(component.source).keep_ids else ''
  return [
    dataclasses.replace(p, id=f'{prefix}{p.id}', metadata={**p.metadata, **label}) for p in prompts
  ]


def check_disjoint(
  training: Iterable[Prompt],
  evaluation: Iterable[Prompt],
  names: tuple[str, str] = ('training', 'evaluation'),
) -> None:
  """Check that no dialogue occurs in both sets, ignoring case and white space.

  Args:
    training: the first set, which is read once and need not fit in memory.
    evaluation: the second set.
    names: names of the two sets, for the error message.
  """
  evaluation = list(evaluation)
  shared = [(first, evaluation[i]) for i, (_, first) in _match(evaluation, training).items()]
  if shared:
    examples = '; '.join(
      f'{names[0]} {_name(first)} is {names[1]} {_name(prompt)}: '
      f'{show(prompt.messages[-1]["content"], 80)}'
      for first, prompt in shared[:3]
    )
    raise UserError(
      f'{len(shared)} of the {names[1]} prompts also occur in the {names[0]} prompts: {examples}. '
      'Remove them from one of the two sets.'
    )


def find_same(prompts: Sequence[Prompt], others: Iterable[Prompt]) -> dict[int, int]:
  """Return for each prompt that is also among the others, ignoring case and white space, its index.

  Args:
    prompts: the prompts.
    others: the prompts to compare with. They are read once and need not fit in memory.

  Returns:
    Index among the prompts → index among the others, of the last one that is the same.
  """
  return {i: j for i, (j, _) in _match(prompts, others).items()}


def _match(prompts: Sequence[Prompt], others: Iterable[Prompt]) -> dict[int, tuple[int, Prompt]]:
  """Return what `find_same` returns, each index together with its prompt."""
  forms = [_normalize(prompt) for prompt in prompts]
  wanted, found = set(forms), {}
  for j, other in enumerate(others):
    if (form := _normalize(other)) in wanted:
      found[form] = j, other
  return {i: found[form] for i, form in enumerate(forms) if form in found}


class _Row(NamedTuple):
  """The prompt of a row, and whether the row contains an id."""

  prompt: Prompt
  has_id: bool


def _parse_row(place: str, row: Any, form: RowForm, set_name: str) -> _Row:
  try:
    parsed = form.parse(row)
    check_prompt(parsed.messages)
    prompt_id = _hash(parsed.messages) if parsed.id is None else parsed.id
    metadata = {**parsed.metadata, 'set': set_name} if set_name in PROMPT_SETS else parsed.metadata
    return _Row(Prompt(prompt_id, tuple(parsed.messages), metadata, place), parsed.id is not None)
  except UserError as error:
    hint = '' if set_name in PROMPT_SETS else f' {ROW_FORM}'
    raise UserError(f'{place}: {error}{hint}') from error
  except RecursionError as error:
    raise UserError(f'{place}: the row is nested too deeply. {ROW_FORM}') from error


def _make_ids_unique(rows: Sequence[_Row]) -> list[Prompt]:
  """Return the prompts. Append a counter to repeated hashes, and reject repeated given ids."""
  places: dict[str, str] = {}
  for row in rows:
    if row.has_id and row.prompt.id in places:
      raise UserError(
        f'{row.prompt}: the id {show(row.prompt.id)} is already used at {places[row.prompt.id]}. '
        'Give each row its own id.'
      )
    if row.has_id:
      places[row.prompt.id] = str(row.prompt)
  copies: collections.Counter[str] = collections.Counter()
  prompts = []
  for prompt, has_id in rows:
    if not has_id:
      digest = prompt.id
      if copies[digest]:
        prompt = dataclasses.replace(prompt, id=f'{digest}-{copies[digest]}')
      copies[digest] += 1
      if prompt.id in places:
        raise UserError(
          f'{prompt}: the hash of this dialogue equals the id given at {places[prompt.id]}. '
          'Change that id.'
        )
    prompts.append(prompt)
  return prompts


def _name(prompt: Prompt) -> str:
  """Return the id of a prompt with its place, if it has one."""
  return f'{prompt.id!r} ({prompt.place})' if prompt.place else repr(prompt.id)


def _normalize(prompt: Prompt) -> str:
  turns = [[m['role'], ' '.join(m['content'].casefold().split())] for m in prompt.messages]
  return json.dumps(turns)


def _hash(value: Any) -> str:
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
