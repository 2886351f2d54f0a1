"""The command-line program: `launch.py` and the `cai-jax` command both call `run`."""

import contextlib
import dataclasses
import json
import signal
import sys
from collections.abc import Iterator, Sequence

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from cai_jax.pipeline import STAGES, build, run_stages
from cai_jax.report import summary_table
from cai_jax.runtime import processes
from cai_jax.runtime.errors import UserError
from cai_jax.training.interruption import Preempted

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'file that states the run', lock_config=True
)
_WORKDIR = flags.DEFINE_string('workdir', None, 'folder of the run')
_PROFILE = flags.DEFINE_integer(
  'profile', 0, 'training steps that a trace is written of, to workdir/profile', lower_bound=0
)
_STAGES = flags.DEFINE_list('stages', list(STAGES), 'stages to run')


@contextlib.contextmanager
def short_errors() -> Iterator[None]:
  """End the program with one line and an exit status for an error that the user can fix.

  Every other exception keeps its traceback.
  """
  try:
    yield
  except UserError as error:
    sys.exit(f'error: {error}')
  except Preempted as ended:
    print(f'SIGTERM: {ended} The same command goes on from here.', file=sys.stderr)
    sys.exit(128 + signal.SIGTERM)
  except KeyboardInterrupt:
    sys.exit('stopped; the same command goes on from here.')


def main(argv: Sequence[str]) -> None:
  """Build the run that the flags describe and run its stages."""
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments {argv[1:]}')
  logging.set_verbosity(logging.WARNING)  # Orbax and TFDS log each of their steps
  with short_errors():
    processes.initialize()
    log = print if jax.process_index() == 0 else lambda text: None
    run = dataclasses.replace(build(_CONFIG.value, _WORKDIR.value), profile=_PROFILE.value)
    run_stages(run, _STAGES.value, log)
    summary = run.workdir / 'evaluation' / 'summary.json'
    if summary.exists():
      log(f'\n{summary_table(json.loads(summary.read_text()))}\n')
    if 'report' in _STAGES.value:
      log(f'report: {run.workdir / "report.html"}')


def parse(argv: list[str]) -> list[str]:
  """Parse the flags and return the remaining arguments.

  An override of a field that the config does not have ends the program with a short message.
  """
  try:
    return app.parse_flags_with_usage(argv)
  except AttributeError as error:  # raised by ml_collections
    reason = ' '.join(str(error.args[0] if error.args else error).split())
    sys.exit(f'error: unknown config field {reason}; configs/default.py lists every field.')


def run() -> None:
  """Run the program with the process's arguments."""
  flags.mark_flags_as_required(['config', 'workdir'])
  app.run(main, flags_parser=parse)
