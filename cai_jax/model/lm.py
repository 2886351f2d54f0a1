"""A language model in memory: loading, logits and saving."""

import dataclasses
import functools
import logging
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import ArrayLike

from cai_jax.model.checkpoint import MAX_SHARD_BYTES, check_params, load_params, stored_dtype
from cai_jax.model.config import ModelConfig
from cai_jax.model.families.family import FAMILIES, config_to_hf
from cai_jax.model.folder import (
  DESCRIPTION_FILES,
  Description,
  check_architecture,
  find_folder,
  fingerprint_model,
  read_description,
)
from cai_jax.model.generation_config import special_token_ids
from cai_jax.model.quantized.kernel import FULL
from cai_jax.model.quantized_params import check_weights
from cai_jax.model.saving import save_folder
from cai_jax.model.transformer import Params, abstract_model
from cai_jax.model.weight_files import check_dtype
from cai_jax.runtime.cloud.copies import origin
from cai_jax.runtime.compilation import jit_on
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.mesh import make_mesh

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class LM:
  """A causal language model with its tokenizer, placed on a mesh.

  Attributes:
    config: the shape of the model.
    params: nested dict of arrays; kernels of linear layers may be quantized.
    tokenizer: a transformers.PreTrainedTokenizerFast.
    mesh: where the parameters are.
    dtype: compute dtype.
    name: the hub name, the URL, or the absolute path of the folder that the model was loaded from.
    fingerprint: hex digest of config, dtypes, format, weights and tokenizer. It is part of the key
      of each turn in a journal.
    eos_token_ids: tokens that end a reply.
    generation_config: the entries of the checkpoint's generation_config.json. `save` keeps them.
      Sampling uses them only where a config says 'model', before the models are loaded.
    weights: format of the linear layers' kernels; 'full' is the dtype of the others.
  """

  config: ModelConfig
  params: Params
  tokenizer: Any
  mesh: Mesh
  dtype: str
  name: str
  fingerprint: str
  eos_token_ids: tuple[int, ...] = ()
  generation_config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  weights: str = FULL

  @property
  def graph(self) -> nnx.GraphDef:
    """The static part of the model, for `nnx.merge(lm.graph, params)` in a jitted function."""
    return abstract_model(self.config, self.dtype)[0]

  @property
  def public_name(self) -> str:
    """The name of the model in datasets: a folder's is its content, not its path."""
    return f'sha256:{self.fingerprint[:16]}' if os.path.isabs(self.name) else self.name

  @property
  def max_positions(self) -> int:
    """The longest context with its reply, in tokens."""
    return self.config.max_positions

  @property
  def vocab_size(self) -> int:
    """The number of token ids."""
    return self.config.vocab_size

  def logits(self, tokens: ArrayLike, mask: ArrayLike | None = None) -> jax.Array:
    """Compute the logits of every position.

    Args:
      tokens: i32[B,T].
      mask: bool or i32[B,T], nonzero at real tokens, for rows that are padded on the left or the
        right. Positions count only real tokens, and the logits at padding are meaningless.

    Returns:
      f32[B,T,V].

    Raises:
      UserError: if the shapes differ or are not [B,T], a token is outside the vocabulary, or
        positions are learned or scaled and do not reach as far as these rows.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or (mask is not None and np.shape(mask) != tokens.shape):
      shapes = f'tokens {tokens.shape}' + ('' if mask is None else f', mask {np.shape(mask)}')
      raise UserError(f'{shapes}: tokens must have shape [B,T], and the mask the same shape.')
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.config.vocab_size:
      raise UserError(
        f'Tokens are in {tokens.min()}..{tokens.max()}, but must be in '
        f'0..{self.config.vocab_size - 1}.'
      )
    real = np.ones(tokens.shape, np.int32) if mask is None else (np.asarray(mask) != 0) * 1
    positions = np.maximum(np.cumsum(real, axis=1) - 1, 0).astype(np.int32)
    longest = positions.max(initial=-1) + 1
    reasons = self.config.remarks
    if self.config.learned_positions:
      reasons = (*reasons, 'later positions have no embedding.')
    if longest > self.max_positions and reasons:
      raise UserError(
        f'A row of {longest} tokens is longer than the context of {self.name}, which holds '
        f'{self.max_positions}: {" ".join(reasons)}'
      )
    segment_ids = None if mask is None else real.astype(np.int32)
    tokens = tokens.astype(np.int32)
    program = jit_on(self.mesh.devices.flat[0].platform, compute_logits, static_argnames='graph')
    return program(self.graph, self.params, tokens, positions, segment_ids)


def compute_logits(
  graph: nnx.GraphDef,
  params: Params,
  tokens: jax.Array,
  positions: jax.Array,
  segment_ids: jax.Array | None,
) -> jax.Array:
  """Return the logits f32[B,T,V]; see `Transformer.__call__` for the arguments."""
  model = nnx.merge(graph, params)
  hidden = model(tokens, positions, segment_ids)
  return model.unembed(hidden)


class ModelInfo(NamedTuple):
  """A language model without its weights.

  Attributes:
    config: the shape of the model.
    tokenizer: a transformers.PreTrainedTokenizerFast.
    eos_token_ids: tokens that end a reply.
  """

  config: ModelConfig
  tokenizer: Any
  eos_token_ids: tuple[int, ...]


def inspect_model(path: str | os.PathLike, long_context: bool = False) -> ModelInfo:
  """Check that `load` would succeed, without reading the values of the weights.

  Args:
    path: a folder, or a name on the Hugging Face hub.
    long_context: as for `load`.

  Returns:
    The config, the tokenizer and the tokens that end a reply.

  Raises:
    UserError: as `load`.
  """
  folder = find_folder(path)
  described = _read_description(folder, long_context)
  check_params(folder, described.config)
  return ModelInfo(described.config, described.tokenizer, described.eos_token_ids)


def _read_description(folder: pathlib.Path, long_context: bool = False) -> Description:
  """Return what the folder of a language model holds besides the weights."""
  described = read_description(folder)
  if long_context:
    try:
      described = described._replace(config=described.config.with_long_context())
    except UserError as error:
      raise UserError(f'{folder / "config.json"}: {error}') from None
  for remark in described.config.remarks:
    _log_once(f'{folder / "config.json"}: {remark}')
  family = FAMILIES[described.config.family]
  check_architecture(folder, described.hf, family.architecture(described.hf))
  return described


@functools.lru_cache
def _log_once(message: str) -> None:
  log.warning('%s', message)


def load(
  path: str | os.PathLike,
  dtype: str = 'float32',
  mesh: Mesh | None = None,
  param_dtype: str | None = None,
  long_context: bool = False,
  weights: str = FULL,
  params: Params | None = None,
) -> LM:
  """Load a language model from a Hugging Face folder or from the hub.

  Args:
    path: a folder, or a name such as 'Qwen/Qwen2.5-0.5B-Instruct', which is fetched into Hugging
      Face's cache.
    dtype: compute dtype: 'float32', 'bfloat16' or 'float16'. With 'float32', no product is rounded
      to TF32 or bf16 on any device.
    mesh: where the parameters go; None means `make_mesh()`.
    param_dtype: dtype of the parameters; None means `dtype`.
    long_context: whether to use the long factors of longrope scaling and the whole context, and not
      the short factors and the original context. The model must have that scaling.
    weights: format of the linear layers' kernels: 'full', 'int8', 'nf4', or another one of
      `cai_jax.model.quantized`. A quantized model can be sampled, scored and adapted, but not
      trained itself.
    params: what the files hold, if it is on the mesh already; None reads the files.

  Raises:
    UserError: if there is no such folder or name; if the model's family is not supported or the
      weights do not fit it; if the tokenizer is missing or does not fit; if the model cannot be
      held in the format.
  """
  param_dtype = dtype if param_dtype is None else param_dtype
  check_dtype(dtype, 'dtype')
  folder = find_folder(path)
  described = _read_description(folder, long_context)
  config, eos = described.config, described.eos_token_ids
  check_weights(config, weights, 'weights')
  mesh = make_mesh() if mesh is None else mesh
  if params is None:
    params = load_params(folder, config, mesh, param_dtype, weights=weights)
  return LM(
    config=config,
    params=params,
    tokenizer=described.tokenizer,
    mesh=mesh,
    dtype=dtype,
    name=origin(folder.resolve()) if pathlib.Path(path).expanduser().is_dir() else str(path),
    fingerprint=fingerprint_model(folder, config, eos, dtype, param_dtype, weights),
    eos_token_ids=eos,
    generation_config=described.generation_config,
    weights=weights,
  )


def describe(
  path: str | os.PathLike,
  dtype: str = 'float32',
  mesh: Mesh | None = None,
  long_context: bool = False,
) -> LM:
  """Return a language model without parameters and fingerprint, which can only render contexts.

  Weights are neither fetched nor read.

  Args:
    path: a folder, or a name on the Hugging Face hub.
    dtype: compute dtype.
    mesh: where the parameters would go; None means `make_mesh()`.
    long_context: as for `load`.

  Raises:
    UserError: if there is no such folder or name, or its files have no usable model and tokenizer.
  """
  described = _read_description(find_folder(path, DESCRIPTION_FILES), long_context)
  return LM(
    config=described.config,
    params={},
    tokenizer=described.tokenizer,
    mesh=make_mesh() if mesh is None else mesh,
    dtype=dtype,
    name=str(path),
    fingerprint='',
    eos_token_ids=described.eos_token_ids,
    generation_config=described.generation_config,
  )


def read_stored_dtype(path: str | os.PathLike) -> str:
  """Return the dtype in which the files of a model hold its embedding, such as 'bfloat16'.

  Args:
    path: a folder, or a name on the Hugging Face hub.

  Raises:
    UserError: as `load`.
  """
  folder = find_folder(path)
  return stored_dtype(folder, _read_description(folder).config)


def save(
  lm: LM,
  path: str | os.PathLike,
  dtype: str | None = None,
  max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
  """Save a model as a Hugging Face folder that `load` and transformers can read.

  The folder gets config.json, safetensors files, generation_config.json, and the tokenizer with its
  chat template. They replace an earlier model in the folder; other files are kept. config.json is
  written last, so that an interrupted save does not look like a model. In a run of several
  processes, every process must call this function; process 0 writes.

  Args:
    lm: the model.
    path: the folder, created if it does not exist.
    dtype: dtype of the weights; None keeps that of the parameters.
    max_shard_bytes: largest size of a safetensors file in bytes; a single weight may exceed it.

  Raises:
    UserError: if the dtype is unknown, or `path` is a file.
  """
  special = special_token_ids(lm.tokenizer, lm.eos_token_ids, lm.generation_config)
  generation = {name: token for name, token in special.items() if token is not None}
  save_folder(
    path,
    lm.params,
    lm.config,
    lm.tokenizer,
    {**config_to_hf(lm.config), **special},
    generation_config={**lm.generation_config, **generation},
    dtype=dtype,
    max_shard_bytes=max_shard_bytes,
  )
