"""How often experts compute a token while the engine samples."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax.experimental import multihost_utils

import cai_jax
from cai_jax import pipeline
from cai_jax.model.config import Experts, ModelConfig
from cai_jax.model.transformer import abstract_model
from cai_jax.runtime.files import read_json
from cai_jax.runtime.mesh import make_mesh
from cai_jax.sampling import slots
from cai_jax.sampling.config import EngineConfig
from cai_jax.sampling.engine import Engine
from cai_jax.sampling.types import SamplingConfig, Turn
from cai_jax.sampling.usage import describe_usage, no_usage, sum_over_processes, summarize
from tests.conftest import show_one_device
from tests.pipeline_setup import small

RNG = np.random.default_rng(0)
PREFIXES = [RNG.integers(5, 300, n).tolist() for n in (18, 37)]
CONTEXTS = [  # the index of a prefix or None, and further tokens
  (None, RNG.integers(5, 300, 45).tolist()),
  (0, RNG.integers(5, 300, 11).tolist()),
  (1, RNG.integers(5, 300, 1).tolist()),
  (1, RNG.integers(5, 300, 25).tolist()),
]


def chain(context):
  """Return the tokens of two turns, of which the second follows the first, and what they score."""
  first = yield Turn('first', context, SamplingConfig(max_tokens=20))
  follow = context + first.tokens + [5, 9]
  second = yield Turn('second', follow, SamplingConfig(max_tokens=6))
  return follow + second.tokens, first.logprobs + second.logprobs


def run_engine(lm):
  """Return the engine, and the result of each chain."""
  sizes = dict(slots=2, prefill_tokens=16, prefill_width=8, longest_burst=8, page_tokens=16)
  config = EngineConfig(**sizes, draft_tokens=0)
  engine = Engine({'base': lm}, length=192, seed=0, config=config, prefixes={'base': PREFIXES})
  contexts = [([] if index is None else PREFIXES[index]) + own for index, own in CONTEXTS]
  results = dict(engine.run((str(i), chain(context)) for i, context in enumerate(contexts)))
  return engine, [results[str(i)] for i in range(len(CONTEXTS))]


@pytest.mark.parametrize(
  ('family', 'shape'),
  [
    ('mixtral', None),
    pytest.param('qwen3_moe', None, marks=pytest.mark.slow),
    pytest.param('qwen3_moe', (2, 1, 2, 2), marks=pytest.mark.slow),
    pytest.param('mixtral', (1, 2, 1, 4), marks=pytest.mark.slow),
  ],
)
def test_each_computed_token_counts_once(load, tiny_hf_folder, family, shape):
  """The last sampled token is never computed, and those of a prefix are computed once."""
  lm = load(family)
  graph = abstract_model(lm.config)[0]

  @jax.jit
  def route(params, tokens, length):
    model = nnx.merge(graph, params)
    positions = np.arange(128)[None]
    return model.forward(tokens, positions, (positions < length).astype(np.int32))[1].counts

  def count(tokens):
    padded = np.zeros((1, 128), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(route(lm.params, padded, len(tokens)))

  if shape is not None:
    *sizes, expert = shape
    lm = cai_jax.load(tiny_hf_folder(family), mesh=make_mesh(*sizes, expert=expert))
  engine, texts = run_engine(lm)
  lm = load(family)
  expected = sum(map(count, PREFIXES))
  for (index, _), (tokens, _) in zip(CONTEXTS, texts, strict=True):
    expected = expected + count(tokens[:-1])
    expected = expected - (0 if index is None else count(PREFIXES[index]))
  np.testing.assert_array_equal(engine.expert_usage()['base'], expected)
  assert expected.sum() == 2 * len(expected) * (
    sum(map(len, PREFIXES)) + sum(len(own) + 20 + 2 + 6 - 1 for _, own in CONTEXTS)
  )


@pytest.mark.slow
@pytest.mark.usefixtures('full_optimization')
def test_counting_changes_no_sampled_bit(load, monkeypatch):
  lm = load('mixtral')
  counted = run_engine(lm)[1]
  monkeypatch.setattr(slots, 'new_usage', lambda *args: ())
  assert run_engine(lm)[1] == counted


def test_dense_models_count_nothing(load):
  engine, _ = run_engine(load('qwen3'))
  assert engine.expert_usage() == {} == no_usage({'base': load('qwen3')})


CONFIG = ModelConfig(
  'other', 32, 16, 32, 3, 4, 2, 4, 64, experts=Experts(4, 2, 16, dense_layers=(1,))
)


def test_a_summary_has_a_value_for_each_layer():
  summary = summarize(CONFIG, np.array([[10, 10, 10, 10], [20, 20, 0, 0]]))
  assert summary == {
    'tokens': 20,
    'layers': [0, 2],
    'busiest': [0.5, 1.0],
    'effective': [4.0, 2.0],
    'unused': [0, 2],
  }
  assert describe_usage('base', CONFIG, summary) == (
    '  experts of base: the busiest computed 100 % of the tokens of layer 2 (even: 50 %); '
    '2 of 8 were unused'
  )
  assert summarize(CONFIG, np.zeros((2, 4), np.int64))['busiest'] == [0, 0]


def test_counts_of_processes_are_added_beyond_32_bits(monkeypatch):
  usage = {'base': np.array([[3 * 2**40 + 5, 2**25 - 1]]), 'critique': np.array([[7]])}
  monkeypatch.setattr(jax, 'process_count', lambda: 3)
  gather = lambda tree: jax.tree.map(lambda x: np.stack([x] * 3), tree)  # noqa: E731
  monkeypatch.setattr(multihost_utils, 'process_allgather', gather)
  for name, total in sum_over_processes(usage).items():
    np.testing.assert_array_equal(total, 3 * usage[name])


def test_the_manifest_of_a_run_has_a_summary(tiny_hf_folder, tmp_path, monkeypatch):
  show_one_device(monkeypatch)
  config, lines = small(str(tiny_hf_folder('mixtral'))), []
  pipeline.run_stages(pipeline.build(config, tmp_path), ['generate'], lines.append)
  stage = read_json(tmp_path / 'manifest.json')['stages']['generate']
  (name,) = stage['experts']
  experts = stage['experts'][name]
  assert experts['layers'] == [0, 1, 2] and all(0.5 <= x <= 1 for x in experts['busiest'])
  computed = stage['prefilled_tokens'] + stage['prefix_tokens'] + stage['tokens']
  assert 0.8 * computed < experts['tokens'] < 1.5 * computed
