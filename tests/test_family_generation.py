"""Every family's greedy tokens agree with torch through the engine, behind shared prefixes too."""

import numpy as np
import pytest
import torch

from cai_jax.sampling.config import EngineConfig
from cai_jax.sampling.engine import Engine
from cai_jax.sampling.types import SamplingConfig, Turn
from tests.families import REPEATED, SIMILAR, load_in_torch, mark_slow

NEW_TOKENS = 64
RNG = np.random.default_rng(0)
# The second prefix is part of two contexts, of which one follows it for a single token.
PREFIXES = [RNG.integers(5, 300, n).tolist() for n in (18, 37)]
CONTEXTS = [
  RNG.integers(5, 300, 3).tolist(),
  RNG.integers(5, 300, 45).tolist(),
  PREFIXES[0] + RNG.integers(5, 300, 11).tolist(),
  PREFIXES[1] + RNG.integers(5, 300, 1).tolist(),
  PREFIXES[1] + RNG.integers(5, 300, 25).tolist(),
]


def chain(context):
  """Sample a reply, then a short one that follows it and two further tokens."""
  first = yield Turn('first', context, SamplingConfig(temperature=0.0, max_tokens=NEW_TOKENS))
  follow = context + first.tokens + [5, 9]
  second = yield Turn('second', follow, SamplingConfig(temperature=0.0, max_tokens=8))
  return [(context, first), (follow, second)]


@pytest.fixture(params=mark_slow(REPEATED + SIMILAR))
def family(request) -> str:
  """Each key of FAMILIES in turn."""
  return request.param


@pytest.fixture(scope='module')
def engine_turns(load):
  """`engine_turns(family)` returns the context and the completion of each turn, and the stats.

  Three slots serve five chains. Chunks of at most 16 tokens prefill contexts of up to 110 tokens,
  and pages have 16 tokens.
  """

  def run(family):
    sizes = dict(slots=3, prefill_tokens=16, prefill_width=8, longest_burst=8, page_tokens=16)
    engine = Engine(
      {'base': load(family)},
      length=192,
      seed=0,
      config=EngineConfig(**sizes),
      prefixes={'base': PREFIXES},
    )
    chains = [(str(i), chain(context)) for i, context in enumerate(CONTEXTS)]
    turns = [turn for _, turns in sorted(engine.run(chains)) for turn in turns]
    return turns, engine.stats

  return run


def test_greedy_tokens_agree_with_torch(engine_turns, tiny_hf_folder, family):
  """If each token is torch's best one after those before it, torch generates the same tokens."""
  turns, stats = engine_turns(family)
  assert len(turns) == 2 * len(CONTEXTS)
  # Each prefix is prefilled once, and a chain's second turn only prefills what is new.
  assert stats.prefix_tokens == sum(map(len, PREFIXES))
  assert stats.shared_tokens > 0 and stats.reused_tokens > 0
  model = load_in_torch(tiny_hf_folder(family))
  for context, completion in turns:
    assert completion.finish_reason == 'length' and len(completion.tokens) in (NEW_TOKENS, 8)
    with torch.no_grad():
      logits = model(torch.tensor([context + completion.tokens])).logits[0, len(context) - 1 : -1]
    assert completion.tokens == logits.argmax(-1).tolist()
    logprobs = torch.log_softmax(logits, -1).numpy()
    expected = logprobs[np.arange(len(completion.tokens)), completion.tokens]
    np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4, rtol=0)
  assert len({token for _, completion in turns for token in completion.tokens}) > 20
