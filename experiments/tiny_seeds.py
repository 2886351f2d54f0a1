"""Does the embedded run show Constitutional AI's supervised phase work, and is it the revisions?

Command:   python -m experiments.tiny_seeds --workdir=runs/tiny_seeds
Hardware:  two CPU cores; 4 minutes, 1.4 GB
Arms:      fine-tuning on the last revision, and, as the control, on y_init
Expected:  violations fall with each round and after fine-tuning on revisions, and stay where they
           were after fine-tuning on y_init; answers stay answers. RESULTS.md has the numbers.
"""

import argparse
import json
import pathlib
import shutil

import launch
from cai_jax.manifest import write_json
from configs import tiny

ARMS = {'revision': 'last', 'control': 'initial'}  # train.target of each


def run_arm(workdir: pathlib.Path, seed: int, target: str, journal: pathlib.Path | None) -> dict:
  """The summary of one run; turns that `journal` holds are not sampled again."""
  if journal is not None and not workdir.exists():
    shutil.copytree(journal, workdir / 'journal')
  config = tiny.get_config()
  config.seed, config.train.target = seed, target
  launch.run_stages(launch.build(config, workdir), list(launch.STAGES))
  return json.loads((workdir / 'evaluation' / 'summary.json').read_text())


def rows(results: dict[str, dict[str, dict]]) -> list[str]:
  """A Markdown table: a line for each seed, rates in percent."""
  shown = ['initial', *(f'revision_{n}' for n in range(1, 5))]
  rate = lambda row, name='violation_rate': f'{100 * row[name]:.1f}'  # noqa: E731
  lines = [
    '| seed | y_init → r1 → r2 → r3 → r4 | M_θ → M_aligned | control | answers | '
    'unbaited: breaks a rule | unbaited: answers |',
    '|---|---|---|---|---|---|---|',
  ]
  for seed, arms in results.items():
    run, control = arms['revision'], arms['control']
    models, benign = run['models'], run['benign']
    pair = lambda group, name='violation_rate': (  # noqa: E731
      f'{rate(group["base"], name)} → {rate(group["aligned"], name)}'
    )
    stages = ' → '.join(rate(run['stages'][name]) for name in shown)
    lines.append(
      f'| {seed} | {stages} | {pair(models)} | {rate(control["models"]["aligned"])} | '
      f'{pair(models, "helpful_rate")} | {pair(benign)} | {pair(benign, "helpful_rate")} |'
    )
  return lines


def main() -> None:
  """Runs all arms and prints the table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--workdir', type=pathlib.Path, required=True)
  parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
  args = parser.parse_args()
  results = {}
  for seed in args.seeds:
    journal, results[seed] = None, {}
    for arm, target in ARMS.items():
      workdir = args.workdir / f'{arm}_{seed}'
      results[seed][arm] = run_arm(workdir, seed, target, journal)
      journal = workdir / 'journal'
  write_json(args.workdir / 'results.json', results)
  print('\n'.join(rows(results)))


if __name__ == '__main__':
  main()
