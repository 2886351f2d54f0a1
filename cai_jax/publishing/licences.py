"""Licences of models and prompts, as far as their folders and entries state them."""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import huggingface_hub
import yaml

from cai_jax.data.mixtures import parse_mixture
from cai_jax.data.prompt_sources import PromptSource
from cai_jax.data.sets import PROMPT_SETS
from cai_jax.publishing.names import public_name
from cai_jax.tiny.files import MODELS

# Texts of licences, and what they ask to be passed on, by the names that publishers give them.
_TEXTS = ('LICENSE*', 'LICENCE*', 'NOTICE*', 'USE_POLICY*')
OWN = 'apache-2.0'  # of cai_jax, with the embedded models and prompts


class Licence(NamedTuple):
  """A licence.

  Attributes:
    id: identifier on the hub, such as 'apache-2.0', or 'other'; '' if it is not known.
    source: where it is stated, for the card.
    name: its name, for 'other'.
    link: its text, for 'other': 'LICENSE' or a URL.
    files: texts that are published with the model.
  """

  id: str
  source: str = ''
  name: str = ''
  link: str = ''
  files: tuple[pathlib.Path, ...] = ()

  def describe(self) -> str:
    """Return the licence in words."""
    return (self.name or self.id) if self.id else 'unknown'


def find_model_licence(base: str, is_on_hub: bool = False) -> Licence:
  """Return the licence of a model, from the metadata of its card or from a file LICENSE.

  Args:
    base: an embedded model, a folder or a hub name.
    is_on_hub: whether it is a hub name. Otherwise the hub is not asked: a model of this name there
      would be another one.
  """
  if base in MODELS:
    return Licence(OWN, 'the licence of cai_jax, of which it is a part')
  folder = pathlib.Path(base).expanduser()
  is_local = folder.is_dir() and not is_on_hub
  if not is_local and not is_on_hub:
    return Licence('')
  texts = sorted({file for pattern in _TEXTS for file in folder.glob(pattern)} if is_local else ())
  card = folder / 'README.md' if is_local else _fetch(base, 'README.md')
  stated = _read_metadata(card) if card else {}
  if not is_local and stated:
    fetched = [_fetch(base, name) for name in ('LICENSE', 'LICENSE.txt', 'NOTICE', 'USE_POLICY.md')]
    texts = [file for file in fetched if file]
  name, files = public_name(base), tuple(file for file in texts if file.is_file())
  if isinstance(identifier := stated.get('license'), str):
    return Licence(
      identifier,
      f'the card of {name}',
      str(stated.get('license_name') or ''),
      str(stated.get('license_link') or ''),
      files,
    )
  if files:
    first = files[0].name
    return Licence('other', f'{first} of {name}', f'that of {name}', first, files)
  return Licence('')


def _fetch(repo: str, name: str) -> pathlib.Path | None:
  """Return a file of a model on the hub, or None if it has none or cannot be reached."""
  try:
    return pathlib.Path(huggingface_hub.hf_hub_download(repo, name))
  except (OSError, ValueError):
    return None


def _read_metadata(card: pathlib.Path) -> Mapping[str, Any]:
  """Return the metadata of a card; nothing if it has none or is damaged."""
  try:
    return huggingface_hub.metadata_load(card) or {}
  except (OSError, ValueError, yaml.YAMLError):
    return {}


class PromptOrigin(NamedTuple):
  """Where prompts come from.

  Attributes:
    name: the set, file or dataset.
    licence: as its publisher states it, or 'unknown'.
    hub: its dataset on the hub, or ''.
    is_own: whether the prompts are those of the embedded world.
  """

  name: str
  licence: str = 'unknown'
  hub: str = ''
  is_own: bool = False


def list_origins(source: Mapping[str, Any]) -> list[PromptOrigin]:
  """Return where the prompts of a section `prompts.*` come from.

  Args:
    source: the values of the section; none come from a section without a source.
  """
  lists = {name: tuple(value) for name, value in source.items() if isinstance(value, list)}
  settings = PromptSource(**{**source, **lists})
  if settings.mixture:
    parts = parse_mixture(settings, PROMPT_SETS)
    return [_origin(part.source, part.label) for part in parts]
  return [_origin(settings, settings.source)] if settings.source else []


def _origin(source: PromptSource, label: str) -> PromptOrigin:
  if (entry := PROMPT_SETS.get(source.source)) is not None:
    return PromptOrigin(f'{label}: {entry.title}', entry.licence, entry.hub)
  if source.source == 'tiny':
    return PromptOrigin('the embedded world of cai_jax', OWN, is_own=True)
  if source.source == 'hub':
    name = public_name(source.name)
    return PromptOrigin(name, hub=name if name == source.name else '')
  return PromptOrigin(public_name(source.name or source.source))
