"""What chains will ask for, without a model: their turns and the lengths of their contexts."""

from collections.abc import Iterator, Mapping

from cai_jax.sampling.prefixes import SharedPrefixes, match_prefix
from cai_jax.sampling.types import Chain, Completion, Turn


def planned_turns(chain: Chain, fillers: Mapping[str, int] | None = None) -> Iterator[Turn]:
  """Yield the turns of a chain on placeholder replies of the maximum length, without a model.

  The chain must not branch on the text of its replies. If a reply is passed to a model with another
  tokenizer, its number of tokens is taken to stay the same.

  Args:
    chain: a new chain, which is run to its end.
    fillers: for each model, the token that placeholder replies consist of. By default, it is the
      last token of the context.
  """
  completion: Completion | None = None
  while True:
    try:
      turn = chain.send(completion)  # type: ignore[arg-type]  # None starts it
    except StopIteration:
      return
    yield turn
    count = turn.sampling.max_tokens
    text = ' a' * count  # encodes to about `count` tokens with any tokenizer
    filler = (fillers or {}).get(turn.model, turn.context[-1])
    completion = Completion([filler] * count, text, [0.0] * count, 'length')


def longest_context(
  chain: Chain,
  prefixes: SharedPrefixes | None = None,
  fillers: Mapping[str, int] | None = None,
) -> dict[str, tuple[int, int]]:
  """Return an upper bound of the context and reply lengths of a chain, without running a model.

  Args:
    chain: a new chain, which is run to its end as by `planned_turns`.
    prefixes: shared prefixes by model.
    fillers: as for `planned_turns`.

  Returns:
    For each model, the number of tokens of the longest context with its reply, and the same number
    without shared prefixes. A slot's cache must hold the latter.
  """
  longest: dict[str, tuple[int, int]] = {}
  for turn in planned_turns(chain, fillers):
    whole, own = longest.get(turn.model, (0, 0))
    needed = len(turn.context) + turn.sampling.max_tokens
    shared = match_prefix((prefixes or {}).get(turn.model, ()), turn.context)[1]
    longest[turn.model] = max(whole, needed), max(own, needed - shared)
  return longest
