"""The command `publish`: upload a run's model or data set to the hub, with a card that says how it
was made and what its figures are worth."""

import argparse
import pathlib
import re
import shutil
import tempfile
from collections.abc import Sequence

import huggingface_hub

from cai_jax.publishing.finished_run import read_run
from cai_jax.publishing.hub import check_name, check_repository, upload
from cai_jax.publishing.kinds import KINDS, Request
from cai_jax.publishing.licences import Licence
from cai_jax.runtime.cloud.workdir import refuse_url
from cai_jax.runtime.errors import UserError, show
from cai_jax.runtime.files import make_folder, writing
from cai_jax.runtime.terminal import say


def run_command(program: str, arguments: Sequence[str]) -> None:
  """Run the command.

  Args:
    program: how the command is called, for the help.
    arguments: the arguments after `publish`.

  Raises:
    UserError: if the run has nothing to publish, or the hub does not take it.
  """
  parser = argparse.ArgumentParser(program, description=__doc__, allow_abbrev=False)
  parser.add_argument('run', help='folder of a run')
  parser.add_argument('--repo', required=True, help="name of the repository: 'owner/name'")
  parser.add_argument(
    '--what', choices=sorted(KINDS), default='model', help='what to publish (default: model)'
  )
  parser.add_argument(
    '--out', default='', help='write what would be uploaded to this folder, and upload nothing'
  )
  parser.add_argument(
    '--license', default='', help="identifier of the hub, such as 'apache-2.0' or 'other'"
  )
  parser.add_argument(
    '--language', default='', help="languages of the texts, such as 'en' or 'en,de'"
  )
  parser.add_argument('--private', action='store_true', help='only you can see the repository')
  parser.add_argument(
    '--replace', action='store_true', help='replace the files that the repository has'
  )
  options = parser.parse_args(arguments)
  request = make_request(options.repo, options.license, options.language)
  refuse_url(options.run, 'publish')
  refuse_url(options.out, 'publish --out')
  if options.out:
    folder = write_folder(options.run, options.what, request, options.out)
    say(f'Read {folder / "README.md"}. Without --out, the command uploads these files:')
    for path in sorted(p for p in folder.rglob('*') if p.is_file()):
      say(f'  {path.relative_to(folder)}   {path.stat().st_size:,} bytes')
    return
  address = publish(
    options.run,
    options.what,
    request,
    huggingface_hub.HfApi(),
    private=options.private,
    replace=options.replace,
  )
  say(f'published: {address}')


def make_request(repo: str, licence: str = '', language: str = '') -> Request:
  """Return what the user asks for.

  Args:
    repo: 'owner/name'.
    licence: identifier of a licence on the hub, or ''.
    language: codes of languages, separated by commas, or ''.

  Raises:
    UserError: if a name has another form.
  """
  check_name(repo)
  if licence and not re.fullmatch(r'[a-z0-9][a-z0-9.\-]*', licence):
    raise UserError(
      f"--license={show(licence)} must be an identifier of the hub, such as 'apache-2.0', 'mit', "
      "'cc-by-4.0' or 'other'. https://hf.co/docs/hub/repositories-licenses lists them."
    )
  languages = tuple(language.split(',')) if language else ()
  for code in languages:
    if not re.fullmatch('[a-z]{2,3}', code):
      raise UserError(f"--language={show(language)} must be codes such as 'en' or 'en,de'.")
  return Request(repo, Licence(licence) if licence else None, languages)


def write_folder(run: str, what: str, request: Request, out: str) -> pathlib.Path:
  """Write exactly what would be uploaded, without a network.

  Args:
    run: folder of the run.
    what: a key of `KINDS`.
    request: what the user asks for.
    out: the folder; it must not exist, or be empty.

  Returns:
    The folder.

  Raises:
    UserError: if the run has nothing to publish, or the folder has files.
  """
  target, kind, finished = pathlib.Path(out).expanduser(), KINDS[what], read_run(run)
  kind.check(finished)
  if target.exists() and (not target.is_dir() or any(target.iterdir())):
    raise UserError(f'--out={out} exists already. Give a folder that does not exist yet.')
  make_folder(target.parent)
  licence = kind.find_licence(finished, request)
  with writing(target), tempfile.TemporaryDirectory(dir=target.parent, prefix='.publish-') as name:
    kind.write(finished, request, licence, pathlib.Path(name))
    shutil.copytree(name, target, dirs_exist_ok=True)  # copies what the links point to
  return target


def publish(
  run: str,
  what: str,
  request: Request,
  api: huggingface_hub.HfApi,
  private: bool = False,
  replace: bool = False,
) -> str:
  """Upload what a run has, in one commit. Everything is checked before anything is created.

  Args:
    run: folder of the run.
    what: a key of `KINDS`.
    request: what the user asks for.
    api: the client of the hub.
    private: whether a new repository is private.
    replace: whether the files that the repository has may be replaced.

  Returns:
    The address of the repository.

  Raises:
    UserError: if the run has nothing to publish, its licence is not known, or the hub does not take
      it.
  """
  kind, finished = KINDS[what], read_run(run)
  kind.check(finished)
  licence = kind.find_licence(finished, request)
  if not licence.id:
    raise UserError(
      f'The licence of this {kind.repo_type} is not known. Write the card with --out=FOLDER: it '
      'names the models and prompts that the run has used. Check their licences, and give the one '
      'to publish under, such as --license=apache-2.0.'
    )
  check_repository(api, request.repo, kind.repo_type, private, replace)
  with tempfile.TemporaryDirectory(prefix='publish-') as name:
    folder = pathlib.Path(name)
    kind.write(finished, request, licence, folder)
    say(f'uploading {what} to {request.repo} ...')
    message = f'Publish {what} of a run of cai_jax'
    return upload(api, folder, request.repo, kind.repo_type, private, message)
