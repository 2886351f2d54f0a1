"""Event files of TensorBoard.

`tensorboardX.SummaryWriter` writes from a thread. If the disk is full, the thread ends with a
traceback, and closing the writer then waits for it forever. This one writes at once.
"""

import contextlib
import pathlib
import sys
import time
from collections.abc import Iterator

from cai_jax.runtime.files import make_folder, writing


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
  """Let imports behave as if torch were not installed, unless it is imported already."""
  is_imported = 'torch' in sys.modules
  if not is_imported:
    sys.modules['torch'] = None  # type: ignore[assignment]  # Python's mark for such a module
  try:
    yield
  finally:
    if not is_imported:
      sys.modules.pop('torch', None)


# tensorboardX imports torch, if it is installed, to accept its tensors. That takes seconds and
# 0.2 GB, and nothing here needs it. In this process, tensorboardX then accepts no torch tensors.
with _without_torch():
  from tensorboardX import summary
  from tensorboardX.event_file_writer import EventsWriter
  from tensorboardX.proto import event_pb2


class EventWriter:
  """A writer of one event file.

  Args:
    folder: the folder of the file, created if it does not exist.
    purge_step: TensorBoard hides events of earlier files at and after this step.
  """

  def __init__(self, folder: pathlib.Path, purge_step: int):
    self._folder = make_folder(folder)
    with writing(folder):
      self._events = EventsWriter(str(folder / 'events'))
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._write(event_pb2.Event(session_log=start), purge_step)

  def add_scalar(self, name: str, value: float, step: int) -> None:
    """Write a number."""
    self._write(event_pb2.Event(summary=summary.scalar(name, value)), step)

  def add_text(self, name: str, text: str, step: int) -> None:
    """Write a Markdown text."""
    self._write(event_pb2.Event(summary=summary.text(name, text)), step)

  def flush(self) -> None:
    """Pass everything to the operating system."""
    with writing(self._folder):
      self._events.flush()

  def close(self) -> None:
    """Close the file."""
    with writing(self._folder):
      self._events.close()

  def _write(self, event: event_pb2.Event, step: int) -> None:
    event.wall_time, event.step = time.time(), step
    with writing(self._folder):
      self._events.write_event(event)
