"""The command-line program: `launch.py` and the `cai-jax` command both call `run`."""

import contextlib
import dataclasses
import gc
import logging as python_logging
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from cai_jax.pipeline import (
  Run,
  build,
  check_run,
  default_stages,
  import_results,
  rate,
  run_stages,
)
from cai_jax.pipeline.engine_sizes import resolve_engine
from cai_jax.pipeline.plan import describe_plan
from cai_jax.pipeline.preview import preview_run
from cai_jax.pipeline.schema import default_config, describe_unknown
from cai_jax.pipeline.served_plan import describe_served
from cai_jax.pipeline.stage_report import diagnose, read_summary
from cai_jax.publishing import command as publish
from cai_jax.report import summary_table
from cai_jax.runtime import interruption, processes
from cai_jax.runtime.cloud.workdir import resolve_workdir
from cai_jax.runtime.errors import UserError, WaitingError
from cai_jax.runtime.files import describe_fault, read_json
from cai_jax.runtime.interruption import Interrupted
from cai_jax.runtime.settings import flatten
from cai_jax.runtime.terminal import printable, say
from cai_jax.runtime.user_code import explain_error
from cai_jax.runtime.values import describe_type
from cai_jax.serving import command as serve

HELP = """\
Constitutional AI's supervised phase: a model answers prompts, critiques and revises its answers
under the principles of a constitution, and is fine-tuned on the revisions.

  {program} --config=FILE --workdir=FOLDER [--stages=STAGE,...] [--config.FIELD=VALUE ...]
  {program} rate export WORKDIR --out=FOLDER   write a blind rating sheet for people
  {program} rate read WORKDIR SHEET.csv ...    report what they filled in
  {program} import WORKDIR FILE ...            read results of lm-eval and inspect
  {program} serve --model=WORKDIR/model        serve a model to lm-eval, inspect and others
  {program} publish WORKDIR --repo=OWNER/NAME  upload a model or data set to the hub

Stages, in their order; the default is all that the config asks for
  generate   sample responses, critiques and revisions: the dataset D_CAI
  train      fine-tune a model on D_CAI: the aligned model
  label      let a feedback model compare responses, if label.responses is set
  prefer     train a reward model and policies, if reward.data or prefer.data is set
  evaluate   compare the models on held-out prompts
  report     write report.html

A stage that is done is skipped. If a run is interrupted, start the same command again: it resumes.

Flags
  --config      Python file with get_config(), such as configs/tiny.py
  --workdir     folder of the run, or the URL of one in a store, such as s3://bucket/run; it is
                created if it does not exist
  --stages      stages to run, separated by commas
  --preview     number of prompts whose contexts to print as the models will see them, and end
  --dry_run     check the run, print its prompts and the smallest difference they can show, and end
  --profile     number of training steps to profile; the trace is in WORKDIR/profile
  --helpfull    every flag, including those of the libraries

Main settings (docs/configuration.md describes all of them)
  --config.model.base               the model: 'tiny', a checkpoint folder or a Hugging Face name
  --config.constitution.path        the constitution: 'general', 'everyday', or a file
  --config.prompts.harmful.source   prompts whose responses are revised: a .jsonl or .txt file, or a
                                    published set such as 'advbench' (docs/prompts.md)
  --config.prompts.eval_harmful.source   held-out prompts for the evaluation
  --config.feedback.rounds          number of critiques and revisions of each response
  --config.sampling.initial.max_tokens   longest response in tokens; also of critique, revision
  --config.train.learning_rate      peak learning rate
  --config.prefer.data              comparisons to learn, such as 'implied' (docs/preferences.md)
  --config.data.d_cai               train on the D_CAI of another run
  --config.model.aligned            evaluate this checkpoint instead of a trained model
  --config.plugins                  your own Python files with variants, scorers, losses, ...
  --config.seed                     seed of the run

Examples
  {program} --config=configs/tiny.py --workdir=runs/tiny
  {program} --config=configs/tiny.py --workdir=runs/two --config.feedback.rounds=2
  {program} --config=configs/tiny.py --workdir=runs/tiny --stages=generate
  {program} --config=configs/tiny.py --workdir=runs/more --config.data.d_cai=runs/tiny/d_cai
  {program} --config=configs/tiny.py --workdir=runs/other --config.model.aligned=my-model

Read on: README.md, docs/running.md and docs/configuration.md
"""

