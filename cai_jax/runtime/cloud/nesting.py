"""Workdirs in object stores do not contain each other: each keeps all the files below its URL."""

import dataclasses

from cai_jax.runtime.cloud.index import FOLDER, INDEX
from cai_jax.runtime.cloud.store import Store, is_forbidden
from cai_jax.runtime.errors import UserError


def find_outer(store: Store) -> Store | None:
  """Return the workdir that contains a URL, such as the experiment of a run; None without one.

  Folders above the URL that may not be read count as no workdirs.

  Args:
    store: the store of the URL.

  Raises:
    Exception: what the filesystem raises if it cannot be reached.
  """
  url, root = store.url, store.root
  while True:
    url, root = url.rpartition('/')[0], root.rpartition('/')[0]
    if not root or url.endswith('/'):  # above the bucket
      return None
    outer = dataclasses.replace(store, url=url, root=root)
    try:
      outer.entry(INDEX)
    except Exception as error:  # every library has its own exceptions
      if not isinstance(error, FileNotFoundError) and not is_forbidden(error):
        raise
      continue
    return outer


def check_outer(store: Store) -> None:
  """Check that a URL is in no other workdir.

  Args:
    store: the store of the URL.

  Raises:
    UserError: if it is, or the store cannot be reached.
  """
  with store.asking():
    outer = find_outer(store)
  if outer is not None:
    raise UserError(
      f'{store.url} is in the workdir {outer.url}, which keeps all files below its URL. Start the '
      f'command of that workdir, or give a URL outside it. If {outer.url} is no workdir any more, '
      f'delete {outer.url}/{FOLDER}.'
    )
