"""How does the memory of a train step grow with the length of its rows? By the compiler's figures.

Command:   python -m experiments.bench.long_rows --sequence 1 8
Hardware:  any CPU, which counts as 8 devices. About a minute for each number of devices
Method:    compile the train step of a small model for one row in f32, with remat 'full' and the
           kernel 'blocks', from shapes alone. Nothing is run
Prints:    MiB of temporary memory on each device, and how much each doubling of the row multiplies
"""

import argparse
import os

if __name__ == '__main__':  # jax reads these variables when it is imported
  os.environ['JAX_PLATFORMS'] = 'cpu'
  os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=8'

import jax

from cai_jax.model.config import ModelConfig
from cai_jax.runtime.mesh import make_mesh
from cai_jax.training.config import TrainConfig
from experiments.aot.train import Training, shapes_of

LENGTHS = (4096, 8192, 16_384, 32_768)
MODEL = ModelConfig('qwen2', 1024, 256, 512, 2, 8, 2, 32, LENGTHS[-1])


def temporary_bytes(length: int, sequence: int) -> int:
  """Return the temporary memory of a train step on each device, in bytes.

  Args:
    length: number of tokens of the row.
    sequence: number of devices that split it.
  """
  config = TrainConfig(attention='blocks', batch_size=1, max_length=length, remat='full')
  mesh = make_mesh(1, sequence=sequence, devices=jax.devices()[:sequence])
  compiled = shapes_of(Training(MODEL, config, mesh)).trace().lower().compile()
  return compiled.memory_analysis().temp_size_in_bytes


def main() -> None:
  """Compile the steps and print a table."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--sequence', type=int, nargs='+', default=[1, 2, 4, 8])
  print(
    '| devices along sequence | ' + ' | '.join(f'{n:,} tokens' for n in LENGTHS) + ' | growth |'
  )
  print('|---' * (len(LENGTHS) + 2) + '|')
  for sequence in parser.parse_args().sequence:
    sizes = [temporary_bytes(length, sequence) for length in LENGTHS]
    growth = [b / a for a, b in zip(sizes, sizes[1:], strict=False)]
    cells = [f'{size / 2**20:.1f}' for size in sizes]
    cells.append(', '.join(f'{ratio:.2f}' for ratio in growth))
    print(f'| {sequence} | ' + ' | '.join(cells) + ' |', flush=True)


if __name__ == '__main__':
  main()