Log = Callable[[str], None]  # prints a text in process 0, and nothing in the others

# What the program does besides running a config, by its first argument.
COMMANDS: dict[str, Callable[[str, Sequence[str]], None]] = {
  'import': import_results.run_command,
  'publish': publish.run_command,
  'rate': rate.run_command,
  'serve': serve.run_command,
}

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'Python file with get_config(), such as configs/tiny.py', lock_config=True
)
_WORKDIR = flags.DEFINE_string('workdir', None, 'folder of the run, or its URL')
_PROFILE = flags.DEFINE_integer(
  'profile', 0, 'number of training steps to profile, to WORKDIR/profile', lower_bound=0
)
_PREVIEW = flags.DEFINE_integer(
  'preview',
  0,
  'number of prompts whose contexts to print before anything is sampled',
  lower_bound=0,
)
_DRY_RUN = flags.DEFINE_bool(
  'dry_run', False, 'only check the run and print the smallest difference that it can show'
)
_STAGES = flags.DEFINE_list('stages', None, 'stages to run; the default is all that are needed')


@contextlib.contextmanager
def short_errors() -> Iterator[None]:
  """End the program with a short message and an exit status for errors that the user can fix.

  A run that waits for a batch ends with status 75. SIGTERM and SIGINT end it in order, with status
  143 and 130. Every other exception keeps its traceback.
  """
  try:
    with interruption.listen():
      yield
  except WaitingError as error:
    say(str(error), file=sys.stderr)
    sys.exit(error.STATUS)
  except UserError as error:
    _fail(str(error))
  except OSError as error:
    if not (fault := describe_fault(error)):
      raise
    _fail(str(fault))
  except Interrupted as error:
    say(error.describe(), file=sys.stderr)
    sys.exit(error.status)


def _fail(message: str) -> NoReturn:
  """End the program with a message that the terminal shows as it is."""
  sys.exit(printable(f'error: {message}'))


def main(argv: Sequence[str]) -> None:
  """Build the run that the flags describe and run its stages.

  Args:
    argv: the name of the program and the arguments that are not flags; there must be none.
  """
  logging.set_verbosity(logging.WARNING)  # Orbax and TFDS log every step
  python_logging.getLogger('asyncio').setLevel('CRITICAL')  # tasks of Orbax that failed
  with short_errors():
    if len(argv) > 1:
      raise UserError(f'Unexpected arguments: {" ".join(argv[1:])}. Each flag must begin with --.')
    processes.initialize()
    gc.freeze()  # imported modules stay, so collections need not look at them
    workdir = resolve_workdir(_WORKDIR.value or '')
    is_first = jax.process_index() == 0
    log: Log = (lambda text: say(workdir.show(text))) if is_first else lambda text: None
    run = dataclasses.replace(build(_CONFIG.value, workdir.folder), profile=_PROFILE.value)
    stages = default_stages(run) if _STAGES.value is None else _STAGES.value
    if _PREVIEW.value:
      preview_run(run, _PREVIEW.value, log)
    elif _DRY_RUN.value:
      with workdir.look() as folder:
        _describe_run(dataclasses.replace(run, workdir=folder), stages, log)
    else:
      with workdir.open() as stage_ended:
        run_stages(run, stages, log, stage_ended)
        _describe_results(run, stages, log)


def _describe_run(run: Run, stages: Sequence[str], log: Log) -> None:
  """Check a run, and print its prompts, what it can show and what it will cost."""
  check_run(run, stages)
  log(describe_plan(run))
  if served := describe_served(run, stages):
    log(served)
  if note := resolve_engine(run, True)[1]:
    log(note)


def _describe_results(run: Run, stages: Sequence[str], log: Log) -> None:
  """Print the table of a run, the worst finding and where its report is."""
  summary = run.workdir / 'evaluation' / 'summary.json'
  if summary.exists():
    log(f'\n{summary_table(read_summary(summary))}\n')
    log(diagnose(run, read_json(run.workdir / 'manifest.json')).first_line())
  if 'report' in stages:
    log(f'report: {run.workdir / "report.html"}')


