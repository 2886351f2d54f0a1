"""Event files of TensorBoard.

`tensorboardX.SummaryWriter` writes from a thread. If the disk is full, the thread ends with a
traceback, and closing the writer then waits for it forever. This one writes at once.
"""

import pathlib
import time

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2

from cai_jax.runtime.files import make_folder, writing


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
