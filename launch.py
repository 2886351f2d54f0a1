"""Run Constitutional AI's supervised phase: generate, train, evaluate, report.

  python launch.py --config=configs/tiny.py --workdir=runs/tiny
  python launch.py --config=configs/tiny.py --workdir=runs/tiny --stages=train,evaluate

A stage that is done is skipped, and an interrupted one resumes. Any field of the config can be set
on the command line, such as --config.train.learning_rate=1e-4. `--help` explains more.
"""

import gc


def main() -> None:
  """Import the program, without garbage collections, which find none and take a second; run it."""
  gc.disable()
  from cai_jax import cli

  gc.enable()
  cli.run()


if __name__ == '__main__':
  main()
