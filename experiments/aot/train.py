"""The train step, for the whole slice as one mesh, as launch.py would run it."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from cai_jax.model import lora
from cai_jax.model.attention.kernels.kernel import check_kernel
from cai_jax.model.config import ModelConfig
from cai_jax.model.transformer import abstract_model
from cai_jax.runtime.mesh import batch_sharding, batch_shards, check_batch
from cai_jax.training import step as train_steps
from cai_jax.training.config import TrainConfig
from experiments.aot import program as programs
from experiments.aot import work
from experiments.aot.program import Program, TooLarge, build, local_bytes
from experiments.aot.slices import GIB, Chip, Slice

STEPS = 1000  # of the run: the schedule's constants, nothing else


@dataclasses.dataclass(frozen=True)
class Training:
  """All that the train step's shapes depend on."""

  model: ModelConfig
  train: TrainConfig
  mesh: Mesh

  def __post_init__(self):
    train, name = self.train, 'train.batch_size / train.accumulation'
    check_batch(train.batch_size // train.accumulation, self.mesh, name)
    check_kernel(train.attention, self.mesh, train.dtype, train.max_length)
    if train.max_length > self.model.max_positions:
      raise ValueError(
        f'train.max_length={train.max_length} is more than the {self.model.max_positions} tokens '
        "of the model's context."
      )

  @property
  def tokens(self) -> int:
    """Of a step, in all rows."""
    return self.train.batch_size * self.train.max_length

  @property
  def model_flops(self) -> float:
    """FLOPs that a step needs, by the model's formula, for rows that each are one sequence."""
    lengths = [self.train.max_length] * self.train.batch_size
    return self.model.training_flops(lengths, adapters=self.train.lora is not None)

  @property
  def rows(self) -> int:
    """Of a micro-batch, on a device."""
    shards = batch_shards(self.mesh)
    return self.train.batch_size // self.train.accumulation // shards


@dataclasses.dataclass(frozen=True)
class Shapes:
  """The step and its arguments, as shapes with shardings."""

  step: Any  # jitted
  state: train_steps.TrainState
  batch: dict[str, jax.ShapeDtypeStruct]

  def trace(self) -> jax.stages.Traced:
    """The step as a program of all devices."""
    return self.step.trace(self.state, self.batch)

  def bytes(self) -> dict[str, int]:
    """Of each argument, on a device."""
    others = {'average': self.state.ema, 'frozen': self.state.frozen}
    return {
      'parameters': local_bytes(self.state.params),
      'optimizer': local_bytes(self.state.opt_state),
      **{name: local_bytes(tree) for name, tree in others.items() if tree is not None},
      'batch': local_bytes(self.batch),
    }


def shapes_of(job: Training) -> Shapes:
  """The step of a job, as `loop.fit` makes it: what is used of the training library stands here."""
  graph, params = abstract_model(job.model, job.train.dtype)
  frozen = None
  if job.train.lora is not None:
    graph, frozen = lora.abstract_model(job.model, job.train.lora, job.train.dtype)[0], params
    first = lambda key: lora.init(job.model, job.train.lora, key)  # noqa: E731
    params = jax.eval_shape(first, jax.random.key(0))
  state = train_steps.abstract_state(params, job.train, job.mesh, frozen)
  step = train_steps.make_train_step(graph, params, job.train, STEPS, job.mesh, frozen)
  names = ('tokens', 'positions', 'segment_ids', 'loss_mask')
  shape = (job.train.batch_size, job.train.max_length)
  rows = batch_sharding(job.mesh)
  batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows) for name in names}
  return Shapes(step, state, batch)


def least_read(job: Training, shapes: Shapes) -> float:
  """Bytes that a step must move on each device.

  What is learnt and its moments are read and written; what multiplies is read in the compute dtype
  once in the forward and once in the backward pass of each micro-batch, after it was gathered.
  """
  state = local_bytes(shapes.state.learnt)
  whole = job.model.num_params * jnp.dtype(job.train.dtype).itemsize / job.mesh.shape['tensor']
  return 2 * state + 2 * job.train.accumulation * whole


def temporaries(job: Training, shapes: Shapes) -> dict[str, int]:
  """Bytes of what is known to be among a device's temporaries."""
  known = {'gradients': local_bytes(shapes.state.params)}
  if job.train.remat == 'full':
    tokens = job.rows * job.train.max_length
    width = job.model.d_model * jnp.dtype(job.train.dtype).itemsize
    known["blocks' inputs"] = job.model.num_layers * tokens * width
  return known


def build_train(job: Training, shapes: Shapes) -> Program:
  """The train step, compiled.

  Raises:
    TooLarge: if the chip's memory is too small for it.
  """
  traced = shapes.trace()
  flops = work.traced_flops(traced.jaxpr.jaxpr) / job.mesh.size
  read = least_read(job, shapes)
  return build('train', traced.lower(), read, step=None, rows=job.tokens, flops=flops)


def describe(job: Training) -> str:
  """What is computed, and on which mesh."""
  train, mesh = job.train, job.mesh.shape
  return (
    f'training on mesh {", ".join(f"{k}={v}" for k, v in mesh.items())} in {train.dtype}: '
    f'{train.batch_size} rows of {train.max_length} tokens in {train.accumulation} micro-batches '
    f'({job.rows} rows a device at once), remat {train.remat}, attention {train.attention}'
    + (f', adapters of rank {train.lora_rank}' if train.lora else '')
  )


