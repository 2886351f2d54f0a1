"""Uploading a folder to the Hugging Face hub, after checking that it can be uploaded."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import huggingface_hub
from huggingface_hub.errors import GatedRepoError, LocalTokenNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from cai_jax.runtime.errors import UserError, show

_ALWAYS_THERE = {'.gitattributes'}  # files of a repository that is otherwise empty


def check_name(repo: str) -> None:
  """Check that a repository can have this name.

  Args:
    repo: the name.

  Raises:
    UserError: if it cannot.
  """
  try:
    validate_repo_id(repo)
    if repo.count('/') != 1:
      raise ValueError('the name of its owner is missing')
  except ValueError as error:
    raise UserError(
      f"--repo={show(repo)} must be 'owner/name', such as 'my-name/my-model': {error}."
    ) from error


def check_repository(
  api: huggingface_hub.HfApi, repo: str, repo_type: str, private: bool, replace: bool
) -> None:
  """Check that the user may upload to a repository, and that nothing would be lost there.

  Args:
    api: the client.
    repo: 'owner/name'.
    repo_type: 'model' or 'dataset'.
    private: whether others must not see it.
    replace: whether the files that it has may be replaced.

  Raises:
    UserError: if there is no token or no network, or the repository is public or has files.
  """
  with _hub_errors('The hub cannot be asked who you are'):
    user = api.whoami()
  owners = {user['name'], *(organization['name'] for organization in user.get('orgs', ()))}
  if (owner := repo.partition('/')[0]) not in owners:
    raise UserError(
      f'--repo={repo}: your token belongs to {user["name"]}, who is not a member of {owner!r}. '
      f'Choose one of {", ".join(sorted(owners))} as owner, or log in with another token.'
    )
  with _hub_errors(f'The hub cannot be asked about {repo}'):
    try:
      info: Any = api.repo_info(repo, repo_type=repo_type)
    except RepositoryNotFoundError:
      return
  if private and not info.private:
    raise UserError(
      f'{repo} exists and is public. Make it private in its settings, or leave --private out.'
    )
  names = sorted({file.rfilename for file in info.siblings or ()} - _ALWAYS_THERE)
  if names and not replace:
    raise UserError(
      f'{repo} has {len(names)} file{"s" if len(names) > 1 else ""} already, such as {names[0]}. '
      'Choose another name, or give --replace: one commit then replaces all of its files, and '
      'earlier versions stay in its history.'
    )


def upload(
  api: huggingface_hub.HfApi,
  folder: pathlib.Path,
  repo: str,
  repo_type: str,
  private: bool,
  message: str,
) -> str:
  """Create a repository if there is none, and make its files those of a folder, in one commit.

  Args:
    api: the client.
    folder: the folder.
    repo: 'owner/name'.
    repo_type: 'model' or 'dataset'.
    private: whether a new repository is private.
    message: the message of the commit.

  Returns:
    The address of the repository.

  Raises:
    UserError: if the hub refuses it, or the network fails. The repository then has its old files;
      a new one is empty.
  """
  with _hub_errors(f'Nothing was uploaded to {repo}'):
    created = api.create_repo(repo, repo_type=repo_type, private=private or None, exist_ok=True)
    api.upload_folder(
      repo_id=repo,
      folder_path=folder,
      repo_type=repo_type,
      commit_message=message,
      delete_patterns='*',
    )
  return str(created)


@contextlib.contextmanager
def _hub_errors(failure: str) -> Iterator[None]:
  """Raise a short error for a missing token, a missing network and a refusal of the hub."""
  try:
    yield
  except UserError:
    raise
  except (LocalTokenNotFoundError, GatedRepoError) as error:
    raise UserError(
      f'{failure}: {type(error).__name__}. Run `hf auth login` with a token that may write, or set '
      'HF_TOKEN.'
    ) from error
  except Exception as error:  # errors of the network and of the hub have no public base class
    status = getattr(getattr(error, 'response', None), 'status_code', None)
    advice = 'Check the network, and start the command again. --out=FOLDER needs no network.'
    if status in (401, 403):
      advice = 'Run `hf auth login` with a token that may write to it.'
    raise UserError(f'{failure} ({type(error).__name__}: {error!s:.300}). {advice}') from error
