"""The command `serve`: load a model and serve it until a signal arrives."""

import argparse
import dataclasses
import os
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

from cai_jax.dialogue import FORMATS, Dialogue
from cai_jax.model import lm as models
from cai_jax.model.lm import LM
from cai_jax.runtime import interruption
from cai_jax.runtime.compilation import CompilationConfig, kept_programs
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.interruption import Interrupted
from cai_jax.runtime.mesh import make_mesh
from cai_jax.runtime.terminal import say
from cai_jax.runtime.text_files import parse_json
from cai_jax.sampling.auto import resolve_for
from cai_jax.sampling.config import EngineConfig, round_up_length
from cai_jax.sampling.engine import Engine
from cai_jax.serving.api import Api
from cai_jax.serving.server import LOOPBACK, Server
from cai_jax.serving.worker import Worker
from cai_jax.tiny.files import model_path

DEFAULT_LENGTH = 4096  # tokens


@dataclasses.dataclass(frozen=True)
class ServingConfig:
  """What is served, and where.

  Attributes:
    model: 'tiny', a folder, or a name on the Hugging Face hub.
    name: the name that requests use; '' stands for `model`.
    host: name or address to listen at.
    port: number of the port; 0 chooses a free one.
    token_env: environment variable with the token that requests must send; '' asks for none.
    style: how chats are rendered: 'chat', 'plain' or another prompt format.
    template_options: options of the chat template as a JSON object, such as
      '{"enable_thinking": false}'; '' for none.
    dtype: dtype of parameters and activations.
    length: context in tokens, of a prompt with its reply; 0 stands for what the model allows, at
      most 4,096.
    slots: number of replies in progress; 0 chooses what suits the devices.
    tensor: number of devices that split each parameter.
    expert: number of devices that split the experts of each layer.
  """

  model: str
  name: str = ''
  host: str = '127.0.0.1'
  port: int = 8000
  token_env: str = ''
  style: str = 'chat'
  template_options: str = ''
  dtype: str = 'float32'
  length: int = 0
  slots: int = 0
  tensor: int = 1
  expert: int = 1


def run_command(program: str, arguments: Sequence[str]) -> None:
  """Run the command.

  Args:
    program: how the command is called, for the help.
    arguments: the arguments of the command.

  Raises:
    UserError: if the model cannot be loaded, or the settings do not fit.
    Interrupted: after a signal, once all requests are answered.
  """
  parser = argparse.ArgumentParser(program, description=__doc__, allow_abbrev=False)
  texts = {
    'model': "'tiny', a checkpoint folder such as RUN/model, or a Hugging Face name",
    'name': 'name that requests use (default: the value of --model)',
    'host': 'address to listen at; any but this machine needs --token_env',
    'port': 'port; 0 chooses a free one',
    'token_env': 'environment variable with the token that requests must send',
    'style': f'prompt format of chats: {", ".join(FORMATS)}',
    'template_options': 'options of the chat template as JSON: \'{"enable_thinking": false}\'',
    'dtype': 'float32, bfloat16 or float16',
    'length': f"context in tokens (default: the model's, at most {DEFAULT_LENGTH})",
    'slots': 'replies in progress (default: what suits the devices)',
    'tensor': 'devices that split each parameter',
    'expert': 'devices that split the experts of each layer',
  }
  for field in dataclasses.fields(ServingConfig):
    required = field.default is dataclasses.MISSING
    note = (
      ''
      if required or not field.default or 'default' in texts[field.name]
      else (f' (default: {field.default})')
    )
    parser.add_argument(
      f'--{field.name}',
      type=str if required else type(field.default),
      required=required,
      default=None if required else field.default,
      help=texts[field.name] + note,
    )
  serve(ServingConfig(**vars(parser.parse_args(arguments))))


