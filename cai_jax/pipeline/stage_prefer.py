"""Stage `prefer`: train a reward model and policies on preferences.

Each training has a folder for its checkpoints and metrics (`prefer/NAME/`) and one for the trained
model with its own manifest. A training that is done is not repeated, so the stage resumes at the
training in which it stopped.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from cai_jax.data.part_files import FOLDER, delete_parts
from cai_jax.data.preferences import Comparison, group_comparisons
from cai_jax.data.preferences.units import (
  UnitSet,
  build_comparison_units,
  build_judged_units,
)
from cai_jax.dialogue import Dialogue
from cai_jax.dialogue.template_options import bind_template_options
from cai_jax.model import classifier, peft
from cai_jax.model import lm as models
from cai_jax.model.classifier import ClassifierInfo
from cai_jax.model.lm import LM
from cai_jax.model.quantized.kernel import FULL
from cai_jax.pipeline.best_of_n import write_best_answers
from cai_jax.pipeline.contents import model_contents
from cai_jax.pipeline.models import global_mesh, make_dialogue
from cai_jax.pipeline.pairs import Judged, JudgedPairs, Pairs, read_pairs
from cai_jax.pipeline.policies import BEST_OF_N, REWARD_MODEL, Training, list_trainings
from cai_jax.pipeline.run import Run
from cai_jax.pipeline.stage_train import make_probe, resolve_export_dtype, save_trained
from cai_jax.runtime import processes
from cai_jax.runtime.digests import digest_files
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import read_json, write_json, writing
from cai_jax.runtime.manifest import VERSION, git_commit
from cai_jax.runtime.terminal import say
from cai_jax.scoring import reward
from cai_jax.training import reward_model
from cai_jax.training.fit_config import MAY_CHANGE_ON_RESUME
from cai_jax.training.log import remarks
from cai_jax.training.preference import prefer

MANIFEST = 'manifest.json'  # of a trained model, in its folder


def train_policies(run: Run, manifest: Mapping[str, Any]) -> dict[str, Any]:
  """Write `reward_model/`, `policy/` and `policies/`, as far as the config asks for them.

  Args:
    run: the run.
    manifest: not used.

  Returns:
    Counts, losses and speeds of each training by its name, for the manifest.

  Raises:
    UserError: if no comparison remains to learn, a model cannot be loaded, or training stops on a
      loss that is not finite.
  """
  del manifest
  results: dict[str, Any] = {}
  for training in list_trainings(run.config):
    results[training.name] = _train_once(run, training)
    if training.name == REWARD_MODEL and run.config.reward.best_of_n:
      results[BEST_OF_N] = write_best_answers(run)
  notes = [
    f'{name}: {note}' for name, result in results.items() for note in result.pop('remarks', ())
  ]
  return results | {'remarks': notes}


def _train_once(run: Run, training: Training) -> dict[str, Any]:
  """Train a model and save it with its manifest, or return what an earlier start recorded."""
  folder = run.workdir / training.folder
  pairs = read_pairs(run, training.config)
  identity = _identity(run, training, pairs)
  done = _agree_on_result(folder, identity, _defaults(training))
  is_first = jax.process_index() == 0
  if done is not None:
    if is_first:
      say(f'{training.name}: done before')
    return done
  if is_first:
    say(f'{training.name}: {training.config.objective} from {training.init} ...')
  train = _train_reward if training.name == REWARD_MODEL else _train_policy
  summary, counts = train(run, training, pairs)
  notes = remarks(summary, training.config)
  if is_first:
    for note in notes:
      say(f'{training.name}: {note}')
  result = {
    'model': model_contents(str(folder)),
    'pairs': {**pairs.counts, **counts},
    'remarks': notes,
    **summary,
  }
  content = {'version': VERSION, 'git_commit': git_commit(), 'identity': identity, 'result': result}
  if is_first:
    with writing(folder):
      write_json(folder / MANIFEST, content)
  processes.barrier(f'{training.name} saved')
  return result


def _identity(run: Run, training: Training, pairs: Pairs) -> dict[str, Any]:
  """Return everything that a training depends on, as JSON types."""
  settings = dataclasses.asdict(training.config)
  left_out = (*MAY_CHANGE_ON_RESUME, 'filters', 'invalid')  # 'pairs' has what these two keep
  start = run.preference_start(training.init)
  identity = {
    'name': training.name,
    'start': {'init': training.init, 'contents': model_contents(start)},
    'settings': {name: x for name, x in settings.items() if name not in left_out},
    'style': run.config.feedback.style,
    'template_options': run.config.feedback.template_options,
    'pairs': pairs.digest,
  }
  if reference := training.config.reference:
    identity['reference'] = model_contents(run.preference_start(reference))
  if adapters := training.config.lora_init:
    identity['adapters'] = digest_files(pathlib.Path(adapters), peft.FILES)
  return json.loads(json.dumps(identity))


def _defaults(training: Training) -> dict[str, Any]:
  """Return the default of each setting of a training, as JSON types."""
  fields = dataclasses.fields(training.config)
  return json.loads(json.dumps({field.name: field.default for field in fields}))


def is_same(recorded: Any, identity: Mapping[str, Any], defaults: Mapping[str, Any]) -> bool:
  """Return whether a recorded identity is that of a training.

  Settings that have their defaults are not compared, because an earlier version may not have had
  them.

  Args:
    recorded: what a manifest has.
    identity: what the training depends on.
    defaults: the default of each setting.
  """
  if not isinstance(recorded, dict) or not isinstance(recorded.get('settings'), dict):
    return False

  def plain(content: Mapping[str, Any]) -> dict[str, Any]:
    items = content['settings'].items()
    own = {k: x for k, x in items if k not in defaults or defaults[k] != x}
    return {**content, 'settings': own}

  return plain(recorded) == plain(identity)


def _agree_on_result(
  folder: pathlib.Path, identity: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, Any] | None:
  """Return what `_read_result` returns in process 0, in every process.

  If each decided on its own, one could skip collective operations that the others wait in.
  """
  read = lambda: _read_result(folder, identity, defaults)  # noqa: E731
  found = processes.run_on_process_0(f'look for {folder.name}', read)
  if not multihost_utils.broadcast_one_to_all(np.int32(found is not None)):
    return None
  return read_json(folder / MANIFEST)['result'] if found is None else found


def _read_result(
  folder: pathlib.Path, identity: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, Any] | None:
  """Return what the manifest of a trained model records, or None if it has another identity."""
  path = folder / MANIFEST
  if not path.exists():
    return None
  content = read_json(path)
  is_ours = is_same(content.get('identity'), identity, defaults)
  if not is_ours or not isinstance(content.get('result'), dict):
    return None
  try:
    is_whole = model_contents(str(folder)) == content['result'].get('model')
  except UserError:  # a file is missing
    is_whole = False
  return content['result'] if is_whole else None


def _train_policy(
  run: Run, training: Training, pairs: Pairs
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Train a language model; return its summary, and the counts of its units."""
  config, start = training.config, run.preference_start(training.init)
  lm = _load(run, start, config.dtype, config.base_weights)
  dialogue = make_dialogue(run, lm)
  parts = run.workdir / training.workdir / FOLDER
  built, groups = build_units(pairs, dialogue, training, parts)
  reference: dict[str, Any] = {}
  if config.reference:
    path = run.preference_start(config.reference)
    reference = {
      'load_reference': lambda: _load(run, path, config.dtype),
      'reference_id': hashlib.sha256(json.dumps(model_contents(path)).encode()).hexdigest()[:16],
    }
  params, summary = prefer(
    lm,
    built.units,
    config,
    run.workdir / training.workdir,
    groups=groups,
    probe=make_probe(run, lm, config.probes) if config.probes else None,
    profile_steps=run.profile,
    take_over=True,
    **reference,
  )
  delete_parts(parts)  # nobody resumes a training that is complete
  folder = run.workdir / training.folder
  with writing(folder):
    dtype = resolve_export_dtype(config.export_dtype, start)
    save_trained(run, lm, params, dialogue, folder, dtype)
  return summary, built.counts


