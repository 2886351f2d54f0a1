"""Define an experiment: its arms, the responses it scores, and its figures."""

import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from cai_jax.pipeline.schema import complete_config
from cai_jax.report.results import check_figures
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.settings import flatten
from cai_jax.runtime.user_code import call_function
from cai_jax.tiny.files import BY_SEED, model_of_seed

D_CAI_RESPONSE = re.compile(r'initial|last|revision_\d+')
# Responses to held-out prompts, and the dataset in the run's folder that holds them.
HELD_OUT_RESPONSES = {
  'base': 'evaluation/base',
  'revised': 'evaluation/base',
  'aligned': 'evaluation/aligned',
}
RATES = (('breaks a rule', 'violation_rate'), ('still answers', 'helpful_rate'))
ROOT = pathlib.Path(__file__).resolve().parents[2]  # of the repository


@dataclasses.dataclass(frozen=True)
class Arm:
  """One condition of an experiment.

  Attributes:
    overrides: values of the config fields in which this arm differs from the experiment's base.
    response: the response to score. 'initial', 'revision_n' and 'last' (the last revision) are
      responses of D_CAI. 'base' and 'aligned' are the answers of M_θ and M_aligned to held-out
      prompts, and 'revised' is the last revision of M_θ's answer where the prompt is harmful. For
      the last three, the run also trains and evaluates.
    facts: additional columns of the result table.

  Raises:
    UserError: if `response` is none of these.
  """

  overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  response: str = 'aligned'
  facts: Mapping[str, float | str] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    if self.response not in HELD_OUT_RESPONSES and not D_CAI_RESPONSE.fullmatch(self.response):
      raise UserError(
        f'response={self.response!r} is not a response that an arm can score. '
        'Use initial, revision_n, last, base, revised or aligned.'
      )

  @property
  def stages(self) -> tuple[str, ...]:
    """The stages of a run that produce the response."""
    if self.response in HELD_OUT_RESPONSES:
      return ('generate', 'train', 'evaluate', 'report')
    return ('generate',)


@dataclasses.dataclass(frozen=True)
class Experiment:
  """A question, stated as arms that differ only in overrides and in the response to score.

  Attributes:
    arms: the arms by name, in the order of the result table.
    reference: name of the arm that all others are compared with, prompt by prompt.
    figures: figure specifications, as `cai_jax.report.write_experiment` describes them.
    overrides: values of config fields for all arms.
    base: path of the config file, relative to the repository's root.
    seeds: every arm runs once with each seed. A seed sets the generated prompts, all draws, the
      order of training examples and, with `model_by_seed`, the embedded model.
    model_by_seed: whether each seed has its own pre-trained model where a model is 'tiny': seed 0
      has 'tiny', seed 1 'tiny-1', seed 2 'tiny-2', and seed 3 'tiny' again. Other models do not
      depend on the seed.
    diversity: whether to measure `cai_jax.evaluation.diversity.word_pair_diversity` as well.

  Raises:
    UserError: if the reference or a figure's arm does not exist, an arm's name has a comma, or the
      seeds are not distinct integers.
  """

  arms: Mapping[str, Arm]
  reference: str
  figures: Sequence[Mapping[str, Any]] = ()
  overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  base: str = 'configs/tiny.py'
  seeds: tuple[int, ...] = (0, 1, 2)
  model_by_seed: bool = True
  diversity: bool = False

  def __post_init__(self):
    if self.reference not in self.arms:
      raise UserError(
        f'reference={self.reference!r} is not an arm. The arms are {", ".join(self.arms)}.'
      )
    if names := [name for name in self.arms if ',' in name]:
      raise UserError(
        f'The name of the arm {names[0]!r} contains a comma, which separates names in --arms. '
        'Choose a name without one.'
      )
    seeds = self.seeds
    is_valid = isinstance(seeds, tuple | list) and seeds and len({*seeds}) == len(seeds)
    if not is_valid or not all(type(seed) is int and seed >= 0 for seed in seeds):
      raise UserError(
        f'seeds={seeds!r} must be a tuple of one or more distinct integers of at least 0.'
      )
    check_figures(self.figures)
    unknown = {name for figure in self.figures for name in figure_arms(figure)} - set(self.arms)
    if unknown:
      raise UserError(
        f'A figure shows {sorted(unknown)}, which are not arms. The arms are '
        f'{", ".join(self.arms)}.'
      )

  def select(self, names: Sequence[str]) -> 'Experiment':
    """Return the experiment with only the named arms and the reference.

    Figures that show any other arm are left out.

    Args:
      names: names of arms.

    Raises:
      UserError: if a name is not an arm.
    """
    unknown = [name for name in names if name not in self.arms]
    if unknown:
      raise UserError(f'There is no arm {", ".join(unknown)}. The arms are {", ".join(self.arms)}.')
    kept = {k: arm for k, arm in self.arms.items() if k in names or k == self.reference}
    figures = tuple(figure for figure in self.figures if figure_arms(figure) <= set(kept))
    return dataclasses.replace(self, arms=kept, figures=figures)

  def settings(self, arm: str, seed: int, config: ConfigDict) -> dict[str, Any]:
    """Return the config fields that a run sets, by dotted name.

    Args:
      arm: name of the arm.
      seed: seed of the run.
      config: the base config, which names the models that the arm does not.
    """
    settings = {**self.overrides, **self.arms[arm].overrides, 'seed': seed}
    if not self.model_by_seed:
      return settings
    fields = flatten(config.to_dict())
    for field in (f'model.{name}' for name in ('base', 'critique', 'revision', 'init')):
      name = settings.get(field, fields.get(field))
      if name in BY_SEED:
        settings[field] = model_of_seed(name, seed)
    return settings


