"""Runs Constitutional AI's supervised phase: generate, train, evaluate, report.

  python launch.py --config=configs/tiny.py --workdir=runs/tiny
  python launch.py --config=configs/tiny.py --workdir=runs/tiny --stages=train,evaluate

A stage that is done is not done again; one that was killed goes on. Any field of the config is
overridden as `--config.train.learning_rate=1e-4`.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import sys
from collections.abc import Iterator, Sequence

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from cai_jax import parallel, pipeline
from cai_jax.manifest import flat
from cai_jax.pipeline import STAGES, Run, run_stages
from cai_jax.report import table
from cai_jax.training import loop
from configs import default

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'file that states the run', lock_config=True
)
_WORKDIR = flags.DEFINE_string('workdir', None, 'folder of the run')
_PROFILE = flags.DEFINE_integer(
  'profile', 0, 'training steps that a trace is written of, to workdir/profile', lower_bound=0
)
_STAGES = flags.DEFINE_list('stages', list(STAGES), 'stages to run')


def build(
  config: ConfigDict, workdir: str | os.PathLike, journal: pathlib.Path | None = None
) -> Run:
  """The run of a config, as `cai_jax.pipeline.build`, of fields that configs/default.py has.

  Raises:
    ValueError: for a field that it does not have, and for whatever is wrong with the config.
  """
  unknown = sorted(set(flat(config.to_dict())) - set(flat(default.get_config().to_dict())))
  if unknown:
    raise ValueError(
      f'unknown config field {", ".join(unknown)}; configs/default.py lists every field.'
    )
  return pipeline.build(config, workdir, journal)


@contextlib.contextmanager
def exits() -> Iterator[None]:
  """Ends the program with a line and a status, and no traceback, where a run could not go on."""
  try:
    yield
  except (ValueError, FloatingPointError, ConnectionError) as error:
    sys.exit(f'error: {error}')
  except loop.Preempted as ended:
    print(f'SIGTERM: {ended} The same command goes on from here.', file=sys.stderr)
    sys.exit(128 + signal.SIGTERM)
  except KeyboardInterrupt:
    sys.exit('stopped; the same command goes on from here.')


def main(argv: Sequence[str]) -> None:
  """Builds the run that the flags state and runs its stages."""
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments {argv[1:]}')
  logging.set_verbosity(logging.WARNING)  # Orbax and TFDS tell every step of theirs
  parallel.initialize()
  say = print if jax.process_index() == 0 else lambda text: None
  with exits():
    run = dataclasses.replace(build(_CONFIG.value, _WORKDIR.value), profile=_PROFILE.value)
    run_stages(run, _STAGES.value, say)
  summary = run.workdir / 'evaluation' / 'summary.json'
  if summary.exists():
    say(f'\n{table(json.loads(summary.read_text()))}\n')
  if 'report' in _STAGES.value:
    say(f'report: {run.workdir / "report.html"}')


def parse(argv: list[str]) -> list[str]:
  """What is left of the arguments after the flags; a field that no config has ends the program."""
  try:
    return app.parse_flags_with_usage(argv)
  except AttributeError as error:  # ml_collections' word for it
    told = ' '.join(str(error.args[0] if error.args else error).split())
    sys.exit(f'error: unknown config field {told}; configs/default.py lists every field.')


if __name__ == '__main__':
  flags.mark_flags_as_required(['config', 'workdir'])
  app.run(main, flags_parser=parse)
