"""Does a config's model fit a TPU slice, and how fast could it run there? Asked without a TPU.

Command:   pip install 'jax[tpu]==JAX_VERSION'   (of the jax at hand: libtpu has the compiler)
           python -m experiments.aot --config=configs/llama3_8b_v5e.py \\
             --topology=v5e:8x8
           ... --programs=train --settings train.accumulation=1 train.accumulation=2,mesh.tensor=1
Hardware:  any CPU; an 8B model takes 3 GB and some minutes, --layers=2 one
Method:    the train step and the sampler's prefill and decode programs are compiled from shapes
           alone: nothing is allocated, and no weights are needed. As in launch.py the whole slice
           trains as one mesh, and each host samples on its own chips, so what is compiled there is
           one host's part; --mesh takes the whole slice for both.
Prints:    per device: bytes of each kind, whether they fit, FLOPs, collectives, copies; the least
           time that a train step, a decode step and a prefill chunk can take; the largest number of
           slots; for a train step that does not fit, what would take less. With --settings, a
           table of the train step under each of them.

Reading it: bytes and `fits` are the compiler's. FLOPs are those of its cost analysis, which counts
a loop's body once, and so one decode step; a train step's are counted in the traced program, in all
turns of its loops. The least time is the largest of FLOPs / peak, bytes that must be moved
(parameters, moments, caches, prefixes) / bandwidth, and bytes that collectives must send /
bandwidth of all links; real steps take longer. 'In a row' adds the three, as if nothing overlapped.
"""

import argparse
import ast
import dataclasses
import importlib.util
import os
import pathlib
from collections.abc import Sequence
from typing import Any

if __name__ == '__main__':  # libtpu and jax read these when they are loaded
  os.environ['JAX_PLATFORMS'] = 'cpu'
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')  # no chip is taken: share the compiler
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')  # ask no cloud's server what machine this is
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  os.environ.setdefault('TPU_WORKER_ID', '0')

import jax
from ml_collections import ConfigDict

from cai_jax.model.config import ModelConfig
from cai_jax.runtime.files import write_json
from cai_jax.runtime.mesh import AXES, make_mesh
from cai_jax.sampling.engine import EngineConfig
from cai_jax.training.config import TrainConfig
from experiments.aot import sampler, train
from experiments.aot.models import find_model
from experiments.aot.slices import Slice, find_slice

PROGRAMS = ('train', 'decode', 'prefill')


def load_config(path: str) -> ConfigDict:
  """What the get_config() of a file gives.

  Raises:
    ValueError: if there is no such file.
  """
  if not pathlib.Path(path).is_file():
    raise ValueError(f'--config={path}: there is no such file.')
  spec = importlib.util.spec_from_file_location('config', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config()


def override(config: ConfigDict, settings: str) -> ConfigDict:
  """A copy of a config with settings such as 'train.accumulation=1,mesh.tensor=2'.

  Raises:
    ValueError: for a field that the config does not have, or a value of another type.
  """
  config = config.copy_and_resolve_references()
  for setting in filter(None, settings.split(',')):
    name, _, value = setting.partition('=')
    fields = config.to_dict()
    for part in name.split('.'):
      if not isinstance(fields, dict) or part not in fields:
        raise ValueError(f'--settings: {setting!r}: the config has no field {name!r}.')
      fields = fields[part]
    try:
      found = value if isinstance(fields, str) else ast.literal_eval(value)
      config.update_from_flattened_dict({name: found})
    except (ValueError, TypeError, SyntaxError) as error:
      raise ValueError(f'--settings: {setting!r}: {error}') from error
  return config


def training(config: ConfigDict, model: ModelConfig, chips: Slice) -> train.Training:
  """The training of launch.py on the slice."""
  settings = TrainConfig(seed=config.seed, **config.train)
  mesh = make_mesh(**config.mesh, devices=chips.devices)
  return train.Training(model, settings, mesh)


def sampling(
  config: ConfigDict, model: ModelConfig, chips: Slice, args: argparse.Namespace
) -> tuple[sampler.Sampler, int]:
  """(the sampling of launch.py on one part of the slice, the number of parts)."""
  if args.mesh:
    parts, mesh = 1, make_mesh(**config.mesh, devices=chips.devices)
  else:
    parts = chips.hosts
    mesh = sampler.host_mesh(config.mesh.to_dict(), chips, chips.of_host())
  lm = sampler.abstract_lm(model, mesh, config.model.dtype)
  engine = EngineConfig(**config.engine)
  slots = args.slots or engine.fit([lm], args.length, [sum(args.prefixes)])
  return sampler.Sampler(lm, engine, slots, args.length, tuple(args.prefixes)), parts


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--config', required=True, help='file with get_config()')
  parser.add_argument('--topology', default='v5e:4x4', help='chip and shape of the slice')
  parser.add_argument('--programs', default=','.join(PROGRAMS), help='which, with commas')
  parser.add_argument('--model_config', help='a config.json, for models that are not known here')
  parser.add_argument('--layers', type=int, help='fewer than the model has, to try something')
  parser.add_argument('--mesh', type=int, nargs=3, help='data fsdp tensor, of the whole slice')
  parser.add_argument('--settings', nargs='*', default=[], help='others to compile train with too')
  parser.add_argument('--length', type=int, default=1536, help="tokens of a slot's cache")
  parser.add_argument('--prefixes', type=int, nargs='*', default=[512, 512], help='tokens of each')
  parser.add_argument('--slots', type=int, help='of a program; if absent, what the config gives')
  parser.add_argument(
    '--search', action=argparse.BooleanOptionalAction, default=True, help='the most slots that fit'
  )
  parser.add_argument('--hlo', type=pathlib.Path, help='folder for the compiled programs as text')
  parser.add_argument('--output', type=pathlib.Path, help='JSON of all that is found')
  args = parser.parse_args(argv)
  args.programs = args.programs.split(',')
  if unknown := set(args.programs) - set(PROGRAMS):
    parser.error(f'--programs: {", ".join(sorted(unknown))}: there are {", ".join(PROGRAMS)}.')
  return args


def main(argv: Sequence[str] | None = None) -> None:
  """Compiles the programs and prints what they take."""
  args = parse(argv)
  config, chips = load_config(args.config), find_slice(args.topology)
  if args.mesh:
    config.mesh.update(dict(zip(AXES, args.mesh, strict=True)))
  model = find_model(config.model.base or config.model.init, args.model_config)
  if args.layers:
    windows = model.windows[: args.layers]
    model = dataclasses.replace(model, num_layers=args.layers, windows=windows)
  print(
    f'{chips.name}: {len(chips.devices)} chips of {chips.hosts} hosts; '
    f'{model.num_params / 1e9:.3f} billion parameters; jax {jax.__version__}',
    flush=True,
  )
  if args.hlo:
    args.hlo.mkdir(parents=True, exist_ok=True)
  result: dict[str, Any] = {'topology': chips.name, 'jax': jax.__version__}
  if 'train' in args.programs:
    jobs = {s: training(override(config, s), model, chips) for s in ('', *args.settings)}
    result['train'] = train.study(jobs, chips, args.hlo)
  if names := [name for name in PROGRAMS[1:] if name in args.programs]:
    job, parts = sampling(config, model, chips, args)
    result['sampler'] = sampler.study(job, chips, parts, names, args.search, args.hlo)
  if args.output:
    write_json(args.output, result)


if __name__ == '__main__':
  main()
