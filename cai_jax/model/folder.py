"""Model folders in Hugging Face's format: find or fetch one, and read its small files."""

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import huggingface_hub

from cai_jax.model.config import ModelConfig
from cai_jax.model.families.family import config_from_hf
from cai_jax.model.families.fields import read_size
from cai_jax.model.families.text_half import text_entries
from cai_jax.model.generation_config import (
  check_token_ids,
  choose_eos_token_ids,
  read_generation_config,
)
from cai_jax.model.quantized.kernel import FULL
from cai_jax.model.tokenizer import load_tokenizer
from cai_jax.model.weight_files import INDEX, list_weight_files
from cai_jax.runtime.cloud.copies import local_copy
from cai_jax.runtime.cloud.store import is_url
from cai_jax.runtime.digests import digest_file, digest_files
from cai_jax.runtime.errors import UserError, show
from cai_jax.runtime.files import read_json
from cai_jax.runtime.settings import identity

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
DESCRIPTION_FILES = ('config.json', 'generation_config.json', *TOKENIZER_FILES)  # all but weights
# What is fetched from a hub, and what saving a model may replace: no pickles and no Python.
MODEL_FILES = (*DESCRIPTION_FILES, 'model*.safetensors', INDEX)


class Vocabulary(NamedTuple):
  """A tokenizer and its properties, for a model whose weights are on a server.

  Attributes:
    tokenizer: a transformers.PreTrainedTokenizerFast.
    eos_token_ids: tokens that end a reply.
    size: number of token ids.
    fingerprint: hex digest of the tokenizer's files and `eos_token_ids`.
  """

  tokenizer: Any
  eos_token_ids: tuple[int, ...]
  size: int
  fingerprint: str


def load_vocabulary(path: str | os.PathLike) -> Vocabulary:
  """Load the tokenizer of a folder or hub name without fetching weights.

  Args:
    path: a folder, or a name on the Hugging Face hub.

  Raises:
    UserError: if there is no such folder or name, or no usable tokenizer in it.
  """
  folder = find_folder(path, DESCRIPTION_FILES)
  path = folder / 'config.json'
  hf = _text_entries(read_json(path), path) if path.exists() else {}
  size = None if hf.get('vocab_size') is None else read_size(hf, 'vocab_size')
  check_token_ids(hf, path, size)
  generation = read_generation_config(folder, size)
  tokenizer = load_tokenizer(folder, size)
  eos = choose_eos_token_ids(
    generation.get('eos_token_id'), hf.get('eos_token_id'), tokenizer.eos_token_id
  )
  digest = hashlib.sha256(json.dumps(eos).encode())
  _update_digest(digest, folder, _tokenizer_files(folder))
  largest_id = max(tokenizer.get_vocab().values())
  return Vocabulary(tokenizer, eos, size or largest_id + 1, digest.hexdigest())


def find_folder(path: str | os.PathLike, patterns: tuple[str, ...] = MODEL_FILES) -> pathlib.Path:
  """Return a model's local folder, fetching it from the Hugging Face hub if necessary.

  Args:
    path: a folder, its URL, or a name on the hub, such as 'Qwen/Qwen2.5-0.5B-Instruct'.
    patterns: the files to fetch.

  Raises:
    UserError: if there is no such folder, and the hub does not provide the model.
  """
  if is_url(path):
    return local_copy(path, patterns)
  folder = pathlib.Path(path).expanduser()
  if folder.is_dir():
    return folder
  try:
    return pathlib.Path(huggingface_hub.snapshot_download(str(path), allow_patterns=list(patterns)))
  # The hub's errors for absent, gated and malformed names and for a missing network are of these.
  except (OSError, ValueError) as error:
    raise UserError(
      f'{str(path)!r} is neither a local folder nor a model that the Hugging Face hub provides '
      f'({type(error).__name__}: {str(error).strip()}). Give the path of a folder, or a name such '
      "as 'Qwen/Qwen2.5-0.5B-Instruct'. For a gated model, run `hf auth login` first."
    ) from error


class Description(NamedTuple):
  """What a model's folder holds besides the weights.

  Attributes:
    hf: the parsed config.json.
    config: the shape of the model; of a multimodal model, its text half.
    tokenizer: a transformers.PreTrainedTokenizerFast.
    eos_token_ids: tokens that end a reply.
    generation_config: the entries of generation_config.json.
  """

  hf: dict[str, Any]
  config: ModelConfig
  tokenizer: Any
  eos_token_ids: tuple[int, ...]
  generation_config: dict[str, Any]


