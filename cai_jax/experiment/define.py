"""What an experiment is: arms of one base config, what of each is scored, and the figures."""

import dataclasses
import hashlib
import importlib.util
import inspect
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from cai_jax.runtime.errors import UserError
from cai_jax.runtime.settings import flatten

GENERATED = re.compile(r'initial|last|revision_\d+')  # responses that D_CAI holds
# Those to held-out prompts, and where they lie in a run's folder.
TRAINED = {
  'base': 'evaluation/base',
  'revised': 'evaluation/base',
  'aligned': 'evaluation/aligned',
}
RATES = (('breaks a rule', 'violation_rate'), ('still answers', 'helpful_rate'))
ROOT = pathlib.Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Arm:
  """One thing that is compared.

  Attributes:
    overrides: config field → value, where it differs from the experiment's base.
    response: what is scored. 'initial', 'revision_n' and 'last' (revision) are responses of D_CAI;
      'base' and 'aligned' are answers of M_θ and M_aligned to held-out prompts, and 'revised' the
      last revisions of M_θ's answers to those that are harmful; for these the run is trained and
      evaluated.
    facts: further columns of the table.

  Raises:
    ValueError: for another response.
  """

  overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  response: str = 'aligned'
  facts: Mapping[str, float | str] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    if self.response not in TRAINED and not GENERATED.fullmatch(self.response):
      raise UserError(
        f'response={self.response!r}; an arm scores initial, revision_n or last, or base, revised '
        'or aligned.'
      )

  @property
  def stages(self) -> tuple[str, ...]:
    """Stages of a run that the response needs."""
    trained = ('generate', 'train', 'evaluate', 'report')
    return trained if self.response in TRAINED else ('generate',)


@dataclasses.dataclass(frozen=True)
class Experiment:
  """A question, as arms that differ in what they say and in nothing else.

  Attributes:
    arms: by name, in the table's order.
    reference: the arm that the others are compared with, prompt by prompt.
    figures: as `cai_jax.report.write_experiment` draws them.
    overrides: config field → value, for all arms.
    base: config file, from the repository's root.
    seeds: of all arms alike.
    diversity: measure it, too; see `cai_jax.evaluation.compare.diversity`.

  Raises:
    ValueError: for a reference that is no arm, a comma in an arm's name, or a figure of arms that
      are not there.
  """

  arms: Mapping[str, Arm]
  reference: str
  figures: Sequence[Mapping[str, Any]] = ()
  overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  base: str = 'configs/tiny.py'
  seeds: tuple[int, ...] = (0, 1, 2)
  diversity: bool = False

  def __post_init__(self):
    if self.reference not in self.arms:
      raise UserError(f'reference={self.reference!r} is none of the arms {list(self.arms)}.')
    if commas := [name for name in self.arms if ',' in name]:
      raise UserError(f'the arm {commas[0]!r} has a comma in its name, at which --arms is split.')
    drawn = {name for figure in self.figures for name in drawn_arms(figure)}
    if drawn - set(self.arms):
      raise UserError(f'a figure draws {sorted(drawn - set(self.arms))}; no such arm.')

  def only(self, names: Sequence[str]) -> 'Experiment':
    """The experiment with some of its arms, and its reference; figures that lack one are left out.

    Raises:
      ValueError: for a name that is no arm.
    """
    unknown = [name for name in names if name not in self.arms]
    if unknown:
      raise UserError(f'unknown arm {", ".join(unknown)}; there is {", ".join(self.arms)}.')
    kept = {k: arm for k, arm in self.arms.items() if k in names or k == self.reference}
    figures = tuple(figure for figure in self.figures if drawn_arms(figure) <= set(kept))
    return dataclasses.replace(self, arms=kept, figures=figures)

  def settings(self, arm: str, seed: int) -> dict[str, Any]:
    """Config field → value of a run, against the base config."""
    return {**self.overrides, **self.arms[arm].overrides, 'seed': seed}


