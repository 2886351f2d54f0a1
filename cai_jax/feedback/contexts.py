"""The lengths of contexts, and the prefixes that contexts share."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence

from cai_jax.data.prompts import Prompt
from cai_jax.dialogue import ChatDialogue, Dialogue, Message
from cai_jax.feedback.chain import Stages
from cai_jax.feedback.stage import ChainEnded
from cai_jax.model.lm import LM
from cai_jax.runtime.errors import UserError
from cai_jax.sampling.planning import longest_context
from cai_jax.sampling.prefixes import match_prefix
from cai_jax.sampling.remote import Remote
from cai_jax.sampling.types import Chain

MIN_PREFIX_TOKENS = 32  # a shorter prefix costs more in every attention layer than it saves
RENDERED_PROMPTS = 64  # number of prompts that are rendered to find the shared prefixes

Prefixes = Mapping[str, Sequence[list[int]]]  # for each model, token ids of shared prefixes


def shared_prefixes(
  prompts: Sequence[tuple[Prompt, str]], stages: Stages
) -> dict[str, list[list[int]]]:
  """Return, for each model, the token ids of the prefixes that all contexts of a stage share.

  A shared prefix contains the demonstrations, and the system message if all prompts have the same
  one. The function compares the renderings of only the first prompts. A later context that begins
  differently is computed without a shared prefix.

  Args:
    prompts: (prompt, kind) pairs.
    stages: the stages that render contexts.
  """
  prefixes: dict[str, list[list[int]]] = {}
  for stage in stages.by_name().values():
    contexts = [
      render_prompt(stage.dialogue, prompt, stage.demonstrations, content)
      for prompt, _ in prompts[:RENDERED_PROMPTS]
      for content in ('a', 'B')
    ]
    prefix = list(os.path.commonprefix(contexts))
    of_model = prefixes.setdefault(stage.model, [])
    if len(prefix) >= MIN_PREFIX_TOKENS and prefix not in of_model:
      of_model.append(prefix)
  return prefixes


def render_prompt(
  dialogue: Dialogue | ChatDialogue,
  prompt: Prompt,
  demonstrations: Sequence[Sequence[Message]] = (),
  content: str | None = None,
) -> list[int]:
  """Return the tokens of a prompt x, up to the response.

  Args:
    dialogue: renders the prompt.
    prompt: the prompt.
    demonstrations: few-shot dialogues that precede it.
    content: replaces the content of the last message, if it is given.

  Raises:
    UserError: if the prompt cannot be rendered; the message names its place.
  """
  messages = list(prompt.messages)
  if content is not None:
    messages[-1] = messages[-1] | {'content': content}
  try:
    return dialogue.prompt(messages, 'assistant', demonstrations)
  except UserError as error:
    raise UserError(f'{prompt}: {error}') from error


def cache_length(
  prompts: Sequence[tuple[Prompt, str]],
  stages: Stages,
  models: Mapping[str, LM | Remote],
  prefixes: Prefixes,
  possible_chains: Callable[[Prompt, str], Iterable[Chain]],
) -> int:
  """Return the number of tokens that a slot's cache needs for the longest chain.

  The length is a multiple of 64 if the contexts of the models allow it. Shared prefixes are not
  included. Among prompts whose contexts begin with the same shared prefixes, only the longest is
  tried.

  Args:
    prompts: (prompt, kind) pairs.
    stages: the stages that render contexts.
    models: the models by name.
    prefixes: the shared prefixes of each model.
    possible_chains: returns the chains of a prompt and its kind, such as one for each principle.

  Raises:
    UserError: if a chain can exceed the context of a model.
  """
  fillers = word_tokens(models)
  longest_prompts: dict[tuple, tuple[int, Prompt]] = {}
  for prompt, kind in prompts:
    size = len(render_prompt(stages.initial.dialogue, prompt))
    group = kind, _prefix_lengths(prompt, stages, prefixes)
    if group not in longest_prompts or size > longest_prompts[group][0]:
      longest_prompts[group] = size, prompt
  longest = 1
  for (kind, _), (size, prompt) in longest_prompts.items():
    for chain in possible_chains(prompt, kind):
      try:
        lengths = longest_context(chain, prefixes, fillers)
      except (ChainEnded, UserError) as error:  # placeholder replies end no chain
        raise UserError(f'{prompt}: the chain of this prompt cannot be sampled. {error}') from error
      for name, (needed, without_prefix) in lengths.items():
        if needed > models[name].max_positions:
          raise UserError(
            f'{prompt}: the chain of this prompt can reach {needed} tokens, but '
            f'{models[name].name} holds {models[name].max_positions}. Shorten the prompt ({size} '
            'tokens), lower max_tokens in sampling.*, lower feedback.rounds, or set '
            "feedback.context='fresh'."
          )
        if isinstance(models[name], LM):  # a remote model keeps no cache in this process
          longest = max(longest, without_prefix)
  return min(-(-longest // 64) * 64, smallest_context_limit(models))


def smallest_context_limit(models: Mapping[str, LM | Remote]) -> int:
  """Return the smallest context limit, in tokens, among the models in memory."""
  local = (model for model in models.values() if isinstance(model, LM))
  return min((lm.max_positions for lm in local), default=64)


def _prefix_lengths(prompt: Prompt, stages: Stages, prefixes: Prefixes) -> tuple[int, ...]:
  """Return for each stage the length in tokens of the prefix that a prompt's contexts share."""
  return tuple(
    match_prefix(
      prefixes[stage.model], render_prompt(stage.dialogue, prompt, stage.demonstrations)
    )[1]
    for stage in stages.by_name().values()
    if prefixes[stage.model]
  )


def word_tokens(models: Mapping[str, LM | Remote]) -> dict[str, int]:
  """Return for each model the token of a word, of which placeholder replies can consist.

  Repeated, the word should have as many tokens when its text is encoded again. That of 'a' without
  a space would have fewer with byte-level tokenizers, which merge its letters.

  Args:
    models: the models by name. One whose tokenizer has no letter is left out.
  """
  words = {}
  for name, model in models.items():
    encoded = [model.tokenizer.encode(text, add_special_tokens=False) for text in (' a', 'a')]
    words[name] = next((ids for ids in encoded if len(ids) == 1), encoded[-1])
  return {name: ids[-1] for name, ids in words.items() if ids}