def serve(config: ServingConfig, started: Callable[[Server], None] | None = None) -> None:
  """Serve a model until a signal arrives, in the main thread.

  The first signal refuses new requests, and those in progress are answered. The second one ends
  the process at once.

  Args:
    config: what is served, and where.
    started: is called once requests are answered.

  Raises:
    UserError: if the model cannot be loaded, or the settings do not fit.
    Interrupted: after a signal, once all requests are answered.
  """
  token, options = read_token(config), read_options(config.template_options)
  # The address is taken before a model is loaded, which may take minutes.
  with Server(config.host, config.port, token) as server, kept_programs(CompilationConfig()):
    mesh = make_mesh(tensor=config.tensor, expert=config.expert)
    lm = models.load(model_path(config.model), config.dtype, mesh)
    worker = Worker(lm, make_engine(lm, config.length, config.slots))
    name = config.name or config.model
    server.api = Api(worker, name, make_dialogue(lm, config.style, options))
    with interruption.Deferral() as signals:
      signals.begin()
      server.is_closing = lambda: bool(signals.must_stop(0))
      threading.Thread(target=server.serve_forever, daemon=True).start()
      say(f'{name} is served at {server.url}, with a context of {worker.length} tokens')
      if started is not None:
        started(server)
      try:
        worker.run(lambda: server.is_closing() and server.is_idle)
      finally:
        server.shutdown()
      raise Interrupted(signals.must_stop(0), 'All requests are answered.')


def read_token(config: ServingConfig) -> str:
  """Return the token that requests must send; '' if they need none.

  Args:
    config: names the environment variable.

  Raises:
    UserError: if other machines can reach the server and there is no token, or the variable has
      none that can be sent.
  """
  if not config.token_env:
    if config.host in LOOPBACK:
      return ''
    raise UserError(
      f'--host={config.host} lets other machines use the model, so requests need a token. Put a '
      'random text into an environment variable and name it, such as --token_env=CAI_JAX_TOKEN.'
    )
  token = os.environ.get(config.token_env, '')
  if not re.fullmatch(r'[\x21-\x7e]{8,}', token):
    raise UserError(
      f'--token_env names the environment variable {config.token_env}, which must hold the token: '
      'at least 8 printable ASCII characters without spaces.'
    )
  return token


def make_engine(lm: LM, length: int = 0, slots: int = 0) -> Engine:
  """Return an engine for requests that are not known yet.

  Args:
    lm: the model.
    length: context in tokens; 0 stands for what the model allows, at most `DEFAULT_LENGTH`.
    slots: number of replies in progress; 0 chooses what suits the devices.

  Raises:
    UserError: if the context is longer than the model's, or does not fit into memory.
  """
  if length < 0 or slots < 0:
    raise UserError(f'--length={length} and --slots={slots} must not be negative.')
  if length > lm.max_positions:
    raise UserError(f'--length={length} exceeds the {lm.max_positions} positions of {lm.name}.')
  chosen = length or min(DEFAULT_LENGTH, lm.max_positions)
  config = resolve_for(EngineConfig(slots=slots) if slots else EngineConfig(), [lm])
  longest = min(round_up_length(chosen), lm.max_positions)
  return Engine({'base': lm}, length=longest, seed=0, config=config)


def read_options(text: str) -> tuple[tuple[str, Any], ...]:
  """Return the (name, value) pairs of `template_options`.

  Args:
    text: a JSON object, or ''.

  Raises:
    UserError: if it is neither.
  """
  try:
    options = parse_json(text) if text else {}
  except ValueError as error:
    raise UserError(f'--template_options={text} is not valid JSON: {error}.') from error
  if not isinstance(options, dict):
    raise UserError(f'--template_options={text} must be a JSON object: {{"name": value}}.')
  return tuple(options.items())


def make_dialogue(
  lm: LM, style: str, template_options: tuple[tuple[str, Any], ...] = ()
) -> Dialogue | UserError:
  """Return what renders the chats of a model, or why there is nothing.

  A base model without a chat template can still be served for completions.

  Args:
    lm: the model.
    style: name of the prompt format.
    template_options: (name, value) pairs for the chat template.

  Raises:
    UserError: if there is no such format.
  """
  FORMATS[style]  # raises if there is none
  try:
    return Dialogue(lm.tokenizer, style, lm.eos_token_ids, template_options)
  except UserError as error:
    say(f'no chat: {error}')
    return error
