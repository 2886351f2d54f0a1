"""Checks of models, devices and disk before the first stage of a run starts."""

from collections.abc import Mapping, Sequence

import jax

from cai_jax.data import d_cai
from cai_jax.data.prompts import Prompt
from cai_jax.dialogue import Dialogue
from cai_jax.feedback.contexts import render_prompt
from cai_jax.feedback.stage import check_thinks
from cai_jax.model import lm as models
from cai_jax.model import lora
from cai_jax.model.attention.kernels.kernel import (
  AUTO,
  check_kernel,
  check_model,
  check_new_rows,
)
from cai_jax.model.attention.sequence import check_sequence
from cai_jax.model.quantized_params import abstract_params, check_weights
from cai_jax.model.sharding import param_shardings
from cai_jax.model.transformer import abstract_model
from cai_jax.pipeline import prompt_sets
from cai_jax.pipeline.evaluation_checks import check_evaluation
from cai_jax.pipeline.models import global_mesh, sampling_mesh
from cai_jax.pipeline.pair_sources import LABELS_FILE
from cai_jax.pipeline.policies import list_policies
from cai_jax.pipeline.preference_checks import check_preferences
from cai_jax.pipeline.raters import check_rater
from cai_jax.pipeline.run import Run
from cai_jax.pipeline.served_raters import find_served_rater
from cai_jax.pipeline.space import check_folders, check_space, estimate_space
from cai_jax.pipeline.stage_label import check_labelling
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.manifest import Manifest
from cai_jax.runtime.mesh import check_batch, is_split
from cai_jax.runtime.packages import check_packages
from cai_jax.sampling.caches import check_heads
from cai_jax.sampling.journal import check_sampler
from cai_jax.scoring.judge import JUDGES
from cai_jax.tiny.files import model_path
from cai_jax.training.checkpoints import has_checkpoints
from cai_jax.training.optimizer import check_warmup


def check_run(run: Run, stages: Sequence[str]) -> None:
  """Check everything that the stages need, without sampling, training or loading weights.

  Args:
    run: the run.
    stages: names of the stages to run.

  Raises:
    UserError: if anything is wrong; the message names the config field and the allowed values.
  """
  check_packages()
  _check_prompts(run, stages)
  _check_external_data(run, stages)
  infos = _check_models(run, stages)
  dialogues = _make_dialogues(run, infos)
  for stage, role in (('initial', 'base'), ('critique', 'critique'), ('revision', 'revision')):
    name = getattr(run.config.model, role) or run.config.model.base
    if name in infos:
      sampling = getattr(run.config.sampling, stage)
      sampling.check_vocabulary(infos[name].config.vocab_size, f'sampling.{stage}')
      check_thinks(dialogues[name], sampling, f'sampling.{stage}', name)
  _check_devices(run)
  start = run.training_start
  if start and run.config.train.lora is not None:
    lora.abstract_model(infos[start].config, run.config.train.lora)
  if start and not run.config.model.aligned:
    _check_training_start(run, stages, start, infos[start], dialogues[start])
  answers_by = run.config.model.aligned or start
  if answers_by and ('evaluate' in stages or run.config.train.probes):
    initial = run.config.sampling.initial
    check_thinks(dialogues[answers_by], initial, 'sampling.initial', answers_by)
    _check_answer_lengths(run, answers_by, infos[answers_by], dialogues[answers_by])
  if 'train' in stages and not run.config.data.d_cai:
    _check_helpful_prompts(run)
    if most_steps := _most_steps(run):
      check_warmup(run.config.train, most_steps, 'at most ')
  manifest = Manifest(run.workdir, writes=False)
  missing = [name for name in stages if not manifest.done(name)]
  if {'generate', 'evaluate'} & {*missing}:
    check_rater(run)
  check_preferences(run, missing)
  if 'label' in missing:
    check_labelling(run)
  if 'evaluate' in missing:
    check_evaluation(run, infos)
  section = run.config.model
  generates_here = any((section.base, section.critique, section.revision))
  if 'evaluate' in missing or ('generate' in missing and generates_here):
    check_sampler(run.journal or run.workdir / 'journal')
  _check_results(run, missing, manifest)
  check_folders(run)
  check_space(estimate_space(run, missing, infos[start].config if start else None))


def _check_results(run: Run, missing: Sequence[str], manifest: Manifest) -> None:
  """Check that the files of finished stages still exist, for the missing stages that read them."""
  needed = {
    ('generate', 'train'): 'd_cai/dataset_info.json',
    ('train', 'evaluate'): 'model/config.json',
    ('generate', 'report'): 'quality.json',
    ('train', 'report'): 'metrics.jsonl',
    ('label', 'prefer'): LABELS_FILE,
  }
  policies = [f'{policy.folder}/config.json' for policy in list_policies(run.config)]
  uses = [*needed.items(), *((('prefer', 'evaluate'), name) for name in policies)]
  for (writer, reader), name in uses:
    is_needed = manifest.done(writer) and reader in missing
    if is_needed and not (run.workdir / name).exists():
      raise UserError(
        f'{run.workdir / name} is missing, but stage {writer} is done, and {reader} needs it. '
        'Put it back, or run all stages in a new workdir.'
      )


