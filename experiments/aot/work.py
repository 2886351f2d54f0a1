"""FLOPs that a traced program does."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

# Equations whose results are those of the programs in them, one by one.
CALLS = ('jit', 'pjit', 'closed_call', 'checkpoint', 'custom_vjp_call', 'cond', 'shard_map')


def traced_flops(jaxpr: Jaxpr, wanted: Sequence[bool] | None = None) -> float:
  """FLOPs of the matrix products of a program on all devices, each scan in its full length.

  What nothing needs is left out, as compilers do: `wanted` says which results are, None is all. Of
  a conditional the dearest branch counts; a loop whose length is not known counts once. A Pallas
  kernel counts as its own estimate says, or else as if it skipped no block.
  """
  results = zip(jaxpr.outvars, wanted or [True] * len(jaxpr.outvars), strict=True)
  live = {x for x, want in results if want and not isinstance(x, Literal)}
  total = 0.0
  for eqn in reversed(jaxpr.eqns):
    outs = [x in live for x in eqn.outvars]
    if any(outs) or eqn.effects:
      total += _equation_flops(eqn, outs)
      live |= {x for x in eqn.invars if not isinstance(x, Literal)}
  return total


def _equation_flops(eqn: Any, outs: Sequence[bool]) -> float:
  name, params = eqn.primitive.name, eqn.params
  if name == 'dot_general':
    (contracted, _), _ = params['dimension_numbers']
    shape = eqn.invars[0].aval.shape
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
  wanted = outs if name in CALLS else None
  inner = [traced_flops(jaxpr, wanted) for value in params.values() for jaxpr in _jaxprs(value)]
  if name == 'scan':
    return params['length'] * sum(inner)
  if name == 'cond':
    return max(inner)
  if name == 'shard_map':  # shapes within are one device's
    return params['mesh'].size * sum(inner)
  if name == 'pallas_call':
    if params['cost_estimate'] is not None:
      return float(params['cost_estimate'].flops)
    return math.prod(params['grid_mapping'].grid) * sum(inner)
  return sum(inner)


def _jaxprs(value: Any) -> Iterator[Jaxpr]:
  """The programs in a parameter of an equation."""
  if isinstance(value, ClosedJaxpr):
    yield value.jaxpr
  elif isinstance(value, Jaxpr):
    yield value
  elif isinstance(value, list | tuple):
    for part in value:
      yield from _jaxprs(part)
