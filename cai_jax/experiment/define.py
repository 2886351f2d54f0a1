"""Define an experiment: its arms, the responses it scores, and what it measures."""

import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from cai_jax.constitution import ConstitutionConfig, Principle, load_constitution
from cai_jax.evaluation.baselines import BASELINES
from cai_jax.evaluation.diversity import DIVERSITY
from cai_jax.experiment.figures import figure_arms
from cai_jax.pipeline.policies import POLICIES
from cai_jax.pipeline.schema import complete_config, expand_paths
from cai_jax.report.results import check_figures
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.plugins import load_plugins
from cai_jax.runtime.settings import flatten
from cai_jax.runtime.user_code import call_function, explain_error
from cai_jax.tiny.files import BY_SEED, model_of_seed

D_CAI_RESPONSE = re.compile(r'initial|last|revision_\d+')
REVISION = re.compile(r'last|revised|revision_\d+')  # a response that a principle has changed
# Responses to held-out prompts, and the dataset in the run's folder that holds them.
HELD_OUT_RESPONSES = {
  'base': 'evaluation/base',
  'revised': 'evaluation/base',
  'aligned': 'evaluation/aligned',
  **{name: f'evaluation/{name}' for name in BASELINES},
  **{name: f'evaluation/{name}' for name in POLICIES},
}
ROOT = pathlib.Path(__file__).resolve().parents[2]  # of the repository