def _check_prompts(run: Run, stages: Sequence[str]) -> None:
  """Check that the prompt sets that the stages need are not empty."""
  if 'generate' in stages and not run.prompts['harmful']:
    raise UserError(
      'prompts.harmful.source is empty. Give prompts whose responses are revised, or choose stages '
      'that do not need generate.'
    )
  if 'evaluate' in stages and not run.prompts['eval_harmful']:
    raise UserError(
      'prompts.eval_harmful.source is empty, but evaluation needs held-out prompts. Give some, or '
      'choose --stages=generate,train.'
    )
  probes = run.config.train.probes
  num_held_out = sum(len(run.prompts[name]) for name in prompt_sets.HELD_OUT)
  if probes > num_held_out:
    raise UserError(
      f'train.probes={probes} needs as many held-out prompts, but there are {num_held_out}. Give '
      'more as prompts.eval_harmful, or lower train.probes.'
    )


def _check_external_data(run: Run, stages: Sequence[str]) -> None:
  """Check in process 0 that D_CAI of another run is one and contains no held-out prompt."""
  reading = [name for name in ('train', 'prefer') if name in stages]
  if not run.config.data.d_cai or not reading or jax.process_index() != 0:
    return
  try:
    manifest = Manifest(run.workdir, writes=False)
    if all(manifest.done(name) for name in reading):
      if run.d_cai.exists():
        d_cai.check_files(run.d_cai)
      return
    d_cai.check_schema(run.d_cai)
    rows = d_cai.read_rows(run.d_cai).iterate(('id', 'prompt'))
    training = (Prompt(row['id'], tuple(row['prompt'])) for row in rows)
    prompt_sets.check_held_out(training, run.prompts)
  except UserError as error:
    raise UserError(f'data.d_cai: {error}') from error


def _check_models(run: Run, stages: Sequence[str]) -> dict[str, models.ModelInfo]:
  """Check each checkpoint of the run, and return its configuration and tokenizer by name."""
  section = run.config.model
  starts_nowhere = not run.training_start and not section.aligned
  if starts_nowhere and {'train', 'evaluate'} & {*stages}:
    raise UserError(
      'model.init is empty, and M_θ is served, so there is no checkpoint to fine-tune. Set '
      'model.init, or choose --stages=generate.'
    )
  roles = ('base', 'critique', 'revision', 'init', 'aligned')
  fields = {getattr(section, role): f'model.{role}' for role in roles}
  judge = run.config.evaluation.judge
  if 'evaluate' in stages and judge != 'base' and judge not in JUDGES:
    fields.setdefault(judge, 'evaluation.judge')
  if 'evaluate' in stages:
    for guard in run.config.evaluation.guard_checkpoints.values():
      fields.setdefault(guard, 'evaluation.guard_models')
  infos = {}
  for name in fields.keys() - {''}:
    try:
      long = section.long_context and not fields[name].startswith('evaluation.')
      infos[name] = models.inspect_model(model_path(name), long)
    except UserError as error:
      raise UserError(f'{fields[name]}={name!r}: {error}') from error
  mesh = global_mesh(run)
  sampled = {getattr(section, role) for role in ('base', 'critique', 'revision', 'aligned')}
  for name, info in infos.items():
    param_shardings(abstract_model(info.config)[1], mesh)
    if name in sampled:
      check_weights(info.config, section.weights, 'model.weights')
      held = abstract_params(info.config, section.dtype, section.weights)
      param_shardings(held, sampling_mesh(run))
      if is_split(sampling_mesh(run)):
        check_heads(info.config, sampling_mesh(run), name)
  return infos


def _check_lock_step(run: Run) -> None:
  """Check that no server answers in chains that several processes sample in lock step."""
  if not any(_sampled_here(run)) or not is_split(sampling_mesh(run)):
    return
  servers = [f'remote.{role}.url' for role in run.remotes]
  if run.config.label.remote and run.config.label.responses:
    servers.append('label.remote.url')
  if rater := find_served_rater(run.config):
    servers.append(f'evaluation.{rater.kind.role}_remote.url, which rates candidates')
  if servers:
    raise UserError(
      f'{servers[0]}: a server answers each process at its own time, but '
      f'mesh_sampling.processes={run.config.mesh_sampling.processes} splits models over processes '
      'that sample in lock step. Hold all models of the chains behind servers, or none.'
    )


def _sampled_here(run: Run) -> list[str]:
  """Return the names of the models in memory that sample chains."""
  names = (getattr(run.config.model, role) for role in ('base', 'critique', 'revision', 'aligned'))
  return [name for name in names if name]


