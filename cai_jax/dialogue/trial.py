"""Render a chat template once in a process of its own, so that it can neither hang nor fill memory.

A chat template is a program that comes with a model. The sandbox of jinja keeps it from files and
from Python, but not from endless loops or huge texts. `check_limits` therefore runs this file as a
script, with limits on time and memory, before the template is used. The script imports only jinja2.
"""

import contextlib
import functools
import json
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

SECONDS = 1  # CPU time of the trial, about
RENDER_SECONDS = 2  # CPU time, of all threads, of each rendering after it
MEMORY = 1 << 29  # bytes of address space of the trial
MAX_MARKUP = 1_000_000  # characters that a rendering may have in addition to its contents

_MAX_WAIT = 60  # seconds of wall-clock time, for a process that sleeps or a busy machine
_DIALOGUES = (('user',), ('user', 'assistant'), ('user', 'assistant', 'user'), ('system', 'user'))


class TimeUpError(Exception):
  """A rendering that took more than `RENDER_SECONDS`."""


def call_with_limit(render: Callable[[], str]) -> str:
  """Call a function that renders a template, for at most `RENDER_SECONDS` of CPU time.

  Python delivers signals to the main thread only; in other threads there is no limit.

  Args:
    render: the function.

  Raises:
    TimeUpError: if it takes longer.
  """
  if threading.current_thread() is not threading.main_thread():
    return render()
  _install_handler()
  signal.setitimer(signal.ITIMER_VIRTUAL, RENDER_SECONDS)
  try:
    return render()
  finally:
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)


@functools.cache
def _install_handler() -> None:
  """Install the handler of the timer; once, because that takes as long as a short rendering."""

  def stop(*_: Any) -> None:
    raise TimeUpError(f'it took more than {RENDER_SECONDS} s')

  signal.signal(signal.SIGVTALRM, stop)


def check_limits(template: str, variables: Mapping[str, Any]) -> str | None:
  """Return how a template exceeds the limits, or None if it keeps them.

  Args:
    template: the chat template.
    variables: what the template sees besides the messages: special tokens and options.
  """
  return _run_trial(template, json.dumps(dict(variables), default=repr, sort_keys=True))


@functools.lru_cache(maxsize=256)
def _run_trial(template: str, variables: str) -> str | None:
  request = json.dumps({'path': sys.path, 'template': template, 'variables': variables})
  try:
    done = subprocess.run(
      [sys.executable, '-I', '-S', str(pathlib.Path(__file__).resolve())],
      input=request.encode(),
      capture_output=True,
      timeout=_MAX_WAIT,
      env={},
      check=False,
    )
  except subprocess.TimeoutExpired:
    return f'it did not end within {_MAX_WAIT} s'
  if done.returncode < 0:
    return f'it took more than {SECONDS} s or {MEMORY >> 20} MiB'
  if done.returncode:
    raise RuntimeError(f'The trial of a chat template failed: {done.stderr.decode()}')
  return json.loads(done.stdout)


def _main() -> None:
  """Read a template from stdin, render it, and write how it exceeds the limits, or null."""
  request = json.load(sys.stdin)
  sys.path[:] = request['path']
  import jinja2.ext  # needs the path
  import jinja2.sandbox  # noqa: F401 (imported before the memory is limited)

  _set_limits()
  try:
    failure = _try_dialogues(request['template'], json.loads(request['variables']))
  except MemoryError:
    failure = f'it took more than {MEMORY >> 20} MiB'
  except Exception:  # the template may raise anything; the caller meets the same error and names it
    failure = None
  json.dump(failure, sys.stdout)


def _set_limits() -> None:
  import resource  # not available on every system

  # The system counts the imports too, which take long on a slow disk; it knows whole seconds only.
  seconds = SECONDS + round(time.process_time())
  resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
  for kind, limit in (('RLIMIT_AS', MEMORY), ('RLIMIT_CORE', 0), ('RLIMIT_FSIZE', 1 << 16)):
    with contextlib.suppress(ValueError, OSError):  # some systems do not know the limit
      resource.setrlimit(getattr(resource, kind), (limit, limit))


def _try_dialogues(template: str, variables: dict[str, Any]) -> str | None:
  compiled = _compile(template)
  for roles in _DIALOGUES:
    messages = [{'role': role, 'content': f'content {i}'} for i, role in enumerate(roles)]
    for generate in (True, False):
      size = 0
      try:
        inputs = {'messages': messages, 'add_generation_prompt': generate, **variables}
        for part in compiled.generate(tools=None, documents=None, **inputs):
          size += len(part)
          if size > MAX_MARKUP:
            return f'it wrote more than {MAX_MARKUP} characters for short messages'
      except MemoryError:
        raise
      except Exception:  # a template may reject a dialogue, with any exception
        continue
  return None


def _compile(template: str) -> Any:
  """Return a template compiled in a sandbox like that of transformers."""
  import jinja2
  from jinja2 import nodes, sandbox

  def check_names(names: Any) -> None:
    if any(str(name).startswith('_') for name in names):
      raise jinja2.TemplateError('names may not begin with an underscore')

  def namespace(*args: Any, **kwargs: Any) -> Any:
    attributes = dict(*args, **kwargs)
    check_names(attributes)
    return jinja2.utils.Namespace(attributes)

  def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)

  environment = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols']
  )
  environment.globals |= {
    'raise_exception': raise_exception,
    'strftime_now': str,
    'namespace': namespace,
    'dict': lambda *args, **kwargs: dict(*args, **kwargs),
  }
  # The marks of assistant turns, an extension of transformers, change no text.
  parsed = environment.parse(_without_marks(template))
  check_names(node.attr for node in parsed.find_all(nodes.NSRef))
  return environment.from_string(parsed)


def _without_marks(template: str) -> str:
  import re

  mark = r'\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}'
  return re.sub(mark, r'{%\1 if true \3%}{% endif %}', template)


if __name__ == '__main__':
  _main()
