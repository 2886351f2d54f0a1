"""Errors that a server reports: which may pass, which last, and what to do about the latter."""

import json
import urllib.parse
from typing import Any

from cai_jax.runtime.errors import UserError

RETRIED_STATUSES = (408, 425, 429)  # besides 5xx
LASTING_STATUSES = (501, 505)  # the server lacks what the request needs
QUOTA_CODES = ('insufficient_quota', 'billing_hard_limit_reached', 'billing_not_active')
FILTER_CODES = ('content_filter', 'ResponsibleAIPolicyViolation')  # the prompt was refused
CONTEXT_WORDS = ('context', 'too long', 'max_tokens', 'maximum', 'input length', 'truncat')


class ServerError(Exception):
  """A failure that may pass.

  Attributes:
    retry_after: seconds that the server asks to wait.
  """

  def __init__(self, message: str, retry_after: float):
    super().__init__(message)
    self.retry_after = retry_after


class RefusedError(UserError):
  """A refusal that the same request would meet again.

  Attributes:
    status: the HTTP status.
    code: the code of the error, such as 'content_filter'; '' if there is none.
  """

  def __init__(self, message: str, status: int, code: str):
    super().__init__(message)
    self.status, self.code = status, code

  @property
  def is_filter(self) -> bool:
    """Whether the server's filter of contents refused the prompt."""
    return self.code in FILTER_CODES

  @property
  def is_invalid(self) -> bool:
    """Whether the server refused the content of the request, such as one of its fields."""
    return self.status in (400, 422, 501)


def may_pass(status: int, code: str) -> bool:
  """Return whether a failed request may succeed later.

  Args:
    status: the HTTP status.
    code: the code of the error.
  """
  if code in QUOTA_CODES:
    return False
  return status in RETRIED_STATUSES or (status >= 500 and status not in LASTING_STATUSES)


def advice(status: int, message: str, has_key: bool, code: str = '') -> str:
  """Return what to do about a refusal; '' if only the server's message says it.

  Args:
    status: the HTTP status.
    message: the server's message.
    has_key: whether the request had an API key.
    code: the code of the error.
  """
  text = message.lower()
  if status in (401, 403):
    state = 'holds a valid key' if has_key else 'names the variable with a key'
    return f'Check that api_key_env {state} and that the key may use this model.'
  if status == 402 or code in QUOTA_CODES:
    return 'The quota of the account is used up: raise it, then start the run again to continue.'
  if 300 <= status < 400:
    return 'Redirects are not followed, so that the key goes nowhere else: set url to the new one.'
  if status == 404:
    return 'Check url and model: the server has no such page or model.'
  if 'seed' in text:
    return "If the server refuses seeds, set seed='server'."
  if any(word in text for word in CONTEXT_WORDS):
    return "Lower max_positions to the server's context, or serve the model with a longer one."
  return ''


def error_code(data: bytes) -> str:
  """Return the code of the error in a response: its code, or its type; '' if there is none."""
  error = _error_of(_parse(data))
  inner = error.get('innererror')
  codes = [
    error.get('code'),
    error.get('type'),
    inner.get('code') if isinstance(inner, dict) else '',
  ]
  known = [code for code in codes if code in (*QUOTA_CODES, *FILTER_CODES)]
  return next(iter([*known, *(code for code in codes if isinstance(code, str))]), '')


def hidden_status(data: bytes) -> int:
  """Return the status of the error that a body with status 200 holds; 200 if it is an answer."""
  content = None if b'"choices"' in data else _parse(data)
  if not isinstance(content, dict):
    return 200
  if 'error' not in content and content.get('object') != 'error':
    return 200
  for value in (_error_of(content).get('code'), content.get('code'), content.get('status')):
    if type(value) is int and 400 <= value < 600:
      return value
  return 500


def redirect_target(location: str | None) -> str:
  """Return the address of a redirect without user, password and query; '' if it has none."""
  try:
    parts = urllib.parse.urlsplit(location or '')
  except ValueError:
    return ''
  host = parts.netloc.rpartition('@')[2]
  return f'{parts.scheme}://{host}{parts.path}' if host else parts.path


def server_message(data: bytes) -> str:
  """Return the error message in the body of a response, or the whole body if it has none."""
  text = data.decode('utf-8', 'replace')
  content = _parse(data)
  error = content.get('error', content) if isinstance(content, dict) else content
  message = error.get('message') if isinstance(error, dict) else error
  return message if isinstance(message, str) and message else text or '(an empty body)'


def _error_of(content: Any) -> dict[str, Any]:
  """Return the object that describes an error, which some servers nest under 'error'."""
  error = content.get('error', content) if isinstance(content, dict) else None
  return error if isinstance(error, dict) else {}


def _parse(data: bytes) -> Any:
  try:
    return json.loads(data)
  except (ValueError, RecursionError):
    return None