def parse(argv: list[str]) -> list[str]:
  """Parse the flags and return the remaining arguments.

  `--help` prints `HELP` and ends the program. A missing flag, a config file that does not exist,
  fails or returns no config, and a field or a value that the config cannot have end it with a short
  message.

  Args:
    argv: the name of the program and its arguments.
  """
  program = _program(argv)
  if {'--help', '-help', '-h'} & {*argv[1:]}:
    say(HELP.format(program=program).rstrip())
    sys.exit(0)
  try:
    remaining = flags.FLAGS(argv)
    _check_required(program, _config_path(argv))
  except Exception as error:  # the config file may raise anything
    explanation = _explain(error, argv)
    if explanation is None:
      raise
    _fail(explanation)
  return remaining


def _program(argv: Sequence[str]) -> str:
  """Return how the program was called."""
  return 'cai-jax' if os.path.basename(argv[0]) == 'cai-jax' else f'python {argv[0]}'


def _explain(error: Exception, argv: Sequence[str]) -> str | None:
  """Return an error in the flags or the config file as a short message; None for a bug."""
  path = _config_path(argv)
  if isinstance(error, AttributeError) and _raised_by_ml_collections(error):
    if error.name == 'get_config':
      return f'{path} does not define get_config().'
  if explanation := explain_error(error, pathlib.Path(path)):
    return explanation
  if _raised_by_ml_collections(error) and (names := _unknown_fields(argv)):
    return describe_unknown(names)
  if isinstance(error, OSError):  # ml_collections raises it for any OSError of the config
    return f'{error}\nGive the path of a config file, such as --config=configs/tiny.py.'
  if not isinstance(error, flags.Error):
    return f'{path}: {error}' if _raised_by_ml_collections(error) else None
  if 'Error whilst parsing config file' in str(error):  # such as a text that it does not take
    cause: BaseException = error
    while cause.__context__ is not None:
      cause = cause.__context__
    return f'{path} cannot be loaded: {cause}.'
  return ' '.join(str(error).split())


def _raised_by_ml_collections(error: Exception) -> bool:
  """Return whether ml_collections raised an error, as it does for a field that does not exist."""
  frame = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][-1]
  return frame.f_globals.get('__name__', '').startswith('ml_collections')


def _unknown_fields(argv: Sequence[str]) -> list[str]:
  """Return the dotted names in arguments `--config.NAME=VALUE` that are no fields."""
  names = [match[1] for argument in argv if (match := re.match(r'--?config\.([^=]+)', argument))]
  fields = set(flatten(default_config().to_dict()))
  sections = {name.rpartition('.')[0] for name in fields}
  return [name for name in names if name not in fields | sections]


def _config_path(argv: Sequence[str]) -> str:
  """Return the path that `--config` gives, without the text after a colon; '' without a path."""
  path = ''
  for argument, following in zip(argv, [*argv[1:], ''], strict=True):
    name, equals, value = argument.partition('=')
    if name in ('--config', '-config'):
      path = value if equals else following
  return path.partition(':')[0]


def _check_required(program: str, path: str) -> None:
  """End the program with a short message if a required flag is missing or there is no config."""
  if _CONFIG.value is not None or path:
    _ = getattr(_CONFIG.value, 'items', None)  # raises OSError if the file could not be loaded
    if path and not isinstance(_CONFIG.value, ConfigDict):
      _fail(
        f'get_config() in {path} returns {describe_type(_CONFIG.value)}. It must return an '
        'ml_collections.ConfigDict, as configs/default.py does.'
      )
  missing = [
    f'--{name}=... ({meaning})'
    for name, value, meaning in (
      ('config', _CONFIG.value, 'a config file, such as configs/tiny.py'),
      ('workdir', _WORKDIR.value, 'the folder of the run'),
    )
    if value is None
  ]
  if missing:
    _fail(
      f'missing {" and ".join(missing)}. For example:\n'
      f'  {program} --config=configs/tiny.py --workdir=runs/tiny\n'
      f'`{program} --help` explains the stages and the main settings.'
    )


def run() -> None:
  """Run the program with the arguments of the process.

  Configs import others from the folder `configs`. `python launch.py` finds it beside launch.py, and
  the `cai-jax` command, which is elsewhere, finds it in the current folder.
  """
  if sys.argv[1:] and (command := COMMANDS.get(sys.argv[1])):
    with short_errors():
      command(f'{_program(sys.argv)} {sys.argv[1]}', sys.argv[2:])
    return
  sys.path.insert(1, os.getcwd())  # after the folder of the program
  app.run(main, flags_parser=parse)
