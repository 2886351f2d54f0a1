"""An object store behind a URL, such as s3://bucket/run: its files, and how they are moved.

Every scheme that fsspec knows works if its package is installed. fsspec finds credentials and
endpoints as the programs of the store do (`aws`, `gcloud`), so no setting of a run holds them.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import os
import pathlib
import re
import uuid
from collections.abc import Iterator
from typing import Any, NamedTuple

import fsspec

from cai_jax.runtime.errors import UserError

_URL = re.compile(r'([a-zA-Z][a-zA-Z0-9+.-]+)://')
_LOCAL = ('file', 'local')


class _Provider(NamedTuple):
  """What a user has to do for a kind of store.

  Attributes:
    package: the package that fsspec needs.
    login: how to give credentials, as a sentence without its full stop.
  """

  package: str
  login: str


_S3 = _Provider(
  's3fs', 'Run `aws configure`, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE'
)
_GCS = _Provider(
  'gcsfs',
  'Run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS to a file',
)
_HUB = _Provider('huggingface_hub', 'Run `hf auth login`, or set HF_TOKEN')
PROVIDERS = {'hf': _HUB, 's3': _S3, 's3a': _S3, 'gs': _GCS, 'gcs': _GCS}


class Entry(NamedTuple):
  """An object of a store.

  Attributes:
    size: number of bytes.
    version: changes whenever the object is written with another content; '' if the store does not
      say when that is.
  """

  size: int
  version: str


def is_url(path: str | os.PathLike) -> bool:
  """Return whether a path is the URL of a store, such as s3://bucket/run, and no local path.

  Args:
    path: a path, a URL, or text that only may be one.
  """
  return bool(_URL.match(str(path)))


def split_url(url: str | os.PathLike) -> tuple[str, str]:
  """Return the scheme of a URL, and the URL without slashes at its end."""
  text = str(url)
  match = _URL.match(text)
  if not match:
    raise UserError(f'{text} is not a URL. Write it like s3://bucket/folder.')
  scheme, rest = match[1].lower(), text[match.end() :].rstrip('/')
  return scheme, f'{scheme}://{rest}'


@dataclasses.dataclass(frozen=True)
class Store:
  """The objects below a URL. Names are relative to it, with slashes; '' is the URL's own object.

  Methods raise what the filesystem raises; wrap calls in `asking` to turn that into a message.

  Attributes:
    url: the URL, without a slash at its end.
    fs: fsspec's filesystem.
    root: the path of the URL in it.
  """

  url: str
  fs: Any
  root: str

  def path(self, name: str) -> str:
    """Return the path of an object in `fs`."""
    return f'{self.root}/{name}' if name else self.root

  def list(self, folder: str = '') -> dict[str, Entry]:
    """Return all objects below a folder, by name; nothing if there is no such folder."""
    self.fs.invalidate_cache()
    found = self.fs.find(self.path(folder), detail=True)
    return {
      path.removeprefix(self.root).lstrip('/'): _entry(info)
      for path, info in found.items()
      if not (path.endswith('/') and not info.get('size'))  # what consoles make for a folder
    }

  def entry(self, name: str) -> Entry:
    """Return one object.

    Raises:
      FileNotFoundError: if it does not exist.
    """
    self.fs.invalidate_cache()
    return _entry(self.fs.info(self.path(name)))

  def modified(self, name: str) -> datetime.datetime:
    """Return when an object was written last, by the clock of the store.

    Raises:
      FileNotFoundError: if it does not exist.
    """
    self.fs.invalidate_cache()
    time = self.fs.modified(self.path(name))
    return time if time.tzinfo else time.replace(tzinfo=datetime.UTC)

  def read(self, name: str) -> bytes:
    """Return the content of an object.

    Raises:
      FileNotFoundError: if it does not exist.
    """
    return self.fs.cat_file(self.path(name))

  def write(self, name: str, content: bytes) -> Entry:
    """Write an object as a whole: a reader sees the old one or the new one.

    Raises:
      OSError: if the object has another size afterwards.
    """
    self.fs.pipe_file(self.path(name), content)
    return self._check_size(name, len(content), len(content))

  def create(self, name: str, content: bytes) -> None:
    """Write an object that must not exist; of several writers, one succeeds.

    Raises:
      FileExistsError: if it exists.
    """
    try:
      self.fs.pipe_file(self.path(name), content, mode='create')
    except Exception as error:
      if _is_conflict(error):
        raise FileExistsError(f'{self.url}/{name} exists') from error
      raise

  def upload(self, name: str, source: pathlib.Path) -> Entry:
    """Write the content of a local file to an object, as a whole. The file may grow meanwhile.

    Raises:
      OSError: if the object has another size afterwards.
    """
    before = source.stat().st_size
    self.fs.put_file(str(source), self.path(name))
    return self._check_size(name, before, source.stat().st_size)

  def _check_size(self, name: str, least: int, most: int) -> Entry:
    """Return an object, after a check that all bytes arrived.

    gcsfs 2026.10 sends small objects between marks of a fixed text, and one that contains this text
    is cut there.
    """
    entry = self.entry(name)
    if not least <= entry.size <= most:
      raise OSError(f'{self.url}/{name} has {entry.size} bytes, and {least} were sent')
    return entry

  def download(self, name: str, target: str | os.PathLike) -> None:
    """Write an object to a local file, which replaces an older one only when it is complete.

    Args:
      name: the object.
      target: the file; its folder is created if necessary.
    """
    target = pathlib.Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f'.{target.name}.tmp')
    try:
      self.fs.get_file(self.path(name), str(temporary))
      os.replace(temporary, target)
    except BaseException:
      temporary.unlink(missing_ok=True)
      raise

  def delete(self, name: str) -> None:
    """Delete an object; it is no error if there is none."""
    with contextlib.suppress(FileNotFoundError):
      self.fs.rm_file(self.path(name))

  @contextlib.contextmanager
  def asking(self) -> Iterator[None]:
    """Raise a UserError that says what to do if the block's calls of the store fail."""
    try:
      yield
    except UserError:
      raise
    except Exception as error:  # every library has its own exceptions
      raise UserError(explain(self.url, error)) from error


