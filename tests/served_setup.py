"""Settings, answers and runs of the served model that lies, stalls, floods or refuses."""

import contextlib
import json

import numpy as np
import transformers

from cai_jax import pipeline
from cai_jax.sampling.remote import Remote, RemoteConfig
from cai_jax.sampling.types import SamplingConfig, Turn
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


def ask(running, turn=TURN, **fields):
  with contextlib.closing(Remote(config_of(running, **fields))) as remote:
    key = np.array([5, 2], np.uint32)
    return remote.submit(turn, key, (EOS,), (), 'row 7').result(timeout=60)


def changed(change):
  answer = json.loads(json.dumps(HONEST))
  change(answer)
  return answer


def served_run(running, workdir, prompts='', role='critique', **fields):
  config = tiny.get_config()
  for name, limit in (('harmful', 4), ('helpful', 2), ('eval_harmful', 2), ('eval_helpful', 1)):
    config.prompts[name].limit = limit
  if prompts:
    config.prompts.harmful.update(source=str(prompts), name='', limit=-1)
  config.feedback.rounds = 1
  config.feedback.max_rate.update(
    dict.fromkeys(config.feedback.max_rate, 1.0)
  )  # texts of 12 tokens
  for turn in config.sampling.values():
    turn.max_tokens = 12
  config.engine.slots = 8
  config.train.helpfulness_share = 0.2
  address = {'url': running.url, 'model': 'served', 'tokenizer': FOLDER, 'server': 'vllm'}
  config.remote[role].update(address | {'max_positions': 256, 'backoff_seconds': 0.01} | fields)
  if role == 'base':
    config.model.update(base='', init='tiny')
  return pipeline.build(config, workdir)
