"""A server of Google's protocol for tests: gcp-storage-emulator, with conditional writes."""

import sys
import threading
from http import HTTPStatus

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

_insert = objects.insert
_lock = threading.Lock()


def _insert_once(request, response, storage, *arguments, **options):
  """Refuse to replace an object if the request has the condition that there is none."""
  with _lock:
    if request.query.get('ifGenerationMatch') == ['0']:
      names = request.query.get('name') or [request.data['meta']['name']]
      try:
        storage.get_file_obj(request.params['bucket_name'], names[0])
      except NotFound:
        pass
      else:
        response.status = HTTPStatus.PRECONDITION_FAILED
        return None
    return _insert(request, response, storage, *arguments, **options)


objects.insert = _insert_once  # before the server makes its table of requests

from gcp_storage_emulator.server import create_server  # noqa: E402

create_server('127.0.0.1', int(sys.argv[1]), in_memory=True, default_bucket='runs').run()
