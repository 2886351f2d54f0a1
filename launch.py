"""Run Constitutional AI's supervised phase: generate, train, evaluate, report.

  python launch.py --config=configs/tiny.py --workdir=runs/tiny
  python launch.py --config=configs/tiny.py --workdir=runs/tiny --stages=train,evaluate

A stage that is done is skipped, and a stage that was killed resumes. Override any field of the
config on the command line, for example --config.train.learning_rate=1e-4.
"""

from cai_jax import cli

if __name__ == '__main__':
  cli.run()