def read_description(folder: pathlib.Path) -> Description:
  """Return what a folder holds besides the weights. All models come through this door.

  Args:
    folder: the model's folder.

  Raises:
    UserError: if a file is missing, cannot be read, or contradicts itself or another file.
  """
  hf = read_hf_config(folder)
  path = folder / 'config.json'
  with _naming(path):
    config = config_from_hf(hf)
  entries = _text_entries(hf, path)
  check_token_ids(entries, path, config.vocab_size)
  generation = read_generation_config(folder, config.vocab_size)
  tokenizer = load_tokenizer(folder, config.vocab_size)
  eos = choose_eos_token_ids(
    generation.get('eos_token_id'), entries.get('eos_token_id'), tokenizer.eos_token_id
  )
  return Description(hf, config, tokenizer, eos, generation)


@contextlib.contextmanager
def _naming(path: pathlib.Path) -> Iterator[None]:
  """Give errors about a config.json its path."""
  try:
    yield
  except UserError as error:
    raise UserError(f'{path}: {str(error).removeprefix("config.json: ")}') from None


def _text_entries(hf: dict[str, Any], path: pathlib.Path) -> dict[str, Any]:
  """Return the entries of a parsed config.json that describe its language model."""
  with _naming(path):
    return text_entries(hf)


def check_architecture(folder: pathlib.Path, hf: dict[str, Any], expected: str) -> None:
  """Check that config.json names the architecture that its model_type has.

  Args:
    folder: the model's folder.
    hf: its parsed config.json.
    expected: transformers' class, such as 'LlamaForCausalLM'.

  Raises:
    UserError: if `architectures` names other classes only.
  """
  stated = hf.get('architectures')
  names = stated if isinstance(stated, list) else [stated]
  # Some checkpoints write LLaMAForCausalLM.
  if stated and not any(str(name).lower() == expected.lower() for name in names):
    raise UserError(
      f'{folder / "config.json"}: architectures={show(stated)} contradicts model_type='
      f'{show(hf["model_type"])}, whose language models are {expected}. Correct the one '
      'that does not belong to the weights.'
    )


def read_hf_config(folder: pathlib.Path) -> dict[str, Any]:
  """Return the parsed config.json of a model's folder.

  Args:
    folder: the model's folder.

  Raises:
    UserError: if there is none, or it is not a JSON object.
  """
  if not (folder / 'config.json').is_file():
    raise UserError(
      f'{folder} has no config.json, so it is not a model. Give the folder of a model.'
    )
  return read_json(folder / 'config.json')


def fingerprint_model(
  folder: pathlib.Path,
  config: ModelConfig,
  eos: tuple[int, ...],
  dtype: str,
  param_dtype: str,
  weights: str = FULL,
) -> str:
  """Return the hex digest of everything that determines what a model samples.

  The digest covers the config, the dtypes, the weights, the tokenizer and the tokens that end a
  reply, but not the path of the folder. It is part of the key of each turn in a journal.

  Args:
    folder: the model's folder.
    config: the model's config.
    eos: tokens that end a reply.
    dtype: compute dtype.
    param_dtype: dtype of the parameters.
    weights: format of the linear layers' kernels.
  """
  settings = [identity(config), eos, dtype, param_dtype, *([] if weights == FULL else [weights])]
  digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
  _update_digest(digest, folder, [*list_weight_files(folder), *_tokenizer_files(folder)])
  return digest.hexdigest()


def folder_contents(folder: pathlib.Path, weights: bool = True) -> dict[str, str]:
  """Return a hex digest of each part of a model's folder, to notice that a part was replaced.

  Args:
    folder: the model's folder.
    weights: whether the weights count; they do not if a server has them.

  Returns:
    The digests of the 'weights', the 'tokenizer', the 'chat_template' and the 'config' files. A
    template inside of tokenizer_config.json counts as a part of the tokenizer.

  Raises:
    UserError: if the folder has no weights, or a file cannot be read.
  """
  names = _tokenizer_files(folder)
  templates = [name for name in names if name.endswith(('chat_template.json', '.jinja'))]
  settings = [f for f in ('config.json', 'generation_config.json') if (folder / f).exists()]
  parts = {
    'tokenizer': [name for name in names if name not in templates],
    'chat_template': templates,
    'config': settings,
  }
  if weights:
    parts = {'weights': list_weight_files(folder)} | parts
  try:
    return {part: digest_files(folder, files) for part, files in parts.items()}
  except OSError as error:
    raise UserError(f'{folder} cannot be read: {error}. Check its permissions.') from error


def _tokenizer_files(folder: pathlib.Path) -> list[str]:
  """Return the sorted names of a folder's tokenizer files."""
  return sorted({f.name for pattern in TOKENIZER_FILES for f in folder.glob(pattern)})


def _update_digest(digest, folder: pathlib.Path, names: list[str]) -> None:
  """Add the names and contents of files to a hash."""
  for name in names:
    digest.update(f'{name} {digest_file(folder / name)}\n'.encode())
