"""A tiny model, prompts, jobs and scripted chains that the tests of feedback share."""

import jax
import pytest

from cai_jax.constitution import Constitution, Principle
from cai_jax.data.prompts import Prompt
from cai_jax.feedback import job as jobs
from cai_jax.feedback.config import FeedbackConfig, StageSampling
from cai_jax.model.config import ModelConfig
from cai_jax.model.lm import LM
from cai_jax.model.transformer import init_params
from cai_jax.runtime.mesh import make_mesh
from cai_jax.sampling.config import EngineConfig
from cai_jax.sampling.types import Completion, SamplingConfig

PRINCIPLES = tuple(Principle(f'p{i}', f'What is wrong ({i})?', f'Mend it ({i}).') for i in range(5))
CONSTITUTION = Constitution(PRINCIPLES)
SHORT = SamplingConfig(max_tokens=7)
SAMPLING = StageSampling(SHORT, SHORT, SHORT)
ENGINE = EngineConfig(slots=4, prefill_tokens=32, prefill_width=16, longest_burst=8)


def make_lm(tokenizer):
  """Return a random Llama with a context of 512 tokens."""
  config = ModelConfig('llama', len(tokenizer), 32, 64, 2, 4, 2, 8, 512)
  mesh = make_mesh(devices=jax.devices()[:1])
  params = init_params(config, jax.random.key(0))
  eos = (tokenizer.eos_token_id,)
  return LM(config, params, tokenizer, mesh, 'float32', 'random', 'random-0', eos)


def make_prompt(i):
  return Prompt(f'id-{i}', ({'role': 'user', 'content': f'Question {i}?'},), {'n': str(i)})


def make_job(lm, num_harmful=6, num_helpful=2, rounds=2, models=None, **config):
  """Return a job with three rows per shard."""
  return jobs.prepare(
    models or {'base': lm},
    [make_prompt(i) for i in range(num_harmful)],
    [make_prompt(100 + i) for i in range(num_helpful)],
    CONSTITUTION,
    FeedbackConfig(rounds=rounds, shard_rows=3, **config),
    SAMPLING,
    seed=0,
  )


def play(chain, dialogue, replies):
  """Run a chain on scripted replies; return the turns that it yields and its record."""
  turns, completion = [], None
  for text in replies:
    turns.append(chain.send(completion))
    tokens = dialogue.reply(text)
    completion = Completion(tokens, text, [-0.5] * len(tokens), 'stop')
  with pytest.raises(StopIteration) as stop:
    chain.send(completion)
  return turns, stop.value.value


def shard_bytes(folder):
  """Return the content of each shard of a dataset by file name."""
  return {path.name: path.read_bytes() for path in folder.glob('*.array_record-*')}