def _train_reward(
  run: Run, training: Training, pairs: Pairs
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Train a reward model; return its summary, and the counts of its units."""
  config, path = training.config, run.preference_start(training.init)
  start = reward_model.load_start(path, global_mesh(run), config.seed)
  info, feedback = start.classifier.info, run.config.feedback
  parts = run.workdir / training.workdir / FOLDER
  built = build_reward_units(run, pairs, info, training, parts)
  params, summary = prefer(
    start.lm,
    built.units,
    config,
    run.workdir / training.workdir,
    groups=group_comparisons(pairs) if config.eval_share else None,
    profile_steps=run.profile,
    take_over=True,
  )
  delete_parts(parts)
  folder = run.workdir / training.folder
  options = feedback.template_options if feedback.style == 'chat' else ()
  trained = reward_model.finish_reward_model(
    start, params, bind_template_options(info.tokenizer, options)
  )
  with writing(folder):
    classifier.save_classifier(trained, folder, resolve_export_dtype(config.export_dtype, path))
  return summary, built.counts


def _load(run: Run, path: str, dtype: str, weights: str = FULL) -> LM:
  """Return a language model for training, or as a reference."""
  return models.load(
    path,
    dtype=dtype,
    mesh=global_mesh(run),
    param_dtype='float32',
    long_context=run.config.model.long_context,
    weights=weights,
  )


def build_reward_units(
  run: Run,
  pairs: Iterable[Comparison],
  info: ClassifierInfo,
  training: Training,
  folder: pathlib.Path | None = None,
) -> UnitSet:
  """Return the units of a reward model, which the evaluation renders in the same way.

  Args:
    run: the run.
    pairs: the comparisons.
    info: the reward model.
    training: the training.
    folder: where to keep the tokens of `Pairs` in files; None keeps them in memory.

  Raises:
    UserError: if no unit remains, or a comparison lacks the margin that the objective reads.
  """
  config, feedback = training.config, run.config.feedback
  return reward_model.build_reward_units(
    pairs,
    reward.make_dialogue(info, feedback.style, feedback.template_options),
    info,
    max_length=config.max_length,
    drop_truncated=config.drop_truncated,
    margins=reads_margins(training),
    folder=folder,
  )


def reads_margins(training: Training) -> bool:
  """Return whether the objective of a training reads margins, which is an option of it."""
  return bool(dict(training.config.options).get('margins'))


def build_units(
  pairs: Iterable[Comparison],
  dialogue: Dialogue,
  training: Training,
  folder: pathlib.Path | None = None,
) -> tuple[UnitSet, dict[str, int] | None]:
  """Return the units of the kind that an objective needs, and their groups to hold out together.

  Args:
    pairs: the comparisons.
    dialogue: renders them for the model that is trained.
    training: the training.
    folder: where to keep the tokens of `Pairs` in files; None keeps them in memory.

  Raises:
    UserError: if no unit remains.
  """
  kind = UNIT_KINDS[training.config.registered_loss.units]
  built, items = kind.build(pairs, dialogue, training, folder)
  return built, group_comparisons(items) if training.config.eval_share else None


def _comparison_units(
  pairs: Iterable[Comparison],
  dialogue: Dialogue,
  training: Training,
  folder: pathlib.Path | None,
) -> tuple[UnitSet, Any]:
  config = training.config
  built = build_comparison_units(
    pairs,
    dialogue,
    max_length=config.max_length,
    drop_truncated=config.drop_truncated,
    folder=folder,
  )
  return built, pairs


def _judged_units(
  pairs: Iterable[Comparison],
  dialogue: Dialogue,
  training: Training,
  folder: pathlib.Path | None,
) -> tuple[UnitSet, Any]:
  config = training.config
  judged = JudgedPairs(pairs) if isinstance(pairs, Pairs) else Judged(pairs)
  built = build_judged_units(
    judged,
    dialogue,
    max_length=config.max_length,
    drop_truncated=config.drop_truncated,
    seed=config.seed,
    folder=folder,
  )
  return built, judged


class UnitKind(NamedTuple):
  """How comparisons become units of a kind.

  Attributes:
    build: makes the units of comparisons, and returns them with what they were made of.
    per_comparison: number of units that a comparison becomes.
    plural: what the units are called in messages.
  """

  build: Callable[
    [Iterable[Comparison], Dialogue, Training, pathlib.Path | None], tuple[UnitSet, Any]
  ]
  per_comparison: int
  plural: str


# By the kinds of `data.units.SEGMENTS`.
UNIT_KINDS = {
  'comparison': UnitKind(_comparison_units, 1, 'comparisons'),
  'judged': UnitKind(_judged_units, 2, 'judged responses'),
}
