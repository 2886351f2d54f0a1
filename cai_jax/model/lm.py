"""A language model in memory: parameters, tokenizer and mesh; loaded, saved, and its logits."""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil
from typing import Any, NamedTuple

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import transformers
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from cai_jax.model import checkpoint
from cai_jax.model import config as config_lib
from cai_jax.model.checkpoint import Params, structure
from cai_jax.model.config import ModelConfig
from cai_jax.model.transformer import Transformer
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import write_json
from cai_jax.runtime.mesh import make_mesh

TOKENIZER_FILES = (
  'tokenizer.json',
  'tokenizer_config.json',
  'tokenizer.model',
  'special_tokens_map.json',
  'added_tokens.json',
  'vocab.json',
  'merges.txt',
  'chat_template.json',
  '*.jinja',
)
SCORE = 'score.weight'  # a classifier's head, as transformers names it
# All that is fetched from a hub, and all that an export may replace. No pickle, no Python.
MODEL_FILES = (
  'config.json',
  'generation_config.json',
  'model*.safetensors',
  checkpoint.INDEX,
  *TOKENIZER_FILES,
)


@functools.partial(jax.jit, static_argnames=('config', 'param_dtype'))
def init_params(config: ModelConfig, key: jax.Array, param_dtype: str = 'float32') -> Params:
  """Randomly initialised parameters: normal with standard deviation fan_in^-1/2, unit norms."""
  model = Transformer(config, nnx.Rngs(params=key), param_dtype=jnp.dtype(param_dtype))
  return nnx.to_pure_dict(nnx.split(model)[1])


@functools.partial(jax.jit, static_argnames='graph')
def _logits(graph, params, tokens, positions, segment_ids):
  model = nnx.merge(graph, params)
  hidden, _ = model(tokens, positions, segment_ids)
  return model.unembed(hidden)


