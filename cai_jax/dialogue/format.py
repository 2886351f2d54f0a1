"""Prompt formats: how messages become text and token ids.

To add a format, write one file with a class like `PlainFormat` in plain.py and register it:

  @FORMATS.register('alpaca')
  class AlpacaFormat: ...

Then choose it with `feedback.style='alpaca'`. Put the file into this folder, or keep it
anywhere and name it in `config.plugins`.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from cai_jax.dialogue.encode import Piece
from cai_jax.dialogue.messages import Message
from cai_jax.runtime.registry import Registry

TemplateOptions = tuple[tuple[str, Any], ...]  # (name, value) pairs


class Format(Protocol):
  """A prompt format, bound to one tokenizer.

  A format describes a dialogue as a sequence of pieces; `Encoder.encode` makes tokens of them. The
  messages that it receives have valid roles in a valid order, with demonstrations already
  inserted.
  """

  @property
  def stop_token_ids(self) -> tuple[int, ...]:
    """Token ids that end a turn."""
    ...

  @property
  def stop_strings(self) -> tuple[str, ...]:
    """Texts that end a turn because they begin the next one; () if only tokens end turns."""
    ...

  @property
  def prompt_opens_reasoning(self) -> bool:
    """Whether a prompt ends with `<think>`, so that a reply begins inside its reasoning."""
    ...

  def prompt(self, messages: Sequence[Message], reply_role: str) -> list[Piece]:
    """Return the pieces of the messages and of all that precedes the reply of `reply_role`."""
    ...

  def reply(self, text: str, reply_role: str) -> tuple[list[Piece], list[Piece]]:
    """Return (pieces that end a prompt for this role, pieces of the reply and its end token)."""
    ...

  def conversation(self, messages: Sequence[Message]) -> list[Piece]:
    """Return the pieces of a whole dialogue that ends with a reply."""
    ...


# Each entry is called as entry(encoder, eos_token_ids, template_options) and returns a Format. It
# raises UserError if the tokenizer or the options do not suit it.
FORMATS: Registry[Callable[..., Format]] = Registry('prompt format')
