"""Reference log-probabilities: computed once before training, and kept in a file.

Objectives such as DPO compare the policy with a reference model that never changes. Its
log-probabilities of the training data are therefore data too. They become the value 'reference' of
each unit, so that no second model is in memory during training.
"""

import dataclasses
import functools
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cai_jax.data import packing
from cai_jax.data.fingerprints import fingerprint
from cai_jax.data.units import Unit, add_values, segment_lengths, unit_lengths
from cai_jax.model import lora, peft
from cai_jax.model.lm import LM
from cai_jax.model.quantized.kernel import has_quantized
from cai_jax.model.sharding import param_shardings
from cai_jax.model.transformer import abstract_model
from cai_jax.runtime.digests import digest_files
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import replacing, writing
from cai_jax.runtime.mesh import token_sharding
from cai_jax.runtime.progress import Progress
from cai_jax.training.attention import resolve_attention
from cai_jax.training.checkpoints import FOLDER, has_checkpoints
from cai_jax.training.fit_config import FitConfig
from cai_jax.training.loop import check_buckets
from cai_jax.training.losses.logprobs import sequence_logprobs
from cai_jax.training.step import compiler_options, make_batches, place_batch

FILE = 'reference.json'
VALUE = 'reference'  # name of the value

Program = Callable[[Any, Mapping[str, Any]], jax.Array]  # (parameters, batch) → f32[B,T]


def add_reference(
  load: Callable[[], LM],
  model_id: str,
  units: Sequence[Unit],
  config: FitConfig,
  workdir: pathlib.Path,
) -> Sequence[Unit]:
  """Return the units with the value 'reference': log P(y | x) of each segment, in nats.

  The numbers are read from `reference.json` in the workdir if they belong to this model and this
  data, and are computed and written otherwise.

  Args:
    load: returns the reference model; called only if its log-probabilities must be computed.
    model_id: fingerprint of that model.
    units: the units.
    config: settings of the training, whose batches and dtype are used.
    workdir: folder of the run.

  Raises:
    UserError: if the workdir has checkpoints of a training with other reference log-probabilities,
      or if a log-probability is not finite.
  """
  digest = _hash([model_id, fingerprint(units), config.dtype])
  path = workdir / FILE
  logprobs = _read(path, digest)
  if logprobs is None:
    _check_unused(path)
    logprobs = compute_reference(load(), units, config)
    if jax.process_index() == 0:
      with writing(path), replacing(path) as temporary:
        content = {'digest': digest, 'checksum': _hash(logprobs), 'logprobs': logprobs}
        temporary.write_text(json.dumps(content))
  return add_values(units, VALUE, logprobs)


def initial_model(lm: LM, config: FitConfig) -> LM:
  """Return the model that training starts from: `lm` with the adapters of `config.lora_init`.

  Args:
    lm: the model that is trained.
    config: settings of the training.

  Raises:
    UserError: if `lora_init` does not have the adapters that the settings describe.
  """
  if config.lora is None or not config.lora_init:
    return lm
  adapters = peft.read_adapters(config.lora_init, lm.config, config.lora, config.section)
  merge: Callable[[Any, Any], Any] = functools.partial(lora.merge, lora=config.lora)
  if not has_quantized(lm.params):  # otherwise there is nothing to compute yet
    merge = jax.jit(merge, out_shardings=param_shardings(lm.params, lm.mesh))
  return dataclasses.replace(lm, params=merge(lm.params, adapters))


def initial_id(lm: LM, config: FitConfig) -> str:
  """Return a fingerprint of `initial_model(lm, config)`.

  Args:
    lm: the model that is trained.
    config: settings of the training.
  """
  if not config.lora_init:
    return lm.fingerprint
  settings = dataclasses.astuple(config.lora) if config.lora is not None else ()
  adapters = digest_files(pathlib.Path(config.lora_init), peft.FILES)
  return _hash([lm.fingerprint, *settings, adapters])


