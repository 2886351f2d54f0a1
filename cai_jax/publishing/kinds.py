"""What can be published of a run, registered by the name that `--what` takes."""

import pathlib
from collections.abc import Callable
from typing import NamedTuple

from cai_jax.publishing.finished_run import FinishedRun
from cai_jax.publishing.licences import Licence
from cai_jax.runtime.registry import Registry


class Request(NamedTuple):
  """What the user asks for.

  Attributes:
    repo: 'owner/name' on the hub.
    licence: the licence to publish under; None leaves it to the kind.
    languages: codes of the languages of the texts, such as 'en'.
  """

  repo: str
  licence: Licence | None = None
  languages: tuple[str, ...] = ()


class Kind(NamedTuple):
  """Something that can be published.

  Attributes:
    repo_type: 'model' or 'dataset'.
    check: raises UserError unless a run has it, complete and unchanged.
    find_licence: (run, request) → the licence to publish under; its id is '' if it is not known.
    write: (run, request, licence, folder) writes its files and README.md. Large files may be
      symbolic links.
  """

  repo_type: str
  check: Callable[[FinishedRun], None]
  find_licence: Callable[[FinishedRun, Request], Licence]
  write: Callable[[FinishedRun, Request, Licence, pathlib.Path], None]


KINDS: Registry[Kind] = Registry('thing to publish')
