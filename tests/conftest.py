"""Shared by all tests: eight virtual CPU devices, a tiny model of each family, published data."""

import atexit
import functools
import gc
import os
import pathlib
import shutil
import tempfile

# Compilation takes most of the time of most tests, so programs have few optimizations here, in the
# processes that tests start too. With the value 0, all tests compile as users do.
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')

# jax and the Hugging Face libraries read these variables once, when they are imported.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
if 'xla_force_host_platform_device_count' not in os.environ.get('XLA_FLAGS', ''):
  os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
  ).strip()

import jax
import pytest
from jax._src import compiler

from cai_jax.runtime import compilation
from tests.families import REPEATED, SHAPE, mark_slow, save_random

# Many tests compile the same programs, often in processes of their own.
if compilation.VARIABLE not in os.environ:
  _programs = tempfile.mkdtemp(prefix='programs-')
  compilation.keep_programs(_programs)
  os.environ |= compilation.environment(_programs)
  atexit.register(shutil.rmtree, _programs, ignore_errors=True)

FEW_OPTIMIZATIONS = jax.config.read('jax_disable_most_optimizations')

# XLA for CPUs has older code for fused operations, which is compiled in two thirds of the time.
# JAX has a variable for few optimizations and none for this, and XLA_FLAGS would be for all files.
# Newer versions than 0.10 do not have the older code any more.
QUICK = {'xla_cpu_use_fusion_emitters': False} if jax.__version_info__ < (0, 11) else {}


def compile_quickly(options=compiler.get_compile_options):
  """Let programs with few optimizations be compiled with QUICK."""

  @functools.wraps(options)
  def get_compile_options(*args, env_options_overrides=None, **kwargs):
    if jax.config.read('jax_disable_most_optimizations'):
      env_options_overrides = QUICK | (env_options_overrides or {})
    return options(*args, env_options_overrides=env_options_overrides, **kwargs)

  compiler.get_compile_options = get_compile_options


compile_quickly()

# XLA for CPUs maps every compiled kernel into memory on its own, and Linux allows a process 65,530
# mappings by default. Beyond that, the process aborts.
MANY_MAPPINGS = 30_000
MAPPINGS = pathlib.Path('/proc/self/maps')

ROOT = pathlib.Path(__file__).resolve().parents[1]

CHATML = (
  '{%- for message in messages -%}'
  "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
  '{%- endfor -%}'
  "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
SPECIAL = ('<|endoftext|>', '<|im_start|>', '<|im_end|>')
TEXT = (
  'The assistant answers the question of the human in a few plain words.',
  'How do I repair a bicycle that will not stop? First look at the brake, then at the cable.',
  'Identify ways in which the last answer is unkind, and rewrite it so that nobody is hurt.',
  'user system assistant critique revision request 0 1 2 3 4 5 6 7 8 9',
)


# The files that take longest, the longest first.
LONG_FILES = (
  'test_choices.py',
  'test_engine.py',
  'test_engine_sizes.py',
  'test_training.py',
  'test_resume.py',
  'test_docs.py',
  'test_family_logits.py',
  'test_sample.py',
  'test_run.py',
  'test_cached_bits.py',
  'test_training_monitoring.py',
  'test_states.py',
  'test_family_training.py',
  'test_family_generation.py',
  'test_balance.py',
  'test_training_step.py',
  'test_compilation.py',
  'test_experts.py',
  'test_kernels.py',
  'test_ragged.py',
  'test_losses.py',
  'test_judge_remote.py',
)


def pytest_collection_modifyitems(items):
  """Let the long files run first, so that processes that share the files end together."""
  ranks = {name: rank for rank, name in enumerate(LONG_FILES)}
  items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


def pytest_collection_finish():
  """Let the garbage collector skip what was imported, and look for cycles less often."""
  gc.collect()
  gc.freeze()
  gc.set_threshold(50_000, 20, 50)


@pytest.fixture
def data_dir():
  """`data_dir(name)` returns a folder of published data, or skips the test if it is missing."""

  def find(name: str) -> pathlib.Path:
    base = os.environ.get('CAI_JAX_DATA')
    folder = (pathlib.Path(base) if base else ROOT.parent / 'shared' / 'data') / name
    if not folder.exists():
      pytest.skip(f'no test data {name!r} in {folder.parent}; set CAI_JAX_DATA to its folder')
    return folder

  return find


@pytest.fixture
def restored_registries():
  """Undo what the test registers when it ends."""
  from cai_jax.runtime.registry import temporary_registrations

  with temporary_registrations():
    yield


@pytest.fixture(scope='session')
def tiny_tokenizer():
  """Return a byte-level BPE tokenizer with a ChatML template, as `AutoTokenizer` would."""
  import tokenizers
  import transformers

  core = tokenizers.Tokenizer(tokenizers.models.BPE())
  core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  core.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=320,
    special_tokens=list(SPECIAL),
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  core.train_from_iterator(TEXT, trainer)
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=core,
    eos_token='<|im_end|>',
    pad_token='<|endoftext|>',
    chat_template=CHATML,
    model_max_length=SHAPE['max_position_embeddings'],
    clean_up_tokenization_spaces=False,
  )


