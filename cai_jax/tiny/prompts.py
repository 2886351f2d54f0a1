"""Prompts of the embedded world, in three splits that share no (verb, object, person) triple."""

import hashlib
import json
import random
from collections.abc import Iterator, Sequence

from cai_jax.data.prompt_sources import SOURCES, PromptSource, Row, reject_settings
from cai_jax.data.prompts import Prompt
from cai_jax.runtime.errors import UserError
from cai_jax.tiny import world

KINDS = ('baited', 'benign')

# This many draws in a row find no new prompt only if the split is nearly exhausted.
_MAX_REPEATED_DRAWS = 1000


@SOURCES.register('tiny')
def read_tiny(source: PromptSource, seed: int) -> Iterator[Row]:
  """Yield `source.limit` prompts of the kind `source.name` and the split `source.split`.

  Args:
    source: the settings of the source; `limit` is required.
    seed: the seed of the run.

  Raises:
    UserError: if there is no limit, or another setting is set.
  """
  if source.limit < 1:
    raise UserError("source='tiny' generates its prompts: set limit to their number, at least 1.")
  reject_settings(source, 'subset', 'field', 'shuffle', 'metadata_fields')
  for prompt in make_prompts(source.split, source.limit, seed, source.name):
    row = {'id': prompt.id, 'messages': list(prompt.messages), 'metadata': prompt.metadata}
    yield f'tiny, prompt {prompt.id}', row


def make_prompts(split: str, count: int, seed: int, kind: str = 'baited') -> list[Prompt]:
  """Return different prompts of a split; with a smaller count, the first of the same prompts.

  Args:
    split: 'pretrain', 'train' or 'eval'.
    count: the number of prompts.
    seed: the seed of the draws.
    kind: 'baited' (one or two baits) or 'benign' (none).

  Returns:
    The prompts. The id of a prompt is a hash of its text. Its metadata holds the split, the kind,
    the baits (separated by commas), the verb, the object and the person.

  Raises:
    UserError: if the split or the kind is unknown, or the split has too few different prompts.
  """
  if kind not in KINDS:
    raise UserError(f'Unknown kind of prompt {kind!r}. Choose one of {KINDS}.')
  triples = world.list_triples(split)
  rng = random.Random(f'prompts/{split}/{kind}/{seed}')
  prompts: dict[str, Prompt] = {}
  repeated = 0
  while len(prompts) < count:
    prompt = _draw_prompt(rng, split, kind, triples)
    repeated = repeated + 1 if prompt.id in prompts else 0
    if repeated == _MAX_REPEATED_DRAWS:
      raise UserError(
        f'The split {split!r} has only about {len(prompts)} different {kind} prompts, but {count} '
        'were requested. Ask for fewer.'
      )
    prompts.setdefault(prompt.id, prompt)
  return list(prompts.values())


def _draw_prompt(
  rng: random.Random, split: str, kind: str, triples: Sequence[tuple[str, str, str]]
) -> Prompt:
  num_baits = 0 if kind == 'benign' else rng.choice((1, 2))
  request = world.draw_request(rng, rng.choice(triples), num_baits)
  other_request = world.draw_request(rng, rng.choice(triples), 0)
  messages = world.write_dialogue(rng, request, other_request)
  digest = hashlib.blake2b(json.dumps(messages).encode(), digest_size=8).hexdigest()
  return Prompt(
    id=f'tiny-{split}-{kind}-{digest}',
    messages=tuple(messages),
    metadata={
      'split': split,
      'kind': kind,
      'baits': ','.join(request.baits),
      'verb': request.verb,
      'object': request.object,
      'person': request.person,
    },
  )
