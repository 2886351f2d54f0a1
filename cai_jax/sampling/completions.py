"""Sampling replies to a list of prompts, for notebooks and evaluations."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

from cai_jax.dialogue import Dialogue
from cai_jax.model.lm import LM
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.mesh import batch_shards
from cai_jax.sampling.engine import Engine, EngineConfig
from cai_jax.sampling.journal import Journal
from cai_jax.sampling.types import Chain, Completion, SamplingConfig, Turn

Prompt = str | Sequence[dict[str, Any]] | Sequence[int]


def generate(
  lm: LM,
  prompts: Sequence[Prompt],
  sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 (frozen)
  seed: int = 0,
  *,
  style: str = 'chat',
  engine: EngineConfig | None = None,
  journal: Journal | None = None,
) -> list[Completion]:
  """A sampled completion for each prompt, in order.

  A completion is a function of the model, its prompt, `sampling` and `seed`, and, where a prompt
  occurs several times, of how often it came before: repeat a prompt to draw more samples. Between
  lists it is equal to within rounding, and bit for bit where `engine` is given and the longest
  prompts are equally long in blocks of 64.

  Args:
    lm: the model.
    prompts: each a text, continued as it stands; or a dialogue (messages with `role` and
      `content`), answered by the assistant; or token ids, continued.
    sampling: temperature, filters and length.
    seed: of the sampling.
    style: 'chat' or 'plain', how dialogues are rendered.
    engine: sizes of the compiled programs; by default as many slots as prompts, 64 at most.
    journal: where completions are kept and looked up.

  Raises:
    ValueError: if `prompts` is empty, or a prompt and its reply exceed the model's context.
  """
  if isinstance(prompts, str) or not prompts or isinstance(prompts[0], dict | int):
    raise UserError(
      'prompts must be a non-empty list of texts, dialogues or token id lists; a single one goes '
      'into a list too: [prompt].'
    )
  eos = tuple(
    token for token in (*lm.eos_token_ids, lm.tokenizer.eos_token_id) if token is not None
  )
  dialogue, turns = None, []
  for number, prompt in enumerate(prompts):
    ends = eos, ()
    if isinstance(prompt, str):
      context = lm.tokenizer.encode(prompt, split_special_tokens=True)
    elif len(prompt) and isinstance(prompt[0], dict):
      dialogue = dialogue or Dialogue(lm.tokenizer, style, lm.eos_token_ids)
      context, ends = dialogue.prompt(prompt), (dialogue.stop_token_ids, dialogue.stop_strings)
    else:
      context = [int(token) for token in prompt]
    _check(context, number, lm.config.vocab_size)
    turns.append(Turn('completion', context, _ending(sampling, *ends)))
  chains = dict(_named(turns))
  length = max(len(turn.context) for turn in turns) + sampling.max_tokens
  length = min(-(-length // 64) * 64, max(lm.config.max_positions, length))
  batch = batch_shards(lm.mesh)
  engine = engine or EngineConfig(slots=-(-min(len(prompts), 64) // batch) * batch)
  running = Engine({'base': lm}, length=length, seed=seed, config=engine, journal=journal)
  done = dict(running.run(chains.items()))
  return [done[name] for name in chains]


def _check(context: list[int], number: int, vocab_size: int) -> None:
  if not context:
    raise UserError(f'prompt {number} has no token; there is nothing to continue.')
  if not 0 <= min(context) <= max(context) < vocab_size:
    raise UserError(
      f'prompt {number} has token {min(context)} or {max(context)} outside the vocabulary '
      f'0..{vocab_size - 1}.'
    )


def _ending(
  sampling: SamplingConfig, stop_token_ids: tuple[int, ...], stop: tuple[str, ...]
) -> SamplingConfig:
  """`sampling` with further endings."""
  tokens = tuple(dict.fromkeys((*stop_token_ids, *sampling.stop_token_ids)))
  return dataclasses.replace(sampling, stop_token_ids=tokens, stop=(*stop, *sampling.stop))


def _reply(turn: Turn) -> Chain:
  """The chain of a single turn."""
  return (yield turn)


def _named(turns: list[Turn]) -> Iterator[tuple[str, Chain]]:
  """(id, chain) of each turn; the id hashes its context and counts earlier equal ones."""
  seen: dict[str, int] = {}
  for turn in turns:
    content = hashlib.blake2b(json.dumps(turn.context).encode(), digest_size=12).hexdigest()
    seen[content] = seen.get(content, 0) + 1
    yield f'{content}/{seen[content]}', _reply(turn)
