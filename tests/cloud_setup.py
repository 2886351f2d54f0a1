"""Servers of the protocols of object stores, as processes of their own that a run can reach."""

import contextlib
import socket
import subprocess
import sys
import time

import pytest

from cai_jax.runtime.cloud.store import open_store
from tests.pipeline_setup import ROOT


def _serve_s3(port):
  pytest.importorskip('s3fs')
  pytest.importorskip('moto')
  command = [sys.executable, '-m', 'moto.server', '-p', str(port)]
  return command, {
    'AWS_ENDPOINT_URL': f'http://127.0.0.1:{port}',
    'AWS_ACCESS_KEY_ID': 'key',
    'AWS_SECRET_ACCESS_KEY': 'secret',
    'AWS_DEFAULT_REGION': 'us-east-1',
  }


def _serve_gs(port):
  pytest.importorskip('gcsfs')
  pytest.importorskip('gcp_storage_emulator')
  url = f'http://127.0.0.1:{port}'
  return [sys.executable, 'tests/gcs_server.py', str(port)], {
    'STORAGE_EMULATOR_HOST': url,
    'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',  # asks for what the server does not have
    'TENSORSTORE_GCS_HTTP_URL': url,
    'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'any',
  }


SERVERS = {'s3': _serve_s3, 'gs': _serve_gs}


@contextlib.contextmanager
def serve(scheme, monkeypatch):
  """Yield the URL of a bucket in a server, whose address the environment gives to all programs."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  command, environment = SERVERS[scheme](port)
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  try:
    end = time.monotonic() + 60
    while True:
      with socket.socket() as probe:
        if not probe.connect_ex(('127.0.0.1', port)):
          break
      assert server.poll() is None and time.monotonic() < end
      time.sleep(0.1)
    if scheme == 's3':  # the other server has the bucket
      open_store('s3://runs').fs.mkdir('runs')
    yield f'{scheme}://runs'
  finally:
    server.kill()
    server.wait()
