"""The interface of model families: how they map config.json and weights, in both directions.

To add a family, register a `Family` in a new file of this folder, or in a file of your own that
`config.plugins` names. `llama.py` is an example.
"""

import dataclasses
import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from cai_jax.model.config import ModelConfig
from cai_jax.model.families.options import OPTIONS, check_options, check_outer_options
from cai_jax.model.families.quantized import check_unquantized
from cai_jax.model.families.text_half import text_entries
from cai_jax.model.families.unsupported import describe_unsupported
from cai_jax.model.families.weight_table import (
  StoredWeight,
  Weight,
  check_table,
  describe_axes,
  find_row,
  find_weights,
)
from cai_jax.runtime.errors import UserError, show
from cai_jax.runtime.registry import Registry

# The entries of config.json that give the size of each axis.
_SIZES = {
  'V': 'vocab_size',
  'D': 'hidden_size',
  'F': 'intermediate_size',
  'N': 'num_attention_heads',
  'K': 'num_key_value_heads',
  'H': 'head_dim',
  'E': 'num_experts',
  'P': 'max_position_embeddings',
}


@dataclasses.dataclass(frozen=True)
class Family:
  """A model family: how Hugging Face stores the config and the weights of its models.

  Attributes:
    read_config: returns the ModelConfig of a parsed config.json; raises UserError for an option
      that is not implemented.
    write_config: returns the entries of config.json that describe a ModelConfig. `config_to_hf`
      adds model_type and architectures, and checks that reading gives the same ModelConfig.
    weights: the weight table. A model uses the rows for the parameters that it has.
    causal_lm: transformers' class for language models, such as 'LlamaForCausalLM'.
    classifier: transformers' class for sequence classification, or None if it has none.
    title: the models of the family, for the documentation, such as 'Llama 2 and 3'.
    examples: names of such models on the hub.
    options: the entries of `options.OPTIONS` that `read_config` reads. All others must be neutral.
    sizes: the entries of config.json that give the size of an axis, by its letter, where they are
      not those of Llama; for messages.
    fused: rows for files in which some parameters have other tensors than in `weights`. Loading
      finds out which of the two a file has, and saving writes those of `weights`.
    multimodal: multimodal models of which this family is the text half: transformers' class by
      model_type. Their config.json has a text_config.
    quantized: the quant_method of checkpoints that loading dequantizes.
    named_halves: types of `multimodal` whose text_config must name this family, because another
      one is the default.
    prefixes: other prefixes of weights in the files, and the prefix of the weight table that each
      stands for.
    ignored: patterns of weights that the files may have and the model does not use, such as
      'vision_tower.*'. Loading logs them.

  Raises:
    ValueError: if the weight table or `options` is wrong.
  """

  read_config: Callable[[dict[str, Any]], ModelConfig]
  write_config: Callable[[ModelConfig], dict[str, Any]]
  weights: tuple[Weight, ...]
  causal_lm: str
  classifier: str | None
  title: str = ''
  examples: tuple[str, ...] = ()
  options: tuple[str, ...] = ()
  sizes: Mapping[str, str] = dataclasses.field(default_factory=dict)
  fused: tuple[Weight, ...] = ()
  multimodal: Mapping[str, str] = dataclasses.field(default_factory=dict)
  quantized: tuple[str, ...] = ()
  named_halves: tuple[str, ...] = ()
  prefixes: tuple[tuple[str, str], ...] = ()
  ignored: tuple[str, ...] = ()

  def __post_init__(self):
    for table in (self.weights, self._fused_table()):
      check_table(table, {**_SIZES, **self.sizes})
    if unknown := sorted(set(self.options) - OPTIONS.keys()):
      raise ValueError(f'OPTIONS of families/options.py has no {unknown[0]!r}.')

  def _fused_table(self) -> tuple[Weight, ...]:
    """Return the weight table with the rows of `fused`."""
    paths = {row.path for row in self.fused}
    return (*(row for row in self.weights if row.path not in paths), *self.fused)

  def in_layout_of(self, names: Iterable[str]) -> 'Family':
    """Return the family with the weight table of some files, which may be that with `fused`.

    Args:
      names: of the tensors of the files.
    """
    own = {row.name for row in self.weights}
    others = [row.name for row in self.fused if row.name not in own]
    patterns = [re.escape(name).replace(r'\{\}', r'\d+') for name in others]
    if not patterns or not any(re.fullmatch('|'.join(patterns), name) for name in names):
      return self
    return dataclasses.replace(self, weights=self._fused_table(), fused=())

  def find_weights(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, StoredWeight]:
    """Return the tensors that hold the parameters of a model, by path.

    Args:
      shapes: the shape of each parameter of the model, by path such as 'layers/0/mlp/up/kernel'.

    Raises:
      ValueError: if the weight table has no row for a parameter.
    """
    return find_weights(self.weights, shapes)

  def find_name(self, path: str) -> str | None:
    """Return the name of the tensor in a row of the weight table, or None without such a row.

    Args:
      path: such as 'head/table'.
    """
    return next((row.name for row in self.weights if row.path == path), None)

  def describe_shape(self, path: str) -> str:
    """Return the entries of config.json that give the shape of a parameter's tensor.

    Args:
      path: such as 'layers/0/mlp/up/kernel'.

    Returns:
      Such as 'intermediate_size, hidden_size', with × between factors of one axis.
    """
    row, _ = find_row({row.path: row for row in self.weights}, path)
    return describe_axes(row, self.weights, {**_SIZES, **self.sizes})

  def canonical_name(self, name: str) -> str:
    """Return the name that the weight table would have for a weight of a file.

    Args:
      name: its name in the file.
    """
    for prefix, canonical in self.prefixes:
      if name.startswith(prefix):
        return canonical + name.removeprefix(prefix)
    return name

  def ignores(self, name: str) -> str | None:
    """Return the pattern of `ignored` that a weight's name matches, or None."""
    return next((p for p in self.ignored if fnmatch.fnmatchcase(name, p)), None)

  def architecture(self, hf: Mapping[str, Any]) -> str:
    """Return transformers' class for the language models that a config.json describes."""
    return self.multimodal.get(hf.get('model_type', ''), self.causal_lm)


