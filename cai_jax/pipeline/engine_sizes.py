"""The sizes of a run's sampling programs, in place of 'auto' in its config.

They are chosen when the run first samples, and stored in its `config.json`. A run that continues
uses them again, also on another machine, because on accelerators they decide the last bits of
log-probabilities.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

from cai_jax.model.attention.cached import choose_cached
from cai_jax.model.families.family import config_from_hf
from cai_jax.model.folder import find_folder, read_hf_config
from cai_jax.pipeline.models import sampling_mesh
from cai_jax.pipeline.run import Run
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import read_json
from cai_jax.runtime.hardware import describe_device
from cai_jax.runtime.mesh import check_batch
from cai_jax.runtime.replicas import replica_of
from cai_jax.sampling import auto
from cai_jax.sampling.config import AUTO, EngineConfig
from cai_jax.tiny.files import model_path


def resolve_engine(run: Run, samples: bool) -> tuple[Run, str]:
  """Return the run with a number in place of each 'auto' in `engine`.

  Args:
    run: the run. Its models have been checked.
    samples: whether the run is going to sample. Otherwise only what an earlier start has stored is
      filled in.

  Returns:
    The run, and a line that says what the numbers are and where they come from; '' if there is
    nothing to say.

  Raises:
    UserError: if `config.json` is damaged, what it stores does not suit these devices, or a model
      cannot take back the drafts that the config asks for.
  """
  mesh = sampling_mesh(run) if samples else None

  def choose() -> tuple[dict[str, Any], str]:
    engine, note = _choose(run, mesh)
    return dataclasses.asdict(engine), note

  # Hosts with other memory would choose other sizes, so the leader chooses for its replica. All of
  # the work is shared, because the others would wait for a leader that fails before.
  sizes, note = replica_of(mesh).share(choose)
  engine = EngineConfig(**sizes)
  config = dataclasses.replace(run.config, engine=engine)
  values = {**run.values, 'engine': dataclasses.asdict(engine)}
  return dataclasses.replace(run, config=config, values=values), note


def _choose(run: Run, mesh: Mesh | None) -> tuple[EngineConfig, str]:
  """Return the engine of `resolve_engine`, and its line.

  Args:
    run: the run.
    mesh: the mesh that samples; None if the run is not going to sample.
  """
  given = run.config.engine
  stored = _read_stored(run.workdir / 'config.json', given)
  engine = kept = dataclasses.replace(given, **stored)
  if mesh is None:
    return engine, ''
  models = sampling_models(run)
  for model in models:
    given.check_drafts(model.config)
  if not given.unresolved:
    return engine, ''
  device = describe_device(mesh.local_devices[0])
  load = auto.measure_load(models, mesh, auto.page_of(kept))
  engine, own = (auto.resolve(config, device, load) for config in (kept, given))
  check_batch(engine.slots, mesh, 'engine.slots')
  if 'attention' in stored:
    _check_attention(run, engine, models, mesh)
  parts = []
  if stored:
    parts.append(f'engine, as this run began: {_show(engine, tuple(stored))}')
  if others := [name for name in stored if stored[name] != getattr(own, name)]:
    parts.append(f'this device alone would get {_show(own, others)}')
  if kept.unresolved:
    place = f'{device.kind} with {device.memory / auto.GIB:.1f} GiB'
    parts.append(f'engine for {place}: {_show(engine, kept.unresolved)}')
  return engine, '; '.join(parts)


def _check_attention(
  run: Run, engine: EngineConfig, models: Sequence[auto.Held], mesh: Mesh
) -> None:
  """Check that the attention with which a run began supports the models on these devices."""
  try:
    for model in models:
      choose_cached(engine.attention, model.config, model.dtype, engine.page_tokens, mesh)
  except UserError as error:
    raise UserError(
      f'{run.workdir} began with engine.attention={engine.attention!r}, which cannot run here. '
      "Continue on such devices, or set engine.attention='pages', which samples unfinished rows "
      'again.'
    ) from error


def _show(engine: EngineConfig, names: Sequence[str]) -> str:
  return ', '.join(f'{name}={getattr(engine, name)}' for name in names)


def _read_stored(path: pathlib.Path, given: EngineConfig) -> dict[str, Any]:
  """Return the numbers of an earlier start for the fields that are 'auto' now."""
  if not given.unresolved or not path.exists():
    return {}
  section = read_json(path).get('engine', {})
  try:
    if not isinstance(section, dict):
      raise UserError('engine is no section')
    stored = {name: section.get(name, AUTO) for name in given.unresolved}
    engine = EngineConfig(**stored)
  except UserError as error:
    raise UserError(
      f'{path} is damaged: {str(error).rstrip(".")}. Restore it, or give a number for each of '
      f'engine.{", engine.".join(given.unresolved)}.'
    ) from None
  return {name: getattr(engine, name) for name in stored if name not in engine.unresolved}


def sampling_models(run: Run) -> list[auto.Held]:
  """Return the models that sample together in this process, and how they are held.

  M_aligned answers alone, and has the shape of one of the others or the place that they leave.

  Args:
    run: the run.
  """
  section = run.config.model
  names = {name for name in (section.base, section.critique, section.revision) if name}
  names = names or {name for name in (section.aligned or section.init,) if name}
  folders = [find_folder(model_path(name), ('config.json',)) for name in sorted(names)]
  configs = [config_from_hf(read_hf_config(folder)) for folder in folders]
  if section.long_context:
    configs = [config.with_long_context() for config in configs]
  return [auto.Held(config, section.dtype, section.weights) for config in configs]