@dataclasses.dataclass(frozen=True)
class Arm:
  """One condition of an experiment.

  Attributes:
    overrides: values of the config fields in which this arm differs from the experiment's base.
    response: the response to score. 'initial', 'revision_n' and 'last' (the last revision) are
      responses of D_CAI. 'base' and 'aligned' are the answers of M_θ and M_aligned to held-out
      prompts, 'revised' is the last revision of M_θ's answer where the prompt is harmful, and the
      name of a baseline is its answer. 'policy' is the answer of the policy that the run trains on
      preferences, and 'policy_base' and the like are those of `prefer.compare`. For all of these,
      the run also trains and evaluates.
    facts: additional columns of the result table.
    against: another response of the same run, such as 'initial', that this one is compared with; ''
      compares it with the experiment's reference.
    principle: id of a principle: only the prompts count that drew it for the round of `response`.
      A prompt whose response that round kept counts too, so that chance alone decides which prompts
      count. '' counts all prompts.
    start: name of an earlier arm whose M_aligned is this arm's M_θ; '' is the config's M_θ.

  Raises:
    UserError: if `response` or `against` is no response, or no principle revises `response`.
  """

  overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  response: str = 'aligned'
  facts: Mapping[str, float | str] = dataclasses.field(default_factory=dict)
  against: str = ''
  principle: str = ''
  start: str = ''

  def __post_init__(self):
    for name in ('response', 'against'):
      value = getattr(self, name)
      is_absent = name == 'against' and not value
      if not (is_absent or value in HELD_OUT_RESPONSES or D_CAI_RESPONSE.fullmatch(value)):
        raise UserError(
          f'{name}={value!r} is not a response that an arm can score. Use initial, revision_n or '
          f'last, or one of {", ".join(HELD_OUT_RESPONSES)}.'
        )
    if self.against and (self.against in HELD_OUT_RESPONSES) != (
      self.response in HELD_OUT_RESPONSES
    ):
      raise UserError(
        f'response={self.response!r} and against={self.against!r} answer different prompts: one of '
        'them those of D_CAI, and the other the held-out ones. Compare two responses of one kind.'
      )
    if self.principle and not REVISION.fullmatch(self.response):
      raise UserError(
        f'principle={self.principle!r} needs a response that a principle revised, but response='
        f'{self.response!r}. Use revision_n, last or revised.'
      )

  @property
  def stages(self) -> tuple[str, ...]:
    """The stages of a run that produce the response, if its config asks for them."""
    if self.response in HELD_OUT_RESPONSES:
      return ('generate', 'train', 'label', 'prefer', 'evaluate', 'report')
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
    diversity: names of measures of diversity to add, from `cai_jax.evaluation.diversity.DIVERSITY`.
    distance: whether to measure `kl`, the log-ratio of the response under its model and M_θ, in
      nats, whose mean is the divergence from M_θ. It needs runs that train a policy, and 'kl' in
      evaluation.scores.
    spent: whether to measure `tokens_spent`, the tokens sampled for a response: those of its chain
      up to it, or of all the answers among which a baseline chose.

  Raises:
    UserError: if the reference or a figure's arm does not exist, an arm starts from one that is not
      before it or trains no model, an arm's name has a comma, a measure of diversity does not
      exist, or the seeds are not distinct integers.
  """

  arms: Mapping[str, Arm]
  reference: str
  figures: Sequence[Mapping[str, Any]] = ()
  overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  base: str = 'configs/tiny.py'
  seeds: tuple[int, ...] = (0, 1, 2)
  model_by_seed: bool = True
  diversity: tuple[str, ...] = ()
  spent: bool = False
  distance: bool = False

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
    if not isinstance(self.diversity, tuple | list) or not {*self.diversity} <= {*DIVERSITY}:
      raise UserError(
        f'diversity={self.diversity!r} must be a tuple of names from {tuple(DIVERSITY)}.'
      )
    self._check_starts()
    check_figures(self.figures)
    unknown = {name for figure in self.figures for name in figure_arms(figure)} - set(self.arms)
    if unknown:
      raise UserError(
        f'A figure shows {sorted(unknown)}, which are not arms. The arms are '
        f'{", ".join(self.arms)}.'
      )

  def _check_starts(self) -> None:
    """Check that each arm with a start comes after that arm, which trains a model."""
    before: list[str] = []
    for name, arm in self.arms.items():
      if arm.start and arm.start not in before:
        raise UserError(
          f'The arm {name!r} starts from {arm.start!r}, which is not an arm before it. Arms before '
          f'it are {", ".join(before) or "none"}.'
        )
      if arm.start and self.arms[arm.start].response not in HELD_OUT_RESPONSES:
        raise UserError(
          f'The arm {name!r} starts from {arm.start!r}, whose response '
          f'{self.arms[arm.start].response!r} needs no training. Let that arm score base, revised '
          'or aligned.'
        )
      before.append(name)

  def select(self, names: Sequence[str]) -> 'Experiment':
    """Return the experiment with the named arms, those that they start from, and the reference.

    Figures that show any other arm are left out.

    Args:
      names: names of arms.

    Raises:
      UserError: if a name is not an arm.
    """
    unknown = [name for name in names if name not in self.arms]
    if unknown:
      raise UserError(f'There is no arm {", ".join(unknown)}. The arms are {", ".join(self.arms)}.')
    needed = {self.reference, *names}
    for name in reversed(list(self.arms)):  # an arm starts from one before it
      if name in needed:
        needed.add(self.arms[name].start)
    kept = {name: arm for name, arm in self.arms.items() if name in needed}
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
    for field in (f'model.{name}' for name in ('base', 'critique', 'revision', 'init', 'aligned')):
      name = settings.get(field, fields.get(field))
      if name in BY_SEED:
        settings[field] = model_of_seed(name, seed)
    return settings


@dataclasses.dataclass(frozen=True)
class Design:
  """An experiment whose arms depend on the base config, such as one arm for each principle.

  Attributes:
    define: maps the config, with all its fields, to the experiment. The base of that experiment is
      replaced by the config's path.
    base: path of the config file, if the command line names no other one.
  """

  define: Callable[[ConfigDict], Experiment]
  base: str = 'configs/tiny.py'


def load_experiment(spec: str, base: str = '') -> tuple[str, str, Experiment]:
  """Load an experiment from a Python file.

  Args:
    spec: path of a file that defines `get_experiment()`. A text after a colon is passed to that
      function, as ml_collections does for config files.
    base: path of the base config; '' means the experiment's own.

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
  found, docstring = call_function(file, 'get_experiment', argument)
  if isinstance(found, Design):
    base = base or found.base
    found = _define(found, file, base)
  if not isinstance(found, Experiment):
    raise UserError(
      f'get_experiment() in {path} returns {type(found).__name__}. It must return an Experiment '
      'or a Design.'
    )
  return file.stem, docstring, dataclasses.replace(found, base=base or found.base)


def _define(design: Design, file: pathlib.Path, base: str) -> Any:
  """Return what a design makes of a config; an error names the design's file and line."""
  config = load_config(base)
  try:
    return design.define(config)
  except Exception as error:  # the file may raise anything
    explanation = explain_error(error, file)
    if explanation is None:
      raise
    raise UserError(explanation) from error


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


def load_principles(config: ConfigDict) -> tuple[Principle, ...]:
  """Return the principles of a config's constitution, for a `Design`.

  Args:
    config: the config.

  Raises:
    UserError: if the constitution cannot be read.
  """
  load_plugins(expand_paths(config.plugins, copied=False))  # they can register constitutions
  section = config.constitution.to_dict()
  section = ConstitutionConfig(**{**section, 'path': expand_paths(section['path'])})
  return load_constitution(section).principles


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
