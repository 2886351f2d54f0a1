"""The tables of variants and of their options: `python -m cai_jax.feedback.variant_table`.

`docs/variants.md` contains the output, and a test compares them.
"""

import collections
import dataclasses
import inspect
from collections.abc import Iterator

from cai_jax.feedback.chain import Variant
from cai_jax.feedback.config import build_options
from cai_jax.feedback.variants import VARIANTS


def describe_variants() -> str:
  """Return a Markdown table of all variants, and one of their options."""
  lines = ['| Variant | What it does | Turns of a round | Needs |', '|---|---|---|---|']
  for name, variant in sorted(VARIANTS.items()):
    needs = '; '.join(_needs(variant))
    lines.append(f'| `{name}` | {_summary(variant)} | {_turns_of_a_round(name)} | {needs} |')
  lines += ['', '| Variant | Option | Default | Meaning |', '|---|---|---|---|']
  for name, variant in sorted(VARIANTS.items()):
    for field in dataclasses.fields(variant.options) if variant.options else ():
      lines.append(f'| `{name}` | `{field.name}` | `{field.default!r}` | {field.metadata["doc"]} |')
  return '\n'.join(lines) + '\n'


def _turns_of_a_round(name: str) -> str:
  """Return how many turns of each stage a round takes at most, with the default options."""
  plan = VARIANTS[name].plan(1, build_options(name, ()))
  counts = collections.Counter(stage for turn, stage in plan if turn != 'initial')
  return ', '.join(f'{count} × {stage}' for stage, count in counts.items())


def _summary(variant: Variant) -> str:
  """Return the first sentence of the file's docstring."""
  module = inspect.getmodule(variant.chain)
  return (inspect.getdoc(module) or '').partition('\n')[0].rstrip('.')


def _needs(variant: Variant) -> Iterator[str]:
  """Yield what a variant needs besides the models, in words."""
  words = {'donor': 'another harmful prompt', 'constitution': 'the whole constitution'}
  yield from (words[need] for need in sorted(variant.needs))
  fields = (
    {field.name for field in dataclasses.fields(variant.options)} if variant.options else set()
  )
  if 'scorer' in fields:
    yield 'a judge, a reward model, a guard or a scorer, unless the likelihood decides'
  if variant.stages:
    yield 'to choose labels on a server: `logit_bias` and log-probabilities'


if __name__ == '__main__':
  print(describe_variants(), end='')
