"""A request that is refused, as OpenAI's API reports it."""

from typing import Any


class RequestError(Exception):
  """A request that the server refuses.

  Args:
    message: what was wrong, what is allowed and what to do.
    param: the field of the body that was wrong, if there is one.
    status: status code of HTTP.
    code: a word for programs, such as 'model_not_found'.
  """

  def __init__(
    self, message: str, param: str | None = None, status: int = 400, code: str | None = None
  ):
    super().__init__(message)
    self.message, self.param, self.status, self.code = message, param, status, code

  def body(self) -> dict[str, Any]:
    """Return the body of the answer.

    The form is that of OpenAI's API reference, `Error`: message, type, param and code.
    """
    kind = 'server_error' if self.status >= 500 else 'invalid_request_error'
    error = {'message': self.message, 'type': kind, 'param': self.param, 'code': self.code}
    return {'error': error}
