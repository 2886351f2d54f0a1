"""Count the turns and tokens that change with the number of slots, and so with rounding alone.

  python -m experiments.bench.rounding --model=M --workdir=runs/bench
  python -m experiments.bench.rounding --model=FOLDER_OF_A_CHAT_MODEL

Programs for other numbers of slots round the logits differently. The same chains are sampled with
two numbers of slots. Once a chain has a changed token, its later tokens have other contexts, so the
share of draws counts the first change of each chain only.
"""

import argparse
import itertools
import pathlib
import time
from collections.abc import Iterator

import numpy as np

from cai_jax.dialogue import Dialogue
from cai_jax.model import lm as lm_lib
from cai_jax.model.lm import LM
from cai_jax.sampling.config import EngineConfig, round_up_length
from cai_jax.sampling.engine import Engine
from cai_jax.sampling.types import Chain, SamplingConfig, Turn
from experiments.bench.models import SHAPES, model_folder

TASKS = ('Explain', 'Tell a story about', 'List five facts about', 'Write an argument against')
TOPICS = ('the tides', 'a locked door', 'bread', 'chess', 'the first railways', 'honest advice')
REQUESTS = ('Say that again in other words.', 'Now find a flaw in what you said.')
PROMPT = 24  # tokens of a random prompt
REQUEST = 12  # tokens of a random request


def random_chain(vocab: int, number: int, turns: int, sampling: SamplingConfig) -> Chain:
  """Yield turns whose prompts and requests are random tokens; return the replies' tokens."""
  rng = np.random.default_rng(number)
  context, replies = rng.integers(16, vocab, PROMPT).tolist(), []
  for turn in range(turns):
    replies.append((yield Turn(f'turn_{turn}', context, sampling)).tokens)
    context = context + replies[-1] + rng.integers(16, vocab, REQUEST).tolist()
  return replies


def chat_chain(dialogue: Dialogue, number: int, turns: int, sampling: SamplingConfig) -> Chain:
  """Yield turns of a conversation through the model's template; return the replies' tokens."""
  pairs = list(itertools.product(TASKS, TOPICS))
  task, topic = pairs[number % len(pairs)]
  messages, replies = [{'role': 'user', 'content': f'{task} {topic}.'}], []
  for turn in range(turns):
    completion = yield Turn(f'turn_{turn}', dialogue.prompt(messages), sampling)
    replies.append(completion.tokens)
    messages += [
      {'role': 'assistant', 'content': completion.text.strip() or '...'},
      {'role': 'user', 'content': REQUESTS[turn % len(REQUESTS)]},
    ]
  return replies


def make_chains(lm: LM, is_random: bool, count: int, turns: int, sampling: SamplingConfig):
  """Yield (id, chain) pairs."""
  dialogue = None if is_random else Dialogue(lm.tokenizer, 'chat', lm.eos_token_ids)
  for number in range(count):
    if dialogue is None:
      yield str(number), random_chain(lm.vocab_size, number, turns, sampling)
    else:
      yield str(number), chat_chain(dialogue, number, turns, sampling)


def first_change(replies: list[list[int]], others: list[list[int]]) -> Iterator[bool]:
  """Yield for each draw of a chain whether it is another one, up to the first that is."""
  for reply, other in zip(replies, others, strict=True):
    for token, other_token in zip(reply, other, strict=False):
      yield token != other_token
      if token != other_token:
        return


def main() -> None:
  """Sample the chains twice and print what changes."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--model', required=True, help=f'{", ".join(SHAPES)}, or a folder')
  parser.add_argument('--workdir', default='runs/bench', help='folder of random models')
  parser.add_argument('--slots', type=int, nargs=2, default=(8, 64))
  parser.add_argument('--chains', type=int, default=24)
  parser.add_argument('--turns', type=int, default=3)
  parser.add_argument('--tokens', type=int, default=48, help='most tokens of a reply')
  parser.add_argument('--temperature', type=float, default=1.0)
  args = parser.parse_args()
  is_random = args.model in SHAPES
  folder = model_folder(args.model, pathlib.Path(args.workdir)) if is_random else args.model
  lm = lm_lib.load(folder, 'float32')
  sampling = SamplingConfig(temperature=args.temperature, max_tokens=args.tokens)
  length = round_up_length(64 + args.turns * (args.tokens + 32))
  results = []
  for slots in args.slots:
    start = time.perf_counter()
    engine = Engine({'base': lm}, length=length, seed=0, config=EngineConfig(slots=slots))
    chains = make_chains(lm, is_random, args.chains, args.turns, sampling)
    results.append(dict(engine.run(chains)))
    print(f'{slots} slots: {time.perf_counter() - start:.0f} s', flush=True)
  one, two = results
  turns = [a != b for name in one for a, b in zip(one[name], two[name], strict=True)]
  draws = [list(first_change(one[name], two[name])) for name in one]
  changed, total = sum(map(sum, draws)), sum(map(len, draws))
  print(
    f'{args.model}, T = {args.temperature:g}, {args.slots[0]} and {args.slots[1]} slots: '
    f'{sum(turns)} of {len(turns)} turns change ({100 * np.mean(turns):.1f} %), '
    f'in {sum(map(any, draws))} of {len(draws)} chains; '
    f'{changed} of {total} draws ({100 * changed / total:.3f} %)'
  )


if __name__ == '__main__':
  main()
