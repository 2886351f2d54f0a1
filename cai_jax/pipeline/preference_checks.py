"""Checks of training on preferences before the first stage of a run: models, comparisons, sizes."""

import itertools
from collections.abc import Iterable, Sequence

import jax

from cai_jax.data.preferences import Comparison, read_comparisons
from cai_jax.dialogue import Dialogue
from cai_jax.evaluation.config import TRAINED
from cai_jax.model import lm as models
from cai_jax.model import lora
from cai_jax.model.attention.kernels.kernel import (
  AUTO,
  check_kernel,
  check_model,
  check_new_rows,
)
from cai_jax.model.attention.sequence import check_sequence
from cai_jax.model.lm import ModelInfo
from cai_jax.model.quantized_params import abstract_params
from cai_jax.model.sharding import param_shardings
from cai_jax.model.transformer import abstract_model
from cai_jax.pipeline import prompt_sets
from cai_jax.pipeline.evaluation_checks import check_rewarded_pairs
from cai_jax.pipeline.lengths import check_lengths
from cai_jax.pipeline.models import global_mesh
from cai_jax.pipeline.pair_sources import D_CAI, LABELS, PAIR_SOURCES
from cai_jax.pipeline.pairs import leave_out_held_out, read_pairs
from cai_jax.pipeline.policies import REWARD_MODEL, Training, list_trainings, trains_reward
from cai_jax.pipeline.run import Run
from cai_jax.pipeline.stage_prefer import build_reward_units, build_units, reads_margins
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.mesh import check_batch
from cai_jax.training import reward_model
from cai_jax.training.checkpoints import has_checkpoints

_FIRST_PAIRS = 8  # of which units are built at first


def check_preferences(run: Run, missing: Sequence[str]) -> None:
  """Check what the stages `prefer` and `evaluate` need of section `reward` and `prefer`.

  Weights are not loaded.

  Args:
    run: the run.
    missing: names of the stages that are not done.

  Raises:
    UserError: if anything is wrong; the message names the config field.
  """
  if 'evaluate' in missing or 'prefer' in missing:
    _check_trained_reward(run)
  if 'prefer' not in missing:
    return
  for training in list_trainings(run.config):
    section = training.config.section
    try:
      info = inspect_start(run, training)
      dialogue = _check_model(run, training, info)
    except UserError as error:
      name = f'{section}.init' if training.init == training.config.init else f'{section}.compare'
      raise UserError(f'{name}={training.init!r}: {_without(section, error)}') from error
    _check_reference(run, training, info)
    _check_source(run, training)
    if training.config.data not in PAIR_SOURCES and jax.process_index() == 0:
      _check_file(run, training, dialogue)
  if run.config.reward.best_of_n and not run.config.sampling.initial.temperature:
    raise UserError(
      f'reward.best_of_n={run.config.reward.best_of_n} answers would all be the same at '
      'sampling.initial.temperature=0. Raise the temperature, or set reward.best_of_n=0.'
    )
  if run.config.reward.best_of_n and not run.config.model.base:
    raise UserError(
      'reward.best_of_n samples from M_θ, but model.base is empty. Name a checkpoint.'
    )


def inspect_start(run: Run, training: Training) -> ModelInfo:
  """Return what is known of the model that a training starts from.

  Args:
    run: the run.
    training: the training.

  Raises:
    UserError: if it cannot be trained, such as a reward model with several labels.
  """
  path = run.stand_in(training.init)
  if not path:
    raise UserError('A server holds this model. Name a checkpoint.')
  if training.name != REWARD_MODEL:
    return models.inspect_model(path, run.config.model.long_context)
  info = reward_model.inspect_start(path)
  return ModelInfo(info.config, info.tokenizer, info.eos_token_ids)


def _check_model(run: Run, training: Training, info: ModelInfo) -> Dialogue:
  """Check that a model can be trained with the settings; return the dialogue that it reads."""
  config, mesh, section = training.config, global_mesh(run), training.config.section
  feedback = run.config.feedback
  dialogue = Dialogue(info.tokenizer, feedback.style, info.eos_token_ids, feedback.template_options)
  param_shardings(abstract_model(info.config)[1], mesh)
  check_batch(
    config.batch_size // config.accumulation, mesh, f'{section}.batch_size / {section}.accumulation'
  )
  check_sequence(mesh, config.max_length, info.config)
  config.check_model(info.config)
  param_shardings(abstract_params(info.config, config.dtype, config.base_weights), mesh)
  if config.lora is not None:
    lora.abstract_model(info.config, config.lora)
  if config.attention != AUTO:
    try:
      if not has_checkpoints(run.workdir / training.workdir):
        check_new_rows(config.attention, config.max_length)
      needs = config.attention, mesh, config.dtype, config.max_length
      check_kernel(*needs)
      check_model(*needs, info.config, config.shares_tokens)
    except UserError as error:
      raise UserError(f'{section}.attention: {error}') from None
  held_out = sum(len(run.prompts[name]) for name in prompt_sets.HELD_OUT)
  if config.probes > held_out:
    raise UserError(
      f'{section}.probes={config.probes} needs as many held-out prompts, but there are {held_out}.'
    )
  return dialogue


