"""Train the embedded model from scratch: `python -m cai_jax.tiny.pretrain`.

A Llama of 0.92 M parameters (0.21 M with `--size=small`) learns the documents of the embedded world
from text alone, without the oracle and without labels. The result is a Hugging Face folder. If the
run is killed, start it again with the same arguments; it resumes from its last checkpoint.

The seed sets the parameters, the documents and their order. These models come with the package:

  name         size    seed   arguments
  tiny         base    0      none: 14 million tokens
  tiny-1       base    1      --seed=1 --tokens=5000000
  tiny-2       base    2      --seed=2 --tokens=5000000
  tiny-small   small   1      --size=small --seed=1 --tokens=5000000
"""

import argparse
import dataclasses
import pathlib
import shutil
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from cai_jax.data import packing
from cai_jax.data.units import Example
from cai_jax.dialogue import Dialogue
from cai_jax.model import lm as lm_lib
from cai_jax.model.config import ModelConfig
from cai_jax.model.transformer import init_params
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.mesh import make_mesh
from cai_jax.runtime.terminal import say
from cai_jax.tiny import corpus, files, tokenizer
from cai_jax.training.config import TrainConfig
from cai_jax.training.loop import fit

BASE = ModelConfig(
  family='llama',
  vocab_size=tokenizer.VOCAB_SIZE,
  d_model=128,
  d_ff=384,
  num_layers=4,
  num_heads=4,
  num_kv_heads=2,
  head_dim=32,
  max_positions=tokenizer.MAX_POSITIONS,
  tied_embeddings=True,
)
# The small model exists to compare model sizes (experiments/model_size.py).
SMALL = dataclasses.replace(BASE, d_model=64, d_ff=192, num_layers=3, head_dim=16)
ARCHITECTURES = {'base': BASE, 'small': SMALL}
# Size and seed → the model of the package that is written without --output.
NAMES = {
  ('base', 0): 'tiny',
  ('base', 1): 'tiny-1',
  ('base', 2): 'tiny-2',
  ('small', 1): 'tiny-small',
}
# The cost of attention grows with the square of a row's length, and most documents are short. On
# two CPU cores, 4,096 tokens a step in rows that fit the documents closely train fastest.
BUCKETS = (packing.Bucket(128, 32), packing.Bucket(384, 11))


def make_examples(
  dialogue: Dialogue, num_tokens: int, seed: int
) -> tuple[list[Example], dict[str, Any]]:
  """Return the first documents of the corpus as training examples, and their counts.

  Documents are rendered as chains are during sampling. Every token except the first is a target.

  Args:
    dialogue: renders the documents.
    num_tokens: total number of tokens after which to stop.
    seed: the seed of the corpus.

  Returns:
    The examples, and the numbers of documents, tokens and dropped documents.
  """
  items, total, index, too_long = [], 0, 0, 0
  while total < num_tokens:
    ids, _ = dialogue.example(corpus.make_document(seed, index))
    index += 1
    if len(ids) > BUCKETS[-1].length:
      too_long += 1
      continue
    items.append(Example(np.asarray(ids, np.int32), np.ones(len(ids), bool)))
    total += len(ids)
  return items, {'documents': len(items), 'tokens': total, 'dropped': {'too_long': too_long}}


def main() -> None:
  """Train the tokenizer and the model, and write the model's folder."""
  args = _parse_arguments()
  architecture = ARCHITECTURES[args.size]
  output = args.output or default_output(args.size, args.seed)
  workdir = args.workdir or output.with_name(output.name + '.train')

  start = time.monotonic()
  trained_tokenizer = tokenizer.train_tokenizer()
  items, counts = make_examples(Dialogue(trained_tokenizer), args.tokens, args.seed)
  say(f'{counts} in {time.monotonic() - start:.0f} s')
  config = TrainConfig(
    loss_normalization='token',
    learning_rate=args.learning_rate,
    warmup=0.03,
    final_share=0.02,
    weight_decay=0.05,
    seed=args.seed,
    log_every=10,
    checkpoint_every=100,
    max_length=BUCKETS[-1].length,
  )
  mesh = make_mesh(devices=jax.devices()[:1])
  params = init_params(architecture, jax.random.key(args.seed))
  identity = f'{architecture} from seed {args.seed}'
  params, summary = fit(architecture, params, items, config, mesh, workdir, BUCKETS, identity)
  say(summary)
  write_model(output, params, trained_tokenizer, mesh, architecture)
  if args.workdir is None:
    shutil.rmtree(workdir)
  say(f'Wrote {output} after {time.monotonic() - start:.0f} s')


def default_output(size: str, seed: int) -> pathlib.Path:
  """Return the folder in the package of the model of a size and a seed.

  Args:
    size: 'base' or 'small'.
    seed: seed of pre-training.

  Raises:
    UserError: if the package has no such model.
  """
  if (size, seed) not in NAMES:
    raise UserError(
      f'The package has no {size} model of seed {seed}, but one for each of {list(NAMES)}. Name '
      'the folder to write with --output.'
    )
  return files.MODELS[NAMES[size, seed]]


def _parse_arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    '--output',
    type=pathlib.Path,
    help='folder to write; default: that of the model of this size and seed in the package',
  )
  parser.add_argument(
    '--size', choices=tuple(ARCHITECTURES), default='base', help='size of the model'
  )
  parser.add_argument('--seed', type=int, default=0, help='seed of parameters and documents')
  parser.add_argument('--tokens', type=int, default=14_000_000, help='tokens of all documents')
  parser.add_argument('--learning_rate', type=float, default=3e-3, help='peak learning rate')
  parser.add_argument(
    '--workdir',
    type=pathlib.Path,
    help='folder of the checkpoints; default: OUTPUT.train, removed at the end',
  )
  return parser.parse_args()


def write_model(
  output: pathlib.Path,
  params: Any,
  trained_tokenizer: PreTrainedTokenizerFast,
  mesh: Mesh,
  config: ModelConfig = BASE,
) -> None:
  """Write a Hugging Face folder.

  Args:
    output: the folder to write.
    params: the parameters of the model.
    trained_tokenizer: the tokenizer of the model.
    mesh: the devices that hold the parameters.
    config: the architecture of the model.
  """
  model = lm_lib.LM(
    config=config,
    params=params,
    tokenizer=trained_tokenizer,
    mesh=mesh,
    dtype='float32',
    name=str(output),
    fingerprint='',  # computed from the files of the folder when it is loaded
    eos_token_ids=(trained_tokenizer.eos_token_id,),
  )
  lm_lib.save(model, output)


if __name__ == '__main__':
  main()
