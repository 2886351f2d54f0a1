"""Supervised fine-tuning on D_CAI: from the rows of the dataset to the trained parameters."""

import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cai_jax.data import quality
from cai_jax.data.d_cai_rows import Rows
from cai_jax.data.examples import build_examples, hold_out
from cai_jax.data.near_duplicates import group_prompts
from cai_jax.data.part_files import FOLDER, delete_parts
from cai_jax.dialogue import Dialogue
from cai_jax.model.lm import LM
from cai_jax.runtime.errors import UserError
from cai_jax.training.config import TrainConfig
from cai_jax.training.loop import Monitoring, Probe, fit


def fine_tune(
  lm: LM,
  rows: Sequence[Mapping[str, Any]],
  dialogue: Dialogue,
  config: TrainConfig,
  workdir: str | os.PathLike,
  probe: Probe | None = None,
  profile_steps: int = 0,
  references: quality.References | None = None,
  take_over: bool = False,
) -> tuple[Any, dict[str, Any]]:
  """Fine-tune a model on D_CAI.

  Args:
    lm: the initial model, which does not change, except that training takes over its quantized
      kernels, and with `take_over` its parameters; see `fit`.
    rows: rows of D_CAI, see `d_cai.read_rows`.
    dialogue: renders conversations for the model's tokenizer.
    config: settings of the run.
    workdir: folder of the run; see `fit`.
    probe: function that answers fixed prompts at each evaluation; see `Monitoring`.
    profile_steps: number of steps to record a profiler trace of.
    references: texts of the constitution that a response may have copied; some of `config.filters`
      need them.
    take_over: whether `lm.params` may be deleted, which saves memory; see `fit`.

  Returns:
    The trained parameters, see `fit`, and a summary with the counts of the examples.

  Raises:
    UserError: if `config.max_length` exceeds the model's context; see also `build_examples`,
      `hold_out` and `fit`.
    NonFiniteError: if a loss or gradient norm is NaN or infinite.
    Interrupted: after SIGTERM or SIGINT, once a checkpoint is saved.
  """
  if config.max_length > lm.config.max_positions:
    raise UserError(
      f'train.max_length={config.max_length} exceeds the {lm.config.max_positions} tokens that the '
      f'context of {lm.name} holds. Lower it.'
    )
  built = build_examples(
    rows,
    dialogue,
    target=config.target,
    helpfulness_share=config.helpfulness_share,
    max_length=config.max_length,
    drop_truncated=config.drop_truncated,
    reasoning=config.reasoning,
    filters=config.filters,
    references=references,
    seed=config.seed,
    folder=pathlib.Path(workdir) / FOLDER if isinstance(rows, Rows) else None,
  )
  train_examples, held_out = hold_out(
    built.examples, config.eval_share, config.seed, _group_rows(rows) if config.eval_share else None
  )
  params, summary = fit(
    lm.config,
    lm.params,
    train_examples,
    config,
    lm.mesh,
    workdir,
    init_id=lm.fingerprint,
    monitoring=Monitoring(held_out, probe, profile_steps),
    init_name=lm.name,
    take_over=take_over,
  )
  if isinstance(rows, Rows):  # nobody resumes a training that is complete
    delete_parts(pathlib.Path(workdir) / FOLDER)
  return params, {**built.counts, 'held_out': len(held_out), **summary}


def _group_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
  """Return the group of near-duplicate prompts of each row, by its id."""
  ids: list[str] = []

  def read_prompts() -> Iterator[Any]:
    # One after the other, because all may not fit in memory.
    for row in rows.iterate(('id', 'prompt')) if isinstance(rows, Rows) else rows:
      ids.append(row['id'])
      yield row['prompt']

  groups = group_prompts(read_prompts())
  return dict(zip(ids, groups, strict=True))
