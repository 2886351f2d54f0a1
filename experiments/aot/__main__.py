"""Does a config's model fit a TPU slice, and how fast could it run there? No TPU is needed.

Command:   pip install 'jax[tpu]==JAX_VERSION'   (the version of the installed jax)
           python -m experiments.aot --config=configs/llama3_8b_v5e.py --topology=v5e:8x8
           python -m experiments.aot --config=configs/llama3_8b_v5e.py --programs=train \\
             --settings train.accumulation=1 train.accumulation=2,mesh.tensor=1
           python -m experiments.aot --config=configs/bai2022_rl_cai_feedback.py \\
             --programs=prefer,reward --topology=v5e:8x8
Hardware:  any CPU. An 8B model takes 3 GB and some minutes; with --layers=2, one minute
Method:    compile the train step and the sampler's prefill and decode programs from shapes alone,
           without weights and without allocating an array. As in launch.py, the whole slice trains
           as one mesh, and each replica samples on the chips of `mesh_sampling.processes` hosts (by
           default one), for which the sampling programs are compiled. With --mesh, both use the
           whole slice. The programs prefer and reward are the train steps of these sections, on
           comparisons.
Prints:    per device: bytes of each kind, whether they fit, FLOPs, collectives and copies; a lower
           bound on the time of a train step, a decode step and a prefill chunk; the largest number
           of slots that fits; and for a train step that does not fit, settings that take less
           memory. With --settings, also a table of the train step under each of them.

How to read it: bytes and whether they fit come from the compiler, and so do the sampler's FLOPs.
The compiler's cost analysis counts the body of a loop once, so it counts one decode step. The FLOPs
of a train step are counted in the traced program, over all iterations of its loops. The lower bound
is the largest of FLOPs / peak, bytes that must be moved (parameters, moments, caches, prefixes) /
bandwidth, and bytes that collectives must send / bandwidth of all links. Real steps take longer.
'Without overlap' is the sum of the three.
"""

import argparse
import ast
import dataclasses
import importlib.util
import os
import pathlib
from collections.abc import Sequence
from typing import Any

if __name__ == '__main__':  # jax and libtpu read these variables when they are imported
  os.environ['JAX_PLATFORMS'] = 'cpu'
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')  # we only compile and use no chip
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')  # do not query the cloud's metadata server
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  os.environ.setdefault('TPU_WORKER_ID', '0')

import jax
from ml_collections import ConfigDict

from cai_jax.cli import short_errors
from cai_jax.model.config import ModelConfig
from cai_jax.pipeline.preference_config import PolicyConfig, RewardConfig
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import write_json
from cai_jax.runtime.hardware import Device
from cai_jax.runtime.mesh import AXES, make_mesh
from cai_jax.sampling import auto
from cai_jax.sampling.config import EngineConfig
from cai_jax.training.attention import resolve_attention
from cai_jax.training.config import TrainConfig
from experiments.aot import sampler, train
from experiments.aot.models import find_model, first_layers
from experiments.aot.slices import Slice, find_slice

TRAININGS = {'train': TrainConfig, 'prefer': PolicyConfig, 'reward': RewardConfig}  # by section
PROGRAMS = ('train', 'decode', 'prefill')  # that are compiled by default


