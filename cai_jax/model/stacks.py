"""Layers of the same form, with their parameters in stacks, for `jax.lax.scan`.

A program that contains every layer grows with the depth of the model, and so does the time to
compile it. Most models repeat a short pattern, such as five layers with a window and one without. A
scan compiles the pattern once and runs it with the parameters of each repetition in turn.

Parameters of separate layers are under `layers/NUMBER`. Stacked ones are under `stacks/NUMBER`,
where each array has a first axis for the layers of the stack.
"""

import dataclasses
import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from cai_jax.model.attention.rotary import rotation_of
from cai_jax.model.config import ModelConfig
from cai_jax.model.experts import Routing

LAYERS, STACKS = 'layers', 'stacks'  # keys in a tree of parameters


class Run(NamedTuple):
  """Consecutive layers that repeat a pattern.

  Attributes:
    first: number of the first layer.
    period: number of layers of the pattern.
    repeats: how often it is repeated; 1 for a layer that is like none of its neighbours.
  """

  first: int
  period: int
  repeats: int

  @property
  def stacks(self) -> Iterable[range]:
    """The numbers of the layers of each stack: those with the same place in the pattern."""
    end = self.first + self.period * self.repeats
    return (range(self.first + i, end, self.period) for i in range(self.period))


@dataclasses.dataclass(frozen=True)
class Layout:
  """How the layers of a model are divided into stacks.

  Attributes:
    runs: the runs of layers, in order; an empty tuple leaves all layers separate.
  """

  runs: tuple[Run, ...] = ()

  @property
  def stacks(self) -> list[range]:
    """The numbers of the layers of each stack."""
    return [layers for run in self.runs for layers in run.stacks]

  def stack(self, tree: Any) -> Any:
    """Return a tree with stacked layers, in the order of the layers.

    Args:
      tree: a pytree of arrays that contains trees of parameters, such as an optimizer's state. Of
        the layers of a stack, all or none may have parameters; adapters are an example.
    """
    return self._convert(tree, LAYERS, self._stack_layers)

  def unstack(self, tree: Any) -> Any:
    """Return a tree with separate layers; the inverse of `stack`.

    Args:
      tree: a pytree of arrays in the form that `stack` returns.
    """
    return self._convert(tree, STACKS, self._unstack_layers)

  def _convert(self, tree: Any, key: str, convert: Callable[[Any], Any]) -> Any:
    if not self.runs:
      return tree
    has_key = lambda x: isinstance(x, dict) and key in x  # noqa: E731
    return jax.tree.map(lambda x: convert(x) if has_key(x) else x, tree, is_leaf=has_key)

  def _stack_layers(self, params: dict[str, Any]) -> dict[str, Any]:
    rest, layers = dict(params), params[LAYERS]
    del rest[LAYERS]
    stacks = {
      number: jax.tree.map(_join, *(layers[i] for i in numbers))
      for number, numbers in enumerate(self.stacks)
      if numbers[0] in layers
    }
    return rest | {STACKS: stacks}

  def _unstack_layers(self, params: dict[str, Any]) -> dict[str, Any]:
    rest, stacks = dict(params), params[STACKS]
    del rest[STACKS]
    layers = {}
    for number, numbers in enumerate(self.stacks):
      if number in stacks:
        arrays, structure = jax.tree.flatten(stacks[number])
        for layer, *own in zip(numbers, *map(_split, arrays), strict=True):
          layers[layer] = jax.tree.unflatten(structure, own)
    return rest | {LAYERS: dict(sorted(layers.items()))}


# Compiled once for each shape, so that states can be converted outside of compiled programs, one
# array at a time.
@jax.jit
def _join(*arrays: jax.Array) -> jax.Array:
  return jnp.stack(arrays)


@jax.jit
def _split(stack: jax.Array) -> tuple[jax.Array, ...]:
  return jnp.unstack(stack)


SEPARATE = Layout()


