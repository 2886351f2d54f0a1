"""The cache of compiled programs: where it is, who decides, and that no result depends on it."""

import contextlib
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from faults import program

from cai_jax import pipeline
from cai_jax.pipeline import stage_evaluate
from cai_jax.runtime import compilation
from cai_jax.runtime.compilation import CompilationConfig
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import read_json
from configs import tiny
from tests.pipeline_setup import start_two

SETTINGS = (
  'jax_compilation_cache_dir',
  'jax_compilation_cache_max_size',
  'jax_persistent_cache_min_compile_time_secs',
)


def jax_settings():
  return {name: getattr(jax.config, name) for name in SETTINGS}


@pytest.fixture
def plain_jax(monkeypatch):
  """JAX as a user has it who has decided nothing about its cache."""
  with contextlib.ExitStack() as stack:
    before = jax_settings()
    stack.callback(lambda: compilation._set(before))
    for name in SETTINGS:
      monkeypatch.delenv(name.upper(), raising=False)
    defaults = dict(zip(SETTINGS, (None, -1, 1.0), strict=True))
    compilation._set(defaults)
    jax.clear_caches()  # what other tests have compiled in this process
    yield defaults


def compile_one(number=1.0):
  """Compile a program that this process has not compiled, and return what was counted."""
  before = compilation.counts()
  jax.jit(lambda x: jnp.sin(x) * number)(jnp.ones(3)).block_until_ready()
  return compilation.counts().since(before)


def test_default_folder_is_in_the_cache_directory_of_the_user(monkeypatch, tmp_path):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  assert CompilationConfig().folder == tmp_path / 'cai_jax' / 'programs'
  monkeypatch.setenv('HOME', str(tmp_path / 'home'))
  for value in ('relative', ''):  # the XDG specification says to ignore both
    monkeypatch.setenv('XDG_CACHE_HOME', value)
    assert CompilationConfig().folder == tmp_path / 'home' / '.cache' / 'cai_jax' / 'programs'
  assert CompilationConfig('').folder is None
  assert CompilationConfig(str(tmp_path)).folder == tmp_path
  with pytest.raises(UserError, match=r'compilation.cache_gib=0.* must be positive'):
    CompilationConfig(cache_gib=0.0)


def test_a_later_process_loads_what_an_earlier_one_compiled(plain_jax, tmp_path):
  lines, config = [], CompilationConfig(str(tmp_path / 'a' / 'b'))
  with compilation.kept_programs(config, lines.append):
    assert getattr(jax.config, SETTINGS[1]) == 2**30
    first = compile_one(0.5)
    jax.clear_caches()  # as a new process has it
  assert first.compiled and not first.loaded and first.seconds > 0
  assert jax_settings() == plain_jax, 'a library user gets JAX back as it was'
  assert config.folder.stat().st_mode & 0o077 == 0
  with compilation.kept_programs(config, lines.append):
    second = compile_one(0.5)
  assert (second.compiled, second.loaded) == (0, first.compiled)
  assert second.describe().startswith(f'0 programs compiled and {second.loaded} loaded in ')
  assert lines[0] == f'compiled programs: 0 of earlier runs in {config.folder}'
  assert lines[1] == f'compiled programs: {first.compiled} of earlier runs in {config.folder}'


