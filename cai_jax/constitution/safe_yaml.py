"""YAML without its traps: repeated keys, aliases that multiply, and values that take long to build.

`yaml.safe_load` runs no code, but it keeps the last of two equal keys, and a text of a few lines
can describe a value that no memory holds.
"""

from typing import Any

import yaml

MAX_NODES = 100_000  # of a document, with each alias counted as a copy
MAX_NUMBER = 100  # characters

_NUMBERS = ('tag:yaml.org,2002:int', 'tag:yaml.org,2002:float')
# The loader in C is ten times as fast. PyYAML lacks it where libyaml was missing when it was built.
_Loader = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader


def parse_yaml(text: str) -> Any:
  """Return the value of a YAML document.

  Args:
    text: the document.

  Raises:
    yaml.YAMLError: if the text is not YAML, a key occurs twice or is not a scalar, an alias refers
      to a node that contains it, or the document has more than `MAX_NODES` nodes.
    ValueError, KeyError, AttributeError or OverflowError: if a value does not have its type.
  """
  loader = _Loader(text)
  try:
    node = loader.get_single_node()
    if node is None:
      return None
    _count_nodes(node, {})
    return loader.construct_document(node)
  finally:
    loader.dispose()


def _count_nodes(node: yaml.Node, counts: dict[int, int]) -> int:
  """Return the number of nodes below a node, itself included, and check each of them.

  Args:
    node: the node.
    counts: number of nodes below each node that was seen, and 0 while it is being counted.
  """
  if id(node) in counts:
    if not counts[id(node)]:
      raise _error('an alias refers to a node that contains it', node)
    return counts[id(node)]
  counts[id(node)] = 0
  children: list[yaml.Node] = []
  if isinstance(node, yaml.MappingNode):
    _check_keys(node)
    children = [value for _, value in node.value]
  elif isinstance(node, yaml.SequenceNode):
    children = node.value
  elif node.tag in _NUMBERS and len(node.value) > MAX_NUMBER:
    raise _error(f'a number has {len(node.value)} characters', node)
  count = 1 + sum(_count_nodes(child, counts) for child in children)
  if count > MAX_NODES:
    raise _error(f'the document has more than {MAX_NODES} nodes, aliases included', node)
  counts[id(node)] = count
  return count


def _check_keys(node: yaml.MappingNode) -> None:
  """Raise an error if a key of a mapping is not a scalar, or occurs twice."""
  keys = set()
  for key, _ in node.value:
    if not isinstance(key, yaml.ScalarNode) or len(key.value) > MAX_NODES:
      raise _error('a key is not a short text', key)
    if key.value in keys:
      raise _error(f'the key {key.value[:40]!r} occurs twice', key)
    keys.add(key.value)


def _error(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
  return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