def find_runs(forms: Sequence[Hashable]) -> tuple[Run, ...]:
  """Divide layers into runs. From each layer on, the run that covers most layers is taken.

  Args:
    forms: what each layer is; layers of the same form are equal here.
  """
  runs: list[Run] = []
  first = 0
  while first < len(forms):
    periods = range(1, (len(forms) - first) // 2 + 1)
    repeated = [Run(first, period, _repeats(forms[first:], period)) for period in periods]
    # Of several that cover as many layers, `max` returns the first, which has the shortest period.
    found = [run for run in repeated if run.repeats > 1]
    run = max(found, key=lambda run: run.period * run.repeats, default=Run(first, 1, 1))
    runs.append(run)
    first += run.period * run.repeats
  return tuple(runs)


def _repeats(forms: Sequence[Hashable], period: int) -> int:
  """Return how often the first `period` forms stand one after the other at the beginning."""
  equal = (forms[i] == forms[i % period] for i in range(len(forms)))
  return sum(1 for _ in itertools.takewhile(bool, equal)) // period


def scanned_layout(config: ModelConfig, params: dict[str, Any]) -> Layout:
  """Return the layout in which every layer is in a stack.

  Args:
    config: the shape of the model.
    params: its parameters or their ShapeDtypeStructs. Those of layers of a stack have equal paths
      and shapes, so layers with and without adapters are in different stacks.
  """

  def form(layer: int) -> Hashable:
    leaves, structure = jax.tree.flatten(params[LAYERS][layer])
    shapes = tuple((x.shape, x.dtype) for x in leaves)
    return config.kind(layer), rotation_of(config, layer), structure, shapes

  return Layout(find_runs([form(layer) for layer in range(config.num_layers)]))


# How a training program contains the layers → a function that returns the layout.
LAYOUTS: dict[str, Callable[[ModelConfig, dict[str, Any]], Layout]] = {
  'unrolled': lambda config, params: SEPARATE,
  'scan': scanned_layout,
}


def arrange_layers(
  name: str, config: ModelConfig, graph: nnx.GraphDef, params: dict[str, Any]
) -> tuple[nnx.GraphDef, Layout]:
  """Return the graph of a model whose layers are in stacks, and their layout.

  `nnx.merge` of the graph and parameters that `Layout.stack` returns is the model.

  Args:
    name: a key of `LAYOUTS`.
    config: the shape of the model.
    graph: static half of the model with separate layers.
    params: its parameters or their ShapeDtypeStructs, adapters included.
  """
  layout = LAYOUTS[name](config, params)
  if not layout.runs:
    return graph, layout
  model = nnx.merge(graph, params)
  model.stacks = nnx.List([model.layers[numbers[0]] for numbers in layout.stacks])
  model.layers, model.layout = nnx.List([]), layout
  return nnx.split(model)[0], layout


def scan_layers(
  layout: Layout,
  stacks: Iterable[nnx.Module],
  apply: Callable[[Any, jax.Array, int, bool], tuple[jax.Array, Routing | None]],
  x: jax.Array,
) -> tuple[jax.Array, list[Routing]]:
  """Apply the layers of a model one after the other, those of a run by a scan.

  Args:
    layout: how layers are divided into stacks.
    stacks: a layer for each stack, with stacked parameters.
    apply: function from (layer, x, number of a layer of the same form, whether it is in a loop) to
      the next x and the layer's routing.
    x: the input of the first layer.

  Returns:
    The result of the last layer; and the routing of layers of experts in the order of layers, with
    a first axis for the layers of a run.
  """
  left, routings = iter(stacks), []
  for run in layout.runs:
    graphs, states = zip(
      *(nnx.split(layer) for layer in itertools.islice(left, run.period)), strict=True
    )

    def pattern(x, params, run=run, graphs=graphs):
      outs = []
      for i, (graph, own) in enumerate(zip(graphs, params, strict=True)):
        x, routing = apply(nnx.merge(graph, own), x, run.first + i, run.repeats > 1)
        outs += [] if routing is None else [routing]
      return x, outs

    x, outs = jax.lax.scan(pattern, x, [nnx.to_pure_dict(state) for state in states])
    if outs:
      routings.append(jax.tree.map(_in_order, *outs))
  return x, routings


def _in_order(*rows: jax.Array) -> jax.Array:
  """Return [R·P,...] in the order of layers, for [R,...] of each of P layers of a pattern."""
  return jnp.stack(rows, 1).reshape(-1, *rows[0].shape[1:])
