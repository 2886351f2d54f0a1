"""Quantized checkpoints, which are refused with the name of the original where it is known."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from cai_jax.runtime.errors import UserError, show

MXFP4 = 'mxfp4'  # the quant_method that `cai_jax.model.mxfp4` reads
CONFIGS = ('quantization_config', 'compression_config')
# safetensors' names of dtypes that hold quantized numbers.
DTYPES = re.compile(r'[UI]8|F4|F[68]_.*')
# Names of tensors that hold them as whole numbers: GPTQ and AWQ, bitsandbytes, gpt-oss.
NAMES = re.compile(r'.*\.(qweight|qzeros|weight_packed|absmax|quant_map|\w+_blocks)')
_NAME = re.compile(r'[\w-][\w.-]*/[\w.-]+')  # on the hub
_MARKS = re.compile(
  r'gptq|awq|bnb|nf4|fp8|mxfp4|nvfp4|quantized|(?<![a-z0-9])(int|w)?[2-8]-?bit|int[48]|w\da\d+'
)


def check_unquantized(hf: Mapping[str, Any], allowed: Collection[str] = ()) -> None:
  """Check that a config.json does not say that the weights are quantized in another way.

  Args:
    hf: a parsed config.json.
    allowed: the quant_method of weights that can be dequantized.

  Raises:
    UserError: if it does.
  """
  text = hf.get('text_config')
  for part in (hf, text) if isinstance(text, Mapping) else (hf,):
    for key in CONFIGS:
      if (settings := part.get(key)) is not None:
        method = settings.get('quant_method') if isinstance(settings, Mapping) else None
        if method in allowed:
          continue
        what = show(settings) if method is None else f'{{quant_method: {show(method)}, …}}'
        raise UserError(
          f'config.json: {key}={what} says that the weights are quantized, which is not supported. '
          f'{advise(hf)}'
        )


def advise(hf: Mapping[str, Any]) -> str:
  """Return what to use in place of a quantized checkpoint.

  Args:
    hf: its parsed config.json.
  """
  original = find_original(hf)
  if original is None:
    return 'Use the original checkpoint.'
  return f'Use the original checkpoint; config.json names {original!r}.'


def find_original(hf: Mapping[str, Any]) -> str | None:
  """Return the hub's name of the model that was quantized, or None if config.json has none.

  Args:
    hf: a parsed config.json.
  """
  for part in (hf, *(hf.get(key) for key in (*CONFIGS, 'text_config'))):
    for key in ('base_model', 'base_model_name_or_path', 'model_name_or_path', '_name_or_path'):
      name = part.get(key) if isinstance(part, Mapping) else None
      # A quantized checkpoint that was saved again names itself.
      if isinstance(name, str) and _NAME.fullmatch(name) and not _MARKS.search(name.lower()):
        return name
  return None