def compute_reference(
  lm: LM, units: Sequence[Unit], config: FitConfig, program: Program | None = None
) -> list[list[float]]:
  """Return log P(y | x; θ) of each segment of each unit, where y are the tokens to learn.

  Args:
    lm: the reference model.
    units: the units.
    config: settings of the training, whose batches and dtype are used.
    program: what `make_program` returned, to compute several sets of units with one compilation.

  Raises:
    UserError: if the mesh does not divide the rows, the attention kernel cannot run, or a
      log-probability is not finite.
  """
  bucket = packing.Bucket(config.max_length, config.batch_size // config.accumulation)
  lengths, counts = unit_lengths(units), segment_lengths(units).lengths
  steps = packing.plan(lengths, [bucket], 1, 0)
  sharding = token_sharding(lm.mesh)
  batches = make_batches(units, steps, sharding)
  compute = program or make_program(lm, config)
  logprobs: list[list[float]] = [[] for _ in units]
  done = tokens = 0
  with Progress('reference', 'unit') as progress:
    for number, step in enumerate(steps):
      rows = np.asarray(compute(lm.params, place_batch(batches[number], sharding)))
      for columns, row in zip(rows, step.rows, strict=False):  # the last batch has empty rows
        end = 0
        for i in row:
          begin, end = end, end + int(counts[i])
          logprobs[i] = [float(x) for x in columns[begin:end]]
          done, tokens = done + 1, tokens + int(lengths[i])
      progress(done, len(units), tokens)
  for i, numbers in enumerate(logprobs):
    if not all(map(math.isfinite, numbers)):
      raise UserError(
        f'The log-probability of {units[i].id!r} under {lm.name} is {numbers}. Check the weights '
        f'of the model, or set {config.section}.dtype=float32.'
      )
  return logprobs


def make_program(lm: LM, config: FitConfig) -> Program:
  """Return the compiled function from parameters and a batch to f32[B,T], a column a segment.

  Args:
    lm: the reference model, of which only the shape and the devices are used.
    config: settings of the training.
  """
  config = resolve_attention(config, lm.mesh, [config.max_length], lm.config)
  bucket = packing.Bucket(config.max_length, config.batch_size)
  check_buckets([bucket], config, lm.mesh, lm.config)
  graph, _ = abstract_model(lm.config, config.dtype)
  sharding = token_sharding(lm.mesh)

  def compute(params, batch):
    model = nnx.merge(graph, params)
    return sequence_logprobs(model, batch, sharding, attention=config.attention).sums

  return jax.jit(
    compute,
    out_shardings=NamedSharding(lm.mesh, P()),
    compiler_options=compiler_options(config, lm.mesh),
  )


def _read(path: pathlib.Path, digest: str) -> list[list[float]] | None:
  """Return the log-probabilities of a file, or None if it has those of another model or data.

  Raises:
    UserError: if the file is not what was written.
  """
  try:
    content = json.loads(path.read_text())
    is_whole = content['checksum'] == _hash(content['logprobs'])
    other = content['digest'] != digest
  except FileNotFoundError:
    return None
  except (ValueError, KeyError, TypeError, RecursionError):
    is_whole = other = False
  if not is_whole:
    raise UserError(f'{path} is damaged. Delete it; its numbers are then computed again.')
  return None if other else content['logprobs']


def _check_unused(path: pathlib.Path) -> None:
  """Check that a file of reference log-probabilities may be written.

  Checkpoints are of the log-probabilities that are there, or were there.

  Raises:
    UserError: if the folder has checkpoints.
  """
  if has_checkpoints(path.parent):
    raise UserError(
      f'{path.parent / FOLDER} holds checkpoints of another run: {path} is missing, or has the '
      'log-probabilities of other data, another reference or another dtype. Restore the '
      'file and these settings to resume that run, or choose another workdir.'
    )


def _hash(value: Any) -> str:
  return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]
