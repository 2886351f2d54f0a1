"""Settings that the devices decide: what 'auto' stands for in a run.

They are resolved once. A run that continues uses what its manifest records, also if the defaults of
this version or the devices are others.
"""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from cai_jax.model.attention.kernels.kernel import AUTO, check_kernel
from cai_jax.model.families.family import config_from_hf
from cai_jax.model.folder import find_folder, read_hf_config
from cai_jax.pipeline.models import global_mesh
from cai_jax.pipeline.run import Run
from cai_jax.runtime.errors import UserError
from cai_jax.tiny.files import model_path
from cai_jax.training.attention import resolve_attention
from cai_jax.training.step import is_deterministic


def resolve_devices(run: Run, stages: Mapping[str, Any]) -> Run:
  """Return a run with the name of an attention kernel in place of train.attention='auto'.

  Args:
    run: a checked run.
    stages: the stages that its manifest records, by name.

  Raises:
    UserError: if the training has begun with a kernel that cannot run on these devices.
  """
  train = run.config.train
  if train.attention != AUTO or run.config.model.aligned or not run.training_start:
    return run
  mesh = global_mesh(run)
  entry = stages.get('train', {})
  if recorded := entry.get('settings', {}).get('train', {}).get('attention'):
    train = dataclasses.replace(train, attention=recorded)
    if 'finished' not in entry:
      try:
        check_kernel(recorded, mesh, train.dtype, train.max_length)
      except UserError as error:
        raise UserError(f'The training in {run.workdir} has begun elsewhere: {error}') from None
  else:
    folder = find_folder(model_path(run.training_start), ('config.json',))
    model = config_from_hf(read_hf_config(folder))
    train = resolve_attention(train, mesh, [train.max_length], model)
  values = copy.deepcopy(dict(run.values))
  values['train']['attention'] = train.attention
  return dataclasses.replace(
    run, config=dataclasses.replace(run.config, train=train), values=values
  )


def describe_training(run: Run) -> str:
  """Return a line that says which attention kernel training uses, and what that means.

  Args:
    run: a run from `resolve_devices`.
  """
  train = run.config.train
  line = f'train.attention: {train.attention!r}'
  if is_deterministic(train, global_mesh(run)) or not train.deterministic:
    return line
  return (
    f"{line}. It is the fastest here, but gives other bits in each run; 'blocks' gives the same."
  )
