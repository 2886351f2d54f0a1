"""A finished run as its folder describes it: its config, its manifest and its constitution."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from cai_jax.constitution import CONSTITUTIONS, Constitution, load_constitution
from cai_jax.constitution.loading import ConstitutionConfig
from cai_jax.pipeline.relative_paths import make_absolute
from cai_jax.pipeline.schema import expand_paths
from cai_jax.pipeline.stage_report import diagnose_folder, read_summary
from cai_jax.report import Diagnosis
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import read_json
from cai_jax.runtime.manifest import read_manifest
from cai_jax.runtime.plugins import load_plugins

_HUB_NAME = re.compile(r'\w[\w.\-]*/[\w.\-]+')


@dataclasses.dataclass(frozen=True)
class FinishedRun:
  """What a run's folder says about it.

  Attributes:
    folder: the folder.
    values: its config as nested dicts of JSON types. Paths that were relative where the run was
      started are absolute.
    manifest: its manifest.
    paths: these relative paths, as written → absolute.
    constitution: the constitution of its D_CAI; None if the D_CAI is that of another run.
    summary: its evaluation; None if it has none.
    diagnosis: what the report finds wrong with it.
  """

  folder: pathlib.Path
  values: Mapping[str, Any]
  manifest: Mapping[str, Any]
  paths: Mapping[str, str]
  constitution: Constitution | None
  summary: Mapping[str, Any] | None
  diagnosis: Diagnosis

  def has_done(self, stage: str) -> bool:
    """Return whether a stage has finished."""
    return 'finished' in self.manifest['stages'].get(stage, {})

  def entry(self, stage: str) -> Mapping[str, Any]:
    """Return what the manifest records of a stage; nothing if it has not begun."""
    return self.manifest['stages'].get(stage, {})

  def is_hub_name(self, name: str) -> bool:
    """Return whether a model of the config is one of the hub.

    A name such as 'models/base' may be a folder of another machine. So the answer is no if an old
    cai_jax ran the stages, which did not record the relative paths.

    Args:
      name: as `values` has it.
    """
    makers = [e for n, e in self.manifest['stages'].items() if n in ('generate', 'train')]
    is_known = all('paths' in entry for entry in makers)
    return is_known and _HUB_NAME.fullmatch(name) is not None


def read_run(folder: str) -> FinishedRun:
  """Return what a run's folder says about it.

  Args:
    folder: the folder.

  Raises:
    UserError: if it is not the folder of a run, a file is damaged, or the constitution is not the
      one that the run has used.
  """
  path = pathlib.Path(folder).expanduser()
  for name in ('config.json', 'manifest.json'):
    if not (path / name).is_file():
      raise UserError(
        f'{folder} has no {name}, so it is not the folder of a run. Give the folder that '
        '--workdir named.'
      )
  values, manifest = read_json(path / 'config.json'), read_manifest(path / 'manifest.json')
  stages = reversed(manifest['stages'].values())
  paths = {k: v for entry in stages for k, v in entry.get('paths', {}).items()}
  absolute = make_absolute(values, paths)
  summary = path / 'evaluation' / 'summary.json'
  is_evaluated = 'finished' in manifest['stages'].get('evaluate', {})
  return FinishedRun(
    path,
    absolute,
    manifest,
    paths,
    _find_constitution(absolute, manifest),
    read_summary(summary) if is_evaluated else None,
    diagnose_folder(path, values, manifest),
  )


def _find_constitution(
  values: Mapping[str, Any], manifest: Mapping[str, Any]
) -> Constitution | None:
  used = manifest['stages'].get('generate', {}).get('settings', {}).get('constitution')
  if not used:
    return None
  section = values['constitution']
  if section['path'] not in CONSTITUTIONS and not pathlib.Path(section['path']).exists():
    plugins = tuple(values.get('plugins', ()))
    load_plugins(expand_paths(plugins, copied=False))  # they can register constitutions
  lists = {name: tuple(item) for name, item in section.items() if isinstance(item, list)}
  config = ConstitutionConfig(**section | lists | {'path': expand_paths(section['path'])})
  advice = 'Put the file back, or start this command in the folder in which you started the run.'
  try:
    constitution = load_constitution(config)
  except UserError as error:
    raise UserError(f'The card needs the constitution of the run. {error} {advice}') from error
  if constitution.fingerprint() != used:
    raise UserError(
      f'constitution.path={section["path"]!r} has changed since the run: its content is now '
      f'{constitution.fingerprint()}, and the run has used {used}. {advice}'
    )
  return constitution
