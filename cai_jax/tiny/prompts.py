"""Prompts of the embedded world, in three splits that share no (verb, object, person)."""

import hashlib
import json
import random
from collections.abc import Iterator

from cai_jax.data.prompt_sources import SOURCES, PromptSource, Row, reject_settings
from cai_jax.data.prompts import Prompt
from cai_jax.runtime.errors import UserError
from cai_jax.tiny import world

# Of so many draws in a row at least one is new unless the split is nearly used up.
_FRUITLESS_DRAWS = 1000


@SOURCES.register('tiny')
def read_tiny(source: PromptSource, seed: int) -> Iterator[Row]:
  """Yield `source.limit` prompts of the kind `source.name` and the split `source.split`.

  Raises:
    UserError: if there is no limit, or another setting is set.
  """
  if source.limit < 1:
    raise UserError("source='tiny' generates its prompts: set limit to their number, at least 1.")
  reject_settings(source, 'subset', 'field', 'shuffle', 'metadata_fields')
  for prompt in prompts(source.split, source.limit, seed, source.name):
    row = {'id': prompt.id, 'messages': list(prompt.messages), 'metadata': prompt.metadata}
    yield f'tiny, prompt {prompt.id}', row


def prompts(split: str, count: int, seed: int, kind: str = 'baited') -> list[Prompt]:
  """`count` different prompts of a split; the first n of more are the same as n.

  split: 'pretrain', 'train' or 'eval'. kind: 'baited' (one or two baits) or 'benign' (none). The
  id is a hash of the text. The metadata hold the split, the kind, the baits (joined by commas),
  the verb, the object and the person. Raises `ValueError` for an unknown split or kind, and where
  the split holds too few different prompts.
  """
  if kind not in ('baited', 'benign'):
    raise UserError(f"unknown kind of prompt {kind!r}: choose 'baited' or 'benign'")
  triples = world.triples(split)
  rng = random.Random(f'prompts/{split}/{kind}/{seed}')
  found, fruitless = {}, 0
  while len(found) < count:
    prompt = _prompt(rng, split, kind, triples)
    fruitless = fruitless + 1 if prompt.id in found else 0
    if fruitless == _FRUITLESS_DRAWS:
      raise UserError(
        f'{count} different {kind} prompts were asked for, and the split {split!r} gave only '
        f'{len(found)}: ask for fewer'
      )
    found.setdefault(prompt.id, prompt)
  return list(found.values())


def _prompt(rng, split, kind, triples) -> Prompt:
  bait_count = 0 if kind == 'benign' else rng.choice((1, 2))
  wanted = world.request(rng, rng.choice(triples), bait_count)
  earlier = world.request(rng, rng.choice(triples), 0)
  messages = world.dialogue(rng, wanted, earlier)
  digest = hashlib.blake2b(json.dumps(messages).encode(), digest_size=8).hexdigest()
  return Prompt(
    id=f'tiny-{split}-{kind}-{digest}',
    messages=tuple(messages),
    metadata={
      'split': split,
      'kind': kind,
      'baits': ','.join(wanted.baits),
      'verb': wanted.verb,
      'object': wanted.object,
      'person': wanted.person,
    },
  )