FAMILIES: Registry[Family] = Registry('model family')


def config_from_hf(hf: dict[str, Any]) -> ModelConfig:
  """Return the ModelConfig of a parsed Hugging Face config.json.

  Of a multimodal model, it is the text half.

  Raises:
    UserError: if the family, or an option such as the activation, is not implemented; if the
      weights are quantized.
  """
  family = FAMILIES[_find_family(hf)]
  check_unquantized(hf, family.quantized)
  entries = text_entries(hf)
  if entries is hf:
    check_options(hf, family.options)
    return family.read_config(hf)
  check_outer_options(hf, entries)
  try:
    check_options(entries, family.options)
    return family.read_config(entries)
  except UserError as error:
    text = str(error).removeprefix('config.json: ')
    raise UserError(f'config.json: in text_config, {text}') from None


def _find_family(hf: dict[str, Any]) -> str:
  """Return the key of FAMILIES that reads a parsed config.json."""
  name, text = hf.get('model_type'), hf.get('text_config')
  halves = [key for key, family in FAMILIES.items() if name in family.multimodal]
  if text is None and halves:
    raise UserError(
      f'config.json: model_type {show(name)} is a multimodal model, but there is no text_config. '
      'Download the file again.'
    )
  if not isinstance(text, dict):
    if isinstance(name, str) and name in FAMILIES:
      return name
    raise UserError(describe_unsupported(name, FAMILIES))
  half = text.get('model_type')
  if half is None:
    half = next((key for key in halves if name not in FAMILIES[key].named_halves), None)
  if half in halves:
    return half
  if not halves:
    raise UserError(describe_unsupported(name, FAMILIES, half))
  raise UserError(
    f'config.json: text_config.model_type is {show(half)}. For model_type {show(name)}, '
    f'{" and ".join(sorted(halves))} are supported. Use a checkpoint with one of them.'
  )


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
  """Return the Hugging Face config.json of a model; the inverse of `config_from_hf`.

  Raises:
    UserError: if the family's config.json cannot describe the model.
  """
  family = FAMILIES[config.family]
  hf = {'architectures': [family.causal_lm], 'model_type': config.family}
  hf |= family.write_config(config)
  read_back = config_from_hf(hf)
  if config.long_context:  # a choice that is not stored
    read_back = read_back.with_long_context()
  if read_back != config:
    name = next(
      field.name
      for field in dataclasses.fields(config)
      if getattr(read_back, field.name) != getattr(config, field.name)
    )
    raise UserError(
      f'{name}={getattr(config, name)!r} cannot be written to the config.json of a {config.family} '
      f'model: it would be read back as {getattr(read_back, name)!r}.'
    )
  return hf