def load_config(path: str) -> ConfigDict:
  """Return the config of a file that defines `get_config()`.

  Raises:
    UserError: if there is no such file.
  """
  if not pathlib.Path(path).is_file():
    raise UserError(f'--config={path}: there is no such file.')
  spec = importlib.util.spec_from_file_location('config', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config()


def override_config(config: ConfigDict, settings: str) -> ConfigDict:
  """Return a copy of a config with some fields set.

  Args:
    config: the config to copy.
    settings: such as 'train.accumulation=1,mesh.tensor=2'.

  Raises:
    UserError: if the config has no such field or the value has the wrong type.
  """
  config = config.copy_and_resolve_references()
  for setting in filter(None, settings.split(',')):
    name, _, value = setting.partition('=')
    fields = config.to_dict()
    for part in name.split('.'):
      if not isinstance(fields, dict) or part not in fields:
        raise UserError(f'--settings: {setting!r}: the config has no field {name!r}.')
      fields = fields[part]
    try:
      parsed = value if isinstance(fields, str) else ast.literal_eval(value)
      config.update_from_flattened_dict({name: parsed})
    except (ValueError, TypeError, SyntaxError) as error:
      raise UserError(f'--settings: {setting!r}: {error}') from error
  return config


def training_job(
  config: ConfigDict, model: ModelConfig, chips: Slice, section: str = 'train'
) -> train.Training:
  """Return a training job that launch.py would run on the slice.

  Args:
    config: the config.
    model: the shape of the language model. A reward model has no output layer.
    chips: the slice.
    section: the section of the config with its settings, a key of `TRAININGS`.
  """
  shared = {'seed': config.seed, 'layers': config.model.layers}
  settings = TRAININGS[section](**shared, **config[section])
  if settings.registered_loss.head:
    model = dataclasses.replace(model, tied_embeddings=True)
  mesh = make_mesh(**config.mesh, devices=chips.devices)
  settings = resolve_attention(settings, mesh, [settings.max_length], model)
  return train.Training(model, settings, mesh)


def sampling_job(
  config: ConfigDict, model: ModelConfig, chips: Slice, args: argparse.Namespace
) -> tuple[sampler.Sampler, int]:
  """Return the sampling job that launch.py would run on each part of the slice, and their number.

  A part is a replica, or the whole slice with --mesh.
  """
  if args.mesh:
    parts, mesh = 1, make_mesh(**config.mesh, devices=chips.devices)
  else:
    mesh, parts = sampler.replica_mesh(config, chips)
  lm = sampler.abstract_lm(model, mesh, config.model.dtype, config.model.weights)
  device = Device('tpu', chips.name, int(chips.chip.memory))
  held = auto.Held(model, config.model.dtype, config.model.weights)
  load = auto.measure_load([held], mesh)
  engine = auto.resolve(EngineConfig(**config.engine), device, load)  # as a run on the slice does
  slots = args.slots or engine.fit([lm], args.length, [sum(args.prefixes)])[0]
  return sampler.Sampler(lm, engine, slots, args.length, tuple(args.prefixes)), parts


def parse_flags(argv: Sequence[str] | None) -> argparse.Namespace:
  """Parse the command line."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments.aot',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--config', required=True, help='file that defines get_config()')
  parser.add_argument('--topology', default='v5e:4x4', help='chip and shape of the slice')
  parser.add_argument(
    '--programs',
    default=','.join(PROGRAMS),
    help="programs to compile, separated by commas; also 'prefer' and 'reward'",
  )
  parser.add_argument('--model_config', help='another model: its config.json or its name')
  parser.add_argument('--layers', type=int, help='number of layers, for a faster trial')
  parser.add_argument(
    '--mesh',
    type=int,
    nargs='+',
    help='data fsdp tensor, and expert and sequence if not 1, of the whole slice',
  )
  parser.add_argument(
    '--settings', nargs='*', default=[], help='further settings to compile the train step with'
  )
  parser.add_argument('--length', type=int, default=1536, help="tokens of a slot's cache")
  parser.add_argument(
    '--prefixes', type=int, nargs='*', default=[512, 512], help='tokens of each shared prefix'
  )
  parser.add_argument('--slots', type=int, help="number of slots; by default the config's")
  parser.add_argument(
    '--search',
    action=argparse.BooleanOptionalAction,
    default=True,
    help='search for the largest number of slots that fits',
  )
  parser.add_argument('--hlo', type=pathlib.Path, help='folder for the compiled programs as text')
  parser.add_argument('--output', type=pathlib.Path, help='JSON file for all results')
  args = parser.parse_args(argv)
  if args.mesh and not 3 <= len(args.mesh) <= len(AXES):
    parser.error(f'--mesh: give 3 to 5 sizes, {" ".join(AXES)}.')
  args.programs = args.programs.split(',')
  known = [*TRAININGS, *PROGRAMS[1:]]
  if unknown := set(args.programs) - {*known}:
    parser.error(f'--programs: unknown {", ".join(sorted(unknown))}; use {", ".join(known)}.')
  return args


def main(argv: Sequence[str] | None = None) -> None:
  """Compile the programs and print their memory and time."""
  args = parse_flags(argv)
  config, chips = load_config(args.config), find_slice(args.topology)
  if args.mesh:
    config.mesh.update(dict(zip(AXES, (*args.mesh, 1, 1), strict=False)))
  model = find_model(config.model.base or config.model.init, args.model_config)
  if args.layers:
    model = first_layers(model, args.layers)
  print(
    f'{chips.name}: {len(chips.devices)} chips of {chips.hosts} hosts; '
    f'{model.num_params / 1e9:.3f} billion parameters; jax {jax.__version__}',
    flush=True,
  )
  if args.hlo:
    args.hlo.mkdir(parents=True, exist_ok=True)
  result: dict[str, Any] = {'topology': chips.name, 'jax': jax.__version__}
  configs = {settings: override_config(config, settings) for settings in ('', *args.settings)}
  for section in (name for name in TRAININGS if name in args.programs):
    jobs = {settings: training_job(c, model, chips, section) for settings, c in configs.items()}
    result[section] = train.study(jobs, chips, args.hlo)
  if names := [name for name in PROGRAMS[1:] if name in args.programs]:
    job, parts = sampling_job(config, model, chips, args)
    result['sampler'] = sampler.study(job, chips, parts, names, args.search, args.hlo)
  if args.output:
    write_json(args.output, result)


if __name__ == '__main__':
  with short_errors():
    main()
