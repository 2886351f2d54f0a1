"""Files of a run that are published beside a model or a data set."""

import pathlib

import yaml

from cai_jax.publishing.finished_run import FinishedRun
from cai_jax.publishing.names import public_values
from cai_jax.runtime.files import make_folder, write_json

FOLDER = 'run'


def write_run_files(run: FinishedRun, folder: pathlib.Path) -> None:
  """Write the config, the constitution and the evaluation of a run to the subfolder `run`.

  Args:
    run: the run.
    folder: what is published.
  """
  target = make_folder(folder / FOLDER)
  write_json(target / 'config.json', public_values(run.values))
  if run.summary is not None:
    write_json(target / 'summary.json', run.summary)
  if (constitution := run.constitution) is not None:
    content = {
      'principles': [
        {
          'id': p.id,
          'critique_request': p.critique_request,
          'revision_request': p.revision_request,
          **({'comparison_request': p.comparison_request} if p.comparison_request else {}),
          'weight': p.weight,
          'tags': list(p.tags),
        }
        for p in constitution.principles
      ],
      'demonstrations': [list(dialogue) for dialogue in constitution.demonstrations],
    }
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)
    (target / 'constitution.yaml').write_text(text, encoding='utf-8')


def link(source: pathlib.Path, target: pathlib.Path) -> None:
  """Make a symbolic link to a file that is large, in place of a copy.

  Args:
    source: the file.
    target: the link; its folder is created.
  """
  make_folder(target.parent)
  target.symlink_to(source.resolve())
