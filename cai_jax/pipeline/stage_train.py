"""Stage `train`: fine-tune a model on D_CAI."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from cai_jax.data import d_cai, quality
from cai_jax.dialogue import Dialogue
from cai_jax.dialogue.template_options import bind_template_options
from cai_jax.model import lm as models
from cai_jax.model import peft
from cai_jax.model.lm import LM
from cai_jax.model.quantized.kernel import FULL
from cai_jax.model.sharding import copy_to_local_mesh
from cai_jax.pipeline.contents import model_contents
from cai_jax.pipeline.kept_models import keep_aligned
from cai_jax.pipeline.models import global_mesh, local_mesh, make_dialogue
from cai_jax.pipeline.quality_gate import keep_limits, references
from cai_jax.pipeline.run import Run
from cai_jax.runtime import processes
from cai_jax.runtime.digests import digest_files
from cai_jax.runtime.files import writing
from cai_jax.runtime.terminal import say
from cai_jax.sampling.completions import generate
from cai_jax.tiny.files import model_path
from cai_jax.training.log import remarks
from cai_jax.training.loop import Probe
from cai_jax.training.step import is_deterministic
from cai_jax.training.supervised import fine_tune


def train_model(run: Run, manifest: Mapping[str, Any]) -> dict[str, Any]:
  """Write M_aligned to `model/`, and the checkpoints and metrics of its training.

  Args:
    run: the run.
    manifest: not used.

  Returns:
    Counts, losses and speeds for the manifest.

  Raises:
    UserError: if the rate of a defect exceeds its limit in `feedback.max_rate`, D_CAI has no
      example to train on, or training stops on a loss that is not finite.
  """
  del manifest
  config = run.config.train
  if not run.config.data.d_cai:
    processes.run_on_process_0('keep feedback.max_rate', lambda: keep_limits(run))
  lm = models.load(
    model_path(run.training_start),
    dtype=config.dtype,
    mesh=global_mesh(run),
    param_dtype='float32',
    long_context=run.config.model.long_context,
    weights=config.base_weights,
  )
  dialogue = make_dialogue(run, lm)
  params, summary = fine_tune(
    lm,
    d_cai.read_rows(run.d_cai),
    dialogue,
    config,
    run.workdir,
    make_probe(run, lm, config.probes) if config.probes else None,
    run.profile,
    references(run),
    take_over=True,
  )
  notes = remarks(summary, config)
  notes += [
    f'train.filters: {name!r} is now called {quality.RENAMED[name]!r}.'
    for name in config.filters
    if name in quality.RENAMED
  ]
  if not is_deterministic(config, lm.mesh):
    notes.append(
      'On this GPU and with these settings, the train step is not deterministic: another run, or a '
      'resumed one, ends with slightly different parameters.'
    )
  if jax.process_index() == 0:
    for note in notes:
      say(f'train: {note}')
  with writing(run.workdir / 'model'):
    export_model(run, lm, params, dialogue)
  adapters = {}
  if config.lora is not None and config.lora_export:
    adapters['adapter'] = digest_files(run.workdir / 'adapter', peft.FILES)
  return {
    'model': model_contents(str(run.workdir / 'model')),
    **adapters,
    'rows_in': summary.pop('rows'),
    'rows_kept': summary.pop('kept'),
    'rows_dropped': summary.pop('dropped'),
    'tokens': summary.pop('target_tokens'),
    'tokens_per_second': summary.pop('target_tokens_per_second'),
    'remarks': notes,
    **summary,
  }


def export_model(run: Run, lm: LM, params: Any, dialogue: Dialogue) -> None:
  """Save M_aligned, with the dtype that the config asks for.

  Args:
    run: the run.
    lm: the initial model.
    params: the trained parameters.
    dialogue: what rendered the examples.
  """
  dtype = resolve_export_dtype(run.config.train.export_dtype, model_path(run.training_start))
  save_trained(run, lm, params, dialogue, run.workdir / 'model', dtype)
  keep_aligned(run, params, dtype)


def resolve_export_dtype(dtype: str, start: str) -> str:
  """Return the dtype of a saved model: the configured one, or that of the initial model.

  Args:
    dtype: the setting `export_dtype`.
    start: checkpoint of the initial model.
  """
  return models.read_stored_dtype(start) if dtype == 'base' else dtype


def save_trained(
  run: Run, lm: LM, params: Any, dialogue: Dialogue, folder: pathlib.Path, dtype: str
) -> None:
  """Save a trained model with its stop tokens and template options.

  Args:
    run: the run.
    lm: the initial model.
    params: the trained parameters.
    dialogue: what rendered the examples.
    folder: where to save it.
    dtype: dtype of its weights.
  """
  options = run.config.feedback.template_options if run.config.feedback.style == 'chat' else ()
  trained = dataclasses.replace(
    lm,
    params=params,
    tokenizer=bind_template_options(lm.tokenizer, options),
    eos_token_ids=tuple(dict.fromkeys((*lm.eos_token_ids, *dialogue.stop_token_ids))),
  )
  models.save(trained, folder, dtype)


def make_probe(run: Run, lm: LM, count: int) -> Probe:
  """Return a function that answers the first held-out prompts with given parameters.

  Args:
    run: the run.
    lm: the model; the parameters come with each call.
    count: number of prompts.
  """
  held_out = [*run.prompts['eval_harmful'], *run.prompts['eval_helpful']]
  prompts = held_out[:count]
  mesh, dtype, sampling = local_mesh(run), run.config.model.dtype, run.config.sampling.initial
  # Thoughts and answer are sampled as one reply, with the room of both.
  most = sampling.max_tokens + sampling.max_thought_tokens
  sampling = dataclasses.replace(sampling, max_tokens=most, max_thought_tokens=0)

  def answer(params: Any) -> list[dict[str, str]]:
    completions = generate(
      dataclasses.replace(lm, params=params, mesh=mesh, dtype=dtype, weights=FULL),
      [list(prompt.messages) for prompt in prompts],
      sampling,
      run.config.seed,
      style=run.config.feedback.style,
      template_options=run.config.feedback.template_options,
    )
    return [
      {'id': prompt.id, 'prompt': prompt.messages[-1]['content'], 'text': completion.text}
      for prompt, completion in zip(prompts, completions, strict=True)
    ]

  def probe(params: Any) -> list[dict[str, str]]:
    local = copy_to_local_mesh(params, mesh, dtype)  # by all processes together
    return processes.run_on_process_0('answer probe prompts', lambda: answer(local)) or []

  return probe
