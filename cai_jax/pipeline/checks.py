"""What a run needs of models, devices, servers and disk, checked before its first stage."""

import contextlib
from collections.abc import Sequence

from cai_jax.dialogue import Dialogue
from cai_jax.model import lm as models
from cai_jax.model import lora
from cai_jax.model.attention.kernels.kernel import check_kernel
from cai_jax.model.sharding import param_shardings
from cai_jax.model.transformer import abstract_model
from cai_jax.pipeline.run import PROMPT_SETS, Run, local_mesh, mesh_of, model_path
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import check_workdir
from cai_jax.runtime.mesh import check_batch
from cai_jax.sampling.remote import Remote


def check(run: Run, stages: Sequence[str]) -> None:
  """Checks what the stages need of models, devices and disk, before the first of them starts.

  Raises:
    ValueError: naming the field and what it may be.
  """
  section = run.config['model']
  init = section['init'] or section['base']
  if not init and {'train', 'evaluate'} & {*stages}:
    raise UserError(
      'model.init is empty: with M_θ served elsewhere it must name the checkpoint that M_aligned '
      'starts from. Give it, or choose --stages=generate.'
    )
  names = {section[name] for name in ('base', 'critique', 'revision', 'init')} - {''}
  if 'evaluate' in stages:
    names |= {run.evaluation.judge} - {'', 'base'}
  parts = {name: models.inspect_model(model_path(name)) for name in names}
  mesh = mesh_of(run)
  for part in parts.values():
    param_shardings(abstract_model(part.config)[1], mesh)
  check_batch(run.engine.slots, local_mesh(run), 'engine.slots')
  rows = run.train.batch_size // run.train.accumulation
  check_batch(rows, mesh, 'train.batch_size / train.accumulation')
  try:
    check_kernel(run.train.attention, mesh, run.train.dtype, run.train.max_length)
  except ValueError as error:
    raise UserError(f'train.attention: {error}') from None
  if init and run.train.lora is not None:
    lora.abstract_model(parts[init].config, run.train.lora)
  if run.train.probes and not (run.prompts['eval_harmful'] or run.prompts['eval_helpful']):
    raise UserError(
      f'train.probes={run.train.probes} needs held-out prompts: give prompts.eval_harmful.source.'
    )
  if init:
    _check_aligned(run, stages, init, parts[init])
  share, replies = run.train.helpfulness_share, len(run.prompts['harmful'])
  replies *= run.feedback.rounds if run.train.target == 'all' else 1
  wanted = round(share * replies / (1 - share))
  samples = run.feedback.helpful_samples
  if 'train' in stages and wanted > samples * len(run.prompts['helpful']):
    raise UserError(
      f'train.helpfulness_share={share} beside {replies} replies to harmful prompts needs {wanted} '
      f'helpful prompts, and there are {len(run.prompts["helpful"])}, each answered '
      f'feedback.helpful_samples={samples} times: give more as prompts.helpful, or lower the share.'
    )
  if 'evaluate' in stages and not run.prompts['eval_harmful']:
    raise UserError(
      'prompts.eval_harmful.source is empty: evaluation needs held-out prompts. Give some, or '
      'choose --stages=generate,train.'
    )
  trained = parts[init].config.num_params if init else 0
  check_workdir(run.workdir, needed_bytes=_disk_bytes(run, trained))


def _check_aligned(run: Run, stages: Sequence[str], name: str, parts: models.ModelInfo) -> None:
  """Checks that the model `name`, once trained, can learn and answer the run's prompts."""
  context = parts.config.max_positions
  if run.train.max_length > context:
    raise UserError(
      f'train.max_length={run.train.max_length} is more than the {context} tokens of the context '
      f'of {name}.'
    )
  options = run.feedback.style, parts.eos_token_ids, run.feedback.template_options
  dialogue = Dialogue(parts.tokenizer, *options)
  lengths = {
    key: [len(dialogue.prompt(p.messages)) for p in run.prompts[key]] for key in PROMPT_SETS
  }
  if 'train' in stages and min(lengths['harmful']) + 2 > run.train.max_length:
    raise UserError(
      f'train.max_length={run.train.max_length} holds no prompt with its reply: the shortest '
      f'prompt has {min(lengths["harmful"])} tokens.'
    )
  longest = max(lengths['eval_harmful'] + lengths['eval_helpful'], default=0)
  sampled = 'evaluate' in stages or run.train.probes
  if sampled and longest + run.sampling.initial.max_tokens > context:
    raise UserError(
      f'a held-out prompt has {longest} tokens and its reply up to '
      f'{run.sampling.initial.max_tokens} (sampling.initial.max_tokens); {name} holds {context}.'
    )


def check_reachable(run: Run) -> None:
  """Asks each server once whether it serves its model."""
  for name, settings in run.remotes.items():
    try:
      with contextlib.closing(Remote(settings)) as served:
        served.check()
    except ValueError as error:
      raise UserError(f'remote.{name}: {str(error).removeprefix("remote: ")}') from error


def _disk_bytes(run: Run, num_params: int) -> int:
  """About what a run writes: f32 parameters and two moments a checkpoint, a model, the rows."""
  rows = sum(map(len, run.prompts.values())) * 50_000
  return 4 * num_params * (3 * (run.train.keep + 1) + 1) + rows + 100_000_000