def rates_line(
  caption: str,
  arms: Sequence[str],
  x: Sequence[float],
  x_label: str,
  group: str = 'harmful',
  y_label: str = 'share of responses (%)',
) -> dict[str, Any]:
  """The figure of both rates, of the arms in their order at places x."""
  places = {'arms': list(arms), 'x': list(x)}
  series = [{'name': name, 'metric': metric, **places} for name, metric in RATES]
  return {
    'kind': 'line',
    'caption': caption,
    'group': group,
    'x_label': x_label,
    'y_label': y_label,
    'series': series,
  }


def rates_by_arm(caption: str, arms: Sequence[str], group: str = 'harmful') -> dict[str, Any]:
  """The figure of both rates with a line for each arm."""
  metrics = [metric for _, metric in RATES]
  return {
    'kind': 'arms',
    'caption': caption,
    'group': group,
    'metrics': metrics,
    'arms': list(arms),
  }


def drawn_arms(figure: Mapping[str, Any]) -> set[str]:
  """The arms that a figure shows."""
  series = figure.get('series', [figure])
  return {name for line in series for name in line['arms']}


def load(spec: str) -> tuple[str, str, Experiment]:
  """(name, docstring, experiment) of a file.

  Args:
    spec: path of a Python file with `get_experiment()`; after a colon, a text that it is given, as
      config files take it.

  Raises:
    ValueError: if there is no such file, or it holds no experiment.
  """
  path, _, argument = str(spec).partition(':')
  file = pathlib.Path(path)
  if not file.is_file():
    files = sorted((ROOT / 'experiments').glob('*.py'))
    known = [f'experiments/{f.name}' for f in files if '\ndef get_experiment(' in f.read_text()]
    raise UserError(f'{path}: no such file; there is {", ".join(known)}.')
  module = _imported(file)
  if not hasattr(module, 'get_experiment'):
    raise UserError(f'{path} has no get_experiment(): it is not the file of an experiment.')
  takes = bool(inspect.signature(module.get_experiment).parameters)
  if argument and not takes:
    raise UserError(f'{path} takes no text after a colon, and {argument!r} was given.')
  experiment = module.get_experiment(argument) if argument else module.get_experiment()
  return file.stem, inspect.cleandoc(module.__doc__ or ''), experiment


def base_config(path: str) -> ConfigDict:
  """The config of a file with `get_config()`.

  Raises:
    ValueError: if there is no such file.
  """
  file = pathlib.Path(path)
  file = file if file.is_file() else ROOT / path
  if not file.is_file():
    raise UserError(f'{path}: no such config.')
  return _imported(file).get_config()


def overridden(config: ConfigDict, settings: Mapping[str, Any]) -> ConfigDict:
  """A copy of the config with fields set, each by its dotted name.

  Raises:
    ValueError: for a field that it does not have, or a value of another kind.
  """
  config = config.copy_and_resolve_references().lock()
  known = flatten(config.to_dict())
  for name, value in settings.items():
    if name not in known:
      raise UserError(f'the config has no field {name!r}; configs/default.py lists every field.')
    try:
      config.update_from_flattened_dict({name: value})
    except TypeError as error:
      raise UserError(f'{name}={value!r} cannot be set in the config: {error}') from error
  return config


def changed(config: ConfigDict, settings: Mapping[str, Any]) -> dict[str, Any]:
  """Those of the settings that the config does not have anyway, and the seed."""
  base = flatten(config.to_dict())
  return {k: v for k, v in settings.items() if k == 'seed' or k not in base or base[k] != v}


def run_name(base: str, settings: Mapping[str, Any]) -> str:
  """The folder's name of a run: equal settings of equal configs have one run, in any experiment."""
  told = [f'{field.split(".")[-1]}={_told(value)}' for field, value in sorted(settings.items())]
  name = re.sub(r'[^\w.=,+-]+', '_', '-'.join([pathlib.Path(base).stem, *told]))
  content = json.dumps([base, dict(settings)], sort_keys=True, default=str)
  return f'{name[:120]}-{hashlib.sha256(content.encode()).hexdigest()[:8]}'


def _told(value: Any) -> str:
  return f'{len(value)}of' if isinstance(value, tuple) and len(value) > 3 else str(value)


def _imported(file: pathlib.Path):
  spec = importlib.util.spec_from_file_location(file.stem, file)
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except (ImportError, SyntaxError) as error:
    raise UserError(f'{file} cannot be read as Python: {error}') from error
  return module