def report(job: Training, shapes: Shapes, program: Program, chip: Chip) -> list[str]:
  """Lines that tell of a train step."""
  m, known = program.memory, temporaries(job, shapes)
  model = job.model_flops / job.mesh.size
  row = sum(program.times(chip).values())
  told = [
    f'GiB: {programs.sizes(shapes.bytes())}, code {m["code"] / GIB:.3f}, '
    f'temporary {m["temporary"] / GIB:.3f}, total {m["total"] / GIB:.3f}',
    f'of the temporaries, GiB: {programs.sizes(known)}; activations and what is gathered take the '
    'rest',
    programs.fits(program, chip),
    f'TFLOP a step: the model needs {model / 1e12:.3f} (6 · parameters · tokens, and causal '
    f'attention), the program does {program.flops / 1e12:.3f} (its products, in all turns of all '
    f'loops), the compiler counts {program.counted / 1e12:.3f} (bodies of loops once)',
    *programs.least_time(program, chip),
    f'utilisation (FLOPs of the model over peak) in a row {model / chip.flops / row:.1%}',
    *programs.communication(program),
  ]
  return [f'train (compiled in {program.seconds:.0f} s)', *(f'  {line}' for line in told)]


def advice(job: Training, shapes: Shapes, chip: Chip) -> list[str]:
  """Settings that would take less memory, the cheapest first."""
  train, mesh, sizes = job.train, job.mesh.shape, shapes.bytes()
  told = []
  if train.remat != 'full':
    told.append("train.remat='full': keep no more of a block than its input")
  if train.attention == 'xla':
    told.append("train.attention='splash': no scores in memory")
  if job.rows > 1:
    told.append(f'train.accumulation={train.accumulation * job.rows}: one row a device at once')
  if mesh['data'] > 1:
    state = sizes['parameters'] + sizes['optimizer']
    told.append(
      f'mesh.fsdp={mesh["fsdp"] * mesh["data"]}, mesh.data=1: parameters, moments and gradients '
      f'take {state / mesh["data"] / GIB:.2f} + {sizes["parameters"] / mesh["data"] / GIB:.2f} GiB'
    )
  told.append(f'mesh.tensor={2 * mesh["tensor"]}: half of what is gathered and of each product')
  told.append('a larger slice, or chips with more memory')
  return told


def study(
  jobs: dict[str, Training], chips: Slice, hlo: pathlib.Path | None = None
) -> list[dict[str, Any]]:
  """Compiles the train step of each job, prints what it takes, and gives it as JSON could have it.

  Args:
    jobs: what to compile, by the settings that make the difference; a table is printed of several.
    chips: what for.
    hlo: folder for the compiled programs as text.
  """
  chip, results, rows = chips.chip, [], []
  for name, job in jobs.items():
    shapes = shapes_of(job)
    print(describe(job) + (f' ({name})' if name else ''), flush=True)
    result = {
      'settings': name,
      'mesh': dict(job.mesh.shape),
      'train': dataclasses.asdict(job.train),
      'bytes': shapes.bytes() | temporaries(job, shapes),
      'model_flops': job.model_flops,
    }
    results.append(result)
    program, used = None, sum(shapes.bytes().values()) + local_bytes(shapes.state.params)
    try:
      if used > chip.memory:
        print('parameters, moments and gradients alone are too much: not compiled')
      else:
        program = build_train(job, shapes)
        used = program.memory['total']
        print('\n'.join(report(job, shapes, program, chip)), flush=True)
        result['program'] = programs.as_json(program, chip)
        if hlo:
          (hlo / f'train{len(results) if name else ""}.hlo').write_text(program.text)
    except TooLarge as error:
      used = error.used
      print('\n'.join(f'  of it: {line}' for line in error.largest[:8]))
    result['used'], result['fits'] = used, used <= chip.memory
    if used > chip.memory:
      print(f'train does NOT fit: {used / GIB:.2f} GiB, {(used - chip.memory) / GIB:.2f} over')
      print('\n'.join(f'  less: {line}' for line in advice(job, shapes, chip)), flush=True)
    rows.append(_table_row(name, job, program, used, chip))
  if len(jobs) > 1:
    print('\n'.join((*TABLE, *rows)))
  return results


TABLE = (
  '| settings | GiB | fits | TFLOP | compute | memory | links | in a row | tokens/s in a row |',
  '|---|---|---|---|---|---|---|---|---|',
)


def _table_row(name: str, job: Training, program: Program | None, used: float, chip: Chip) -> str:
  cells: Sequence[str] = [name or 'as the config has it', f'{used / GIB:.2f}']
  cells += ['yes' if used <= chip.memory else f'{(used - chip.memory) / GIB:.2f} over']
  if program is not None:
    times = program.times(chip)
    row = sum(times.values())
    cells += [f'{program.flops / 1e12:.2f}', *(f'{1e3 * t:.0f} ms' for t in times.values())]
    cells += [f'{1e3 * row:.0f} ms', f'{job.tokens / row:,.0f}']
  return '| ' + ' | '.join((*cells, *[''] * (9 - len(cells)))) + ' |'
