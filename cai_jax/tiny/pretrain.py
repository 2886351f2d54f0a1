"""Makes the embedded model again: `python -m cai_jax.tiny.pretrain`.

A Llama of 0.92 M parameters (0.22 M with `--size=small`) learns the documents of the embedded world
from first token to last, with nothing but the text: no oracle, no labels. The result is a Hugging
Face folder. A killed run goes on from its last checkpoint when started again with the same
arguments.
"""

import argparse
import dataclasses
import pathlib
import shutil
import time

import jax
import numpy as np

from cai_jax.data import examples, packing
from cai_jax.dialogue import Dialogue
from cai_jax.model import lm as lm_lib
from cai_jax.model.config import ModelConfig
from cai_jax.runtime.mesh import make_mesh
from cai_jax.tiny import corpus, tokenizer
from cai_jax.training import loop
from cai_jax.training.config import TrainConfig

CONFIG = ModelConfig(
  family='llama',
  vocab_size=tokenizer.VOCAB_SIZE,
  d_model=128,
  d_ff=384,
  num_layers=4,
  num_heads=4,
  num_kv_heads=2,
  head_dim=32,
  max_positions=tokenizer.CONTEXT,
  tied_embeddings=True,
)
# The lesser size is there to compare sizes with (experiments/model_size.py).
SMALL = dataclasses.replace(CONFIG, d_model=64, d_ff=192, num_layers=3, head_dim=16)
SIZES = {'base': CONFIG, 'small': SMALL}
# Attention costs a row's length squared, and most documents are short: 4,096 tokens a step in rows
# that fit them closely is the fastest on two cores.
BUCKETS = (packing.Bucket(128, 32), packing.Bucket(384, 11))


def documents(dialogue: Dialogue, tokens: int, seed: int) -> tuple[list[examples.Example], dict]:
  """Documents of the corpus up to `tokens` tokens in all, and how many were kept and dropped.

  A document is rendered as a chain is at sampling. Its every token but the first is a target.
  """
  items, total, index, too_long = [], 0, 0, 0
  while total < tokens:
    ids, _ = dialogue.example(corpus.document(seed, index))
    index += 1
    if len(ids) > BUCKETS[-1].length:
      too_long += 1
      continue
    items.append(examples.Example(np.asarray(ids, np.int32), np.ones(len(ids), bool)))
    total += len(ids)
  return items, {'documents': len(items), 'tokens': total, 'dropped': {'too_long': too_long}}


def main() -> None:
  """Trains the tokenizer and the model and writes the folder."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--output', type=pathlib.Path, help="default: the package's own folder")
  parser.add_argument('--size', choices=tuple(SIZES), default='base', help='of the model')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--tokens', type=int, default=14_000_000, help='of all documents together')
  parser.add_argument('--learning_rate', type=float, default=3e-3)
  parser.add_argument(
    '--workdir', type=pathlib.Path, help='default: OUTPUT.train, removed at the end'
  )
  args = parser.parse_args()
  architecture = SIZES[args.size]
  own = tokenizer.FOLDER if args.size == 'base' else tokenizer.FOLDER.with_name('model_small')
  output = args.output or own
  workdir = args.workdir or output.with_name(output.name + '.train')

  began = time.monotonic()
  words = tokenizer.train()
  items, counts = documents(Dialogue(words), args.tokens, args.seed)
  print(f'{counts} in {time.monotonic() - began:.0f} s', flush=True)
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
  params = lm_lib.init_params(architecture, jax.random.key(args.seed))
  identity = f'{architecture} from seed {args.seed}'
  params, summary = loop.fit(architecture, params, items, config, mesh, workdir, BUCKETS, identity)
  print(summary, flush=True)
  write(output, params, words, mesh, architecture)
  if args.workdir is None:
    shutil.rmtree(workdir)
  print(f'wrote {output} after {time.monotonic() - began:.0f} s', flush=True)


def write(output: pathlib.Path, params, words, mesh, config: ModelConfig = CONFIG) -> None:
  """Writes the Hugging Face folder."""
  model = lm_lib.LM(
    config=config,
    params=params,
    tokenizer=words,
    mesh=mesh,
    dtype='float32',
    name=str(output),
    fingerprint='',  # a folder's is made of its files when it is loaded
    eos_token_ids=(words.eos_token_id,),
  )
  lm_lib.save(model, output)


if __name__ == '__main__':
  main()
