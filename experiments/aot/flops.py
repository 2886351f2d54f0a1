"""Count the FLOPs of a traced program."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

# Primitives whose results are, one by one, the results of the programs inside them.
CALLS = ('jit', 'pjit', 'closed_call', 'checkpoint', 'custom_vjp_call', 'cond', 'shard_map')


def traced_flops(jaxpr: Jaxpr, needed: Sequence[bool] | None = None) -> float:
  """Return the FLOPs of a program's matrix products, summed over all devices.

  Like a compiler, this skips dead code. A scan counts with its full length, a conditional with its
  most expensive branch, and a loop of unknown length with one iteration. A Pallas kernel counts
  with its own estimate, or else as if it skipped no block. A product by groups counts with all rows
  of each device, also with those whose experts other devices have.

  Args:
    jaxpr: the program.
    needed: which of its results are used; by default all.
  """
  results = zip(jaxpr.outvars, needed or [True] * len(jaxpr.outvars), strict=True)
  live = {x for x, is_needed in results if is_needed and not isinstance(x, Literal)}
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
  if name == 'ragged_dot_general':  # each row meets one group, or adds to one group's matrix
    return 2.0 * math.prod(eqn.invars[0].aval.shape) * eqn.outvars[0].aval.shape[-1]
  needed = outs if name in CALLS else None
  inner = [traced_flops(jaxpr, needed) for value in params.values() for jaxpr in _jaxprs(value)]
  if name == 'scan':
    return params['length'] * sum(inner)
  if name == 'cond':
    return max(inner)
  if name == 'shard_map':  # the shapes inside are those of one device
    return params['mesh'].size * sum(inner)
  if name == 'pallas_call':
    if params['cost_estimate'] is not None:
      return float(params['cost_estimate'].flops)
    return math.prod(params['grid_mapping'].grid) * sum(inner)
  return sum(inner)


def _jaxprs(value: Any) -> Iterator[Jaxpr]:
  """Yield the programs inside a parameter of an equation."""
  if isinstance(value, ClosedJaxpr):
    yield value.jaxpr
  elif isinstance(value, Jaxpr):
    yield value
  elif isinstance(value, list | tuple):
    for part in value:
      yield from _jaxprs(part)