def test_cache_is_off_without_a_folder(plain_jax, tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  lines = []
  with compilation.kept_programs(CompilationConfig(''), lines.append):
    assert jax_settings() == plain_jax
    assert compile_one(0.25).compiled
  assert lines == ["compiled programs: not kept (compilation.cache='')"]
  assert list(tmp_path.iterdir()) == []


def test_folder_that_the_user_gave_to_jax_comes_first(plain_jax, tmp_path):
  compilation._set({SETTINGS[0]: str(tmp_path / 'own')})
  lines = []
  with compilation.kept_programs(CompilationConfig(str(tmp_path / 'ours')), lines.append):
    compile_one(0.125)
    assert getattr(jax.config, SETTINGS[2]) == 1.0, 'the minima are the decision of the user too'
  assert lines == [f'compiled programs: in {tmp_path / "own"} (JAX_COMPILATION_CACHE_DIR)']
  assert not (tmp_path / 'ours').exists()


def test_folder_that_cannot_be_written_is_said_once_and_the_run_goes_on(plain_jax, tmp_path):
  (tmp_path / 'file').write_text('in the way')
  lines = []
  with compilation.kept_programs(CompilationConfig(str(tmp_path / 'file' / 'x')), lines.append):
    assert jax_settings() == plain_jax
    assert compile_one(0.0625).compiled
  (line,) = lines
  assert line.startswith(f'compiled programs: not kept, because {tmp_path / "file" / "x"} cannot')


def test_program_of_a_killed_process_is_deleted(plain_jax, tmp_path):
  """JAX 0.10 otherwise reports it in every later run, and keeps no program any more."""
  config, lines = CompilationConfig(str(tmp_path), cache_gib=1e-4), []
  with compilation.kept_programs(config, lines.append):
    compile_one(3.5)
    jax.clear_caches()
  kept = {path.name for path in tmp_path.glob('*-cache')}
  (tmp_path / 'jit_half-0123-cache').write_bytes(b'half a progr')
  with compilation.kept_programs(config, lines.append):
    assert compile_one(3.5).compiled == 0
    compile_one(4.5)  # would fail to make room, because it could not tell the age of the half
  assert not (tmp_path / 'jit_half-0123-cache').exists()
  assert lines[1] == f'compiled programs: {len(kept)} of earlier runs in {tmp_path}'


CONCURRENT = """
import sys, warnings
warnings.simplefilter('error')
import jax, jax.numpy as jnp
from cai_jax.runtime import compilation
config = compilation.CompilationConfig(sys.argv[1], cache_gib=20_000 / 2**30)
with compilation.kept_programs(config):
  for number in range(40):
    jax.jit(lambda x: jnp.sin(x) * (number + float(sys.argv[2])))(jnp.ones(3)).block_until_ready()
"""


def test_processes_share_a_folder_that_stays_within_its_limit(tmp_path):
  """Both make room and write at once; a conflict would be a warning, which is an error here."""
  environment = {k: v for k, v in os.environ.items() if not k.startswith('JAX_')}
  processes = [
    subprocess.Popen(
      [sys.executable, '-c', CONCURRENT, str(tmp_path), offset],
      env=environment | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(program.ROOT)},
      stderr=subprocess.PIPE,
      text=True,
    )
    for offset in ('0.25', '0.5')
  ]
  for process in processes:
    _, errors = process.communicate(timeout=program.TIMEOUT)
    assert process.returncode == 0, errors
  sizes = [path.stat().st_size for path in tmp_path.glob('*-cache')]
  assert 1 < len(sizes) < 80 and sum(sizes) <= 20_000


PROCESSES = """
import sys
import jax, jax.numpy as jnp
from cai_jax.runtime import compilation, processes
processes.initialize()
config = compilation.CompilationConfig(sys.argv[1 + jax.process_index()], cache_gib=1e-6)
with compilation.kept_programs(config):
  for number in range(4):  # too large together for the limit, which holds for later runs
    jax.jit(lambda x: jnp.sin(x) * (number + 0.5))(jnp.ones(3)).block_until_ready()
  print(compilation.counts())
"""


@pytest.mark.slow
@pytest.mark.parametrize('names', [('a', 'a'), ('a', 'b'), ('a', '')])
def test_processes_of_a_run_keep_programs_only_in_a_folder_that_they_share(
  names, tmp_path, monkeypatch
):
  for name in [name for name in os.environ if name.startswith('JAX_')]:
    monkeypatch.delenv(name)
  folders = [str(tmp_path / name) if name else '' for name in names]
  started = start_two(
    [sys.executable, '-c', PROCESSES, *folders], 1, stdout=subprocess.PIPE, text=True
  )
  outputs = [process.communicate(timeout=program.TIMEOUT)[0] for process in started]
  assert [process.returncode for process in started] == [0, 0]
  shared = len(set(names)) == 1
  for output in outputs[: 1 + (names[1] != '')]:
    line = next(line for line in output.splitlines() if line.startswith('compiled programs'))
    assert ('0 of earlier runs' if shared else 'not all processes of this run use') in line
  assert (len(list((tmp_path / 'a').glob('*-cache'))) >= 4) == shared
  assert not list(tmp_path.glob('*/.run-*'))