@dataclasses.dataclass(frozen=True, eq=False)
class LM:
  """A causal language model with its tokenizer, placed on a mesh."""

  config: ModelConfig
  params: Params
  tokenizer: Any  # transformers.PreTrainedTokenizerFast
  mesh: Mesh
  dtype: str  # compute dtype
  name: str  # folder or hub name it came from
  fingerprint: str  # hex digest of config, dtype, weights and tokenizer: names it in the journal
  eos_token_ids: tuple[int, ...] = ()  # of generation_config.json

  @property
  def graph(self) -> nnx.GraphDef:
    """Static half of the model, for `nnx.merge(lm.graph, params)` in a jitted function."""
    return structure(self.config, self.dtype)[0]

  @property
  def max_positions(self) -> int:
    """Tokens of the longest context with its reply."""
    return self.config.max_positions

  @property
  def vocab_size(self) -> int:
    """Tokens are in 0..vocab_size - 1."""
    return self.config.vocab_size

  def logits(self, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Logits f32[B,T,V] of tokens i32[B,T].

    Args:
      tokens: i32[B,T].
      mask: bool or i32[B,T], nonzero on real tokens, for left- or right-padded rows. Positions
        count real tokens only; logits at padding mean nothing.

    Raises:
      ValueError: for another shape, or a token outside the vocabulary.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or (mask is not None and np.shape(mask) != tokens.shape):
      given = f'tokens {tokens.shape}' + ('' if mask is None else f', mask {np.shape(mask)}')
      raise UserError(f'{given}: tokens, and a mask if there is one, have the same shape [B,T].')
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.config.vocab_size:
      raise UserError(
        f'tokens lie in {tokens.min()}..{tokens.max()}; the vocabulary is '
        f'0..{self.config.vocab_size - 1}.'
      )
    real = np.ones(tokens.shape, np.int32) if mask is None else (np.asarray(mask) != 0) * 1
    positions = np.maximum(np.cumsum(real, axis=1) - 1, 0).astype(np.int32)
    segments = None if mask is None else real.astype(np.int32)
    return _logits(self.graph, self.params, tokens.astype(np.int32), positions, segments)


def load(
  path: str | os.PathLike,
  dtype: str = 'float32',
  mesh: Mesh | None = None,
  param_dtype: str | None = None,
) -> LM:
  """The language model of a Hugging Face folder or hub name.

  Args:
    path: a folder, or a name such as 'Qwen/Qwen2.5-0.5B-Instruct', which is fetched into Hugging
      Face's cache.
    dtype: what is computed in: 'float32', 'bfloat16' or 'float16'. 'float32' is that on every
      device: no product is rounded to TF32 or bf16.
    mesh: where the parameters go; None is `make_mesh()`.
    param_dtype: what parameters are kept in; None is `dtype`.

  Raises:
    ValueError: if there is no such folder or hub name; for a model of a family that is not
      supported, or weights that do not fit it; for a tokenizer that is missing or does not fit.
  """
  param_dtype = dtype if param_dtype is None else param_dtype
  checkpoint.check_dtype(dtype, 'dtype')
  folder = _folder(path)
  hf = _hf_config(folder)
  config = config_lib.from_hf(hf)
  tokenizer = _tokenizer(folder, config.vocab_size)
  eos = _eos_token_ids(folder, hf, tokenizer)
  mesh = make_mesh() if mesh is None else mesh
  return LM(
    config=config,
    params=checkpoint.load_params(folder, config, mesh, param_dtype),
    tokenizer=tokenizer,
    mesh=mesh,
    dtype=dtype,
    name=str(path),
    fingerprint=_fingerprint(folder, config, eos, dtype, param_dtype),
    eos_token_ids=eos,
  )


class Classifier(NamedTuple):
  """A decoder with a linear head over its last hidden state, in place of one over the vocabulary.

  Its parameters are those of a model with tied embeddings: there is no output table.
  """

  config: ModelConfig
  params: Params
  score: np.ndarray  # f32[C,D], the head; C is the number of labels
  labels: tuple[str, ...]
  tokenizer: Any
  eos_token_ids: tuple[int, ...]
  pad_token_id: int | None  # of config.json
  mesh: Mesh


def load_classifier(
  path: str | os.PathLike, dtype: str = 'float32', mesh: Mesh | None = None
) -> Classifier:
  """The sequence-classification checkpoint in a Hugging Face folder or of a hub name.

  That is a `LlamaForSequenceClassification`, `Qwen3ForSequenceClassification` or the like: a
  decoder of a family that is supported, and `score.weight` [labels, D] without a bias.

  Args:
    path, mesh: as of `load`.
    dtype: what parameters are kept in.

  Raises:
    ValueError: as `load`; for a checkpoint of another architecture or with weights beside these.
  """
  checkpoint.check_dtype(dtype, 'dtype')
  folder = _folder(path)
  hf = _hf_config(folder)
  config = dataclasses.replace(config_lib.from_hf(hf), tied_embeddings=True)
  needed = [config_lib.architecture(config, 'SequenceClassification')]
  if (architectures := hf.get('architectures')) != needed:
    raise UserError(
      f'{folder}: architectures is {architectures} in config.json; a reward model or classifier '
      f'has {needed} there. Other heads and poolings are not implemented.'
    )
  labels = _labels(hf, folder)
  tokenizer = _tokenizer(folder, config.vocab_size)
  mesh = make_mesh() if mesh is None else mesh
  return Classifier(
    config=config,
    params=checkpoint.load_params(folder, config, mesh, dtype, others=(SCORE,)),
    score=checkpoint.load_weight(folder, SCORE, (len(labels), config.d_model)),
    labels=labels,
    tokenizer=tokenizer,
    eos_token_ids=_eos_token_ids(folder, hf, tokenizer),
    pad_token_id=hf.get('pad_token_id'),
    mesh=mesh,
  )


class Parts(NamedTuple):
  """All of a model but its weights."""

  config: ModelConfig
  tokenizer: Any
  eos_token_ids: tuple[int, ...]


def check(path: str | os.PathLike) -> Parts:
  """What `load` would load, with everything checked but the values of the weights.

  Raises:
    ValueError: as `load`.
  """
  folder = _folder(path)
  hf = _hf_config(folder)
  config = config_lib.from_hf(hf)
  tokenizer = _tokenizer(folder, config.vocab_size)
  checkpoint.check_params(folder, config)
  return Parts(config, tokenizer, _eos_token_ids(folder, hf, tokenizer))


class Vocabulary(NamedTuple):
  """What renders and reads a model's text, for a model whose weights are elsewhere."""

  tokenizer: Any
  eos_token_ids: tuple[int, ...]
  size: int  # tokens are in 0..size - 1
  fingerprint: str  # hex digest of the tokenizer's files and the ending tokens


def load_vocabulary(path: str | os.PathLike) -> Vocabulary:
  """The tokenizer of a folder or hub name; no weights are fetched, and none need be there.

  Raises:
    ValueError: if there is no such folder or hub name, or no tokenizer in it that can be used.
  """
  folder = _folder(path, (*TOKENIZER_FILES, 'config.json', 'generation_config.json'))
  hf = checkpoint.read_json(folder / 'config.json') if (folder / 'config.json').exists() else {}
  size = hf.get('vocab_size')
  tokenizer = _tokenizer(folder, size)
  eos = _eos_token_ids(folder, hf, tokenizer)
  digest = hashlib.sha256(json.dumps(eos).encode())
  _digest_files(digest, folder, sorted({f.name for p in TOKENIZER_FILES for f in folder.glob(p)}))
  last = max(tokenizer.get_vocab().values())
  return Vocabulary(tokenizer, eos, size or last + 1, digest.hexdigest())


def save(
  lm: LM,
  path: str | os.PathLike,
  dtype: str | None = None,
  max_shard_bytes: int = 5_000_000_000,
) -> None:
  """Writes a Hugging Face folder that `load` and transformers read.

  It holds config.json, safetensors, the tokenizer with its chat template and
  generation_config.json. An earlier model in `path` is replaced and other files are left alone;
  config.json comes last, so that a folder that was cut short is not taken for a model. Every
  process of a multi-process run calls it; process 0 writes.

  Args:
    lm: the model.
    path: the folder; made if absent.
    dtype: of the weights; None keeps that of the parameters.
    max_shard_bytes: size from which a further safetensors file is begun.

  Raises:
    ValueError: for an unknown dtype, or if `path` is a file.
  """
  folder = pathlib.Path(path).expanduser()
  if folder.exists() and not folder.is_dir():
    raise UserError(f'{folder} is a file; a model is saved to a folder.')
  partial = folder / '.partial'
  if jax.process_index() == 0:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
  checkpoint.save_params(partial, lm.params, lm.config, dtype, max_shard_bytes)
  if jax.process_index() == 0:
    _write_tokenizer(partial, lm.tokenizer)
    _write_configs(partial, lm, dtype)
    _replace_model(folder, partial)
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(f'saved {folder}')


def _folder(path: str | os.PathLike, patterns: tuple[str, ...] = MODEL_FILES) -> pathlib.Path:
  """The local folder of a model; if `path` is not one, its files are fetched from the hub."""
  folder = pathlib.Path(path).expanduser()
  if folder.is_dir():
    return folder
  try:
    return pathlib.Path(huggingface_hub.snapshot_download(str(path), allow_patterns=list(patterns)))
  except (OSError, ValueError) as error:  # not found, not allowed, offline, not a name at all
    raise UserError(
      f'{str(path)!r} is neither a folder here nor a model that the Hugging Face hub would give '
      f'({type(error).__name__}: {str(error).strip()}). Give the path of a folder, or a name such '
      "as 'Qwen/Qwen2.5-0.5B-Instruct'; a gated model needs `hf auth login` first."
    ) from error


def _hf_config(folder: pathlib.Path) -> dict[str, Any]:
  if not (folder / 'config.json').exists():
    raise UserError(f'{folder} has no config.json: it is not the folder of a model.')
  return checkpoint.read_json(folder / 'config.json')


def _labels(hf: dict[str, Any], folder: pathlib.Path) -> tuple[str, ...]:
  """Names of a classifier's labels, in order; transformers writes none where they are two."""
  names = hf.get('id2label')
  if names is None:
    return tuple(f'LABEL_{i}' for i in range(hf.get('num_labels', 2)))
  if not isinstance(names, dict) or {*names} != {str(i) for i in range(len(names))} or not names:
    raise UserError(f'{folder}: id2label is {names!r} in config.json; it must name labels 0, 1, …')
  return tuple(str(names[str(i)]) for i in range(len(names)))


def _tokenizer(folder: pathlib.Path, vocab_size: int | None):
  """The folder's tokenizer, checked against the embedding's size where that is known."""
  # Where there is a tokenizer.json it is taken as it stands: AutoTokenizer of transformers 5 may
  # rebuild it with the splitting rules that are usual for the model's type.
  whole = (folder / 'tokenizer.json').exists()
  if not whole and not any((folder / f).exists() for f in ('tokenizer.model', 'vocab.json')):
    # AutoTokenizer would make an empty one of the model's type.
    raise UserError(f'{folder} has no tokenizer: put its tokenizer.json there.')
  cls = transformers.PreTrainedTokenizerFast if whole else transformers.AutoTokenizer
  options = {} if whole else {'use_fast': True, 'trust_remote_code': False}
  try:
    tokenizer = cls.from_pretrained(folder, **options)
  except Exception as error:  # the kinds depend on what is missing, and on the version
    raise UserError(f'{folder} has no tokenizer that can be read: {error}') from error
  if not tokenizer.is_fast:
    raise UserError(f'{folder}: {type(tokenizer).__name__} is slow; tokenizer.json is needed.')
  token, last = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
  if vocab_size is not None and last >= vocab_size:
    raise UserError(
      f'{folder}: the tokenizer has {token!r} as token {last}, and the model embeds '
      f'{vocab_size} only. Take the tokenizer of this model, or resize its embedding.'
    )
  return tokenizer


def _eos_token_ids(folder: pathlib.Path, hf: dict[str, Any], tokenizer) -> tuple[int, ...]:
  """Ending tokens by generation_config.json, else config.json, else the tokenizer."""
  path = folder / 'generation_config.json'
  generation = checkpoint.read_json(path) if path.exists() else {}
  for eos in (generation.get('eos_token_id'), hf.get('eos_token_id'), tokenizer.eos_token_id):
    if eos is not None:
      found = tuple(eos) if isinstance(eos, list) else (eos,)
      if not all(isinstance(token, int) for token in found):
        raise UserError(f'{folder}: eos_token_id is {eos!r}; it must be a token id, or a list.')
      return found
  return ()


def _fingerprint(
  folder: pathlib.Path, config: ModelConfig, eos: tuple[int, ...], dtype: str, param_dtype: str
) -> str:
  """Hex digest of all that fixes what the model says; the same wherever the folder lies."""
  settings = [dataclasses.asdict(config), eos, dtype, param_dtype]
  digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
  tokenizer_files = {f.name for pattern in TOKENIZER_FILES for f in folder.glob(pattern)}
  _digest_files(digest, folder, [*checkpoint.weight_files(folder), *sorted(tokenizer_files)])
  return digest.hexdigest()


def _digest_files(digest, folder: pathlib.Path, names: list[str]) -> None:
  """Feeds names and contents of files to a hash."""
  for name in names:
    with open(folder / name, 'rb') as file:
      digest.update(f'{name} {hashlib.file_digest(file, "sha256").hexdigest()}\n'.encode())


def _write_tokenizer(folder: pathlib.Path, tokenizer) -> None:
  tokenizer.save_pretrained(folder)
  path = folder / 'tokenizer_config.json'
  settings = checkpoint.read_json(path)
  if settings.get('tokenizer_class') == 'TokenizersBackend':
    # The name that transformers 4 knows too.
    write_json(path, {**settings, 'tokenizer_class': 'PreTrainedTokenizerFast'})


def _write_configs(folder: pathlib.Path, lm: LM, dtype: str | None) -> None:
  eos = lm.eos_token_ids[0] if len(lm.eos_token_ids) == 1 else list(lm.eos_token_ids) or None
  special = {
    'bos_token_id': lm.tokenizer.bos_token_id,
    'eos_token_id': eos,
    'pad_token_id': lm.tokenizer.pad_token_id,
  }
  stored = dtype or str(jax.tree.leaves(lm.params)[0].dtype)
  # transformers before 4.56 reads `torch_dtype`.
  hf = {**config_lib.to_hf(lm.config), **special, 'dtype': stored, 'torch_dtype': stored}
  write_json(folder / 'config.json', hf)
  generation = {name: token for name, token in special.items() if token is not None}
  write_json(folder / 'generation_config.json', generation)


def _replace_model(folder: pathlib.Path, partial: pathlib.Path) -> None:
  """Moves the files of `partial` into `folder`, in place of the model that was there."""
  (folder / 'config.json').unlink(missing_ok=True)
  for stale in {f for pattern in MODEL_FILES for f in folder.glob(pattern)}:
    stale.unlink()
  names = sorted(f.name for f in partial.iterdir())
  for name in [n for n in names if n != 'config.json'] + ['config.json']:
    if (folder / name).is_dir():
      shutil.rmtree(folder / name)
    os.replace(partial / name, folder / name)
  partial.rmdir()
