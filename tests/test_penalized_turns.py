"""Turns with penalties and biases: right, independent of other turns, and free where unused."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from cai_jax.model.sharding import param_shardings
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.mesh import make_mesh
from cai_jax.sampling import device
from cai_jax.sampling.config import EngineConfig
from cai_jax.sampling.engine import Engine
from cai_jax.sampling.journal import Journal
from cai_jax.sampling.types import SamplingConfig
from tests.engine_setup import LENGTH, PREFIXES, SIZES, assert_close, chain, contexts, run
from tests.engine_setup import lm as lm

pytestmark = pytest.mark.usefixtures('full_optimization')

PENALIZED = (
  {'repetition_penalty': 1.4},
  {'presence_penalty': 1.5, 'frequency_penalty': 0.5, 'top_p': 0.9},
  {'logit_bias': ((5, 4.0), (6, -100.0)), 'min_p': 0.05},
  {},
)


def penalized_items(count, starts=((),)):
  """Return (id, chain) pairs, with settings of PENALIZED in turn."""
  settings = itertools.cycle(PENALIZED)
  return [
    (str(i), chain([*starts[i % len(starts)], *c], sampling=SamplingConfig(max_tokens=12, **own)))
    for i, (c, own) in enumerate(zip(contexts(count), settings, strict=False))
  ]


def test_a_greedy_reply_equals_that_of_the_plain_definition(lm):
  """The model is evaluated on the whole context for each token, and transformers penalizes."""
  for penalties in (
    {'repetition_penalty': 1.8},
    {'presence_penalty': 2.0, 'frequency_penalty': 1.0},
  ):
    sampling = SamplingConfig(temperature=0.0, max_tokens=14, **penalties)
    context = contexts(3)[2]
    ((completion,),) = run(lm, [('a', chain(context, 1, sampling=sampling))])[0].values()
    tokens = list(context)
    for _ in range(14):
      padded = tokens + [0] * (64 - len(tokens))  # one shape, so one compilation
      scores = torch.tensor(np.array(lm.logits([padded]))[:, len(tokens) - 1])
      if penalty := penalties.get('repetition_penalty'):
        scores = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([tokens]), scores)
      counts = np.bincount(tokens[len(context) :], minlength=scores.shape[1])
      scores = scores.numpy()[0] - sampling.frequency_penalty * counts
      tokens.append(int((scores - sampling.presence_penalty * (counts > 0)).argmax()))
    assert completion.tokens == tokens[len(context) :]
    plain = SamplingConfig(temperature=0.0, max_tokens=14)
    ((other,),) = run(lm, [('a', chain(context, 1, sampling=plain))])[0].values()
    assert other.tokens != completion.tokens


def test_a_reply_does_not_depend_on_batch_mates_with_penalties(lm):
  starts, prefixes = ([], *PREFIXES), {'base': PREFIXES}
  batch, _ = run(lm, penalized_items(9, starts), prefixes=prefixes)
  for index in (0, 1, 2, 3, 7):  # 3 and 7 have no penalty, so alone their program has none
    item = penalized_items(9, starts)[index]
    alone, _ = run(lm, [item], prefixes=prefixes)
    assert alone[item[0]] == batch[item[0]]  # tokens, text and every bit of the log-probabilities


def test_a_resumed_run_with_penalties_has_the_bits_of_an_uninterrupted_one(lm, tmp_path):
  uninterrupted, _ = run(lm, penalized_items(9))
  journal = Journal(tmp_path)
  engine = Engine(
    {'base': lm}, length=LENGTH, seed=0, config=EngineConfig(**SIZES), journal=journal
  )
  list(itertools.islice(engine.run(penalized_items(9)), 4))  # loses the chains in flight
  journal.close()
  resumed, stats = run(lm, penalized_items(9), journal=Journal(tmp_path))
  assert resumed == uninterrupted
  assert 0 < stats.replayed_turns < 27


def test_a_run_without_penalties_is_compiled_without_them(lm, monkeypatch):
  used, run_step = [], device.run

  def watch(*args):
    used.append(args[9] is not None)  # the penalties
    return run_step(*args)

  monkeypatch.setattr(device, 'run', watch)
  run(lm, [(str(i), chain(c)) for i, c in enumerate(contexts(5))])
  assert used and not any(used)
  used.clear()
  run(lm, penalized_items(5))
  assert any(used)


def test_a_banned_token_is_not_drawn_and_one_beyond_the_vocabulary_refused(lm):
  plain, _ = run(lm, [('a', chain(contexts(1)[0], 1))])
  banned = plain['a'][0].tokens[0]
  sampling = SamplingConfig(max_tokens=12, logit_bias=((banned, -100.0),))
  results, _ = run(lm, [('a', chain(contexts(1)[0], 1, sampling=sampling))])
  assert banned not in results['a'][0].tokens
  sampling = SamplingConfig(logit_bias=((lm.vocab_size, 1.0),))
  with pytest.raises(UserError, match="chain 'a', turn 'turn_0': logit_bias names token"):
    run(lm, [('a', chain([1], 1, sampling=sampling))])


@pytest.mark.slow
def test_eight_devices_give_the_tokens_of_one_with_penalties(lm):
  """The vocabulary is split over two of the devices, and the slots over four groups."""
  mesh = make_mesh(data=2, fsdp=2, tensor=2)
  params = jax.device_put(lm.params, param_shardings(lm.params, mesh))
  sharded = dataclasses.replace(lm, params=params, mesh=mesh)
  expected, _ = run(lm, penalized_items(7))
  assert_close(run(sharded, penalized_items(7))[0], expected)