def open_store(url: str | os.PathLike) -> Store:
  """Return the store of a URL. Nothing is read or written yet.

  Args:
    url: the URL of a folder or an object.

  Raises:
    UserError: if fsspec does not know the scheme, its package is missing, or it names no bucket.
  """
  scheme, text = split_url(url)
  if scheme in _LOCAL:
    raise UserError(f'{url} is a local folder. Give its path, without {scheme}://.')
  provider = PROVIDERS.get(scheme)
  try:
    # Instances are shared by default, and would show listings of an earlier moment.
    fs = fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False)
  except ImportError as error:
    extra = provider and f"`pip install 'cai_jax[cloud]'` (it needs {provider.package})"
    raise UserError(
      f'{url} needs a package that is not installed: {error}. Run '
      f'{extra or "pip install with the name of that package"}.'
    ) from error
  except ValueError as error:
    raise UserError(
      f'{url}: there is no store for {scheme}:// ({error}). Use s3://, gs://, or another scheme '
      'that fsspec knows.'
    ) from error
  except Exception as error:  # such as credentials that cannot be read
    raise UserError(explain(str(url), error)) from error
  root = fs._strip_protocol(text).rstrip('/')
  if text == f'{scheme}://' or not root:
    raise UserError(f'{url} names no bucket. Write it like {scheme}://bucket/folder.')
  return Store(text, fs, root)


def check_writable(store: Store) -> None:
  """Check that objects can be written, created only once, and deleted; none is left behind.

  Args:
    store: the store.

  Raises:
    UserError: if it cannot be reached, lacks permission, or creates an object twice, so that it
      could not lock a folder.
  """
  name = f'.probe.{uuid.uuid4().hex}'
  # fsspec's own `pipe_file` looks whether an object exists, and then writes it.
  is_own = type(store.fs).pipe_file is fsspec.AbstractFileSystem.pipe_file
  is_atomic = hasattr(store.fs, '_pipe_file') or not is_own
  with store.asking():
    store.create(name, b'probe')
    try:
      store.create(name, b'probe')
    except FileExistsError:
      if is_atomic:
        return
    finally:
      store.delete(name)
  raise UserError(
    f'{store.url} is in a store that does not support conditional writes, so two jobs could write '
    'to it at once. Use a store that does, such as Amazon S3 or Google Cloud Storage, or a local '
    'folder.'
  )


def explain(url: str, error: BaseException) -> str:
  """Return what is wrong with a store and what to do, as an error message.

  Args:
    url: its URL.
    error: what a call of the store raised.
  """
  scheme, _ = split_url(url)
  provider = PROVIDERS.get(scheme)
  login = provider.login if provider else 'Give credentials as the package of the store expects'
  text = ' '.join(str(error).split()) or type(error).__name__
  words = _words(error)
  pattern = rf'credential|anonymous|unauthorized|{_code(401)}|invalid_grant|token has expired'
  if re.search(pattern, words):
    return f'{url} cannot be used, because there are no valid credentials: {text}. {login}.'
  if is_forbidden(error):
    return (
      f'{url} cannot be used: permission denied ({text}). Ask for the right to list, read, write '
      f'and delete objects there, or use other credentials: {login[0].lower()}{login[1:]}.'
    )
  if isinstance(error, FileNotFoundError) or 'nosuchbucket' in words:
    return (
      f'{url} cannot be used: it does not exist ({text}). Create the bucket, or correct the URL.'
    )
  return f'{url} cannot be reached: {type(error).__name__}: {text}. Check the network and the URL.'


def is_forbidden(error: BaseException) -> bool:
  """Return whether an error says that the credentials lack a right, as each store does in its way.

  Args:
    error: what a call of the store raised.
  """
  pattern = rf'forbidden|{_code(403)}|permission|access ?denied'
  return isinstance(error, PermissionError) or re.search(pattern, _words(error)) is not None


def _code(status: int) -> str:
  """Return a pattern of a status code of HTTP that stands alone, and is no part of a path."""
  return rf'(?<![\w/.-]){status}(?![\w/.-])'


def _words(error: BaseException) -> str:
  """Return the name and the text of an error in lower case, on one line."""
  return f'{type(error).__name__} {" ".join(str(error).split())}'.lower()


def _entry(info: dict[str, Any]) -> Entry:
  """Return an object as a filesystem of fsspec describes it; each has its own fields."""
  names = ('ETag', 'etag', 'generation', 'blob_id', 'LastModified', 'updated', 'mtime', 'created')
  version: Any = next((info[name] for name in names if info.get(name)), '')
  if isinstance(version, datetime.datetime):  # a listing may have the same time as a number
    version = version.timestamp()
  digest = hashlib.sha256(str(version).encode()).hexdigest()[:16] if version else ''
  return Entry(int(info['size']), digest)


def _is_conflict(error: BaseException) -> bool:
  """Return whether an error says that an object exists already.

  gcsfs and fsspec raise FileExistsError; s3fs raises an OSError for the code PreconditionFailed
  (412), or ConditionalRequestConflict (409) if two writers are at it.
  """
  if isinstance(error, FileExistsError):
    return True
  response = getattr(error.__cause__, 'response', None) or {}
  code = str(response.get('Error', {}).get('Code', ''))
  return code in ('PreconditionFailed', 'ConditionalRequestConflict', '412', '409')
