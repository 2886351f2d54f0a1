"""What can be wrong with the models of an engine."""

from collections.abc import Iterable, Mapping

from cai_jax.model.lm import LM
from cai_jax.runtime.errors import UserError
from cai_jax.sampling.prefixes import SharedPrefixes
from cai_jax.sampling.remote import Remote


def check_models(
  models: Mapping[str, LM | Remote],
  length: int,
  stops: Iterable[str],
  prefixes: SharedPrefixes,
) -> None:
  """Check that the models exist, and that caches and prefixes fit into their contexts.

  Args:
    models: models by name.
    length: number of tokens of a slot's cache.
    stops: names of the models that have stop tokens or stop texts.
    prefixes: token ids of the shared prefixes of each model.

  Raises:
    UserError: if the cache is longer than a context.
    ValueError: if there is no such model, or a prefix does not fit.
  """
  for model in models.values():
    if isinstance(model, LM) and length > model.max_positions:
      raise UserError(
        f'A cache of {length} tokens is longer than the {model.max_positions} positions of '
        f'{model.name}. Shorten prompts, max_tokens or the number of rounds.'
      )
  for name in (*prefixes, *stops):
    if name not in models:
      raise ValueError(
        f'prefixes or stops are given for {name!r}; the models are {", ".join(models)}.'
      )
  for name, model_prefixes in prefixes.items():
    limit = models[name].max_positions
    for prefix in model_prefixes:
      if not 0 < len(prefix) < limit:
        raise ValueError(
          f'a shared prefix of {name!r} has {len(prefix)} tokens; it must have at least one and '
          f'fewer than the {limit} of the context.'
        )
