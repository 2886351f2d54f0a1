"""Sample one reply per prompt, for notebooks and evaluations."""

import dataclasses
import hashlib
import json
import numbers
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np

from cai_jax.dialogue import Dialogue
from cai_jax.dialogue.format import TemplateOptions
from cai_jax.dialogue.messages import check_text
from cai_jax.model.lm import LM
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.mesh import batch_shards
from cai_jax.runtime.values import convert
from cai_jax.sampling.auto import resolve_for
from cai_jax.sampling.config import EngineConfig, round_up_length
from cai_jax.sampling.engine import Engine
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
  template_options: TemplateOptions = (),
  engine: EngineConfig | None = None,
  journal: Journal | None = None,
) -> list[Completion]:
  """Sample a completion for each prompt.

  A completion depends only on the model, its prompt, `sampling`, `seed` and, if the prompt occurs
  more than once, the number of earlier occurrences. To draw several samples, repeat a prompt. Other
  prompts in the list change log-probabilities by rounding at most. They change nothing if `engine`
  is given and the length of the longest context, rounded up to a multiple of 64 tokens, stays the
  same.

  Args:
    lm: the model.
    prompts: each is a text to continue, a dialogue that the assistant answers (messages with `role`
      and `content`), or a list of token ids to continue.
    sampling: temperature, filters and length.
    seed: seed of the sampling.
    style: 'chat' (the tokenizer's template) or 'plain'; how dialogues are rendered.
    template_options: (name, value) pairs for the chat template, such as
      ('enable_thinking', False).
    engine: sizes of the compiled programs. By default they suit the model and its devices, and
      there are no more slots than prompts.
    journal: where completions are stored and looked up.

  Returns:
    The completions, in the order of the prompts.

  Raises:
    UserError: if `prompts` is empty or not a list, if thoughts have a budget, or if a prompt is
      invalid or does not fit into the model's context with its reply.
  """
  _check_prompts(prompts)
  if sampling.max_thought_tokens:
    raise UserError(
      f'max_thought_tokens={sampling.max_thought_tokens} is not supported here: thoughts and '
      'answer are sampled as one completion. Set it to 0, and max_tokens to the limit of both.'
    )
  seed = convert(seed, int, 'seed', most=2**63 - 1)
  _check_tokens(sampling.stop_token_ids, 'sampling.stop_token_ids', lm.config.vocab_size)
  turns = _make_turns(lm, prompts, sampling, style, template_options)
  chains = dict(_chains(turns))
  longest = max(len(turn.context) for turn in turns) + sampling.max_tokens
  length = min(round_up_length(longest), max(lm.config.max_positions, longest))
  config = engine or default_sizes(lm, len(prompts))
  results = dict(
    Engine({'base': lm}, length=length, seed=seed, config=config, journal=journal).run(
      chains.items()
    )
  )
  return [results[chain_id] for chain_id in chains]


def default_sizes(lm: LM, prompts: int) -> EngineConfig:
  """Return the sizes that suit a model and its devices, with at most a slot for each prompt.

  Args:
    lm: the model.
    prompts: number of prompts.
  """
  config, shards = resolve_for(EngineConfig(), [lm]), batch_shards(lm.mesh)
  return dataclasses.replace(config, slots=min(config.slots, -(-prompts // shards) * shards))


def _make_turns(
  lm: LM,
  prompts: Sequence[Prompt],
  sampling: SamplingConfig,
  style: str,
  template_options: TemplateOptions,
) -> list[Turn]:
  """Return the turn of each prompt, with the tokens and texts that end its reply."""
  eos = tuple(
    token for token in (*lm.eos_token_ids, lm.tokenizer.eos_token_id) if token is not None
  )
  dialogue, turns = None, []
  for number, prompt in enumerate(prompts):
    stops: tuple[tuple[int, ...], tuple[str, ...]] = eos, ()
    if isinstance(prompt, str):
      check_text(prompt)
      context = lm.tokenizer.encode(prompt, split_special_tokens=True)
    elif len(prompt) and isinstance(prompt[0], dict):
      dialogue = dialogue or Dialogue(lm.tokenizer, style, lm.eos_token_ids, template_options)
      messages = cast(Sequence[dict[str, Any]], prompt)
      context, stops = dialogue.prompt(messages), (dialogue.stop_token_ids, dialogue.stop_strings)
    else:
      context = [int(token) for token in cast(Sequence[int], prompt)]
    if not context:
      raise UserError(f'Prompt {number} has no tokens. Give it at least one to continue from.')
    _check_tokens(context, f'Prompt {number}', lm.config.vocab_size)
    turns.append(Turn('completion', context, _with_stops(sampling, *stops)))
  return turns


def _check_prompts(prompts: Sequence[Prompt]) -> None:
  """Raise UserError unless the prompts are texts, dialogues or lists of token ids."""
  forms = 'texts, dialogues or lists of token ids'
  if not _is_list(prompts) or not len(prompts) or isinstance(prompts[0], dict | numbers.Integral):
    raise UserError(
      f'prompts must be a non-empty list of {forms}. Pass a single prompt as [prompt].'
    )
  for number, prompt in enumerate(prompts):
    if not isinstance(prompt, str) and not (
      _is_list(prompt)
      and any(all(isinstance(part, kind) for part in prompt) for kind in (dict, numbers.Integral))
    ):
      raise UserError(f'Prompt {number} is {prompt!r:.80}. The prompts must be {forms}.')


def _is_list(value: Any) -> bool:
  """Return whether a value is a list, a tuple or an array."""
  return isinstance(value, list | tuple | np.ndarray)


def _check_tokens(tokens: Sequence[int], name: str, vocab_size: int) -> None:
  """Raise UserError if token ids lie outside the vocabulary."""
  if tokens and not 0 <= min(tokens) <= max(tokens) < vocab_size:
    raise UserError(
      f'{name} has token ids from {min(tokens)} to {max(tokens)}, outside the '
      f"vocabulary 0..{vocab_size - 1}. Encode it with the model's tokenizer."
    )


def _with_stops(
  sampling: SamplingConfig, stop_token_ids: tuple[int, ...], stop_texts: tuple[str, ...]
) -> SamplingConfig:
  """Return `sampling` with further stop tokens and stop texts."""
  tokens = tuple(dict.fromkeys((*stop_token_ids, *sampling.stop_token_ids)))
  return dataclasses.replace(sampling, stop_token_ids=tokens, stop=(*stop_texts, *sampling.stop))


def _single_turn(turn: Turn) -> Chain:
  """Yield one turn and return its completion."""
  return (yield turn)


def _chains(turns: list[Turn]) -> Iterator[tuple[str, Chain]]:
  """Yield (id, chain) of each turn. The id hashes the context and numbers repeated contexts."""
  counts: dict[str, int] = {}
  for turn in turns:
    content = hashlib.blake2b(json.dumps(turn.context).encode(), digest_size=12).hexdigest()
    counts[content] = counts.get(content, 0) + 1
    yield f'{content}/{counts[content]}', _single_turn(turn)
