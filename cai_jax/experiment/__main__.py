"""Run an experiment: `python -m cai_jax.experiment --experiment=FILE --workdir=FOLDER`."""

from cai_jax.experiment.run import main

if __name__ == '__main__':
  main()
