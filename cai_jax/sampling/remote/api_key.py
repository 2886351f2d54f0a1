"""The API key: read from the environment, and kept out of every message."""

import os
import re

from cai_jax.runtime.errors import UserError
from cai_jax.sampling.remote.config import RemoteConfig

HIDDEN_LENGTH = 8  # a part of the key with this many characters is hidden
HIDDEN = '(key)'


def read_key(config: RemoteConfig) -> str:
  """Return the API key from the environment variable that a config names; '' if it names none.

  Args:
    config: the address of the served model.

  Raises:
    UserError: if the variable is not set or cannot be sent, or the URL contains the key. The
      message does not contain the key.
  """
  if not config.api_key_env:
    return ''
  key = os.environ.get(config.api_key_env, '')
  variable = f'remote: api_key_env names the environment variable {config.api_key_env}'
  if not key:
    raise UserError(f'{variable}, which is not set. Export it with the API key.')
  if not re.fullmatch(r'[\x21-\x7e]+', key):
    raise UserError(
      f'{variable}, whose value (not shown) cannot be sent as an API key. A key has printable '
      'ASCII characters only, without spaces. Export it again without a line break.'
    )
  if len(key) >= HIDDEN_LENGTH and key in config.url:
    raise UserError(
      'remote: url (not shown) contains the API key, and a URL is written to logs and files. '
      'Remove the key from it: it is sent with each request as a header.'
    )
  return key


def hide(text: str, key: str) -> str:
  """Return a text with the key, and longer parts of it, replaced by '(key)'.

  A server may quote a key that it refuses, and may shorten it.

  Args:
    text: any text, such as a server's error message.
    key: the API key; '' hides nothing.
  """
  if len(key) <= HIDDEN_LENGTH:
    return text.replace(key, HIDDEN) if key else text
  secret = bytearray(len(text))
  for start in range(len(text) - HIDDEN_LENGTH + 1):
    if text[start : start + HIDDEN_LENGTH] in key:
      secret[start : start + HIDDEN_LENGTH] = b'\1' * HIDDEN_LENGTH
  parts = re.finditer(rb'\x01+|\x00+', bytes(secret))
  return ''.join(HIDDEN if secret[p.start()] else text[p.start() : p.end()] for p in parts)
