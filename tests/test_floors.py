"""The layers of the code: an import goes down only, and configs import only the schema."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
FLOORS = {
  'runtime': 0,
  'dialogue': 1,
  'model': 1,
  'constitution': 2,
  'data': 3,
  'report': 4,
  'sampling': 4,
  'scoring': 5,
  'feedback': 6,
  'training': 6,
  'evaluation': 7,
  'tiny': 7,
  'pipeline': 8,
  'serving': 8,
  'publishing': 9,
  'cli': 10,
  'experiment': 11,
}
TOP = 12  # launch.py, experiments, tests and cai_jax/__init__.py may import everything
OUTSIDE = ('launch', 'experiments', 'configs', 'tests')  # what no module of cai_jax imports


def sources(*folders):
  return sorted(path for folder in folders for path in (ROOT / folder).rglob('*.py'))


def package_of(path: pathlib.Path) -> str | None:
  """Return 'model' for cai_jax/model/lm.py, 'cli' for cai_jax/cli.py, and None above the layers."""
  parts = path.relative_to(ROOT).with_suffix('').parts
  return parts[1] if parts[0] == 'cai_jax' and parts[1] != '__init__' else None


def imports(path: pathlib.Path) -> list[tuple[int, str]]:
  """Return the line and the dotted module of each import in a file, also inside functions.

  `from a import b` counts as a.b, because b may be a module.
  """
  found = []
  for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'), str(path))):
    if isinstance(node, ast.Import):
      found += [(node.lineno, alias.name) for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path}:{node.lineno}: a relative import; write cai_jax.… instead'
      found += [(node.lineno, f'{node.module}.{alias.name}') for alias in node.names]
  return found


def violations(path: pathlib.Path) -> list[str]:
  """Return a line for each import of a file that goes up, or sideways to another package."""
  package = package_of(path)
  floor = TOP if package is None else FLOORS[package]
  broken = []
  for line, name in imports(path):
    parts = name.split('.')
    if parts[0] != 'cai_jax':
      if parts[0] in OUTSIDE and package is not None:
        broken.append(f'{path}:{line} imports {name}, which is not part of the library')
      continue
    target = parts[1] if len(parts) > 1 else None
    if target not in FLOORS and package is None:
      continue  # `import cai_jax` from above
    if target not in FLOORS:
      broken.append(f'{path}:{line} imports {name}; import the module instead')
    elif target != package and FLOORS[target] >= floor:
      broken.append(f'{path}:{line} (floor {floor}) imports {name} (floor {FLOORS[target]})')
  return broken


def test_every_package_has_a_floor():
  packages = {package_of(path) for path in sources('cai_jax')} - {None}
  assert packages == FLOORS.keys(), 'a new package needs a floor, and an old one needs none'


def test_every_file_is_checked():
  checked = {*sources('cai_jax', 'experiments', 'configs', 'tests', 'docs')}
  checked |= {ROOT / 'launch.py', ROOT / 'setup.py'}
  listed = subprocess.run(
    ['git', 'ls-files', '*.py'], cwd=ROOT, capture_output=True, text=True, check=False
  ).stdout.split()
  assert {ROOT / name for name in listed if (ROOT / name).exists()} <= checked


def test_imports_go_down():
  paths = [*sources('cai_jax', 'experiments'), ROOT / 'launch.py']
  broken = [line for path in paths for line in violations(path)]
  assert not broken, '\n'.join(broken)


def test_no_module_has_a_function_of_its_own_name_in_its_package():
  for path in sources('cai_jax'):
    for _, name in imports(path) if path.name == '__init__.py' else ():
      *_, module, attribute = ['', *name.split('.')]
      hides = module == attribute and (path.parent / f'{module}.py').exists()
      assert not hides, f'{path}: {name} hides the module of the same name'


def test_configs_import_only_the_schema():
  allowed = {'ml_collections', 'configs', *sys.stdlib_module_names}
  for path in sources('configs'):
    wrong = [
      name
      for _, name in imports(path)
      if name.split('.')[0] not in allowed and not name.startswith('cai_jax.pipeline.schema.')
    ]
    assert not wrong, f'{path} imports {wrong[0]}; configs import only the schema'


@pytest.mark.parametrize(
  ('file', 'line', 'fault'),
  [
    ('model/x.py', 'from cai_jax.sampling import engine', True),
    ('model/x.py', 'import cai_jax.dialogue', True),
    ('feedback/x.py', 'from cai_jax import training', True),
    ('report/x.py', 'def f():\n  from cai_jax.tiny import oracle', True),
    ('report/x.py', 'import launch', True),
    ('model/x.py', 'import cai_jax', True),
    ('model/x.py', 'from cai_jax import runtime\nfrom cai_jax.model import config', False),
    ('tiny/x.py', 'from cai_jax.training import step\nimport jax', False),
    ('__init__.py', 'from cai_jax.model.lm import LM', False),
  ],
)
def test_violations_are_found(tmp_path, monkeypatch, file, line, fault):
  monkeypatch.setattr(sys.modules[__name__], 'ROOT', tmp_path)
  path = tmp_path / 'cai_jax' / file
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(line)
  assert bool(violations(path)) == fault
