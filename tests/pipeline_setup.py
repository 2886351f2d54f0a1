"""A small run, its model and processes, which the tests of the pipeline share."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
from transformers import PreTrainedTokenizerFast

import cai_jax
from cai_jax.model.config import ModelConfig
from cai_jax.model.transformer import init_params
from cai_jax.runtime.mesh import make_mesh
from cai_jax.tiny.files import MODELS
from configs import tiny

ROOT = pathlib.Path(__file__).resolve().parents[1]

LIMITS = {'harmful': 10, 'helpful': 6, 'eval_harmful': 5, 'eval_helpful': 3}


def launch_tiny(workdir, stages, fields):
  """Return the command that runs stages of configs/tiny.py with some fields of the config set."""
  flags = [f'--config.{name}={value}' for name, value in fields.items()]
  names = f'--stages={stages}'
  return [
    sys.executable,
    'launch.py',
    '--config=configs/tiny.py',
    f'--workdir={workdir}',
    names,
    *flags,
  ]


def small(model):
  """Return the config of a run of seconds on a model folder."""
  config = tiny.get_config()
  config.model.base = str(model)
  for name, limit in LIMITS.items():
    config.prompts[name].limit = limit
  config.feedback.rounds = 2
  config.feedback.max_rate.update(dict.fromkeys(config.feedback.max_rate, 1.0))  # a random model
  config.feedback.shard_rows = 4
  config.sampling.initial.max_tokens = config.sampling.revision.max_tokens = 12
  config.sampling.critique.max_tokens = 9
  config.engine.slots = 8
  config.train.batch_size = 8
  config.train.epochs = 1
  config.train.helpfulness_share = 0.2
  config.train.drop_truncated = False
  config.train.checkpoint_every = 1
  return config


def save_random_model(path, max_positions=512):
  """Save a random model with the embedded world's tokenizer in a folder, and return the folder."""
  tokenizer = PreTrainedTokenizerFast.from_pretrained(MODELS['tiny'])
  size = len(tokenizer), 32, 64, 2, 4, 2, 8, max_positions
  config = ModelConfig('llama', *size, tied_embeddings=True)
  params = init_params(config, jax.random.key(0))
  eos = (tokenizer.eos_token_id,)
  cai_jax.save(cai_jax.LM(config, params, tokenizer, make_mesh(), 'float32', '', '', eos), path)
  return path


def set_fields(**fields):
  def change(config):
    with config.unlocked():
      config.update_from_flattened_dict({k.replace('__', '.'): v for k, v in fields.items()})

  return change


def start_one(arguments, devices, options=None, **environment):
  """A process with that many CPU devices."""
  flags = f'--xla_force_host_platform_device_count={devices}'
  environment = os.environ | {'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'} | environment
  return subprocess.Popen(arguments, cwd=ROOT, env=environment, **options or {})


def start_two(arguments, devices, **options):
  """Two processes with that many CPU devices each, which know of each other."""
  return start_group(arguments, 2, devices, options)


def start_group(arguments, count, devices, options=None, **environment):
  """Some processes with that many CPU devices each, which know of each other."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    address = f'localhost:{free.getsockname()[1]}'
  names = {'COORDINATOR_ADDRESS': address, 'NUM_PROCESSES': str(count)} | environment
  return [start_one(arguments, devices, options, PROCESS_ID=str(i), **names) for i in range(count)]