@pytest.fixture(scope='session')
def tiny_hf_folder(tmp_path_factory, tiny_tokenizer):
  """`tiny_hf_folder(family)` returns a Hugging Face folder of a random model, written by torch."""
  folders = {}

  def make(family: str) -> pathlib.Path:
    if family not in folders:
      folders[family] = tmp_path_factory.mktemp('models') / family
      special = tiny_tokenizer.convert_tokens_to_ids(list(SPECIAL))
      save_random(family, folders[family], tiny_tokenizer, special)
    return folders[family]

  return make


@pytest.fixture(scope='session')
def load(tiny_hf_folder):
  """`load(family)` returns the family's tiny model on one device, loaded once per session."""
  import jax

  import cai_jax
  from cai_jax.runtime.mesh import make_mesh

  loaded = {}

  def get(family):
    if family not in loaded:
      mesh = make_mesh(1, devices=jax.devices()[:1])
      loaded[family] = cai_jax.load(tiny_hf_folder(family), mesh=mesh)
    return loaded[family]

  return get


@pytest.fixture(scope='module')
def full_optimization():
  """Compile as users do, for a file whose claims are about single bits or about the compiler."""
  jax.clear_caches()  # in memory, JAX does not tell apart how a program was compiled
  jax.config.update('jax_disable_most_optimizations', False)
  yield
  jax.config.update('jax_disable_most_optimizations', FEW_OPTIMIZATIONS)


def show_one_device(patch: pytest.MonkeyPatch) -> None:
  """Let runs see one device, because programs for eight take longer to compile and to run."""
  devices = jax.devices()[:1]
  for name in ('devices', 'local_devices'):
    patch.setattr(jax, name, lambda *args, **options: devices)


@pytest.fixture(scope='module')
def single_device():
  """Let the runs of a file see one device. Most runs of test_run.py see all eight."""
  with pytest.MonkeyPatch.context() as patch:
    show_one_device(patch)
    yield


@pytest.fixture(params=mark_slow(REPEATED))
def family(request) -> str:
  """Each key of FAMILIES in turn."""
  return request.param


@pytest.fixture(scope='session')
def random_model(tmp_path_factory):
  """The folder of a random model with the embedded world's tokenizer."""
  from tests.pipeline_setup import save_random_model

  return save_random_model(tmp_path_factory.mktemp('random'))


@pytest.fixture(autouse=True)
def _unload_programs():
  """Unload compiled programs after a test if there are many."""
  yield
  if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b'\n') > MANY_MAPPINGS:
    jax.clear_caches()
    gc.collect()  # programs are parts of reference cycles
