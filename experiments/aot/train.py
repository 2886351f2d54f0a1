"""Compile a train step for the whole slice as one mesh, as launch.py would run it."""

import dataclasses
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from cai_jax.data.units import ARRAYS, LAST_SEGMENTS, SEGMENTS
from cai_jax.model import lora
from cai_jax.model.attention.kernels.kernel import check_kernel
from cai_jax.model.attention.sequence import check_sequence
from cai_jax.model.config import ModelConfig
from cai_jax.model.quantized.kernel import FULL
from cai_jax.model.quantized_params import abstract_params, param_bytes
from cai_jax.model.score_head import init_head, join_head
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.mesh import batch_shards, check_batch, token_sharding
from cai_jax.training.fit_config import FitConfig
from cai_jax.training.reference import VALUE
from cai_jax.training.state import TrainState, abstract_state
from cai_jax.training.step import make_train_step
from cai_jax.training.trainable import trained_graph
from experiments.aot import program as programs
from experiments.aot.flops import traced_flops
from experiments.aot.program import Program, TooLarge, build, local_bytes
from experiments.aot.slices import GIB, Chip, Slice

STEPS = 1000  # of the run; only constants of the learning-rate schedule depend on it


@dataclasses.dataclass(frozen=True)
class Training:
  """Everything that determines the shapes of a train step, of fine-tuning or on preferences."""

  model: ModelConfig
  train: FitConfig
  mesh: Mesh

  def __post_init__(self):
    train, section = self.train, self.train.section
    name = f'{section}.batch_size / {section}.accumulation'
    check_batch(train.batch_size // train.accumulation, self.mesh, name)
    cap = self.model.attention_cap
    shares = train.shares_tokens
    check_kernel(train.attention, self.mesh, train.dtype, train.max_length, cap=cap, shares=shares)
    check_sequence(self.mesh, train.max_length, self.model)
    if train.max_length > self.model.max_positions:
      raise UserError(
        f'{section}.max_length={train.max_length} is more than the {self.model.max_positions} '
        "tokens of the model's context."
      )

  @property
  def tokens(self) -> int:
    """The number of tokens of a step, over all rows."""
    return self.train.batch_size * self.train.max_length

  @property
  def model_flops(self) -> float:
    """The FLOPs that the model needs for a step, if each row is one unit of equal sequences."""
    loss = self.train.registered_loss
    segments = SEGMENTS[loss.units]
    lengths = [self.train.max_length // segments] * (segments * self.train.batch_size)
    adapters = self.train.lora is not None
    return self.model.training_flops(lengths, adapters=adapters, has_logits=not loss.head)

  @property
  def rows(self) -> int:
    """The number of rows of a micro-batch on one device."""
    shards = batch_shards(self.mesh)
    return self.train.batch_size // self.train.accumulation // shards


@dataclasses.dataclass(frozen=True)
class Shapes:
  """The jitted step, and the shapes and shardings of its arguments."""

  step: Any
  state: TrainState
  batch: dict[str, jax.ShapeDtypeStruct]

  def trace(self) -> jax.stages.Traced:
    """Trace the step as one program of all devices."""
    return self.step.trace(self.state, self.batch)

  def bytes(self) -> dict[str, int]:
    """Return the bytes of each argument on one device."""
    others = {'average': self.state.ema, 'frozen': self.state.frozen}
    return {
      'parameters': local_bytes(self.state.params),
      'optimizer': local_bytes(self.state.opt_state),
      **{name: local_bytes(tree) for name, tree in others.items() if tree is not None},
      'batch': local_bytes(self.batch),
    }


def shapes_of(job: Training) -> Shapes:
  """Return the train step of a job and the shapes of its arguments, as `loop.fit` makes them."""
  graph, layout, shapes = trained_graph(job.model, job.train)
  params, frozen = shapes, None
  if job.train.lora is not None:
    params = lora.split(shapes)[0]
    frozen = abstract_params(job.model, job.train.dtype, job.train.base_weights)
  params, frozen = (jax.eval_shape(layout.stack, tree) for tree in (params, frozen))
  loss = job.train.registered_loss
  if loss.head:
    head = jax.eval_shape(lambda key: init_head(job.model.d_model, key), jax.random.key(0))
    params = join_head(params, head)
  state = abstract_state(params, job.train, job.mesh, frozen)
  step = make_train_step(graph, params, job.train, STEPS, job.mesh, frozen)
  arrays = (*ARRAYS, LAST_SEGMENTS) if job.train.shares_tokens else ARRAYS
  values = (*job.train.needed_values, *((VALUE,) if loss.needs_reference else ()))
  dtypes = dict.fromkeys(arrays, jnp.int32) | dict.fromkeys(values, jnp.float32)
  shape, rows = (job.train.batch_size, job.train.max_length), token_sharding(job.mesh)
  batch = {name: jax.ShapeDtypeStruct(shape, x, sharding=rows) for name, x in dtypes.items()}
  return Shapes(step, state, batch)


def min_bytes_moved(job: Training, shapes: Shapes) -> float:
  """Return the bytes that a step must move on each device.

  Trained parameters and their moments are read and written once. All parameters, gathered and in
  the compute dtype or quantized, are read in the forward and in the backward pass of each
  micro-batch.
  """
  state = local_bytes(shapes.state.without_frozen)
  stored = param_bytes(job.model, job.train.dtype, job.train.base_weights)
  params = stored / job.mesh.shape['tensor']
  return 2 * state + 2 * job.train.accumulation * params


def known_temporaries(job: Training, shapes: Shapes) -> dict[str, int]:
  """Return the bytes of a device's temporaries that can be computed from shapes."""
  known = {'gradients': local_bytes(shapes.state.params)}
  if job.train.remat == 'full':
    tokens = job.rows * job.train.max_length // job.mesh.shape['sequence']
    width = job.model.d_model * jnp.dtype(job.train.dtype).itemsize
    known["blocks' inputs"] = job.model.num_layers * tokens * width
  return known


def build_train(job: Training, shapes: Shapes) -> Program:
  """Compile the train step.

  Raises:
    TooLarge: if it does not fit the chip's memory.
  """
  start, cpu_start = time.perf_counter(), time.process_time()
  traced = shapes.trace()
  lowered = traced.lower()
  seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
  print(f'traced and lowered in {seconds:.1f} s, CPU {cpu_seconds:.1f} s', flush=True)
  flops = traced_flops(traced.jaxpr.jaxpr) / job.mesh.size
  read = min_bytes_moved(job, shapes)
  return build(job.train.section, lowered, read, step=None, rows=job.tokens, flops=flops)


def describe_job(job: Training) -> str:
  """Return a text with the job's mesh and settings."""
  train, mesh = job.train, job.mesh.shape
  return (
    f'{train.loss_name} on mesh {", ".join(f"{k}={v}" for k, v in mesh.items())} in {train.dtype}: '
    f'{train.batch_size} rows of {train.max_length} tokens in {train.accumulation} micro-batches '
    f'({job.rows} rows per device at once), remat {train.remat}, attention {train.attention}'
    + (f', adapters of rank {train.lora.rank}' if train.lora is not None else '')
    + (f' over {train.base_weights}' if train.base_weights != FULL else '')
    + f', layers {train.layers}'
  )


def describe_program(job: Training, shapes: Shapes, program: Program, chip: Chip) -> list[str]:
  """Return lines that describe a compiled train step."""
  memory, known = program.memory, known_temporaries(job, shapes)
  model_flops = job.model_flops / job.mesh.size
  seconds = sum(program.times(chip).values())
  lines = [
    f'GiB: {programs.format_sizes(shapes.bytes())}, code {memory["code"] / GIB:.3f}, '
    f'temporary {memory["temporary"] / GIB:.3f}, total {memory["total"] / GIB:.3f}',
    f'of the temporaries, GiB: {programs.format_sizes(known)}; the rest are activations and '
    'gathered parameters',
    programs.describe_fit(program, chip),
    f'TFLOP per step: the model needs {model_flops / 1e12:.3f} (6 · parameters · tokens, and '
    f'causal attention), the program does {program.flops / 1e12:.3f} (matrix products, with all '
    f'iterations of loops), the compiler counts {program.counted / 1e12:.3f} (each loop once)',
    *programs.describe_time(program, chip),
    'utilization (FLOPs of the model over peak) without overlap: '
    f'{model_flops / chip.flops / seconds:.1%}',
    *programs.describe_communication(program),
  ]
  compiled = f'compiled in {program.seconds:.0f} s, CPU {program.cpu_seconds:.0f} s'
  return [f'{job.train.section} ({compiled})', *(f'  {line}' for line in lines)]


def suggest_settings(job: Training, shapes: Shapes) -> list[str]:
  """Return settings that take less memory, the cheapest first."""
  train, mesh, sizes = job.train, job.mesh.shape, shapes.bytes()
  section, suggestions = train.section, []
  if train.remat != 'full':
    suggestions.append(f"{section}.remat='full': store only the input of each block")
  if train.attention == 'xla':
    suggestions.append(f"{section}.attention='splash': store no attention scores")
  if job.rows > 1:
    accumulation = train.accumulation * job.rows
    suggestions.append(f'{section}.accumulation={accumulation}: one row per device at once')
  if mesh['data'] > 1:
    state = sizes['parameters'] + sizes['optimizer']
    suggestions.append(
      f'mesh.fsdp={mesh["fsdp"] * mesh["data"]}, mesh.data=1: parameters, moments and gradients '
      f'take {state / mesh["data"] / GIB:.2f} + {sizes["parameters"] / mesh["data"] / GIB:.2f} GiB'
    )
  suggestions.append(
    f'mesh.tensor={2 * mesh["tensor"]}: half of the gathered parameters and of each product'
  )
  suggestions.append('a larger slice, or chips with more memory')
  return suggestions


def study(
  jobs: dict[str, Training], chips: Slice, hlo: pathlib.Path | None = None
) -> list[dict[str, Any]]:
  """Compile the train step of each job, print its memory and time, and return them as JSON data.

  Args:
    jobs: what to compile, by the settings in which the jobs differ. For several jobs this prints a
      table.
    chips: the slice to compile for.
    hlo: folder for the compiled programs as text.
  """
  chip, results, rows = chips.chip, [], []
  for name, job in jobs.items():
    shapes = shapes_of(job)
    print(describe_job(job) + (f' ({name})' if name else ''), flush=True)
    result = {
      'settings': name,
      'mesh': dict(job.mesh.shape),
      'train': dataclasses.asdict(job.train),
      'bytes': shapes.bytes() | known_temporaries(job, shapes),
      'model_flops': job.model_flops,
    }
    results.append(result)
    program, used = None, sum(shapes.bytes().values()) + local_bytes(shapes.state.params)
    try:
      if used > chip.memory:
        print('not compiled: parameters, moments and gradients alone do not fit')
      else:
        program = build_train(job, shapes)
        used = program.memory['total']
        print('\n'.join(describe_program(job, shapes, program, chip)), flush=True)
        result['program'] = programs.as_json(program, chip)
        if hlo:
          (hlo / f'{job.train.section}{len(results) if name else ""}.hlo').write_text(program.text)
    except TooLarge as error:
      used = error.used
      print('\n'.join(f'  largest: {line}' for line in error.largest[:8]))
    result['used'], result['fits'] = used, used <= chip.memory
    if used > chip.memory:
      over = (used - chip.memory) / GIB
      print(f'{job.train.section} does NOT fit: {used / GIB:.2f} GiB, {over:.2f} over')
      print('\n'.join(f'  to save memory: {s}' for s in suggest_settings(job, shapes)), flush=True)
    rows.append(_table_row(name, job, program, used, chip))
  if len(jobs) > 1:
    print('\n'.join((*TABLE, *rows)))
  return results


TABLE = (
  '| settings | GiB | fits | TFLOP | compute | memory | links | no overlap | tokens/s |',
  '|---|---|---|---|---|---|---|---|---|',
)


def _table_row(name: str, job: Training, program: Program | None, used: float, chip: Chip) -> str:
  cells: Sequence[str] = [name or 'the config', f'{used / GIB:.2f}']
  cells += ['yes' if used <= chip.memory else f'{(used - chip.memory) / GIB:.2f} over']
  if program is not None:
    times = program.times(chip)
    total = sum(times.values())
    cells += [f'{program.flops / 1e12:.2f}', *(f'{1e3 * t:.0f} ms' for t in times.values())]
    cells += [f'{1e3 * total:.0f} ms', f'{job.tokens / total:,.0f}']
  return '| ' + ' | '.join((*cells, *[''] * (9 - len(cells)))) + ' |'