def rates_line(
  caption: str,
  arms: Sequence[str],
  x: Sequence[float],
  x_label: str,
  group: str = 'harmful',
  y_label: str = 'share of responses (%)',
) -> dict[str, Any]:
  """Return the specification of a line figure of the violation rate and the helpful rate.

  Args:
    caption: the figure's caption.
    arms: names of the arms; each is one point on each line.
    x: the x coordinate of each arm.
    x_label, y_label: axis labels with units.
    group: 'harmful' or 'helpful' prompts.
  """
  points = {'arms': list(arms), 'x': list(x)}
  series = [{'name': name, 'metric': metric, **points} for name, metric in RATES]
  return {
    'kind': 'line',
    'caption': caption,
    'group': group,
    'x_label': x_label,
    'y_label': y_label,
    'series': series,
  }


def rates_by_arm(caption: str, arms: Sequence[str], group: str = 'harmful') -> dict[str, Any]:
  """Return the specification of a figure with one row per arm and one panel per rate.

  Args:
    caption: the figure's caption.
    arms: names of arms, from top to bottom.
    group: 'harmful' or 'helpful' prompts.
  """
  return {
    'kind': 'arms',
    'caption': caption,
    'group': group,
    'metrics': [metric for _, metric in RATES],
    'arms': list(arms),
  }


def figure_arms(figure: Mapping[str, Any]) -> set[str]:
  """Return the names of the arms that a figure specification shows.

  Args:
    figure: a figure specification, as `cai_jax.report.results` describes.
  """
  return {name for series in figure.get('series', [figure]) for name in series['arms']}


def load_experiment(spec: str) -> tuple[str, str, Experiment]:
  """Load an experiment from a Python file.

  Args:
    spec: path of a file that defines `get_experiment()`. A text after a colon is passed to that
      function, as ml_collections does for config files.

  Returns:
    The file's name without suffix, its docstring, and the experiment.

  Raises:
    UserError: if there is no such file, or it does not define an experiment.
  """
  path, _, argument = str(spec).partition(':')
  file = pathlib.Path(path)
  if not file.is_file():
    files = sorted((ROOT / 'experiments').glob('*.py'))
    shipped = [f'experiments/{f.name}' for f in files if '\ndef get_experiment(' in f.read_text()]
    raise UserError(
      f'There is no file {path}. Give the file of an experiment, such as {", ".join(shipped)}.'
    )
  experiment, docstring = call_function(file, 'get_experiment', argument)
  if not isinstance(experiment, Experiment):
    raise UserError(
      f'get_experiment() in {path} returns {type(experiment).__name__}. It must return an '
      'Experiment.'
    )
  return file.stem, docstring, experiment


def load_config(path: str) -> ConfigDict:
  """Return the config of a file that defines `get_config()`.

  Args:
    path: relative to the working directory or to the repository's root.

  Returns:
    The config. Fields that it does not define have their defaults.

  Raises:
    UserError: if there is no such file, or the config has a newer version.
  """
  file = pathlib.Path(path)
  file = file if file.is_file() else ROOT / path
  if not file.is_file():
    raise UserError(
      f'There is no config file {path}. Give the path of one, such as configs/tiny.py.'
    )
  config, _ = call_function(file, 'get_config')
  try:
    return complete_config(config)
  except UserError as error:
    raise UserError(f'{path}: {error}') from error


def override_config(config: ConfigDict, settings: Mapping[str, Any]) -> ConfigDict:
  """Return a copy of the config with some fields set.

  Args:
    config: the config to copy.
    settings: new values by dotted field name, such as {'train.epochs': 1}.

  Raises:
    UserError: if the config has no such field or the value has the wrong type.
  """
  config = complete_config(config).lock()
  fields = flatten(config.to_dict())
  for name, value in settings.items():
    if name not in fields:
      raise UserError(f'The config has no field {name!r}. docs/configuration.md lists every field.')
    try:
      config.update_from_flattened_dict({name: value})
    except TypeError as error:
      raise UserError(f'{name}={value!r} has the wrong type: {error}.') from error
  return config


def changed_settings(config: ConfigDict, settings: Mapping[str, Any]) -> dict[str, Any]:
  """Return the settings that differ from the config, and the seed in any case.

  Args:
    config: the base config.
    settings: values by dotted field name.
  """
  base = flatten(config.to_dict())
  return {k: v for k, v in settings.items() if k == 'seed' or k not in base or base[k] != v}


def run_name(base: str, settings: Mapping[str, Any]) -> str:
  """Return the folder name of a run.

  Equal settings of equal configs give equal names, so experiments share runs.

  Args:
    base: path of the base config.
    settings: values by dotted field name.
  """
  parts = [f'{key.split(".")[-1]}={_short_value(value)}' for key, value in sorted(settings.items())]
  name = re.sub(r'[^\w.=,+-]+', '_', '-'.join([pathlib.Path(base).stem, *parts]))
  content = json.dumps([base, dict(settings)], sort_keys=True, default=str)
  return f'{name[:120]}-{hashlib.sha256(content.encode()).hexdigest()[:8]}'


def _short_value(value: Any) -> str:
  return f'{len(value)}of' if isinstance(value, tuple) and len(value) > 3 else str(value)
