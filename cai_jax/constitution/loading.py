"""Which constitution a run uses, and which of its principles."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Sequence

from cai_jax.constitution.convert import convert
from cai_jax.constitution.files import MAX_SIZE, read_constitution
from cai_jax.constitution.principles import Constitution, Principle
from cai_jax.constitution.prose import SUFFIX, read_prose
from cai_jax.runtime.errors import UserError, show
from cai_jax.runtime.registry import Registry
from cai_jax.runtime.settings import setting
from cai_jax.runtime.text_files import parse_json, read_text

GENERAL = str(pathlib.Path(__file__).parents[1] / 'constitution.yaml')
EVERYDAY = str(pathlib.Path(__file__).parent / 'everyday.yaml')

# Paths of constitutions that a config can refer to by a short name.
CONSTITUTIONS: Registry[str] = Registry('constitution')
CONSTITUTIONS.register('general')(GENERAL)
CONSTITUTIONS.register('everyday')(EVERYDAY)


@dataclasses.dataclass(frozen=True)
class ConstitutionConfig:
  """Which constitution to load, and which of its principles to keep."""

  path: str = setting(
    'general',
    "'general' (against harm), 'everyday' (for ordinary help), 'tiny', a YAML or JSON file, the "
    'folder of the published JSON files, a JSON list of rules for choosing between responses, or a '
    'Markdown file in sections, each of which is a principle. docs/constitutions.md lists '
    'constitutions.',
    path=True,
  )
  tags: tuple[str, ...] = setting(
    (), 'Keep only principles that have at least one of these tags. () keeps all.'
  )
  ids: tuple[str, ...] = setting((), 'Keep only principles with these ids. () keeps all.')
  leave_out: tuple[str, ...] = setting(
    (),
    'Ids of principles to leave out. A round that draws one of them draws again, so prompts that '
    'would not have drawn it keep their principles.',
    added=True,
  )


def load_constitution(config: ConstitutionConfig) -> Constitution:
  """Load a constitution and keep the selected principles, in the order of the file.

  Args:
    config: the path, tags, ids, and ids to leave out. A principle is kept if it passes all.

  Raises:
    UserError: if the file is missing or malformed, a tag or id matches no principle, or no
      principle remains. The message names the file, the principle and the allowed fields.
  """
  path = CONSTITUTIONS[config.path] if config.path in CONSTITUTIONS else config.path
  try:
    if path.lower().endswith(SUFFIX):
      constitution = read_prose(path)
    elif _is_list(path):
      rules = convert(read_text(path, MAX_SIZE), 'choose')
      constitution = Constitution(tuple(Principle(**rule) for rule in rules))
    else:
      principles, demonstrations = read_constitution(path, sorted(CONSTITUTIONS))
      constitution = Constitution(tuple(principles), tuple(demonstrations))
    _check_different(constitution.principles)
  except UserError as error:
    message = str(error)
    raise UserError(message if message.startswith(path) else f'{path}: {message}') from error
  selected = _select(path, 'tags', constitution.principles, config.tags, lambda p: p.tags)
  selected = _select(path, 'ids', selected, config.ids, lambda p: (p.id,))
  kept = _without(path, selected, config.leave_out)
  return dataclasses.replace(
    constitution, principles=kept, drawn_from=selected if kept != selected else ()
  )


def _is_list(path: str) -> bool:
  """Return whether a file is a JSON list of rules, each of which says what to choose."""
  if not path.lower().endswith('.json') or not pathlib.Path(path).is_file():
    return False
  text = read_text(path, MAX_SIZE)
  try:
    rules = parse_json(text) if text.lstrip().startswith('[') else []
  except (ValueError, RecursionError):
    return False
  return bool(rules) and all(isinstance(r, str) and 'choose' in r.lower() for r in rules)


def _check_different(principles: Sequence[Principle]) -> None:
  """Raise UserError if two principles have the same requests, which doubles their weight."""
  first_index: dict[tuple[str, str], int] = {}
  for i, principle in enumerate(principles):
    requests = (principle.critique_request, principle.revision_request)
    first = first_index.setdefault(requests, i)
    if first != i:
      raise UserError(
        f'Principles {first} ({principles[first].id!r}) and {i} ({principle.id!r}) have the same '
        'requests. Remove one of the two. To draw it more often, give it a larger weight.'
      )


def _select(
  path: str,
  name: str,
  principles: Sequence[Principle],
  selection: Sequence[str],
  labels: Callable[[Principle], Iterable[str]],
) -> tuple[Principle, ...]:
  """Return the principles that have one of the selected labels; an empty selection keeps all."""
  if isinstance(selection, str):
    raise UserError(f'{name} must be a tuple of names, but got the text {show(selection)}.')
  available = sorted({label for principle in principles for label in labels(principle)})
  unknown = [label for label in selection if label not in available]
  if unknown:
    raise UserError(
      f'{path}: no principle has the {name} {show(unknown)}. Available are {show(available, 400)}.'
    )
  if not selection:
    return tuple(principles)
  return tuple(p for p in principles if not set(selection).isdisjoint(labels(p)))


def _without(
  path: str, principles: tuple[Principle, ...], left_out: Sequence[str]
) -> tuple[Principle, ...]:
  """Return the principles whose ids are not left out."""
  if not left_out:
    return principles
  rest = {p.id for p in _select(path, 'ids', principles, left_out, lambda p: (p.id,))}
  kept = tuple(principle for principle in principles if principle.id not in rest)
  if not kept:
    raise UserError(
      f'{path}: leave_out={show(tuple(left_out), 400)} leaves no principle. Keep at least one.'
    )
  return kept
