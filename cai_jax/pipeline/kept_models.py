"""M_aligned in device memory, from the stage that trains it to the one that evaluates it.

Training and sampling split a model over the same devices in different ways. Right after training,
the parameters go from one mesh to the other, from device to device, in the dtype of sampling. They
are those that the files of the model have, bit for bit. Where this is not possible, the evaluate
stage reads the files. That is decided, and said, before the first stage.
"""

from collections.abc import Sequence

from cai_jax.model.families.family import config_from_hf
from cai_jax.model.folder import find_folder, read_hf_config
from cai_jax.model.quantized.kernel import FULL
from cai_jax.model.sharding import reshard
from cai_jax.model.transformer import Params
from cai_jax.pipeline.engine_sizes import sampling_models
from cai_jax.pipeline.models import global_mesh, sampling_mesh
from cai_jax.pipeline.run import Run
from cai_jax.runtime.hardware import describe_device
from cai_jax.runtime.replicas import replica_of
from cai_jax.sampling import auto
from cai_jax.tiny.files import model_path

BETWEEN = ('label', 'prefer')  # stages that train and sample other models in between


def plan_handover(run: Run, missing: Sequence[str]) -> str:
  """Decide whether M_aligned stays in memory, and return a line about it.

  The line is empty unless the run both trains and evaluates.

  Args:
    run: the run, with the sizes of its engine.
    missing: names of the stages that will run.
  """
  run.kept.wanted = False
  run.kept.params.clear()
  if not {'train', 'evaluate'} <= {*missing}:
    return ''
  reason = _reason_against(run, missing)
  run.kept.wanted = not reason
  if reason:
    return f'M_aligned: evaluate reads it from disk, because {reason}'
  return 'M_aligned: stays in device memory from train to evaluate'


def _reason_against(run: Run, missing: Sequence[str]) -> str:
  """Return why M_aligned cannot stay in memory, as a clause; '' if it can."""
  if others := [name for name in BETWEEN if name in missing]:
    return f'stage {" and ".join(others)} needs the memory'
  if run.config.model.weights != FULL or run.config.train.base_weights != FULL:
    return 'kernels are quantized'
  mesh = sampling_mesh(run)
  if {*mesh.devices.flat} != {*global_mesh(run).devices.flat}:
    return 'a replica of sampling does not have all devices of training'
  return _reason_of_size(run)


def _reason_of_size(run: Run) -> str:
  """Return why a copy of M_aligned does not fit beside other models, as a clause; '' if it does."""
  mesh, engine = sampling_mesh(run), run.config.engine
  folder = find_folder(model_path(run.training_start), ('config.json',))
  config = config_from_hf(read_hf_config(folder))
  copy = auto.Held(config, run.config.model.dtype).param_bytes(mesh)
  # When training ends, the trained parameters are there, and with adapters the initial ones.
  models = 1 if run.config.train.lora is None else 2
  trained = models * auto.Held(config, 'float32').param_bytes(global_mesh(run))
  load = auto.measure_load(sampling_models(run), mesh, auto.page_of(engine))
  sampled = load.parameters + engine.cache_gib * auto.GIB
  # Hosts may have different memory.
  memory = replica_of(mesh).share(lambda: describe_device(mesh.local_devices[0]).memory)
  # Half of what is free stays free: for programs, logits and drafts.
  if copy <= (memory - max(trained, sampled)) / 2:
    return ''
  return (
    f'a copy takes {copy / auto.GIB:.1f} GiB of each device, more than half of what training, or '
    f'M_θ and the cache, leave of {memory / auto.GIB:.1f} GiB'
  )


def keep_aligned(run: Run, params: Params, stored: str) -> None:
  """Keep a copy of M_aligned's parameters for the evaluate stage, if the run has planned that.

  Args:
    run: the run.
    params: the trained parameters.
    stored: dtype of its files.
  """
  if run.kept.wanted:
    dtypes = stored, run.config.model.dtype
    run.kept.params[run.aligned] = reshard(params, sampling_mesh(run), dtypes)