def test_importing_the_library_leaves_jax_alone():
  code = f"""
import jax
read = lambda: [getattr(jax.config, name) for name in {SETTINGS}]
before = read()
import cai_jax, cai_jax.cli, cai_jax.experiment.run
assert read() == before == [None, -1, 1.0], read()
"""
  environment = {k: v for k, v in os.environ.items() if not k.startswith('JAX_')}
  subprocess.run([sys.executable, '-c', code], check=True, env=environment, cwd=program.ROOT)


def test_identity_of_a_stage_does_not_depend_on_the_cache(tmp_path):
  runs = []
  for cache, gib in (('auto', 1.0), ('', 2.0)):
    config = tiny.get_config()
    config.compilation.update(cache=cache, cache_gib=gib)
    runs.append(pipeline.build(config, tmp_path))
  assert runs[0].config != runs[1].config
  for stage in pipeline.STAGES:
    assert runs[0].settings(stage) == runs[1].settings(stage)


def test_launch_keeps_programs_and_d_cai_does_not_depend_on_them(tmp_path):
  """An empty cache and a full one give the same bytes."""
  environment = program.environment(tmp_path) | {'XDG_CACHE_HOME': str(tmp_path / 'cache')}
  environment = {k: v for k, v in environment.items() if not k.startswith('JAX_')}
  environment |= {'JAX_PLATFORMS': 'cpu', 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'}
  folder = tmp_path / 'cache' / 'cai_jax' / 'programs'
  outputs, datasets = [], []
  for name in ('cold', 'full'):
    present = set(folder.glob('*-cache'))
    workdir = tmp_path / name
    command = program.command(workdir, ('generate',))
    done = subprocess.run(
      [str(part) for part in command],
      env=environment,
      cwd=program.ROOT,
      capture_output=True,
      text=True,
      timeout=program.TIMEOUT,
    )
    assert done.returncode == 0, done.stderr
    outputs.append(done.stdout)
    datasets.append(
      {path.name: path.read_bytes() for path in (workdir / 'd_cai').glob('*.array_record*')}
    )
    stage = read_json(workdir / 'manifest.json')['stages']['generate']
    assert 0 < stage['first_row_seconds'] < stage['seconds']
    assert stage['programs']['compiled' if name == 'cold' else 'loaded'] > 0
  assert set(folder.glob('*-cache')) == present, 'nothing new is compiled'
  assert datasets[0] and datasets[0] == datasets[1]
  assert f'compiled programs: 0 of earlier runs in {folder}' in outputs[0]
  assert f'compiled programs: {len(present)} of earlier runs in {folder}' in outputs[1]
  assert 's, 0 programs compiled and' in outputs[1]
  for output in outputs:
    assert output.count('generate: first row after ') == 1


def test_both_models_are_evaluated_with_the_same_programs(tmp_path):
  """The programs depend on the length of the caches, and the answers alone need shorter ones."""
  run = pipeline.build(tiny.get_config(), tmp_path)
  prompts = run.prompts['eval_harmful'][:4]
  with pipeline.open_models(run) as models:
    revised = pipeline.prepare_job(run, models, prompts, [])
    answered = pipeline.prepare_job(run, models, [], prompts)
    job = stage_evaluate._prepare_answers(run, models, prompts, revised.length)
    assert answered.length < job.length == revised.length
    assert job.digest() == answered.digest(), 'the rows are the same'
    longer = stage_evaluate._prepare_answers(run, models, prompts, 1)
    assert longer.length == answered.length
