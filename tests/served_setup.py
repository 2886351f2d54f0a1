"""Settings, answers and runs of the served model that lies, stalls, floods or refuses."""

import contextlib
import json

import numpy as np
import transformers

from cai_jax import pipeline
from cai_jax.sampling.remote import Remote, RemoteConfig
from cai_jax.sampling.types import SamplingConfig, Turn
from cai_jax.scoring.judge_client import JudgeClient
from cai_jax.tiny.files import MODELS as TINY
from configs import tiny
from tests.faults import servers
from tests.faults.servers import complete

FOLDER = str(TINY['tiny'])
TOKENIZER = transformers.PreTrainedTokenizerFast.from_pretrained(FOLDER)
EOS = TOKENIZER.eos_token_id
KEY_NAME, KEY = 'CAI_JAX_TEST_KEY', 'sk-never/to+be&seen-0123456789'
TURN = Turn('initial', list(range(30, 50)), SamplingConfig(max_tokens=40))
FLOODS = servers.floods()
HONEST = complete({'prompt': TURN.context, 'max_tokens': 40}, TOKENIZER)


def config_of(running, **fields):
  defaults = {'server': 'vllm', 'max_positions': 1024, 'backoff_seconds': 0.0, 'retries': 2}
  address = {'url': running.url, 'model': 'served', 'tokenizer': FOLDER}
  return RemoteConfig(**address | defaults | fields)


def clients(folder):
  """Return how a `ModelLoader` makes clients that keep their answers in a folder."""
  return lambda server, role: JudgeClient(server, folder)


def ask(running, turn=TURN, **fields):
  with contextlib.closing(Remote(config_of(running, **fields))) as remote:
    key = np.array([5, 2], np.uint32)
    return remote.submit(turn, key, (EOS,), (), 'row 7').result(timeout=60)


def changed(change):
  answer = json.loads(json.dumps(HONEST))
  change(answer)
  return answer


def small_config(limits):
  """Return a config of the embedded world whose runs take seconds.

  Args:
    limits: numbers of harmful, helpful, held-out harmful and held-out helpful prompts.
  """
  config = tiny.get_config()
  names = ('harmful', 'helpful', 'eval_harmful', 'eval_helpful')
  for name, limit in zip(names, limits, strict=True):
    config.prompts[name].limit = limit
  for turn in config.sampling.values():
    turn.max_tokens = 12
  # Texts of 12 tokens exceed any limit.
  config.feedback.max_rate.update(dict.fromkeys(config.feedback.max_rate, 1.0))
  config.engine.slots = 8
  config.train.helpfulness_share = 0.2
  return config


def serve_stage(config, stage, url, **fields):
  """Let a server of the embedded model sample a stage of a config."""
  address = {'url': url, 'model': 'served', 'tokenizer': FOLDER, 'server': 'vllm'}
  config.remote[stage].update(address | {'max_positions': 256, 'backoff_seconds': 0.01} | fields)
  if stage == 'base':
    config.model.update(base='', init='tiny')


def served_run(running, workdir, prompts='', role='critique', **fields):
  config = small_config((4, 2, 2, 1))
  if prompts:
    config.prompts.harmful.update(source=str(prompts), name='', limit=-1)
  config.feedback.rounds = 1
  serve_stage(config, role, running.url, **fields)
  return pipeline.build(config, workdir)