def _check_reference(run: Run, training: Training, info: ModelInfo) -> None:
  """Check that another reference model has the tokenizer of the model that is trained."""
  if not training.config.reference:
    return
  section = training.config.section
  try:
    reference = models.inspect_model(run.stand_in(training.config.reference))
  except UserError as error:
    raise UserError(f'{section}.reference={training.config.reference!r}: {error}') from error
  if reference.tokenizer.get_vocab() != info.tokenizer.get_vocab():
    raise UserError(
      f'{section}.reference={training.config.reference!r} has another tokenizer than the model '
      f'that {section} trains, so it cannot score its tokens. Choose a reference with the same '
      f"tokenizer, or set {section}.reference='', which is the model that training starts from."
    )


def _check_source(run: Run, training: Training) -> None:
  """Check that the run has what its source of comparisons reads, and that it has margins."""
  data, section = training.config.data, training.config.section
  if data not in PAIR_SOURCES:
    return
  needs = PAIR_SOURCES[data].needs
  if reads_margins(training) and not PAIR_SOURCES[data].margins:
    raise UserError(
      f'{section}.options: margins=True needs comparisons with scores or margins, but '
      f'{section}.data={data!r} has none. Leave the option out, or name a file that has them.'
    )
  if needs == LABELS and jax.process_index() == 0:
    _check_labelled_prompts(run)
  if needs == LABELS and not run.config.label.is_asked_for:
    raise UserError(
      f'{section}.data={data!r} needs what stage label writes, but the config does not ask for it. '
      'Set label.responses to at least 2, or label.comparisons to files.'
    )
  if needs == D_CAI and run.config.model.aligned and not run.config.data.d_cai:
    raise UserError(
      f'{section}.data={data!r} reads D_CAI, but model.aligned replaces the stage that samples it. '
      'Set data.d_cai to the folder of one, or name a file of comparisons.'
    )


def _check_labelled_prompts(run: Run) -> None:
  """Check that no file of comparisons that are labelled, and then learned, has held-out prompts."""
  label = run.config.label
  for path in label.comparisons:
    try:
      leave_out_held_out(read_comparisons(path, label.form), run)
    except UserError as error:
      raise UserError(f'label.comparisons: {path}: {error}') from error


def _check_file(run: Run, training: Training, dialogue: Dialogue) -> None:
  """Check that training can use a file of comparisons: its rows, its prompts and their lengths.

  The units are built as in the stage, of more and more comparisons until there is one.
  """
  config = training.config
  pairs, count = read_pairs(run, config), _FIRST_PAIRS
  try:
    if reads_margins(training):
      _check_margins(pairs)
    while True:
      first = list(itertools.islice(pairs, count))
      try:
        if training.name == REWARD_MODEL:
          info = reward_model.inspect_start(run.stand_in(training.init))
          build_reward_units(run, first, info, training)
        else:
          build_units(first, dialogue, training)
        return
      except UserError:
        if len(first) < count:  # these are all
          raise
      count *= 8
  except UserError as error:
    where = f'{config.section}.data={config.data!r}'
    raise UserError(f'{where}, {config.section}.max_length={config.max_length}: {error}') from error


def _check_trained_reward(run: Run) -> None:
  """Check what the evaluation asks of the reward model that the run trains."""
  config = run.config.evaluation
  if config.reward_model != TRAINED:
    return
  if not trains_reward(run.config):
    raise UserError(
      f'evaluation.reward_model={TRAINED!r} is the reward model of section reward, but reward.data '
      'is empty. Name the comparisons that it learns, or a checkpoint in evaluation.reward_model.'
    )
  if config.reward_label:
    raise UserError(
      f'evaluation.reward_label={config.reward_label!r} has no effect on a reward model that the '
      'run trains, which has one label. Leave it out.'
    )
  if config.style != run.config.feedback.style:
    raise UserError(
      f'evaluation.style={config.style!r} is the form in which the trained reward model would read '
      f'responses, but it learns them as feedback.style={run.config.feedback.style!r}. Set both to '
      'the same.'
    )
  (training,) = (t for t in list_trainings(run.config) if t.name == REWARD_MODEL)
  info = inspect_start(run, training)
  feedback = run.config.feedback
  dialogue = Dialogue(info.tokenizer, feedback.style, info.eos_token_ids, feedback.template_options)
  try:
    check_lengths(
      run, info.config.max_positions, 1, lambda messages: len(dialogue.prompt(messages)) + 2
    )
    check_rewarded_pairs(run, dialogue, info.config.max_positions)
  except UserError as error:
    raise UserError(f'evaluation.reward_model={TRAINED!r}: {error}') from error


def _check_margins(pairs: Iterable[Comparison]) -> None:
  """Check that each comparison has a margin."""
  for pair in pairs:
    if pair.margin is None:
      raise UserError(
        f'options: margins=True, but the comparison {pair.id!r} has no margin. Give each row '
        '`margin`, or `score_chosen` and `score_rejected`, or leave the option out.'
      )


def _without(section: str, error: UserError) -> str:
  return str(error).removeprefix(f'{section}: ')