def _make_dialogues(run: Run, infos: Mapping[str, models.ModelInfo]) -> dict[str, Dialogue]:
  """Return the dialogue of each model that samples or learns, by its name.

  A dialogue checks on construction that its chat template keeps the messages of a conversation.
  """
  feedback, dialogues = run.config.feedback, {}
  for role in ('base', 'critique', 'revision', 'init', 'aligned'):
    name = getattr(run.config.model, role)
    if name and name not in dialogues:
      info = infos[name]
      try:
        dialogues[name] = Dialogue(
          info.tokenizer, feedback.style, info.eos_token_ids, feedback.template_options
        )
      except UserError as error:
        raise UserError(f'model.{role}={name!r}: {error}') from error
  return dialogues


def _check_devices(run: Run) -> None:
  """Check that batches divide over the devices, and that the attention kernel runs on them."""
  mesh, train = global_mesh(run), run.config.train
  if 'slots' not in run.config.engine.unresolved:
    check_batch(run.config.engine.slots, sampling_mesh(run), 'engine.slots')
  _check_lock_step(run)
  rows = train.batch_size // train.accumulation
  check_batch(rows, mesh, 'train.batch_size / train.accumulation')
  try:
    if train.attention != AUTO:
      check_kernel(train.attention, mesh, train.dtype, train.max_length)
  except UserError as error:
    raise UserError(f'train.attention: {error}') from None


def _check_training_start(
  run: Run, stages: Sequence[str], name: str, info: models.ModelInfo, dialogue: Dialogue
) -> None:
  """Check that the model to fine-tune can learn the run's prompts."""
  context, max_length = info.config.max_positions, run.config.train.max_length
  if max_length > context:
    raise UserError(
      f'train.max_length={max_length} exceeds the context of {name}, which holds {context} tokens. '
      'Lower train.max_length.'
    )
  train = run.config.train
  if 'train' in stages:
    train.check_model(info.config, name)
    frozen = abstract_params(info.config, train.dtype, train.base_weights)
    param_shardings(frozen, global_mesh(run))
    check_sequence(global_mesh(run), max_length, info.config)
  if 'train' in stages and train.attention != AUTO:
    try:
      if not has_checkpoints(run.workdir):
        check_new_rows(train.attention, max_length)
      check_model(train.attention, global_mesh(run), train.dtype, max_length, info.config)
    except UserError as error:
      raise UserError(f'train.attention: {error}') from None
  lengths = _prompt_lengths(run, dialogue, ('harmful',))
  if 'train' in stages and lengths and min(lengths) + 2 > max_length:
    raise UserError(
      f'train.max_length={max_length} holds no prompt with its reply: the shortest prompt has '
      f'{min(lengths)} tokens. Raise train.max_length.'
    )


def _check_answer_lengths(run: Run, name: str, info: models.ModelInfo, dialogue: Dialogue) -> None:
  """Check that the aligned model's context holds each held-out prompt with its answer."""
  context, sampling = info.config.max_positions, run.config.sampling.initial
  answer, field = sampling.max_tokens, 'sampling.initial.max_tokens'
  if sampling.max_thought_tokens:
    marks = len(dialogue.open_thoughts()) + len(dialogue.close_thoughts([]))
    answer += sampling.max_thought_tokens + marks
    field += ' + max_thought_tokens + marks'
  prompts = [prompt for name in prompt_sets.HELD_OUT for prompt in run.prompts[name]]
  lengths = _prompt_lengths(run, dialogue, prompt_sets.HELD_OUT)
  longest = max(lengths, default=0)
  if longest + answer > context:
    raise UserError(
      f'{prompts[lengths.index(longest)]}: this held-out prompt has {longest} tokens and its '
      f'answer up to {field}={answer}, but the context of {name} holds '
      f'{context}. Shorten the prompt or the answer.'
    )


def _prompt_lengths(run: Run, dialogue: Dialogue, names: Sequence[str]) -> list[int]:
  """Return the number of tokens of each prompt of some sets, as a model reads it."""
  return [len(render_prompt(dialogue, prompt)) for name in names for prompt in run.prompts[name]]


def _count_replies(run: Run) -> tuple[int, int]:
  """Return the largest number of replies to harmful prompts, and of helpful ones, to train on."""
  config = run.config
  share, num_replies = config.train.helpfulness_share, len(run.prompts['harmful'])
  num_replies *= config.feedback.rounds if config.train.target == 'all' else 1
  return num_replies, round(share * num_replies / (1 - share))


def _most_steps(run: Run) -> int:
  """Return the number of steps if no reply is dropped and each takes a row of its own."""
  train = run.config.train
  return -(-train.epochs * sum(_count_replies(run)) // train.batch_size)


def _check_helpful_prompts(run: Run) -> None:
  """Check that there are enough helpful responses for `train.helpfulness_share`."""
  config = run.config
  share = config.train.helpfulness_share
  num_replies, needed = _count_replies(run)
  samples, prompts = config.feedback.helpful_samples, len(run.prompts['helpful'])
  if needed > samples * prompts:
    raise UserError(
      f'train.helpfulness_share={share} with {num_replies} replies to harmful prompts needs '
      f'{needed} helpful prompts, but there are {prompts}, each answered '
      f'feedback.helpful_samples={samples} times. Give more as prompts.helpful, or lower the share.'
    )
